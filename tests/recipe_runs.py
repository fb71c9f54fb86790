"""Recipes in tests: their command lines, their results, and runs that are killed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState

from tests.paths import RECIPES
from tests.processes import kill_with_children

# Several threads add numbers in another order each time, which changes the last digits.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass
class RecipeRun:
    """The results of a recipe.

    Args:
        output_dir: the folder that it wrote; None for a recipe without one.
        trainer: the Trainer that it built; None for a recipe that does not train or ran in another process.
    """

    output_dir: Path | None
    trainer: Trainer | None = None

    @property
    def record(self) -> dict:
        """The content of run.json."""
        return json.loads((self.output_dir / "run.json").read_text())

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The saved weights, by name."""
        return load_file(self.output_dir / "model.safetensors")

    @property
    def state(self) -> TrainerState:
        """The state of the Trainer; for a run in another process, the state in its newest checkpoint."""
        if self.trainer is not None:
            return self.trainer.state
        return TrainerState.load_from_json(newest_checkpoint(self.output_dir) / "trainer_state.json")

    def logged(self, name: str) -> list[float]:
        """The values that the Trainer logged under a name."""
        return [entry[name] for entry in self.state.log_history if name in entry]


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the most steps, or None."""
    return max(output_dir.glob("checkpoint-*"), key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of steps before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def wait_for_checkpoint(process: subprocess.Popen, output_dir: Path, step: int) -> None:
    """Wait until a run in another process has a checkpoint of `step` or more steps, or has ended.

    The newest checkpoint may be half written; with more than one epoch's steps, the one before it is whole.
    """
    while process.poll() is None and (checkpoint_step(newest_checkpoint(output_dir) or Path("checkpoint-0")) < step):
        time.sleep(0.02)


def recipe_words(**settings) -> list[str]:
    """The command line that gives a recipe these settings; None leaves one out, a list gives several values."""
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(_word, value if isinstance(value, list | tuple) else [value])]
    return words


def recipe_command(name: str, /, **settings) -> list[str]:
    """The words with which a user starts a recipe."""
    return [sys.executable, str(RECIPES / f"{name}.py"), *recipe_words(**settings)]


def kill_recipe(name: str, after_step: int, /, **settings) -> None:
    """Start a recipe as a process, and kill it once a checkpoint of `after_step` or more steps is there.

    Raises:
        AssertionError: the recipe ended before it could be killed.
    """
    process = subprocess.Popen(
        recipe_command(name, **settings),
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        checkpoint = newest_checkpoint(settings["output_dir"])
        if checkpoint is not None and checkpoint_step(checkpoint) >= after_step:
            break
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed: train longer"
    kill_with_children(process)
    process.wait()


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
