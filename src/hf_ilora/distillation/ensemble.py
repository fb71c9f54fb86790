"""Several teachers as one: the weighted sum of their scores, asked online at every position."""

import hashlib
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from hf_ilora.distillation.ensemble_members import (
    LabelScores,
    LogCounts,
    Positions,
    RecommenderScores,
    TitleSimilarity,
)
from hf_ilora.distillation.losses import check_temperature
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.distillation.teachers import model_fingerprint
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.histories import Histories, padded_histories
from hf_ilora.models.next_item.item_filters import ItemFilter, item_masks
from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem
from hf_ilora.models.next_item.next_item_losses import Columns, SoftTarget
from hf_ilora.models.next_item.next_item_model import newest_items
from hf_ilora.models.next_item.top_k import masked_top_k

Member = RecommenderScores | TitleSimilarity | LogCounts | LabelScores
AskedMember = Member | EncoderForNextItem | TransitionCountsForNextItem | PopularityForNextItem | TeacherLabels


class EnsembleTeacher(nn.Module):
    """A teacher whose logits are the weighted sum of its members' scores, divided by a temperature.

    `DistillationTrainer(teacher=...)` asks it in every step, about every position, and only about the items that
    compete there. It also ranks the catalogue, as any recommender does.

    Args:
        members: saved or trained recommenders (SASRec, GRU4Rec: their scores; transition counts and popularity: the
            logarithm of their scores, see `LogCounts`), `TitleSimilarity`, and `TeacherLabels` of teachers that are too
            slow to be asked.
        weights: one number per member, at least 0.
        temperature: divides the sum.

    Raises:
        ValueError: for members with catalogues of different sizes, weights that are negative or not one per member, and
            a temperature that is not positive.
    """

    def __init__(self, members: Sequence[AskedMember], weights: Sequence[float], temperature: float = 1.0):
        super().__init__()
        if not members or len(members) != len(weights):
            raise ValueError(
                f"there are {len(members)} members and {len(weights)} weights: expected at least one member, and a "
                "weight for each; pass equally long lists"
            )
        for weight in weights:
            if not 0 <= weight < math.inf:
                raise ValueError(f"a weight is {weight}: expected finite numbers, at least 0")
        if not any(weights):
            raise ValueError("all weights are 0: expected at least one positive")
        check_temperature(temperature)
        asked = [as_member(member) for member in members]
        self.members = nn.ModuleList(asked)
        self.weights, self.temperature = tuple(map(float, weights)), temperature
        sizes = {member.num_items for member in asked}
        if len(sizes) > 1:
            raise ValueError(
                f"the members have catalogues of {' and '.join(map(str, sorted(sizes)))} items: expected the same "
                "catalogue; train or fit all of them on the same data set"
            )
        self.num_items = sizes.pop()
        lengths = [member.max_length for member in asked if member.max_length is not None]
        self.max_length: int | None = min(lengths, default=None)
        self.requires_grad_(False)
        self.eval()

    def _members(self) -> list[Member]:
        return [cast(Member, member) for member in self.members]

    @property
    def labels(self) -> list[TeacherLabels]:
        """The stored labels among the members."""
        return [member.labels for member in self.members if isinstance(member, LabelScores)]

    @property
    def catalogue(self) -> Catalogue | None:
        """The catalogue of the first member that has one."""
        models = [member.model for member in self._members() if isinstance(member, RecommenderScores | LogCounts)]
        return next((model.catalogue for model in models if model.catalogue is not None), None)

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that determines the answers; the same for every copy."""
        digest = hashlib.sha256(repr((self.weights, self.temperature)).encode())
        for member in self._members():
            if isinstance(member, TitleSimilarity):
                digest.update(f"titles {member.decay}".encode())
                digest.update(member.table.detach().cpu().contiguous().numpy().data)
            elif isinstance(member, LabelScores):
                digest.update(repr(sorted(member.labels.origin().items())).encode())
            else:
                digest.update(model_fingerprint(member.model).encode())
                if isinstance(member, LogCounts):
                    digest.update(f"floor {member.floor}".encode())
        return digest.hexdigest()

    @torch.no_grad()
    def soft_target(
        self, positions: Positions, targets: torch.Tensor, items: torch.Tensor | None, weight: float
    ) -> SoftTarget:
        """The ensemble's distribution at each position, over the items that a loss scores there.

        Args:
            positions: the positions to ask the members about.
            targets: (positions,) item ids, which compete in addition to `items`.
            items: (items,) item ids; None for the whole catalogue, targets included.
            weight: weight of the divergence from this distribution in the loss.
        """
        opinions = [
            (member.at(positions), factor / self.temperature)
            for member, factor in zip(self._members(), self.weights, strict=True)
            if factor
        ]
        asked = torch.arange(1, self.num_items + 1, device=targets.device) if items is None else items
        columns = Columns(asked, self.num_items)
        parts = [(opinion.about(asked, columns), factor) for opinion, factor in opinions]
        of_targets = None
        if items is not None:
            of_targets = targets.new_zeros(len(targets), 1, dtype=torch.float32)
            for opinion, factor in opinions:
                of_targets += (opinion.of_targets(targets).float() * factor).unsqueeze(1)

        def scores(chunk: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
            (first, first_factor), *others = parts
            total = first(chunk).mul_(first_factor)
            for part, factor in others:
                total.add_(part(chunk), alpha=factor)
            return total, None if of_targets is None else of_targets[chunk]

        position_weights = None
        if all(isinstance(member, LabelScores) for member in self.members):
            assert positions.labels is not None  # the members have asked for them
            position_weights = positions.labels[0].ne(PADDING_ITEM_ID).any(1).float()
        return SoftTarget(scores, weight, position_weights)

    @torch.no_grad()
    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) item ids, padded on either side -> (batch, num_items + 1) logits, -inf for padding."""
        length = input_ids.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"input_ids have {length} columns: expected at most {self.max_length}, the number of items that every "
                "member can read; keep the newest, as `recommend` does"
            )
        positions = Positions.last_of_batch(input_ids)
        scores, _ = self.soft_target(positions, input_ids[:, 0], None, 1.0).scores(slice(0, len(input_ids)))
        padding = scores.new_full((len(scores), 1), float("-inf"))
        return torch.cat([padding, scores.float()], dim=1)

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend as every recommender does: item_ids and log-probabilities, (batch, top_k) each."""
        histories = padded_histories(histories, self.num_items, self.device)
        seen = histories if exclude_seen else None
        masks = item_masks(len(histories), self.num_items, self.device, seen, allowed_items, excluded_items)
        read = histories if self.max_length is None else newest_items(histories, self.max_length)
        scores = self.next_item_scores(read)
        item_ids, best = masked_top_k(scores, top_k, masks)
        return item_ids, (best - scores.logsumexp(1, keepdim=True)).clamp(max=0)

    def rank_items(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of `recommend` with distances, -log p."""
        item_ids, log_probabilities = self.recommend(histories, top_k, exclude_seen, allowed_items, excluded_items)
        return item_ids, -log_probabilities

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in (*self.parameters(), *self.buffers())), torch.device("cpu"))


def as_member(member: AskedMember) -> Member:
    """Wrap a recommender or labels as a member of an ensemble; a member is returned unchanged."""
    if isinstance(member, Member):
        return member
    if isinstance(member, TransitionCountsForNextItem | PopularityForNextItem):
        return LogCounts(member)
    if isinstance(member, TeacherLabels):
        return LabelScores(member)
    return RecommenderScores(member)


__all__ = ["EnsembleTeacher", "as_member"]
