"""Batches of training windows with the teacher's answers about their labels."""

import numpy as np
import torch

from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID

from .windows import NextItemCollator, with_label_indices


class DistillationCollator(NextItemCollator):
    """As `NextItemCollator`, with the teacher's items for all labelled positions that the teacher was asked about.

    Which of them are distilled is a setting of the Trainer alone (`distilled_positions`).

    Args:
        teacher_labels: answers about the split that the windows were made of.

    Rows come from `TrainingWindows(with_origins=True)`, or from `EvaluationHistories`, to which nothing is added.
    Training batches get, beside `input_ids` and `labels`:
        teacher_items: (batch, length, top_k) int64, best first, 0 where the teacher was not asked.
        teacher_distances: (batch, length, top_k) float32.

    Raises:
        ValueError: when called with rows of `TrainingWindows` without origins.
    """

    padding = NextItemCollator.padding | {"history_ids": -1, "prefix_lengths": -1}

    def __init__(self, teacher_labels: TeacherLabels):
        self.teacher_labels = teacher_labels

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
        batch["teacher_items"] = items * batch["labels"].ne(IGNORED_LABEL).unsqueeze(-1)
        batch["teacher_distances"] = distances
        return batch


class TeacherIndices:
    """Adds to batches the indices of the labels and of the teacher's answers that are distilled.

    Args:
        distilled_positions: "last" distils the newest label of each window only, as DLLM2Rec does; "all" every label
            that the teacher was asked about.
        top_k: teacher items per label that count.
        names_items: adds `named_items` for a loss over a sample of the catalogue: "labels" for a loss that reads every
            label, "answers" for one that reads only those that the teacher was asked about; None adds nothing.

    Batches of `DistillationCollator` get, beside the `label_indices` of `with_label_indices`:
        teacher_indices: (asked,) int64, ascending, where the teacher was asked, in the flattened (batch * length).
        teacher_items, teacher_distances: (asked, k) at these positions alone.
        named_items: (any,) int64, the distinct targets and teacher items.
    Batches without teacher items, for a teacher that is asked in every step, get `teacher_indices` of the newest
    labels.
    """

    def __init__(self, distilled_positions: str, top_k: int, names_items: str | None = None):
        self.distilled_positions, self.top_k, self.names_items = distilled_positions, top_k, names_items

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = with_label_indices(batch)
        labels = batch["labels"]  # (batch, length)
        asked = labels.ne(IGNORED_LABEL)
        has_answers = "teacher_items" in batch
        if self.distilled_positions == "last" or not has_answers:
            asked = newest_only(asked)
        if has_answers:
            asked = asked & batch["teacher_items"][..., 0].ne(PADDING_ITEM_ID)
        batch["teacher_indices"] = indices = asked.flatten().nonzero().squeeze(1)  # (asked,)
        if has_answers:
            for name in ("teacher_items", "teacher_distances"):
                batch[name] = batch[name].flatten(0, 1)[indices, : self.top_k]  # (asked, k)
        if self.names_items is not None:
            targets = labels.flatten()[batch["label_indices"] if self.names_items == "labels" else indices]
            named = torch.cat([targets, batch["teacher_items"].flatten()]).unique()
            batch["named_items"] = named[named != PADDING_ITEM_ID]
        return batch


def newest_only(labelled: torch.Tensor) -> torch.Tensor:
    """(batch, length) bool -> (batch, length) bool, of each row only the last True."""
    remaining = labelled.flip(1).cumsum(1).flip(1)  # (batch, length), labelled positions from here on
    return labelled & remaining.eq(1)


__all__ = ["DistillationCollator", "TeacherIndices", "newest_only"]
