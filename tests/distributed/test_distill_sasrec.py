"""recipes/distill_sasrec.py under `accelerate launch` with two real processes, against one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender

RECIPE = RECIPES / "distill_sasrec.py"
LABEL_RECIPE = RECIPE.with_name("label_with_teacher.py")
# Without dropout two processes with half the batch must compute what one computes with the whole.
SETTINGS = [
    "--hidden_size", "16", "--max_length", "8", "--hidden_dropout", "0", "--attention_dropout", "0",
    "--num_train_epochs", "4", "--learning_rate", "5e-3", "--optim", "adamw_torch", "--early_stopping_patience", "0",
    "--logging_strategy", "steps", "--logging_steps", "1", "--gradient_accumulation_steps", "2",
    "--disable_tqdm", "true",
]  # fmt: skip
KINDS = {
    "teacher": ["--lam", "0", "--kl_weight", "2", "--kl_temperature", "2"],
    # So many negatives that their mean hardly depends on the draw; so few labels that a process may meet none.
    "labels": [
        "--top_k",
        "3",
        "--num_distillation_negatives",
        "4000",
        "--distilled_positions",
        "all",
        "--alpha",
        "0.1",
    ],
}


@pytest.fixture(scope="module")
def parts(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=256)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "teacher")
    folders = ["--data_dir", folder / "data", "--teacher", folder / "teacher", "--output_dir", folder / "labels"]
    launch("cpu.yaml", LABEL_RECIPE, *folders, "--labelled_positions", "all", "--budget", "60", "--top_k", "3")
    return folder


@pytest.fixture(scope="module")
def run_of(launch, parts, tmp_path_factory):
    """Run record, logged values and weights by launch configuration and kind of teacher; each runs once."""
    runs = {}

    def run(config, kind):
        if (config, kind) not in runs:
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            source = ["--teacher_labels", parts / "labels"] if kind == "labels" else ["--teacher", parts / "teacher"]
            folders = ["--data_dir", parts / "data", "--output_dir", output_dir, *source]
            batch_size = "32" if config == "cpu.yaml" else "16"
            sizes = ["--per_device_train_batch_size", batch_size]
            launch(config, RECIPE, *folders, *sizes, *SETTINGS, *KINDS[kind])
            state = max(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
            logs = json.loads(state.read_text())["log_history"]
            record = json.loads((output_dir / "run.json").read_text())
            runs[config, kind] = record, logs, load_file(output_dir / "model.safetensors")
        return runs[config, kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml"])
def test_two_processes_distil_what_one_distils(run_of, config):
    (one, one_logs, expected), (two, two_logs, weights) = run_of("cpu.yaml", "teacher"), run_of(config, "teacher")
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for name in ("loss", "base_loss", "kl_loss"):
        values, expected_values = ([entry[name] for entry in logs if name in entry] for logs in (two_logs, one_logs))
        assert len(values) == 16 and values[-1] < values[0]
        assert values == pytest.approx(expected_values, rel=1e-3), name
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_learn_the_labels_that_one_learns(run_of, config):
    (_, one_logs, expected), (_, two_logs, weights) = run_of("cpu.yaml", "labels"), run_of(config, "labels")
    for name in ("loss", "base_loss", "ranking_loss", "dro_loss"):
        values, wanted = ([entry[name] for entry in logs if name in entry] for logs in (two_logs, one_logs))
        assert len(values) == 16 and sum(value > 0 for value in wanted) > 8, name
        assert values == pytest.approx(wanted, rel=2e-2, abs=1e-3), name
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=2e-2, atol=2e-2)
