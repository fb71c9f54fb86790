"""Soft targets for every position, beside the true next item: from an ensemble of teachers and title neighbours."""

from collections.abc import Callable

import torch

from hf_ilora.distillation.ensemble import EnsembleTeacher
from hf_ilora.distillation.ensemble_members import Positions, TitleSimilarity
from hf_ilora.distillation.losses import STUDENT_LOSS
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_losses import Columns, SoftTarget

from .distillation_arguments import DistillationArguments


class SoftTargets:
    """Makes the soft targets of a batch.

    Args:
        ensemble: the teachers, whose divergence has the weight `args.kl_weight`, or None.
        similarity: similarity of titles, whose divergence has the weight `args.title_neighbours`, or None.
        args: arguments of the training.
    """

    def __init__(
        self, ensemble: EnsembleTeacher | None, similarity: TitleSimilarity | None, args: DistillationArguments
    ):
        self.ensemble, self.similarity = ensemble, similarity
        self.kl_weight, self.neighbour_weight = args.kl_weight, args.title_neighbours
        self.neighbour_temperature = args.title_neighbour_temperature
        self.parts: list[str] = []  # names of the parts of the loss, in the order of the soft targets
        if ensemble is not None:
            self.parts.append("kl_loss")
        if similarity is not None:
            self.parts.append("title_neighbour_loss")

    def of_batch(
        self, input_ids: torch.Tensor, indices: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Callable[[torch.Tensor, torch.Tensor | None], list[SoftTarget]]:
        """The soft targets of some positions of a batch, as a student's forward takes them.

        Args:
            input_ids: (batch, length), padding on either side.
            indices: (positions,) in the flattened (batch * length).
            labels: stored answers at these positions: items (positions, k), 0 without a label, and distances.
        """
        positions = Positions.of_batch(input_ids, indices, labels)

        def soft_targets(targets: torch.Tensor, negatives: torch.Tensor | None) -> list[SoftTarget]:
            made = []
            if self.ensemble is not None:
                made.append(self.ensemble.soft_target(positions, targets, negatives, self.kl_weight))
            if self.similarity is not None:
                made.append(self._neighbours(targets, negatives))
            return made

        return soft_targets

    @torch.no_grad()
    def _neighbours(self, targets: torch.Tensor, negatives: torch.Tensor | None) -> SoftTarget:
        """The softmax over all competing items but the target of the cosines between their titles and the target's."""
        items = negatives
        if items is None:
            items = torch.arange(1, self.similarity.num_items + 1, device=targets.device)
        opinion = self.similarity.neighbours_of(targets, self.neighbour_temperature)
        cosines = opinion.about(items, Columns(items, self.similarity.num_items))

        def scores(chunk: slice) -> tuple[torch.Tensor, None]:
            found = cosines(chunk)
            if negatives is None:
                found.scatter_(1, targets[chunk].unsqueeze(1) - 1, torch.finfo(found.dtype).min)
            return found, None

        return SoftTarget(scores, self.neighbour_weight)


def check_soft_targets(args: DistillationArguments, model: EncoderForNextItem) -> None:
    """Raise a ValueError for settings and students that cannot learn from soft targets at every position."""
    config = model.config
    shares = config.loss_type == "sampled_softmax" and config.negative_sharing == "batch"
    if args.base_loss != STUDENT_LOSS or not (config.loss_type == "cross_entropy" or shares):
        raise ValueError(
            f"base_loss is {args.base_loss!r}, loss_type {config.loss_type!r} and negative_sharing "
            f"{config.negative_sharing!r}, where teachers and title neighbours are distilled at every position: "
            "expected base_loss 'student', and loss_type 'cross_entropy', or 'sampled_softmax' with negative_sharing "
            "'batch'"
        )
    if args.kl_temperature != 1 or args.kl_direction != "forward":
        raise ValueError(
            f"kl_temperature is {args.kl_temperature} and kl_direction {args.kl_direction!r} at every position: "
            "expected 1 and 'forward'; EnsembleTeacher(..., temperature=...) divides the teacher's scores"
        )


__all__ = ["SoftTargets", "check_soft_targets"]
