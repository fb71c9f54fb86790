"""Recommendations for tables of users: every form of a table, filters, what comes back, and what is refused."""

import json
import os
import re

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hf_ilora import (
    Catalogue,
    EnsembleTeacher,
    ExactItemIndex,
    ItemIndex,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    recommend_all,
)
from hf_ilora.files import held_folder
from hf_ilora.serving import recommend_all as recommend_all_module
from tests.models.ilora.ilora_fixtures import tiny_model
from tests.synthetic import cyclic_sequences

NUM_ITEMS, TOP_K = 30, 4
RAW_IDS = [f"B{number:02d}" for number in range(1, NUM_ITEMS + 1)]
SIZES = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 6, "initializer_range": 0.5}


def catalogue(raw_ids=RAW_IDS) -> Catalogue:
    ids = list(range(1, NUM_ITEMS + 1))
    columns = {"item_id": ids, "raw_id": raw_ids, "title": [f"Title {i}" for i in ids], "count": [i % 7 for i in ids]}
    return Catalogue(pa.table({**columns, "price": [None if i == 3 else i / 2 for i in ids]}))


def sasrec(raw_ids=RAW_IDS) -> SASRecForNextItem:
    torch.manual_seed(0)
    model = SASRecForNextItem(SASRecConfig(**SIZES)).eval()
    model.catalogue = catalogue(raw_ids)
    return model


@pytest.fixture(scope="module")
def users() -> list[tuple[str, list[int]]]:
    """23 users with histories of 0 to 12 item ids, of which the model reads 6."""
    generator = np.random.default_rng(0)
    lengths = [0, 12, 1, *generator.integers(1, 13, 20)]
    return [
        (f"user-{row}", generator.integers(1, NUM_ITEMS + 1, length).tolist()) for row, length in enumerate(lengths)
    ]


def raw(items) -> list[str]:
    return [RAW_IDS[item - 1] for item in items]


def frame_of(users) -> pd.DataFrame:
    return pd.DataFrame({"user_id": [user for user, _ in users], "history": [raw(items) for _, items in users]})


def expected(model, users, **settings) -> dict:
    """User by user, by `recommend`."""
    answers = {}
    for user, items in users:
        item_ids, scores = model.recommend([items], TOP_K, **settings)
        answers[user] = raw(item_ids[0].tolist()), scores[0].tolist()
    return answers


def check(path, answers, num_users=None) -> pd.DataFrame:
    """The rows of the file: users in their order, ranks from 1, and what `recommend` says."""
    frame = pq.ParquetFile(path).read().to_pandas()
    assert list(dict.fromkeys(frame.user_id)) == list(answers)
    for user, rows in frame.groupby("user_id", sort=False):
        item_ids, scores = answers[user]
        assert rows["rank"].tolist() == list(range(1, TOP_K + 1)) and rows.item_id.tolist() == item_ids
        assert rows.score.tolist() == pytest.approx(scores, abs=1e-4)
    assert not path.with_name(f"{path.name}.parts").exists()
    return frame


def written_forms(users, folder) -> dict:
    """The same users as tables of every form, with the arguments that they need."""
    frame = frame_of(users)
    pq.write_table(pa.Table.from_pandas(frame), folder / "users.parquet", row_group_size=3)
    frame.to_json(folder / "users.jsonl", orient="records", lines=True)
    with_text = frame.assign(history=frame.history.map(" ".join)).rename(columns={"history": "seen", "user_id": "who"})
    with_text.to_csv(folder / "users.csv", index=False)
    plays = pd.DataFrame(
        [(user, item, time) for user, items in users for time, item in enumerate(raw(items))],
        columns=["user_id", "song", "when"],
    )
    mixed = plays.sort_values("when", ascending=False, kind="stable")
    mixed.to_csv(folder / "plays.csv", index=False)
    return {
        "parquet": (folder / "users.parquet", {}),
        "json lines": (str(folder / "users.jsonl"), {}),
        "frame": (frame, {}),
        "Dataset": (Dataset.from_pandas(frame), {}),
        "polars": (pl.DataFrame({"user_id": frame.user_id.tolist(), "history": frame.history.tolist()}), {}),
        "csv": (folder / "users.csv", {"user_column": "who", "history_column": "seen"}),
        "interactions": (folder / "plays.csv", {"item_column": "song", "time_column": "when"}),
    }


