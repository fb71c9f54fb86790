"""Properties of recommended lists beyond accuracy, as pure functions of arrays.

Lists are (users, k) item ids, best first, padded with 0 where fewer are left, as `rank_split(..., top_k=k).recommended`
or `recommend` returns them. The definitions are those of RecTools where it has one; each function names its source.
"""

import numpy as np

PADDING_ITEM_ID = 0  # as in the models: a metric folder has a copy of this file alone
NUM_DECILES = 10
# Numbers in memory at a time: 32 MB of float64.
_MAX_NUMBERS = 4_000_000


# --- one number per user ---


def novelty(recommended: np.ndarray, users: np.ndarray, num_users: int) -> np.ndarray:
    """The mean information of the items of each list, -log2(share of the training users who have the item).

    An item that no training user has counts as if one user had it.

    Args:
        recommended: (users, k) item ids, padded with 0.
        users: (num_items + 1,) number of different training users who have each item.
        num_users: number of training users.

    Returns:
        (users,) in bits.

    Source: `MeanInvUserFreq` of RecTools.
    """
    bits = -np.log2(np.maximum(users, 1) / num_users)
    return _mean_over_list(recommended, bits[recommended])


def serendipity(recommended: np.ndarray, relevant: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How much higher the relevant items of a list are ranked than popularity ranks them, averaged over the list.

    With n items in the catalogue, the item at place i scores max(p - q, 0) if it is relevant, where p = (n + 1 - i) / n
    and q is the same of its place by popularity. Equally popular items share a place, and the next ones have the next
    place; q is 0 for items that training has never seen.

    Args:
        recommended: (users, k) item ids, padded with 0.
        relevant: (users, relevant) item ids, padded with 0.
        counts: (num_items + 1,) occurrences in training.

    Returns:
        (users,) between 0 and 1.

    Source: `Serendipity` of RecTools.
    """
    num_items = len(counts) - 1
    different, number = np.unique(counts[1:], return_inverse=True)
    popularity = np.append(0, len(different) - number)  # (num_items + 1,), 1 is the most popular
    of_anyone = np.where(counts > 0, (num_items + 1 - popularity) / num_items, 0.0)
    of_user = (num_items + 1 - np.arange(1, recommended.shape[1] + 1)) / num_items  # (k,)
    is_relevant = (recommended[:, :, None] == relevant[:, None, :]).any(axis=2) & (recommended != PADDING_ITEM_ID)
    return _mean_over_list(recommended, np.maximum(of_user - of_anyone[recommended], 0) * is_relevant)


def diversity(recommended: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The mean distance, 1 - cosine, of all pairs in a list; 0 for a list of one item.

    Args:
        recommended: (users, k) item ids, padded with 0.
        vectors: (num_items + 1, size), such as those of titles.

    Returns:
        (users,) between 0 and 2.

    Source: `IntraListDiversity` of RecTools, with the cosine as its distance.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    unit[PADDING_ITEM_ID] = 0
    result = np.zeros(len(recommended))
    step = max(1, _MAX_NUMBERS // (recommended.shape[1] * unit.shape[1]))
    for start in range(0, len(recommended), step):
        items = recommended[start : start + step]
        lengths = (items != PADDING_ITEM_ID).sum(axis=1)  # (part,)
        listed = unit[items].astype(np.float64)  # (part, k, size)
        # The sum over pairs of different items is that over all pairs less each item's with itself.
        sums = (listed.sum(axis=1) ** 2).sum(axis=1) - (listed**2).sum(axis=(1, 2))
        pairs = lengths * (lengths - 1)
        result[start : start + step] = np.where(pairs > 0, 1 - sums / np.maximum(pairs, 1), 0.0)
    return result


def decile_shares(recommended: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The share of each list that each tenth of the catalogue has, by popularity.

    The items are ordered by their count and divided into ten equal parts, the most popular first. A group of items with
    equal counts may span several parts; each of its items then counts towards all of them, in proportion to the share
    of the group in each. So the order of item ids plays no role, and random lists have a tenth in each part.

    Args:
        recommended: (users, k) item ids, padded with 0.
        counts: (num_items + 1,) occurrences in training.

    Returns:
        (users, 10), which sum to 1.

    Source: none; RecTools has only the mean popularity of recommended items.
    """
    num_items = len(counts) - 1
    _, number, sizes = np.unique(-counts[1:], return_inverse=True, return_counts=True)  # most popular first
    ends = sizes.cumsum() / num_items * NUM_DECILES  # (groups,), in deciles
    begins = ends - sizes / num_items * NUM_DECILES
    deciles = np.arange(NUM_DECILES)
    overlap = np.minimum(ends[:, None], deciles + 1) - np.maximum(begins[:, None], deciles)  # (groups, 10)
    of_group = np.clip(overlap, 0, None) / (ends - begins)[:, None]
    of_item = np.vstack([np.zeros(NUM_DECILES), of_group[number]])  # (num_items + 1, 10)
    return np.stack([_mean_over_list(recommended, of_item[:, decile][recommended]) for decile in deciles], axis=1)


def _mean_over_list(recommended: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(users,) the mean over each list of values (users, k), ignoring padding."""
    is_item = recommended != PADDING_ITEM_ID
    return (values * is_item).sum(axis=1) / np.maximum(is_item.sum(axis=1), 1)


# --- one number for the lists of all users ---


def coverage(times: np.ndarray) -> np.ndarray:
    """The share of the catalogue that is recommended to at least one user.

    Args:
        times: (num_items, ...) how often each item is recommended.

    Source: `CatalogCoverage` of RecTools with `normalize=True`.
    """
    return (times > 0).mean(axis=0)


def gini(times: np.ndarray) -> np.ndarray:
    """How unequally recommendations fall on the items: 0 if all are recommended equally often, near 1 if one has all.

    It is half the mean absolute difference of all pairs of items, divided by the mean.

    Args:
        times: (num_items, ...) how often each item is recommended.

    Source: Gini's mean difference; RecTools has none, and RecBole's `GiniIndex` is the same.
    """
    num_items = len(times)
    ordered = np.sort(times, axis=0)
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1  # (num_items,)
    return np.tensordot(weights, ordered, axes=1) / (num_items * ordered.sum(axis=0))


def recommendation_times(recommended: np.ndarray, num_items: int) -> np.ndarray:
    """(num_items,) how often each item is in a list."""
    return np.bincount(recommended.ravel(), minlength=num_items + 1)[1:]


# --- checks of the input ---


def check_lists(recommended: np.ndarray, num_items: int) -> None:
    """Raise a ValueError for lists of another shape, ids outside the catalogue, an item twice, and no items at all."""
    check_item_ids("recommended", recommended, num_items)
    if recommended.ndim != 2:
        raise ValueError(f"recommended has shape {recommended.shape}: expected (users, k)")
    if not recommended.any():
        raise ValueError("recommended has no items: expected at least one list")
    ordered = np.sort(recommended, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ITEM_ID)).any():
        raise ValueError("recommended has an item twice in a list: expected different items")


def check_item_ids(name: str, items: np.ndarray, num_items: int) -> None:
    """Raise a ValueError unless an array contains item ids only, or 0 for padding."""
    if items.dtype.kind not in "iu" or (items.size and not 0 <= items.min() <= items.max() <= num_items):
        raise ValueError(f"{name} has values that are no item ids: expected integers, 1..{num_items} or 0 to pad")
