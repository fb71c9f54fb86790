"""Stages of a pipeline: what is refused before anything runs, and what makes a stage run again."""

import os
from pathlib import Path

import pytest
import yaml

from hf_ilora.runs.pipeline import Stage, read_stages, selected


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
        return Stage("data", "prepare_data.py", options | more, config="data.yaml").key([], Path("out"))

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


def test_a_key_changes_with_the_runs_that_the_stage_reads():
    stage = Stage("counts", "fit_counts.py", reads=["data"])
    assert stage.key(["one"], Path("out")) != stage.key(["another"], Path("out"))


@pytest.mark.parametrize(
    ("text", "message"), [("- a list", "expected lines of `field: value`"), ("a: [", "is not valid YAML")]
)
def test_config_without_settings_is_refused(tmp_path, text, message):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_stages({"data": {"recipe": "prepare_data.py", "config": str(tmp_path / "data.yaml")}})


STAGES = {
    "data": {"recipe": "prepare_data.py"},
    "counts": {"recipe": "fit_counts.py", "reads": ["data"], "options": {"max_rounds": 1}},
    "sasrec": {"recipe": "train_sasrec.py", "reads": ["data"]},
}


def test_overrides_replace_and_add_options_of_a_stage():
    overrides = ["counts.max_rounds=2", "counts.max_gap=[1, 3]", "sasrec.learning_rate=5e-3"]
    options = {stage.name: stage.options for stage in read_stages(STAGES, overrides)}
    assert options["counts"] == {"max_rounds": 2, "max_gap": [1, 3]}
    assert options["sasrec"] == {"learning_rate": "5e-3"}  # the command line makes it a number


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("counts.max_rounds", "expected stage.option=value"),
        ("max_rounds=2", "expected stage.option=value"),
        ("ilora.rank=2", "there is no stage ilora: expected one of data, counts, sasrec"),
        ("counts.gap=2", "stage counts: options: unknown key 'gap'"),
        ("counts.max_rounds=[", "is not valid YAML"),
    ],
)
def test_overrides_of_what_does_not_exist_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        read_stages(STAGES, [override])


def test_selected_stages_come_with_those_that_they_read():
    stages = read_stages(STAGES)
    assert [stage.name for stage in selected(stages, ["sasrec"])] == ["data", "sasrec"]
    assert selected(stages, None) == stages
    with pytest.raises(ValueError, match="there is no stage ilora: expected names of data, counts, sasrec"):
        selected(stages, ["ilora"])


def test_a_command_gives_the_recipe_its_options_and_the_folder_of_the_stage():
    options = {"data_dir": "{output_dir}/data", "windows": "last", "use_cpu": True, "train_fraction": [0, 0.5]}
    stage = Stage("sasrec", "train_sasrec.py", options, config="ml-100k/sasrec")
    assert stage.recipe_options(Path("out")) == [
        "--config", "ml-100k/sasrec", "--data_dir", "out/data", "--windows", "last", "--use_cpu", "true",
        "--train_fraction", "0", "0.5", "--output_dir", "out/sasrec",
    ]  # fmt: skip