@pytest.mark.parametrize("form", ["parquet", "json lines", "frame", "Dataset", "polars", "csv", "interactions"])
def test_every_form_of_a_table_gives_what_recommend_gives(users, form, tmp_path):
    model = sasrec()
    table, settings = written_forms(users, tmp_path)[form]
    path = recommend_all(model, table, tmp_path / "out.parquet", TOP_K, batch_size=3, shard_users=7, **settings)
    answers = expected(model, users)
    if form == "interactions":  # users without items have none, and the others are in the order of the rows
        order = pd.read_csv(table).user_id.unique()
        answers = {user: answers[user] for user in order}
        assert len(order) == 22
    check(path, answers)


def test_rows_of_item_ids_give_item_ids_and_numbers_of_rows(users, tmp_path):
    model = sasrec()
    rows = [[0, *items, 0] for _, items in users]  # padding is left out
    answers = dict(enumerate(expected(model, users).values()))
    path = recommend_all(model, rows, tmp_path / "out.parquet", TOP_K, shard_users=7)
    check(path, answers)
    model.catalogue = None
    frame = pq.read_table(recommend_all(model, rows[1:], tmp_path / "ids.parquet", TOP_K)).to_pandas()
    assert [RAW_IDS[item - 1] for item in frame.item_id[:TOP_K]] == answers[1][0]


def test_every_user_of_a_data_set_has_all_items_that_it_knows(tmp_path):
    for protocol in ("leave_one_out", "temporal_users"):
        sequences = cyclic_sequences(num_users=40, length=8, protocol=protocol)
        model = PopularityForNextItem.fit([[1, 1, 2, 2, 3]], PopularityConfig(num_items=sequences.num_items))
        model.catalogue = sequences.catalogue
        path = recommend_all(model, sequences, tmp_path / f"{protocol}.parquet", 16, columns=["title"])
        frame = pq.read_table(path).to_pandas()
        assert sorted(frame.user_id.unique()) == list(range(40)) and len(frame) == 40 * 16
        known = {}
        for split in ("train", "validation", "test"):
            for row in sequences[split]:
                known.setdefault(row["user_id"], set()).update(
                    sequences.catalogue.raw_ids([*row["history"], row["target"]])
                )
        for user, rows in frame.groupby("user_id"):
            assert len(known[user]) > 3 and not set(rows.item_id) & known[user]
        assert frame.title.tolist() == [f"Title {item}" for item in frame.item_id]


def test_an_ilora_recommends_to_many_users(tmp_path):
    model, histories = tiny_model(item_head="residual"), [[3, 7, 30, 5], [12, 21], [1, 2]]
    item_ids, scores = model.recommend(histories, TOP_K, excluded_items=[4])
    path = recommend_all(model, histories, tmp_path / "out.parquet", TOP_K, batch_size=2, excluded_items=[4])
    frame = pq.read_table(path).to_pandas()
    assert frame.item_id.tolist() == model.catalogue.raw_ids(item_ids.flatten().tolist())
    assert frame.score.tolist() == pytest.approx(scores.flatten().tolist(), abs=1e-4)


class Rule:
    """Recommends the items after the newest one; it shares no code with the recommenders of the package."""

    num_items, fingerprint = NUM_ITEMS, "rule 1"

    def __init__(self, catalogue=None, shift=1):
        self.catalogue, self.shift = catalogue, shift

    def recommend(self, histories, top_k, exclude_seen, allowed_items, excluded_items):
        assert not exclude_seen and allowed_items is None and excluded_items.tolist() == [NUM_ITEMS]
        newest = [row[row > 0][-1] for row in histories]
        item_ids = [[int(item + self.shift + rank - 1) % NUM_ITEMS + 1 for rank in range(top_k)] for item in newest]
        return item_ids, [[-float(rank) for rank in range(top_k)] for _ in newest]


def test_any_object_with_the_same_recommend_recommends_to_many_users(users, tmp_path):
    settings = {"exclude_seen": False, "excluded_items": [RAW_IDS[-1]]}
    table = [("a", [3, 1]), ("b", [7])]
    frame = pq.read_table(recommend_all(Rule(catalogue()), frame_of(table), tmp_path / "rule.parquet", 3, **settings))
    assert frame["item_id"].to_pylist() == [*RAW_IDS[1:4], *RAW_IDS[7:10]]
    assert frame["score"].to_pylist() == [0, -1, -2] * 2
    ensemble = EnsembleTeacher([sasrec(), PopularityForNextItem.fit([[1, 2]], PopularityConfig(num_items=30))], [2, 1])
    known = users[1:]
    check(recommend_all(ensemble, frame_of(known), tmp_path / "ensemble.parquet", TOP_K), expected(ensemble, known))
    other = EnsembleTeacher(ensemble.members, [1, 1])
    check(recommend_all(other, frame_of(known), tmp_path / "ensemble.parquet", TOP_K), expected(other, known))
    with pytest.raises(ValueError, match="no items, and it is unknown which items are popular: leave the user out"):
        recommend_all(ensemble, frame_of(users), tmp_path / "all.parquet", TOP_K)


