"""The exact index of a model's items recommends the same items as the model."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest
import torch

from hf_ilora import (
    Catalogue,
    ExactItemIndex,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
)
from tests.scoring_models import MODELS, sasrec

NUM_ITEMS = 400
HISTORIES = torch.randint(1, NUM_ITEMS + 1, (20, 6), generator=torch.Generator().manual_seed(3))


def check(model, top_k=7, exclude_seen=True, **filters):
    item_ids, scores = ExactItemIndex(model).recommend(HISTORIES, top_k, exclude_seen, **filters)
    expected, _ = model.recommend(HISTORIES, top_k, exclude_seen, **filters)
    assert torch.equal(item_ids, expected)
    with torch.no_grad():
        logits = model(HISTORIES).logits
    torch.testing.assert_close(scores, logits.gather(1, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_of_the_model(name, exclude_seen):
    check(MODELS[name](NUM_ITEMS), exclude_seen=exclude_seen)


@pytest.mark.parametrize(("width", "num_items"), [(1, 400), (2, 1), (3, 2), (7, 400), (65, 33)])
def test_tables_of_any_size_are_ranked(width, num_items):
    torch.manual_seed(0)
    config = SASRecConfig(num_items=num_items, hidden_size=width, num_attention_heads=1, max_length=6, head_bias=True)
    model, histories = SASRecForNextItem(config).eval(), torch.randint(1, num_items + 1, (9, 5))
    torch.nn.init.normal_(model.model.final_norm.bias)  # else states of width 1 are zero
    found, _ = ExactItemIndex(model).recommend(histories, min(5, num_items), exclude_seen=False)
    assert torch.equal(found, model.recommend(histories, min(5, num_items), exclude_seen=False)[0])


@pytest.mark.parametrize("name", ["plain", "biases"])
def test_filters_give_the_answers_of_the_model(name):
    model = MODELS[name](NUM_ITEMS)
    rows = [list(range(1 + row, 60 + 3 * row)) for row in range(len(HISTORIES))]
    for filters in (
        {"allowed_items": range(1, NUM_ITEMS, 5)},
        {"allowed_items": rows},
        {"allowed_items": rows, "excluded_items": range(1, NUM_ITEMS, 2)},
        {"allowed_items": range(1, NUM_ITEMS, 5), "excluded_items": rows},
    ):
        check(model, 5, **filters)


@torch.no_grad()
def awkward(model, kind):
    table, generator = model.head.weight, torch.Generator().manual_seed(1)
    if kind == "one column decides the scale":
        table[1:, 0] = 1000
    elif kind == "lengths of all magnitudes":
        table *= 10 ** torch.empty(len(table), 1).uniform_(-12, 3, generator=generator)
    elif kind == "very small":
        table *= 1e-34
    elif kind == "nearly the same":
        table[:] = table[1] + 1e-5 * torch.randn(table.shape, generator=generator)
    elif kind == "seven different rows":
        table[1:] = table[1 + torch.arange(NUM_ITEMS) % 7]
    elif kind == "nothing but zeros":
        table.zero_()
    return model


AWKWARD = [
    "one column decides the scale",
    "lengths of all magnitudes",
    "very small",
    "nearly the same",
    "seven different rows",
    "nothing but zeros",
]


@pytest.mark.parametrize("top_k", [1, 70])
@pytest.mark.parametrize("kind", AWKWARD)
def test_no_item_is_missed_in_an_awkward_table(kind, top_k):
    """Where scores tie, the lower ids come first; where they differ by rounding alone, the scores have to be right."""
    model = awkward(sasrec(NUM_ITEMS), kind)
    item_ids, scores = ExactItemIndex(model).recommend(HISTORIES, top_k)
    with torch.no_grad():
        logits = model(HISTORIES).logits.scatter(1, HISTORIES, -torch.inf)
    tolerance = 1e-5 * float(logits[logits.isfinite()].abs().max())
    expected = logits.sort(dim=1, descending=True).values[:, :top_k]
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits.gather(1, item_ids), expected, rtol=0, atol=tolerance)
    tied = scores[:, 1:] == scores[:, :-1]
    assert (item_ids[:, 1:] > item_ids[:, :-1])[tied].all()
    if kind == "seven different rows":
        left = [set(range(1, NUM_ITEMS + 1)) - set(history) for history in HISTORIES.tolist()]
        for items, of_user in zip(item_ids.tolist(), left, strict=True):
            best = items[0] % 7
            alike = sorted(item for item in of_user if item % 7 == best)
            assert items[: len(alike)] == alike[:top_k]


@pytest.mark.parametrize("name", MODELS)
def test_no_score_is_above_its_bound_and_few_items_are_scored(name):
    model = MODELS[name](NUM_ITEMS)
    index = ExactItemIndex(model)
    with torch.inference_mode():
        for history in HISTORIES.split(1):
            scores = model(history).logits
            state = model.head.scaled(model.user_embeddings(history)).float()
            highest = index._highest_scores(state, history)
            assert (highest[:, 1:] >= scores[:, 1:]).all()
            tenth = scores.sort(descending=True).values[0, 9]
            assert int((highest[:, 1:] >= tenth).sum()) < 40


@pytest.mark.slow
def test_products_are_right_on_processors_without_instructions_for_them():
    """Without VNNI, oneDNN adds two products in 16 bits, which 127 x 127 would overflow."""
    program = (
        "import torch; from hf_ilora import ExactItemIndex, SASRecConfig, SASRecForNextItem; "
        "model = SASRecForNextItem(SASRecConfig(num_items=400, hidden_size=8)); "
        "signs = torch.where(torch.arange(401) % 2 == 0, 1.0, -1.0); "
        "model.head.weight.data[:] = signs.unsqueeze(1); "
        "highest = ExactItemIndex(model)._highest_scores(torch.ones(1, 8), torch.tensor([[1]])); "
        "torch.testing.assert_close(highest[0, 1:], 8 * signs[1:], rtol=1e-3, atol=0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})


def test_bounds_that_tell_nothing_apart_leave_all_items_to_the_table(monkeypatch):
    model = sasrec(NUM_ITEMS)
    monkeypatch.setattr("hf_ilora.serving.exact_item_index.ITEMS_AT_ONCE", 50)
    monkeypatch.setattr(ExactItemIndex, "_highest_scores", lambda *user: torch.full((1, NUM_ITEMS + 1), 1e9))
    check(model)


def test_users_without_history_get_popular_items():
    model = sasrec(NUM_ITEMS)
    ids = list(range(1, NUM_ITEMS + 1))
    table = {"item_id": ids, "raw_id": ids, "title": [f"title {item}" for item in ids], "count": ids[::-1]}
    model.catalogue = Catalogue(pa.table(table))
    index = ExactItemIndex(model)
    found, scores = index.recommend([[5, 9], [], [1]], 3, excluded_items=[2])
    assert torch.equal(found, model.recommend([[5, 9], [], [1]], 3, excluded_items=[2])[0])
    assert found[1].tolist() == [1, 3, 4] and scores.isfinite().all() and index.catalogue == model.catalogue


def test_bad_tables_and_requests_are_refused():
    with pytest.raises(TypeError, match="PopularityForNextItem: expected a SASRec"):
        ExactItemIndex(PopularityForNextItem(PopularityConfig(num_items=3)))
    model = sasrec(NUM_ITEMS)
    index = ExactItemIndex(model)
    with pytest.raises(ValueError, match="top_k is 5, but row 0 has 3 of 400 items left to recommend"):
        index.recommend(HISTORIES, 5, exclude_seen=False, allowed_items=[3, 7, 9])
    with pytest.raises(ValueError, match="top_k is 395, but row 0 has 394 of 400 items left"):
        index.recommend([[1, 2, 3, 4, 5, 6]], 395)
    with pytest.raises(ValueError, match="history 0 is empty"):
        index.recommend([[], [1]])
    with torch.no_grad():
        model.head.weight[7, 3] = torch.nan
    with pytest.raises(ValueError, match="the row of item 7 contains NaN or infinity"):
        ExactItemIndex(model)
