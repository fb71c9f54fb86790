"""Items added to a model by their titles, and users who name what they like, on planted groups of similar items."""

import copy
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    ItemTitles,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    add_items,
    fill_new_items,
)
from hf_ilora.titles import item_titles
from tests.titles.encoder_folders import save_bert

GROUPS, PER_GROUP, SIZE = 5, 8, 12
NUM_ITEMS = GROUPS * PER_GROUP
SIZES = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 6, "initializer_range": 0.3}
WORDS = ("lavender", "mint", "orange", "cedar", "rose")
COUNTS = np.array([0, *(1 + item % 7 * 5 for item in range(NUM_ITEMS))])
MODELS = {
    "cosine": lambda: SASRecForNextItem(SASRecConfig(**SIZES, score_temperature=0.1, head_bias=True)),
    "dot product": lambda: SASRecForNextItem(SASRecConfig(**SIZES)),
    "head of its own": lambda: SASRecForNextItem(
        SASRecConfig(**SIZES, tie_word_embeddings=False, head_bias=True, loss_type="bce", popularity_power=1.0)
    ),
    "gru4rec": lambda: GRU4RecForNextItem(GRU4RecConfig(**SIZES)),
    "caser": lambda: CaserForNextItem(CaserConfig(**SIZES, block_type="reference", tie_word_embeddings=False)),
}


def group_of(item: int) -> int:
    return (item - 1) % GROUPS


def text_vectors(groups, seed=0) -> torch.Tensor:
    """Unit vectors of titles: the group of each item, with noise."""
    generator = torch.Generator().manual_seed(seed)
    own = 0.1 * torch.randn(len(groups), SIZE, generator=generator)
    return F.normalize(torch.eye(SIZE)[torch.as_tensor(groups)] + own, dim=1)


def embeddings_of_catalogue() -> torch.Tensor:
    return F.pad(text_vectors([group_of(item) for item in range(1, NUM_ITEMS + 1)]), (0, 0, 1, 0))


def catalogue(raw_ids=None, counts=COUNTS) -> Catalogue:
    ids = list(range(1, NUM_ITEMS + 1))
    titles = [f"Group {group_of(item)}, {WORDS[group_of(item)]}, item {item}" for item in ids]
    table = pa.table({"item_id": ids, "raw_id": raw_ids or [f"r{item}" for item in ids], "title": titles})
    return Catalogue(table) if counts is None else Catalogue(table).with_counts(counts)


def planted(name="cosine", counts=COUNTS) -> SASRecForNextItem:
    """A model in whose tables the items of a group are close."""
    model = MODELS[name]().eval()
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.head.weight}:
            centres = torch.randn(GROUPS, table.shape[1])
            own = 0.1 * torch.randn(NUM_ITEMS, table.shape[1])
            table[1:] = centres[[group_of(item) for item in range(1, NUM_ITEMS + 1)]] + own
        if model.head.bias is not None:
            model.head.bias[1:] = torch.arange(NUM_ITEMS) / NUM_ITEMS
    model.catalogue = catalogue(counts=counts)
    return model


def rows_of_group(table: torch.Tensor, group: int) -> torch.Tensor:
    return table.detach()[[item for item in range(1, NUM_ITEMS + 1) if group_of(item) == group]]


NEW = [("new 2", "Something of group 2"), ("new 4", "Something of group 4")]


def new_vectors(seed=1) -> torch.Tensor:
    return text_vectors([2, 4], seed)


