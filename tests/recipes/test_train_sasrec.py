"""recipes/train_sasrec.py as a user runs it: real processes, killed ones among them."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from hf_ilora import SASRecForNextItem
from tests.paths import PROJECT
from tests.synthetic import cyclic_sequences

SETTINGS = [
    "--hidden_size", "16", "--max_length", "8", "--per_device_train_batch_size", "64", "--num_train_epochs", "12",
    "--use_cpu", "true", "--disable_tqdm", "true", "--learning_rate", "5e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cycle"
    cyclic_sequences().save(folder)
    return folder


def command(data_dir, output_dir, *options):
    recipe = PROJECT / "recipes" / "train_sasrec.py"
    return [
        sys.executable,
        str(recipe),
        "--data_dir",
        str(data_dir),
        "--output_dir",
        str(output_dir),
        *SETTINGS,
        *options,
    ]


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = run(data_dir, output_dir, "--report_to", "tensorboard")
    assert result.returncode == 0, result.stderr
    return output_dir


def record_of(output_dir):
    return json.loads((output_dir / "run.json").read_text())


@pytest.mark.slow
def test_run_leaves_a_model_that_knows_the_rule_and_a_full_record(finished, data_dir):
    record = record_of(finished)
    assert record["status"] == "finished" and record["seed"] == 42
    assert record["configuration"]["SASRecArguments"]["hidden_size"] == 16
    assert record["versions"]["torch"] and record["durations_seconds"]["train"] > 0
    # Two of thirty items can come next, so a model that knows the rule is right about half the time.
    assert record["metrics"]["test"]["unmasked/hit_ratio@10"]["mean"] > 0.95
    assert record["metrics"]["test"]["unmasked/mrr"]["mean"] > 0.5
    model = SASRecForNextItem.from_pretrained(finished)
    item_ids, _ = model.recommend(torch.tensor([[1, 2, 3]]), top_k=2)
    assert set(model.catalogue.titles(item_ids[0])) == {"Title 103", "Title 104"}
    log = (finished / "run.log").read_text()
    assert "step 48 of 48, 0 s left: eval_loss" in log and "eval_ndcg@10" in log
    assert list(finished.rglob("events.out.tfevents.*")), "TensorBoard was asked for"


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_result(finished, data_dir, tmp_path):
    output_dir = tmp_path / "killed"
    kills = 0
    for epochs_before_kill in (2, 5):
        process = subprocess.Popen(command(data_dir, output_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")]
            if steps and max(steps) >= epochs_before_kill * 4:  # 240 users / 64 = 4 steps per epoch
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills == 2, "the run ended before it could be killed: train longer"
    assert record_of(output_dir)["status"] == "running"
    result = run(data_dir, output_dir)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr
    assert record_of(output_dir)["metrics"] == record_of(finished)["metrics"]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished, output_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_finished_run_is_never_overwritten(finished, data_dir):
    before = (finished / "model.safetensors").read_bytes()
    result = run(data_dir, finished)
    assert result.returncode != 0 and "contains a finished run: choose another output_dir" in result.stderr
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rte", "1e-3"], "learning_rte"),
        (["--hidden_size", "wide"], "hidden_size"),
        (["--block_type", "post"], "pre_norm"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--windows", "first"], "windows='first'"),
        (["--dataloader_persistent_workers", "true", "--dataloader_num_workers", "1"], "dataloader_persistent_workers"),
        (
            ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"],
            "early_stopping_patience",
        ),
    ],
)
def test_bad_settings_say_what_is_expected_before_anything_is_written(data_dir, tmp_path, options, message):
    result = run(data_dir, tmp_path / "bad", *options)
    assert result.returncode != 0 and message in result.stderr
    assert not list((tmp_path / "bad").glob("**/*.safetensors"))


@pytest.mark.slow
def test_rows_that_are_prefixes_teach_their_last_target_only(tmp_path):
    sequences = cyclic_sequences(num_users=100, protocol="temporal_users")
    sequences.save(tmp_path / "data")
    refused = run(tmp_path / "data", tmp_path / "all", "--targets", "all")
    assert refused.returncode != 0 and "its rows are prefixes" in refused.stderr
    trained = run(tmp_path / "data", tmp_path / "last", "--num_train_epochs", "1")
    assert trained.returncode == 0, trained.stderr
    assert record_of(tmp_path / "last")["metrics"]["test"]["candidates/hit_ratio@1"]["mean"] >= 0