@pytest.mark.parametrize("filters", [{}, {"allowed_items": RAW_IDS[:20], "excluded_items": RAW_IDS[3:6]}])
def test_an_index_recommends_to_many_users(users, tmp_path, filters):
    pytest.importorskip("faiss")
    model = sasrec()
    index = ItemIndex.build(model, num_lists=4, probes=4)
    path = recommend_all(index, frame_of(users), tmp_path / "out.parquet", TOP_K, batch_size=5, **filters)
    by_id = {name: model.catalogue.item_ids(raw_ids) for name, raw_ids in filters.items()}
    check(path, expected(index, users, **by_id))
    exact = expected(model, users, **by_id)
    assert {user: items for user, (items, _) in expected(index, users, **by_id).items()} == {
        user: items for user, (items, _) in exact.items()
    }
    finished = path.stat().st_mtime_ns
    recommend_all(index, frame_of(users), path, TOP_K, batch_size=5, **filters)
    assert path.stat().st_mtime_ns == finished
    index.probes = 1
    recommend_all(index, frame_of(users), path, TOP_K, batch_size=5, **filters)
    assert path.stat().st_mtime_ns != finished


def test_an_exact_index_gives_many_users_the_items_of_its_model(users, tmp_path):
    model = sasrec()
    index = ExactItemIndex(model)
    path = recommend_all(index, frame_of(users), tmp_path / "out.parquet", TOP_K, batch_size=5)
    check(path, expected(index, users))
    finished = path.stat().st_mtime_ns
    assert {user: items for user, (items, _) in expected(index, users).items()} == {
        user: items for user, (items, _) in expected(model, users).items()
    }
    recommend_all(ExactItemIndex(model), frame_of(users), path, TOP_K, batch_size=5)
    assert path.stat().st_mtime_ns == finished
    recommend_all(model, frame_of(users), path, TOP_K, batch_size=5)  # the same items with other scores
    check(path, expected(model, users))


def test_objects_that_are_no_recommenders_are_refused_with_what_they_lack(tmp_path):
    class Other(Rule):
        def recommend(self, histories, top_k):
            return [], []

    class Wrong(Rule):
        def __init__(self, *answer):
            super().__init__()
            self.answer = answer

        def recommend(self, histories, top_k, **filters):
            return self.answer

    path = tmp_path / "out.parquet"
    message = (
        r"Other\.recommend does not take exclude_seen, allowed_items, excluded_items: expected recommend\(histories"
    )
    with pytest.raises(TypeError, match=message):
        recommend_all(Other(), [[1]], path)
    with pytest.raises(TypeError, match=r"model is a str: expected .* an ItemIndex, an EnsembleTeacher, or"):
        recommend_all("model", [[1]], path)
    with pytest.raises(ValueError, match=r"Wrong\.recommend returned item 31: expected ids 1\.\.30"):
        recommend_all(Wrong([[3, 31]], [[0.0, 0.0]]), [[1]], path, 2)
    with pytest.raises(ValueError, match=r"item ids of shape \(1, 1\) .*: expected integers \(1, 2\)"):
        recommend_all(Wrong([[3]], [[0.0]]), [[1]], path, 2)