@pytest.mark.parametrize("name", MODELS)
def test_new_items_get_rows_near_similar_ones_and_are_saved_with_the_model(name, tmp_path):
    model = planted(name)
    config = model.config
    histories = torch.tensor([[3, 8, 13], [5, 10, 15]])
    before = model(histories).logits
    titles = ItemTitles(model, title_embeddings=embeddings_of_catalogue())
    assert titles.add_items(NEW, new_vectors()) == [NUM_ITEMS + 1, NUM_ITEMS + 2]
    after = model(histories).logits
    torch.testing.assert_close(after[:, : NUM_ITEMS + 1], before)
    assert model.config.num_items == NUM_ITEMS + 2 and config.num_items == NUM_ITEMS
    for table in {model.get_input_embeddings().weight, model.head.weight}:
        for place, group in enumerate((2, 4), start=1):
            row = table[NUM_ITEMS + place].detach()
            assert F.cosine_similarity(row, rows_of_group(table, group).mean(0), dim=0) > 0.95
    assert (model.get_input_embeddings().weight is model.head.weight) == model.config.tie_word_embeddings
    assert model.catalogue.titles([NUM_ITEMS + 1]) == ["Something of group 2"]
    assert model.catalogue.item_ids(["new 4"]) == [NUM_ITEMS + 2] and model.catalogue.counts[-2:].tolist() == [0, 0]

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.catalogue == model.catalogue and loaded.config.num_items == NUM_ITEMS + 2
    with_new = torch.tensor([[NUM_ITEMS + 1, 3, NUM_ITEMS + 2]])
    torch.testing.assert_close(loaded(with_new).logits, model(with_new).logits)
    for found, expected in zip(loaded.recommend(with_new), model.recommend(with_new), strict=True):
        torch.testing.assert_close(found, expected)


def test_new_items_are_recommended_to_those_who_like_their_group():
    model = planted()
    add_items(model, NEW, title_embeddings=torch.cat([embeddings_of_catalogue(), new_vectors()]))
    user = F.normalize(rows_of_group(model.head.weight, 2).mean(0), dim=0).unsqueeze(0)  # (1, hidden)
    best = model.head(user, None)[0].topk(PER_GROUP + 1).indices.tolist()
    assert NUM_ITEMS + 1 in best and NUM_ITEMS + 2 not in best
    assert model.config.num_items == len(model.catalogue) == NUM_ITEMS + 2


