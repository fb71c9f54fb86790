"""Candidate sets: their content, what they depend on, and their distribution."""

import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hf_ilora import build_sequences
from hf_ilora.data import candidates as candidates_module
from hf_ilora.data.candidates import sample_candidates
from hf_ilora.data.histories import Histories
from hf_ilora.data.protocols import Rows
from tests.data.naive_sequences import interactions_table, items_table


def histories_of(*sequences: list[int], num_items: int, user_ids: list | None = None) -> Histories:
    user_ids = user_ids or list(range(len(sequences)))
    return Histories(
        items=np.concatenate(sequences).astype(np.int32),
        boundaries=np.cumsum([0, *map(len, sequences)]),
        user_ids=pa.array(user_ids),
        item_ids=pa.array(range(num_items)),
    )


def last_rows(histories: Histories) -> Rows:
    """A row per user with the last item as target."""
    return Rows(np.arange(len(histories.user_ids)), histories.boundaries[:-1], histories.boundaries[1:] - 1)


def naive_candidates(user_id, seen, target, num_items, num_candidates, seed, split) -> list[int]:
    """The same draw with Python's integers: Floyd's sampling over the list of unseen items, then a sort by keys."""
    bits = 2**64 - 1

    def mix(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & bits
        value = (value ^ value >> 27) * 0x94D049BB133111EB & bits
        return value ^ value >> 31

    def hashed(text):
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    key = mix(mix(hashed(user_id) if isinstance(user_id, str) else user_id & bits) ^ hashed(f"{seed} {split}"))
    numbers = (mix(key + count * 0x9E3779B97F4A7C15 & bits) for count in itertools.count(1))
    unseen = [item for item in range(1, num_items + 1) if item not in seen]
    ranks = []
    for highest in range(len(unseen) - num_candidates + 1, len(unseen)):
        drawn = (next(numbers) >> 32) * (highest + 1) >> 32
        ranks.append(highest if drawn in ranks else drawn)
    candidates = [target, *(unseen[rank] for rank in ranks)]
    return [item for _, item in sorted(zip(numbers, candidates, strict=False))]


class TestSampling:
    @pytest.mark.parametrize("string_ids", [False, True])
    def test_it_agrees_with_a_naive_implementation(self, string_ids, monkeypatch):
        monkeypatch.setattr(candidates_module, "_ROWS_PER_BLOCK", 7)
        generator = random.Random(0)
        sequences = [generator.choices(range(1, 31), k=generator.randint(2, 40)) for _ in range(60)]
        user_ids = sorted(f"user {n}" if string_ids else n * 2**40 - 2**43 for n in range(60))
        histories = histories_of(*sequences, num_items=30, user_ids=user_ids)
        most = 31 - max(len(set(sequence)) for sequence in sequences)
        for num_candidates in {2, most}:  # `most` leaves one user with exactly as many unseen items as are needed
            found = sample_candidates(histories, last_rows(histories), num_candidates, seed=5, split="test")
            expected = [
                naive_candidates(user_id, set(items), items[-1], 30, num_candidates, 5, "test")
                for user_id, items in zip(user_ids, sequences, strict=True)
            ]
            assert found.dtype == np.int32
            assert found.tolist() == expected

    def test_every_set_of_unseen_items_and_every_order_is_equally_likely(self):
        users = 24_000
        histories = histories_of(*[[3, 7, 5]] * users, num_items=8)
        found = sample_candidates(
            histories, last_rows(histories), 3, seed=0, split="test"
        )  # target 5, two of 1 2 4 6 8
        counts = Counter(map(tuple, found.tolist()))
        expected = {
            order for pair in itertools.combinations([1, 2, 4, 6, 8], 2) for order in itertools.permutations((5, *pair))
        }
        assert set(counts) == expected
        mean = users / len(expected)  # 400, standard deviation 20
        assert sum((count - mean) ** 2 / mean for count in counts.values()) < 100  # chi-square, 59 degrees: p < 0.001
        assert max(abs(count - mean) for count in counts.values()) < 5 * mean**0.5

    def test_too_small_a_catalogue_is_an_error(self):
        histories = histories_of([1, 2, 3], num_items=5)
        message = (
            r"num_candidates=20 needs 19 items that the user never interacted with, but the catalogue has 5 items: "
            r"lower num_candidates to at most 3 \(0 leaves candidates out\)"
        )
        with pytest.raises(ValueError, match=message):
            sample_candidates(histories, last_rows(histories), 20, seed=0, split="test")

    def test_a_user_who_has_seen_too_much_is_an_error_that_names_the_user(self):
        histories = histories_of([1, 2, 3], [1, 2, 3, 4, 5, 6, 7], num_items=8, user_ids=["ann", "bob"])
        message = r"user 'bob' left 1 of 8 items unseen: lower num_candidates to at most 2 .*, or remove that user"
        with pytest.raises(ValueError, match=message):
            sample_candidates(histories, last_rows(histories), 3, seed=0, split="test")
        histories = histories_of([1, 2, 3, 4], num_items=4)
        with pytest.raises(ValueError, match="set num_candidates=0"):
            sample_candidates(histories, last_rows(histories), 2, seed=0, split="test")


class TestInSequences:
    rows = tuple(
        (user, item, place)
        for user in range(40)
        for place, item in enumerate(random.Random(user).sample(range(60), 5 + user % 20))
    )

    def build(self, rows=rows, **keywords):
        return build_sequences(interactions_table(list(rows)), items_table(range(60)), **keywords)

    @pytest.mark.parametrize("protocol", ["leave_one_out", "temporal_users"])
    def test_candidates_are_the_target_and_items_that_the_user_never_saw(self, protocol):
        sequences = self.build(protocol=protocol)
        raw_ids = [None, *sequences.raw_ids.tolist()]
        assert "candidates" not in sequences["train"].column_names
        for split in ("validation", "test"):
            for row in sequences[split]:
                seen = {item for user, item, _ in self.rows if user == row["user_id"]}
                candidates = [raw_ids[item] for item in row["candidates"]]
                assert len(set(candidates)) == 20
                assert seen & set(candidates) == {raw_ids[row["target"]]}

    def test_the_same_seed_gives_the_same_candidates(self):
        assert self.build()["test"]["candidates"][:] == self.build()["test"]["candidates"][:]

    def test_other_seeds_and_splits_give_other_candidates(self):
        found = self.build()
        other = self.build(candidate_seed=1)
        assert other["test"]["target"][:] == found["test"]["target"][:]
        same = [a == b for a, b in zip(found["test"]["candidates"], other["test"]["candidates"], strict=True)]
        assert not any(same)
        for row, validation_row in zip(found["test"], found["validation"], strict=True):
            assert set(row["candidates"]) - {row["target"]} != set(validation_row["candidates"]) - {
                validation_row["target"]
            }

    def test_other_users_and_the_order_of_rows_change_nothing(self):
        found = self.build()
        shuffled = random.Random(9).sample(self.rows, len(self.rows))
        fewer = [row for row in shuffled if row[0] > 9]
        assert {item for _, item, _ in fewer} == set(range(60))  # the catalogue stays the same
        by_user = {row["user_id"]: row["candidates"] for row in found["validation"]}
        for row in self.build(fewer)["validation"]:
            assert row["candidates"] == by_user[row["user_id"]]

    def test_zero_candidates_leave_the_column_out(self):
        sequences = self.build(num_candidates=0)
        assert all("candidates" not in split.column_names for split in sequences.values())

    def test_another_process_draws_the_same(self):
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_candidates as t\n"
            "print(t.TestInSequences().build()['test']['candidates'][:])"
        )
        command = [sys.executable, "-c", program, str(Path(__file__).parent)]
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        assert printed.strip() == str(self.build()["test"]["candidates"][:])
