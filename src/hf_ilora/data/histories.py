"""Sorts and filters encoded interactions into chronological histories."""

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from .columns import count_codes
from .input_tables import CodedInteractions, row_pieces
from .workspace import Workspace

logger = logging.getLogger(__name__)

# Interactions are sorted in blocks of users, so that the keys are short and a block stays in the processor's cache.
_USER_BLOCKS = 1 << 8
_ROWS_PER_BLOCK = 1 << 20


@dataclass
class Histories:
    """Chronological histories, concatenated in the order of the raw user ids."""

    items: np.ndarray  # (interactions,) int32, item ids 1..num_items, oldest first within a user
    boundaries: np.ndarray  # (users + 1,) int64: user u has items[boundaries[u] : boundaries[u + 1]]
    user_ids: pa.Array  # (users,) raw ids
    item_ids: pa.Array  # (num_items,) raw ids of the items 1..num_items


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
    for part in row_pieces(len(coded.items)):
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
    for part in row_pieces(len(coded.users)):
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
    """As `np.lexsort((times, users))`, and faster unless times are fractions or far apart."""
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
        for part in row_pieces(len(users), at_least=max(len(user_counts), len(item_counts))):
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
        last_user = users[min(first + _ROWS_PER_BLOCK, len(users)) - 1]
        last = np.searchsorted(users, last_user, side="right")  # keeps each user in one piece
        keys = users[first:last] * num_items + items[first:last]
        is_first[first + np.unique(keys, return_index=True)[1]] = True
        first = int(last)
    return is_first


__all__ = ["Histories", "build_histories", "first_occurrences", "k_core", "sort_chronologically"]
