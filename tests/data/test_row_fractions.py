"""Tests of hf_ilora.data.row_fractions."""

import pytest
from datasets import Dataset

from hf_ilora.data.row_fractions import rows_in_fraction

SPLIT = Dataset.from_dict({"user_id": ["a"] * 3 + ["b"] * 5 + ["c"] * 2, "target": list(range(10))})


def test_neighbouring_shares_hold_every_row_once_and_no_user_twice():
    first, second = rows_in_fraction(SPLIT, [0, 0.5]), rows_in_fraction(SPLIT, [0.5, 1])
    assert [*first["target"], *second["target"]] == list(range(10))
    assert set(first["user_id"]) == {"a", "b"} and set(second["user_id"]) == {"c"}


def test_the_whole_share_is_the_split():
    assert rows_in_fraction(SPLIT, [0, 1]) is SPLIT


@pytest.mark.parametrize("share", [[0.5], [0.8, 0.2], [-0.1, 1], [0, 1.5], [0.3, 0.3]])
def test_shares_that_are_none_are_refused(share):
    with pytest.raises(ValueError, match="expected a start and an end"):
        rows_in_fraction(SPLIT, share)


def test_a_fraction_without_users_is_refused():
    with pytest.raises(ValueError, match="contains no user"):
        rows_in_fraction(SPLIT, [0.4, 0.7])
