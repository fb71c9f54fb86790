"""recipes/train_sasrec.py under `accelerate launch` with two real processes, against one."""

import pytest
import torch

from tests.paths import RECIPES
from tests.recipe_runs import RecipeRun, recipe_words
from tests.synthetic import cyclic_sequences

# Without dropout two processes with half the batch must compute what one computes with the whole.
SETTINGS = {
    "hidden_size": 16, "max_length": 8, "hidden_dropout": 0, "attention_dropout": 0, "num_train_epochs": 4,
    "learning_rate": 5.0e-3, "early_stopping_patience": 0, "optim": "adamw_torch", "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def train(launch, tmp_path_factory):
    """Runs the recipe; a launch configuration runs once."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    cyclic_sequences(num_users=256).save(folder / "data")

    def run(config) -> RecipeRun:
        if config not in runs:
            settings = {"data_dir": folder / "data", "output_dir": folder / config, **SETTINGS}
            settings["per_device_train_batch_size"] = 64 if config == "cpu.yaml" else 32
            launch(config, RECIPES / "train_sasrec.py", *recipe_words(**settings))
            runs[config] = RecipeRun(folder / config)
        return runs[config]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_learn_what_one_learns(train, config):
    one, two = train("cpu.yaml"), train(config)
    assert (one.record["world_size"], two.record["world_size"]) == (1, 2)
    weights = two.weights
    for name, expected in one.weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)
    for name, value in one.record["metrics"]["test"].items():
        assert abs(two.record["metrics"]["test"][name]["mean"] - value["mean"]) < 0.01, name
