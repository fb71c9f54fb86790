"""recipes/run_pipeline.py: stages run in order, are skipped when nothing has changed, and go on after a failure."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_ilora.runs.pipeline import Stage, read_stages
from tests.paths import RECIPES

RATINGS = "user,item,when,name\n" + "".join(
    f"{user},{item},{when},Title {item}\n"
    for user in range(12)
    for when, item in enumerate(range(user % 4, user % 4 + 8))
)

pytestmark = pytest.mark.slow


@pytest.fixture
def pipeline(tmp_path):
    """Writes a pipeline of two stages, with changes and added ones, and runs it; gives what it printed."""
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

    def run(*options, added=None, **changes):
        stages.update(added or {})
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

    changed = pipeline(counts={"max_gap": [2]})
    assert "data: nothing has changed" in changed.stderr and "counts begins" in changed.stderr

    both = pipeline(data={"min_user_interactions": 4})
    assert both.returncode == 0 and "nothing has changed" not in both.stderr  # what reads it runs again, too

    forced = pipeline("--force", "counts")
    assert "data: nothing has changed" in forced.stderr and "counts begins" in forced.stderr
    assert "stage 1 of 1, data: nothing has changed" in pipeline("--only", "data").stderr


def test_a_failed_stage_is_named_and_run_again(pipeline, tmp_path):
    failed = pipeline(counts={"max_gap": [-1]})
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    stage, whole = failed.stderr.splitlines()[-2:]
    assert stage.startswith("run_pipeline.py (counts): error: ") and "max_gap" in stage
    assert whole.startswith("run_pipeline.py: error: stage 2 of 2, counts, failed with exit code 2; its log is ")
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert (state["data"]["status"], state["counts"]["status"]) == ("finished", "started")
    mended = pipeline(counts={"max_gap": [2]})
    assert mended.returncode == 0 and "data: nothing has changed" in mended.stderr


def test_a_stage_whose_run_had_finished_when_the_pipeline_was_killed_is_not_started_again(pipeline, tmp_path):
    """A recipe that resumes refuses the folder of a finished run, so the pipeline would fail for good."""
    options = {
        "data_dir": "{output_dir}/data", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_length": 8, "num_train_epochs": 1, "early_stopping_patience": 0, "use_cpu": True,
    }  # fmt: skip
    sasrec = {"recipe": "train_sasrec.py", "reads": ["data"], "options": options, "resumes": True}
    state_file, record = tmp_path / "out" / "pipeline.json", tmp_path / "out" / "sasrec" / "run.json"

    def kill_before_the_note():
        state = json.loads(state_file.read_text())
        state["sasrec"]["status"] = "started"
        state_file.write_text(json.dumps(state))

    first = pipeline("--only", "sasrec", added={"sasrec": sasrec})
    assert first.returncode == 0, first.stderr
    written = record.read_text()
    kill_before_the_note()
    again = pipeline("--only", "sasrec")
    assert again.returncode == 0, again.stderr
    assert "sasrec: its run.json says that it is finished, noted" in again.stderr
    assert record.read_text() == written
    assert json.loads(state_file.read_text())["sasrec"]["status"] == "finished"

    kill_before_the_note()
    forced = pipeline("--only", "sasrec", "--force", "sasrec")
    assert forced.returncode == 0, forced.stderr
    assert record.read_text() != written


def test_a_key_changes_with_all_that_the_settings_name_but_for_the_pipelines_own_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["ratings.csv", "items.csv", "first.json", "model/weights", "model/deep/more", "overridden.csv"]
    for name in [*names, "out/data/table", "unnamed.csv"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("1")
    config = {"interactions": "ratings.csv", "items": ["items.csv"], "titles": "overridden.csv", "output_dir": "model"}
    Path("data.yaml").write_text(yaml.safe_dump(config))
    options = {
        "titles": "{output_dir}/data/table", "results": ["{output_dir}/data", "first.json"], "separator": "/",
        "split": ".", "empty": "", "prompt": "long " * 1000, "number": 3,
    }  # fmt: skip

    def key(**more):
        stage = Stage("data", "prepare_data.py", options | more, config="data.yaml")
        return stage.key([], Path("out"))

    for name in ("ratings.csv", "items.csv", "first.json", "data.yaml"):
        before = key()
        Path(name).write_text(Path(name).read_text() + "\n")
        assert key() != before, name
    before = key()
    for name in ("overridden.csv", "out/data/table", "unnamed.csv", "model/weights"):  # the last by output_dir alone
        Path(name).write_text("another")
        assert key() == before, name

    for name in ("model/weights", "model/deep/more"):
        before = key(model="model")
        os.utime(name, (0, 0))
        assert key(model="model") != before, name
    before = key(model="model")
    Path("model/new").write_text("1")
    assert key(model="model") != before


def test_an_edit_of_the_source_is_told_and_does_not_throw_a_finished_stage_away(pipeline, tmp_path):
    assert pipeline("--only", "data").returncode == 0
    state_file = tmp_path / "out" / "pipeline.json"
    state = json.loads(state_file.read_text())
    assert "data: the source of hf_ilora" not in pipeline("--only", "data").stderr
    state["data"]["source"] = "another"
    state_file.write_text(json.dumps(state))
    again = pipeline("--only", "data").stderr
    assert "data: nothing has changed" in again
    assert "data: the source of hf_ilora has changed; --force data runs it again" in again


def test_config_that_holds_no_settings_is_refused_before_anything_runs(tmp_path):
    config = tmp_path / "data.yaml"
    for text, message in (("- a list", "expected lines of `field: value`"), ("a: [", "is not valid YAML")):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_stages({"data": {"recipe": "prepare_data.py", "config": str(config)}})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"recipe": "nothing.py"}, "stage counts: recipe nothing.py not found: expected .* shipped "),
        ({"recipe": "fit_counts.py", "config": "ml-100k/dato"}, "configuration ml-100k/dato not found"),
        ({"recipe": "fit_counts.py", "launch": "cpus"}, "accelerate configuration cpus not found"),
        ({"recipe": "fit_counts.py", "options": {"max_gaps": 1}}, "unknown key 'max_gaps': did you mean max_gap"),
        ({"recipe": "fit_counts.py", "options": {"batch_size": "many"}}, "batch_size expects int, found 'many'"),
        ({"recipe": "fit_counts.py", "reads": ["later"]}, "reads later: expected an earlier one of data"),
        ({"recipe": "fit_counts.py", "option": {}}, "stage counts: unknown key 'option': did you mean options"),
        ({"options": {}}, "expected settings with a recipe"),
    ],
)
def test_stages_that_cannot_run_are_refused_before_anything_runs(tmp_path, stage, message):
    file = tmp_path / "pipeline.yaml"
    stages = {"data": {"recipe": "prepare_data.py"}, "counts": stage}
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
    command = [sys.executable, str(RECIPES / "run_pipeline.py"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RECIPES.parent)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert re.search(message, result.stderr)


def test_set_overrides_options_and_is_checked_before_anything_runs():
    stages = {
        "data": {"recipe": "prepare_data.py", "options": {"movielens": "ml-100k"}},
        "counts": {"recipe": "fit_counts"},
    }
    data, counts = read_stages(stages, ["counts.max_gap=[5, 2]", "data.min_rating=3.5", "data.movielens=ml-1m"])
    assert data.options == {"movielens": "ml-1m", "min_rating": 3.5}
    assert counts.options == {"max_gap": [5, 2]}
    for override, message in (
        ("count.max_gap=[5]", "there is no stage count: expected one of data, counts"),
        ("counts.max_gas=[5]", "stage counts: options: unknown key 'max_gas': did you mean max_gap"),
        ("counts.max_gap=5", r"max_gap expects list\[int\], found 5 \(int\): put brackets around it, as in \[5\]"),
        ("counts=5", "expected stage.option=value, such as sasrec.max_steps=20"),
        ("counts.max_gap", "expected stage.option=value"),
        ("data.movielens=ml-2m", "movielens expects one of ml-100k, .*, found 'ml-2m'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stages(stages, [override])


def test_shipped_names_are_resolved_and_their_content_counts_in_the_key(tmp_path, monkeypatch):
    """The key is the same wherever the package is installed."""
    monkeypatch.chdir(tmp_path)
    stage = Stage("ilora", "train_ilora.py", {"prompt_file": "movies"}, config="ml-100k/ilora", launch="cpu")
    before = stage.key([], Path("out"))
    root = tmp_path / "elsewhere"
    for folder in ("recipes", "accelerate_configs"):
        shutil.copytree(RECIPES.parent / folder, root / folder)
    monkeypatch.setattr("hf_ilora_cli.shipped.shipped_folder", lambda kind: root / kind.folder)
    monkeypatch.setattr("hf_ilora.runs.pipeline.shipped_folder", lambda kind: root / kind.folder)
    assert stage.key([], Path("out")) == before
    for name in ("recipes/prompts/movies.txt", "recipes/configs/ml-100k/ilora.yaml", "accelerate_configs/cpu.yaml"):
        before = stage.key([], Path("out"))
        (root / name).write_text((root / name).read_text() + "\n# another\n")
        assert stage.key([], Path("out")) != before, name


def test_a_launched_stage_is_started_with_its_options():
    stage = Stage("sasrec", "train_sasrec.py", {"seed": 2, "bf16": False}, config="ml-100k/quickstart", launch="cpu")
    assert stage.command(Path("out"))[1:] == [
        "-m", "hf_ilora_cli.launch_recipe", str(RECIPES / "train_sasrec.py"), "--launch", "cpu",
        "--config", "ml-100k/quickstart", "--seed", "2", "--bf16", "false", "--output_dir", "out/sasrec",
    ]  # fmt: skip


def test_the_pipeline_prints_the_table_of_its_evaluation(pipeline, tmp_path):
    options = {
        "data_dir": "{output_dir}/data", "models": ["{output_dir}/counts/popularity"], "names": ["popularity"],
        "latency_calls": 2, "num_resamples": 10,
    }  # fmt: skip
    added = {"evaluation": {"recipe": "evaluate_models.py", "reads": ["data", "counts"], "options": options}}
    result = pipeline(added=added, counts={"max_rounds": 1})
    assert result.returncode == 0, result.stderr
    assert "| popularity |" in result.stdout
    assert result.stdout.strip() == (tmp_path / "out" / "evaluation" / "results.md").read_text().strip()
