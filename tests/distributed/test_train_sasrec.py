"""recipes/train_sasrec.py under `accelerate launch` with two real processes, against one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences

RECIPE = RECIPES / "train_sasrec.py"
# Without dropout two processes with half the batch must compute what one computes with the whole.
SETTINGS = [
    "--hidden_size", "16", "--max_length", "8", "--hidden_dropout", "0", "--attention_dropout", "0",
    "--num_train_epochs", "4", "--learning_rate", "5e-3", "--early_stopping_patience", "0", "--optim", "adamw_torch",
    "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cycle"
    cyclic_sequences(num_users=256).save(folder)
    return folder


def train(launch, config, data_dir, output_dir, batch_size):
    folders = ["--data_dir", data_dir, "--output_dir", output_dir]
    launch(config, RECIPE, *folders, "--per_device_train_batch_size", str(batch_size), *SETTINGS)
    return json.loads((output_dir / "run.json").read_text()), load_file(output_dir / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_learn_what_one_learns(launch, config, data_dir, tmp_path):
    expected_record, expected_weights = train(launch, "cpu.yaml", data_dir, tmp_path / "one", 64)
    record, weights = train(launch, config, data_dir, tmp_path / "two", 32)
    assert expected_record["world_size"] == 1
    assert record["world_size"] == 2
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)
    for name, value in expected_record["metrics"]["test"].items():
        assert abs(record["metrics"]["test"][name]["mean"] - value["mean"]) < 0.01, name
