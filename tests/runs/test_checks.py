"""Checks of settings that recipes share."""

import numpy as np
import pytest

from hf_ilora.runs.checks import check_top_k, most_seen_items


def test_most_seen_items_counts_each_item_of_a_history_once():
    assert most_seen_items([]) == 0
    assert most_seen_items([np.array([7, 7, 7, 7]), np.array([1, 2]), np.array([3])]) == 2
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths, high = generator.integers(0, 9, size=4), int(generator.integers(2, 12))
        histories = [generator.integers(1, high, size=length) for length in lengths]
        assert most_seen_items(histories) == max(len(set(history.tolist())) for history in histories)


def test_top_k_may_be_as_large_as_the_catalogue_without_the_seen_items():
    check_top_k("top_k", 30, num_items=30)
    check_top_k("top_k", 17, num_items=30, most_seen=13)
    with pytest.raises(ValueError, match="top_k is 31: expected at most 30, the 30 items of the catalogue; lower it"):
        check_top_k("top_k", 31, num_items=30)
    with pytest.raises(
        ValueError, match="k is 18: expected at most 17, the 30 items of the catalogue minus the 13 that"
    ):
        check_top_k("k", 18, num_items=30, most_seen=13)
