"""Sorting and filtering interactions, against naive implementations."""

import random

import numpy as np
import pyarrow as pa
import pytest

from hf_ilora.data import histories, input_tables
from hf_ilora.data.histories import first_occurrences, k_core, sort_chronologically
from hf_ilora.data.input_tables import CodedInteractions
from hf_ilora.data.workspace import Workspace


class TestKCore:
    @pytest.mark.parametrize("seed", range(20))
    def test_it_equals_dropping_one_user_or_item_at_a_time(self, seed):
        generator = random.Random(seed)
        size = generator.randint(5, 120)
        users, items = ([generator.randint(0, 12) for _ in range(size)] for _ in range(2))
        min_user, min_item = generator.randint(1, 8), generator.randint(1, 8)
        kept = set(range(size))
        dropped = True
        while dropped:
            dropped = {
                place
                for place in kept
                if sum(users[other] == users[place] for other in kept) < min_user
                or sum(items[other] == items[place] for other in kept) < min_item
            }
            kept -= set(list(dropped)[:1])
        found = k_core(np.array(users), np.array(items), min_user, min_item)
        assert set(np.flatnonzero(found).tolist()) == kept

    def test_a_chain_of_users_is_dropped_one_by_one(self):
        """Each user loses the second interaction only when the user before is gone."""
        users, items = np.repeat(np.arange(6), 2)[:-1], np.arange(11) // 2 + np.arange(11) % 2
        assert not k_core(users, items, 2, 2).any()
        assert k_core(users, items, 1, 1).all()


@pytest.mark.parametrize("num_users", [1, 3, 256, 257, 5_000])
@pytest.mark.parametrize(
    "times",
    [
        lambda generator, size: generator.integers(0, 4, size),
        lambda generator, size: generator.integers(10**9, 2**62, size),  # keys would not fit 64 bits
        lambda generator, size: generator.integers(0, 4, size) / 2,
        lambda generator, size: np.full(size, 7),
    ],
    ids=["ties", "far apart", "fractions", "all equal"],
)
def test_sorting_is_that_of_a_stable_sort_by_user_and_time(num_users, times, tmp_path, monkeypatch):
    monkeypatch.setattr(input_tables, "_ROWS_PER_BATCH", 3_000)
    generator = np.random.default_rng(num_users)
    users = generator.integers(0, num_users, 10_000).astype(np.int32)
    times, rows = times(generator, len(users)), np.arange(len(users), dtype=np.int32)
    order = np.lexsort((times, users))
    for folder in (None, tmp_path):
        coded = CodedInteractions(users, rows, times, pa.array(np.arange(num_users)), pa.array(rows))
        sort_chronologically(coded, Workspace(folder))
        assert np.array_equal(coded.items, order)
        assert np.array_equal(coded.users, users[order]) and np.array_equal(coded.times, times[order])


def test_first_occurrences_are_those_of_each_user(monkeypatch):
    monkeypatch.setattr(histories, "_ROWS_PER_BLOCK", 7)
    generator = np.random.default_rng(0)
    users, items = np.sort(generator.integers(0, 9, 200)), generator.integers(0, 12, 200)
    seen, expected = set(), []
    for pair in zip(users.tolist(), items.tolist(), strict=True):
        expected.append(pair not in seen)
        seen.add(pair)
    assert first_occurrences(users, items).tolist() == expected
