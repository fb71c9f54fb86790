"""Torch data sets over prepared splits: training windows, evaluation histories, and their collator."""

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback

from hf_ilora.data.columns import flatten_lists, read_column, training_sequences
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID

WINDOWS = ("random", "all", "last")
TARGETS = ("all", "last")


def check_windows(windows: str, targets: str, skip_probability: float, shuffle_distance: float) -> None:
    """Raise a ValueError unless the settings of `TrainingWindows` are in range and fit together."""
    if windows not in WINDOWS or targets not in TARGETS:
        raise ValueError(f"windows={windows!r}, targets={targets!r}: expected one of {WINDOWS} and one of {TARGETS}")
    if not 0 <= skip_probability < 1 or shuffle_distance < 0:
        raise ValueError(
            f"skip_probability={skip_probability}, shuffle_distance={shuffle_distance}: expected a probability in "
            "[0, 1) and a distance of at least 0"
        )
    if targets == "last" and (skip_probability or shuffle_distance):
        raise ValueError("targets='last' keeps the target in its place: expected no skipping and no shuffling")


class TrainingWindows(TorchDataset):
    """Windows of at most `max_length` inputs over the training sequences, with the next item as label.

    Args:
        split: rows with `history` (list of item ids, oldest first) and `target`.
        max_length: inputs per window.
        windows: which windows of a longer sequence an epoch sees. "random": one at a uniformly random place, another
            one each epoch, so that training covers whole histories; "all": every item as a target once; "last": the
            newest window only, as the published programs do.
        targets: "all" labels every position, "last" only the newest (one label per row, for rows that are already
            prefixes of each other).
        skip_probability: share of a window's items that an epoch leaves out at random, so that the model also learns
            what follows two or three steps later.
        shuffle_distance: how many places, at most, an item moves within the window in an epoch; many histories hold
            ties in time, whose order means nothing.
        seed: of all that is random; it depends on (seed, epoch, row) alone, so that a resumed run repeats it.
        with_origins: say of each label where it comes from, which teacher labels are looked up by.

    Items are dictionaries of `input_ids` and `labels`, arrays of equal length; with origins also of `history_ids`, the
    row of the split, and `label_positions`, the number of items that stand before the label in that row.
    """

    def __init__(
        self,
        split: Dataset,
        max_length: int,
        windows: str = "random",
        targets: str = "all",
        skip_probability: float = 0.0,
        shuffle_distance: float = 0.0,
        seed: int = 0,
        with_origins: bool = False,
    ):
        check_windows(windows, targets, skip_probability, shuffle_distance)
        self.items, boundaries = training_sequences(split)
        lengths = np.diff(boundaries) - 1  # inputs per sequence, (rows,)
        self.max_length, self.windows, self.targets, self.seed = max_length, windows, targets, seed
        self.skip_probability, self.shuffle_distance, self.epoch = skip_probability, shuffle_distance, 0
        self.with_origins = with_origins
        sequence_starts = boundaries[:-1]
        self._rows = np.arange(len(lengths))  # (windows,), the row of each
        if windows == "all":
            per_row = -(-lengths // max_length)  # windows of max_length inputs, aligned to the newest item
            self._rows = row = np.repeat(self._rows, per_row)
            from_newest = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
            last_inputs = lengths[row] - from_newest * max_length  # inputs that lie before the window's end
            self.lengths = np.minimum(last_inputs, max_length)
            self.starts = sequence_starts[row] + last_inputs - self.lengths
        else:
            self.lengths = np.minimum(lengths, max_length)
            self.starts = sequence_starts + lengths - self.lengths
        self._first_starts = sequence_starts  # (rows,)
        self._newest_starts = self.starts
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Move the random windows to their places of this epoch."""
        self.epoch = epoch
        if self.windows == "random":
            choices = self._newest_starts - self._first_starts + 1  # (rows,)
            generator = np.random.default_rng((self.seed, epoch))
            self.starts = self._first_starts + generator.integers(0, choices)

    @property
    def num_targets(self) -> int:
        """Labelled positions per epoch, before any are skipped."""
        return int(self.lengths.sum()) if self.targets == "all" else len(self.lengths)

    def item_counts(self, num_items: int) -> np.ndarray:
        """How often each item occurs in training, (num_items + 1,) float32, 0 for padding.

        With `targets="last"` only the targets count: the rows are prefixes, and repeat their histories.
        """
        counted = self.items if self.targets == "all" else self.items[self.starts + self.lengths]
        return np.bincount(counted, minlength=num_items + 1).astype(np.float32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        places = np.arange(self.starts[index], self.starts[index] + self.lengths[index] + 1)
        if self.skip_probability or self.shuffle_distance:
            places = self._disturbed(places, index)
        sequence = self.items[places]
        labels = sequence[1:]
        if self.targets == "last":
            labels = np.where(np.arange(len(labels)) == len(labels) - 1, labels, IGNORED_LABEL)
        row = {"input_ids": sequence[:-1], "labels": labels}
        if self.with_origins:
            history_id = self._rows[index]
            row["history_ids"] = np.full(len(labels), history_id)
            row["label_positions"] = places[1:] - self._first_starts[history_id]
        return row

    def _disturbed(self, sequence: np.ndarray, index: int) -> np.ndarray:
        """The places of a sequence with some left out and the others moved a little; at least two stay."""
        generator = np.random.default_rng((self.seed, self.epoch, index))
        kept = generator.random(len(sequence)) >= self.skip_probability
        places = np.arange(len(sequence)) + self.shuffle_distance * generator.random(len(sequence))
        if kept.sum() < 2:
            kept[:] = True
        return sequence[kept][np.argsort(places[kept])]


class EvaluationHistories(TorchDataset):
    """Validation or test rows for the Trainer: the newest items, the target as last label, and all seen items.

    Args:
        split: rows with `history` and `target`.
        max_length: newest items that the model reads.
    """

    def __init__(self, split: Dataset, max_length: int):
        if len(split) == 0:
            raise ValueError("the evaluation split is empty: expected one row per user; loosen the filters")
        self.items, self.boundaries = flatten_lists(split, "history")
        self.targets = read_column(split, "target").to_numpy()
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        history = self.items[self.boundaries[index] : self.boundaries[index + 1]]
        input_ids = history[-self.max_length :]
        labels = np.full(len(input_ids), IGNORED_LABEL)
        labels[-1] = self.targets[index]
        return {"input_ids": input_ids, "labels": labels, "seen_items": history}


class NextItemCollator:
    """Pads rows on the right to the longest of the batch: every key becomes (batch, length) int64."""

    padding = {"input_ids": PADDING_ITEM_ID, "labels": IGNORED_LABEL, "seen_items": PADDING_ITEM_ID}

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = {}
        for key in rows[0]:
            lengths = np.array([len(row[key]) for row in rows])
            padded = np.full((len(rows), lengths.max()), self.padding[key])  # (batch, length)
            padded[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate([row[key] for row in rows])
            batch[key] = torch.from_numpy(padded)
        return batch


class WindowEpochCallback(TrainerCallback):
    """Tells the training windows which epoch begins."""

    def __init__(self, windows: TrainingWindows):
        self.windows = windows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.windows.set_epoch(int(state.epoch or 0))
