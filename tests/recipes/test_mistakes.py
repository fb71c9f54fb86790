"""A recipe that is started as a process reports a user's mistake in one line."""

import pytest

MISTAKES = {
    "prepare_data": ({"interactions": "nowhere.csv", "user_column": "u", "item_column": "i"}, "nowhere.csv"),
    "fit_counts": ({"data_dir": "nowhere"}, "nowhere"),
    "train_sasrec": ({"data_dir": "nowhere", "learning_rte": 1}, "did you mean --learning_rate or"),
    "train_ilora": ({"data_dir": "nowhere"}, "recommender is missing"),
    "label_with_teacher": ({"data_dir": "nowhere", "teacher": "nowhere"}, "nowhere"),
    "distill_sasrec": ({"data_dir": "nowhere"}, "no teacher is given: expected teacher_labels"),
    "tune_ensemble": ({"data_dir": "nowhere", "members": "titles"}, "expected at least two different ones"),
    "evaluate_models": ({"data_dir": "nowhere", "models": "nowhere"}, "nowhere"),
    "evaluate_ilora": ({"data_dir": "nowhere", "models": "nowhere"}, "nowhere"),
    "run_pipeline": ({"config": "nowhere"}, "configuration nowhere not found: expected a file"),
}


def check_one_line(result, name, message):
    """Check that the process ended with exit code 2, and said what is wrong in one line."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{name}.py: error: ") and message in result.stderr


def test_a_mistake_in_the_settings_ends_in_one_line_and_exit_code_2(start_recipe, tmp_path):
    result = start_recipe("recommend", working_dir=tmp_path, model="nowhere", user=1)
    check_one_line(
        result, "recommend", "--user is given without --data_dir: expected the prepared data set with the user"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_2(start_recipe, tmp_path, name):
    settings, message = MISTAKES[name]
    result = start_recipe(name, working_dir=tmp_path, output_dir=tmp_path / "out", **settings)
    check_one_line(result, name, message)


@pytest.mark.slow
def test_a_mistake_that_comes_up_after_the_log_began_has_its_traceback_there(start_recipe, tmp_path):
    result = start_recipe("train_sasrec", data_dir="nowhere", output_dir=tmp_path / "out")
    check_one_line(result, "train_sasrec", "nowhere")
    assert "Traceback (most recent call last)" in (tmp_path / "out" / "run.log").read_text()
