"""Metrics of lists equal the numbers of RecTools and of naive loops, and their intervals cover the truth."""

import importlib.metadata
import math

import numpy as np
import pytest
import torch

from hf_ilora import TrainingFacts, beyond_accuracy
from hf_ilora.data.columns import read_column
from hf_ilora.evaluation.list_properties import (
    coverage,
    decile_shares,
    diversity,
    gini,
    novelty,
    recommendation_times,
    serendipity,
)
from hf_ilora.evaluation.rank_metrics import metric_per_user
from tests.synthetic import cyclic_sequences

# Four users and eight items. Item 1 occurs twice for one training user; 6, 7 and 8 never; a list is short, and a user
# has three relevant items.
RECOMMENDED = np.array([[1, 2, 3], [4, 1, 6], [7, 5, 0], [2, 3, 4]])
RELEVANT = np.array([[1, 0, 0], [6, 1, 2], [5, 0, 0], [7, 6, 0]])
TRAIN = [[2, 1, 1, 3], [1, 2], [1, 2, 3, 4], [1, 5, 5]]
VECTORS = np.array([[0, 0], [1, 0], [0, 1], [0.6, 0.8], [-1, 0], [0.8, -0.6], [0, -1], [0.28, 0.96], [1, 0]])
COUNTS = np.bincount(np.concatenate(TRAIN), minlength=9)
USERS = np.bincount(np.concatenate([np.unique(items) for items in TRAIN]), minlength=9)

# What RecTools 0.19.0 computes for the above, by `numbers_of_rectools`. It is no dependency, because it asks for an
# older numpy; `pip install --no-deps rectools typeguard` suffices here.
NUMBERS_OF_RECTOOLS = {
    "precision@3": [1 / 3, 2 / 3, 1 / 3, 0.0],
    "recall@3": [1.0, 0.6666666666666666, 1.0, 0.0],
    "map@3": [1.0, 0.38888888888888884, 0.5, 0.0],
    "ndcg@3": [1.0, 0.5307212739772434, 0.6309297535714574, 0.0],
    "hit_ratio@3": [1.0, 1.0, 1.0, 0.0],
    "mrr@3": [1.0, 0.5, 0.5, 0.0],
    "coverage": [0.875],
    "novelty": [0.4716791664262813, 1.3333333333333333, 2.0, 1.138345833092948],
    "diversity": [0.5333333333333333, 1.3333333333333333, 1.352, 0.9333333333333332],
    "serendipity": [0.0, 0.25, 0.0625, 0.0],
}


def numbers_of_rectools() -> dict[str, list[float]]:
    """The same metrics by RecTools itself, user by user."""
    import pandas as pd
    from rectools.metrics import (
        MAP,
        MRR,
        NDCG,
        CatalogCoverage,
        HitRate,
        IntraListDiversity,
        MeanInvUserFreq,
        PairwiseDistanceCalculator,
        Precision,
        Recall,
        Serendipity,
    )

    class Cosine(PairwiseDistanceCalculator):
        def _get_distances_for_item_pairs(self, items_0, items_1):
            return 1 - (VECTORS[np.asarray(items_0, int)] * VECTORS[np.asarray(items_1, int)]).sum(axis=1)

    def table(rows):
        return pd.DataFrame(rows, columns=["user_id", "item_id"])

    lists = [(user, item, rank) for user, row in enumerate(RECOMMENDED) for rank, item in enumerate(row, 1) if item]
    reco = pd.DataFrame(lists, columns=["user_id", "item_id", "rank"])
    relevant = table([(user, item) for user, row in enumerate(RELEVANT) for item in row if item])
    train = table([(user, item) for user, row in enumerate(TRAIN) for item in row])
    catalogue = range(1, len(COUNTS))
    accuracy = {
        "precision@3": Precision(k=3),
        "recall@3": Recall(k=3),
        "map@3": MAP(k=3),
        "ndcg@3": NDCG(k=3, divide_by_achievable=True),
        "hit_ratio@3": HitRate(k=3),
        "mrr@3": MRR(k=3),
    }
    return {name: metric.calc_per_user(reco, relevant).tolist() for name, metric in accuracy.items()} | {
        "coverage": [CatalogCoverage(k=3, normalize=True).calc(reco, catalogue)],
        "novelty": MeanInvUserFreq(k=3).calc_per_user(reco, train).tolist(),
        "diversity": IntraListDiversity(k=3, distance_calculator=Cosine()).calc_per_user(reco).tolist(),
        "serendipity": Serendipity(k=3).calc_per_user(reco, relevant, train, catalogue).tolist(),
    }


