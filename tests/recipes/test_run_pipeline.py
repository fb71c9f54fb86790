"""recipes/run_pipeline.py: stages run in order, are skipped when nothing has changed, and go on after a failure."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RATINGS = "user,item,when,name\n" + "".join(
    f"{user},{item},{when},Title {item}\n"
    for user in range(12)
    for when, item in enumerate(range(user % 4, user % 4 + 8))
)

pytestmark = pytest.mark.slow


@pytest.fixture
def pipeline(tmp_path):
    """Writes a pipeline of two stages, with changes, and runs it; gives what it printed."""
    (tmp_path / "ratings.csv").write_text(RATINGS)
    stages = {
        "data": {
            "recipe": "prepare_data.py",
            "options": {
                "interactions": str(tmp_path / "ratings.csv"), "user_column": "user", "item_column": "item",
                "time_column": "when", "title_column": "name", "num_candidates": 3,
            },
        },
        "counts": {"recipe": "fit_counts.py", "reads": ["data"], "options": {"data_dir": "{output_dir}/data"}},
    }  # fmt: skip

    def run(*options, **changes):
        for name, changed in changes.items():
            stages[name]["options"] |= changed
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
        command = [sys.executable, str(RECIPES / "run_pipeline.py"), str(file), *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=RECIPES.parent)

    return run


def test_stages_are_skipped_until_something_changes(pipeline, tmp_path):
    first = pipeline()
    assert first.returncode == 0, first.stderr
    assert "stage 1 of 2, data begins" in first.stderr and "all 2 stages are done" in first.stderr
    assert (tmp_path / "out" / "counts" / "popularity" / "config.json").is_file()

    again = pipeline()
    assert again.stderr.count("nothing has changed since it was finished, skipped") == 2

    changed = pipeline(counts={"max_gap": 2})
    assert "data: nothing has changed" in changed.stderr and "counts begins" in changed.stderr

    both = pipeline(data={"min_user_interactions": 4})
    assert both.returncode == 0 and "nothing has changed" not in both.stderr  # what reads it runs again, too

    forced = pipeline("--force", "counts")
    assert "data: nothing has changed" in forced.stderr and "counts begins" in forced.stderr
    assert "stage 1 of 1, data: nothing has changed" in pipeline("--only", "data").stderr


def test_a_failed_stage_is_named_and_run_again(pipeline, tmp_path):
    failed = pipeline(counts={"max_gap": -1})
    assert failed.returncode != 0
    assert "stage 2 of 2, counts failed with exit code" in failed.stderr
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert (state["data"]["status"], state["counts"]["status"]) == ("finished", "started")
    mended = pipeline(counts={"max_gap": 2})
    assert mended.returncode == 0 and "data: nothing has changed" in mended.stderr


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"recipe": "nothing.py"}, "names .*nothing.py, which is no file"),
        ({"recipe": "fit_counts.py", "reads": ["later"]}, "reads later: expected an earlier one of data"),
        ({"recipe": "fit_counts.py", "option": {}}, "expected recipe, and any of recipe, options"),
        ({"options": {}}, "expected recipe"),
    ],
)
def test_stages_that_cannot_run_are_refused_before_anything_runs(tmp_path, stage, message):
    file = tmp_path / "pipeline.yaml"
    stages = {"data": {"recipe": "prepare_data.py"}, "counts": stage}
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
    command = [sys.executable, str(RECIPES / "run_pipeline.py"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RECIPES.parent)
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert re.search(message, result.stderr)
