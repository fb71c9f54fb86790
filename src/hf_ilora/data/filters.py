"""Turns the input tables into filtered, chronological histories of compact integer codes."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from .columns import count_codes, is_string, repeated_values
from .workspace import Workspace

logger = logging.getLogger(__name__)

# Rows decoded at a time. Each batch has a dictionary of its ids, so a batch should contain many rows per id.
_ROWS_PER_BATCH = 1 << 20
# Interactions are sorted in blocks of users, so that the keys are short and a block stays in the processor's cache.
_USER_BLOCKS = 1 << 8


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


@dataclass
class Histories:
    """Chronological histories, concatenated in the order of the raw user ids."""

    items: np.ndarray  # (interactions,) int32, item ids 1..num_items, oldest first within a user
    boundaries: np.ndarray  # (users + 1,) int64: user u has items[boundaries[u] : boundaries[u + 1]]
    user_ids: pa.Array  # (users,) raw ids
    item_ids: pa.Array  # (num_items,) raw ids of the items 1..num_items


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
    for part in _parts(rows):
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


def build_histories(
    coded: CodedInteractions,
    min_user_interactions: int,
    min_item_interactions: int,
    drop_repeats: bool,
    workspace: Workspace | None = None,
) -> tuple[Histories, np.ndarray]:
    """Sort by user and time (ties in input order), filter, and number the remaining items from 1.

    Args:
        coded: as `read_interactions` returns it; sorted and filtered in place, to save the memory of a copy.
        min_user_interactions, min_item_interactions: see `k_core`.
        drop_repeats: keep only the first interaction of a user with an item, before anything is counted.
        workspace: where to keep the sorted columns; None for memory.

    Returns:
        The histories, and the times of their items, (interactions,), which the protocols need.

    Raises:
        ValueError: the filters leave no interaction.
    """
    sort_chronologically(coded, workspace or Workspace())
    num_users, num_items = len(coded.user_ids), len(coded.item_ids)
    if drop_repeats:
        is_first = first_occurrences(coded.users, coded.items)
        logger.info("drop_repeats: dropped %d of %d interactions", np.sum(~is_first), len(is_first))
        coded.keep(is_first)
    num_interactions = len(coded.users)
    keep = k_core(coded.users, coded.items, min_user_interactions, min_item_interactions)
    if not keep.any():
        raise ValueError(
            f"no interaction is left of {num_interactions} ({num_users} users, {num_items} items) with "
            f"min_user_interactions={min_user_interactions} and min_item_interactions={min_item_interactions}: the "
            f"longest history has {np.bincount(coded.users).max()} interactions and the most frequent item "
            f"{np.bincount(coded.items).max()}; lower the thresholds, or num_targets of last_n"
        )
    if not keep.all():
        coded.keep(keep)
    user_counts = count_codes(coded.users, num_users)
    kept_users, kept_items = user_counts > 0, count_codes(coded.items, num_items) > 0
    logger.info(
        "min_user_interactions=%d, min_item_interactions=%d: dropped %d of %d users, %d of %d items, %d of %d "
        "interactions",
        *(min_user_interactions, min_item_interactions),
        *(num_users - kept_users.sum(), num_users, num_items - kept_items.sum(), num_items),
        *(num_interactions - len(coded.users), num_interactions),
    )
    item_numbers = np.cumsum(kept_items, dtype=np.int32)  # counts from 1: 0 is padding
    for part in _parts(len(coded.items)):
        coded.items[part] = item_numbers[coded.items[part]]
    histories = Histories(
        items=coded.items,
        boundaries=np.concatenate([[0], np.cumsum(user_counts[kept_users])]),
        user_ids=coded.user_ids.filter(pa.array(kept_users)),
        item_ids=coded.item_ids.filter(pa.array(kept_items)),
    )
    return histories, coded.times


def sort_chronologically(coded: CodedInteractions, workspace: Workspace) -> None:
    """Sort interactions by user, then by time, then in input order, as `np.lexsort((times, users))` does.

    First distributes the rows to blocks of users, piece by piece, then sorts each block. This takes a quarter of the
    time of lexsort, and the memory of one block.
    """
    num_users = len(coded.user_ids)
    users_per_block = -(-num_users // _USER_BLOCKS)
    counts = count_codes(coded.users, num_users)
    ends = np.cumsum([counts[first : first + users_per_block].sum() for first in range(0, num_users, users_per_block)])
    columns = [coded.users, coded.items, coded.times]
    results = [workspace.empty(len(column), column.dtype) for column in columns]
    places = np.append(0, ends[:-1])  # (blocks,) where the next row of each block goes
    for part in _parts(len(coded.users)):
        block_of = (coded.users[part] // users_per_block).astype(np.uint8)
        order = np.argsort(block_of, kind="stable")  # numpy sorts bytes by counting
        lengths = np.bincount(block_of, minlength=len(places))
        for column, result in zip(columns, results, strict=True):
            values, first = column[part][order], 0
            for place, length in zip(places.tolist(), lengths.tolist(), strict=True):
                result[place : place + length] = values[first : first + length]
                first += length
        places += lengths
    for first, last in itertools.pairwise([0, *ends.tolist()]):
        block = slice(first, last)
        order = _order_of_block(results[0][block], results[2][block])
        for result in results:
            result[block] = result[block][order]
    coded.users, coded.items, coded.times = results


def _order_of_block(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """What `np.lexsort((times, users))` returns."""
    if len(users) == 0:
        return np.empty(0, dtype=np.int64)
    lowest_user, lowest_time = int(users.min()), times.min()
    num_moments = int(times.max()) - int(lowest_time) + 1
    row_bits = len(users).bit_length()
    if times.dtype.kind == "f" or (int(users.max()) - lowest_user + 1) * num_moments << row_bits > 2**63:
        return np.lexsort((times, users))
    # Packs user, time and row into one number, because sorting numbers is faster than sorting indices.
    keys = (users - lowest_user).astype(np.int64)
    keys *= num_moments
    keys += times - lowest_time
    keys <<= row_bits
    keys |= np.arange(len(keys))
    keys.sort()
    return keys & ((1 << row_bits) - 1)


def k_core(users: np.ndarray, items: np.ndarray, min_user_interactions: int, min_item_interactions: int) -> np.ndarray:
    """The largest set of interactions in which every user and every item has enough interactions.

    Args:
        users, items: codes, (interactions,).
        min_user_interactions, min_item_interactions: minimum number of interactions, including repeats, that a user and
            an item must keep.

    Returns:
        bool (interactions,), True for interactions to keep.
    """
    keep = np.ones(len(users), dtype=bool)
    user_counts, item_counts = count_codes(users, users.max() + 1), count_codes(items, items.max() + 1)
    changed = True
    while changed:
        changed = False
        for part in _parts(len(users), at_least=max(len(user_counts), len(item_counts))):
            enough = user_counts[users[part]] >= min_user_interactions
            enough &= item_counts[items[part]] >= min_item_interactions
            dropped = keep[part] & ~enough
            if dropped.any():
                changed = True
                keep[part] &= enough
                user_counts -= np.bincount(users[part][dropped], minlength=len(user_counts))
                item_counts -= np.bincount(items[part][dropped], minlength=len(item_counts))
    return keep


def first_occurrences(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Whether each interaction is the first of its user with its item: bool (interactions,).

    Args:
        users, items: codes, (interactions,), sorted by user.
    """
    is_first, num_items, first = np.zeros(len(users), dtype=bool), np.int64(items.max()) + 1, 0
    while first < len(users):
        last_user = users[min(first + _ROWS_PER_BATCH, len(users)) - 1]
        last = np.searchsorted(users, last_user, side="right")  # keeps each user in one piece
        keys = users[first:last] * num_items + items[first:last]
        is_first[first + np.unique(keys, return_index=True)[1]] = True
        first = int(last)
    return is_first


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
    for part in _parts(len(rows)):
        values = column[part][rows[part]]
        column[kept : kept + len(values)] = values
        kept += len(values)
    return column[:kept]


def _parts(rows: int, at_least: int = 0) -> Iterator[slice]:
    """Slices of the rows 0..rows-1, small enough to bound the memory of computing with one of them."""
    step = max(_ROWS_PER_BATCH, at_least)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


__all__ = ["CodedInteractions", "Histories", "build_histories", "first_occurrences", "k_core"]
__all__ += ["read_interactions", "read_items", "sort_chronologically"]
