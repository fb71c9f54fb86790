"""Parts of a split, so that two models can be trained on different users."""

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

    The rows of a user are adjacent in a split, and all of them belong to the part of the first one. So [0, 0.8] and
    [0.8, 1] have no row and no user in common, and together contain all rows.

    Train a language model that reads a recommender on users that the recommender was not trained on: on its own
    training users, the recommender ranks better than on others, and the language model would rely on it too much.

    Raises:
        ValueError: for an invalid fraction, and one without rows.
    """
    check_fraction(fraction)
    if fraction == [0, 1]:
        return split
    users = read_column(split, "user_id").to_numpy()
    begins = np.flatnonzero(np.append(True, users[1:] != users[:-1]))  # first rows of the users
    begins = np.append(begins, len(users))
    start, end = (int(begins[np.searchsorted(begins, round(limit * len(users)))]) for limit in fraction)
    if start == end:
        raise ValueError(f"train_fraction {fraction} of {len(users)} rows contains no user: expected a wider one")
    return split.select(range(start, end))


def sampled_rows(option: str, wanted: int | None, num_rows: int, seed: int) -> np.ndarray:
    """Different row numbers of a split, drawn at random, ascending.

    Args:
        option: the option that says how many, for the message.
        wanted: number of rows; None is all.
        num_rows: of the split.
        seed: random seed of the draw.

    Raises:
        ValueError: for more rows than there are.
    """
    if wanted is None:
        return np.arange(num_rows)
    if wanted > num_rows:
        raise ValueError(
            f"{option} is {wanted}: expected at most {num_rows}, the users of the split; lower it, or leave it out"
        )
    return np.sort(np.random.default_rng(seed).choice(num_rows, size=wanted, replace=False))


__all__ = ["check_fraction", "rows_in_fraction", "sampled_rows"]
