"""Selects rows of a split: a fraction of the users, or a random sample."""

import numpy as np
from datasets import Dataset

from .columns import read_column


def check_fraction(fraction: list[float]) -> None:
    """Raise a ValueError unless `fraction` is a start and an end, 0 <= start < end <= 1."""
    if len(fraction) != 2 or not 0 <= fraction[0] < fraction[1] <= 1:
        raise ValueError(
            f"train_fraction is {fraction}: expected a start and an end, 0 <= start < end <= 1, such as 0 0.8"
        )


def rows_in_fraction(split: Dataset, fraction: list[float]) -> Dataset:
    """The rows from `fraction[0]` to `fraction[1]` of a split, in its order; a user's rows are never divided.

    The rows of a user are adjacent in a split and follow the first of them. So [0, 0.8] and [0.8, 1] share no row and
    no user, and together contain all rows.

    Train a language model that reads a recommender on users that the recommender was not trained on. The recommender
    ranks better for its own training users than for others, and the language model would rely on it too much.

    Raises:
        ValueError: the fraction is invalid, or contains no row.
    """
    check_fraction(fraction)
    if fraction == [0, 1]:
        return split
    users = read_column(split, "user_id").to_numpy()
    begins = np.flatnonzero(np.append(True, users[1:] != users[:-1]))  # first row of each user
    begins = np.append(begins, len(users))
    start, end = (int(begins[np.searchsorted(begins, round(limit * len(users)))]) for limit in fraction)
    if start == end:
        raise ValueError(f"train_fraction {fraction} of {len(users)} rows contains no user: expected a wider one")
    return split.select(range(start, end))


def sampled_rows(option: str, wanted: int | None, num_rows: int, seed: int) -> np.ndarray:
    """Distinct row numbers of a split, drawn at random, ascending.

    Args:
        option: the option that sets `wanted`, for the error message.
        wanted: number of rows to draw; None for all.
        num_rows: number of rows of the split.
        seed: random seed of the draw.

    Raises:
        ValueError: there are fewer rows than wanted.
    """
    if wanted is None:
        return np.arange(num_rows)
    if wanted > num_rows:
        raise ValueError(
            f"{option} is {wanted}: expected at most {num_rows}, the users of the split; lower it, or leave it out"
        )
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=wanted, replace=False))


__all__ = ["check_fraction", "rows_in_fraction", "sampled_rows"]