def test_metrics_are_those_of_rectools():
    # The rank of an item that is not in the list does not matter, as long as it lies behind the list.
    ranks = np.array([[1, 0, 0], [3, 2, 9], [2, 0, 0], [8, 9, 0]])
    for user, row in enumerate(RELEVANT):
        listed = {item: rank for rank, item in enumerate(RECOMMENDED[user], 1)}
        assert all(rank == listed.get(item, rank) for rank, item in zip(ranks[user], row, strict=True) if item)
    found = {name: metric_per_user(name, torch.tensor(ranks)) for name in NUMBERS_OF_RECTOOLS if "@" in name}
    found |= {
        "coverage": [coverage(recommendation_times(RECOMMENDED, 8))],
        "novelty": novelty(RECOMMENDED, USERS, len(TRAIN)),
        "diversity": diversity(RECOMMENDED, VECTORS),
        "serendipity": serendipity(RECOMMENDED, RELEVANT, COUNTS),
    }
    for name, expected in NUMBERS_OF_RECTOOLS.items():
        assert list(found[name]) == pytest.approx(expected), name


@pytest.mark.slow
def test_the_numbers_above_are_what_rectools_computes():
    pytest.importorskip("rectools.metrics", reason="RecTools is not installed")
    assert importlib.metadata.version("rectools") == "0.19.0"
    numbers = numbers_of_rectools()
    assert numbers.keys() == NUMBERS_OF_RECTOOLS.keys()
    for name, expected in NUMBERS_OF_RECTOOLS.items():
        assert numbers[name] == pytest.approx(expected), name


def test_deciles_are_tenths_of_the_catalogue_whatever_the_order_of_ids():
    counts = np.append(0, np.arange(20, 0, -1))  # items 1 and 2 are the most popular tenth
    shares = decile_shares(np.array([[1, 2], [1, 20], [5, 0]]), counts)
    assert shares[0].tolist() == [1] + [0] * 9
    assert shares[1].tolist() == [0.5, *[0] * 8, 0.5]
    assert shares[2].tolist() == [0, 0, 1] + [0] * 7  # padding is ignored
    # Five items: each fills two deciles. The three in the middle have one count and share six deciles.
    shares = decile_shares(np.array([[1], [2], [3], [4], [5]]), np.array([0, 9, 4, 4, 4, 1]))
    assert shares[0] == pytest.approx([0.5, 0.5, *[0] * 8])
    for of_equal in shares[1:4]:
        assert of_equal == pytest.approx([0, 0, *[1 / 6] * 6, 0, 0])
    # Lists of all items have a tenth in each decile.
    generator = np.random.default_rng(0)
    counts = np.append(0, generator.integers(0, 5, size=37))
    shares = decile_shares(np.arange(1, 38)[None], counts)
    assert shares[0] == pytest.approx([0.1] * 10)


def test_gini_is_half_the_relative_mean_difference():
    times = np.random.default_rng(0).integers(0, 9, size=17)
    naive = np.abs(times[:, None] - times).mean() / (2 * times.mean())
    assert gini(times) == pytest.approx(naive)
    assert gini(np.full(5, 3)) == 0
    assert gini(np.array([0, 0, 0, 7])) == pytest.approx(3 / 4)
    several = np.stack([times, np.roll(times, 3), np.full(17, 2)], axis=1)
    assert gini(several) == pytest.approx([naive, naive, 0])


def test_diversity_compares_all_pairs_and_ignores_lengths():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(30, 6))
    lists = np.stack([generator.permutation(np.arange(1, 30))[:5] for _ in range(8)])
    lists[3, 2:], lists[4, 1:] = 0, 0
    for items, found in zip(lists, diversity(lists, vectors * generator.uniform(1, 9, size=(30, 1))), strict=True):
        items = items[items > 0]
        unit = vectors[items] / np.linalg.norm(vectors[items], axis=1, keepdims=True)
        pairs = [1 - unit[a] @ unit[b] for a in range(len(items)) for b in range(a)]
        assert found == pytest.approx(np.mean(pairs) if pairs else 0)


def test_facts_count_each_user_of_an_item_once():
    sequences = cyclic_sequences(num_users=30, num_items=40, length=40)
    facts = TrainingFacts.of(sequences)
    seen = [{*row["history"], row["target"]} for row in sequences["train"]]
    assert facts.num_users == 30
    assert facts.users.tolist() == [sum(item in items for items in seen) for item in range(41)]
    assert (facts.users < facts.counts).any()  # users walk around the items more than once
    with pytest.raises(ValueError, match=r"title_vectors have shape \(9, 2\): expected \(41, size\)"):
        TrainingFacts.of(sequences, np.ones((9, 2)))


def test_a_user_with_several_training_rows_is_one_user():
    sequences = cyclic_sequences(num_users=40, protocol="temporal_users")
    rows = read_column(sequences["train"], "user_id").to_pylist()
    facts = TrainingFacts.of(sequences)
    assert facts.num_users == len(set(rows)) < len(rows)
    assert facts.users.max() <= facts.num_users


