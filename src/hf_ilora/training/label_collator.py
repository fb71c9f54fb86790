"""Batches of training windows with what the teacher said about their labels."""

import numpy as np
import torch

from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL

from .windows import LABELLED_POSITIONS, NextItemCollator


class DistillationCollator(NextItemCollator):
    """As `NextItemCollator`, with the teacher's items for the labelled positions.

    Args:
        teacher_labels: of the split that the windows were made of.
        distilled_positions: "last" takes teacher labels for the newest label of each window only, as DLLM2Rec does;
            "all" for every label that the teacher was asked about.

    Rows are those of `TrainingWindows(with_origins=True)`, or of `EvaluationHistories`, which stay as they are. Batches
    add, to `input_ids` and `labels`:
        teacher_items: (batch, length, top_k) int64, best first, 0 where the teacher was not asked.
        teacher_distances: (batch, length, top_k) float32.

    Raises:
        ValueError: for another `distilled_positions`, and when called with rows of `TrainingWindows` without origins.
    """

    padding = NextItemCollator.padding | {"history_ids": -1, "prefix_lengths": -1}

    def __init__(self, teacher_labels: TeacherLabels, distilled_positions: str):
        if distilled_positions not in LABELLED_POSITIONS:
            raise ValueError(
                f"distilled_positions is {distilled_positions!r}: expected one of {', '.join(LABELLED_POSITIONS)}"
            )
        self.teacher_labels, self.distilled_positions = teacher_labels, distilled_positions

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        if "history_ids" not in batch:
            if "seen_items" not in batch:
                raise ValueError(
                    "rows have neither history_ids nor seen_items: expected those of TrainingWindows(..., "
                    "with_origins=True), which say what the teacher was asked about, or of EvaluationHistories"
                )
            return batch  # rows of evaluation, about which no teacher is asked
        origins = batch.pop("history_ids"), batch.pop("prefix_lengths")  # (batch, length) each
        items, distances = self.teacher_labels.lookup(*origins)  # (batch, length, top_k) each
        asked = batch["labels"].ne(IGNORED_LABEL)  # (batch, length)
        if self.distilled_positions == "last":
            asked = newest_only(asked)
        batch["teacher_items"] = items * asked.unsqueeze(-1)
        batch["teacher_distances"] = distances
        return batch


def newest_only(labelled: torch.Tensor) -> torch.Tensor:
    """(batch, length) bool -> the same with the last True of each row alone."""
    remaining = labelled.flip(1).cumsum(1).flip(1)  # (batch, length), labelled positions from here on
    return labelled & remaining.eq(1)


__all__ = ["DistillationCollator", "newest_only"]
