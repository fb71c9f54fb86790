"""recipes/recommend.py: filters, forms of printing, similar items, and recommendations to many users."""

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from hf_ilora import PopularityConfig, PopularityForNextItem, TransitionCountsConfig, TransitionCountsForNextItem
from hf_ilora_cli import launching
from hf_ilora_cli import main as command
from tests.synthetic import cyclic_sequences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Users who walk through 12 items (raw ids 100 to 111), counts of what follows what, and prices."""
    folder = tmp_path_factory.mktemp("users")
    sequences = cyclic_sequences(num_users=30, num_items=12, length=6)
    sequences.save(folder / "data")
    rows = [[*row["history"], row["target"]] for row in sequences["train"]]
    model = TransitionCountsForNextItem.fit(rows, TransitionCountsConfig(num_items=12, max_gap=1, backward_weight=0))
    model.catalogue = sequences.catalogue.with_columns({"price": [item / 2 for item in range(12)]})
    model.save_pretrained(folder / "model")
    popularity = PopularityForNextItem.fit(rows, PopularityConfig(num_items=12))
    popularity.catalogue = sequences.catalogue
    popularity.save_pretrained(folder / "popularity")
    walk = pd.DataFrame({"who": ["a", "a", "b"], "what": [103, 104, 107], "when": [2, 3, 1]})
    walk.to_csv(folder / "walk.csv", index=False)
    return folder


def test_one_user_gets_filtered_items_with_their_prices(folder, run_recipe, capsys):
    settings = {"model": folder / "model", "history": ["103", "104"], "top_k": 2}
    run_recipe("recommend", **settings)
    assert "Title 105  (" in capsys.readouterr().out
    run_recipe("recommend", **settings, allowed_items=[105, 106, 110], excluded_items=[105])
    printed = capsys.readouterr().out
    assert "1. Title 106  (" in printed and "2. Title 110  (" in printed and "Title 105" not in printed
    assert printed.splitlines()[-1].endswith("price 5")


def test_one_user_is_answered_as_json_and_as_a_table(folder, run_recipe, capsys):
    settings = {"model": folder / "model", "data_dir": folder / "data", "user": 3, "top_k": 2}
    run_recipe("recommend", **settings, format="json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["user_id"] == "3" and [item["rank"] for item in answer["recommendations"]] == [1, 2]
    first = answer["recommendations"][0]
    assert list(first) == ["rank", "item_id", "score", "title", "price"]
    assert first["title"] == f"Title {first['item_id']}" and first["price"] == (first["item_id"] - 100) / 2
    run_recipe("recommend", **settings, format="table", columns="title")
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["user_id", "rank", "item_id", "score", "title"]
    assert [row.split("\t")[1:3] for row in rows] == [
        [str(item["rank"]), str(item["item_id"])] for item in answer["recommendations"]
    ]


@pytest.mark.parametrize(("protocol", "user"), [("last_n", 3), ("temporal_users", 0)])
def test_one_user_of_a_data_set_gets_what_that_user_gets_among_all(protocol, user, run_recipe, capsys, tmp_path):
    """Also with several targets, and a user of the training split alone."""
    sequences = cyclic_sequences(num_users=30, protocol=protocol)
    assert (user in sequences["test"]["user_id"][:]) == (protocol == "last_n")
    sequences.save(tmp_path / "data")
    model = PopularityForNextItem.fit([list(range(1, 31))], PopularityConfig(num_items=30))
    model.catalogue = sequences.catalogue
    model.save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "data_dir": tmp_path / "data", "top_k": 10}
    run_recipe("recommend", **settings, all_users=True, output=tmp_path / "all.parquet")
    frame = pq.read_table(tmp_path / "all.parquet").to_pandas()
    capsys.readouterr()
    run_recipe("recommend", **settings, user=user, format="json")
    answer = json.loads(capsys.readouterr().out)["recommendations"]
    assert [item["item_id"] for item in answer] == frame[frame.user_id == user].item_id.tolist()


def test_similar_items_of_each_item_are_printed(folder, run_recipe, capsys):
    run_recipe("recommend", model=folder / "model", similar_to=[103, 110], top_k=2)
    printed = capsys.readouterr().out
    assert printed.startswith("Similar to Title 103:\n  1. Title 10") and "Similar to Title 110:\n" in printed
    run_recipe("recommend", model=folder / "model", similar_to=103, top_k=1, format="json", allowed_items=[105, 109])
    answer = json.loads(capsys.readouterr().out)
    assert answer["similar_to"] == 103 and answer["recommendations"][0]["item_id"] == 105


@pytest.mark.parametrize("output_form", ["json", "titles", "file"])
def test_users_of_a_table_get_what_each_gets_alone(folder, run_recipe, capsys, tmp_path, output_form):
    settings = {"model": folder / "model", "table": folder / "walk.csv", "top_k": 2, "excluded_items": 111}
    settings |= {"user_column": "who", "item_column": "what", "time_column": "when"}
    expected = {}
    for user, history in (("a", [103, 104]), ("b", [107])):
        run_recipe("recommend", model=folder / "model", history=history, top_k=2, format="json", excluded_items=111)
        expected[user] = json.loads(capsys.readouterr().out)["recommendations"]
    if output_form == "file":
        run_recipe("recommend", **settings, output=tmp_path / "out.parquet")
        assert str(tmp_path / "out.parquet") in capsys.readouterr().out
        frame = pq.read_table(tmp_path / "out.parquet").to_pandas()
        assert frame.user_id.tolist() == ["a", "a", "b", "b"]
        assert frame.item_id.tolist() == [item["item_id"] for user in "ab" for item in expected[user]]
        return
    run_recipe("recommend", **settings, format=output_form)
    lines = capsys.readouterr().out.splitlines()
    if output_form == "titles":
        assert [line for line in lines if not line.startswith(" ")] == ["Recommended to a:", "Recommended to b:"]
        assert f"  1. {expected['b'][0]['title']}  (" in lines[4]
    else:
        assert [json.loads(line)["user_id"] for line in lines] == ["a", "b"]
        for line, items in zip(lines, expected.values(), strict=True):
            found = json.loads(line)["recommendations"]
            assert [item["item_id"] for item in found] == [item["item_id"] for item in items]


def test_all_users_of_a_data_set_are_answered_without_the_excluded_items(folder, run_recipe, tmp_path):
    pd.DataFrame({"user_id": [0, 1], "item_id": [100, 101]}).to_csv(tmp_path / "bought.csv", index=False)
    settings = {"data_dir": folder / "data", "all_users": True, "top_k": 5, "exclude_seen": False}
    output = tmp_path / "out.parquet"
    run_recipe("recommend", model=folder / "popularity", **settings, output=output)
    best = pq.read_table(output).to_pandas()
    assert sorted(best.user_id.unique()) == list(range(30)) and len(best) == 150
    assert best.groupby("rank").item_id.nunique().tolist() == [1] * 5  # popularity is the same for all
    out = tmp_path / "without.parquet"
    run_recipe("recommend", model=folder / "popularity", **settings, excluded_table=tmp_path / "bought.csv", output=out)
    frame = pq.read_table(out).to_pandas().set_index("user_id").item_id
    assert 100 not in frame[0].tolist() and 101 not in frame[1].tolist()
    assert frame[2].tolist() == best[best.user_id == 2].item_id.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "walk.csv", "history": 100}, "--history is given with many users"),
        ({"all_users": True}, "--all_users is given without --data_dir"),
        ({"all_users": True, "table": "walk.csv"}, "--all_users and --table are given"),
        ({"output": "out.parquet"}, "--output is given for one user: expected it with --table"),
        ({"history": 100, "excluded_items": 99}, "raw id 99 is not among the 12 items of the catalogue: leave"),
        ({"history": "x"}, "raw id 'x' is not among the 12 items .*: expected integers such as"),
        ({"table": "walk.csv", "output": "out.csv"}, r"output is out\.csv: expected a parquet file, such as out\.parq"),
        ({"history": 100, "columns": "prize"}, "the catalogue has no column 'prize'"),
        ({"history": 100, "columns": ["title", "title"]}, "columns contain 'title' twice"),
        ({"history": 100, "allowed_items": [101, 102], "top_k": 3}, "top_k is 3, but row 0 has 2 of 12 items left"),
        ({"table": "walk.csv", "excluded_items": 100, "excluded_table": "x"}, "--excluded_items and --excluded_table"),
        ({"table": "walk.csv", "item_column": "song"}, "has no column 'user_id'"),
        ({"table": "nowhere.csv"}, "there is no file nowhere.csv"),
    ],
)
def test_bad_input_names_what_is_wrong(folder, run_recipe, settings, message, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, OSError), match=message):
        run_recipe("recommend", model="model", **settings)


@pytest.mark.parametrize(
    ("words", "launched"), [(["--num_processes", "2"], True), (["--launch=cpu"], True), ([], False)]
)
def test_the_command_uses_the_launcher_if_a_launch_option_is_given(words, launched, monkeypatch):
    calls = []
    monkeypatch.setenv(command.PROGRAM_VARIABLE, "")  # set by start for the recipe, and unset again after this test
    monkeypatch.setattr(launching, "launch_words", lambda recipe, options: calls.append("launched") or 0)
    monkeypatch.setattr(command, "run_recipe", lambda recipe, options: calls.append("run"))
    command.start(command.COMMANDS["recommend"], ["--model", "m", *words])
    assert calls == ["launched" if launched else "run"]
