"""Metrics of recommended lists as `evaluate.Metric`: built directly, without the Hub and without a network.

They take lists of item ids, best first: `Coverage(num_items=1682).compute(predictions=item_ids)`. The constructors take
statistics of the train split, such as those of `TrainingFacts.of(sequences)`: arrays of num_items + 1 rows, of which
the first is padding. Users without any recommendation are ignored. `beyond_accuracy` computes the same numbers with
intervals, and `metric_folder` writes the metrics as folders that `evaluate.load` takes.
"""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

from hf_ilora.evaluation.list_properties import (
    PADDING_ITEM_ID,
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


class ListMetric(evaluate.Metric):
    """A property of the first `k` items of lists.

    Args:
        num_items: size of the catalogue.
        k: length of the lists; the rest of longer lists is ignored.
        keep_in_memory, kwargs: as in `evaluate.Metric`.

    Raises:
        ValueError: for `k` or `num_items` < 1.
    """

    description = ""
    short_name = ""
    inputs = (
        "- `predictions`: (users, recommended items of the user) item ids from 1 to the number of items, best first, "
        "or 0 to pad; in lists that may differ in length."
    )
    columns: tuple[str, ...] = ("predictions",)

    def __init__(self, num_items: int, k: int = 10, keep_in_memory: bool = True, **kwargs: Any):
        for name, value in (("num_items", num_items), ("k", k)):
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1")
        self.num_items, self.k, self.key = num_items, k, f"{self.short_name}@{k}"
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.inputs,
            # As integers, Arrow would silently truncate 1.5 to 1; as floats they are kept, and refused below.
            features=datasets.Features({name: datasets.List(datasets.Value("float64")) for name in self.columns}),
        )

    def add_batch(self, **columns: Iterable[ArrayLike] | None) -> None:
        """Add users: a list of item ids for each in `predictions`, and in `references` if the metric takes them."""
        given = {
            name: [np.atleast_1d(row).tolist() for row in rows] for name, rows in columns.items() if rows is not None
        }
        super().add_batch(**given)

    def _compute(self, predictions: list[list[float]], references: list[list[float]] | None = None) -> dict[str, float]:
        """The metric of all users, as {"coverage@10": 0.1}.

        Args:
            predictions: (users, any) item ids, padded with 0.
            references: (users, any) item ids, padded with 0, for metrics that take them.

        Raises:
            ValueError: for no recommendations, ids outside the catalogue, and an item twice in a list.
        """
        recommended = _padded("predictions", [row[: self.k] for row in predictions])  # (users, k)
        check_lists(recommended, self.num_items)
        has_list = (recommended != PADDING_ITEM_ID).any(axis=1)
        relevant = None
        if references is not None:
            relevant = _padded("references", references)[has_list]  # (users, relevant)
            check_item_ids("references", relevant, self.num_items)
        return self.values(recommended[has_list], relevant)

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        """Compute the metric of lists (users, k), none of which is empty, and of relevant items (users, any)."""
        raise NotImplementedError


def _padded(name: str, rows: list[list[float]]) -> np.ndarray:
    """(users, longest) int64."""
    result = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int64)
    for row, items in zip(result, rows, strict=True):
        row[: len(items)] = items
        if (row[: len(items)] != items).any():
            raise ValueError(f"{name} have {items}: expected item ids, which are whole numbers")
    return result


def _of_items(name: str, given: ArrayLike, ndim: int = 1) -> np.ndarray:
    """The values as an array, after a check that it has a row for padding and one for each item."""
    values = np.asarray(given)
    if values.ndim != ndim or len(values) < 2 or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} have shape {values.shape} and type {values.dtype}: expected numbers "
            f"({'num_items + 1' if ndim == 1 else 'num_items + 1, size'}), with a first row for padding"
        )
    return values


class Coverage(ListMetric):
    """Share of the catalogue that is recommended to at least one user.

    `Coverage(num_items=4).compute(predictions=[[1, 2], [1, 3]])` is 0.75.
    """

    description = "Share of the catalogue that is among the first k recommendations of at least one user."
    short_name = "coverage"

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        return {self.key: float(coverage(recommendation_times(recommended, self.num_items)))}


