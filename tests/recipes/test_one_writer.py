"""An output folder has one writer: a second command is refused, with the writer's name, before it reads or writes."""

import os
import subprocess

import pytest

from hf_ilora.files import held_folder
from tests.processes import kill_with_children
from tests.recipe_runs import ENVIRONMENT, RecipeRun, recipe_command, wait_for_checkpoint
from tests.synthetic import cyclic_sequences

RECIPES = {
    "train_sasrec": {"data_dir": "nowhere"},
    "train_ilora": {"data_dir": "nowhere", "recommender": "nowhere"},
    "distill_sasrec": {"data_dir": "nowhere", "teacher_labels": "nowhere"},
    "label_with_teacher": {"data_dir": "nowhere", "teacher": "nowhere"},
    "fit_counts": {"data_dir": "nowhere"},
    "tune_ensemble": {"data_dir": "nowhere", "members": ["nowhere", "titles"]},
    "evaluate_models": {"data_dir": "nowhere", "models": "nowhere"},
    "evaluate_ilora": {"data_dir": "nowhere", "models": "nowhere"},
    "prepare_data": {"interactions": "nowhere.csv", "user_column": "u", "item_column": "i"},
    "prepare_reference_data": {"source": "nowhere"},
    "run_pipeline": {"config": "quickstart"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_that_is_held_is_refused_before_anything_is_read(run_recipe, tmp_path, name):
    folder = tmp_path / ("out_run" if name == "prepare_data" else "out")
    message = rf"is in use: process {os.getpid()} on .* has been writing there since "
    with held_folder(folder), pytest.raises(ValueError, match=message):
        run_recipe(name, output_dir=tmp_path / "out", **RECIPES[name])


@pytest.mark.parametrize("name", RECIPES)
def test_a_file_in_the_place_of_the_output_folder_is_refused(run_recipe, tmp_path, name):
    (tmp_path / ("out_run" if name == "prepare_data" else "out")).touch()
    with pytest.raises(ValueError, match="expected a folder; choose another output_dir"):
        run_recipe(name, output_dir=tmp_path / "out", **RECIPES[name])


@pytest.mark.slow
def test_a_second_command_changes_nothing_of_a_run_and_a_killed_one_holds_nothing(start_recipe, tmp_path):
    cyclic_sequences().save(tmp_path / "data")
    run = RecipeRun(tmp_path / "run")
    settings = {
        "data_dir": tmp_path / "data", "output_dir": run.output_dir, "hidden_size": 16, "max_length": 8,
        "num_train_epochs": 5000, "early_stopping_patience": 0, "disable_tqdm": True,
        "initial_items": "random",
    }  # fmt: skip
    command = recipe_command("train_sasrec", **settings)
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL) as first:
        wait_for_checkpoint(first, run.output_dir, 8)  # four steps are an epoch
        second = start_recipe("train_sasrec", **settings)
        assert second.returncode == 2, second.stderr
        assert second.stderr.count("\n") == 1 and f"in use: process {first.pid} on " in second.stderr
        assert first.poll() is None and run.record["status"] == "running" and "earlier_runs" not in run.record
        kill_with_children(first)
    third = start_recipe("train_sasrec", **settings | {"hidden_size": 8})
    assert third.returncode == 2 and "hidden_size was 16 and is 8" in third.stderr
