"""The split protocols, which select the slices of histories that become rows of train, validation and test."""

from dataclasses import dataclass, replace

import numpy as np

from .columns import slice_indices
from .histories import Histories


@dataclass(frozen=True)
class Rows:
    """Rows of one split: row r has the history items[starts[r] : ends[r]] and the target items[ends[r]].

    If a row has several relevant items, they are items[ends[r] : relevant_ends[r]].
    """

    users: np.ndarray  # (rows,), ascending
    starts: np.ndarray  # (rows,)
    ends: np.ndarray  # (rows,)
    relevant_ends: np.ndarray | None = None  # (rows,); None for a protocol with one target per row

    def __len__(self) -> int:
        return len(self.users)

    def filter(self, keep: np.ndarray) -> "Rows":
        """The rows where `keep`, (rows,), is True."""
        ends = None if self.relevant_ends is None else self.relevant_ends[keep]
        return Rows(self.users[keep], self.starts[keep], self.ends[keep], ends)


def split_histories(
    histories: Histories, times: np.ndarray, settings: dict
) -> tuple[dict[str, Rows], dict[str, Histories]]:
    """The rows of each split, before `limit_histories`, and the histories that they are slices of.

    Args:
        histories: the histories of all users.
        times: (interactions,) the times of their items.
        settings: as `checked_protocol` returns them.

    Raises:
        ValueError: the protocol cannot split these data.
    """
    name, histories_of = settings["name"], dict.fromkeys(("train", "validation", "test"), histories)
    if name == "temporal_users":
        return temporal_users(histories, times, settings["order_users_by"]), histories_of
    if name == "last_n":
        return last_n(histories, settings["num_targets"]), histories_of
    if name in ("global_time", "time_folds"):
        check_moments(histories, times, name)
        return split_by_time(histories, times, *window_borders(times, settings)), histories_of
    if name == "random":
        return random_targets(histories, settings["test_share"], settings["split_seed"])
    splits = leave_one_out(histories)
    if name == "cold_items":
        is_cold = draw_cold_items(len(histories.item_ids), settings["cold_share"], settings["cold_seed"])
        histories_of["train"] = warm = without_cold_items(histories, is_cold)
        splits["train"] = Rows(splits["train"].users, warm.boundaries[:-1], warm.boundaries[1:] - 1)
    return splits, histories_of


def leave_one_out(histories: Histories) -> dict[str, Rows]:
    """Every user is in every split: the last item is the test target, the one before it the validation target.

    The train row consists of the remaining items, with the last of them as its target.
    """
    users = np.arange(len(histories.user_ids))
    starts, ends = histories.boundaries[:-1], histories.boundaries[1:]
    return {
        "train": Rows(users, starts, ends - 3),
        "validation": Rows(users, starts, ends - 2),
        "test": Rows(users, starts, ends - 1),
    }


def last_n(histories: Histories, num_targets: int) -> dict[str, Rows]:
    """As `leave_one_out`, with the last `num_targets` items for test and as many before them for validation."""
    users = np.arange(len(histories.user_ids))
    starts, ends = histories.boundaries[:-1], histories.boundaries[1:]
    return {
        "train": Rows(users, starts, ends - 2 * num_targets - 1),
        "validation": Rows(users, starts, ends - 2 * num_targets, ends - num_targets),
        "test": Rows(users, starts, ends - num_targets, ends),
    }


def draw_cold_items(num_items: int, share: float, seed: int) -> np.ndarray:
    """Draw the items that `without_cold_items` removes from training: bool (num_items + 1,), False for padding.

    Raises:
        ValueError: the share rounds to no item, or to all of them.
    """
    num_cold = round(share * num_items)
    if not 0 < num_cold < num_items:
        raise ValueError(
            f"cold_share={share} of {num_items} items rounds to {num_cold}: expected at least one item and not all of "
            "them; use more data or another share"
        )
    is_cold = np.zeros(num_items + 1, dtype=bool)
    is_cold[1 + np.random.default_rng(seed).permutation(num_items)[:num_cold]] = True
    return is_cold


