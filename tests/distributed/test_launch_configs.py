"""Each CPU configuration starts the processes it promises, and they divide the work instead of repeating it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("launched_program.py")
SETTINGS = {
    "num_train_epochs": 1,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "remove_unused_columns": False,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "seed": 3,
}


def train(launch, config, folder, batch_size):
    """Reports of all processes, by rank, and the trained weights."""
    settings = SETTINGS | {"output_dir": folder, "per_device_train_batch_size": batch_size}
    launch(config, PROGRAM, *(f"--{name}={value}" for name, value in settings.items()))
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("report_*.json"))]
    return reports, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(launch, tmp_path_factory):
    return train(launch, "cpu.yaml", tmp_path_factory.mktemp("one"), batch_size=8)


@pytest.mark.slow
def test_cpu_config_starts_one_process(one_process):
    ((report,), weights) = one_process
    assert (report["world_size"], report["device"], report["distributed_type"]) == (1, "cpu", "NO")
    assert sorted(report["rows"]) == list(range(16))
    assert weights["layer.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "distributed_type"),
    [("multi_cpu.yaml", "MULTI_CPU"), ("zero2_cpu.yaml", "DEEPSPEED"), ("zero3_cpu.yaml", "DEEPSPEED")],
)
def test_two_processes_share_the_rows_and_give_the_weights_of_one(
    launch, tmp_path, one_process, config, distributed_type
):
    reports, weights = train(launch, config, tmp_path, batch_size=4)
    assert [report["world_size"] for report in reports] == [2, 2]
    assert [report["rank"] for report in reports] == [0, 1]
    assert [report["is_main"] for report in reports] == [True, False]
    assert {report["distributed_type"] for report in reports} == {distributed_type}
    assert {report["device"] for report in reports} == {"cpu"}
    assert sorted(reports[0]["rows"] + reports[1]["rows"]) == list(range(16))  # no row twice
    torch.testing.assert_close(weights, one_process[1])

    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["world_size"], record["status"]) == (2, "finished")
