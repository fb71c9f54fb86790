"""The pipeline gives every user what `recommend` gives, in every form that transformers' pipelines take."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    SequentialRecommendationPipeline,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)

TASK = "sequential-recommendation"
NUM_ITEMS = 20
SIZES = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 4, "initializer_range": 0.5}
ROWS = [[1, 2, 3], [3, 1, 2, 2], [4, 2], [6, 7]]
USERS = [[30], [10, 20, 30, 40, 50], ["Title 6", 10], [{"raw_id": 20}, {"title": "Title 8"}]]
ITEM_IDS = [[3], [1, 2, 3, 4, 5], [6, 1], [2, 8]]


def catalogue(num_items: int = NUM_ITEMS, **columns) -> Catalogue:
    ids = list(range(1, num_items + 1))
    own = {"item_id": ids, "raw_id": [10 * i for i in ids], "title": [f"Title {i}" for i in ids]}
    return Catalogue(pa.table(own | columns))


def popularity(**columns) -> PopularityForNextItem:
    model = PopularityForNextItem.fit(ROWS, PopularityConfig(num_items=NUM_ITEMS))
    model.catalogue = catalogue(**columns)
    return model


def sasrec(seed: int = 0) -> SASRecForNextItem:
    torch.manual_seed(seed)
    model = SASRecForNextItem(SASRecConfig(**SIZES)).eval()
    model.catalogue = catalogue()
    return model


@pytest.fixture(scope="module")
def pipe():
    return pipeline(TASK, model=sasrec(), device="cpu")


def ids_and_scores(answers: list[dict]) -> tuple[list[int], list[float]]:
    return [each["item_id"] for each in answers], [each["score"] for each in answers]


def by_hand(model, history, top_k: int, allowed=range(1, NUM_ITEMS + 1), excluded=()) -> list[tuple[int, float]]:
    """Best items of a history, by the logits of a forward alone."""
    newest = history[-SIZES["max_length"] :]
    with torch.no_grad():
        logits = model(torch.tensor([newest])).logits
    logits = logits[0] if logits.dim() == 2 else logits[0, -1]
    log_p = logits.float().log_softmax(-1).tolist()
    left = [item for item in allowed if item not in history and item not in excluded]
    best = sorted(left, key=lambda item: -log_p[item])[:top_k]
    return [(item, log_p[item]) for item in best]


def check(answers: list[dict], expected: list[tuple[int, float]]) -> None:
    item_ids, scores = ids_and_scores(answers)
    assert item_ids == [item for item, _ in expected]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-5)


# --- answers ---


def test_counted_items_come_with_title_ids_and_log_share():
    pipe = pipeline(TASK, model=popularity(), device="cpu")
    # Of 11 occurrences, item 2 has 4; items 1 and 3 have 2; items 4, 6 and 7 have 1.
    assert pipe([30, "Title 1"], top_k=2) == [
        {"title": "Title 2", "raw_id": 20, "item_id": 2, "score": pytest.approx(math.log(4 / 11))},
        {"title": "Title 4", "raw_id": 40, "item_id": 4, "score": pytest.approx(math.log(1 / 11))},
    ]
    (best,) = pipe([20], top_k=1, exclude_seen=False)
    assert best["title"] == "Title 2"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_form_of_several_users_gives_what_each_user_gets_alone(pipe, batch_size):
    alone = [pipe(user, top_k=3) for user in USERS]
    assert len({str(answers) for answers in alone}) == len(USERS)
    for answers, item_ids in zip(alone, ITEM_IDS, strict=True):
        check(answers, by_hand(pipe.model, item_ids, 3))
    rows = [{"watched": user} for user in USERS]
    forms = {
        "list": USERS,
        "tuple": tuple(USERS),
        "dictionaries": [{"history": user} for user in USERS],
        "generator": (user for user in USERS),
        "iterator": iter(USERS),
        "KeyDataset": KeyDataset(rows, "watched"),
    }
    for name, form in forms.items():
        together = pipe(form, top_k=3, batch_size=batch_size)
        assert isinstance(together, list) == (name in ("list", "tuple", "dictionaries"))
        for answers, expected in zip(list(together), alone, strict=True):
            assert [(each["title"], each["raw_id"]) for each in answers] == [
                (each["title"], each["raw_id"]) for each in expected
            ], name
            assert ids_and_scores(answers)[1] == pytest.approx(ids_and_scores(expected)[1], abs=1e-5)


def test_one_user_may_be_an_array_a_tensor_or_a_tuple(pipe):
    expected = pipe([10, 20])
    for history in ((10, 20), np.array([10, 20]), torch.tensor([10, 20]), {"history": [10, 20]}):
        assert pipe(history) == expected
    assert pipe(np.array([[10, 20], [30, 40]]))[1] == pipe([30, 40])


def test_recommendations_can_be_a_history(pipe):
    answers = pipe([10, 20], top_k=2)
    assert pipe(answers) == pipe([each["raw_id"] for each in answers])


def test_a_stream_is_read_lazily(pipe):
    asked = []

    def users():
        for user in USERS:
            asked.append(user)
            yield user

    stream = pipe(users(), top_k=1)
    next(stream := iter(stream))
    assert len(asked) < len(USERS)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_each_user_may_have_filters_and_candidates(pipe, batch_size):
    users = [
        {"history": [10], "allowed_items": [50, "Title 6", 10, 70, 80]},
        {"history": [20, 10], "excluded_items": [30, 40]},
        {"history": [30], "candidates": [90, 40, "Title 4", 30]},  # seen ones are left out, repeats count once
        {"history": [10, 40], "candidates": [20, 50, 60, 70, 80], "excluded_items": [50]},
        [50],
    ]
    answers = pipe(
        users, top_k=3, batch_size=batch_size, allowed_items=range(10, 10 * NUM_ITEMS + 1, 10), excluded_items=[20]
    )
    everything = range(1, NUM_ITEMS + 1)
    check(answers[0], by_hand(pipe.model, [1], 3, allowed=[5, 6, 7, 8], excluded=[2]))
    check(answers[1], by_hand(pipe.model, [2, 1], 3, allowed=everything, excluded=[3, 4]))
    check(answers[2], by_hand(pipe.model, [3], 3, allowed=[9, 4], excluded=[2]))
    check(answers[3], by_hand(pipe.model, [1, 4], 3, allowed=[2, 6, 7, 8]))
    check(answers[4], by_hand(pipe.model, [5], 3, excluded=[2]))


def test_parameters_of_the_pipeline_are_defaults_of_its_calls():
    pipe = pipeline(TASK, model=sasrec(), device="cpu", top_k=2, candidates=[20, 30, 40], fuzzy=True)
    plain = pipeline(TASK, model=sasrec(), device="cpu")
    assert pipe(["title 1"]) == plain([10], top_k=2, candidates=[20, 30, 40])
    assert pipe([10], candidates=None, top_k=4) == plain([10], top_k=4)
    with pytest.raises(ValueError, match="neither"):
        pipe(["title 1"], fuzzy=False)
    assert pipe([["title 1"], [20]], candidates=["title 7", 80])[0] == plain([10], candidates=[70, 80])


MODELS = {
    "sasrec": lambda: SASRecForNextItem(SASRecConfig(**SIZES)),
    "gru4rec": lambda: GRU4RecForNextItem(GRU4RecConfig(**SIZES)),
    "caser": lambda: CaserForNextItem(CaserConfig(**SIZES)),
    "transitions": lambda: TransitionCountsForNextItem.fit(ROWS, TransitionCountsConfig(num_items=NUM_ITEMS)),
    "popularity": popularity,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_saved_model_has_a_pipeline(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.catalogue = catalogue()
    model.save_pretrained(tmp_path)
    pipe = pipeline(TASK, model=str(tmp_path), device="cpu", batch_size=4)
    assert type(pipe) is SequentialRecommendationPipeline and type(pipe.model) is type(model)
    item_ids, scores = model.recommend(ITEM_IDS, top_k=3)
    for answers, ids, values in zip(pipe(USERS, top_k=3), item_ids.tolist(), scores.tolist(), strict=True):
        check(answers, list(zip(ids, values, strict=True)))


def test_an_empty_list_is_a_user_without_history():
    counts = [0, 5, 1, 0, 0, 2] + [0] * 14
    pipe = pipeline(TASK, model=popularity(), device="cpu")
    pipe.model.catalogue = catalogue(count=counts)
    assert (
        ids_and_scores(pipe([], top_k=2))[0] == ids_and_scores(pipe({"history": []}, top_k=2))[0] == [2, 1]
    )  # as in training
    model = sasrec()
    model.catalogue = catalogue(count=counts)
    pipe = pipeline(TASK, model=model, device="cpu")
    assert ids_and_scores(pipe([], top_k=3))[0] == [2, 6, 3]
    assert ids_and_scores(pipe([[], [10]], top_k=3, batch_size=2)[0])[0] == [2, 6, 3]


def test_answers_have_the_columns_of_the_current_catalogue():
    prices = [float(number) for number in range(NUM_ITEMS)]
    pipe = pipeline(TASK, model=popularity(price=prices, genres=[["Drama"]] * NUM_ITEMS), device="cpu")
    (best,) = pipe([10], top_k=1)
    assert (
        best["price"] == 1.0
        and best["genres"] == ["Drama"]
        and list(best)[:4] == ["title", "raw_id", "item_id", "score"]
    )
    columns = {"title": [f"New {number}" for number in range(NUM_ITEMS)]}
    pipe.model.catalogue = catalogue(**columns)
    assert pipe(["New 0"], top_k=1)[0]["title"] == "New 1"


# --- bad input ---


@pytest.mark.parametrize(
    ("inputs", "parameters", "error"),
    [
        (["Titel 1"], {}, "history: 'Titel 1' is neither .*closest are 'Title 1'"),
        ([11, 12], {}, "none of the 2 items is known: 11"),
        ([], {}, "the history is empty: expected at least one item"),
        ([[10], []], {}, "user 1 of the list: the history is empty"),
        ([[10], ["Titel 1"]], {}, "user 1 of the list: history: 'Titel 1'"),
        ([[10], 20], {}, "user 1 of the list: history: found 20: expected a list"),
        ("Title 1", {}, r"the input is 'Title 1': expected a history, such as \['Title 1'\]"),
        (10, {}, r"the input is 10: expected a history"),
        (None, {}, "the input is None"),
        ({"histories": [10]}, {}, "a user has the keys histories: expected history"),
        ({"history": [10], "top_k": 3}, {}, "a user has the keys history, top_k"),
        ({"history": [10], "allowed_items": ["x"]}, {}, "allowed_items: 'x' is neither"),
        ([10], {"excluded_items": "Title 1"}, "excluded_items: found 'Title 1': expected a list"),
        ([10], {"allowed_items": [[20], [30]]}, r"allowed_items: found \[20\] in place of an item"),
        ([10], {"allowed_items": [20, 30]}, "top_k is 10"),  # of 2
        ([10], {"top_k": 20}, "top_k is 20"),  # of 19
        ([10], {"candidates": []}, "no candidate is left"),
        ([10], {"candidates": [10]}, "no candidate is left"),
        ([10], {"top_k": 0}, "top_k is 0: expected a number of items"),
        ([10], {"top_k": "3"}, "top_k is '3'"),
        ([10], {"top_k": True}, "top_k is True"),
        ([10], {"exclude_seen": "no"}, "exclude_seen is 'no': expected True or False"),
        ([10], {"fuzzy": 1}, "fuzzy is 1"),
    ],
)
def test_bad_input_is_refused(pipe, inputs, parameters, error):
    with pytest.raises(ValueError, match=error):
        pipe(inputs, **parameters)


def test_unknown_parameters_are_refused(pipe):
    with pytest.raises(TypeError, match="unknown parameter 'topk': expected some of top_k, exclude_seen"):
        pipe([10], topk=3)
    with pytest.raises(TypeError, match="unknown parameter 'topk'"):
        pipeline(TASK, model=pipe.model, device="cpu", topk=3)


def test_users_of_a_list_are_checked_before_the_model_is_asked(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model, "recommend", lambda *args, **kwargs: pytest.fail("the model was asked"))
    with pytest.raises(ValueError, match="user 2 of the list"):
        pipe([[10], [20], ["x"]])


def test_a_model_without_catalogue_or_of_another_kind_is_refused(tmp_path):
    model = SASRecForNextItem(SASRecConfig(**SIZES))
    model.save_pretrained(tmp_path / "bare")
    for given in (model, str(tmp_path / "bare")):
        with pytest.raises(ValueError, match=r"has no catalogue.*assign model\.catalogue"):
            pipeline(TASK, model=given, device="cpu")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"the model is a BertModel \(model_type bert\): expected a recommender"):
        pipeline(TASK, model=str(tmp_path / "bert"), device="cpu")
    model.catalogue = catalogue(score=[1.0] * NUM_ITEMS)
    with pytest.raises(ValueError, match="column score"):
        pipeline(TASK, model=model, device="cpu")


@pytest.mark.parametrize("damage", ["cut", "header", "values"])
def test_corrupt_weights_are_refused(tmp_path, damage):
    sasrec().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    changed = {"cut": content[:-10], "header": b"\xff" * 16 + content[16:], "values": b""}
    file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors of .* is broken .*restore the folder"):
        pipeline(TASK, model=str(tmp_path), device="cpu")


# --- transformers' ways ---


def test_the_dtype_of_the_pipeline_is_that_of_its_model(tmp_path):
    model = sasrec()
    model.save_pretrained(tmp_path)
    pipe = pipeline(TASK, model=str(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert pipe.model.dtype == pipe.dtype == torch.bfloat16
    item_ids, scores = model.bfloat16().recommend([[1, 2]], top_k=3)
    check(pipe([10, 20], top_k=3), list(zip(item_ids[0].tolist(), scores[0].tolist(), strict=True)))


def test_a_pipeline_is_saved_with_its_model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert again(USERS) == pipe(USERS)
    assert {"handler.py", "recommendation_pipeline.py", "item_names.py"} <= {path.name for path in tmp_path.iterdir()}


def test_the_code_in_a_folder_needs_no_trust_where_the_package_is_imported(tmp_path):
    sasrec().save_pretrained(tmp_path)
    assert (
        '"impl": "recommendation_pipeline.SequentialRecommendationPipeline"' in (tmp_path / "config.json").read_text()
    )
    for trust in (None, False, True):
        pipe = pipeline(TASK, model=str(tmp_path), device="cpu", trust_remote_code=trust)
        assert type(pipe) is SequentialRecommendationPipeline


@pytest.mark.parametrize("trust", [None, True])
def test_the_task_is_inferred_from_the_model(tmp_path, trust):
    sasrec().save_pretrained(tmp_path)
    pipe = pipeline(model=str(tmp_path), device="cpu", trust_remote_code=trust)
    assert type(pipe) is SequentialRecommendationPipeline and pipe.task == TASK
    assert pipe(USERS) == pipeline(TASK, model=str(tmp_path), device="cpu")(USERS)


def test_an_encoder_brings_no_pipeline(tmp_path):
    sasrec().model.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
