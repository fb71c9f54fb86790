"""Ranking metrics as `evaluate.Metric`: built directly, `NDCG(k=10)`, without the Hub and without a network.

They take ranks: `compute(predictions=ranks)`, or `add_batch(predictions=ranks)` and then `compute()`. A rank is the
1-based position of a relevant item (`evaluation.ranking` computes ranks from scores). Predictions are one rank per
user, or the list of the ranks of all relevant items of each user: `[3, 1]` or `[[3, 7], [1]]`. With one relevant item,
Recall@k equals HitRatio@k, and MAP@k equals MRR@k. `metric_folder` makes folders of them that `evaluate.load` takes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_ilora.evaluation.rank_metrics import metric_per_user

# The rank of a user's target, or the ranks of all relevant items.
Ranks = int | float | Sequence[int] | Sequence[float] | np.ndarray


class RankMetric(evaluate.Metric):
    """Mean over users of a function of the ranks of their relevant items.

    Args:
        k: cut-off, at least 1; None for no cut-off, if the metric allows it.
        keep_in_memory, kwargs: as in `evaluate.Metric`.

    Raises:
        ValueError: for `k` < 1.
    """

    description = ""
    short_name = ""
    inputs = (
        "- `predictions`: (users,) whole numbers >= 1, the rank of each user's relevant item, where 1 is the first "
        "place; or (users, relevant items of the user) such numbers, the different ranks of all relevant items of each "
        "user, in lists that may differ in length."
    )

    def __init__(self, k: int | None = 10, keep_in_memory: bool = True, **kwargs: Any):
        if k is not None and k < 1:
            raise ValueError(f"k is {k}: expected a cut-off of at least 1")
        self.k = k
        self.key = self.short_name if k is None else f"{self.short_name}@{k}"
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.inputs,
            # As integers, Arrow would silently truncate 1.5 to 1; as a float it is kept, and refused below.
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def add(self, *, prediction: Ranks, **kwargs: Any) -> None:
        """Add a user: the rank of the target, or the ranks of all relevant items."""
        super().add(prediction=_as_list(prediction), **kwargs)

    def add_batch(self, *, predictions: Iterable[Ranks], **kwargs: Any) -> None:
        """Add several users; see `add`."""
        super().add_batch(predictions=[_as_list(prediction) for prediction in predictions], **kwargs)

    def _compute(self, predictions: Sequence[Sequence[float]]) -> dict[str, float]:
        """Mean of the metric over all users, as {"ndcg@10": 0.1}.

        Args:
            predictions: (users,) integers >= 1, or as many lists of them.

        Raises:
            ValueError: for no predictions, users without ranks, ranks < 1, ranks that are not whole numbers, and equal
                ranks of a user.
        """
        if not len(predictions):
            raise ValueError(f"{self.key} of no users: expected predictions, the rank of at least one user's target")
        ranks = torch.as_tensor(np.concatenate(predictions), dtype=torch.float64)
        whole = ranks.long()
        if (whole != ranks).any():
            wrong = ranks[whole != ranks][0].item()
            raise ValueError(f"rank {wrong} is not a whole number: expected the 1-based position of the target")
        if len(whole) and int(whole.min()) < 1:  # 0 would pass as padding
            raise ValueError(
                f"lowest rank is {int(whole.min())}: expected at least 1, the 1-based position of the target"
            )
        of_users = pad_sequence(whole.split([len(each) for each in predictions]), batch_first=True)  # (users, relevant)
        return {self.key: metric_per_user(self.key, of_users).mean().item()}


def _as_list(prediction: Ranks) -> list[float]:
    return np.atleast_1d(prediction).tolist()


class HitRatio(RankMetric):
    """Fraction of users with a relevant item among the first `k`.

    `HitRatio(k=10).compute(predictions=[1, 11])` is 0.5.
    """

    description = "Fraction of users with a relevant item among the first k items."
    short_name = "hit_ratio"


class Recall(RankMetric):
    """Fraction of relevant items among the first `k`, averaged over users; `HitRatio` if there is one relevant item."""

    description = "Fraction of a user's relevant items among the first k, averaged over users."
    short_name = "recall"


class Precision(RankMetric):
    """Share of the first `k` places that relevant items have, averaged over users.

    `Precision(k=2).compute(predictions=[[1, 2], [1]])` is 0.75.
    """

    description = "Relevant items among the first k, divided by k, averaged over users."
    short_name = "precision"


class MAP(RankMetric):
    """Mean over users of average precision within the first `k`.

    Average precision sums the precision at the place of each relevant item and divides by the number of relevant items.

    `MAP(k=10).compute(predictions=[[1, 4]])` is (1/1 + 2/4) / 2 = 0.75.
    """

    description = "Mean average precision within the first k items."
    short_name = "map"


class NDCG(RankMetric):
    """Sum of 1 / log2(rank + 1) within the first `k`, divided by its best possible value and averaged over users.

    `NDCG(k=10).compute(predictions=[1, 3])` is 0.75.
    """

    description = "Normalised discounted cumulative gain within the first k items."
    short_name = "ndcg"


class MRR(RankMetric):
    """Mean of 1 / rank of the first relevant item, over all ranks unless `k` is given.

    `MRR().compute(predictions=[1, 4])` is 0.625.
    """

    description = "Mean reciprocal rank of the first relevant item."
    short_name = "mrr"

    def __init__(self, k: int | None = None, **kwargs: Any):
        super().__init__(k, **kwargs)
