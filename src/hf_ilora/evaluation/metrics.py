"""Ranking metrics as `evaluate.Metric`: built directly, `NDCG(k=10)`, without the Hub and without a network.

All but `ValidRatio` take ranks: `compute(predictions=ranks)`, or `add_batch(predictions=ranks)` and then `compute()`.
A rank is the 1-based position of a relevant item (`evaluation.ranking` computes ranks from scores). Predictions are one
rank per user, or the list of the ranks of all relevant items of each user: `[3, 1]` or `[[3, 7], [1]]`. With one
relevant item, Recall@k equals HitRatio@k, and MAP@k equals MRR@k. `ValidRatio` takes generated texts and the titles of
the candidates.
"""

import datasets
import evaluate
import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.valid_answers import is_valid


class RankMetric(evaluate.Metric):
    """Mean over users of a function of the ranks of their relevant items.

    Args:
        k: cut-off, at least 1; None for no cut-off, if the metric allows it.

    Raises:
        ValueError: for `k` < 1.
    """

    description = ""
    short_name = ""

    def __init__(self, k: int | None = 10, **kwargs):
        if k is not None and k < 1:
            raise ValueError(f"k is {k}: expected a cut-off of at least 1")
        self.k = k
        self.key = self.short_name if k is None else f"{self.short_name}@{k}"
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions: integers, the 1-based rank of each user's target, or lists of them.",
            # As integers, Arrow would silently truncate 1.5 to 1; as a float it is kept, and refused below.
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
        )

    def add(self, *, prediction=None, **kwargs) -> None:
        """Add a user: the rank of the target, or the ranks of all relevant items."""
        super().add(prediction=_as_list(prediction), **kwargs)

    def add_batch(self, *, predictions=None, **kwargs) -> None:
        """Add users: for each of them as `add`."""
        super().add_batch(predictions=[_as_list(prediction) for prediction in predictions], **kwargs)

    def _compute(self, predictions) -> dict[str, float]:
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


def _as_list(prediction) -> list[float]:
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
    """Mean over users of the precision at the place of each relevant item among the first `k`, divided by their number.

    `MAP(k=10).compute(predictions=[[1, 4]])` is (1/1 + 2/4) / 2 = 0.75.
    """

    description = "Mean average precision within the first k items."
    short_name = "map"


class NDCG(RankMetric):
    """Sum of 1 / log2(rank + 1) within the first `k` by its best possible value, averaged over users.

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

    def __init__(self, k: int | None = None, **kwargs):
        super().__init__(k, **kwargs)


class ValidRatio(evaluate.Metric):
    """Fraction of generated answers that name exactly one of their candidates.

    `ValidRatio().compute(predictions=["Heat", "I like films"], references=[["Heat", "Alien"]] * 2)` is 0.5. It takes
    texts instead of flags, so that the same rule, `valid_answers.is_valid`, applies everywhere.

    Args:
        first_line_only: ignore what follows the first line of an answer, as the programs of LLaRA and iLoRA do.
    """

    def __init__(self, first_line_only: bool = False, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)
        self.first_line_only = first_line_only

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of generated answers that contain exactly one candidate title, ignoring case.",
            citation="",
            inputs_description="predictions: generated texts; references: the titles of each one's candidates.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        """Fraction of valid answers, as {"valid_ratio": 0.5}.

        Args:
            predictions: (users,) texts.
            references: (users, candidates) titles.

        Raises:
            ValueError: for no predictions, no candidates, and blank titles.
        """
        if not len(predictions):
            raise ValueError("valid_ratio of no answers: expected predictions, the generated text of at least one user")
        valid = [
            is_valid(answer, titles, self.first_line_only)
            for answer, titles in zip(predictions, references, strict=True)
        ]
        return {"valid_ratio": sum(valid) / len(valid)}
