"""The approximate index of a model's items, compared with the exact answers of the model."""

import pyarrow as pa
import pytest
import torch

from hf_ilora import (
    Catalogue,
    ItemIndex,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
)
from hf_ilora.serving import candidate_items, item_index
from hf_ilora.serving.item_index import INDEX_FILE
from tests.scoring_models import MODELS, SIZES, sasrec

NUM_ITEMS = 400
HISTORIES = torch.randint(1, NUM_ITEMS + 1, (20, 6), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model():
    return sasrec(NUM_ITEMS)


@pytest.fixture(scope="module")
def index(model):
    return ItemIndex.build(model, num_lists=16)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_all_lists_give_the_answers_of_the_model(name, exclude_seen):
    model = MODELS[name](NUM_ITEMS)
    index = ItemIndex.build(model, num_lists=8, probes=8)
    item_ids, scores = index.recommend(HISTORIES, 7, exclude_seen)
    with torch.no_grad():
        logits = model(HISTORIES).logits
    torch.testing.assert_close(scores, logits.gather(1, item_ids), rtol=1e-5, atol=1e-5)
    best = model.recommend(HISTORIES, 7, exclude_seen)[0]
    torch.testing.assert_close(scores, logits.gather(1, best), rtol=1e-5, atol=1e-5)
    assert index.recall(HISTORIES, 7, exclude_seen) > 0.99  # items that score alike may change places by rounding
    if exclude_seen:
        assert not item_ids.unsqueeze(2).eq(HISTORIES.unsqueeze(1)).any()


def test_more_lists_find_more(index):
    recalls = [index.recall(HISTORIES, probes=probes) for probes in (1, 4, 16)]
    assert recalls[0] < recalls[1] < recalls[2] == 1


def test_recall_counts_the_items_of_the_exact_answer(index, model):
    exact, _ = model.recommend(HISTORIES, 5)
    found, _ = index.recommend(HISTORIES, 5, probes=2)
    shared = [len(set(ours) & set(theirs)) / 5 for ours, theirs in zip(found.tolist(), exact.tolist(), strict=True)]
    assert index.recall(HISTORIES, 5, probes=2) == pytest.approx(sum(shared) / len(shared))


def test_tune_takes_the_fewest_probes_that_reach_the_recall(index):
    measured = index.tune(HISTORIES, recall=0.8, top_k=5)
    assert index.recall(HISTORIES, 5) == measured >= 0.8
    assert index.probes == 1 or index.recall(HISTORIES, 5, probes=index.probes // 2) < 0.8
    with pytest.raises(ValueError, match="recall is 98"):
        index.tune(HISTORIES, recall=98)


def test_excluded_items_are_left_out_for_all_or_for_each(index, model):
    exact = model.recommend(HISTORIES, 3)[0]
    found, _ = index.recommend(HISTORIES, 3, excluded_items=exact, probes=16)
    torch.testing.assert_close(found, model.recommend(HISTORIES, 3, excluded_items=exact)[0])
    shared = exact[0].tolist()
    found, _ = index.recommend(HISTORIES[:1], 3, excluded_items=shared, probes=16)
    torch.testing.assert_close(found, model.recommend(HISTORIES[:1], 3, excluded_items=shared)[0])


@pytest.mark.parametrize("name", ["plain", "biases"])
@pytest.mark.parametrize("at_once", [1, 2**26])  # one user, or all
def test_filters_give_the_answers_of_the_model(name, at_once, monkeypatch):
    monkeypatch.setattr(candidate_items, "_NUMBERS_AT_ONCE", at_once)
    model = MODELS[name](NUM_ITEMS)
    index = ItemIndex.build(model, num_lists=16, probes=16)
    rows = [list(range(1 + row, 60 + 3 * row)) for row in range(len(HISTORIES))]
    for filters in (
        {"allowed_items": range(1, NUM_ITEMS, 5)},
        {"allowed_items": rows},
        {"allowed_items": rows, "excluded_items": range(1, NUM_ITEMS, 2)},
        {"allowed_items": range(1, NUM_ITEMS, 5), "excluded_items": rows},
    ):
        exact, _ = model.recommend(HISTORIES, 5, **filters)
        assert torch.equal(index.recommend(HISTORIES, 5, **filters)[0], exact)


def test_few_allowed_items_are_found_with_few_probes(index, model):
    """As many items are compared as without a filter, in more lists."""
    allowed = torch.arange(1, NUM_ITEMS, 16)
    exact, _ = model.recommend(HISTORIES, 5, allowed_items=allowed)
    found, _ = index.recommend(HISTORIES, 5, allowed_items=allowed, probes=1)
    assert torch.equal(found, exact)
    with pytest.raises(ValueError, match="top_k is 5, but row 0 has 3 of 400 items left to recommend"):
        index.recommend(HISTORIES, 5, exclude_seen=False, allowed_items=[3, 7, 9])
    with pytest.raises(ValueError, match="top_k is 5, but row 1 has 2 of 400 items left to recommend"):
        index.recommend([[1], [2]], 5, allowed_items=[[10, 20, 30, 40, 50], [10, 2, 30]])
    with pytest.raises(ValueError, match="allowed_items contain item 401"):
        index.recommend(HISTORIES, 5, allowed_items=[401])


def test_users_without_history_get_popular_items():
    model = sasrec(NUM_ITEMS)
    ids = list(range(1, NUM_ITEMS + 1))
    table = {"item_id": ids, "raw_id": ids, "title": [f"title {item}" for item in ids], "count": ids[::-1]}
    model.catalogue = Catalogue(pa.table(table))
    index = ItemIndex.build(model, num_lists=16, probes=16)
    found, scores = index.recommend([[5, 9], [], [1]], 3, excluded_items=[2])
    assert torch.equal(found, model.recommend([[5, 9], [], [1]], 3, excluded_items=[2])[0])
    assert found[1].tolist() == [1, 3, 4] and scores.isfinite().all() and index.catalogue == model.catalogue


def test_lists_that_have_too_few_items_are_followed_by_all(index, model):
    top_k = NUM_ITEMS - 6
    found, _ = index.recommend(torch.arange(1, 7)[None], top_k, probes=1)
    assert sorted(found[0].tolist()) == list(range(7, NUM_ITEMS + 1))
    with pytest.raises(ValueError, match=f"top_k is {top_k + 1}, but row 0 has {top_k} of {NUM_ITEMS} items left"):
        index.recommend(torch.arange(1, 7)[None], top_k + 1, probes=1)


def test_a_saved_index_gives_the_same_answers_and_only_to_its_own_model(index, model, tmp_path):
    index.save(tmp_path)
    loaded = ItemIndex.load(tmp_path, model)
    assert loaded.probes == index.probes
    for ours, theirs in zip(index.recommend(HISTORIES, probes=3), loaded.recommend(HISTORIES, probes=3), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="index of another model, or of this one before its item table changed"):
        ItemIndex.load(tmp_path, sasrec(NUM_ITEMS, seed=1))
    other = SASRecForNextItem(SASRecConfig(num_items=9, **SIZES))
    with pytest.raises(ValueError, match="it has 400 items, 8 wide, and the model 9, 8 wide"):
        ItemIndex.load(tmp_path, other)
    (tmp_path / INDEX_FILE).write_bytes(b"no index")
    with pytest.raises(ValueError, match="damaged"):
        ItemIndex.load(tmp_path, model)
    with pytest.raises(FileNotFoundError, match=r"ItemIndex\.save"):
        ItemIndex.load(tmp_path / "elsewhere", model)


def test_models_without_a_table_and_bad_settings_are_refused(index, model, monkeypatch):
    with pytest.raises(TypeError, match="PopularityForNextItem: expected a SASRec"):
        ItemIndex.build(PopularityForNextItem(PopularityConfig(num_items=3)))
    with pytest.raises(ValueError, match="num_lists is 500: expected 1 to 400"):
        ItemIndex.build(model, num_lists=500)
    with pytest.raises(ValueError, match="probes is 17: expected 1 to 16"):
        index.recommend(HISTORIES, probes=17)
    with pytest.raises(ValueError, match="history 0 is empty"):
        index.recommend([[], [1]])
    monkeypatch.setattr(item_index, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "hf_ilora\[index\]"'):
        ItemIndex.build(model)
