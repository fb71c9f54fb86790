"""Histories in every usual form become one tensor; errors name the row."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from hf_ilora import (
    Catalogue,
    PopularityConfig,
    PopularityForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.models.next_item.histories import padded_histories
from tests.scoring_models import MODELS, sasrec

NUM_ITEMS = 40
ROWS = [[7, 8, 9], [1, 2, 3, 4, 5], [11]]
PADDED = [[7, 8, 9, 0, 0], [1, 2, 3, 4, 5], [11, 0, 0, 0, 0]]
LEFT = [[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 11]]

FORMS = {
    "lists": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "arrays": [np.array(row) for row in ROWS],
    "small arrays": [np.array(row, dtype=np.uint8) for row in ROWS],
    "tensors": [torch.tensor(row, dtype=torch.int32) for row in ROWS],
    "mixed": [ROWS[0], np.array(ROWS[1]), torch.tensor(ROWS[2])],
    "generator": (row for row in ROWS),
    "array of lists": np.array([*map(list, ROWS), None], dtype=object)[:3],
    "series": pd.Series(ROWS),
    "column": Dataset.from_dict({"history": ROWS})["history"],
    "padded lists": PADDED,
    "padded array": np.array(PADDED),
    "padded tensor": torch.tensor(PADDED),
    "padded on the left": torch.tensor(LEFT, dtype=torch.int32),
    "partly padded": [[0, 7, 8, 9], ROWS[1], [11, 0]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_histories(form):
    histories = padded_histories(FORMS[form], NUM_ITEMS)
    assert histories.dtype == torch.int64 and histories.shape == (3, 5)
    assert [[item for item in row if item] for row in histories.tolist()] == ROWS


def test_the_given_array_is_not_changed():
    given = np.array(PADDED, dtype=np.int64)
    given.flags.writeable = False  # as columns of Arrow are
    histories = padded_histories(given, NUM_ITEMS)
    histories[0, 0] = 1
    assert given[0, 0] == 7


@pytest.mark.parametrize(
    "model",
    [
        *(MODELS[kind](NUM_ITEMS) for kind in ("plain", "gru4rec", "caser")),
        PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS)),
        TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS)),
    ],
    ids=lambda model: model.config.model_type,
)
def test_every_model_reads_ragged_rows_as_it_reads_them_alone(model):
    item_ids, scores = model.recommend(ROWS, top_k=5)
    for row, history in enumerate(ROWS):
        alone, alone_scores = model.recommend([history], top_k=5)
        assert torch.equal(item_ids[row], alone[0])
        torch.testing.assert_close(scores[row], alone_scores[0], rtol=1e-4, atol=1e-5)
    ranked, distances = model.rank_items(ROWS, top_k=5)
    assert torch.equal(ranked, item_ids) and torch.equal(distances, -scores)
    padded_ids, padded_scores = model.recommend(LEFT, top_k=5)
    assert torch.equal(padded_ids, item_ids)
    torch.testing.assert_close(padded_scores, scores, rtol=1e-4, atol=1e-5)
    _, everything = model.recommend(ROWS, top_k=NUM_ITEMS, exclude_seen=False)
    assert torch.isfinite(everything).all() and (everything <= 0).all()
    torch.testing.assert_close(everything.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([[3], [1, NUM_ITEMS + 1]], rf"history 1 contains item {NUM_ITEMS + 1}: expected ids 1\.\.{NUM_ITEMS} of this"),
        (torch.tensor([[1, 2], [-3, 1]]), "history 1 contains item -3"),
        (torch.tensor([[1, 2], [0, 0]]), "history 1 is empty: expected at least one item"),
        ([[1, 2], [3], []], "history 2 is empty"),
        ([[1, 2], [0]], "history 1 is empty"),
        ([], "there are no histories"),
        (torch.zeros(0, 3, dtype=torch.long), r"shape \(0, 3\): expected \(batch, length\), at least one row"),
        (torch.tensor([1, 2]), r"shape \(2,\): expected \(batch, length\)"),
        (np.ones((2, 2, 2), dtype=np.int64), r"shape \(2, 2, 2\): expected \(batch, length\)"),
        ([1, 2], r"history 0 is 1, of shape \(\): expected a row of item ids per user"),
        ([[1], [[1, 2]]], r"history 1 is \[\[1, 2\]\], of shape \(1, 2\)"),
        ([[1], ["B07"]], r"history 1 is \['B07'\], which is not a row of item ids .*map raw ids with model.catalogue"),
        ("B07", "histories are the string 'B07': expected a row of item ids per user.*map raw ids"),
        ([[1], [None]], r"history 1 is \[None\], which is not a row of item ids"),
        (7, "histories are of type int: expected a row of item ids per user"),
        (None, "histories are of type NoneType"),
        (torch.tensor([[1.0, 2.0]]), r"histories are torch\.float32: expected item ids as int64"),
        (np.array([[1.0, 2.0]]), r"histories are torch\.float64: expected item ids as int64"),
        ([[1, 2], [1.5]], r"history 1 is torch\.float32: expected item ids as int64"),
        ([[True, False]], r"history 0 is torch\.bool: expected item ids"),
    ],
)
def test_bad_histories_are_refused_by_row(histories, message):
    with pytest.raises(ValueError, match=message):
        padded_histories(histories, NUM_ITEMS)
    with pytest.raises(ValueError, match=message):
        sasrec(NUM_ITEMS).recommend(histories)


@pytest.mark.parametrize("histories", [torch.tensor([[3, 1, 2]]), [[3, 1], [2]]])
def test_ids_are_checked_once_per_call(histories):
    counting = TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS))
    for recommender in (sasrec(NUM_ITEMS), counting):
        with torch.profiler.profile() as profile:
            recommender.recommend(histories, top_k=3)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["aten::aminmax"] == 1


def test_forward_takes_input_ids_and_no_ragged_rows():
    with pytest.raises(ValueError, match="input_ids have list: expected a tensor"):
        sasrec(NUM_ITEMS)(ROWS)


# --- users without history ---

COUNTS = np.array([0, *((7 * item) % 11 for item in range(1, NUM_ITEMS + 1))])  # with zeros and ties


def with_counts(model, counts=COUNTS):
    ids = list(range(1, NUM_ITEMS + 1))
    model.catalogue = Catalogue(pa.table({"item_id": ids, "raw_id": ids, "title": [f"Title {i}" for i in ids]}))
    if counts is not None:
        model.catalogue = model.catalogue.with_counts(counts)
    return model


@pytest.mark.parametrize("kind", ["plain", "gru4rec", "caser"])
def test_users_without_history_get_popular_items_among_others(kind):
    model = with_counts(MODELS[kind](NUM_ITEMS))
    for histories in ([[3, 1], [], [7]], [[3, 1], [0, 0], [7, 0]], torch.tensor([[3, 1], [0, 0], [0, 7]])):
        item_ids, scores = model.recommend(histories, top_k=12)
        for row, history in ((0, [3, 1]), (2, [7])):
            alone, alone_scores = model.recommend([history], top_k=12)
            assert torch.equal(item_ids[row], alone[0])
            torch.testing.assert_close(scores[row], alone_scores[0], rtol=1e-4, atol=1e-5)
        shares = COUNTS[item_ids[1]] / COUNTS.sum()
        assert sorted(COUNTS, reverse=True)[:12] == COUNTS[item_ids[1]].tolist()
        torch.testing.assert_close(scores[1].exp(), torch.from_numpy(shares).float())
    item_ids, scores = model.recommend([[]], top_k=NUM_ITEMS)  # down to items that were never counted
    assert sorted(item_ids[0].tolist()) == list(range(1, NUM_ITEMS + 1)) and torch.isfinite(scores).all()


@pytest.mark.parametrize("popularity_weight", [0.0, 1e-5])
def test_models_that_count_know_what_is_popular_without_a_catalogue(popularity_weight):
    config = TransitionCountsConfig(num_items=NUM_ITEMS, popularity_weight=popularity_weight)
    for model in (
        TransitionCountsForNextItem.fit([*ROWS, [11, 11]], config),
        PopularityForNextItem.fit([*ROWS, [11, 11]], PopularityConfig(num_items=NUM_ITEMS)),
    ):
        item_ids, scores = model.recommend([[], [1]], top_k=2)
        assert item_ids[0, 0] == 11 and scores[0, 0].item() == pytest.approx(np.log(3 / 11))
        assert model.rank_items([[]], top_k=2)[1][0, 0].item() == pytest.approx(-np.log(3 / 11))


def test_an_empty_history_is_refused_without_counts():
    for model in (sasrec(NUM_ITEMS), with_counts(sasrec(NUM_ITEMS), None)):
        with pytest.raises(ValueError, match=r"history 1 is empty: .*A model whose catalogue has the column count"):
            model.recommend([[1], []])