def test_filters_of_every_form_apply_and_columns_of_the_catalogue_come_back(users, tmp_path):
    model, table = sasrec(), frame_of(users)
    allowed, left_out = list(range(5, 27)), [[7, 8] if row % 2 else [] for row in range(len(users))]
    filters = {"exclude_seen": False, "allowed_items": raw(allowed), "excluded_items": [raw(row) for row in left_out]}
    answers = {}
    for (user, items), row in zip(users, left_out, strict=True):
        settings = {"exclude_seen": False, "allowed_items": allowed, "excluded_items": row}
        answers |= expected(model, [(user, items)], **settings)
    settings = {"columns": ["title", "price"], "batch_size": 4, "shard_users": 6}
    frame = check(recommend_all(model, table, tmp_path / "out.parquet", TOP_K, **settings, **filters), answers)
    assert frame.title.tolist() == [f"Title {RAW_IDS.index(item) + 1}" for item in frame.item_id]
    assert frame.price.dropna().tolist() == [(RAW_IDS.index(i) + 1) / 2 for i in frame.item_id if i != "B03"]
    pairs = [(user, item) for (user, _), row in zip(users, left_out, strict=True) for item in raw([*row, *row])]
    pairs = pd.DataFrame(pairs[::-1], columns=["user_id", "item_id"])
    filters["excluded_items"] = pairs
    check(recommend_all(model, table, tmp_path / "pairs.parquet", TOP_K, **settings, **filters), answers)
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    filters |= {"excluded_items": tmp_path / "pairs.csv", "allowed_items": [set(raw(allowed))] * len(users)}
    check(recommend_all(model, table, tmp_path / "csv.parquet", TOP_K, **settings, **filters), answers)


def test_numbers_and_their_digits_are_the_same_raw_id(users, tmp_path):
    numbers = list(range(100, 100 + NUM_ITEMS))
    model = sasrec(numbers)
    answers = {
        int(user.removeprefix("user-")): ([numbers[RAW_IDS.index(item)] for item in items], scores)
        for user, (items, scores) in expected(model, users).items()
    }
    table = pd.DataFrame(
        {"user_id": list(answers), "history": [" ".join(str(i + 99) for i in row) for _, row in users]}
    )
    table.to_csv(tmp_path / "users.csv", index=False)
    check(recommend_all(model, tmp_path / "users.csv", tmp_path / "out.parquet", TOP_K), answers)


def test_unknown_items_of_histories_are_named_or_skipped(users, tmp_path):
    model = sasrec()
    table = frame_of(users[1:4])
    answers = expected(model, users[1:4])
    table.loc[1, "history"].insert(0, "B99")
    with pytest.raises(
        ValueError, match=r"user 'user-2' of the pandas frame: raw id 'B99' is not among the 30 items.*skip"
    ):
        recommend_all(model, table, tmp_path / "out.parquet", TOP_K)
    check(recommend_all(model, table, tmp_path / "out.parquet", TOP_K, unknown_items="skip"), answers)
    plays = pd.DataFrame({"user_id": ["a", "a"], "item_id": ["B99", "B01"]})
    with pytest.raises(ValueError, match=r"row 0 of the pandas frame .*raw id 'B99'"):
        recommend_all(model, plays, tmp_path / "plays.parquet", TOP_K, item_column="item_id")
    settings = {"item_column": "item_id", "unknown_items": "skip"}
    check(recommend_all(model, plays, tmp_path / "plays.parquet", TOP_K, **settings), expected(model, [("a", [1])]))


# --- resuming, and what the output may replace ---


def test_a_killed_run_resumes_with_its_parts_and_a_finished_one_is_left_alone(users, tmp_path, monkeypatch):
    model, table, path = sasrec(), frame_of(users), tmp_path / "out.parquet"
    settings = {"top_k": TOP_K, "batch_size": 2, "shard_users": 5}
    answer, answered = recommend_all_module.Request.answer, []

    def dies_at_the_third(self, shard, first, *rest):
        if len(answered) == 3:
            raise KeyboardInterrupt
        answered.append(first)
        return answer(self, shard, first, *rest)

    monkeypatch.setattr(recommend_all_module.Request, "answer", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        recommend_all(model, table, path, **settings)
    parts = tmp_path / "out.parquet.parts"
    names = ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "settings.json"]
    assert sorted(each.name for each in parts.iterdir()) == names and not path.exists()

    def counting(self, shard, first, *rest):
        answered.append(first)
        return answer(self, shard, first, *rest)

    monkeypatch.setattr(recommend_all_module.Request, "answer", counting)
    recommend_all(model, table, path, **settings | {"batch_size": 4})
    assert answered == [0, 5, 10, 15, 20]
    check(path, expected(model, users))
    before = path.stat()
    recommend_all(model, table, path, **settings)
    assert answered == [0, 5, 10, 15, 20] and path.stat().st_ino == before.st_ino and not parts.exists()


