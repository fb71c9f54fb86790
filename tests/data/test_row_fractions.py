"""Tests of hf_ilora.data.row_fractions."""

import pytest
from datasets import Dataset

from hf_ilora.data.row_fractions import rows_in_fraction, sampled_rows

SPLIT = Dataset.from_dict({"user_id": ["a"] * 3 + ["b"] * 5 + ["c"] * 2, "target": list(range(10))})


def test_adjacent_fractions_contain_every_row_once_and_share_no_user():
    first, second = rows_in_fraction(SPLIT, [0, 0.5]), rows_in_fraction(SPLIT, [0.5, 1])
    assert [*first["target"], *second["target"]] == list(range(10))
    assert set(first["user_id"]) == {"a", "b"} and set(second["user_id"]) == {"c"}


def test_the_whole_fraction_is_the_split():
    assert rows_in_fraction(SPLIT, [0, 1]) is SPLIT


@pytest.mark.parametrize("fraction", [[0.5], [0.8, 0.2], [-0.1, 1], [0, 1.5], [0.3, 0.3]])
def test_invalid_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="expected a start and an end"):
        rows_in_fraction(SPLIT, fraction)


def test_a_fraction_without_users_is_refused():
    with pytest.raises(ValueError, match="contains no user"):
        rows_in_fraction(SPLIT, [0.4, 0.7])


def test_a_sample_has_distinct_rows_in_ascending_order_and_follows_the_seed():
    rows = sampled_rows("users", 30, 100, seed=1).tolist()
    assert rows == sorted(set(rows)) and len(rows) == 30 and set(rows) <= set(range(100))
    assert rows == sampled_rows("users", 30, 100, seed=1).tolist() != sampled_rows("users", 30, 100, seed=2).tolist()
    assert (
        sampled_rows("users", None, 5, seed=1).tolist() == sampled_rows("users", 5, 5, seed=1).tolist() == [*range(5)]
    )


def test_a_sample_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="validation_users is 6: expected at most 5"):
        sampled_rows("validation_users", 6, 5, seed=0)
