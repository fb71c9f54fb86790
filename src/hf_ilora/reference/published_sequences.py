"""Reads the rows that LLaRA and iLoRA released, with their fixed candidates, and the authors' pickled sequences."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from hf_ilora.data.columns import flatten_lists, is_string, list_array, read_column, slice_indices
from hf_ilora.data.schema import split_features
from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.data.storage import REMEDY, read_parquet
from hf_ilora.data.workspace import dataset_of
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.reference.pickle_reader import integer, read_frame

# MovieLens-100K has one film without a name: its title is "unknown" in MovieLens and empty in the published files.
BLANK_TITLE = "unknown"


def load_published_sequences(
    folder: str | os.PathLike,
    *,
    rebuilt: SequenceDatasets | None = None,
    min_history: int = 3,
    max_history: int = 10,
) -> SequenceDatasets:
    """Read published rows, which have the ids 0..num_items - 1 and are padded with num_items.

    Args:
        folder: contains `items.parquet` (item_id from 0, title), `validation.parquet` and `test.parquet` (history
            oldest first, target, candidates), and `train.parquet` (history, target) unless `rebuilt` is given.
        rebuilt: a data set of the same items, whose train split replaces `train.parquet`. Its raw ids must be the
            published ids + 1, as those of MovieLens-100K are.
        min_history: drop train rows with a shorter history, as the published program does.
        max_history: number of newest items to keep in a history.

    Returns:
        The splits, with the published ids + 1. The catalogue has all items of `items.parquet`, with the published ids
        as raw ids, titles without white space around them, and "unknown" for a blank title. The published rows do not
        name users, so `user_id` is the split and the row, such as "test-0"; rows of `rebuilt` keep theirs.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or has other columns, an id is outside 0..num_items - 1, a target is not among its
            candidates, or a setting is out of range.

    Source: LLaRA (SIGIR 2024) and iLoRA (NeurIPS 2024), their released data.
    """
    folder = Path(folder)
    if not 1 <= min_history <= max_history:
        raise ValueError(
            f"min_history is {min_history} and max_history {max_history}: expected 1 <= min_history <= max_history"
        )
    catalogue = _catalogue(folder / "items.parquet")
    num_items = len(catalogue)
    limits = num_items, min_history, max_history
    splits = {
        name: _published_split(folder / f"{name}.parquet", name, *limits)
        for name in (("train",) if rebuilt is None else ()) + ("validation", "test")
    }
    if rebuilt is not None:
        splits["train"] = _rebuilt_split(rebuilt, *limits)
    num_candidates = len(splits["test"][0]["candidates"])
    protocol = {
        "name": "published",
        "min_history": min_history,
        "max_history": max_history,
        "num_candidates": num_candidates,
        "rebuilt": None if rebuilt is None else rebuilt.protocol,
    }
    return SequenceDatasets(splits, catalogue, protocol, None if rebuilt is None else rebuilt.source)


def load_reference_sequences(path: str | os.PathLike) -> pa.Table:
    """Read the sequences in the authors' pickled pandas `.df` files, without running anything in them.

    Args:
        path: a pickled DataFrame with columns `seq` (padded histories of ids or (id, rating)), `len_seq` and `next`.

    Returns:
        `history` (list<int32>, oldest first, without padding) and `target` (int32), under our ids: the reference's + 1.

    Raises:
        UnsafePickleError: the pickle names a class or function that no such file needs.
        ValueError: the file is truncated, or is not such a table.
    """
    columns = read_frame(path)
    try:
        seq, len_seq, target = columns["seq"], columns["len_seq"], columns["next"]
        lengths = [integer(length) for length in len_seq]
        if any(length > len(items) for items, length in zip(seq, lengths, strict=True)):
            raise ValueError("len_seq exceeds the length of seq")
        histories = [[integer(item) + 1 for item in items[:length]] for items, length in zip(seq, lengths, strict=True)]
        targets = [integer(item) + 1 for item in target]
        return pa.table({"history": pa.array(histories, pa.list_(pa.int32())), "target": pa.array(targets, pa.int32())})
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a DataFrame with columns seq, len_seq and next ({type(error).__name__}: {error}): read it "
            "where it was written, and save these columns as parquet"
        ) from error


def _catalogue(path: Path) -> Catalogue:
    table = _read(path, {"item_id": "int", "title": "string"}).sort_by("item_id")
    published_ids = table["item_id"].to_numpy()
    if not len(table) or not np.array_equal(published_ids, np.arange(len(table))):
        raise ValueError(f"{path} has {len(table)} rows: expected the published ids from 0, once each")
    titles = pc.utf8_trim_whitespace(table["title"].cast(pa.string()))
    num_items = len(table)
    columns = {
        "item_id": pa.array(np.arange(1, num_items + 1)),
        "raw_id": pa.array(published_ids),
        "title": pc.if_else(pc.equal(titles, ""), BLANK_TITLE, titles),
        "year": pa.nulls(num_items, pa.int32()),
        "genres": pa.array([[]] * num_items, pa.list_(pa.string())),
    }
    return Catalogue(pa.table(columns))


def _published_split(path: Path, name: str, num_items: int, min_history: int, max_history: int) -> Dataset:
    columns = {"history": "list", "target": "int"} | ({} if name == "train" else {"candidates": "list"})
    table = _read(path, columns)
    histories = table["history"].combine_chunks()
    lengths = histories.value_lengths().to_numpy().astype(np.int64)  # (rows,)
    published = histories.flatten().to_numpy()  # (total,)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    real = published != num_items
    items, lengths = published[real] + 1, np.bincount(row_of[real], minlength=len(lengths))
    users = np.char.add(f"{name}-", np.arange(len(lengths)).astype(str))
    candidates = None
    if name != "train":
        candidates = np.asarray(table["candidates"].to_pylist()) + 1  # (rows, candidates)
        if candidates.ndim != 2 or not (candidates == table["target"].to_numpy()[:, None] + 1).any(axis=1).all():
            raise ValueError(f"{path}: expected the same number of candidates in all rows, the target among them")
        if lengths.min() < min_history:
            raise ValueError(
                f"{path} has a row with {lengths.min()} history items: expected at least min_history={min_history}"
            )
    split = _split(users, items, lengths, table["target"].to_numpy() + 1, candidates, name, min_history, max_history)
    for column in columns:
        ids = read_column(split, column).to_numpy() if column == "target" else flatten_lists(split, column)[0]
        if ids.min() < 1 or ids.max() > num_items:
            raise ValueError(
                f"{path} has the ids {ids.min() - 1} to {ids.max() - 1} in {column}: expected the published ids 0 to "
                f"{num_items - 1} of items.parquet"
            )
    return split


def _rebuilt_split(rebuilt: SequenceDatasets, num_items: int, min_history: int, max_history: int) -> Dataset:
    raw_ids = rebuilt.raw_ids
    if raw_ids.dtype.kind != "i" or raw_ids.min() < 1 or raw_ids.max() > num_items:
        raise ValueError(
            f"the rebuilt data set has raw ids from {raw_ids.min()} to {raw_ids.max()}: expected integers 1 to "
            f"{num_items}, the published ids + 1"
        )
    item_of = np.concatenate([[0], raw_ids])  # item id of `rebuilt` -> item id of the published files + 1
    train = rebuilt["train"]
    items, boundaries = flatten_lists(train, "history")
    targets = read_column(train, "target").to_numpy()
    users = read_column(train, "user_id").to_numpy().astype(str)
    lengths = np.diff(boundaries)
    return _split(users, item_of[items], lengths, item_of[targets], None, "train", min_history, max_history)


def _split(users, items, lengths, targets, candidates, name: str, min_history: int, max_history: int) -> Dataset:
    """Rows whose history has at least `min_history` items, truncated to the newest `max_history`."""
    ends = np.cumsum(lengths)
    kept = lengths >= min_history  # (rows,)
    if not kept.any():
        raise ValueError(f"no row of {name} has {min_history} history items: lower min_history")
    starts = np.maximum(ends - lengths, ends - max_history)[kept]
    ends = ends[kept]
    columns = {
        "user_id": users[kept],
        "history": list_array(items[slice_indices(starts, ends)], ends - starts),
        "target": targets[kept],
    }
    if candidates is not None:
        columns["candidates"] = list_array(candidates[kept].ravel(), np.full(int(kept.sum()), candidates.shape[1]))
    features = split_features("string", candidates is not None)
    return dataset_of(pa.table(columns).cast(features.arrow_schema), features, name)


def _read(path: Path, columns: dict[str, str]) -> pa.Table:
    """Read columns of a published file; `columns` maps each name to its kind: int, list (of int) or string."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: expected the files of the published data; check the folder, or --train_from"
        )
    table = read_parquet(path)
    is_kind = {
        "int": pa.types.is_integer,
        "list": lambda kind: pa.types.is_list(kind) and pa.types.is_integer(kind.value_type),
        "string": is_string,
    }
    for name, kind in columns.items():
        if name not in table.column_names or not is_kind[kind](table.schema.field(name).type):
            raise ValueError(f"{path} has {table.schema.to_string()}: expected a column {name} of kind {kind}")
        if table[name].null_count:
            raise ValueError(f"{path} has {table[name].null_count} null values in {name}: expected none; {REMEDY}")
    return table.select(list(columns))


__all__ = ["load_published_sequences", "load_reference_sequences"]
