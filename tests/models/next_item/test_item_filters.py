"""Filters of a recommendation: the only items to choose from, and items to leave out, for all users or for each."""

import numpy as np
import pandas as pd
import pytest
import torch

from hf_ilora import (
    EnsembleTeacher,
    PopularityConfig,
    PopularityForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from tests.scoring_models import MODELS

NUM_ITEMS = 40
ROWS = [[7, 8, 9], [1, 2, 3, 4, 5], [11]]
ALLOWED = [7, 12, 30, 1, 25, 11, 39, 40]
ALLOWED_PER_USER = [[7, 12, 30, 25, 12, 12], [1, 33, 40, 2, 39, 20, 21], [5, 6, 9, 10]]
EXCLUDED_PER_USER = [[12], [], [9, 5, 9]]


def model_of(kind: str):
    if kind == "popularity":
        return PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))
    if kind == "transition_counts":
        return TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS))
    if kind == "ensemble":
        return EnsembleTeacher([model_of("sasrec"), model_of("gru4rec")], [1.0, 2.0])
    return MODELS["plain" if kind == "sasrec" else kind](NUM_ITEMS)


def expected(model, top_k, exclude_seen, allowed, excluded):
    """By sorting everything, user by user."""
    rows = []
    everything, scores = model.recommend(ROWS, NUM_ITEMS, exclude_seen=False)
    for row, history in enumerate(ROWS):
        left_out = set(excluded[row]) | (set(history) if exclude_seen else set())
        pairs = zip(everything[row].tolist(), scores[row].tolist(), strict=True)
        rows.append([(item, score) for item, score in pairs if item in allowed[row] and item not in left_out][:top_k])
    return rows


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser", "transition_counts", "popularity", "ensemble"])
def test_every_recommender_chooses_among_what_the_filters_leave(kind, exclude_seen):
    model = model_of(kind)
    everything = [range(1, NUM_ITEMS + 1)] * 3
    for top_k, allowed, excluded in (
        (5, None, [3, 12, 30]),
        (3, None, EXCLUDED_PER_USER),
        (5, ALLOWED, None),
        (2, ALLOWED_PER_USER, EXCLUDED_PER_USER),
        (4, ALLOWED, [[7, 40], [], [12, 40]]),
        (2, ALLOWED_PER_USER, [12, 33]),
    ):
        per_user = [
            default if given is None else given if isinstance(given[0], list) else [given] * 3
            for given, default in ((allowed, everything), (excluded, [[]] * 3))
        ]
        rows = expected(model, top_k, exclude_seen, *per_user)
        filters = {"allowed_items": allowed, "excluded_items": excluded}
        item_ids, scores = model.recommend(ROWS, top_k, exclude_seen, **filters)
        for row, pairs in enumerate(rows):
            assert scores[row].tolist() == pytest.approx([score for _, score in pairs], rel=1e-5)
            chosen = item_ids[row].tolist()
            assert len(set(chosen)) == top_k and set(chosen) <= set(per_user[0][row]) - set(per_user[1][row])
            assert not exclude_seen or not set(chosen) & set(ROWS[row])
            if kind not in ("transition_counts", "popularity"):  # whose scores tie
                assert chosen == [item for item, _ in pairs]
        ranked, distances = model.rank_items(ROWS, top_k, exclude_seen, **filters)
        assert torch.equal(ranked, item_ids) and torch.equal(distances, -scores)


@pytest.mark.parametrize(
    "form",
    [
        set(ALLOWED),
        tuple(ALLOWED),
        np.array(ALLOWED, dtype=np.int32),
        pd.Series(ALLOWED),
        torch.tensor(ALLOWED, dtype=torch.int32),
        [ALLOWED] * 3,
        [set(ALLOWED), np.array(ALLOWED), torch.tensor([*ALLOWED, 0, 0])],
        np.array([[0, *ALLOWED]] * 3),
        dict.fromkeys(ALLOWED),
    ],
    ids=lambda form: type(form).__name__,
)
def test_every_form_of_a_filter_gives_the_same_items(form):
    model = model_of("sasrec")
    item_ids, scores = model.recommend(ROWS, 4, allowed_items=ALLOWED)
    for found, expected_values in zip(model.recommend(ROWS, 4, allowed_items=form), (item_ids, scores), strict=True):
        assert torch.equal(found, expected_values)
    without, _ = model.recommend(ROWS, 4, excluded_items=form)
    assert not set(without.flatten().tolist()) & set(ALLOWED)


def test_empty_exclusions_change_nothing_and_no_user_is_left_without_items():
    model = model_of("sasrec")
    for nothing in ([], [[], [], []], torch.zeros(3, 0, dtype=torch.long)):
        assert torch.equal(model.recommend(ROWS, 5, excluded_items=nothing)[0], model.recommend(ROWS, 5)[0])
        with pytest.raises(ValueError, match="top_k is 5, but row 0 has 0 of 40 items left"):
            model.recommend(ROWS, 5, allowed_items=nothing)


def test_users_without_history_are_filtered_too():
    model = model_of("transition_counts")
    item_ids, _ = model.recommend([[], [1]], 3, allowed_items=[8, 30, 31, 32])
    assert item_ids[0, 0] == 8 and set(item_ids.flatten().tolist()) <= {8, 30, 31, 32}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1, 41], r"X contain item 41: expected ids 1\.\.40 of this model's catalogue; map raw ids"),
        ([[1], [-3], [2]], "row 1 of X contains item -3: expected ids"),
        ([[1], [2]], "X have 2 rows for 3 histories: expected a row of item ids per history, or ids"),
        (torch.ones(2, 4, dtype=torch.long), "X have 2 rows for 3 histories"),
        (["B07", "B08"], "X contain 'B07': expected item ids; map raw ids with model.catalogue.item_ids"),
        ("B07", "X are the string 'B07': expected item ids, such as .*map raw ids"),
        ([["B07"], [1], [2]], r"row 0 of X is \['B07'\], which is not a row of item ids"),
        ([1.5, 2.5], r"row 0 of X is 1.5, of shape \(\)"),
        (np.array([1.5]), r"X have shape \(1,\) and type torch.float64: expected item ids as integers"),
        (torch.ones(1, 1, 1, dtype=torch.long), r"X have shape \(1, 1, 1\)"),
        ([True, False], r"row 0 of X is True, of shape \(\)"),
        (7, "X are of type int: expected item ids, such as"),
        ([2**70], "X contain an id beyond int64"),
    ],
)
def test_what_is_no_filter_is_refused_by_name(given, message):
    for name in ("allowed_items", "excluded_items"):
        for model in (model_of("sasrec"), model_of("popularity")):
            with pytest.raises(ValueError, match=message.replace("X", name)):
                model.recommend(ROWS, 1, **{name: given})


def test_filters_that_leave_fewer_than_top_k_are_refused_with_the_row_and_what_is_left():
    model = model_of("sasrec")
    for filters in (
        {"allowed_items": [[1, 2, 3], [1, 2, 6], [1, 2, 3]]},  # user 1 has seen two of hers
        {"excluded_items": [[], [*range(7, 41)], [1]]},
        {"allowed_items": [6, 7, 8, 9, 10], "excluded_items": [[], [7, 8, 9, 10, 7], []]},
    ):
        with pytest.raises(ValueError, match=r"row 1 has 1 of 40 items left to recommend: ask for fewer .* loosen"):
            model.recommend(ROWS, 2, **filters)
    with pytest.raises(ValueError, match="top_k is 4, but row 0 has 3 of 40"):  # more than are allowed at all
        model.recommend([[1]], 4, allowed_items=[4, 5, 6])
