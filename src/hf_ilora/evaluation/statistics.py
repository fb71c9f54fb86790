"""Computes intervals of means over users, and tests whether two models differ on the same users."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import SplitRanks
from hf_ilora.evaluation.saved_ranks import SavedRanks

# Random numbers generated at a time: 32 MB.
_MAX_RANDOM_NUMBERS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over users with its interval.

    Args:
        mean: mean over the measured users.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class RunComparison:
    """Two models compared on the same users.

    Args:
        mean_a: mean of the first model.
        mean_b: mean of the second model.
        difference: mean over users of b - a, with its bootstrap interval.
        p_value: two-sided, under the hypothesis that the models are exchangeable for every user.
        num_users: number of users.
    """

    mean_a: float
    mean_b: float
    difference: Interval
    p_value: float
    num_users: int


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean over users.

    The mean of a resample depends only on how often it contains each different value, and these counts are multinomial.
    Ranking metrics have few different values, so sampling the counts is the same bootstrap at a fraction of the cost.

    Args:
        values: (users,) one number per user.
        confidence: fraction of the resampled means inside the interval, between 0 and 1.
        num_resamples: number of resamples, at least 1.
        seed: random seed of the resampling; equal seeds give equal intervals.

    Returns:
        The mean of `values` and the ends of the interval.

    Raises:
        ValueError: for no users, values that are not finite, and settings out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    values = _checked("values", values)
    _check_confidence(confidence)
    _check_num_resamples(num_resamples)
    different, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for part in _parts(num_resamples, len(different)):
        drawn = generator.multinomial(len(values), counts / len(values), size=part.stop - part.start)
        means[part] = drawn @ different / len(values)  # (resamples,)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def wilson_interval(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval, whose width is positive even if all or none succeed.

    Args:
        num_successes: at most `num_trials`.
        num_trials: at least 1.
        confidence: between 0 and 1.

    Raises:
        ValueError: for numbers out of range.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (JASA 1927).
    """
    if not 0 <= num_successes <= num_trials or not num_trials:
        raise ValueError(f"{num_successes} successes of {num_trials}: expected 0 <= successes <= trials, trials >= 1")
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    proportion, shrinkage = num_successes / num_trials, 1 + z * z / num_trials
    centre = (proportion + z * z / (2 * num_trials)) / shrinkage
    half = z / shrinkage * math.sqrt(proportion * (1 - proportion) / num_trials + (z / (2 * num_trials)) ** 2)
    # At 0 and 1 the formula gives the proportion itself, up to rounding.
    return Interval(proportion, min(proportion, max(0.0, centre - half)), max(proportion, min(1.0, centre + half)))


def summarize_ranks(
    ranks: SplitRanks, k: int = 10, *, num_resamples: int = 2_000, seed: int = 0
) -> dict[str, Interval]:
    """The metrics of a split, each with its 95% interval over users.

    Args:
        ranks: ranks of all users.
        k: cut-off, at least 1.
        num_resamples: bootstrap resamples of each interval.
        seed: random seed of each interval.

    Returns:
        An interval for each name "ranking/metric": ndcg@k, hit_ratio@k, recall@k, precision@k, map@k and mrr for the
        rankings "masked" and "unmasked" of the target, and for "relevant" where users have several relevant items; and
        "candidates/hit_ratio@1" if there are ranks among candidates. With one relevant item per user, recall@k equals
        hit_ratio@k.

    Raises:
        ValueError: for `k` < 1.
    """
    metrics = (*(f"{name}@{k}" for name in ("ndcg", "hit_ratio", "recall", "precision", "map")), "mrr")
    names = dict.fromkeys(("masked", "unmasked", "relevant"), metrics) | {"candidates": ("hit_ratio@1",)}
    return {
        f"{ranking}/{name}": bootstrap_interval(
            metric_per_user(name, torch.from_numpy(vars(ranks)[ranking])).numpy(),
            num_resamples=num_resamples,
            seed=seed,
        )
        for ranking in names
        if vars(ranks)[ranking] is not None
        for name in names[ranking]
    }


# The lowest and the highest value of each group.
Groups = Mapping[str, tuple[float, float]]
COUNT_GROUPS: Groups = {"0": (0, 0), "1-5": (1, 5), "6-10": (6, 10), "11-20": (11, 20), "more": (21, math.inf)}
LENGTH_GROUPS: Groups = {
    **{"1-5": (1, 5), "6-10": (6, 10), "11-20": (11, 20), "21-50": (21, 50), "51-100": (51, 100)},
    "more": (101, math.inf),
}


