"""Torch data sets over prepared splits: training windows, evaluation histories, and their collator."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import TrainerCallback

from hf_ilora.data.columns import ListColumn, check_has_rows, read_column
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID

WINDOWS = ("random", "all", "last")
LABELLED_POSITIONS = ("all", "last")


def check_windows(windows: str, labelled_positions: str, skip_probability: float, shuffle_distance: float) -> None:
    """Raise a ValueError unless the settings of `TrainingWindows` are in range and fit together."""
    if windows not in WINDOWS or labelled_positions not in LABELLED_POSITIONS:
        raise ValueError(
            f"windows={windows!r}, labelled_positions={labelled_positions!r}: expected one of {WINDOWS} and one of "
            f"{LABELLED_POSITIONS}"
        )
    if not 0 <= skip_probability < 1 or shuffle_distance < 0:
        raise ValueError(
            f"skip_probability={skip_probability}, shuffle_distance={shuffle_distance}: expected a probability in "
            "[0, 1) and a distance of at least 0"
        )
    if labelled_positions == "last" and (skip_probability or shuffle_distance):
        raise ValueError(
            "labelled_positions='last' labels the newest item of a window, which must stay in its place: expected "
            "skip_probability=0 and shuffle_distance=0"
        )


def rows_are_prefixes(split: Dataset) -> bool:
    """Whether consecutive rows belong to one user, as where every row of a user is a prefix of the next one.

    Labels on all positions of such rows would count most targets many times.
    """
    if "user_id" not in split.column_names or len(split) < 2:
        return False
    users = read_column(split, "user_id").combine_chunks()
    return bool(pc.any(pc.equal(users[1:], users[:-1])).as_py())


def item_counts(split: Dataset, num_items: int, labelled_positions: str = "all") -> torch.Tensor:
    """How often each item occurs in the training rows, (num_items + 1,) float32, 0 for padding.

    With `labelled_positions="last"` only the targets count: the rows may be prefixes, which repeat their histories.

    Raises:
        ValueError: for a split without rows.
    """
    check_has_rows(split)
    counts = np.bincount(read_column(split, "target").to_numpy(), minlength=num_items + 1)
    if labelled_positions == "all":
        for items in ListColumn(split, "history").pieces():
            counts += np.bincount(items, minlength=num_items + 1)
    return torch.from_numpy(counts.astype(np.float32))


class TrainingWindows(TorchDataset):
    """Windows of at most `max_length` inputs over the training sequences; the label of an input is the next item.

    Args:
        split: rows with `history` (list of item ids, oldest first) and `target`.
        max_length: inputs per window.
        windows: which windows of a longer sequence an epoch sees. "random": one at a uniformly random place, another
            one each epoch, so that training covers whole histories; "all": every item as a target once; "last": the
            newest window only, as the published programs do.
        labelled_positions: "all" labels every position, "last" only the newest (one label per row, for rows that are
            prefixes of each other).
        skip_probability: probability with which an epoch leaves out an item of a window, so that the model also learns
            what follows two or three steps later.
        shuffle_distance: how many places, at most, an item moves within the window in an epoch; many histories have
            ties in time, whose order means nothing.
        seed: random seed; draws depend on (seed, epoch, row) alone, so that a resumed run repeats them.
        with_origins: adds the origin of each label, by which teacher labels are looked up.

    Items are dictionaries of `input_ids` and `labels`, arrays of equal length; with origins also of `history_ids`, the
    row of the split, and `prefix_lengths`, the number of items before the label in that row.
    """

    def __init__(
        self,
        split: Dataset,
        max_length: int,
        windows: str = "random",
        labelled_positions: str = "all",
        skip_probability: float = 0.0,
        shuffle_distance: float = 0.0,
        seed: int = 0,
        with_origins: bool = False,
    ):
        check_windows(windows, labelled_positions, skip_probability, shuffle_distance)
        check_has_rows(split)
        self.histories, self.targets = ListColumn(split, "history"), read_column(split, "target").to_numpy()
        lengths = self.histories.lengths  # inputs per sequence, (rows,)
        self.max_length, self.windows, self.seed = max_length, windows, seed
        self.labelled_positions = labelled_positions
        self.skip_probability, self.shuffle_distance, self.epoch = skip_probability, shuffle_distance, 0
        self.with_origins = with_origins
        if windows == "all":
            per_row = -(-lengths // max_length)  # windows of max_length inputs, aligned to the newest item
            self._rows = row = np.repeat(np.arange(len(lengths)), per_row)  # (windows,), the row of each
            from_newest = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
            last_inputs = lengths[row] - from_newest * max_length  # inputs that lie before the window's end
            self.lengths = np.minimum(last_inputs, max_length)
            self.starts = last_inputs - self.lengths  # in the row
        else:
            self._rows = np.arange(len(lengths))
            self.lengths = np.minimum(lengths, max_length)
            self.starts = lengths - self.lengths
        self._newest_starts = self.starts
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Move the random windows to their places of this epoch."""
        self.epoch = epoch
        if self.windows == "random":
            generator = np.random.default_rng((self.seed, epoch))
            self.starts = generator.integers(0, self._newest_starts + 1)

    @property
    def num_targets(self) -> int:
        """Labelled positions per epoch, before any are skipped."""
        return int(self.lengths.sum()) if self.labelled_positions == "all" else len(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        history_id, start = self._rows[index], self.starts[index]
        end = start + self.lengths[index]  # of the inputs
        history = self.histories[history_id]
        sequence = history[start : end + 1]
        if end == len(history):
            sequence = np.append(sequence, self.targets[history_id])
        places = np.arange(len(sequence))
        if self.skip_probability or self.shuffle_distance:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            places = disturbed(places, self.skip_probability, self.shuffle_distance, generator)
            sequence = sequence[places]
        row = labelled_window(sequence, self.labelled_positions)
        if self.with_origins:
            row["history_ids"] = np.full(len(places) - 1, history_id)
            row["prefix_lengths"] = start + places[1:]
        return row


def labelled_window(sequence: np.ndarray, labelled_positions: str) -> dict[str, np.ndarray]:
    """The items of a window as inputs, (items - 1,), each with the next one as label."""
    labels = sequence[1:]
    if labelled_positions == "last":
        labels = np.where(np.arange(len(labels)) == len(labels) - 1, labels, IGNORED_LABEL)
    return {"input_ids": sequence[:-1], "labels": labels}


def disturbed(
    sequence: np.ndarray, skip_probability: float, shuffle_distance: float, generator: np.random.Generator
) -> np.ndarray:
    """A sequence with some elements left out and the others moved a little; at least two stay."""
    kept = generator.random(len(sequence)) >= skip_probability
    places = np.arange(len(sequence)) + shuffle_distance * generator.random(len(sequence))
    if kept.sum() < 2:
        kept[:] = True
    return sequence[kept][np.argsort(places[kept])]


class StreamedWindows(TorchIterableDataset):
    """As `TrainingWindows`, of rows that come one by one and whose number is not known.

    Args:
        rows: iterable of dictionaries with `history` and `target`, such as a `datasets.IterableDataset`.
        max_length, windows, labelled_positions, skip_probability, shuffle_distance, seed: as in `TrainingWindows`.
    """

    def __init__(
        self,
        rows: Iterable[dict],
        max_length: int,
        windows: str = "random",
        labelled_positions: str = "all",
        skip_probability: float = 0.0,
        shuffle_distance: float = 0.0,
        seed: int = 0,
    ):
        check_windows(windows, labelled_positions, skip_probability, shuffle_distance)
        self.rows, self.max_length, self.windows = rows, max_length, windows
        self.labelled_positions, self.skip_probability = labelled_positions, skip_probability
        self.shuffle_distance, self.seed, self.epoch = shuffle_distance, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Move the random windows to their places of this epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index, row in enumerate(self.rows):
            sequence = np.append(np.asarray(row["history"], dtype=np.int64), int(row["target"]))
            generator = np.random.default_rng((self.seed, self.epoch, index))
            for start, end in self._windows(len(sequence), generator):
                window = sequence[start:end]
                if self.skip_probability or self.shuffle_distance:
                    window = disturbed(window, self.skip_probability, self.shuffle_distance, generator)
                yield labelled_window(window, self.labelled_positions)

    def _windows(self, length: int, generator: np.random.Generator) -> list[tuple[int, int]]:
        """The start and end of each window of a sequence, its last label included."""
        longest = min(self.max_length, length - 1)  # inputs
        if self.windows == "all":
            ends = range(length, 1, -self.max_length)
            return [(max(0, end - 1 - self.max_length), end) for end in ends]
        start = length - 1 - longest
        if self.windows == "random":
            start = int(generator.integers(0, start + 1))
        return [(start, start + longest + 1)]


class StreamedHistories(TorchIterableDataset):
    """As `EvaluationHistories`, of rows that come one by one.

    Args:
        rows: iterable of dictionaries with `history` and `target`.
        max_length: newest items that the model reads.
    """

    def __init__(self, rows: Iterable[dict], max_length: int):
        self.rows, self.max_length = rows, max_length

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for row in self.rows:
            yield evaluation_row(np.asarray(row["history"], dtype=np.int64), int(row["target"]), self.max_length)


def evaluation_row(history: np.ndarray, target: int, max_length: int) -> dict[str, np.ndarray]:
    """The newest items of a history as inputs, the target as the last label, and all seen items."""
    input_ids = history[-max_length:]
    labels = np.full(len(input_ids), IGNORED_LABEL)
    labels[-1] = target
    return {"input_ids": input_ids, "labels": labels, "seen_items": history}


class EvaluationHistories(TorchDataset):
    """Validation or test rows for the Trainer: the newest items, the target as last label, and all seen items.

    Args:
        split: rows with `history` and `target`.
        max_length: newest items that the model reads.
    """

    def __init__(self, split: Dataset, max_length: int):
        if len(split) == 0:
            raise ValueError("the evaluation split is empty: expected one row per user; loosen the filters")
        self.histories, self.targets = ListColumn(split, "history"), read_column(split, "target").to_numpy()
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return evaluation_row(self.histories[index], self.targets[index], self.max_length)


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


def with_label_indices(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch with `label_indices` (labels,) int64: where its labels are, in the flattened (batch * length).

    They are found on the CPU, before the batch moves: on an accelerator, selecting labels would wait for the device.
    """
    labels = batch["labels"]  # (batch, length)
    return batch | {"label_indices": labels.ne(IGNORED_LABEL).flatten().nonzero().squeeze(1)}


class EpochCallback(TrainerCallback):
    """Tells a training data set which epoch begins.

    Args:
        dataset: has `set_epoch`, such as `TrainingWindows` and `CandidateRows`.
    """

    def __init__(self, dataset: TorchDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))
