"""The split protocols: they select the slices of histories that become rows of train, validation and test."""

from dataclasses import dataclass, replace

import numpy as np

from .filters import Histories, slice_indices

PROTOCOLS = ("leave_one_out", "temporal_users", "cold_items")
USER_ORDERS = ("first", "last")


@dataclass(frozen=True)
class Rows:
    """Rows of one split: row r has the history items[starts[r] : ends[r]] and the target items[ends[r]]."""

    users: np.ndarray  # (rows,), ascending
    starts: np.ndarray  # (rows,)
    ends: np.ndarray  # (rows,)

    def __len__(self) -> int:
        return len(self.users)


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


def draw_cold_items(num_items: int, share: float, seed: int) -> np.ndarray:
    """Draw the items that `without_cold_items` takes out of training: bool (num_items + 1,), False for padding.

    Raises:
        ValueError: for a share that rounds to no item, or to all of them.
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
    """What leave-one-out training reads: histories without their last two items, and without cold items.

    Args:
        histories: of all users.
        is_cold: (num_items + 1,) bool.

    Returns:
        Histories of the same users, possibly empty. The row of a user is the whole of it, its last item the target.
    """
    keep = ~is_cold[histories.items]  # (interactions,)
    ends = histories.boundaries[1:]
    keep[ends - 1] = keep[ends - 2] = False
    kept_before = np.concatenate([[0], np.cumsum(keep)])  # (interactions + 1,)
    return replace(histories, items=histories.items[keep], boundaries=kept_before[histories.boundaries])


def temporal_users(histories: Histories, order_users_by: str) -> dict[str, Rows]:
    """The first 80% of the users in time train, the next 10% validate, the last 10% test.

    Validation and test take the last interaction of each of their users as target, training takes every one.
    The boundaries are rounded down: users 0..n*8//10-1 train and users n*8//10..n*9//10-1 validate.

    Args:
        histories: of all users.
        order_users_by: "first" or "last": order users by the time of that interaction; ties are ordered by raw user id.

    Source: LLaRA (SIGIR 2024), its MovieLens files, which agree with "first" and disagree with "last".
    """
    times = histories.first_times if order_users_by == "first" else histories.last_times
    in_time = np.argsort(times, kind="stable")
    validation_begins, test_begins = len(in_time) * 8 // 10, len(in_time) * 9 // 10
    starts, ends = histories.boundaries[:-1], histories.boundaries[1:]

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


def limit_histories(rows: Rows, max_history: int | None, min_history: int) -> Rows:
    """Drop rows with a history of fewer than `min_history` items; keep the newest `max_history` items of the rest."""
    keep = rows.ends - rows.starts >= min_history
    users, starts, ends = rows.users[keep], rows.starts[keep], rows.ends[keep]
    if max_history is not None:
        starts = np.maximum(starts, ends - max_history)
    return Rows(users, starts, ends)


__all__ = ["PROTOCOLS", "USER_ORDERS", "Rows", "draw_cold_items", "leave_one_out", "limit_histories"]
__all__ += ["temporal_users", "without_cold_items"]