def summarize_by_count(
    ranks: SplitRanks, counts: np.ndarray, k: int = 10, *, num_resamples: int = 2_000, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """The metrics by how often the target occurs in training, each with its 95% interval over users.

    If users have several relevant items, a group judges each user by those of them that belong to the group; the other
    relevant items stay in the ranking like any item, and users without an item of the group are left out.

    Args:
        ranks: ranks of all users.
        counts: (users,) occurrences of each user's target in training; with several relevant items, (users, relevant)
            occurrences of each of them.
        k: cut-off, at least 1.
        num_resamples: bootstrap resamples of each interval.
        seed: random seed of each interval.

    Returns:
        For each of `COUNT_GROUPS` that has users, intervals of ndcg@k and hit_ratio@k of the ranking `ranks.main`, and
        of recall@k if that is "relevant". The group "0" also has "new_items/ndcg@k" and "new_items/hit_ratio@k" if
        there are ranks among the new items.

    Raises:
        ValueError: for `k` < 1, and counts whose shape is not that of the ranks.
    """
    main = vars(ranks)[ranks.main]
    if counts.shape != main.shape:
        raise ValueError(f"counts have shape {counts.shape}: expected {main.shape}, one for each rank")
    groups = {}
    for group, (lowest, highest) in COUNT_GROUPS.items():
        of_group = np.where((counts >= lowest) & (counts <= highest), main, 0)
        rankings = {ranks.main: of_group[of_group.reshape(len(main), -1).any(axis=1)]}
        if not len(rankings[ranks.main]):
            continue
        if group == "0" and ranks.new_items is not None and ranks.main == "masked":
            rankings["new_items"] = ranks.new_items[counts == 0]
        groups[group] = _group_metrics(rankings, k, num_resamples, seed)
    return groups


def summarize_by_length(
    ranks: SplitRanks, lengths: np.ndarray, k: int = 10, *, num_resamples: int = 2_000, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """The metrics by the length of the user's history, each with its 95% interval over users.

    Args:
        ranks: ranks of all users.
        lengths: (users,) items in each history.
        k, num_resamples, seed: as in `summarize_by_count`.

    Returns:
        For each of `LENGTH_GROUPS` that has users, intervals of ndcg@k and hit_ratio@k of the ranking `ranks.main`, and
        of recall@k if that is "relevant".

    Raises:
        ValueError: for `k` < 1, and another number of lengths than users.
    """
    main = vars(ranks)[ranks.main]
    if lengths.shape != main.shape[:1]:
        raise ValueError(f"lengths have shape {lengths.shape}: expected {main.shape[:1]}, one for each user")
    return {
        group: _group_metrics({ranks.main: main[rows]}, k, num_resamples, seed)
        for group, rows in rows_by_group(lengths, LENGTH_GROUPS).items()
    }


def _group_metrics(rankings: dict[str, np.ndarray], k: int, num_resamples: int, seed: int) -> dict[str, Interval]:
    """The metrics of a group of users for each ranking, whose ranks are (users,) or (users, relevant)."""
    return {
        f"{ranking}/{name}": bootstrap_interval(
            metric_per_user(name, torch.from_numpy(values)).numpy(), num_resamples=num_resamples, seed=seed
        )
        for ranking, values in rankings.items()
        for name in (f"ndcg@{k}", f"hit_ratio@{k}", *([f"recall@{k}"] if ranking == "relevant" else []))
    }


def users_by_group(values: np.ndarray, groups: Groups) -> dict[str, int]:
    """The number of users in each group that has any; for the arguments, see `rows_by_group`."""
    return {group: int(rows.sum()) for group, rows in rows_by_group(values, groups).items()}


def rows_by_group(values: np.ndarray, groups: Groups) -> dict[str, np.ndarray]:
    """(users,) bool for each group that has users.

    Args:
        values: (users,), such as counts of targets or lengths of histories; or (users, any), of which one value in the
            range of a group is enough.
        groups: the lowest and the highest value of each group, such as `COUNT_GROUPS` and `LENGTH_GROUPS`.
    """
    values = values.reshape(len(values), -1)
    rows_of = {
        group: np.any((values >= lowest) & (values <= highest), axis=1) for group, (lowest, highest) in groups.items()
    }
    return {group: rows for group, rows in rows_of.items() if rows.any()}


def sign_flip_p_value(differences: np.ndarray, *, num_resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference: how often random signs give a mean at least as far from zero.

    The observed signs count as one of the resamples, so the p-value is at least 1 / (num_resamples + 1).

    Args:
        differences: (users,) paired differences.
        num_resamples: number of random sign assignments, at least 1.
        seed: random seed of the signs; equal seeds give equal values.

    Returns:
        p-value in (0, 1]; 1 when no user differs.

    Raises:
        ValueError: for no users, differences that are not finite, and `num_resamples` < 1.

    Source: Fisher's randomisation test; Smucker et al., CIKM 2007, for ranking metrics.
    """
    differences = _checked("differences", differences)
    _check_num_resamples(num_resamples)
    # Among users with the same absolute difference, only the number of plus signs matters.
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    observed = abs(differences.sum())
    generator = np.random.default_rng(seed)
    as_extreme = 0
    for part in _parts(num_resamples, len(sizes)):
        plus = generator.binomial(counts, 0.5, size=(part.stop - part.start, len(sizes)))
        sums = (2 * plus - counts) @ sizes  # (resamples,)
        # Sums in another order differ in the last digits; equal sums must count.
        as_extreme += int((np.abs(sums) >= observed * (1 - 1e-12)).sum())
    return (as_extreme + 1) / (num_resamples + 1)


# The metric of each user, (users,), or of each run and user, (runs, users); or the saved ranks of a run, or of several.
Runs = np.ndarray | Sequence | str | os.PathLike


def compare_runs(
    a: Runs,
    b: Runs,
    *,
    metric: str = "ndcg@10",
    ranking: str = "masked",
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> RunComparison:
    """Compare two runs user by user, or two models by several runs of each.

    The metric of a user is first averaged over the runs of a model. The interval and the p-value therefore describe the
    variation between users, for the given runs; the two models may have different numbers of runs.

    Args:
        a: (users,) metric of each user, or the path of the ranks that ``hf-ilora evaluate`` saved; of several runs of
            one model, such as those of several seeds, (runs, users), or a list of paths.
        b: the same for the other model, with the users in the same order.
        metric: for saved ranks, the metric to compare, such as "ndcg@10", "hit_ratio@10" or "mrr".
        ranking: for saved ranks, "masked", "unmasked" or "candidates"; "relevant" judges users by all of their relevant
            items, and "new_items" compares the users whose target is a new item.
        confidence: confidence level of the interval of the difference.
        num_resamples: resamples of the bootstrap and of the p-value.
        seed: random seed of the bootstrap and of the p-value.

    Returns:
        The means, the difference b - a with its interval, and the p-value.

    Raises:
        ValueError: for no runs, different users, data or splits, values that are not finite, an array compared with a
            path, and settings out of range.
    """
    paths_a, paths_b = _paths("a", a), _paths("b", b)
    if (paths_a is None) != (paths_b is None):
        raise ValueError("one run is an array and the other a path: expected two arrays or two paths")
    if paths_a is not None and paths_b is not None:
        loaded = [[SavedRanks.load(path) for path in paths] for paths in (paths_a, paths_b)]
        for run in (*loaded[0], *loaded[1]):
            loaded[0][0].check_same_users(run)
        a, b = (
            np.stack([metric_per_user(metric, torch.tensor(ranks)).numpy() for ranks in each])
            for each in ([run.ranks_of_ranked_users(ranking) for run in runs] for runs in loaded)
        )
    a, b = _mean_of_runs("a", a), _mean_of_runs("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} users and b has {len(b)}: expected the same users in the same order")
    differences = b - a
    return RunComparison(
        mean_a=float(a.mean()),
        mean_b=float(b.mean()),
        difference=bootstrap_interval(differences, confidence=confidence, num_resamples=num_resamples, seed=seed),
        p_value=sign_flip_p_value(differences, num_resamples=num_resamples, seed=seed),
        num_users=len(a),
    )


def _paths(name: str, runs: Runs) -> list[str | os.PathLike] | None:
    """The files of saved ranks that `runs` names; None for numbers."""
    if isinstance(runs, str | os.PathLike):
        return [runs]
    if isinstance(runs, np.ndarray):
        return None
    are_paths = [isinstance(run, str | os.PathLike) for run in runs]
    if any(are_paths) and not all(are_paths):
        raise ValueError(f"{name} has paths beside numbers: expected the paths of all runs, or the numbers of all")
    return list(runs) if any(are_paths) else None


def _mean_of_runs(name: str, values: Any) -> np.ndarray:
    """(users,) the mean over runs of values (runs, users); values (users,) are returned as they are."""
    try:
        values = np.asarray(values, dtype=np.float64)
    except ValueError as error:  # ragged
        raise ValueError(
            f"the runs of {name} have different numbers of users: expected the same users in all"
        ) from error
    if values.ndim != 2:
        return _checked(name, values)
    if not len(values):
        raise ValueError(f"{name} has no runs: expected at least one")
    return np.mean([_checked(f"{name}[{number}]", run) for number, run in enumerate(values)], axis=0)


def _checked(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}: expected (users,), one number for at least one user")
    if not np.isfinite(values).all():
        user = int((~np.isfinite(values)).argmax())
        raise ValueError(f"{name}[{user}] is {values[user]}: expected finite numbers")
    return values


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: expected a number between 0 and 1, such as 0.95")


def _check_num_resamples(num_resamples: int) -> None:
    if num_resamples < 1:
        raise ValueError(
            f"num_resamples is {num_resamples}: expected at least 1; use 1,000 or more for a stable interval"
        )


def _parts(num_resamples: int, num_different: int) -> Iterator[slice]:
    """Slices of the resamples, so short that resamples x different values fit in memory."""
    step = max(1, _MAX_RANDOM_NUMBERS // num_different)
    for start in range(0, num_resamples, step):
        yield slice(start, min(start + step, num_resamples))
