"""recipes/train_sasrec.py under `accelerate launch` with two real processes, against one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from hf_ilora import SASRecForNextItem
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.statistics import summarize_ranks
from tests.paths import PROJECT, RECIPES
from tests.processes import kill_with_children
from tests.recipe_runs import ENVIRONMENT, RecipeRun, recipe_words, wait_for_checkpoint
from tests.synthetic import cyclic_sequences
from tests.titles.encoder_folders import save_bert

# Without dropout two processes with half the batch must compute what one computes with the whole.
NUM_USERS = 212  # 3 batches of 64 and 20 users, which leave the second process no row in the last step
SETTINGS = {
    "hidden_size": 16, "max_length": 8, "hidden_dropout": 0, "attention_dropout": 0, "num_train_epochs": 6,
    "learning_rate": 5.0e-3, "early_stopping_patience": 0, "optim": "adamw_torch", "disable_tqdm": True,
    "initial_items": "random",
}  # fmt: skip
DRAWS = Path(__file__).with_name("launched_draws.py")  # negatives that do not depend on the number of processes
SAMPLED = {
    "batch": {"negative_sharing": "batch", "num_negatives": 12, "popularity_power": 0.5},
    "position": {"negative_sharing": "position", "num_negatives": 5},
}


@pytest.fixture(scope="module")
def train(launch, tmp_path_factory):
    """Runs the recipe; a launch configuration runs once."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    cyclic_sequences(num_users=NUM_USERS).save(folder / "data")

    def words(config, output_dir, **changes) -> list[str]:
        settings = {"data_dir": folder / "data", "output_dir": output_dir, **SETTINGS, **changes}
        settings["per_device_train_batch_size"] = 64 if config == "cpu.yaml" else 32
        return [str(RECIPES / "train_sasrec.py"), *recipe_words(**settings)]

    def run(config) -> RecipeRun:
        if config not in runs:
            launch(config, *words(config, folder / config))
            runs[config] = RecipeRun(folder / config)
        return runs[config]

    run.words = words
    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml", "fsdp2_cpu.yaml"])
def test_two_processes_learn_what_one_learns(train, config):
    one, two = train("cpu.yaml"), train(config)
    assert (one.record["world_size"], two.record["world_size"]) == (1, 2)
    for name in ("loss", "eval_loss"):
        assert two.logged(name) == pytest.approx(one.logged(name), rel=1e-3), name
    weights = two.weights
    for name, expected in one.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)
    for name, value in one.record["metrics"]["test"].items():
        assert abs(two.record["metrics"]["test"][name]["mean"] - value["mean"]) < 0.01, name


@pytest.fixture(scope="module")
def train_sampled(train, launch, tmp_path_factory):
    """Runs the recipe with the sampled softmax; a launch configuration and a kind of negatives run once."""
    runs = {}

    def run(config, sharing) -> RecipeRun:
        if (config, sharing) not in runs:
            folder = tmp_path_factory.mktemp("sampled") / "run"
            changes = {"loss_type": "sampled_softmax", "logging_strategy": "steps", "logging_steps": 1}
            _, *words = train.words(config, folder, **changes, **SAMPLED[sharing], num_train_epochs=3)
            launch(config, DRAWS, "train_sasrec", *words)
            runs[config, sharing] = RecipeRun(folder)
        return runs[config, sharing]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("sharing", SAMPLED)
@pytest.mark.parametrize("config", ["zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_learn_from_the_negatives_of_one(train_sampled, config, sharing):
    one, two = train_sampled("cpu.yaml", sharing), train_sampled(config, sharing)
    assert (one.record["world_size"], two.record["world_size"]) == (1, 2)
    losses = one.logged("loss")
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert two.logged("loss") == pytest.approx(losses, rel=1e-4)
    weights = two.weights
    for name, expected in one.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_start_from_titles_that_are_encoded_once(train, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    settings = {"initial_items": "auto", "title_encoder": save_bert(tmp_path / "bert")}
    words = train.words("multi_cpu.yaml", tmp_path / "run", **settings, max_steps=2, eval_strategy="epoch")
    printed = launch("multi_cpu.yaml", *words).stdout
    assert printed.count("INFO hf_ilora.titles.encoders: encoding 30 titles") == 1
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1
    assert RecipeRun(tmp_path / "run").record["world_size"] == 2


@pytest.mark.slow
def test_processes_with_a_part_of_the_item_table_each_rank_as_the_saved_model_does(train, launch, tmp_path):
    settings = {"loss_type": "sampled_softmax", "item_optimizer": "lazy_adam", "item_table": "row_sharded"}
    launch("multi_cpu.yaml", *train.words("multi_cpu.yaml", tmp_path, **settings, initial_items="auto", max_steps=40))
    measured = RecipeRun(tmp_path).record["metrics"]["test"]
    ranks = rank_split(SASRecForNextItem.from_pretrained(tmp_path), cyclic_sequences(num_users=NUM_USERS)["test"])
    for name, value in summarize_ranks(ranks).items():
        if not name.startswith("candidates"):  # which are not ranked apart while the table is spread
            assert measured.pop(name)["mean"] == pytest.approx(value.mean), name
    assert not measured and ranks.masked.mean() < 8  # of 30 items


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_launch_and_the_next_launch_resumes(train, launch, tmp_path):
    whole, killed = train("multi_cpu.yaml"), RecipeRun(tmp_path / "killed")
    words = train.words("multi_cpu.yaml", killed.output_dir)
    accelerate, config = Path(sys.executable).parent / "accelerate", PROJECT / "accelerate_configs" / "multi_cpu.yaml"
    for rank in ("0", "1"):
        written = whole_checkpoints(killed.output_dir)
        process = subprocess.Popen(
            [str(accelerate), "launch", "--config_file", str(config), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + 300
            while whole_checkpoints(killed.output_dir) == written:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            processes = psutil.Process(process.pid).children(recursive=True)
            [victim] = [child for child in processes if child.environ().get("RANK") == rank]
            victim.kill()
            assert process.wait(timeout=120) > 0
        finally:
            kill_with_children(process)
        assert not psutil.wait_procs(processes, timeout=60)[1]
        assert killed.record["status"] in ("running", "failed")
    assert "resuming from" in launch("multi_cpu.yaml", *words).stdout
    assert killed.record["status"] == "finished" and len(killed.record["earlier_runs"]) == 2
    torch.testing.assert_close(killed.weights, whole.weights, rtol=0, atol=1e-6)


def whole_checkpoints(output_dir) -> set[str]:
    return {path.parent.name for path in output_dir.glob("checkpoint-*/trainer_state.json")}


@pytest.mark.slow
def test_a_killed_run_of_two_processes_is_not_continued_by_one(start_recipe, tmp_path):
    cyclic_sequences(num_users=64).save(tmp_path / "data")
    run = RecipeRun(tmp_path / "run")
    settings = SETTINGS | {"data_dir": tmp_path / "data", "output_dir": run.output_dir, "num_train_epochs": 5000}
    command = [sys.executable, "-m", "hf_ilora_cli.launch_recipe", str(RECIPES / "train_sasrec.py")]
    command += ["--num_processes", "2", *recipe_words(**settings)]
    with subprocess.Popen(command, env=os.environ | ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        wait_for_checkpoint(process, run.output_dir, 2)  # an epoch is a step
        kill_with_children(process)
    assert run.record["launch"]["num_processes"] == 2
    result = start_recipe("train_sasrec", **settings)
    assert result.returncode == 2 and "num_processes of the launch was 2 and is 1" in result.stderr
