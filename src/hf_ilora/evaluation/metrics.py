"""Ranking metrics as `evaluate.Metric`: built directly, `NDCG(k=10)`, without the Hub and without a network.

All but `ValidRatio` take ranks: `compute(predictions=ranks)`, or `add_batch(predictions=ranks)` and then `compute()`.
A rank is the 1-based position of the user's only relevant item (`evaluation.ranking` computes ranks from scores). With
one relevant item, Recall@k equals HitRatio@k. `ValidRatio` takes generated texts and the titles of the candidates.
"""

import datasets
import evaluate
import torch

from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.valid_answers import is_valid


class RankMetric(evaluate.Metric):
    """Mean over users of a function of the target's rank.

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
            inputs_description="predictions: integers, the 1-based rank of each user's target.",
            # As integers, Arrow would silently truncate 1.5 to 1; as a float it is kept, and refused below.
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions) -> dict[str, float]:
        """Mean of the metric over all users, as {"ndcg@10": 0.1}.

        Args:
            predictions: (users,) integers >= 1.

        Raises:
            ValueError: for no predictions, ranks < 1 or ranks that are not whole numbers.
        """
        predictions = torch.as_tensor(predictions, dtype=torch.float64)
        if not predictions.numel():
            raise ValueError(f"{self.key} of no users: expected predictions, the rank of at least one user's target")
        ranks = predictions.long()
        if (ranks != predictions).any():
            wrong = predictions[ranks != predictions][0].item()
            raise ValueError(f"rank {wrong} is not a whole number: expected the 1-based position of the target")
        return {self.key: metric_per_user(self.key, ranks).mean().item()}


class HitRatio(RankMetric):
    """Fraction of users whose target is among the first `k`: `HitRatio(k=10).compute(predictions=[1, 11])` is 0.5."""

    description = "Fraction of users whose target is among the first k items."
    short_name = "hit_ratio"


class Recall(RankMetric):
    """Fraction of relevant items among the first `k`, averaged over users; `HitRatio` if there is one relevant item."""

    description = "Fraction of a user's relevant items among the first k, averaged over users."
    short_name = "recall"


class NDCG(RankMetric):
    """Mean of 1 / log2(rank + 1) within the first `k`: `NDCG(k=10).compute(predictions=[1, 3])` is 0.75."""

    description = "Normalised discounted cumulative gain within the first k items, one relevant item per user."
    short_name = "ndcg"


class MRR(RankMetric):
    """Mean of 1 / rank, over all ranks unless `k` is given: `MRR().compute(predictions=[1, 4])` is 0.625."""

    description = "Mean reciprocal rank of the target."
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
