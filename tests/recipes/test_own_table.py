"""From a user's own CSV files to titles, by the recipes of the README."""

import json
import shutil

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from hf_ilora import Catalogue, SASRecConfig, SASRecForNextItem, SequenceDatasets
from tests.recipe_runs import RecipeRun
from tests.titles.encoder_folders import save_bert

COLUMNS = {"user_column": "user", "item_column": "song", "time_column": "when"}
TITLES = {"items_item_column": "song", "items_title_column": "name", "num_candidates": 5}
COUNTS = {"max_gap": 2, "gap_decay": 0.5, "backward_weight": 0, "max_length": 2, "history_decay": 0.5}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Thirty users who each play eight of twelve songs in a row, in the order of the alphabet, from another start."""
    folder = tmp_path_factory.mktemp("tables")
    songs = [f"song-{letter}" for letter in "abcdefghijkl"]
    plays = [
        f"user-{user},{songs[(user + step) % 12]},2024-01-{step + 1:02d}" for user in range(30) for step in range(8)
    ]
    (folder / "plays.csv").write_text("\n".join(["user,song,when", *plays]) + "\n")
    (folder / "songs.csv").write_text("\n".join(["song,name", *[f'{s},"The {s}"' for s in songs]]) + "\n")
    return folder


@pytest.fixture(scope="module")
def prepared(run_recipe, tables):
    """The data set and the baselines of the tables."""
    sources = {"interactions": tables / "plays.csv", "items": tables / "songs.csv"}
    run_recipe("prepare_data", output_dir=tables / "data", **sources, **COLUMNS, **TITLES)
    run_recipe("fit_counts", data_dir=tables / "data", output_dir=tables / "counts", **COUNTS)
    return tables


def test_preparing_is_on_record_beside_the_data(prepared):
    assert RecipeRun(prepared / "data_run").record["status"] == "finished"


def test_out_of_core_the_same_data_set_is_prepared_and_no_temporary_file_is_left(prepared, run_recipe, tmp_path):
    plays = pa.csv.read_csv(prepared / "plays.csv")
    (tmp_path / "plays").mkdir()
    for part, first in enumerate((0, 100)):
        pq.write_table(plays.slice(first, 100 if part == 0 else None), tmp_path / "plays" / f"part-{part}.parquet")
    sources = {"interactions": tmp_path / "plays", "items": prepared / "songs.csv", "work_dir": tmp_path / "work"}
    run_recipe("prepare_data", output_dir=tmp_path / "data", **sources, **COLUMNS, **TITLES)
    expected = SequenceDatasets.load(prepared / "data").fingerprint
    assert SequenceDatasets.load(tmp_path / "data").fingerprint == expected
    assert list((tmp_path / "work").iterdir()) == []


def test_a_work_folder_is_for_own_tables(run_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"work_dir is .* without interactions: expected --interactions"):
        run_recipe("prepare_data", movielens="ml-100k", work_dir=tmp_path, output_dir=tmp_path / "data")


def test_a_history_becomes_recommendations_in_titles(prepared, run_recipe, capsys):
    model = prepared / "counts" / "transition_counts"
    run_recipe("recommend", model=model, history=["song-c", "song-d"], top_k=2)
    assert "1. The song-e" in capsys.readouterr().out


def test_a_user_of_the_data_becomes_recommendations_in_titles(prepared, run_recipe, capsys):
    model = prepared / "counts" / "transition_counts"
    run_recipe("recommend", model=model, data_dir=prepared / "data", user="user-0", top_k=1)
    printed = capsys.readouterr().out
    assert "The song-h" in printed and "1. The song-i" in printed  # user-0 ended with song-h


def test_a_new_user_gets_popular_items(prepared, run_recipe, capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(prepared / "counts" / "transition_counts", model)
    run_recipe("recommend", model=model, top_k=3)
    printed = capsys.readouterr().out
    assert "Popular, since there is no history:" in printed and "3. The song-" in printed


def test_models_without_counts_need_the_data_for_popular_items(prepared, run_recipe, capsys, tmp_path):
    sequences = SequenceDatasets.load(prepared / "data")
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8))
    model.catalogue = Catalogue(sequences.catalogue.table.drop_columns("count"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="so it knows no popular items: pass --data_dir, or --user"):
        run_recipe("recommend", model=tmp_path / "model")
    run_recipe("recommend", model=tmp_path / "model", data_dir=prepared / "data", top_k=1)
    most = sequences.catalogue.titles([int(sequences.catalogue.counts.argmax())])[0]
    assert f"1. {most}  (" in capsys.readouterr().out


def test_liked_titles_become_recommendations(prepared, run_recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    settings = {"model": prepared / "counts" / "transition_counts", "title_encoder": save_bert(tmp_path / "bert")}
    run_recipe("recommend", liked=["the SONG-c", "The song-d"], top_k=2, **settings)
    printed = capsys.readouterr().out
    assert "1. The song-e" in printed and "The newest of 2 items" in printed
    run_recipe("recommend", liked="anything with a piano", top_k=2, **settings)
    assert "The newest of 5 items" in capsys.readouterr().out


def test_a_title_does_not_drive_the_terminal(prepared, run_recipe, capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(prepared / "counts" / "transition_counts", model)
    table = pq.read_table(model / "items.parquet")
    titles = pa.array(["\x1b[31mred\n\u202e\x07"] * len(table))
    pq.write_table(table.set_column(table.column_names.index("title"), "title", titles), model / "items.parquet")
    run_recipe("recommend", model=model, history=["song-c ", "song-d"], top_k=1)
    printed = capsys.readouterr().out
    assert r"1. \x1b[31mred\n\u202e\x07  (" in printed
    assert not set(printed) & set("\x1b\u202e\x07")


def test_a_public_data_set_is_prepared_by_its_name(run_recipe, tmp_path):
    reviews = [
        {"user_id": f"u{user}", "business_id": f"b{step}", "stars": 1 + 4 * (step < 9), "date": f"2020-01-{day:02d}"}
        for user in range(12)
        for step, day in enumerate(range(user + 1, user + 11))
    ]
    businesses = [{"business_id": f"b{step}", "name": f"Bar {step}", "categories": None} for step in range(10)]
    for name, rows in (("review", reviews), ("business", businesses)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"yelp_academic_dataset_{name}.json").write_text(lines)
    settings = {"dataset": "yelp", "path": tmp_path, "min_rating": 2, "protocol": "global_time", "num_candidates": 0}
    moments = {"validation_start": "2020-01-10", "test_start": "2020-01-15"}
    run_recipe("prepare_data", output_dir=tmp_path / "data", **settings, **moments)
    sequences = SequenceDatasets.load(tmp_path / "data")
    assert sequences.num_items == 9 and sequences.catalogue.titles([1, 9]) == ["Bar 0", "Bar 8"]
    # User u reviews on the days u + 1 to u + 9, those of two stars or more.
    assert sequences["test"].to_dict() == {
        "user_id": ["u10", "u11", "u6", "u7", "u8", "u9"],
        "history": [[1, 2, 3, 4], [1, 2, 3], *([*range(1, 15 - user)] for user in (6, 7, 8, 9))],
        "target": [5, 4, 9, 8, 7, 6],
        "relevant_items": [[*range(5, 10)], [*range(4, 10)], [9], [8, 9], [7, 8, 9], [6, 7, 8, 9]],
    }


OWN = {"interactions": "{tables}/plays.csv", **COLUMNS}
POPULARITY = {"model": "{tables}/counts/popularity"}


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("prepare_data", {}, "expected exactly one"),
        ("prepare_data", OWN | {"movielens": "ml-100k"}, "expected exactly one"),
        ("prepare_data", OWN | {"interactions": "nowhere.csv"}, "nowhere.csv"),
        ("prepare_data", OWN | {"user_column": "usr"}, "usr"),
        ("prepare_data", OWN | {"min_rating": 3}, "pass --rating_column"),
        ("prepare_data", {"dataset": "steam"}, "dataset is 'steam' and path is None: expected both"),
        ("prepare_data", {"dataset": "steam", "path": ".", "min_rating": 3}, "steam, which has no ratings"),
        ("prepare_data", {"dataset": "steam", "path": "nowhere"}, "path nowhere does not exist"),
        ("recommend", POPULARITY | {"history": "song-a", "shown": 0}, "shown is 0"),
        ("recommend", {"model": "nowhere", "history": "song-a"}, "nowhere"),
        ("recommend", POPULARITY | {"user": "user-0"}, "--user is given without --data_dir"),
        ("recommend", POPULARITY | {"history": "song-a", "liked": "x"}, "--history and --liked are given"),
        ("recommend", POPULARITY | {"history": "song-z"}, "song-z"),
        ("recommend", POPULARITY | {"data_dir": "{tables}/data", "user": "nobody"}, "nobody"),
    ],
)
def test_bad_input_names_what_is_wrong(prepared, run_recipe, recipe, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if recipe == "prepare_data":
        settings = settings | {"output_dir": "data"}
    filled = {name: str(value).format(tables=prepared) for name, value in settings.items()}
    with pytest.raises((ValueError, OSError)) as raised:
        run_recipe(recipe, **filled)
    assert message in str(raised.value)
    assert not (tmp_path / "data").exists()
