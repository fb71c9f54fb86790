"""A part of a split's rows, so that two models can learn from different users."""

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
    """The rows from `fraction[0]` to `fraction[1]` of a split, in its order, without cutting a user in two.

    The rows of one user stand together in a split; all of them belong to where the first one falls. Hence [0, 0.8] and
    [0.8, 1] have no row and no user in common, and hold all rows.

    A language model that reads a recommender should learn from users whom the recommender has not seen: on users that
    it has seen, its order promises more than it keeps later.

    Raises:
        ValueError: for a fraction that is none, and one without rows.
    """
    check_fraction(fraction)
    if fraction == [0, 1]:
        return split
    users = read_column(split, "user_id").to_numpy()
    begins = np.flatnonzero(np.append(True, users[1:] != users[:-1]))  # first rows of the users
    begins = np.append(begins, len(users))
    start, end = (int(begins[np.searchsorted(begins, round(limit * len(users)))]) for limit in fraction)
    if start == end:
        raise ValueError(f"train_fraction {fraction} of {len(users)} rows holds no user: expected a wider one")
    return split.select(range(start, end))


__all__ = ["check_fraction", "rows_in_fraction"]
