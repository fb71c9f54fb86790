"""What lists of recommendations are like beside hitting targets: coverage, novelty, popularity, diversity, serendipity.

Lists are (users, k) item ids, best first, padded with 0 where fewer are left, as `rank_split(..., top_k=k).recommended`
or `recommend` gives them. Definitions are those of RecTools, except where it has none; each says so. Users without any
recommendation are not counted, as there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy import sparse

from hf_ilora.data.columns import flatten_lists, read_column
from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.evaluation.statistics import Interval
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

NUM_DECILES = 10
# Bounds the memory of a part of the work: 32 MB of float64.
_MAX_NUMBERS = 4_000_000


@dataclass(frozen=True)
class TrainingFacts:
    """What training knows about each item; row 0 is padding.

    Args:
        counts: (num_items + 1,) occurrences in training.
        users: (num_items + 1,) different users who have the item in training.
        num_users: users of training.
        title_vectors: (num_items + 1, size) vectors of titles; None leaves out the diversity of lists.
    """

    counts: np.ndarray
    users: np.ndarray
    num_users: int
    title_vectors: np.ndarray | None = None

    @classmethod
    def of(cls, sequences: SequenceDatasets, title_vectors: torch.Tensor | np.ndarray | None = None) -> "TrainingFacts":
        """The facts of the train split.

        Args:
            sequences: the data set.
            title_vectors: (num_items + 1, size), such as those of `item_title_embeddings`.

        Raises:
            ValueError: for title vectors of another number of items.
        """
        counts = sequences.catalogue.counts
        if title_vectors is not None:
            title_vectors = np.asarray(title_vectors)
            if title_vectors.ndim != 2 or len(title_vectors) != len(counts):
                raise ValueError(
                    f"title_vectors have shape {title_vectors.shape}: expected ({len(counts)}, size), a row for each "
                    "item and one for padding; pass item_title_embeddings(sequences.catalogue)"
                )
        users, num_users = _users_of_items(sequences["train"], len(counts))
        return cls(counts, users, num_users, title_vectors)


def _users_of_items(train: Dataset, num_rows: int) -> tuple[np.ndarray, int]:
    """(num_rows,) number of different users of each item, and the number of users."""
    user_of_row = read_column(train, "user_id").combine_chunks().dictionary_encode().indices.to_numpy()  # (rows,)
    items, boundaries = flatten_lists(train, "history")
    pairs = np.concatenate(
        [
            np.repeat(user_of_row, np.diff(boundaries)).astype(np.int64) * num_rows + items,
            user_of_row.astype(np.int64) * num_rows + read_column(train, "target").to_numpy(),
        ]
    )
    return np.bincount(np.unique(pairs) % num_rows, minlength=num_rows), int(user_of_row.max()) + 1


# --- one number per user ---


def novelty(recommended: np.ndarray, users: np.ndarray, num_users: int) -> np.ndarray:
    """The information in the items of each list: the mean of -log2(share of the training users who have the item).

    An item that no training user has counts as if one had it.

    Args:
        recommended: (users, k) item ids, padded with 0.
        users: (num_items + 1,) different training users of each item.
        num_users: training users.

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
        relevant: (users, most) item ids, padded with 0.
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

    The items are ordered by their count and divided into ten equal parts, the first of the most popular ones. Items
    with one count that belong to several parts are shared out: each counts in all of these parts, by the share of the
    group that falls into them. So the order of item ids plays no role, and random lists have a tenth in each part.

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
    """(users,) the mean of the values of each list, (users, k), without those of padding."""
    is_item = recommended != PADDING_ITEM_ID
    return (values * is_item).sum(axis=1) / np.maximum(is_item.sum(axis=1), 1)


# --- one number for the lists of all users ---


