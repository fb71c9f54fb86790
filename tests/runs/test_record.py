"""RunRecord: the content of run.json at each point of a run's life."""

import json
import math
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from hf_ilora.runs import record as record_module
from hf_ilora.runs.record import RunRecord


@dataclass
class ModelArguments:
    hidden_size: int = 8
    steps: list[int] = field(default_factory=lambda: [1, 2])
    hub_token: str | None = "secret"


def read(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_the_start_records_settings_versions_and_device_without_secrets(tmp_path):
    training = TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, hub_token="secret", report_to="none")
    RunRecord(tmp_path / "new" / "run", [ModelArguments(), training], seed=7)
    content = read(tmp_path / "new" / "run")
    assert content["status"] == "running"
    assert content["configuration"]["ModelArguments"] == {"hidden_size": 8, "steps": [1, 2]}
    assert content["configuration"]["TrainingArguments"]["learning_rate"] == 1e-3
    assert content["configuration"]["TrainingArguments"]["lr_scheduler_type"] == "linear"
    assert content["seed"] == 7 and content["data_fingerprint"] is None
    assert content["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["versions"]["python"].startswith(f"{sys.version_info.major}.")
    assert (content["world_size"], content["device"]) == (1, "cpu")
    assert content["threads"] == torch.get_num_threads()
    assert "secret" not in (tmp_path / "new" / "run" / "run.json").read_text()


def test_hostname_is_not_recorded(tmp_path):
    RunRecord(tmp_path, [ModelArguments()], seed=0)
    assert socket.gethostname() not in (tmp_path / "run.json").read_text()


def test_stages_metrics_and_data_are_written_at_once(tmp_path):
    with RunRecord(tmp_path, [ModelArguments()], seed=0) as record:
        with record.stage("data"):
            assert read(tmp_path)["durations_seconds"] == {}
        assert list(read(tmp_path)["durations_seconds"]) == ["data"]
        record.add_data("a1b2")
        record.add_metrics("test", {"ndcg@10": np.float32(0.5), "hits": torch.tensor(3)})
        record.add_metrics("test", {"loss": math.nan})
        content = read(tmp_path)
        assert content["data_fingerprint"] == "a1b2"
        assert content["metrics"] == {"test": {"ndcg@10": 0.5, "hits": 3, "loss": "nan"}}
        assert content["status"] == "running"
    content = read(tmp_path)
    assert content["status"] == "finished" and "error" not in content
    assert content["durations_seconds"]["total"] >= content["durations_seconds"]["data"] >= 0


def test_durations_of_a_repeated_stage_add_up(tmp_path, monkeypatch):
    record = RunRecord(tmp_path, [ModelArguments()], seed=0)
    times, processor_times = iter([10.0, 12.0, 20.0, 21.5]), iter([1.0, 2.0, 3.0, 3.25])
    monkeypatch.setattr(record_module.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(record_module.time, "process_time", lambda: next(processor_times))
    for _ in range(2):
        with record.stage("evaluation"):
            pass
    assert read(tmp_path)["durations_seconds"] == {"evaluation": 3.5}
    assert read(tmp_path)["processor_seconds"] == {"evaluation": 1.25}


def test_a_failed_run_records_its_error_and_keeps_its_metrics(tmp_path):
    with (
        pytest.raises(ValueError, match="no users"),
        RunRecord(tmp_path, [ModelArguments()], seed=0) as record,
        record.stage("data"),
    ):
        record.add_metrics("validation", {"ndcg@10": 0.1})
        raise ValueError("no users")
    content = read(tmp_path)
    assert content["status"] == "failed" and content["error"] == "ValueError: no users"
    assert content["metrics"] == {"validation": {"ndcg@10": 0.1}} and "data" in content["durations_seconds"]


def test_an_error_is_raised_although_the_disk_is_full(tmp_path, monkeypatch, caplog):
    with pytest.raises(ValueError, match="no users"), RunRecord(tmp_path, [ModelArguments()], seed=0) as record:
        monkeypatch.setattr(Path, "write_text", raising(OSError(28, "No space left on device")))
        with record.stage("data"):
            raise ValueError("no users")
    assert read(tmp_path)["status"] == "running"
    assert "run.json still says that the run is running" in caplog.text
    with pytest.raises(OSError, match="No space left on device"):
        record.add_data("a1b2")


def raising(error):
    def raise_it(*arguments, **named_arguments):
        raise error

    return raise_it


def test_a_write_that_dies_half_way_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    record = RunRecord(tmp_path, [ModelArguments()], seed=0)
    before = (tmp_path / "run.json").read_text()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record.add_data("a1b2")
    assert (tmp_path / "run.json").read_text() == before


def test_a_resumed_run_keeps_the_records_of_earlier_runs(tmp_path):
    RunRecord(tmp_path, [ModelArguments()], seed=3).add_metrics("validation", {"ndcg@10": 0.1})
    with RunRecord(tmp_path, [ModelArguments()], seed=3):
        pass
    RunRecord(tmp_path, [ModelArguments()], seed=4)
    earlier = read(tmp_path)["earlier_runs"]
    assert [run["status"] for run in earlier] == ["running", "finished"]
    assert earlier[0]["metrics"] == {"validation": {"ndcg@10": 0.1}} and earlier[0]["seed"] == 3


def test_a_foreign_run_json_is_not_overwritten(tmp_path):
    (tmp_path / "run.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="not the record of a run"):
        RunRecord(tmp_path, [ModelArguments()], seed=0)
    assert (tmp_path / "run.json").read_text() == '{"mine": 1}'


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    class SecondProcess:
        is_main_process, num_processes, device = False, 2, torch.device("cpu")

    monkeypatch.setattr(record_module, "process_state", SecondProcess)
    with RunRecord(tmp_path / "run", [ModelArguments()], seed=0) as record, record.stage("data"):
        record.add_metrics("test", {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_git_state_is_the_commit_and_whether_files_differ(tmp_path):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)

    project = Path(tmp_path).resolve()
    assert record_module._git_state(project) is None  # no repository
    git("init")
    assert record_module._git_state(project) is None  # no commit
    (project / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    state = record_module._git_state(project)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (project / "file").write_text("2")
    assert record_module._git_state(project) == {"commit": state["commit"], "dirty": True}
    (project / "inside").mkdir()
    assert record_module._git_state(project / "inside") is None  # a package installed within another checkout


def test_git_state_is_none_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record_module._git_state(tmp_path) is None


def test_the_command_of_a_recipe_is_recorded_without_tokens(tmp_path, monkeypatch):
    words = ["ml-100k/sasrec", "--hub_token", "hf_secret", "--seed", "1", "--hub_token=hf_secret", "--data_dir=/data"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/recipes/train_sasrec.py", *words])
    RunRecord(tmp_path / "recipe", [ModelArguments()], seed=1)
    expected = ["hf-ilora", "train-sasrec", "ml-100k/sasrec", "--seed", "1", "--data_dir=/data"]
    assert read(tmp_path / "recipe")["command"] == expected
    monkeypatch.setattr(sys, "argv", ["own_program.py", *words])
    RunRecord(tmp_path / "other", [ModelArguments()], seed=1)
    assert read(tmp_path / "other")["command"] is None