@pytest.mark.parametrize("change", ["model", "histories", "top_k", "exclude_seen", "excluded_items", "columns"])
def test_parts_of_another_call_are_not_mixed_in(users, tmp_path, monkeypatch, change, caplog):
    model, path = sasrec(), tmp_path / "out.parquet"
    first = {"histories": frame_of(users), "top_k": TOP_K}
    second = first | {
        "histories": {"histories": frame_of([(users[0][0], [1]), *users[1:]])},
        "top_k": {"top_k": 3},
        "exclude_seen": {"exclude_seen": False},
        "excluded_items": {"excluded_items": ["B01"]},
        "columns": {"columns": ["title"]},
    }.get(change, {})
    with monkeypatch.context() as patch:
        patch.setattr(recommend_all_module._Job, "finish", lambda self: None)  # as if it was killed before
        recommend_all(model, output=path, **first)
    if change == "model":
        with torch.no_grad():
            model.head.weight[1] += 1
    recommend_all(model, output=path, **second)
    assert f"1 parts of a run that differs in {change}: deleting them" in caplog.text
    undisturbed = recommend_all(model, output=tmp_path / "whole.parquet", **second)
    assert pq.read_table(path).equals(pq.read_table(undisturbed))
    recommend_all(model, output=path, **first)  # a finished output of other settings is replaced
    assert recommend_all_module.written_settings(path)["top_k"] == TOP_K


