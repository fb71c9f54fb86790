"""Metrics of ranks equal values worked out by hand; test_beyond_accuracy.py compares them with RecTools."""

import math

import pytest
import torch

from hf_ilora.evaluation.rank_metrics import (
    average_precision_at,
    hit_at,
    metric_per_user,
    ndcg_at,
    ndcg_of_several_at,
    precision_at,
    recall_at,
    reciprocal_rank,
)

RANKS = torch.tensor([1, 2, 3, 10, 11])


def test_metrics_of_one_relevant_item_equal_values_worked_out_by_hand():
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
        ("map@10", reciprocal_rank(RANKS, 10)),
        ("precision@10", hit_at(RANKS, 10) / 10),
    ],
)
def test_a_metric_is_chosen_by_its_name_and_cut_off(name, expected):
    assert metric_per_user(name, RANKS).tolist() == pytest.approx(expected.tolist())
    padded = torch.stack([torch.zeros_like(RANKS), RANKS.int()], dim=1)
    assert torch.equal(metric_per_user(name, padded), metric_per_user(name, RANKS))


@pytest.mark.parametrize("name", ["ndcg", "recall", "precision", "accuracy@10", "ndcg@", "ndcg@x", "", "ndcg@10 "])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="expected one of ndcg, hit_ratio, recall, precision, map, mrr"):
        metric_per_user(name, RANKS)


@pytest.mark.parametrize("metric", [hit_at, ndcg_at, reciprocal_rank])
def test_bad_input_is_refused(metric):
    with pytest.raises(ValueError, match="k is 0: expected a cut-off of at least 1"):
        metric(RANKS, 0)
    with pytest.raises(ValueError, match="lowest rank is 0: expected at least 1"):
        metric(torch.tensor([1, 0]), 10)
    with pytest.raises(ValueError, match=r"type torch.float32: expected integers"):
        metric(torch.tensor([1.0]), 10)


SEVERAL = torch.tensor([[5, 1, 0], [2, 0, 0], [30, 4, 3]])


def test_metrics_of_several_relevant_items_equal_values_worked_out_by_hand():
    assert precision_at(SEVERAL, 4).tolist() == [1 / 4, 1 / 4, 2 / 4]
    assert recall_at(SEVERAL, 4).tolist() == pytest.approx([1 / 2, 1, 2 / 3])
    assert average_precision_at(SEVERAL, 5).tolist() == pytest.approx([(1 + 2 / 5) / 2, 1 / 2, (1 / 3 + 2 / 4) / 3])
    discount = lambda rank: 1 / math.log2(rank + 1)  # noqa: E731
    two = discount(1) + discount(2)
    expected = [discount(1) / two, discount(2), (discount(3) + discount(4)) / (two + discount(3))]
    assert ndcg_of_several_at(SEVERAL, 4).tolist() == pytest.approx(expected)
    assert ndcg_of_several_at(SEVERAL, 2)[2] == 0
    assert ndcg_of_several_at(torch.tensor([[1, 2, 3]]), 2).tolist() == [1]  # no more than k can be reached
    assert metric_per_user("hit_ratio@2", SEVERAL).tolist() == [1, 1, 0]
    assert metric_per_user("mrr", SEVERAL).tolist() == [1, 1 / 2, 1 / 3]
    assert metric_per_user("mrr@2", SEVERAL).tolist() == [1, 1 / 2, 0]


@pytest.mark.parametrize("name", ["ndcg@5", "hit_ratio@5", "recall@5", "precision@5", "map@5", "mrr"])
def test_bad_ranks_of_several_items_are_refused(name):
    with pytest.raises(ValueError, match="user 1 has no relevant item"):
        metric_per_user(name, torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(ValueError, match=r"ranks of user 1 are \[4, 4\]: expected a different rank"):
        metric_per_user(name, torch.tensor([[1, 0], [4, 4]]))
    with pytest.raises(ValueError, match="lowest rank is -1"):
        metric_per_user(name, torch.tensor([[1, -1]]))
    with pytest.raises(ValueError, match=r"type torch.float32: expected integers"):
        metric_per_user(name, torch.tensor([[1.0, 2.0]]))
    with pytest.raises(ValueError, match=r"ranks have shape \(1, 1, 1\): expected \(users, relevant\)"):
        metric_per_user(name, torch.ones(1, 1, 1).long())
