"""Turns rows of histories, candidates and targets into batches for an iLoRA model."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_ilora.models.ilora.prompts import PromptBuilder
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID

from .candidate_rows import CandidateRow


class PromptCollator:
    """Collates rows into prompts, choosing each row's template and whether it shows its candidates.

    Rows are dictionaries of `history` (items,), `target`, `candidates` (num_candidates,) and `uniforms`, two numbers
    in [0, 1): the first picks the template, the second shows the candidates when it is below `candidate_fraction`.
    Zeros, as evaluation rows have them, mean the first template, with candidates unless `candidate_fraction` is 0.

    Args:
        prompt_builder: builds the prompts.
        candidate_fraction: fraction of the rows that show their candidates. It may change during training: between
            epochs, where worker processes have a copy of the collator.
        order_candidates: puts candidates (batch, num_candidates) in the order in which histories (batch, longest) are
            to see them, such as `PreferredOrder`; None leaves them as they come.
        scores_candidates: whether the model scores all candidates' titles (`candidate_loss_weight`). If so, prompts
            end before the title, and batches have the candidates.

    Raises:
        ValueError: for a fraction outside [0, 1], and when it asks for templates that the builder lacks.
    """

    def __init__(
        self,
        prompt_builder: PromptBuilder,
        candidate_fraction: float = 1.0,
        order_candidates: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        scores_candidates: bool = False,
    ):
        templates = (prompt_builder.candidate_templates, prompt_builder.history_templates)
        check_candidate_fraction(candidate_fraction, *map(len, templates))
        self.prompt_builder, self.candidate_fraction = prompt_builder, candidate_fraction
        self.order_candidates, self.scores_candidates = order_candidates, scores_candidates

    def __call__(self, rows: Sequence[CandidateRow]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            input_ids, attention_mask (batch, tokens) and placeholder_items (batch, placeholders) as
            `PromptBuilder.build` gives them; title_labels (batch, title tokens), the last columns of its labels,
            which contain the titles, so that only these columns are scored, or candidates (batch, num_candidates);
            histories (batch, longest) padded with 0 on the left; labels (batch,), the targets; shows_candidates
            (batch,) bool.

        Raises:
            ValueError: as `PromptBuilder.build`.
        """
        histories = left_padded([row["history"] for row in rows])  # (batch, longest)
        candidates: np.ndarray | torch.Tensor = left_padded([row["candidates"] for row in rows])  # (batch, candidates)
        if self.order_candidates is not None:
            candidates = self.order_candidates(torch.from_numpy(histories), torch.as_tensor(candidates))
        targets = np.array([row["target"] for row in rows], dtype=np.int64)  # (batch,)
        uniforms = np.array([row["uniforms"] for row in rows])  # (batch, 2)
        shows_candidates = uniforms[:, 1] < self.candidate_fraction
        num_templates = np.where(
            shows_candidates,
            len(self.prompt_builder.candidate_templates),
            len(self.prompt_builder.history_templates),
        )
        prompts = self.prompt_builder.build(
            histories[:, -self.prompt_builder.max_history :],
            candidates,
            template_indices=(uniforms[:, 0] * num_templates).astype(np.int64),
            show_candidates=shows_candidates,
            targets=None if self.scores_candidates else targets,
        )
        if self.scores_candidates:
            answers = {"candidates": torch.as_tensor(candidates)}
        else:
            assert prompts.title_labels is not None  # of the targets
            longest = int(prompts.title_labels.ne(IGNORED_LABEL).sum(1).max())
            answers = {"title_labels": prompts.title_labels[:, -longest:]}
        return {
            "input_ids": prompts.input_ids,
            "attention_mask": prompts.attention_mask,
            "placeholder_items": prompts.placeholder_items,
            **answers,
            "histories": torch.from_numpy(histories),
            "labels": torch.from_numpy(targets),
            "shows_candidates": torch.from_numpy(shows_candidates),
        }


def check_candidate_fraction(
    candidate_fraction: float, num_candidate_templates: int, num_history_templates: int
) -> None:
    """Raise a ValueError unless the fraction is in [0, 1] and there are templates for the prompts that it asks for."""
    if not 0 <= candidate_fraction <= 1:
        raise ValueError(f"candidate_fraction is {candidate_fraction}: expected a fraction in [0, 1]")
    for kind, is_missing, remedy in (
        ("with", candidate_fraction > 0 and not num_candidate_templates, 0),
        ("without", candidate_fraction < 1 and not num_history_templates, 1),
    ):
        if is_missing:
            raise ValueError(
                f"candidate_fraction is {candidate_fraction} and no template is {kind} {{candidates}}: add one, or set "
                f"candidate_fraction to {remedy}"
            )


def left_padded(sequences: list[np.ndarray]) -> np.ndarray:
    """Sequences of item ids as (rows, longest) int64."""
    lengths = np.array([len(sequence) for sequence in sequences])
    padded = np.full((len(sequences), lengths.max()), PADDING_ITEM_ID, dtype=np.int64)
    padded[np.arange(lengths.max()) >= lengths.max() - lengths[:, None]] = np.concatenate(sequences)
    return padded


__all__ = ["PromptCollator", "check_candidate_fraction", "left_padded"]