def unit_vectors_by_hand(embeddings: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    embeddings, new = embeddings.double(), new.double()
    mean = embeddings[1:].mean(0)
    variances, directions = np.linalg.eigh(np.cov((embeddings[1:] - mean).numpy().T, bias=True))
    scaled = directions / np.sqrt(variances + variances.mean())
    return F.normalize((torch.cat([embeddings, new]) - mean) @ torch.from_numpy(scaled), dim=1)


def row_by_hand(table, vectors, item, counts, temperature, cosine):
    """The row of an item from those of the 20 nearest others that occur in training."""
    known = [other for other in range(1, NUM_ITEMS + 1) if counts[other] and other != item]
    cosines = {other: float(vectors[item] @ vectors[other]) for other in known}
    nearest = sorted(known, key=cosines.get)[-20:]
    weights = [counts[j] / (counts[j] + 10) * math.exp(cosines[j] / temperature) for j in nearest]
    weights = (torch.tensor(weights) / sum(weights)).float().unsqueeze(1)
    rows = table[nearest]
    if not cosine:
        return (weights * rows).sum(0)
    lengths = rows.norm(dim=1, keepdim=True)
    return F.normalize((weights * rows / lengths).sum(0), dim=0) * (weights * lengths).sum()


@pytest.mark.parametrize("name", ["cosine", "dot product"])
def test_rows_are_averages_of_the_nearest_known_items_by_hand(name):
    counts = COUNTS.copy()
    counts[5:20] = 0
    model = planted(name, counts)
    table = model.head.weight.detach().clone()
    titles = ItemTitles(model, title_embeddings=embeddings_of_catalogue())
    titles.add_items(NEW, new_vectors())
    vectors = unit_vectors_by_hand(embeddings_of_catalogue(), new_vectors())
    for item in (NUM_ITEMS + 1, NUM_ITEMS + 2):
        expected = row_by_hand(table, vectors, item, counts, titles.temperature, name == "cosine")
        torch.testing.assert_close(model.head.weight[item].detach(), expected, rtol=1e-3, atol=1e-4)
    if name == "cosine":  # the biases of the rarer half
        known = np.flatnonzero(counts)
        rare = known[counts[known] <= torch.tensor(counts[known]).median().item()]
        assert model.head.bias[-1].item() == pytest.approx((rare - 1).mean() / NUM_ITEMS, rel=1e-4)


@pytest.mark.parametrize("name", ["cosine", "dot product"])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_the_temperature_is_the_one_that_predicts_known_rows_best(name, noise):
    model = planted(name)
    with torch.no_grad():
        model.head.weight[1:] += noise * torch.randn(NUM_ITEMS, 8)
    table, vectors = model.head.weight.detach(), unit_vectors_by_hand(embeddings_of_catalogue(), new_vectors())
    quality = {
        temperature: sum(
            COUNTS[item]
            / (COUNTS[item] + 10)
            * float(
                F.cosine_similarity(
                    row_by_hand(table, vectors, item, COUNTS, temperature, name == "cosine"), table[item], dim=0
                )
            )
            for item in range(1, NUM_ITEMS + 1)
        )
        for temperature in item_titles.TEMPERATURES
    }
    titles = ItemTitles(model, title_embeddings=embeddings_of_catalogue())
    assert titles.temperature == max(quality, key=quality.get)


def test_without_counts_all_items_are_known_and_rare_ones_are_those_of_low_bias():
    model = planted(counts=None)
    add_items(model, NEW, title_embeddings=torch.cat([embeddings_of_catalogue(), new_vectors()]))
    assert "count" not in model.catalogue.table.column_names
    assert model.head.bias[-1].item() == pytest.approx(np.arange(NUM_ITEMS // 2).mean() / NUM_ITEMS, rel=1e-4)


def test_items_that_training_never_saw_get_rows_and_the_others_keep_theirs():
    counts = COUNTS.copy()
    counts[[3, 20]] = 0
    model = planted(counts=counts)
    with torch.no_grad():
        model.head.weight[[3, 20]] = 0
        model.head.bias[[3, 20]] = -5
    before = copy.deepcopy(model)
    assert fill_new_items(model, title_embeddings=embeddings_of_catalogue()) == 2
    others = [item for item in range(NUM_ITEMS + 1) if item not in (3, 20)]
    assert torch.equal(model.head.weight[others], before.head.weight[others])
    assert torch.equal(model.head.bias[others], before.head.bias[others])
    for item in (3, 20):
        group = rows_of_group(before.head.weight, group_of(item)).mean(0)
        assert F.cosine_similarity(model.head.weight[item].detach(), group, dim=0) > 0.9
        assert model.head.bias[item] > -1
    assert fill_new_items(planted(), title_embeddings=embeddings_of_catalogue()) == 0
    counts = torch.from_numpy(COUNTS).clone()
    counts[7] = 0  # counts of the training rows, which may be fewer than the data set's
    model = planted()
    assert fill_new_items(model, title_embeddings=embeddings_of_catalogue(), item_counts=counts) == 1


@pytest.mark.parametrize(
    "items",
    [
        NEW,
        [list(pair) for pair in NEW],
        iter(NEW),
        pa.table({"raw_id": ["new 2", "new 4"], "title": [title for _, title in NEW], "price": [1, 2]}),
        dict(NEW),
        pd.DataFrame(NEW, columns=["raw_id", "title"]),
        Dataset.from_dict({"item_id": ["new 2", "new 4"], "title": [title for _, title in NEW], "genres": [["x"], []]}),
    ],
    ids=["pairs", "lists", "generator", "table", "dictionary", "frame", "data set"],
)
def test_items_come_as_pairs_or_tables(items):
    model = planted()
    ItemTitles(model, title_embeddings=embeddings_of_catalogue()).add_items(items, new_vectors())
    assert model.catalogue.raw_ids([NUM_ITEMS + 1, NUM_ITEMS + 2]) == ["new 2", "new 4"]
    assert model.catalogue.titles([NUM_ITEMS + 1, NUM_ITEMS + 2]) == [title for _, title in NEW]


def test_new_items_without_year_and_genres_join_a_catalogue_that_has_them():
    model, table = planted(), catalogue().table
    more = {"year": pa.array([1990] * NUM_ITEMS, pa.int32()), "genres": [["Drama"]] * NUM_ITEMS}
    model.catalogue = Catalogue(table.append_column("year", more["year"]).append_column("genres", [more["genres"]]))
    ItemTitles(model, title_embeddings=embeddings_of_catalogue()).add_items(NEW, new_vectors())
    assert model.catalogue.table.slice(NUM_ITEMS).to_pylist()[0] == {
        "item_id": NUM_ITEMS + 1, "raw_id": "new 2", "title": NEW[0][1], "year": None, "genres": [], "count": 0
    }  # fmt: skip
    assert Catalogue(model.catalogue.table) == model.catalogue


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "there are no items to add"),
        (
            [("r7", "Heat"), ("new", "Heat"), ("r8", "x")],
            r"raw id 'r7' is in the catalogue already \(2 of the 3 are\): expected new items",
        ),
        ([("new", "Heat"), ("new", "Casino")], "raw id 'new' occurs more than once"),
        ([("a", "Heat"), ("new", None)], "the title of item 'new' is None: expected text"),
        ([("new", " ")], "the title of item 'new' is ' ': expected text"),
        ([(7, "Heat")], r"raw ids of the new items are int64 \(the first is 7\): expected string"),
        ([(None, "Heat"), ("a", "b")], "1 of the new items have no raw id"),
        ([("a", "Heat"), (7, "Casino")], "of several types"),
        ([("a", 7), ("b", 8)], "the title of item 'a' is 7: expected text"),
        (["new"], r"an item is 'new': expected \(raw id, title\)"),
        ([("a", "b", "c")], r"expected \(raw id, title\)"),
        ("new", r"items is 'new': expected \(raw id, title\) pairs"),
        (7, r"items is 7: expected \(raw id, title\) pairs"),
        (pa.table({"raw_id": ["a"]}), r"the items have no column title \(found: raw_id\)"),
        (pa.table({"raw_id": ["a"], "title": [1.5]}), "the title of item 'a' is 1.5"),
    ],
)
def test_bad_items_are_refused_and_change_nothing(items, message):
    model = planted()
    titles = ItemTitles(model, title_embeddings=embeddings_of_catalogue())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        titles.add_items(items, new_vectors())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_items == len(model.catalogue) == NUM_ITEMS


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (new_vectors()[:1], r"title embeddings have shape \(1, 12\): expected \(2, size\), one for each title"),
        (new_vectors()[:, :5], "title embeddings have 5 numbers per title: expected 12"),
        (new_vectors()[0], r"title embeddings have shape \(12,\)"),
        (new_vectors() / 0, "row 0 of the title embeddings contains NaN or inf"),
    ],
)
def test_bad_vectors_of_new_titles_are_refused(vectors, message):
    model = planted()
    with pytest.raises(ValueError, match=message):
        ItemTitles(model, title_embeddings=embeddings_of_catalogue()).add_items(NEW, vectors)
    if vectors.shape[-1] == SIZE and vectors.dim() == 2:
        with pytest.raises(ValueError, match="title embeddings"):
            add_items(model, NEW, title_embeddings=torch.cat([embeddings_of_catalogue(), vectors]))
    assert model.config.num_items == NUM_ITEMS


