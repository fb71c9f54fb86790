"""The experiment on acquisition tabulates every policy and budget, and repeats no finished run."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from hf_ilora import SASRecForNextItem
from tests.paths import PROJECT
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender

STUDENT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8, "num_train_epochs": 2,
    "early_stopping_patience": 0, "use_cpu": True,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def compare(tmp_path):
    """Runs the experiment and returns its process."""
    sequences = cyclic_sequences(num_users=40)
    sequences.save(tmp_path / "data")
    known_recommender(sequences).save_pretrained(tmp_path / "teacher")
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(STUDENT))

    def run(*options):
        command = [sys.executable, "-m", "experiments.acquisition", "--config_file", tmp_path / "student.yaml"]
        command += ["--data_dir", tmp_path / "data"]
        command += ["--teacher", tmp_path / "teacher", "--recommender", tmp_path / "teacher", "--parallel", "2"]
        command += ["--output_dir", tmp_path / "runs", "--table", tmp_path / "docs" / "table", *options]
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)

    return run


def test_policies_are_compared_with_random_at_equal_budgets(compare, tmp_path):
    options = ["--policies", "entropy", "--budgets", "10", "40", "--seeds", "1"]
    result = compare(*options)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "docs" / "table.json").read_text())
    expected = [(None, 0), ("random", 10), ("random", 40), ("entropy", 10), ("entropy", 40)]
    assert [(row["policy"], row["budget"]) for row in rows] == expected
    assert len({row["validation"] for row in rows}) > 1
    text = (tmp_path / "docs" / "table.md").read_text()
    assert "| no teacher |" in text and "| entropy |" in text and (tmp_path / "docs" / "table.png").is_file()

    again = compare(*options)
    assert again.returncode == 0 and " begins in " not in again.stderr and " begins in " in result.stderr
    other = compare(*options, "--lam", "2")
    assert other.returncode != 0 and "contains runs with other settings (lam): expected those of" in other.stderr


def test_a_teacher_that_was_replaced_in_place_is_not_mixed_with_the_runs_of_the_earlier_one(compare, tmp_path):
    options = ["--policies", "random", "--budgets", "10", "--seeds", "1"]
    first = compare(*options)
    assert first.returncode == 0, first.stderr
    model = SASRecForNextItem.from_pretrained(tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    assert compare(*options).returncode == 0  # saved anew, the same model
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(tmp_path / "teacher")
    replaced = compare(*options)
    assert replaced.returncode != 0
    assert "other settings (content of teacher, content of recommender): expected" in replaced.stderr
    cyclic_sequences(num_users=41).save(tmp_path / "data")
    assert "other settings (content of data_dir, content of teacher" in compare(*options).stderr


def test_unknown_policies_are_refused(compare, tmp_path):
    result = compare("--policies", "guess")
    assert result.returncode != 0 and "policies are ['guess']: expected some of random" in result.stderr
    assert not (tmp_path / "runs").exists()
