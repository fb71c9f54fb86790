"""Item to item: the rows of the table that scores, or the transitions of a model that counts."""

import numpy as np
import pytest
import torch

from hf_ilora import (
    PopularityConfig,
    PopularityForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.models.next_item import top_k
from tests.scoring_models import MODELS, sasrec

NUM_ITEMS = 12


def cosines(table: np.ndarray, item: int) -> np.ndarray:
    return np.array([row @ table[item] / np.linalg.norm(row) / np.linalg.norm(table[item]) for row in table])


def in_chunks_of(at_once: int, monkeypatch) -> None:
    for name in ("_SCORES_AT_ONCE", "_USERS_AT_ONCE"):
        monkeypatch.setattr(top_k, name, {"cpu": at_once})
    monkeypatch.setattr(top_k, "_FEW_SCORES", 0)


@pytest.mark.parametrize(
    "model",
    [
        sasrec(NUM_ITEMS),
        sasrec(NUM_ITEMS, tie_word_embeddings=False),
        MODELS["gru4rec"](NUM_ITEMS),
        MODELS["caser"](NUM_ITEMS),
    ],
    ids=["sasrec", "untied", "gru4rec", "caser"],
)
@pytest.mark.parametrize("at_once", [1, 1 << 20])  # one item that is asked about and a few columns, or all
def test_similar_items_have_the_largest_cosine_in_the_table_that_scores(model, at_once, monkeypatch):
    in_chunks_of(at_once, monkeypatch)
    table = model.head.weight.detach().numpy()
    item_ids, scores = model.similar_items([3, 12, 3], top_k=4)
    assert item_ids.shape == scores.shape == (3, 4) and torch.equal(item_ids[0], item_ids[2])
    for row, item in ((0, 3), (1, 12)):
        values = cosines(table[1:], item - 1)
        order = [other for other in np.argsort(-values) + 1 if other != item][:4]
        assert item_ids[row].tolist() == order
        assert scores[row].tolist() == pytest.approx(values[np.array(order) - 1].tolist(), abs=1e-5)
    filters = {"allowed_items": [1, 2, 3, 4, 5], "excluded_items": [[4], [], [1]]}
    chosen, _ = model.similar_items([3, 12, 3], 2, **filters)
    assert set(chosen[0].tolist()) <= {1, 2, 5} and set(chosen[2].tolist()) <= {2, 4, 5}


def test_counting_models_rank_followers_first_and_then_popular_items():
    config = TransitionCountsConfig(num_items=5, max_gap=1, backward_weight=0, source_power=0, target_power=0)
    model = TransitionCountsForNextItem.fit([[1, 2], [1, 2], [1, 3], [3, 4], [4, 4]], config)
    item_ids, scores = model.similar_items(torch.tensor([1, 3]), top_k=4)
    assert item_ids.tolist() == [[2, 3, 4, 5], [4, 1, 2, 5]]  # 4 occurs 3 times, 1 three times, 2 twice, 5 never
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1, 0, 0], [1, 0, 0, 0]]))


def test_chunks_change_nothing_for_models_that_count(monkeypatch):
    rows = np.random.default_rng(0).integers(1, 41, (60, 5)).tolist()
    model = TransitionCountsForNextItem.fit(rows, TransitionCountsConfig(num_items=40))
    expected = model.similar_items(range(1, 41), 3, excluded_items=[7])
    in_chunks_of(1, monkeypatch)
    for found, whole in zip(model.similar_items(range(1, 41), 3, excluded_items=[7]), expected, strict=True):
        assert torch.equal(found, whole)


def test_popularity_knows_no_similar_items():
    model = PopularityForNextItem.fit([[1, 2]], PopularityConfig(num_items=NUM_ITEMS))
    with pytest.raises(
        ValueError, match="PopularityForNextItem does not know which items are alike: expected a SASRec"
    ):
        model.similar_items([1])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"items have shape \(0,\).*expected at least one item id"),
        ([[1, 2]], r"items have shape \(1, 2\)"),
        ([1.5], "type torch.float32: expected at least one"),
        ([0], r"items contain 0: expected ids 1\.\.12"),
        ([1, 13], r"items contain 13: expected ids 1\.\.12 of this model's catalogue"),
        ("B07", "items are not item ids .* expected integers, such as"),
        (7, r"items have shape \(\) .*expected at least one item id, such as"),
        (["B07"], "items are not item ids .* map raw ids with model.catalogue.item_ids"),
    ],
)
def test_what_is_no_item_is_refused(items, message):
    with pytest.raises(ValueError, match=message):
        sasrec(NUM_ITEMS).similar_items(items, 2)


def test_more_similar_items_than_there_are_is_refused():
    with pytest.raises(ValueError, match="top_k is 12, but row 0 has 11 of 12 items left") as raised:
        sasrec(NUM_ITEMS).similar_items([1], NUM_ITEMS)
    assert "ask for fewer items, or loosen allowed_items" in str(raised.value)
    assert "exclude_seen" not in str(raised.value), "similar_items has no such argument"