def test_bad_vectors_of_the_catalogue_models_and_counts_are_refused():
    model, embeddings = planted(), embeddings_of_catalogue()
    with pytest.raises(ValueError, match=r"have shape \(40, 12\): expected \(41, size\), one for each item, and row 0"):
        ItemTitles(model, title_embeddings=embeddings[1:])
    with pytest.raises(ValueError, match="row 3 of the title embeddings contains NaN"):
        ItemTitles(model, title_embeddings=embeddings.index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match="all 40 titles have the same vector"):
        ItemTitles(model, title_embeddings=torch.ones(NUM_ITEMS + 1, SIZE) / 3)
    with pytest.raises(ValueError, match="no item of the catalogue occurs in training"):
        ItemTitles(model, title_embeddings=embeddings, item_counts=torch.zeros(NUM_ITEMS + 1))
    with pytest.raises(ValueError, match=r"item_counts have shape \(40,\): expected \(41,\)"):
        ItemTitles(model, title_embeddings=embeddings, item_counts=torch.ones(NUM_ITEMS))
    titles = ItemTitles(model, title_embeddings=embeddings)
    model.catalogue = catalogue()
    with pytest.raises(ValueError, match="the catalogue of the model has been replaced since"):
        titles.add_items(NEW, new_vectors())
    model.catalogue = None
    with pytest.raises(ValueError, match="the model has no catalogue"):
        ItemTitles(model, title_embeddings=embeddings)
    with pytest.raises(ValueError, match="the model has no catalogue"):
        add_items(model, NEW, title_embeddings=torch.cat([embeddings, new_vectors()]))
    popularity = PopularityForNextItem.fit([[1, 2]], PopularityConfig(num_items=NUM_ITEMS))
    with pytest.raises(TypeError, match="model is a PopularityForNextItem, which has no trained table of items"):
        add_items(popularity, NEW)
    with_teacher = SASRecForNextItem(SASRecConfig(**SIZES, teacher_embedding_size=4))
    with pytest.raises(ValueError, match=r"call model\.fold_teacher_embeddings"):
        add_items(with_teacher, NEW)


