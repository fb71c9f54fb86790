"""When a run resumes an earlier one, and when it must not."""

import json
from dataclasses import dataclass

import pytest

from hf_ilora import DistillationArguments, ILoraTrainingArguments, NextItemTrainingArguments
from hf_ilora.runs import RunRecord, resumable_checkpoint
from hf_ilora.runs.launch_settings import launch_settings


@dataclass
class Settings:
    learning_rate: float = 0.1
    output_dir: str = "somewhere"


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return str(path)


def begun(folder, settings=None, fingerprint="abc"):
    RunRecord(folder, [settings or Settings()], seed=0).add_data(fingerprint)


def test_a_run_in_an_empty_folder_starts_from_scratch(tmp_path):
    assert resumable_checkpoint(tmp_path / "new", [Settings()], "abc") is None


def test_a_killed_run_resumes_from_its_newest_whole_checkpoint(tmp_path):
    begun(tmp_path)
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, state=None)
    checkpoint(tmp_path, 110, state='{"global_')
    assert resumable_checkpoint(tmp_path, [Settings(output_dir="moved")], "abc") == whole
    # The incomplete ones would outlive checkpoints of this run, which have lower steps.
    assert {folder.name for folder in tmp_path.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-10"}


def test_other_settings_or_data_are_refused(tmp_path):
    begun(tmp_path)
    checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.1 and is 0\.2"):
        resumable_checkpoint(tmp_path, [Settings(learning_rate=0.2)], "abc")
    with pytest.raises(ValueError, match="fingerprint was abc and is xyz"):
        resumable_checkpoint(tmp_path, [Settings()], "xyz")


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ({"num_processes": 2}, "num_processes of the launch was 2 and is 1"),
        ({"mixed_precision": "bf16"}, "mixed_precision of the launch was 'bf16' and is 'no'"),
        ({"deepspeed_zero_stage": "2"}, "deepspeed_zero_stage of the launch was '2' and is None"),
    ],
)
def test_another_launch_is_refused(tmp_path, launched, message):
    begun(tmp_path)
    whole = checkpoint(tmp_path, 5)
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") == whole
    record = json.loads((tmp_path / "run.json").read_text())
    record["launch"] |= launched
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        resumable_checkpoint(tmp_path, [Settings()], "abc")


def test_settings_of_the_launcher_are_recorded_and_a_launch_without_any_equals_none(tmp_path, monkeypatch):
    begun(tmp_path)
    whole = checkpoint(tmp_path, 5)
    nothing = {
        "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name, value in nothing.items():
        monkeypatch.setenv(name, value)
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") == whole

    (tmp_path / "zero.json").write_text("{}")
    something = {
        "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero.json"),
    }  # fmt: skip
    for name, value in something.items():
        monkeypatch.setenv(name, value)
    settings = launch_settings()
    assert settings["mixed_precision"] == "bf16" and settings["dynamo_backend"] == "INDUCTOR"
    assert settings["fsdp_version"] == "2" and settings["deepspeed_config_file"].startswith("sha256 ")
    with pytest.raises(ValueError, match="mixed_precision of the launch was 'no' and is 'bf16'; "):
        resumable_checkpoint(tmp_path, [Settings()], "abc")
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert launch_settings()["deepspeed_config_file"] != settings["deepspeed_config_file"]


@pytest.mark.parametrize("kind", [NextItemTrainingArguments, DistillationArguments, ILoraTrainingArguments])
def test_the_precision_of_the_launch_is_that_of_the_arguments(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    arguments = kind(str(tmp_path), use_cpu=True)
    assert arguments.bf16 and launch_settings([arguments])["mixed_precision"] == "bf16"
    begun(tmp_path, arguments)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["configuration"][kind.__name__]["bf16"] is True and record["launch"]["mixed_precision"] == "bf16"


def test_a_run_without_a_whole_checkpoint_does_not_block_the_corrected_command(tmp_path):
    begun(tmp_path)
    checkpoint(tmp_path, 5, state=None)
    assert resumable_checkpoint(tmp_path, [Settings(learning_rate=0.2)], "xyz") is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_resume_from_checkpoint_is_refused(tmp_path):
    arguments = NextItemTrainingArguments("unused", resume_from_checkpoint="elsewhere/checkpoint-3")
    with pytest.raises(ValueError, match="'elsewhere/checkpoint-3': leave it out"):
        resumable_checkpoint(tmp_path, [Settings(), arguments], "abc")


def test_finished_run_and_unknown_checkpoints_are_refused(tmp_path):
    with RunRecord(tmp_path / "finished", [Settings()], seed=0):
        pass
    with pytest.raises(ValueError, match="finished run: choose another output_dir"):
        resumable_checkpoint(tmp_path / "finished", [Settings()], "abc")
    checkpoint(tmp_path / "foreign", 5)
    with pytest.raises(ValueError, match=r"checkpoints but no run\.json"):
        resumable_checkpoint(tmp_path / "foreign", [Settings()], "abc")


def test_a_failed_run_without_a_checkpoint_may_be_repeated(tmp_path):
    with pytest.raises(RuntimeError), RunRecord(tmp_path, [Settings()], seed=0):
        raise RuntimeError("out of memory")
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") is None