class Gini(ListMetric):
    """How unequally recommendations fall on the items: 0 if all are recommended equally often, near 1 if one has all.

    `Gini(num_items=4).compute(predictions=[[1, 2], [1, 3]])` is 0.375.
    """

    description = "Gini coefficient of how often each item of the catalogue is among the first k recommendations."
    short_name = "gini"

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        return {self.key: float(gini(recommendation_times(recommended, self.num_items)))}


class Novelty(ListMetric):
    """Mean information of the recommended items, -log2 of the share of training users who have the item, in bits.

    `Novelty(users=[0, 4, 2, 1, 0], num_users=4).compute(predictions=[[1, 2], [1, 3]])` is 0.75.

    Args:
        users: (num_items + 1,) number of different training users who have the item.
        num_users: number of training users.
        k, kwargs: as in `ListMetric`.
    """

    description = "Mean of -log2(share of the training users who have the item) over the first k items of a list."
    short_name = "novelty"

    def __init__(self, users: ArrayLike, num_users: int, k: int = 10, **kwargs: Any):
        self.users, self.num_users = _of_items("users", users), num_users
        if not isinstance(num_users, int | np.integer) or num_users < max(1, self.users.max()):
            raise ValueError(
                f"num_users is {num_users!r}: expected a whole number of at least {self.users.max()}, the most in users"
            )
        super().__init__(len(self.users) - 1, k, **kwargs)

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        return {self.key: float(novelty(recommended, self.users, self.num_users).mean())}


class Serendipity(ListMetric):
    """How much higher lists rank relevant items than popularity ranks them.

    `Serendipity(counts=[0, 4, 2, 1, 0]).compute(predictions=[[2, 1], [3, 1]], references=[2, 3])` is 0.1875.

    Args:
        counts: (num_items + 1,) occurrences of the item in training.
        k, kwargs: as in `ListMetric`.
    """

    description = "How much higher the first k items of a list rank relevant items than popularity does."
    short_name = "serendipity"
    inputs = (
        f"{ListMetric.inputs}\n- `references`: (users,) item ids, the item that each user chose next; or lists of "
        "several for each."
    )
    columns = ("predictions", "references")

    def __init__(self, counts: ArrayLike, k: int = 10, **kwargs: Any):
        self.counts = _of_items("counts", counts)
        super().__init__(len(self.counts) - 1, k, **kwargs)

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        assert relevant is not None  # `compute` requires the column
        return {self.key: float(serendipity(recommended, relevant, self.counts).mean())}


class Deciles(ListMetric):
    """Share of the recommendations that each tenth of the catalogue has; `decile_1@k` is the most popular tenth's.

    `Deciles(counts=[0, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]).compute(predictions=[[1, 2], [1, 10]])["decile_1@10"]` is 0.5.

    Args:
        counts: (num_items + 1,) occurrences of the item in training.
        k, kwargs: as in `ListMetric`.
    """

    description = "Share of the first k recommendations that each tenth of the catalogue has, by popularity."
    short_name = "decile"

    def __init__(self, counts: ArrayLike, k: int = 10, **kwargs: Any):
        self.counts = _of_items("counts", counts)
        super().__init__(len(self.counts) - 1, k, **kwargs)

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        shares = decile_shares(recommended, self.counts).mean(axis=0)  # (10,)
        return {f"decile_{number}@{self.k}": float(share) for number, share in enumerate(shares, start=1)}


class Diversity(ListMetric):
    """Mean distance, 1 - cosine, of all pairs of items in a list.

    `Diversity(vectors=[[0, 0], [1, 0], [0, 1], [1, 0]]).compute(predictions=[[1, 2], [1, 3]])` is 0.5.

    Args:
        vectors: (num_items + 1, size), such as those of titles.
        k, kwargs: as in `ListMetric`.
    """

    description = "Mean of 1 - cosine over all pairs of the first k items of a list."
    short_name = "diversity"

    def __init__(self, vectors: ArrayLike, k: int = 10, **kwargs: Any):
        self.vectors = _of_items("vectors", vectors, ndim=2)
        super().__init__(len(self.vectors) - 1, k, **kwargs)

    def values(self, recommended: np.ndarray, relevant: np.ndarray | None) -> dict[str, float]:
        return {self.key: float(diversity(recommended, self.vectors).mean())}
