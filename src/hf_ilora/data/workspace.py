"""Keeps large arrays and tables in memory or in memory-mapped files while a data set is prepared."""

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, NamedSplit
from datasets.table import InMemoryTable, MemoryMappedTable, Table

from .storage import content_digest


class Workspace:
    """Creates arrays and tables, in memory or in files.

    The operating system moves pages of mapped files to disk and back, so files may be larger than memory.

    Args:
        folder: folder for the files, created if it does not exist; None keeps everything in memory. The file of an
            array is deleted with the array. Files of tables stay, because data sets read them.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def empty(self, length: int, dtype: type) -> np.ndarray:
        """An uninitialised array (length,)."""
        if self.folder is None or length == 0:  # a file without bytes cannot be mapped
            return np.empty(length, dtype)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return np.memmap(file, dtype, "w+", shape=(length,)).view(np.ndarray)

    def dataset(self, batches: Iterable[pa.RecordBatch], features: Features, split: str | None = None) -> Dataset:
        """A Dataset with the rows of these batches."""
        schema = features.arrow_schema
        if self.folder is None:
            table = pa.Table.from_batches(batches, schema)
        else:
            descriptor, path = tempfile.mkstemp(".arrow", f"{split or 'table'}-", self.folder)
            with os.fdopen(descriptor, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            table = MemoryMappedTable.from_file(path)
        return dataset_of(table, features, split)


def dataset_of(table: pa.Table | Table, features: Features, split: str | None) -> Dataset:
    """A Dataset over an Arrow table, without a copy."""
    table = InMemoryTable(table) if isinstance(table, pa.Table) else table
    # Without a given fingerprint, Dataset would pickle and hash the whole table.
    return Dataset(
        table,
        info=DatasetInfo(features=features),
        split=None if split is None else NamedSplit(split),
        fingerprint=content_digest(table.table)[:16],
    )


__all__ = ["Workspace", "dataset_of"]
