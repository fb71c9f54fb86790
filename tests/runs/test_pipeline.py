"""Stages of a pipeline: the settings that are refused before anything runs, and the changes that run a stage again."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from hf_ilora.runs.pipeline import Stage, composed, read_stages, selected
from hf_ilora_cli.shipped import CONFIG, find_file, shipped_names
from tests.paths import RECIPES


def test_a_key_changes_with_every_file_that_the_settings_name_outside_the_output_folder(tmp_path, monkeypatch):
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
        return Stage("data", "prepare_data.py", options | more, config=["data.yaml"]).key([], Path("out"))

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
def test_stages_that_cannot_run_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        read_stages({"data": {"recipe": "prepare_data.py"}, "counts": stage})


def test_selected_stages_come_with_those_that_they_read():
    stages = read_stages(
        {
            "data": {"recipe": "prepare_data.py"},
            "counts": {"recipe": "fit_counts.py", "reads": ["data"]},
            "sasrec": {"recipe": "train_sasrec.py", "reads": ["data"]},
        }
    )
    assert [stage.name for stage in selected(stages, ["sasrec"])] == ["data", "sasrec"]
    assert selected(stages, None) == stages
    with pytest.raises(ValueError, match="there is no stage ilora: expected names of data, counts, sasrec"):
        selected(stages, ["ilora"])


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
        ("counts.max_gap=5", r"max_gap expects list\[int\], found 5"),
        ("counts=5", "counts=5: expected stage.option=value, such as sasrec.max_steps=20"),
        ("counts.max_gap", "expected stage.option=value"),
        ("data.movielens=ml-2m", "movielens expects one of ml-100k, .*, found 'ml-2m'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_stages(stages, [override])


def test_shipped_names_are_resolved_and_their_content_counts_in_the_key(tmp_path, monkeypatch):
    """The key is the same wherever the package is installed."""
    monkeypatch.chdir(tmp_path)
    stage = Stage("ilora", "train_ilora.py", {"prompt_file": "movies"}, config=["ml-100k/ilora"], launch="cpu")
    before = stage.key([], Path("out"))
    root = tmp_path / "elsewhere"
    for folder in ("recipes", "accelerate_configs"):
        shutil.copytree(RECIPES.parent / folder, root / folder)
    monkeypatch.setattr("hf_ilora_cli.shipped.shipped_folder", lambda kind: root / kind.folder)
    assert stage.key([], Path("out")) == before
    tracked = (
        "recipes/train_ilora.py", "recipes/prompts/movies.txt", "recipes/configs/ml-100k/ilora.yaml",
        "recipes/configs/teacher/ilora.yaml",  # which the one before extends
        "accelerate_configs/cpu.yaml",
    )  # fmt: skip
    for name in (*tracked, "recipes/train_sasrec.py", "accelerate_configs/ddp.yaml"):
        before = stage.key([], Path("out"))
        (root / name).write_text((root / name).read_text() + "\n# another\n")
        assert (stage.key([], Path("out")) != before) == (name in tracked), name


def test_a_stage_is_started_with_lists_and_the_folder_of_its_pipeline():
    options = {"data_dir": "{output_dir}/data", "use_cpu": True, "train_fraction": [0, 0.5]}
    stage = Stage("sasrec", "train_sasrec.py", options)
    assert stage.command(Path("out"))[1:] == [
        "-m", "hf_ilora_cli.recipe_process", str(RECIPES / "train_sasrec.py"), "--data_dir", "out/data",
        "--use_cpu", "true", "--train_fraction", "0", "0.5", "--output_dir", "out/sasrec",
    ]  # fmt: skip


def test_a_launched_stage_is_started_with_its_options():
    stage = Stage("sasrec", "train_sasrec.py", {"seed": 2, "bf16": False}, config=["ml-100k/quickstart"], launch="cpu")
    assert stage.command(Path("out"))[1:] == [
        "-m", "hf_ilora_cli.launch_recipe", str(RECIPES / "train_sasrec.py"), "--launch", "cpu",
        "--config", "ml-100k/quickstart", "--seed", "2", "--bf16", "false", "--output_dir", "out/sasrec",
    ]  # fmt: skip


STAGES = {
    "data": {"recipe": "prepare_data.py", "config": "{data}"},
    "sasrec": {"recipe": "train_sasrec.py", "config": "{student}", "reads": ["data"], "options": {"max_steps": 3}},
    "distilled": {"recipe": "distill_sasrec.py", "config": ["{student}", "{distill}"], "reads": ["data"]},
}
GROUPS = {"data": "ml-100k", "student": "sasrec", "distill": "dllm2rec"}


def test_stages_take_the_configurations_that_are_chosen_in_groups(tmp_path):
    data, sasrec, distilled = read_stages(STAGES, groups=GROUPS)
    assert (data.config, sasrec.config) == (["data/ml-100k"], ["student/sasrec"])
    assert distilled.config == ["student/sasrec", "distill/dllm2rec"]
    assert distilled.settings()["lam"] == 0.8 and distilled.settings()["hidden_dropout"] == 0.3

    own = tmp_path / "own.yaml"
    own.write_text("extends: student/sasrec\nhidden_dropout: 0.7\n")
    choices = [f"student={own}", "distill=kl", "sasrec.max_length=9"]
    _, sasrec, distilled = read_stages(STAGES, choices, GROUPS)
    assert sasrec.settings()["hidden_dropout"] == distilled.settings()["hidden_dropout"] == 0.7
    assert (sasrec.settings()["max_steps"], sasrec.settings()["max_length"]) == (3, 9)
    assert distilled.settings()["lam"] == 0.0 and distilled.settings()["max_length"] == 50
    words = distilled.recipe_options(Path("out"))
    assert words == ["--config", str(own), "--config", "distill/kl", "--output_dir", "out/distilled"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("student=sasrek", r"student=sasrek: expected one of sasrec, sasrec_wide.*, or a YAML file"),
        (
            "students=sasrec",
            "students=sasrec: expected group=name with a group of data, student, distill, or stage.opt",
        ),
        ("student=", "student=: expected group=name"),
        ("student=kl", "student=kl: expected one of "),
        ("student", "student: expected group=name"),
    ],
)
def test_unknown_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        read_stages(STAGES, [choice], GROUPS)


def test_a_part_with_a_setting_that_its_recipe_does_not_know_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("acquire: entropy\n")
    with pytest.raises(ValueError, match=r"stage sasrec: .*own\.yaml: unknown key 'acquire'"):
        read_stages(STAGES, [f"student={tmp_path / 'own.yaml'}"], GROUPS)


def test_the_composed_pipeline_has_all_settings_and_is_a_pipeline(tmp_path):
    stages = read_stages(STAGES, ["distill=kl", "distilled.lam=0.5"], GROUPS)
    content = yaml.safe_load(composed(stages))
    assert set(content) == {"stages"} and "config" not in content["stages"]["distilled"]
    again = read_stages(content["stages"])
    assert [stage.settings() for stage in again] == [stage.settings() for stage in stages]
    assert again[2].options["lam"] == 0.5 and again[2].options["kl_weight"] == 1.0 and again[2].reads == ["data"]


def test_every_choice_of_the_shipped_experiment_fits():
    file = find_file(CONFIG, "experiment")
    content = yaml.safe_load(file.read_text())
    for group in content["groups"]:
        names = [name.removeprefix(f"{group}/") for name in shipped_names(CONFIG) if name.startswith(f"{group}/")]
        assert len(names) > 1
        for name in names:
            read_stages(content["stages"], [f"{group}={name}"], content["groups"])
