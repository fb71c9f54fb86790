"""Columns of a split as flat arrays, because reading rows one by one from a `datasets.Dataset` is slow."""

import numpy as np
import pyarrow as pa
from datasets import Dataset


def read_column(split: Dataset, column: str) -> pa.ChunkedArray:
    """A column as an Arrow array; the other columns are not read."""
    return split.select_columns([column]).with_format("arrow")[:][column]


def flatten_lists(split: Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as one array: values, (total,), and row boundaries, (rows + 1,)."""
    lists = read_column(split, column).combine_chunks()
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(), np.concatenate([[0], lengths.cumsum()])


def training_sequences(split: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Each training row as one sequence: its history, followed by its target.

    Returns:
        items (total,), all sequences concatenated, and their boundaries (rows + 1,).

    Raises:
        ValueError: for a split without rows.
    """
    if len(split) == 0:
        raise ValueError("the training split is empty: no user has two training items; loosen the filters")
    histories, boundaries = flatten_lists(split, "history")
    targets = read_column(split, "target").to_numpy()
    return np.insert(histories, boundaries[1:], targets), boundaries + np.arange(len(boundaries))
