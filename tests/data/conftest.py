"""Small raw tables."""

import pytest
from datasets import concatenate_datasets

from tests.data.naive_sequences import interactions_table, items_table


@pytest.fixture
def small():
    """Two users with five and four interactions, one with three, in the order of an input file."""
    rows = [(7, 30, 5), (2, 10, 1), (7, 10, 1), (2, 40, 2), (7, 20, 3), (2, 20, 3), (7, 40, 9), (2, 50, 4), (7, 50, 7)]
    return interactions_table([*rows, (1, 20, 8), (1, 10, 6), (1, 30, 7)]), items_table([60, 50, 40, 30, 20, 10])


@pytest.fixture
def wide(small):
    """As `small`, with a user whose three items nobody else has, so that every user left two items unseen."""
    more = interactions_table([(9, 60, 1), (9, 70, 2), (9, 80, 3), (9, 10, 4)])
    return concatenate_datasets([small[0], more]), items_table(range(90, 0, -10))
