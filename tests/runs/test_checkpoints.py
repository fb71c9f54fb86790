"""When a run goes on from an earlier one, and when it must not."""

import json
from dataclasses import dataclass

import pytest

from hf_ilora.runs import RunRecord, resumable_checkpoint


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


def test_empty_folder_begins_anew(tmp_path):
    assert resumable_checkpoint(tmp_path / "new", [Settings()], "abc") is None


def test_killed_run_goes_on_from_its_newest_whole_checkpoint(tmp_path):
    begun(tmp_path)
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") is None
    checkpoint(tmp_path, 9)
    whole = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, state=None)
    checkpoint(tmp_path, 110, state='{"global_')
    assert resumable_checkpoint(tmp_path, [Settings(output_dir="moved")], "abc") == whole


def test_other_settings_or_data_are_refused(tmp_path):
    begun(tmp_path)
    checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.1 and is 0\.2"):
        resumable_checkpoint(tmp_path, [Settings(learning_rate=0.2)], "abc")
    with pytest.raises(ValueError, match="fingerprint was abc and is xyz"):
        resumable_checkpoint(tmp_path, [Settings()], "xyz")


def test_a_run_without_a_whole_checkpoint_blocks_no_corrected_command(tmp_path):
    begun(tmp_path)
    checkpoint(tmp_path, 5, state=None)
    assert resumable_checkpoint(tmp_path, [Settings(learning_rate=0.2)], "xyz") is None


def test_finished_run_and_unknown_checkpoints_are_refused(tmp_path):
    with RunRecord(tmp_path / "finished", [Settings()], seed=0):
        pass
    with pytest.raises(ValueError, match="finished run: choose another output_dir"):
        resumable_checkpoint(tmp_path / "finished", [Settings()], "abc")
    checkpoint(tmp_path / "foreign", 5)
    with pytest.raises(ValueError, match=r"checkpoints but no run\.json"):
        resumable_checkpoint(tmp_path / "foreign", [Settings()], "abc")


def test_failed_run_may_be_given_again(tmp_path):
    with pytest.raises(RuntimeError), RunRecord(tmp_path, [Settings()], seed=0):
        raise RuntimeError("out of memory")
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    assert resumable_checkpoint(tmp_path, [Settings()], "abc") is None
