"""Computes all of `list_properties` with intervals: coverage, novelty, popularity, diversity and serendipity."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from scipy import sparse

from hf_ilora.data.columns import flatten_lists, read_column
from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.evaluation.list_properties import (
    NUM_DECILES,
    check_item_ids,
    check_lists,
    coverage,
    decile_shares,
    diversity,
    gini,
    novelty,
    recommendation_times,
    serendipity,
)
from hf_ilora.evaluation.statistics import Interval
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

# Numbers in memory at a time: 32 MB of float64.
_MAX_NUMBERS = 4_000_000


@dataclass(frozen=True)
class TrainingFacts:
    """Statistics of the train split for each item; row 0 is padding.

    Args:
        counts: (num_items + 1,) occurrences in training.
        users: (num_items + 1,) number of different training users who have the item.
        num_users: number of training users.
        title_vectors: (num_items + 1, size) vectors of titles; with None, the diversity of lists is not computed.
    """

    counts: np.ndarray
    users: np.ndarray
    num_users: int
    title_vectors: np.ndarray | None = None

    @classmethod
    def of(cls, sequences: SequenceDatasets, title_vectors: torch.Tensor | np.ndarray | None = None) -> "TrainingFacts":
        """Compute the statistics of a data set's train split.

        Args:
            sequences: the data set.
            title_vectors: (num_items + 1, size), such as those of `item_title_embeddings`.

        Raises:
            ValueError: for title vectors of another number of items.
        """
        counts = sequences.catalogue.counts
        assert counts is not None  # a data set counts its train split
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
    """(num_rows,) number of different users who have each item, and the number of users."""
    user_of_row = read_column(train, "user_id").combine_chunks().dictionary_encode().indices.to_numpy()  # (rows,)
    items, boundaries = flatten_lists(train, "history")
    pairs = np.concatenate(
        [
            np.repeat(user_of_row, np.diff(boundaries)).astype(np.int64) * num_rows + items,
            user_of_row.astype(np.int64) * num_rows + read_column(train, "target").to_numpy(),
        ]
    )
    return np.bincount(np.unique(pairs) % num_rows, minlength=num_rows), int(user_of_row.max()) + 1


def beyond_accuracy(
    recommended: np.ndarray | torch.Tensor,
    facts: TrainingFacts,
    relevant: np.ndarray,
    *,
    num_resamples: int = 2_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Compute all metrics of lists, each with its 95% bootstrap interval over users; users without a list are ignored.

    All metrics are computed on the same resamples. A resample repeats some users and so lacks the lists of others: its
    coverage is lower and its Gini higher than those of as many different users. The intervals of these two are
    therefore the deviations of the resamples from their own mean, centred on the measured value.

    Args:
        recommended: (users, k) item ids, best first, padded with 0.
        facts: statistics of the train split.
        relevant: (users, relevant) ids of the items that each user chose next, padded with 0; or (users,), one each.
        num_resamples: bootstrap resamples.
        seed: random seed of the resamples.

    Returns:
        An interval for each of coverage@k, gini@k, novelty@k, serendipity@k, decile_1@k (the most popular tenth of the
        items) to decile_10@k and, if there are title vectors, diversity@k.

    Raises:
        ValueError: for shapes that do not fit, ids outside the catalogue, an item twice in a list, and no
            recommendations.
    """
    lists, relevant = np.asarray(recommended), np.asarray(relevant)
    num_items = len(facts.counts) - 1
    check_lists(lists, num_items)
    check_item_ids("relevant", relevant, num_items)
    if len(relevant) != len(lists):
        raise ValueError(f"relevant has {len(relevant)} users: expected {len(lists)}, as recommended has")
    has_list = (lists != PADDING_ITEM_ID).any(axis=1)
    lists, relevant = lists[has_list], relevant.reshape(len(relevant), -1)[has_list]
    k = lists.shape[1]
    shares = decile_shares(lists, facts.counts)  # (users, 10)
    of_users = {
        "novelty": novelty(lists, facts.users, facts.num_users),
        "serendipity": serendipity(lists, relevant, facts.counts),
        **{f"decile_{decile + 1}": shares[:, decile] for decile in range(NUM_DECILES)},
    }
    if facts.title_vectors is not None:
        of_users["diversity"] = diversity(lists, facts.title_vectors)
    values = np.stack([*of_users.values()], axis=1)  # (users, metrics)
    times = recommendation_times(lists, num_items)
    measured = {"coverage": float(coverage(times)), "gini": float(gini(times))}

    rows, columns = np.nonzero(lists)
    listed = sparse.csr_array((np.ones(len(rows)), (lists[rows, columns] - 1, rows)), shape=(num_items, len(lists)))
    means: list[np.ndarray] = []
    catalogue: dict[str, list[np.ndarray]] = {name: [] for name in measured}
    for drawn in _resampled_users(len(lists), num_resamples, seed, num_items):
        means.append(drawn @ values / len(lists))
        of_items = listed @ drawn.T  # (num_items, part)
        catalogue["coverage"].append(coverage(of_items))
        catalogue["gini"].append(gini(of_items))
    ends = np.quantile(np.concatenate(means), [0.025, 0.975], axis=0)  # (2, metrics)
    result = {}
    for name, parts in catalogue.items():
        resampled = np.concatenate(parts)  # (resamples,)
        low, high = measured[name] + np.quantile(resampled, [0.025, 0.975]) - resampled.mean()
        result[f"{name}@{k}"] = Interval(measured[name], max(0.0, float(low)), min(1.0, float(high)))
    for name, mean, low, high in zip(of_users, values.mean(axis=0), *ends, strict=True):
        result[f"{name}@{k}"] = Interval(float(mean), float(low), float(high))
    return result


def _resampled_users(num_users: int, num_resamples: int, seed: int, num_items: int) -> Iterator[np.ndarray]:
    """How often each resample contains each user, in parts of (resamples, users) float64."""
    generator = np.random.default_rng(seed)
    step = max(1, _MAX_NUMBERS // max(num_users, num_items))
    for start in range(0, num_resamples, step):
        part = min(step, num_resamples - start)
        drawn = generator.integers(num_users, size=(part, num_users)) + num_users * np.arange(part)[:, None]
        yield np.bincount(drawn.ravel(), minlength=part * num_users).reshape(part, num_users).astype(np.float64)
