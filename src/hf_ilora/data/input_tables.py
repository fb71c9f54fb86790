"""Checks the input tables of build_sequences and encodes their ids as compact integers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import is_string, repeated_values
from .workspace import Workspace

# Rows decoded at a time. Each batch has a dictionary of its ids, so a batch should contain many rows per id.
_ROWS_PER_BATCH = 1 << 20


@dataclass
class CodedInteractions:
    """Interactions in input order, with ids as codes: the rank, from 0, of a raw id among all raw ids.

    Raw ids rank numerically when they are integers and by code point when they are strings.
    """

    users: np.ndarray  # (interactions,) int32
    items: np.ndarray  # (interactions,) int32
    times: np.ndarray  # (interactions,) int64 or float64
    user_ids: pa.Array  # (users,) int64 or string, ascending
    item_ids: pa.Array  # (items,) int64 or string, ascending

    def keep(self, rows: np.ndarray) -> None:
        """Drop the rows that are False in `rows`, (interactions,), in place."""
        self.users, self.items, self.times = (_kept(column, rows) for column in (self.users, self.items, self.times))


def read_interactions(
    interactions: Dataset, min_rating: float | None, workspace: Workspace | None = None
) -> CodedInteractions:
    """Check the columns of `interactions` and encode them batch by batch.

    Args:
        interactions: columns `user_id` and `item_id` (integer or string), `timestamp` (integer or float, not negative)
            and, for `min_rating`, `rating`.
        min_rating: drop rows with a lower rating; None keeps all rows.
        workspace: where to keep the codes and times; None for memory.

    Raises:
        TypeError: for a column of another type.
        ValueError: for missing columns, no rows, null values, and times that are negative or not finite.
    """
    columns = ["user_id", "item_id", "timestamp"] + (["rating"] if min_rating is not None else [])
    _check_names(interactions, "interactions", columns)
    _check_types(interactions, columns)
    if len(interactions) == 0:
        raise ValueError("interactions is empty: expected at least one row; check the source file and its filters")
    workspace = workspace or Workspace()
    is_float = pa.types.is_floating(interactions.features.arrow_schema.field("timestamp").type)
    users, items = (workspace.empty(len(interactions), np.int32) for _ in range(2))
    times = workspace.empty(len(interactions), np.float64 if is_float else np.int64)
    user_numbers, item_numbers, rows = _IdNumbers(), _IdNumbers(), 0
    for batch in interactions.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        for name in columns:
            if batch[name].null_count:
                raise ValueError(
                    f"column {name!r} of interactions has null values: expected a value in every row; drop those rows"
                )
        if min_rating is not None:
            batch = batch.filter(_at_least(batch["rating"], min_rating))
        part = slice(rows, rows + len(batch))
        users[part] = user_numbers.of(batch["user_id"])
        items[part] = item_numbers.of(batch["item_id"])
        times[part] = _checked_times(batch["timestamp"].to_numpy())
        rows += len(batch)
    if rows == 0:
        raise ValueError(
            f"none of the {len(interactions)} interactions has a rating of at least min_rating={min_rating}: lower it"
        )
    user_ranks, user_ids = user_numbers.ranked()
    item_ranks, item_ids = item_numbers.ranked()
    for part in row_pieces(rows):
        users[part], items[part] = user_ranks[users[part]], item_ranks[items[part]]
    return CodedInteractions(users[:rows], items[:rows], times[:rows], user_ids, item_ids)


def read_items(items: Dataset, item_ids: pa.Array) -> pa.Table:
    """Check the table of items against the raw ids that occur in the interactions.

    Args:
        items: columns `item_id` (of the type of `item_ids`), `title`, `year` and `genres`, of which only `year` may be
            null, and any others.
        item_ids: (distinct items,) raw ids of the interactions, int64 or string.

    Returns:
        These four columns as int64 or string, string, int32 and list<string>; further columns unchanged.

    Raises:
        TypeError: for a column of another type.
        ValueError: for missing columns, no rows, null values, repeated ids, and ids of interactions that are missing.
    """
    columns = ["item_id", "title", "year", "genres"]
    _check_names(items, "items", columns)
    if len(items) == 0:
        raise ValueError("items is empty: expected one row per item; without titles, use the raw ids as titles")
    others = [name for name in items.column_names if name not in columns]
    whole = items.with_format("arrow")[:]
    table = whole.select(columns)
    found = {name: table.schema.field(name).type for name in columns}
    if not (pa.types.is_integer(found["item_id"]) or is_string(found["item_id"])):
        raise TypeError(f"column 'item_id' of items is {found['item_id']}: expected integers or strings; cast it")
    if is_string(found["item_id"]) != is_string(item_ids.type):
        raise TypeError(
            f"column 'item_id' is {found['item_id']} in items and {item_ids.type} in interactions: expected the same "
            "type; cast one of them"
        )
    if not is_string(found["title"]):
        raise TypeError(f"column 'title' of items is {found['title']}: expected strings; cast it")
    for name in ("item_id", "title", "genres"):
        nested = pc.list_flatten(table[name]).null_count if pa.types.is_list(found[name]) else 0
        if table[name].null_count + nested:
            raise ValueError(
                f"column {name!r} of items has null values: expected a value for every item; fill them in or drop the "
                "items and their interactions"
            )
    types = [("item_id", item_ids.type), ("title", pa.string()), ("year", pa.int32())]
    try:
        table = table.cast(pa.schema([*types, ("genres", pa.list_(pa.string()))]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise TypeError(
            f"columns 'year' and 'genres' of items are {found['year']} and {found['genres']}: expected int32 and "
            f"list<string> ({error}); cast them"
        ) from error
    repeated = repeated_values(table["item_id"])
    if len(repeated):
        raise ValueError(
            f"{len(repeated)} item ids occur more than once in items, first {_first(repeated)}: expected one row per "
            "item; drop the others"
        )
    unknown = item_ids.filter(pc.invert(pc.is_in(item_ids, value_set=table["item_id"])))
    if len(unknown):
        raise ValueError(
            f"{len(unknown)} item ids of interactions are missing from items, first {_first(unknown)}: expected a row "
            "for every item; add them, or drop their interactions"
        )
    for name in others:
        table = table.append_column(name, whole[name])
    return table


def row_pieces(rows: int, at_least: int = 0) -> Iterator[slice]:
    """Slices of the rows 0..rows-1, small enough to bound the memory of computing with one of them."""
    step = max(_ROWS_PER_BATCH, at_least)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _check_names(table: Dataset, name: str, columns: list[str]) -> None:
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}: expected {', '.join(columns)}, found "
            f"{', '.join(table.column_names) or 'none'}; rename the columns or read the tables with load_interactions"
        )


def _check_types(interactions: Dataset, columns: list[str]) -> None:
    schema = interactions.features.arrow_schema
    for name in columns:
        found = schema.field(name).type
        if name in ("user_id", "item_id"):
            if not (pa.types.is_integer(found) or is_string(found)):
                raise TypeError(f"column {name!r} of interactions is {found}: expected integers or strings; cast it")
        elif not (pa.types.is_integer(found) or pa.types.is_floating(found)):
            unit = "seconds as " if name == "timestamp" else ""
            raise TypeError(f"column {name!r} of interactions is {found}: expected {unit}integer or float; cast it")


def _at_least(ratings: pa.ChunkedArray, min_rating: float) -> pa.ChunkedArray:
    if pc.any(pc.is_nan(ratings.cast(pa.float64()))).as_py():
        raise ValueError("column 'rating' of interactions has NaN values: expected numbers; drop those rows")
    return pc.greater_equal(ratings, min_rating)


def _checked_times(times: np.ndarray) -> np.ndarray:
    """Times (rows,) as int64 or float64."""
    if times.dtype.kind == "f":
        times = times.astype(np.float64, copy=False)
        wrong = ~(np.isfinite(times) & (times >= 0))
    else:
        wrong = times < 0
        times = times.astype(np.int64, copy=False)
    if wrong.any():
        raise ValueError(
            f"column 'timestamp' of interactions has {int(wrong.sum())} values that are negative or not finite, first "
            f"{times[wrong.argmax()]}: expected seconds, 0 or more; drop or repair those rows"
        )
    return times


def _first(values: pa.Array) -> str:
    return ", ".join(map(repr, values[:3].to_pylist()))


class _IdNumbers:
    """Numbers ids from 0 in the order of their first appearance, batch by batch."""

    def __init__(self):
        self.known: pa.Array | None = None  # (distinct,) ids

    def of(self, ids: pa.ChunkedArray) -> np.ndarray:
        """The numbers of ids: int32 (rows,)."""
        encoded = ids.combine_chunks().dictionary_encode()
        distinct = encoded.dictionary
        distinct = distinct.cast(pa.string() if is_string(distinct.type) else pa.int64())
        if self.known is None:
            self.known = distinct.slice(0, 0)
        numbers = pc.index_in(distinct, value_set=self.known)  # null for new ones
        new = distinct.filter(numbers.is_null())
        is_new = numbers.is_null().to_numpy(zero_copy_only=False)
        numbers = numbers.fill_null(0).to_numpy().copy()
        numbers[is_new] = len(self.known) + np.arange(len(new))
        self.known = pa.concat_arrays([self.known, new])
        return numbers[encoded.indices.to_numpy()]

    def ranked(self) -> tuple[np.ndarray, pa.Array]:
        """The rank of the id of each number, int32 (distinct,), and the ids in ascending order."""
        order = pc.array_sort_indices(self.known)
        ranks = np.empty(len(order), dtype=np.int32)
        ranks[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
        return ranks, self.known.take(order)


def _kept(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`column[rows]`, written over the beginning of the column to save memory."""
    kept = 0
    for part in row_pieces(len(rows)):
        values = column[part][rows[part]]
        column[kept : kept + len(values)] = values
        kept += len(values)
    return column[:kept]


__all__ = ["CodedInteractions", "read_interactions", "read_items", "row_pieces"]