def coverage(times: np.ndarray) -> np.ndarray:
    """The share of the catalogue that is recommended to somebody.

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


# --- all of them, with intervals ---


def beyond_accuracy(
    recommended: np.ndarray | torch.Tensor,
    facts: TrainingFacts,
    relevant: np.ndarray,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """All metrics of this module, each with its 95% bootstrap interval over users.

    All metrics are computed on the same resamples. A resample repeats some users and so lacks the lists of others: its
    coverage is lower and its Gini higher than those of as many different users. The intervals of these two are
    therefore the deviations of the resamples from their own mean, around the value that was measured.

    Args:
        recommended: (users, k) item ids, best first, padded with 0.
        facts: of the training split.
        relevant: (users, most) the items that each user chose next, padded with 0; or (users,) one each.
        num_resamples: bootstrap resamples.
        seed: random seed of the resamples.

    Returns:
        An interval for each of coverage@k, gini@k, novelty@k, serendipity@k, decile_1@k (the most popular tenth of the
        items) to decile_10@k and, if there are title vectors, diversity@k.

    Raises:
        ValueError: for shapes that do not fit, ids outside the catalogue, an item twice in a list, and no
            recommendations.
    """
    recommended, relevant = np.asarray(recommended), np.asarray(relevant)
    num_items = len(facts.counts) - 1
    _check_lists(recommended, relevant, num_items)
    has_list = (recommended != PADDING_ITEM_ID).any(axis=1)
    recommended, relevant = recommended[has_list], relevant.reshape(len(relevant), -1)[has_list]
    k = recommended.shape[1]
    shares = decile_shares(recommended, facts.counts)  # (users, 10)
    of_users = {
        "novelty": novelty(recommended, facts.users, facts.num_users),
        "serendipity": serendipity(recommended, relevant, facts.counts),
        **{f"decile_{decile + 1}": shares[:, decile] for decile in range(NUM_DECILES)},
    }
    if facts.title_vectors is not None:
        of_users["diversity"] = diversity(recommended, facts.title_vectors)
    values = np.stack([*of_users.values()], axis=1)  # (users, metrics)
    times = recommendation_times(recommended, num_items)
    measured = {"coverage": float(coverage(times)), "gini": float(gini(times))}

    rows, columns = np.nonzero(recommended)
    listed = sparse.csr_array(
        (np.ones(len(rows)), (recommended[rows, columns] - 1, rows)), shape=(num_items, len(recommended))
    )
    means, catalogue = [], {name: [] for name in measured}
    for drawn in _resampled_users(len(recommended), num_resamples, seed, num_items):
        means.append(drawn @ values / len(recommended))
        of_items = listed @ drawn.T  # (num_items, part)
        catalogue["coverage"].append(coverage(of_items))
        catalogue["gini"].append(gini(of_items))
    ends = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)  # (2, metrics)
    result = {}
    for name, resampled in catalogue.items():
        resampled = np.concatenate(resampled)
        low, high = measured[name] + np.quantile(resampled, [0.025, 0.975]) - resampled.mean()
        result[f"{name}@{k}"] = Interval(measured[name], max(0.0, float(low)), min(1.0, float(high)))
    for name, mean, low, high in zip(of_users, values.mean(axis=0), *ends, strict=True):
        result[f"{name}@{k}"] = Interval(float(mean), float(low), float(high))
    return result


def _resampled_users(num_users: int, num_resamples: int, seed: int, num_items: int) -> Iterator[np.ndarray]:
    """How often each resample has each user: parts of (resamples, users) float64."""
    generator = np.random.default_rng(seed)
    step = max(1, _MAX_NUMBERS // max(num_users, num_items))
    for start in range(0, num_resamples, step):
        part = min(step, num_resamples - start)
        drawn = generator.integers(num_users, size=(part, num_users)) + num_users * np.arange(part)[:, None]
        yield np.bincount(drawn.ravel(), minlength=part * num_users).reshape(part, num_users).astype(np.float64)


def _check_lists(recommended: np.ndarray, relevant: np.ndarray, num_items: int) -> None:
    for name, items in (("recommended", recommended), ("relevant", relevant)):
        if items.dtype.kind not in "iu" or (items.size and not 0 <= items.min() <= items.max() <= num_items):
            raise ValueError(f"{name} has values that are no item ids: expected integers, 1..{num_items} or 0 to pad")
    if recommended.ndim != 2 or len(relevant) != len(recommended):
        raise ValueError(
            f"recommended has shape {recommended.shape} and relevant {relevant.shape}: expected (users, k) and as many "
            "users"
        )
    if not recommended.any():
        raise ValueError("recommended has no items: expected at least one list")
    ordered = np.sort(recommended, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ITEM_ID)).any():
        raise ValueError("recommended has an item twice in a list: expected different items")