def test_other_files_are_not_replaced_and_a_second_writer_is_refused(users, tmp_path):
    model, table = sasrec(), frame_of(users)
    other = tmp_path / "users.parquet"
    table.to_parquet(other)
    content = other.read_bytes()
    for output in (other, tmp_path / "notes"):
        output.touch()
        with pytest.raises(ValueError, match="exists and recommend_all did not write it: choose another output"):
            recommend_all(model, other, output)
    assert other.read_bytes() == content
    with pytest.raises(ValueError, match=r"output .* is a folder: expected a file, such as .*recommendations\.parquet"):
        recommend_all(model, table, tmp_path)
    for name in ("out.csv", "out.tsv.gz", "out.jsonl"):
        with pytest.raises(ValueError, match=rf"output is .*{name}: expected a parquet file, such as .*out.*\.parquet"):
            recommend_all(model, table, tmp_path / name)
    message = rf"is in use: process {os.getpid()} on "
    with held_folder(tmp_path / "out.parquet.parts"), pytest.raises(ValueError, match=message):
        recommend_all(model, table, tmp_path / "out.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "users.parquet"]


def test_the_output_records_the_settings_that_made_it(users, tmp_path):
    path = recommend_all(sasrec(), frame_of(users), tmp_path / "out.parquet", TOP_K)
    settings = json.loads(pq.read_schema(path).metadata[b"hf_ilora.recommend_all"])
    assert settings["users"] == 23 and settings["top_k"] == TOP_K and len(settings["model"]) == 64


# --- bad input: refused before anything is computed ---


def frame(histories, users=None) -> pd.DataFrame:
    return pd.DataFrame({"user_id": list(users or range(len(histories))), "history": histories})


def pairs(user: str, items) -> pd.DataFrame:
    return pd.DataFrame({"user_id": [user] * len(items), "item_id": items})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"histories": frame([])}, "the pandas frame has no rows"),
        ({"histories": []}, "there are no histories: expected at least one row"),
        ({"histories": [[1], [31]]}, r"history 1 contains item 31: expected ids 1\.\.30"),
        ({"histories": [["B01"]]}, r"history 0 has shape \(1,\) and type <U3.*pass a table with the columns user_id"),
        ({"histories": 7}, "histories are of type int"),
        ({"histories": "nowhere.parquet"}, "there is no file nowhere.parquet"),
        ({"item_column": "item"}, "has no column 'item'"),
        ({"history_column": "seen"}, "has no column 'seen'"),
        ({"time_column": "when"}, "time_column is 'when' without item_column"),
        ({"histories": frame([3])}, "column history of .* has type int64: expected lists"),
        ({"histories": frame([["B01"]] * 3, "aba")}, "user 'a' has several rows"),
        ({"histories": frame([["B01"]] * 2, ["a", None])}, "user_id of the pandas frame has"),
        ({"top_k": 0}, "top_k is 0: expected 1 to 30"),
        ({"top_k": "3"}, "top_k is '3': expected an int, 1 to 30"),
        ({"columns": ["title", "item_id"]}, "columns contain 'item_id', which every table of recommendations has"),
        ({"columns": ["title", "price", "title"]}, "columns contain 'title' twice: expected different names"),
        ({"top_k": 31}, "top_k is 31: expected 1 to 30"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"columns": "price"}, r"columns is the string 'price': expected a list of names, such as \['price'\]"),
        ({"columns": ["prize"]}, "the catalogue has no column 'prize'"),
        ({"unknown_items": "ignore"}, "unknown_items is 'ignore': expected one of raise, skip"),
        ({"allowed_items": ["B99"]}, "allowed_items: raw id 'B99' is not among the 30 items"),
        ({"excluded_items": [["B01"], ["B99"], []]}, "row 1 of excluded_items: raw id 'B99'"),
        ({"excluded_items": [["B01"]]}, "excluded_items have 1 rows for 3 users: expected a row per user"),
        ({"excluded_items": [["B01"], "B02", 3]}, "row 1 of excluded_items is 'B02': expected a row of ids per user"),
        ({"excluded_items": pairs("a", ["B99"])}, r"excluded_items: row 0 .*raw id 'B99'"),
        ({"allowed_items": RAW_IDS[:3]}, "top_k is 4, but user 'user-1' has 0 of 30 items left to recommend"),
        ({"allowed_items": [RAW_IDS, RAW_IDS[:3], RAW_IDS]}, "user 'user-2' has 2 of 30 items left.*loosen allowed"),
        ({"excluded_items": RAW_IDS[4:]}, "top_k is 4, but user 'user-1' has 1 of 30 items left"),
        ({"allowed_items": pairs("user-1", RAW_IDS[9:18])}, "user 'user-2' has 0 of 30"),
        ({"histories": [[1]], "allowed_items": [31]}, r"allowed_items contains 31: expected ids 1\.\.30"),
        ({"histories": [[1]], "allowed_items": pairs("a", [1])}, "allowed_items are a table, and the histories rows"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(changes, message, tmp_path, monkeypatch):
    model = sasrec()
    monkeypatch.setattr(SASRecForNextItem, "recommend", lambda *_, **__: pytest.fail("the model was asked"))
    table = frame_of([("user-1", [1, 2, 3]), ("user-2", [3]), ("user-3", [4])])
    settings = {"histories": table, "top_k": TOP_K} | changes
    with pytest.raises((ValueError, OSError), match=message):
        recommend_all(model, output=tmp_path / "out.parquet", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unknown_items", ["raise", "skip"])
@pytest.mark.parametrize("text", ["['B01', 'B02']", "[B01 B02]", "B01,B02"])
def test_histories_that_are_written_as_lists_are_refused_in_csv(text, unknown_items, tmp_path):
    """Skipping unknown ids would leave nothing of them."""
    table = pd.DataFrame({"user_id": ["a", "b"], "history": ["B03", text]})
    table.to_csv(tmp_path / "users.csv", index=False)
    message = "the history of user 'b' of .*users.csv is " + re.escape(f"{text!r}: expected raw ids with blanks")
    with pytest.raises(ValueError, match=message):
        recommend_all(sasrec(), tmp_path / "users.csv", tmp_path / "out.parquet", unknown_items=unknown_items)


def test_histories_of_lists_of_lists_are_refused(tmp_path):
    (tmp_path / "users.jsonl").write_text('{"user_id": "a", "history": [["B01"], ["B02"]]}\n')
    with pytest.raises(ValueError, match=r"column history of .*jsonl has type list<.*list<.*: expected lists of ids"):
        recommend_all(sasrec(), tmp_path / "users.jsonl", tmp_path / "out.parquet")


def test_models_that_do_not_fit_are_refused(users, tmp_path):
    path, model = tmp_path / "out.parquet", sasrec()
    with pytest.raises(TypeError, match="model is a Linear: expected a recommender of hf_ilora"):
        recommend_all(torch.nn.Linear(1, 1), frame_of(users), path)
    with pytest.raises(ValueError, match="the model knows 30 items and the data set has 20"):
        recommend_all(model, cyclic_sequences(num_users=40, num_items=20), path)
    model.catalogue = Catalogue(model.catalogue.table.drop_columns("count"))
    with pytest.raises(ValueError, match="user 'user-0' has no items, and it is unknown which items are popular"):
        recommend_all(model, frame_of(users), path)
    model.catalogue = None
    with pytest.raises(ValueError, match="the pandas frame has raw ids and the model has no catalogue"):
        recommend_all(model, frame_of(users), path)
    with pytest.raises(ValueError, match="columns are title and the model has no catalogue"):
        recommend_all(model, [[1]], path, columns=["title"])
