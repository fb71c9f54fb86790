"""Columns as flat arrays: reads those of splits, because reading a `datasets.Dataset` row by row is slow."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

_CODES_PER_COUNT = 1 << 20
_ROWS_PER_BATCH = 1 << 17


def read_column(split: Dataset, column: str) -> pa.ChunkedArray:
    """Read one column as an Arrow array, without reading the others."""
    return split.select_columns([column]).with_format("arrow")[:][column]


def flatten_lists(split: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as one array: values, (total,), and row boundaries, (rows + 1,)."""
    lists = read_column(split, column).combine_chunks()
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(), np.concatenate([[0], lengths.cumsum()])


class ListColumn:
    """A list column whose rows are read where they are, in memory or in mapped files, without a copy.

    Args:
        split: the data set.
        column: of lists, without nulls.

    `lengths` are those of the lists, (rows,) int64.
    """

    def __init__(self, split: Dataset, column: str):
        chunks = [chunk for chunk in read_column(split, column).chunks if len(chunk)]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]  # (rows of the chunk + 1,) each
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._first_rows = np.cumsum([0] + [len(chunk) for chunk in chunks])[:-1].tolist()
        self.lengths = np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        """The list of a row, (its length,)."""
        chunk = bisect_right(self._first_rows, row) - 1
        offsets, place = self._offsets[chunk], row - self._first_rows[chunk]
        return self._values[chunk][offsets[place] : offsets[place + 1]]

    def pieces(self) -> Iterator[np.ndarray]:
        """All values of the column in their order, piece by piece."""
        for offsets, values in zip(self._offsets, self._values, strict=True):
            for first in range(offsets[0], offsets[-1], _CODES_PER_COUNT):
                yield values[first : min(first + _CODES_PER_COUNT, offsets[-1])]


def list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """A list column from its values, (total,), and the length of each list, (rows,)."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def repeated_values(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The values that occur more than once, each once, in order of first appearance."""
    counts = pc.value_counts(column)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1))


def slice_indices(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The indices start, start + 1, ..., end - 1 of every slice, concatenated.

    Args:
        starts, ends: (slices,), ends not before starts.

    Returns:
        int64 (sum of the lengths,).
    """
    lengths = ends - starts
    places = np.cumsum(lengths) - lengths  # where each slice begins in the result, (slices,)
    return np.arange(lengths.sum()) + np.repeat(starts - places, lengths)


def is_string(column_type: pa.DataType) -> bool:
    """Whether a column has text, of either of Arrow's two types."""
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def padded_lists(split: Dataset, column: str) -> np.ndarray:
    """A list column of item ids as one matrix: (rows, longest) int64, padded with 0."""
    items, boundaries = flatten_lists(split, column)
    lengths = np.diff(boundaries)
    padded = np.zeros((len(lengths), lengths.max(initial=0)), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = items
    return padded


def count_codes(codes: np.ndarray, length: int) -> np.ndarray:
    """How often each of the codes 0..length-1 occurs: (length,) int64.

    Counts piece by piece: `np.bincount` of all int32 codes at once would copy them to twice their size.
    """
    counts = np.zeros(length, dtype=np.int64)
    step = max(_CODES_PER_COUNT, length)
    for first in range(0, len(codes), step):
        counts += np.bincount(codes[first : first + step], minlength=length)
    return counts


def check_has_rows(split: Dataset) -> None:
    """Raise a ValueError for a training split without rows."""
    if len(split) == 0:
        raise ValueError("the training split is empty: no user has two training items; loosen the filters")


def training_sequences(split: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Each training row as one sequence: its history, followed by its target.

    Returns:
        items (total,), all sequences concatenated, and their boundaries (rows + 1,).

    Raises:
        ValueError: for a split without rows.
    """
    check_has_rows(split)
    histories, boundaries = flatten_lists(split, "history")
    targets = read_column(split, "target").to_numpy()
    return np.insert(histories, boundaries[1:], targets), boundaries + np.arange(len(boundaries))


def training_counts(split: Dataset, num_items: int) -> np.ndarray:
    """How often each item occurs in training: (num_items + 1,) int64, 0 for padding.

    Counts the targets of all rows, and the history of each user's first row. Further rows of a user extend the first
    one, so their histories would count the same interactions again.
    """
    counts, last_user = np.zeros(num_items + 1, dtype=np.int64), None
    columns = split.select_columns(["user_id", "history", "target"]).with_format("arrow")
    for batch in columns.iter(batch_size=_ROWS_PER_BATCH):
        users, histories = batch["user_id"].combine_chunks(), batch["history"].combine_chunks()
        is_first = np.append(True, pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False))  # (batch,)
        is_first[0] = users[0].as_py() != last_user
        last_user = users[-1].as_py()
        items = histories.filter(pa.array(is_first)).flatten().to_numpy()
        counts += count_codes(items, num_items + 1) + count_codes(batch["target"].to_numpy(), num_items + 1)
    return counts


def repeat_share(items: np.ndarray, boundaries: np.ndarray) -> float:
    """The share of targets that occur earlier in the same sequence; every item but the first of a sequence is a target.

    Adds one repeat to the counts, so that the share is above 0 even for data without repeats.

    Args:
        items: (total,), all sequences concatenated, as `training_sequences` returns them.
        boundaries: (rows + 1,), where each sequence begins.
    """
    rows = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
    different = len(np.unique(rows * (items.max() + 1) + items))
    return (len(items) - different + 1) / (len(items) - len(boundaries) + 2)