def test_the_catalogue_is_encoded_once_for_many_additions(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    bert, model = save_bert(tmp_path / "bert"), planted()
    assert add_items(model, NEW[:1], bert) is model
    monkeypatch.setattr(item_titles, "item_title_embeddings", lambda *_, **__: pytest.fail("encoded again"))
    add_items(model, NEW[1:], bert)
    monkeypatch.undo()
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    together = planted()
    with torch.no_grad():
        together.head.weight.copy_(model.head.weight[: NUM_ITEMS + 1])
        together.head.bias.copy_(model.head.bias[: NUM_ITEMS + 1])
    add_items(together, NEW, bert)
    torch.testing.assert_close(together.head.weight, model.head.weight)
    assert together.catalogue == model.catalogue
    model.catalogue = copy.deepcopy(model.catalogue)  # another object, whose titles may be others
    add_items(model, [("new 6", "Another")], bert)
    assert model.config.num_items == NUM_ITEMS + 3


def test_tf_idf_encodes_all_titles_together():
    pytest.importorskip("sklearn", reason="TF-IDF needs the extra 'titles'")
    model = planted()
    add_items(model, [("new 1", "Mint and more")], "tf-idf")
    add_items(model, [("new 3", "Cedar")], "tf-idf")
    assert model.config.num_items == NUM_ITEMS + 2
    for place, group in ((1, 1), (2, 3)):
        row, rows = model.head.weight[NUM_ITEMS + place].detach(), rows_of_group(model.head.weight, group)
        assert F.cosine_similarity(row, rows.mean(0), dim=0) > 0.9
    titles = ItemTitles(model, "tf-idf")
    assert titles.recommend([["Group 1, mint, item 2"]], top_k=3)[0].shape == (1, 3)
    with pytest.raises(ValueError, match="the vectors of TF-IDF depend on all titles together"):
        titles.recommend([["no title of the catalogue"]])


def test_a_model_with_new_items_can_be_trained_further():
    model = planted("head of its own")
    add_items(model, NEW, title_embeddings=torch.cat([embeddings_of_catalogue(), new_vectors()]))
    model.train()
    model.set_item_counts(torch.ones(NUM_ITEMS + 3))
    model(
        torch.tensor([[1, NUM_ITEMS + 1, 3]]), labels=torch.tensor([[2, NUM_ITEMS + 2, NUM_ITEMS + 1]])
    ).loss.backward()
    assert model.head.weight.grad[-1].abs().sum() > 0 and model.get_input_embeddings().weight.grad[-2].abs().sum() > 0


# --- users who name what they like ---


@pytest.fixture
def described(monkeypatch):
    """Titles whose vectors tell the group that a text names."""

    def encode(titles, encoder, **settings):
        return text_vectors([int(title.partition("group ")[2][0]) for title in titles])

    monkeypatch.setattr(item_titles, "encode_titles", encode)
    return ItemTitles(planted("dot product"), title_embeddings=embeddings_of_catalogue())


def test_titles_become_their_items_and_other_texts_the_nearest_items(described):
    item_ids, cosines = described.nearest_items(["I liked group 3", "group 0"], top_k=4)
    assert [{group_of(item) for item in row} for row in item_ids.tolist()] == [{3}, {0}]
    assert (cosines.diff(dim=1) <= 0).all() and (cosines > 0.5).all()
    title = "Group 1, mint, item 2"
    liked = [[title, "liked group 3"], [], [f" {title.upper()}"]]
    first, nobody, third = described.histories(liked)
    assert nobody == [] and third == [2] and first[0] == 2
    assert first[1:] == described.nearest_items(["liked group 3"], 5)[0].flip(1)[0].tolist()


def test_users_get_recommendations_without_the_items_they_name(described):
    model, title = described.model, "Group 1, mint, item 2"
    liked = [[title, "group 3"], [], [title]]
    item_ids, scores = described.recommend(liked, top_k=NUM_ITEMS - 1)
    assert item_ids.shape == scores.shape == (3, NUM_ITEMS - 1)
    histories = described.histories(liked)
    for row, history in enumerate(histories):
        ranked, log_p = model.recommend([history], top_k=NUM_ITEMS, exclude_seen=False)
        kept = [place for place, item in enumerate(ranked[0].tolist()) if item != 2 or not history][: NUM_ITEMS - 1]
        assert item_ids[row].tolist() == ranked[0][kept].tolist()
        torch.testing.assert_close(scores[row], log_p[0][kept])
    assert COUNTS[item_ids[1].tolist()].tolist() == sorted(COUNTS[item_ids[1].tolist()], reverse=True)
    few, _ = described.recommend(liked, top_k=2, allowed_items=[1, 2, 3, 4, 5], excluded_items=[[3], [3], []])
    kept = [[1, 4, 5], [1, 2, 4, 5], [1, 3, 4, 5]]  # without the items that each user named or excluded
    assert [
        [item for item in item_ids_of_all if item in row][:2]
        for item_ids_of_all, row in zip(
            model.recommend(histories, NUM_ITEMS, exclude_seen=False)[0].tolist(), kept, strict=True
        )
    ] == few.tolist()
    popularity = PopularityForNextItem.fit([[1, 2]], PopularityConfig(num_items=NUM_ITEMS))
    popularity.catalogue = catalogue()
    titles = ItemTitles(popularity, title_embeddings=embeddings_of_catalogue())
    assert set(titles.recommend([["group 3"]], top_k=2)[0][0].tolist()) == {1, 2}


def test_bad_lists_of_liked_titles_are_refused(described):
    with pytest.raises(ValueError, match=r"liked\[0\] is the string 'group 1': expected a list of titles per user"):
        described.recommend(["group 1"])
    with pytest.raises(ValueError, match=r"liked\[0\] is the string 'g'"):
        described.recommend("group 1")
    with pytest.raises(ValueError, match="liked is 7: expected a list of titles per user"):
        described.recommend(7)
    with pytest.raises(ValueError, match=r"liked\[0\] is 7: expected a list of titles per user"):
        described.recommend([7])
    with pytest.raises(ValueError, match=r"titles is the string 'group 1': expected a list of titles"):
        described.nearest_items("group 1")
    with pytest.raises(ValueError, match="top_k is 40, but row 0 has 39 of 40 items left to recommend"):
        described.recommend([["Group 1, mint, item 2"]], top_k=40)
    with pytest.raises(ValueError, match="top_k is 41: expected 1 to 40, the items of the catalogue"):
        described.nearest_items(["group 1"], 41)
    described.model.catalogue = catalogue(counts=None)
    with pytest.raises(ValueError, match="the catalogue of the model has been replaced since"):
        described.recommend([["group 1"]])
    titles = ItemTitles(described.model, title_embeddings=embeddings_of_catalogue())
    with pytest.raises(ValueError, match=r"history 1 is empty.* whose catalogue has the column count"):
        titles.recommend([["group 1"], []])
