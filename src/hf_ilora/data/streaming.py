"""Reads interactions that do not fit in memory: parquet files, batch by batch, into one memory-mapped file."""

import os
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Value

from .table_files import TableFiles
from .tables import clean_ids, clean_ratings, clean_seconds
from .workspace import Workspace

# Merge the distinct ids of batches when there are at least so many.
_IDS_PER_MERGE = 1 << 20


def stream_interactions(
    path: str | os.PathLike, columns: Mapping[str, str], work_dir: str | os.PathLike, limit_data_rows: int = -1
) -> tuple[Dataset, pa.Array]:
    """Clean the interactions in parquet files without reading them into memory.

    Args:
        path: a file, or a folder of part files.
        columns: the name in the files of "user_id", "item_id" and, if there are such columns, "time" and "rating".
        work_dir: folder for the file that the result maps to memory.
        limit_data_rows: number of rows to read, from the first; -1 for all.

    Returns:
        interactions: as `load_interactions` returns them, memory-mapped.
        item_ids: the distinct ids, in order of first appearance.

    Raises:
        ValueError: the files are not parquet; otherwise as `load_interactions`.
    """
    if not isinstance(path, str | os.PathLike) or TableFiles.at(path).suffix != ".parquet":
        raise ValueError(
            f"work_dir is given for {path!r}: expected parquet, a file or a folder of parts, whose columns have types; "
            "convert the table, or leave work_dir out"
        )
    files, distinct = TableFiles.at(path), _DistinctIds()
    time_type = _time_type(files, columns["time"]) if "time" in columns else pa.int64()
    batches = _clean_batches(files, columns, time_type, limit_data_rows, distinct)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"{path} has no rows; expected at least one")
    features = Features({field.name: Value(str(field.type)) for field in first.schema})

    def of_one_type() -> Iterator[pa.RecordBatch]:
        yield first
        for batch in batches:
            if batch.schema != first.schema:
                raise ValueError(
                    f"the parts of {path} have the ids {first.schema.types[:2]} and {batch.schema.types[:2]}; expected "
                    "one type per column: cast the ids of all parts to strings or to integers"
                )
            yield batch

    return Workspace(work_dir).dataset(of_one_type(), features), distinct.ids()


def _clean_batches(
    files: TableFiles, columns: Mapping[str, str], time_type: pa.DataType, limit: int, distinct: "_DistinctIds"
) -> Iterator[pa.RecordBatch]:
    rows = 0
    for piece in files.batches(columns):
        piece = piece if limit == -1 else piece.slice(0, limit - rows)
        if len(piece) == 0:
            continue
        where = {role: f"column {name!r} of {files.path}, from row {rows:,} on," for role, name in columns.items()}
        cleaned = {role: clean_ids(piece[role], where[role]) for role in ("user_id", "item_id")}
        if "time" in columns:
            cleaned["timestamp"] = clean_seconds(piece["time"], where["time"]).cast(time_type)
        else:
            cleaned["timestamp"] = pa.chunked_array([np.arange(rows, rows + len(piece))])
        if "rating" in columns:
            cleaned["rating"] = clean_ratings(piece["rating"], where["rating"])
        distinct.add(cleaned["item_id"])
        rows += len(piece)
        yield from pa.table(cleaned).combine_chunks().to_batches()


def _time_type(files: TableFiles, name: str) -> pa.DataType:
    """int64 if all times are whole seconds, else float64, as for tables in memory."""
    for piece in files.batches({"time": name}):
        if pa.types.is_integer(piece["time"].type):
            continue
        if pa.types.is_floating(clean_seconds(piece["time"], f"column {name!r} of {files.path}").type):
            return pa.float64()
    return pa.int64()


class _DistinctIds:
    """Collects distinct ids in order of first appearance."""

    def __init__(self):
        self.known: list[pa.Array] = []  # the merged ids, then those of each batch since
        self.num_distinct = 0

    def add(self, ids: pa.ChunkedArray) -> None:
        self.known.append(pc.unique(ids))
        if sum(map(len, self.known)) > 2 * max(self.num_distinct, _IDS_PER_MERGE):
            self.known = [self.ids()]
            self.num_distinct = len(self.known[0])

    def ids(self) -> pa.Array:
        return pc.unique(pa.concat_arrays(self.known))


__all__ = ["stream_interactions"]
