"""Metrics of a rank, by hand."""

import math

import pytest
import torch

from hf_ilora.evaluation.rank_metrics import hit_at, metric_per_user, ndcg_at, reciprocal_rank

RANKS = torch.tensor([1, 2, 3, 10, 11])


def test_values_by_hand():
    assert hit_at(RANKS, 3).tolist() == [1, 1, 1, 0, 0]
    expected = [1, 1 / math.log2(3), 0.5, 1 / math.log2(11), 0]
    assert ndcg_at(RANKS, 10).tolist() == pytest.approx(expected)
    assert reciprocal_rank(RANKS).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11])
    assert reciprocal_rank(RANKS, 2).tolist() == [1, 0.5, 0, 0, 0]


def test_shape_is_kept_and_precision_is_double():
    for values in (hit_at(RANKS.view(5, 1), 1), ndcg_at(RANKS.view(5, 1), 1), reciprocal_rank(RANKS.view(5, 1))):
        assert values.shape == (5, 1) and values.dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ndcg@2", ndcg_at(RANKS, 2)),
        ("hit_ratio@10", hit_at(RANKS, 10)),
        ("recall@10", hit_at(RANKS, 10)),
        ("mrr", reciprocal_rank(RANKS)),
        ("mrr@2", reciprocal_rank(RANKS, 2)),
    ],
)
def test_names_spell_metrics(name, expected):
    assert torch.equal(metric_per_user(name, RANKS), expected)


@pytest.mark.parametrize("name", ["ndcg", "recall", "precision@10", "ndcg@", "ndcg@x", "", "ndcg@10 "])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="expected one of ndcg, hit_ratio, recall, mrr"):
        metric_per_user(name, RANKS)


@pytest.mark.parametrize("metric", [hit_at, ndcg_at, reciprocal_rank])
def test_bad_input_is_refused(metric):
    with pytest.raises(ValueError, match="k is 0: expected a cut-off of at least 1"):
        metric(RANKS, 0)
    with pytest.raises(ValueError, match="lowest rank is 0: expected at least 1"):
        metric(torch.tensor([1, 0]), 10)
    with pytest.raises(ValueError, match=r"type torch.float32: expected integers"):
        metric(torch.tensor([1.0]), 10)
