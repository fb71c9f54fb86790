"""Metrics of lists as `evaluate.Metric` give the numbers of `beyond_accuracy`, for lists of any form."""

import numpy as np
import pytest
import torch

from hf_ilora import (
    Coverage,
    Deciles,
    Diversity,
    Gini,
    Novelty,
    Serendipity,
    TrainingFacts,
    beyond_accuracy,
)

COUNTS = np.array([0, 9, 4, 4, 1, 0])
USERS = np.array([0, 5, 4, 2, 1, 0])
VECTORS = np.array([[0, 0], [1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0.8, -0.6]])
LISTS = np.array([[1, 2, 3], [4, 1, 0], [0, 0, 0], [5, 3, 1]])
TARGETS = np.array([2, 4, 1, 3])


def metrics(k: int) -> list:
    sized = [Coverage(5, k), Gini(5, k), Novelty(USERS, 6, k)]
    return [*sized, Serendipity(COUNTS, k), Deciles(COUNTS, k), Diversity(VECTORS, k)]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, np.ndarray.tolist])
def test_numbers_are_those_of_the_report(form, k):
    facts = TrainingFacts(COUNTS, USERS, 6, VECTORS)
    expected = beyond_accuracy(LISTS[:, :k], facts, TARGETS, num_resamples=2)
    found = {}
    for metric in metrics(k):
        targets = {"references": form(TARGETS)} if isinstance(metric, Serendipity) else {}
        found |= metric.compute(predictions=form(LISTS), **targets)
    assert found == pytest.approx({name: interval.mean for name, interval in expected.items()})


def test_parts_of_the_users_add_up_and_lists_may_differ_in_length():
    metric = Coverage(num_items=5)
    metric.add_batch(predictions=[[1, 2], [3]])
    metric.add_batch(predictions=[[]])
    metric.add_batch(predictions=[[4]])
    assert metric.compute() == {"coverage@10": 0.8}


@pytest.mark.parametrize(
    ("metric", "inputs", "message"),
    [
        (lambda: Coverage(4), [[1, 5]], r"item ids: expected integers, 1\.\.4"),
        (lambda: Coverage(4), [[1, 1]], "an item twice in a list"),
        (lambda: Coverage(4), [[1.5]], r"predictions have \[1\.5\]: expected item ids"),
        (lambda: Coverage(4), [[0, 0]], "no items: expected at least one list"),
        (lambda: Coverage(4), [], "no items: expected at least one list"),
        (lambda: Coverage(0), [[1]], "num_items is 0: expected a whole number of at least 1"),
        (lambda: Gini(4, k=0), [[1]], "k is 0"),
        (lambda: Novelty([0, 5], 4), [[1]], "num_users is 4: expected a whole number of at least 5"),
        (lambda: Deciles([[1]]), [[1]], r"counts have shape \(1, 1\) and type int64: expected numbers \(num_items"),
        (lambda: Diversity([0, 1]), [[1]], r"vectors have shape \(2,\).*expected numbers \(num_items \+ 1, size\)"),
    ],
)
def test_wrong_lists_and_statistics_are_refused(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(predictions=inputs)
