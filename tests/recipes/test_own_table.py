"""From a user's own CSV files to titles, by the commands of the README."""

import json
import subprocess
import sys

import pytest

from tests.paths import RECIPES

pytestmark = pytest.mark.slow


def run(recipe, *options):
    command = [sys.executable, str(RECIPES / recipe), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


COLUMNS = ["--user_column", "user", "--item_column", "song", "--time_column", "when"]
OWN = ["--output_dir", "x", "--interactions", "{plays}"]
TITLES = ["--items_item_column", "song", "--items_title_column", "name", "--num_candidates", 5]


@pytest.fixture(scope="module")
def data_dir(tables):
    folder = tables / "data"
    sources = ["--interactions", tables / "plays.csv", "--items", tables / "songs.csv"]
    result = run("prepare_data.py", *sources, *COLUMNS, *TITLES, "--output_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_own_table_becomes_recommendations_in_titles(tables, data_dir):
    assert json.loads((tables / "data_run" / "run.json").read_text())["status"] == "finished"
    counts = tables / "counts"
    small = ["--max_gap", 2, "--gap_decay", 0.5, "--backward_weight", 0, "--max_length", 2, "--history_decay", 0.5]
    result = run("fit_counts.py", "--data_dir", data_dir, "--output_dir", counts, *small)
    assert result.returncode == 0, result.stderr
    result = run("recommend.py", "--model", counts / "transition_counts", "--history", "song-c", "song-d", "--top_k", 2)
    assert result.returncode == 0, result.stderr
    assert "1. The song-e" in result.stdout
    by_user = ["--data_dir", data_dir, "--user", "user-0", "--top_k", 1]
    result = run("recommend.py", "--model", counts / "transition_counts", *by_user)
    assert result.returncode == 0, result.stderr
    assert "The song-h" in result.stdout and "1. The song-i" in result.stdout  # user-0 ended with song-h


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("prepare_data.py", ["--output_dir", "x"], "expected exactly one"),
        ("prepare_data.py", ["--output_dir", "x", "--interactions", "nowhere.csv", *COLUMNS], "nowhere.csv"),
        ("prepare_data.py", [*OWN, *COLUMNS, "--user_column", "usr"], "usr"),
        ("prepare_data.py", [*OWN, *COLUMNS, "--min_rating", 3], "min_rating"),
        ("recommend.py", ["--model", "{counts}", "--history", "song-a", "--shown", 0], "shown is 0"),
        ("recommend.py", ["--model", "nowhere", "--history", "song-a"], "nowhere"),
        ("recommend.py", ["--model", "{counts}"], "--history"),
        ("recommend.py", ["--model", "{counts}", "--history", "song-z"], "song-z"),
        ("recommend.py", ["--model", "{counts}", "--data_dir", "{data}", "--user", "nobody"], "nobody"),
    ],
)  # fmt: skip
def test_bad_input_names_what_is_wrong(tables, data_dir, recipe, options, message, tmp_path):
    places = {"plays": tables / "plays.csv", "counts": tables / "counts" / "popularity", "data": data_dir}
    command = [sys.executable, str(RECIPES / recipe), *[str(option).format(**places) for option in options]]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode != 0 and message in result.stderr
