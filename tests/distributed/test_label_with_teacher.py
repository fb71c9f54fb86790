"""recipes/label_with_teacher.py in real processes: killed at any moment, and several at once."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hf_ilora import SequenceDatasets
from hf_ilora.distillation.teacher_labels import TeacherLabels
from tests.paths import PROJECT, RECIPES
from tests.processes import kill_with_children
from tests.recipe_runs import RecipeRun, recipe_words
from tests.tiny_ilora_parts import save_ilora, save_parts

SHARDS, SHARD_ROWS = 110, 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A data set of 440 prefixes and an iLoRA teacher."""
    parts = save_parts(tmp_path_factory.mktemp("parts"), num_users=40)
    parts.teacher = parts.llm.with_name("ilora")
    save_ilora(parts, parts.teacher)
    return parts


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """torchrun gives each of several processes one thread; sums in another order would differ in the last digit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def words(parts):
    """The recipe and its options, without the output folder."""
    settings = {"labelled_positions": "all", "batch_size": 2, "top_k": 5, "shard_rows": SHARD_ROWS}
    words = recipe_words(data_dir=parts.data_dir, teacher=parts.teacher, **settings)
    return [str(RECIPES / "label_with_teacher.py"), *words]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "labels"  # the card has the name of the folder
    command = [sys.executable, *words, "--output_dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def two_processes(words):
    """The command for two processes, without the output folder."""
    accelerate = Path(sys.executable).parent / "accelerate"
    config = PROJECT / "accelerate_configs" / "multi_cpu.yaml"
    return [str(accelerate), "launch", "--config_file", str(config), *words]


def results(folder) -> dict[str, bytes]:
    """All that a run leaves but its record and log."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("run.json", "run.log")}


def run_until(command: list[str], folder: Path, shards: int, seconds: float) -> bool:
    """Start a command and kill it and its children, `seconds` after it has written `shards` more; whether it ended."""
    goal = len(list(folder.glob("labels-*.parquet"))) + shards
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and len(list(folder.glob("labels-*.parquet"))) < goal:
        time.sleep(0.002)
    time.sleep(seconds)
    if process.poll() is not None:
        output = process.communicate()[0].decode()
        assert process.returncode == 0, output
        return True
    kill_with_children(process)
    process.communicate()
    return False


def kill_again_and_again(command: list[str], folder: Path, most_shards: int) -> int:
    """Kill a command at random moments until it comes to its end; returns how often it was killed."""
    draw, kills = random.Random(0), 0
    while not run_until(command, folder, draw.randint(0, most_shards), draw.uniform(0, 0.02)):
        kills += 1
        for path in folder.glob("labels-*.parquet"):
            assert pq.read_table(path).num_rows == SHARD_ROWS
        assert not (folder / "teacher_labels.json").exists()
    return kills


def test_two_processes_give_the_rows_of_one(words, undisturbed, launch, tmp_path, parts):
    folder = tmp_path / "labels"
    launch("multi_cpu.yaml", *words, "--output_dir", folder)
    assert results(folder) == results(undisturbed)
    record = RecipeRun(folder).record
    assert record["world_size"] == 2 and record["metrics"]["labels"]["labelled_now"] == SHARDS * SHARD_ROWS
    log = (folder / "run.log").read_text()
    assert "220 rows in 55 of 110 shards are left for this process" in log and "tokens per second" in log
    assert len(TeacherLabels.load(folder, SequenceDatasets.load(parts.data_dir).fingerprint)) == SHARDS * SHARD_ROWS


def test_two_processes_that_are_killed_again_and_again_lose_and_double_no_row(
    two_processes, undisturbed, tmp_path, parts
):
    folder = tmp_path / "labels"
    kills = kill_again_and_again([*two_processes, "--output_dir", str(folder)], folder, most_shards=50)
    assert kills >= 3  # at 24, 50 and 82 of the shards
    assert results(folder) == results(undisturbed)
    record = RecipeRun(folder).record
    assert record["world_size"] == 2 and 0 < record["metrics"]["labels"]["labelled_now"] < SHARDS * SHARD_ROWS
    labels = TeacherLabels.load(folder, SequenceDatasets.load(parts.data_dir).fingerprint).table
    rows = list(zip(labels["history_id"].to_pylist(), labels["prefix_length"].to_pylist(), strict=True))
    assert len(set(rows)) == len(rows) == SHARDS * SHARD_ROWS


def test_two_killed_processes_are_finished_by_one(words, two_processes, undisturbed, tmp_path):
    folder = tmp_path / "labels"
    assert not run_until([*two_processes, "--output_dir", str(folder)], folder, 30, 0.01)
    assert len(list(folder.glob("labels-*.parquet"))) < SHARDS  # both are dead
    assert run_until([sys.executable, *words, "--output_dir", str(folder)], folder, SHARDS, 0)
    assert results(folder) == results(undisturbed)
