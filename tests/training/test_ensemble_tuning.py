"""Mixtures of scores against ensembles that are asked one history at a time, and the search of weights."""

import numpy as np
import pytest
import torch

from hf_ilora import EnsembleTeacher, TitleSimilarity, TransitionCountsConfig, TransitionCountsForNextItem
from hf_ilora.training import ensemble_tuning
from hf_ilora.training.ensemble_tuning import Mixture, MixtureRanking, tune_weights
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender

MIXTURES = [(1.0, 0.0, 0.0), (0.0, 0.0, 2.0), (1.0, 3.0, 0.5)]


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=30)


@pytest.fixture(scope="module")
def members(sequences):
    rows = sequences["train"]["history"]
    counts = TransitionCountsForNextItem.fit(rows, TransitionCountsConfig(num_items=30, max_length=4))
    titles = TitleSimilarity(torch.randn(31, 6, generator=torch.Generator().manual_seed(0)))
    return list(EnsembleTeacher([known_recommender(sequences), titles, counts], [1.0, 1.0, 1.0]).members)


def ranks_by_hand(members, weights, split, exclude_seen=True):
    """The ranks of an ensemble that is asked about one user after the other."""
    teacher, ranks = EnsembleTeacher(members, weights), []
    for row in split:
        scores = teacher.next_item_scores(torch.tensor([row["history"][-8:]]))[0].double()
        others = sorted(set(range(1, 31)) - (set(row["history"]) if exclude_seen else set()) - {row["target"]})
        ranks.append(1 + int((scores[others] >= scores[row["target"]]).sum()))
    return np.array(ranks)


@pytest.mark.parametrize("scores_at_once", [1 << 23, 30 * 7])
def test_a_mixture_ranks_as_the_ensemble_of_its_weights(members, sequences, monkeypatch, scores_at_once):
    monkeypatch.setattr(ensemble_tuning, "_SCORES_AT_ONCE", scores_at_once)
    split, row_ids = sequences["validation"], np.array([0, 3, 4, *range(10, 30)])
    for mixture in MixtureRanking(members, split, row_ids, batch_size=16)(MIXTURES):
        ranks = ranks_by_hand(members, mixture.weights, split.select(row_ids))
        gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
        assert (mixture.ndcg, mixture.hit_ratio) == pytest.approx((gains.mean(), (ranks <= 10).mean()), abs=1e-6)


def test_the_ranks_of_a_mixture_are_in_the_order_of_the_rows(members, sequences):
    split, row_ids = sequences["validation"], np.array([0, 3, 4, *range(10, 30)])
    ranks = MixtureRanking(members, split, row_ids, batch_size=4).ranks(MIXTURES[2])
    rows = split.select(row_ids)
    assert ranks.masked.tolist() == ranks_by_hand(members, MIXTURES[2], rows).tolist()
    assert ranks.unmasked.tolist() == ranks_by_hand(members, MIXTURES[2], rows, exclude_seen=False).tolist()
    assert len(set(ranks.masked)) > 1


def test_weights_are_searched_until_a_round_brings_nothing():
    best, asked = (1.0, 2.0, 0.0, 0.5), []

    def measure(candidates):
        asked.extend(candidates)
        return [
            Mixture(weights, -sum(abs(a - b) for a, b in zip(weights, best, strict=True)), 0.0)
            for weights in candidates
        ]

    found, tried = tune_weights(measure, 4, [2.0, 1.0, 0.5], max_rounds=5)
    assert found.weights == best
    assert [mixture.weights for mixture in tried] == asked and len(set(asked)) == len(asked), "nothing is asked twice"
    assert asked[:4] == [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert {weights[0] for weights in asked[4:-1]} == {1.0} and asked[-1] == (0.0, 2.0, 0.0, 0.5)
    assert {(1.0, 0.0, 0.0, 0.5), (1.0, 2.0, 0.0, 0.0)} <= set(asked), "the best without each member"


def test_a_member_that_does_not_help_ends_at_zero():
    found, _ = tune_weights(lambda candidates: [Mixture(each, 0.5, 0.5) for each in candidates], 3, [1.0, 0.1], 3)
    assert found.weights == (1.0, 0.0, 0.0)
