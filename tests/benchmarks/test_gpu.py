"""The benchmark of a GPU, rehearsed on the CPU: its checks run, and one that fails does not end the others."""

import json

import pytest
import torch

from benchmarks import gpu

FAST = ["bf16_training", "host_waits", "large_catalogue", "ilora_training", "four_bit"]


@pytest.fixture
def rehearsal(tmp_path):
    return gpu.GpuBenchmarkArguments(str(tmp_path), only=FAST, rehearse=True)


def test_a_machine_without_a_gpu_is_told_to_rehearse(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu", "--output_dir", str(tmp_path / "gpu")])
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        gpu.main()
    assert not (tmp_path / "gpu").exists()
    with pytest.raises(ValueError, match="only contains speed: expected some of bf16_training"):
        gpu.GpuBenchmarkArguments(str(tmp_path), only=["speed"], rehearse=True)


def test_checks_run_on_a_cpu(rehearsal):
    found = gpu.measure(rehearsal)["checks"]
    assert list(found) == FAST and not [name for name, figures in found.items() if "error" in figures], found
    assert found["bf16_training"]["bfloat16: loss after 50 steps"] < 7  # of 1,000 items
    assert found["ilora_training"]["1.5B, sdpa, activation checkpointing: tokens per second"] > 0


def test_a_check_that_fails_is_reported_beside_the_others(rehearsal, monkeypatch):
    def fails(arguments):
        """Experts have gradients."""
        raise RuntimeError("none has\nsecond line")

    monkeypatch.setitem(gpu.CHECKS, "ilora_training", fails)
    rehearsal.only = ["ilora_training", "host_waits"]
    results = gpu.measure(rehearsal)
    text = gpu.report(results | {"setting": {"torch": "2"}})
    assert "| Experts have gradients | error | RuntimeError: none has |" in text
    assert "| A training step of SASRec does not wait for the device | waits | 0 |" in text


@pytest.mark.slow
def test_the_whole_benchmark_is_rehearsed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--output_dir", str(tmp_path / "gpu"), "--rehearse", "true"])
    gpu.main()
    checks = json.loads((tmp_path / "gpu" / "benchmark.json").read_text())["checks"]
    assert set(checks) == set(gpu.CHECKS) and not [name for name, found in checks.items() if "error" in found], checks
    assert checks["launch_files"]["cpu: seconds"] > 0
