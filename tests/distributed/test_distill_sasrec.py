"""recipes/distill_sasrec.py under `accelerate launch` with two real processes, against one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "distill_sasrec.py"
# Without dropout and without drawn negatives two processes with half the batch must compute what one computes with the
# whole: the ranking loss draws, so its weight is 0 here, and the teacher is asked in every step.
SETTINGS = [
    "--hidden_size", "16", "--max_length", "8", "--hidden_dropout", "0", "--attention_dropout", "0", "--lam", "0",
    "--kl_weight", "2", "--kl_temperature", "2", "--num_train_epochs", "4", "--learning_rate", "5e-3", "--optim",
    "adamw_torch", "--early_stopping_patience", "0", "--logging_strategy", "steps", "--logging_steps", "1",
    "--gradient_accumulation_steps", "2", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=256)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def run_of(launch, parts, tmp_path_factory):
    """Run record, logged values and weights of a launch configuration; each runs once."""
    runs = {}

    def run(config):
        if config not in runs:
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            folders = ["--data_dir", parts / "data", "--teacher", parts / "teacher", "--output_dir", output_dir]
            batch_size = "32" if config == "cpu.yaml" else "16"
            launch(config, RECIPE, *folders, "--per_device_train_batch_size", batch_size, *SETTINGS)
            state = max(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
            logs = json.loads(state.read_text())["log_history"]
            record = json.loads((output_dir / "run.json").read_text())
            runs[config] = record, logs, load_file(output_dir / "model.safetensors")
        return runs[config]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml"])
def test_two_processes_distil_what_one_distils(run_of, config):
    (one, one_logs, expected), (two, two_logs, weights) = run_of("cpu.yaml"), run_of(config)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for name in ("loss", "base_loss", "kl_loss"):
        values, expected_values = ([entry[name] for entry in logs if name in entry] for logs in (two_logs, one_logs))
        assert len(values) == 16 and values[-1] < values[0]
        assert values == pytest.approx(expected_values, rel=1e-3), name
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