def without_cold_items(histories: Histories, is_cold: np.ndarray) -> Histories:
    """The histories that leave-one-out trains on, without cold items.

    Args:
        histories: the histories of all users.
        is_cold: (num_items + 1,) bool.

    Returns:
        Histories of the same users without their last two items and without cold items, possibly empty. The train row
        of a user is the whole history, with its last item as the target.
    """
    keep = ~is_cold[histories.items]  # (interactions,)
    ends = histories.boundaries[1:]
    keep[ends - 1] = keep[ends - 2] = False
    kept_before = np.concatenate([[0], np.cumsum(keep)])  # (interactions + 1,)
    return replace(histories, items=histories.items[keep], boundaries=kept_before[histories.boundaries])


def temporal_users(histories: Histories, times: np.ndarray, order_users_by: str) -> dict[str, Rows]:
    """Train on the first 80% of the users in time, validate on the next 10% and test on the last 10%.

    Validation and test have the last interaction of each of their users as target; training has every interaction but
    the first. The boundaries are rounded down: users 0..n*8//10-1 train and users n*8//10..n*9//10-1 validate.

    Args:
        histories: the histories of all users.
        times: (interactions,) the times of their items.
        order_users_by: "first" or "last": order users by the time of that interaction, and ties by raw user id.

    Raises:
        ValueError: there are fewer than 10 users.

    Source: LLaRA (SIGIR 2024), its MovieLens files, which agree with "first" and disagree with "last".
    """
    starts, ends = histories.boundaries[:-1], histories.boundaries[1:]
    if len(starts) < 10:
        raise ValueError(
            f"temporal_users divides {len(starts)} users: expected at least 10, for 80%, 10% and 10% of them; use more "
            "data or loosen the filters"
        )
    in_time = np.argsort(times[starts if order_users_by == "first" else ends - 1], kind="stable")
    validation_begins, test_begins = len(in_time) * 8 // 10, len(in_time) * 9 // 10

    train_users = np.sort(in_time[:validation_begins])
    targets = slice_indices(starts[train_users] + 1, ends[train_users])  # all but each user's first item
    users = np.repeat(train_users, ends[train_users] - starts[train_users] - 1)
    splits = {"train": Rows(users, starts[users], targets)}
    for name, users in (
        ("validation", np.sort(in_time[validation_begins:test_begins])),
        ("test", np.sort(in_time[test_begins:])),
    ):
        splits[name] = Rows(users, starts[users], ends[users] - 1)
    return splits


def check_moments(histories: Histories, times: np.ndarray, protocol: str) -> None:
    """Raise a ValueError if most users begin at the earliest time: such times are positions in a history."""
    first_times = times[histories.boundaries[:-1]]
    earliest = first_times.min()
    begin_there = int((first_times == earliest).sum())
    if len(first_times) > 1 and 2 * begin_there > len(first_times):
        raise ValueError(
            f"{begin_there} of {len(first_times)} users begin at the time {earliest}: {protocol} expects moments that "
            "users share, in seconds since 1970, and these look like positions in a history; pass a column of real "
            "times, or use last_n or leave_one_out"
        )


def window_borders(times: np.ndarray, settings: dict) -> tuple[float, float, float]:
    """When validation and test begin, and when test ends.

    Each window has `test_share` of all interactions, counted from the newest one. Interactions at the time of a border
    belong to the newer window.

    Args:
        times: (interactions,) in any order.
        settings: those of global_time or time_folds.

    Raises:
        ValueError: a window, or the time before the first one, has no interactions.
    """
    if settings["name"] == "global_time":
        num_windows, first = 2, 0  # windows at the end of the data, and the index of the one that validates
        if settings["test_start"] is not None:
            return settings["validation_start"], settings["test_start"], np.inf
    else:
        num_windows, first = settings["num_folds"] + 1, settings["fold"] - 1
    in_windows = np.round(settings["test_share"] * len(times) * np.arange(num_windows, 0, -1)).astype(np.int64)
    ordered = np.sort(times)
    if in_windows[-1] == 0 or ordered[len(times) - in_windows[0]] == ordered[0]:
        raise ValueError(
            f"test_share={settings['test_share']} divides {len(times)} interactions, at {len(np.unique(ordered))} "
            f"different times, into {num_windows} windows and what lies before them: expected interactions in each; "
            "use another test_share or more data"
        )
    begins = [*ordered[len(times) - in_windows].tolist(), np.inf]
    return tuple(begins[first : first + 3])


