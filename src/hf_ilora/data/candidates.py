"""Draws fixed candidate sets: the target, and items that the user never interacted with."""

import hashlib

import numpy as np
import pyarrow as pa

from .columns import is_string, slice_indices
from .histories import Histories
from .protocols import Rows

# Seen items, about 150 per row in MovieLens, are sorted for so many rows at a time that they fit a processor's cache.
_ROWS_PER_BLOCK = 1 << 10


def sample_candidates(histories: Histories, rows: Rows, num_candidates: int, seed: int, split: str) -> np.ndarray:
    """Draw `num_candidates - 1` unseen items for every row, add its target, and shuffle.

    The draw of a row depends on the seed, the split, the raw user id, the items of that user and the size of the
    catalogue, but not on other users, the order of the table or the number of processes. Every set of unseen items is
    equally likely, up to the 2^-32 granularity of the random numbers.

    Args:
        histories: whole histories; every item in them counts as seen, including the targets of all splits.
        rows: at most one row per user.
        num_candidates: size of the candidate sets with the target, at least 2.
        seed: random seed, any integer.
        split: name of the split.

    Returns:
        int32 (rows, num_candidates).

    Raises:
        ValueError: when a user has too few unseen items.
    """
    keys = _row_keys(histories.user_ids.take(pa.array(rows.users)), seed, split)  # (rows,)
    candidates = np.empty((len(rows), num_candidates), dtype=np.int32)
    for first in range(0, len(rows), _ROWS_PER_BLOCK):
        block = slice(first, first + _ROWS_PER_BLOCK)
        candidates[block] = _sample_block(
            histories, rows.users[block], histories.items[rows.ends[block]], keys[block], num_candidates
        )
    return candidates


def _sample_block(
    histories: Histories, users: np.ndarray, targets: np.ndarray, keys: np.ndarray, num_candidates: int
) -> np.ndarray:
    num_items, num_negatives = len(histories.item_ids), num_candidates - 1
    starts, ends = histories.boundaries[users], histories.boundaries[users + 1]
    # Distinct (row, item) pairs in one sorted array of row * num_items + item, items counted from 0.
    id_type = np.int32 if len(users) * num_items < 2**31 else np.int64  # the shorter are sorted faster
    pairs = np.repeat(np.arange(len(users), dtype=id_type) * id_type(num_items), ends - starts)
    pairs += histories.items[slice_indices(starts, ends)] - 1  # (interactions,)
    pairs.sort()
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # (seen,)
    row_of_pair = pairs // num_items
    num_seen = np.bincount(row_of_pair, minlength=len(users))  # (rows,)
    first_pair = np.cumsum(num_seen) - num_seen  # (rows,)
    num_unseen = num_items - num_seen
    _check_unseen(histories, users, num_unseen, num_negatives)

    # Floyd's sampling without replacement: num_negatives distinct ranks among the unseen items of each row.
    ranks = np.empty((len(users), num_negatives), dtype=np.int64)
    for column in range(num_negatives):
        highest = num_unseen - num_negatives + column  # (rows,)
        drawn = _below(_random_bits(keys, column), highest + 1)  # (rows,)
        repeated = (ranks[:, :column] == drawn[:, None]).any(axis=1)
        ranks[:, column] = np.where(repeated, highest, drawn)

    # The item with rank r among the unseen ones is r + the number of seen items before it. The j-th seen item s_j (from
    # 0) comes before it if s_j - j <= r; s_j - j never decreases within a row, so one binary search counts them.
    gaps = pairs - (np.arange(len(pairs)) - first_pair[row_of_pair])  # (seen,)
    row_starts = np.arange(len(users))[:, None] * num_items  # (rows, 1)
    seen_before = np.searchsorted(gaps, row_starts + ranks, side="right") - first_pair[:, None]  # (rows, negatives)
    unshuffled = np.concatenate([targets[:, None], ranks + seen_before + 1], axis=1)  # (rows, candidates)

    shuffle_bits = np.stack([_random_bits(keys, num_negatives + column) for column in range(num_candidates)], axis=1)
    return np.take_along_axis(unshuffled, np.argsort(shuffle_bits, axis=1, kind="stable"), axis=1)


def _check_unseen(histories: Histories, users: np.ndarray, num_unseen: np.ndarray, num_negatives: int) -> None:
    if num_unseen.min() >= num_negatives:
        return
    row = int(num_unseen.argmin())
    num_items, unseen = len(histories.item_ids), int(num_unseen[row])
    lower = f"lower num_candidates to at most {unseen + 1}" if unseen > 0 else "set num_candidates=0"
    problem = f"num_candidates={num_negatives + 1} needs {num_negatives} items that the user never interacted with"
    if num_items < num_negatives + 1:
        raise ValueError(
            f"{problem}, but the catalogue has {num_items} items: {lower} (0 leaves candidates out) or use more data"
        )
    raise ValueError(
        f"{problem}, but user {histories.user_ids[int(users[row])].as_py()!r} left {unseen} of {num_items} items "
        f"unseen: {lower} (0 leaves candidates out), or remove that user"
    )


def _row_keys(user_ids: pa.Array, seed: int, split: str) -> np.ndarray:
    """A 64-bit key for each row, uint64 (rows,), from (seed, split, raw user id)."""
    if is_string(user_ids.type):
        digests = (hashlib.blake2b(user_id.encode(), digest_size=8).digest() for user_id in user_ids.to_pylist())
        users = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
    else:
        users = user_ids.to_numpy().view(np.uint64)
    stream = hashlib.blake2b(f"{seed} {split}".encode(), digest_size=8).digest()
    return _mix(_mix(users) ^ np.uint64(int.from_bytes(stream, "little")))


def _random_bits(keys: np.ndarray, counter: int) -> np.ndarray:
    """Number `counter` of the random stream of each key: uint64 (rows,).

    Source: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), a stateless generator: a stream is determined by its key.
    """
    step = (counter + 1) * 0x9E3779B97F4A7C15 % 2**64
    return _mix(keys + np.uint64(step))


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _below(bits: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Uniform integers 0..bound-1, int64 (rows,), from the upper 32 bits; bounds below 2^31."""
    return ((bits >> np.uint64(32)) * bounds.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


__all__ = ["sample_candidates"]
