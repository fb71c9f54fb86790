"""Intervals and paired comparisons equal naive resampling, and controls without a difference find none."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from hf_ilora import compare_runs
from hf_ilora.evaluation.ranking import SplitRanks
from hf_ilora.evaluation.saved_ranks import SavedRanks
from hf_ilora.evaluation.statistics import (
    COUNT_GROUPS,
    LENGTH_GROUPS,
    bootstrap_interval,
    sign_flip_p_value,
    summarize_by_count,
    summarize_by_length,
    summarize_ranks,
    users_by_group,
    wilson_interval,
)
from tests.evaluation.small_ranks import OTHER_RANKS, RANKS, saved


def metric_values(seed=0, num_users=400):
    ranks = np.random.default_rng(seed).integers(1, 40, size=num_users)
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)


def test_interval_equals_a_naive_bootstrap_of_users():
    values = metric_values()
    generator = np.random.default_rng(1)
    means = [values[generator.integers(0, len(values), size=len(values))].mean() for _ in range(4_000)]
    interval = bootstrap_interval(values, num_resamples=4_000)
    assert interval.mean == pytest.approx(values.mean())
    width = interval.high - interval.low
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.05 * width)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=0.05 * width)
    narrower = bootstrap_interval(values, confidence=0.5, num_resamples=4_000)
    assert interval.low < narrower.low < interval.mean < narrower.high < interval.high


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).random(300) < 0.2
        interval = bootstrap_interval(values, num_resamples=500, seed=seed)
        covered += interval.low <= 0.2 <= interval.high
    assert 180 <= covered <= 199


def test_interval_depends_on_the_seed_alone():
    values = metric_values()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    shuffled = np.random.default_rng(0).permutation(values)
    assert bootstrap_interval(shuffled, seed=3).low == bootstrap_interval(values, seed=3).low


def test_parts_of_the_resamples_give_what_one_part_gives(monkeypatch):
    values = metric_values()
    expected = bootstrap_interval(values), sign_flip_p_value(values - values.mean())
    monkeypatch.setattr("hf_ilora.evaluation.statistics._MAX_RANDOM_NUMBERS", 1_000)
    assert (bootstrap_interval(values), sign_flip_p_value(values - values.mean())) == expected


def test_equal_values_have_no_spread():
    interval = bootstrap_interval(np.full(10, 0.25))
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_p_value_equals_all_sign_flips_of_a_small_sample():
    differences = np.array([0.5, 0.3, 0.3, -0.1, 0.0, 0.2, 0.2, -0.3])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=len(differences))]
    exact = np.mean(np.array(sums) >= differences.sum() - 1e-12)
    assert sign_flip_p_value(differences, num_resamples=200_000) == pytest.approx(exact, abs=0.005)
    assert sign_flip_p_value(-differences) == sign_flip_p_value(differences)


def test_p_values_of_exchangeable_runs_are_uniform():
    p_values = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        a, b = generator.random((2, 200)) < 0.3
        p_values.append(sign_flip_p_value(b * 1.0 - a, num_resamples=400, seed=seed))
    assert np.mean(np.array(p_values) < 0.05) < 0.1
    assert 0.4 < np.mean(p_values) < 0.65


def test_wilson_interval_is_that_of_the_literature_and_has_a_width_at_the_ends():
    # Newcombe (Statistics in Medicine 1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), ends in published.items():
        interval = wilson_interval(successes, trials)
        assert (interval.low, interval.high) == pytest.approx(ends, abs=5e-5)
        assert interval.mean == successes / trials
    everyone = wilson_interval(95, 95)
    assert everyone.high == 1 and everyone.low < 0.97
    resampled = bootstrap_interval(np.ones(95))
    assert resampled.low == resampled.high  # what Wilson's avoids
    for wrong in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= trials"):
            wilson_interval(*wrong)
    with pytest.raises(ValueError, match="confidence is 1"):
        wilson_interval(1, 2, confidence=1)


def test_a_better_run_is_found_and_the_same_run_is_not():
    a = metric_values()
    same = compare_runs(a, a)
    assert same.p_value == 1.0
    assert (same.difference.mean, same.difference.low, same.difference.high) == (0, 0, 0)
    b = np.minimum(a + 0.05, 1)
    better = compare_runs(a, b)
    assert better.mean_a == pytest.approx(a.mean()) and better.mean_b == pytest.approx(b.mean())
    assert better.difference.mean == pytest.approx((b - a).mean())
    assert 0 < better.difference.low <= better.difference.mean <= better.difference.high
    assert better.p_value == pytest.approx(1 / 10_001)
    assert better.num_users == len(a)
    assert compare_runs(b, a).difference.mean == pytest.approx(-better.difference.mean)
    # Negative control: the same values with users mixed up differ no more than by chance.
    assert compare_runs(a, np.random.default_rng(1).permutation(a)).p_value > 0.05


def test_pairing_finds_what_two_intervals_hide():
    a = metric_values()
    b = a.copy()
    b[np.flatnonzero(a == 0)[:30]] += 0.3
    first, second = bootstrap_interval(a), bootstrap_interval(b)
    assert first.high > second.low  # the intervals overlap
    assert compare_runs(a, b).p_value < 0.001


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="a has 3 users and b has 2: expected the same users"):
        compare_runs([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"a has shape \(0,\)"):
        compare_runs([], [])
    with pytest.raises(ValueError, match=r"b\[1\] is nan"):
        compare_runs([1, 2], [1, np.nan])
    with pytest.raises(ValueError, match="one run is an array and the other a path"):
        compare_runs([1, 2], "ranks.parquet")
    with pytest.raises(ValueError, match="confidence is 95"):
        bootstrap_interval([1, 2], confidence=95)
    with pytest.raises(ValueError, match="num_resamples is 0"):
        bootstrap_interval([1, 2], num_resamples=0)
    with pytest.raises(ValueError, match="num_resamples is 0"):
        sign_flip_p_value([1, 2], num_resamples=0)


def test_saved_runs_compare_by_metric_and_ranking(tmp_path):
    a, b = saved(tmp_path / "a.parquet"), saved(tmp_path / "b.parquet", OTHER_RANKS)
    comparison = compare_runs(a, str(b), metric="hit_ratio@1")
    assert (comparison.mean_a, comparison.mean_b) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    comparison = compare_runs(a, b, metric="mrr", ranking="unmasked")
    assert comparison.mean_a == pytest.approx((1 / 2 + 1 / 4 + 1 / 40) / 3)
    assert comparison.mean_b == 1
    with pytest.raises(ValueError, match="metric 'ndcg' is unknown"):
        compare_runs(a, b, metric="ndcg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_ids": ("u", "v", "z")}, "different users or orders: m has 3, other has 3, 2 in common"),
        ({"user_ids": ("v", "u", "w")}, "different users or orders"),
        ({"fingerprint": "g"}, "differ in data_fingerprint: m has f, other has g"),
        ({"split": "validation"}, "differ in split: m has test, other has validation"),
    ],
)
def test_saved_runs_of_other_users_do_not_compare(tmp_path, change, message):
    a, b = saved(tmp_path / "a.parquet"), saved(tmp_path / "b.parquet", model="other", **change)
    with pytest.raises(ValueError, match=message):
        compare_runs(a, b)


def test_ranks_among_new_items_are_saved_and_compare_the_users_who_have_them(tmp_path):
    new_items = [dataclasses.replace(RANKS, new_items=np.array(values)) for values in ([0, 1, 4], [0, 2, 1])]
    a, b = (saved(tmp_path / f"{name}.parquet", ranks) for name, ranks in zip("ab", new_items, strict=True))
    assert SavedRanks.load(a).ranks("new_items").tolist() == [0, 1, 4]
    comparison = compare_runs(a, b, metric="mrr", ranking="new_items")
    assert (comparison.mean_a, comparison.mean_b, comparison.num_users) == (0.625, 0.75, 2)
    without = dataclasses.replace(new_items[0], candidates=None)
    assert SavedRanks.load(saved(tmp_path / "c.parquet", without)).ranks("new_items").tolist() == [0, 1, 4]
    with pytest.raises(ValueError, match="data without new items: expected ranking masked or unmasked"):
        SavedRanks.load(saved(tmp_path / "d.parquet")).ranks("new_items")


def test_targets_are_grouped_by_their_counts():
    ranks = SplitRanks(np.array([1, 20, 3, 1, 9]), np.full(5, 50), new_items=np.array([1, 0, 0, 2, 0]))
    counts = np.array([0, 5, 20, 0, 1000])
    groups = summarize_by_count(ranks, counts, 10, num_resamples=20)
    assert users_by_group(counts, COUNT_GROUPS) == {"0": 2, "1-5": 1, "11-20": 1, "more": 1}
    assert list(groups) == list(users_by_group(counts, COUNT_GROUPS))
    assert groups["1-5"]["masked/hit_ratio@10"].mean == 0 and groups["11-20"]["masked/ndcg@10"].mean == 0.5
    assert groups["0"]["masked/ndcg@10"].mean == 1
    assert groups["0"]["new_items/ndcg@10"].mean == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert not any(name.startswith("new_items/") for group in list(groups)[1:] for name in groups[group])
    with pytest.raises(ValueError, match=r"counts have shape \(2,\): expected \(5,\)"):
        summarize_by_count(ranks, counts[:2])


def test_summary_names_every_ranking_and_metric():
    summary = summarize_ranks(RANKS, k=3)
    assert {name: interval.mean for name, interval in summary.items()} == pytest.approx(
        {
            "masked/ndcg@3": (1 + 1 / np.log2(3)) / 3,
            "masked/hit_ratio@3": 2 / 3,
            "masked/recall@3": 2 / 3,
            "masked/precision@3": 2 / 9,
            "masked/map@3": (1 + 1 / 2) / 3,
            "masked/mrr": (1 + 1 / 2 + 1 / 30) / 3,
            "unmasked/ndcg@3": (1 / np.log2(3)) / 3,
            "unmasked/hit_ratio@3": 1 / 3,
            "unmasked/recall@3": 1 / 3,
            "unmasked/precision@3": 1 / 9,
            "unmasked/map@3": 1 / 2 / 3,
            "unmasked/mrr": (1 / 2 + 1 / 4 + 1 / 40) / 3,
            "candidates/hit_ratio@1": 2 / 3,
        }
    )
    assert all(interval.low <= interval.mean <= interval.high for interval in summary.values())


SEVERAL = dataclasses.replace(RANKS, relevant=np.array([[1, 4, 0], [2, 0, 0], [30, 3, 9]]))


def test_users_with_several_relevant_items_are_judged_by_all_of_them(tmp_path):
    summary = summarize_ranks(SEVERAL, k=3, num_resamples=20)
    assert summary["relevant/recall@3"].mean == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    assert summary["relevant/map@3"].mean == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 / 3) / 3)
    assert {name: each for name, each in summary.items() if not name.startswith("relevant/")} == summarize_ranks(
        RANKS, k=3, num_resamples=20
    )
    other = dataclasses.replace(SEVERAL, relevant=np.array([[1, 2, 0], [1, 0, 0], [4, 5, 6]]))
    a, b = saved(tmp_path / "a.parquet", SEVERAL), saved(tmp_path / "b.parquet", other)
    assert SavedRanks.load(a).ranks("relevant").tolist() == SEVERAL.relevant.tolist()
    comparison = compare_runs(a, b, metric="precision@3", ranking="relevant", num_resamples=20)
    assert comparison.mean_a == pytest.approx((1 + 1 + 1) / 9) and comparison.mean_b == pytest.approx((2 + 1 + 0) / 9)
    with pytest.raises(ValueError, match="data without several relevant items per user"):
        SavedRanks.load(saved(tmp_path / "c.parquet")).ranks("relevant")


def test_items_of_a_count_judge_the_users_who_have_them_and_no_others():
    counts = np.array([[0, 7, -1], [7, -1, -1], [0, 0, 9]])  # -1: padding
    groups = summarize_by_count(SEVERAL, counts, 10, num_resamples=20)
    assert users_by_group(counts, COUNT_GROUPS) == {"0": 2, "6-10": 3}
    assert list(groups) == ["0", "6-10"]
    assert groups["0"]["relevant/recall@10"].mean == pytest.approx((1 + 1 / 2) / 2)
    assert groups["6-10"]["relevant/recall@10"].mean == pytest.approx(1)
    discount = lambda rank: 1 / math.log2(rank + 1)  # noqa: E731
    assert groups["6-10"]["relevant/ndcg@10"].mean == pytest.approx((discount(4) + discount(2) + discount(9)) / 3)


def test_users_are_grouped_by_the_lengths_of_their_histories():
    lengths = np.array([5, 6, 101])
    assert users_by_group(lengths, LENGTH_GROUPS) == {"1-5": 1, "6-10": 1, "more": 1}
    groups = summarize_by_length(RANKS, lengths, 10, num_resamples=20)
    assert {group: found["masked/ndcg@10"].mean for group, found in groups.items()} == pytest.approx(
        {"1-5": 1, "6-10": 1 / math.log2(3), "more": 0}
    )
    of_several = summarize_by_length(SEVERAL, lengths, 10, num_resamples=20)
    assert of_several["more"]["relevant/recall@10"].mean == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"lengths have shape \(2,\): expected \(3,\)"):
        summarize_by_length(RANKS, lengths[:2])


def test_several_runs_of_a_model_are_averaged_for_each_user_first(tmp_path):
    a, b = np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]]), np.array([0.5, 1.0, 0.5])
    comparison = compare_runs(a, b)
    assert comparison.difference == compare_runs([0.5, 0.5, 0.5], b).difference
    assert comparison.num_users == 3 and comparison.difference.mean == pytest.approx(0.5 / 3)
    assert compare_runs([[0.2, 0.4]], [[0.3, 0.4], [0.5, 0.4]]).mean_b == pytest.approx(0.4)

    first, second = saved(tmp_path / "1.parquet"), saved(tmp_path / "2.parquet", OTHER_RANKS)
    comparison = compare_runs([first, str(second)], first, metric="mrr")
    assert comparison.mean_a == pytest.approx(((1 + 1 / 3) / 2 + 1 / 2 + (1 / 30 + 1) / 2) / 3)
    assert comparison.mean_b == pytest.approx((1 + 1 / 2 + 1 / 30) / 3)
    # Negative control: as many runs of the same model, in another order, do not differ.
    assert compare_runs([first, second], [second, first]).p_value == 1.0


def test_runs_that_cannot_be_averaged_are_refused(tmp_path):
    path = saved(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the runs of b have different numbers of users"):
        compare_runs([1, 2], [[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"a\[1\]\[0\] is nan"):
        compare_runs([[1, 2], [np.nan, 2]], [1, 2])
    with pytest.raises(ValueError, match="a has no runs"):
        compare_runs(np.zeros((0, 2)), [1, 2])
    with pytest.raises(ValueError, match="a has paths beside numbers"):
        compare_runs([path, 0.5], path)
    with pytest.raises(ValueError, match="one run is an array and the other a path"):
        compare_runs([path, path], [[1, 2, 3]])
    with pytest.raises(ValueError, match="differ in split"):
        compare_runs([path, saved(tmp_path / "b.parquet", split="validation")], path)
