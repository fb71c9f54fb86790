"""recipes/run_pipeline.py: stages run in order, are skipped when nothing has changed, and resume after a failure."""

import json

import pytest
import yaml

RATINGS = "user,item,when,name\n" + "".join(
    f"{user},{item},{when},Title {item}\n"
    for user in range(12)
    for when, item in enumerate(range(user % 4, user % 4 + 8))
)


@pytest.fixture
def pipeline(start_recipe, tmp_path):
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

    def run(only=None, force=None, added=None, **changes):
        stages.update(added or {})
        for name, changed in changes.items():
            stages[name]["options"] |= changed
        file = tmp_path / "pipeline.yaml"
        file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
        return start_recipe("run_pipeline", config=file, only=only, force=force)

    return run


@pytest.mark.slow
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

    forced = pipeline(force="counts")
    assert "data: nothing has changed" in forced.stderr and "counts begins" in forced.stderr
    assert "stage 1 of 1, data: nothing has changed" in pipeline(only="data").stderr


@pytest.mark.slow
def test_a_failed_stage_is_named_and_run_again(pipeline, tmp_path):
    failed = pipeline(counts={"max_gap": [-1]})
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    stage, whole = failed.stderr.splitlines()[-2:]
    assert stage.startswith("run_pipeline.py (counts): error: ") and "max_gap" in stage
    assert whole.startswith("run_pipeline.py: error: stage 2 of 2, counts, failed with exit code 2; its log is ")
    state = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert (state["data"]["status"], state["counts"]["status"]) == ("finished", "started")
    fixed = pipeline(counts={"max_gap": [2]})
    assert fixed.returncode == 0 and "data: nothing has changed" in fixed.stderr


@pytest.mark.slow
def test_a_stage_whose_run_had_finished_when_the_pipeline_was_killed_is_not_started_again(pipeline, tmp_path):
    """A recipe that resumes refuses the folder of a finished run, so the pipeline would fail for good."""
    options = {
        "data_dir": "{output_dir}/data", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_length": 8, "num_train_epochs": 1, "early_stopping_patience": 0, "use_cpu": True,
        "initial_items": "random",
    }  # fmt: skip
    sasrec = {"recipe": "train_sasrec.py", "reads": ["data"], "options": options, "resumes": True}
    state_file, record = tmp_path / "out" / "pipeline.json", tmp_path / "out" / "sasrec" / "run.json"

    def kill_before_the_note():
        state = json.loads(state_file.read_text())
        state["sasrec"]["status"] = "started"
        state_file.write_text(json.dumps(state))

    first = pipeline(only="sasrec", added={"sasrec": sasrec})
    assert first.returncode == 0, first.stderr
    written = record.read_text()
    kill_before_the_note()
    again = pipeline(only="sasrec")
    assert again.returncode == 0, again.stderr
    assert "sasrec: its run.json says that it is finished, noted" in again.stderr
    assert record.read_text() == written
    assert json.loads(state_file.read_text())["sasrec"]["status"] == "finished"

    kill_before_the_note()
    forced = pipeline(only="sasrec", force="sasrec")
    assert forced.returncode == 0, forced.stderr
    assert record.read_text() != written


@pytest.mark.slow
def test_an_edit_of_the_source_is_reported_and_keeps_finished_stages(pipeline, tmp_path):
    assert pipeline(only="data").returncode == 0
    state_file = tmp_path / "out" / "pipeline.json"
    state = json.loads(state_file.read_text())
    assert "data: the source of hf_ilora" not in pipeline(only="data").stderr
    state["data"]["source"] = "another"
    state_file.write_text(json.dumps(state))
    again = pipeline(only="data").stderr
    assert "data: nothing has changed" in again
    assert "data: the source of hf_ilora has changed; --force data runs it again" in again


def test_stages_that_cannot_run_are_refused_before_anything_runs(run_recipe, tmp_path):
    stages = {"data": {"recipe": "prepare_data.py"}, "counts": {"recipe": "nothing.py"}}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "stages": stages}, sort_keys=False))
    with pytest.raises(ValueError, match=r"stage counts: recipe nothing.py not found: expected .* shipped "):
        run_recipe("run_pipeline", config=file)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_pipeline_prints_the_table_of_its_evaluation(pipeline, tmp_path):
    options = {
        "data_dir": "{output_dir}/data", "models": ["{output_dir}/counts/popularity"], "names": ["popularity"],
        "latency_calls": 2, "num_resamples": 10, "k": 3,
    }  # fmt: skip
    added = {"evaluation": {"recipe": "evaluate_models.py", "reads": ["data", "counts"], "options": options}}
    result = pipeline(added=added, counts={"max_rounds": 1})
    assert result.returncode == 0, result.stderr
    assert "| popularity |" in result.stdout
    assert result.stdout.strip().endswith((tmp_path / "out" / "evaluation" / "results.md").read_text().strip())
