"""The ranking metrics as `evaluate.Metric`: no Hub, one call or many batches, and no wrong input passes."""

import math

import evaluate
import numpy as np
import pytest
import torch

from hf_ilora import MAP, MRR, NDCG, HitRatio, Precision, Recall

RANKS = [1, 3, 11, 2]


@pytest.mark.parametrize(
    ("metric", "key", "expected"),
    [
        (HitRatio(k=10), "hit_ratio@10", 3 / 4),
        (Recall(k=2), "recall@2", 2 / 4),
        (NDCG(k=10), "ndcg@10", (1 + 1 / 2 + 0 + 1 / math.log2(3)) / 4),
        (NDCG(k=2), "ndcg@2", (1 + 1 / math.log2(3)) / 4),
        (Precision(k=2), "precision@2", 2 / 4 / 2),
        (MAP(k=10), "map@10", (1 + 1 / 3 + 0 + 1 / 2) / 4),
        (MRR(), "mrr", (1 + 1 / 3 + 1 / 11 + 1 / 2) / 4),
        (MRR(k=2), "mrr@2", (1 + 1 / 2) / 4),
    ],
)
def test_metrics_equal_values_worked_out_by_hand(metric, key, expected):
    for ranks in (RANKS, np.array(RANKS), torch.tensor(RANKS)):
        assert metric.compute(predictions=ranks) == {key: pytest.approx(expected)}


def test_users_may_have_several_relevant_items():
    ranks = [[5, 1], [2], [30, 4, 3]]
    expected = {
        MAP(k=5): ((1 + 2 / 5) / 2 + 1 / 2 + (1 / 3 + 2 / 4) / 3) / 3,
        Precision(k=4): (1 + 1 + 2) / 4 / 3,
        Recall(k=4): (1 / 2 + 1 + 2 / 3) / 3,
        HitRatio(k=2): 2 / 3,
        MRR(): (1 + 1 / 2 + 1 / 3) / 3,
    }
    for metric, value in expected.items():
        assert metric.compute(predictions=ranks) == {metric.key: pytest.approx(value)}
    metric = MAP(k=5)
    metric.add_batch(predictions=ranks[:2])
    metric.add(prediction=ranks[2])
    assert metric.compute() == metric.compute(predictions=ranks)
    for wrong, message in (([[1, 0]], "lowest rank is 0"), ([[1], []], "user 1 has no relevant"), ([[1, 1.5]], "1.5")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=wrong)


def test_batches_give_what_one_call_gives():
    metric = NDCG(k=10)
    metric.add_batch(predictions=RANKS[:3])
    metric.add(prediction=RANKS[3])
    assert metric.compute() == metric.compute(predictions=RANKS)


def test_metrics_combine_in_one_call():
    combined = evaluate.combine([NDCG(k=10), HitRatio(k=2)])
    assert combined.compute(predictions=[1, 3]) == {"ndcg@10": pytest.approx(0.75), "hit_ratio@2": 0.5}


@pytest.mark.parametrize("metric_class", [HitRatio, NDCG, Recall, MRR, MAP, Precision])
def test_bad_input_is_refused_and_the_metric_can_be_used_again(metric_class):
    with pytest.raises(ValueError, match="k is 0: expected a cut-off of at least 1"):
        metric_class(k=0)
    metric = metric_class(k=5)
    with pytest.raises(ValueError, match="of no users"):
        metric.compute(predictions=[])
    with pytest.raises(ValueError, match="lowest rank is 0"):
        metric.compute(predictions=[1, 0])
    with pytest.raises(ValueError, match=r"rank 1.5 is not a whole number"):
        metric.compute(predictions=[1, 1.5])
    with pytest.raises(ValueError, match="rank nan is not a whole number"):
        metric.compute(predictions=[1, float("nan")])
    assert metric.compute(predictions=[1]) == {metric.key: 1 / 5 if metric_class is Precision else 1}