def split_by_time(
    histories: Histories, times: np.ndarray, validation_start: float, test_start: float, test_end: float
) -> dict[str, Rows]:
    """Train on interactions before `validation_start`, validate on those from then on, test on those from `test_start`.

    A user has a row in validation or test if there are items in that window. Interactions from `test_end` on are left
    out.
    """
    starts = histories.boundaries[:-1]
    moments = (validation_start, test_start, test_end)
    # reduceat needs an interaction of every user, and every user has one.
    ends = [starts + np.add.reduceat(times < moment, starts, dtype=np.int64) for moment in moments]
    users = np.arange(len(starts))
    splits = {"train": Rows(users, starts, ends[0] - 1)}
    for name, begin, end in (("validation", ends[0], ends[1]), ("test", ends[1], ends[2])):
        splits[name] = Rows(users, starts, begin, end).filter(end > begin)
    return splits


def random_targets(histories: Histories, test_share: float, seed: int) -> tuple[dict[str, Rows], dict[str, Histories]]:
    """Draw a random share of every user's items for test and another for validation, at least one item each.

    The draw of a user depends on the seed and on the users before, so filters change it.

    Returns:
        The rows, and the histories that they are slices of. Histories of train and validation have the items of train
        first, then those of validation. Histories of test have both in time, then the items of test.
    """
    starts, lengths = histories.boundaries[:-1], np.diff(histories.boundaries)
    users = np.arange(len(starts))
    drawn = np.maximum(1, (test_share * lengths).astype(np.int64))  # (users,), for test, and as many for validation
    drawn = np.minimum(drawn, (lengths - 1) // 2)  # at least one item trains
    user_of = np.repeat(users, lengths)  # (interactions,)
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(user_of)), user_of))  # within each user
    place = np.empty_like(shuffled)
    place[shuffled] = np.arange(len(shuffled)) - starts[user_of]  # of each item, in the random order of its user
    is_test = place < drawn[user_of]
    is_validation = ~is_test & (place < 2 * drawn[user_of])

    def ordered_by(last: np.ndarray) -> Histories:  # stable: in time, where `last` is equal
        return replace(histories, items=histories.items[np.lexsort((last, user_of))])

    trained = ordered_by(is_validation + 2 * is_test)
    test_begins, validation_begins = starts + lengths - drawn, starts + lengths - 2 * drawn
    splits = {
        "train": Rows(users, starts, validation_begins - 1),
        "validation": Rows(users, starts, validation_begins, test_begins),
        "test": Rows(users, starts, test_begins, starts + lengths),
    }
    return splits, {"train": trained, "validation": trained, "test": ordered_by(is_test)}


def limit_histories(rows: Rows, max_history: int | None, min_history: int) -> Rows:
    """Drop rows with a history of fewer than `min_history` items; keep the newest `max_history` items of the rest."""
    rows = rows.filter(rows.ends - rows.starts >= min_history)
    if max_history is not None:
        rows = replace(rows, starts=np.maximum(rows.starts, rows.ends - max_history))
    return rows


def check_splits(splits: dict[str, Rows], settings: dict) -> None:
    """Raise a ValueError for a split without rows."""
    for name, rows in splits.items():
        if len(rows) == 0:
            protocol, history = settings["name"], settings["min_history"]
            raise ValueError(
                f"the {name} split is empty: with min_history={history}, {protocol} expects "
                f"{_needed_interactions(name, settings)}, and none of its users has; use more data, loosen the filters "
                "or lower min_history"
            )


def _needed_interactions(split: str, settings: dict) -> str:
    """The interactions that a user needs to have a row in a split, in words."""
    needed = settings["min_history"] + 1
    if settings["name"] in ("global_time", "time_folds"):
        window = {
            "train": f"users with at least {needed} interactions before validation begins",
            "validation": f"users with at least {needed - 1} interactions before validation begins, and one in it",
            "test": f"users with at least {needed - 1} interactions before test begins, and one in it",
        }
        return window[split]
    # The history is followed by the target and, where every user is in every split, by the targets of later splits.
    if settings["name"] != "temporal_users":
        needed += settings.get("num_targets", 1) * {"train": 2, "validation": 1, "test": 0}[split]
    return f"users with at least {needed} interactions there"


__all__ = ["Rows", "check_splits", "limit_histories", "split_histories"]