def facts(vectors=None):
    return TrainingFacts(COUNTS, USERS, len(TRAIN), vectors)


def test_means_are_over_the_users_who_have_a_list():
    lists, relevant = np.vstack([RECOMMENDED, [[0, 0, 0]]]), np.vstack([RELEVANT, [[1, 0, 0]]])
    found = beyond_accuracy(lists, facts(VECTORS), relevant, num_resamples=50)
    expected = {
        name: np.mean(NUMBERS_OF_RECTOOLS[name]) for name in ("coverage", "novelty", "diversity", "serendipity")
    }
    assert {name: found[f"{name}@3"].mean for name in expected} == pytest.approx(expected)
    assert sum(found[f"decile_{decile}@3"].mean for decile in range(1, 11)) == pytest.approx(1)
    assert all(each.low <= each.mean <= each.high for each in found.values())
    without = beyond_accuracy(torch.tensor(lists), facts(), relevant, num_resamples=50)
    assert "diversity@3" not in without
    assert without == {name: interval for name, interval in found.items() if name != "diversity@3"}


def many_lists(num_users, seed=0, num_items=60):
    """Lists of users of one population: three different items, popular ones more often."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, num_items + 1)
    keys = np.log(shares) + generator.gumbel(size=(num_users, num_items))
    return np.argsort(-keys, axis=1)[:, :3] + 1


def test_intervals_of_means_equal_a_naive_bootstrap_of_users():
    lists = many_lists(200)
    counts = np.append(0, np.arange(60, 0, -1))
    of_items = TrainingFacts(counts, counts, 60)
    found = beyond_accuracy(lists, of_items, lists[:, :1], num_resamples=1_500)["novelty@3"]
    values = novelty(lists, counts, 60)
    generator = np.random.default_rng(1)
    means = [values[generator.integers(0, 200, size=200)].mean() for _ in range(1_500)]
    width = found.high - found.low
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.1 * width)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.1 * width)


def test_intervals_of_the_catalogue_cover_what_other_users_of_the_population_have():
    """Plain percentiles would not: resamples repeat users, so all of them cover fewer items."""
    counts = np.append(0, np.arange(60, 0, -1))
    of_items = TrainingFacts(counts, counts, 60)
    others = np.array([recommendation_times(many_lists(40, seed), 60) for seed in range(1_000, 1_400)]).T
    truth = {"coverage@3": coverage(others).mean(), "gini@3": gini(others).mean()}
    covered = dict.fromkeys(truth, 0)
    for seed in range(40):
        lists = many_lists(40, seed)
        found = beyond_accuracy(lists, of_items, lists[:, 0], num_resamples=200, seed=seed)
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
    assert min(covered.values()) >= 32, covered


def test_parts_of_the_work_give_what_one_part_gives(monkeypatch):
    expected = beyond_accuracy(RECOMMENDED, facts(VECTORS), RELEVANT, num_resamples=40)
    monkeypatch.setattr("hf_ilora.evaluation.beyond_accuracy._MAX_NUMBERS", 20)
    found = beyond_accuracy(RECOMMENDED, facts(VECTORS), RELEVANT, num_resamples=40)
    for name, interval in expected.items():
        assert vars(found[name]) == pytest.approx(vars(interval)), name
    assert beyond_accuracy(RECOMMENDED, facts(VECTORS), RELEVANT, num_resamples=40, seed=1) != expected


def test_novelty_of_an_unseen_item_is_that_of_one_user():
    assert novelty(np.array([[8, 0]]), USERS, 4).tolist() == [2]
    assert novelty(np.array([[1, 0]]), USERS, 4).tolist() == [0]
    assert novelty(np.array([[2, 0]]), USERS, 4).tolist() == pytest.approx([-math.log2(3 / 4)])


@pytest.mark.parametrize(
    ("recommended", "relevant", "message"),
    [
        ([[1, 9]], [1], r"recommended has values that are no item ids: expected integers, 1\.\.8"),
        ([[1.0, 2.0]], [1], "recommended has values that are no item ids"),
        ([[1, 2]], [-1], "relevant has values that are no item ids"),
        ([[1, 2]], [1, 2], "relevant has 2 users: expected 1, as recommended has"),
        ([1, 2], [1, 2], r"recommended has shape \(2,\)"),
        ([[0, 0]], [1], "recommended has no items"),
        ([[1, 2], [3, 3]], [1, 1], "recommended has an item twice in a list"),
    ],
)
def test_invalid_lists_are_refused(recommended, relevant, message):
    with pytest.raises(ValueError, match=message):
        beyond_accuracy(np.array(recommended), facts(), np.array(relevant))
