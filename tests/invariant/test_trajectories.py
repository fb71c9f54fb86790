"""Short trainings whose losses and gradient norms are pinned, however they are started and divided.

A change that moves trajectories.json changes what users train: write the file anew only when that is meant, and say
why.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.invariant.runs import RECIPES, STEPS, TRAINERS, recipe_words, save_inputs, trajectory
from tests.paths import PROJECT
from tests.paths import RECIPES as RECIPE_FOLDER

PINNED = json.loads(Path(__file__).with_name("trajectories.json").read_text())
KINDS = list(TRAINERS)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# Without draws for each batch, since these would tell batches of different sizes apart.
WITHOUT_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
EQUAL_DRAWS = {
    "sasrec": WITHOUT_DROPOUT,
    "ilora": {"lora_dropout": 0.0, "curriculum_steps": 0},
    "distilled": WITHOUT_DROPOUT | {"lam": 0.8, "alpha": 0.0},
}


def has_locked_versions() -> bool:
    """Whether the libraries that train are those of requirements.lock."""
    locked = dict(
        line.split("==") for line in (PROJECT / "requirements.lock").read_text().splitlines() if line.count("==") == 1
    )
    names = ("accelerate", "datasets", "numpy", "torch", "transformers")
    return all(version(name).partition("+")[0] == locked[name].strip() for name in names)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_same(found: list[dict], expected: list[dict], **tolerance) -> None:
    assert len(found) == len(expected) == STEPS
    for step, (values, pinned) in enumerate(zip(found, expected, strict=True)):
        assert values == pytest.approx(pinned, **tolerance), f"step {step + 1}"


@pytest.mark.skipif(not has_locked_versions(), reason="other versions of the libraries draw other random numbers")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradient_norms_are_the_pinned_ones(parts, tmp_path, kind):
    trainer = TRAINERS[kind](parts, tmp_path)
    trainer.train()
    assert_same(trajectory(trainer.state.log_history), PINNED[kind], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_eight_small_batches_are_one_large_one(parts, tmp_path, kind, monkeypatch):
    # negatives are drawn per batch: fixed ones make the two comparable
    monkeypatch.setattr(torch, "randint", lambda low, high, size, device=None: torch.full(size, 5))
    found, weights = [], []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = TRAINERS[kind](parts, tmp_path, **EQUAL_DRAWS[kind], **sizes)
        trainer.train()
        found.append(trajectory(trainer.state.log_history))
        weights.append({name: value for name, value in trainer.model.named_parameters() if value.requires_grad})
    assert_same(found[1], found[0], rel=1e-3)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-3)  # AdamW magnifies rounding


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_recipe_and_the_command_train_what_python_trains(parts, tmp_path, kind):
    trainer = TRAINERS[kind](parts, tmp_path / "python")
    trainer.train()
    trainer.save_model()
    recipe = RECIPES[kind][0]
    command = {"train_sasrec": "train-sasrec", "train_ilora": "train-ilora", "distill_sasrec": "distill"}[recipe]
    programs = {
        "recipe": [str(RECIPE_FOLDER / f"{recipe}.py")],
        "command": ["-m", "hf_ilora", command],
    }
    expected = load_file(tmp_path / "python" / "model.safetensors")
    for name, program in programs.items():
        words = recipe_words(kind, parts, tmp_path / name)
        done = subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, env=ONE_THREAD)
        assert done.returncode == 0, done.stderr
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(launch, parts, tmp_path, kind):
    recipe = RECIPE_FOLDER / f"{RECIPES[kind][0]}.py"
    states = []
    for config, batch_size in (("cpu.yaml", 8), ("multi_cpu.yaml", 4)):
        folder = tmp_path / config
        changes = EQUAL_DRAWS[kind] | {"per_device_train_batch_size": batch_size, "save_strategy": "steps"}
        changes |= {"save_steps": STEPS}
        if kind == "distilled":  # each process draws negatives of its own: many of them are alike on average
            changes |= {"num_distillation_negatives": 256}
        words = recipe_words(kind, parts, folder, **changes)
        launch(config, recipe, *drop(words, "--use_cpu"))
        states.append(json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text()))
    first, second = (trajectory(state["log_history"]) for state in states)
    assert_same(second, first, rel=3e-2 if kind == "distilled" else 1e-3)


def drop(words: list[str], option: str) -> list[str]:
    """A command line without an option and its value: the launcher decides."""
    place = words.index(option)
    return words[:place] + words[place + 2 :]
