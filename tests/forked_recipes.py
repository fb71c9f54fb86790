"""Runs recipes in forks of one process that has imported everything: importing torch takes seconds, a tiny run less.

A fork can be killed at a given point of its progress, counted in changes to files: only the moments between two changes
matter, and the count is the same in every run.
"""

import contextlib
import json
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from tests.paths import PROJECT, RECIPES
from tests.recipe_runs import ENVIRONMENT, recipe_words

NAMES = (
    "prepare_data",
    "fit_counts",
    "train_sasrec",
    "train_ilora",
    "label_with_teacher",
    "distill_sasrec",
    "evaluate_models",
    "run_pipeline",
)
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


@dataclass
class Ended:
    """The end of a fork.

    Args:
        code: the exit code, or minus the number of the signal.
        changes: how many changes to files below the watched folder it had begun.
        output: what it printed.
    """

    code: int
    changes: int
    output: str


class ForkedRecipes:
    """The process that is forked. Use it as a context manager."""

    def __enter__(self) -> "ForkedRecipes":
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_recipes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
            env=os.environ | ENVIRONMENT | {"TOKENIZERS_PARALLELISM": "false"},
        )
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        self._server.wait()

    def run(self, name: str, /, watched: Path, fork: dict | None = None, **settings) -> Ended:
        """Run a recipe until it ends or is killed.

        Args:
            name: name of the recipe.
            watched: the folder whose files count.
            fork: `kill_at`: number of the change before which it is killed; `delay`: seconds by which the kill is late;
                `kill_children`: kill its children instead; `signal`: a signal to send instead of SIGKILL;
                `largest_file`: limit for the size of files, in bytes.
            settings: settings of the recipe, as `run_recipe` takes them.
        """
        request = {"name": name, "words": recipe_words(**settings), "watched": str(watched), "fork": fork or {}}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported prints
    from hf_ilora.runs.recipe_files import load_recipe

    recipes = {name: load_recipe(RECIPES / f"{name}.py") for name in NAMES}
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  accelerate imports it for the first Trainer, which takes seconds
    for line in sys.stdin:
        request = json.loads(line)
        changes = mmap.mmap(-1, 8)  # shared with the forks
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background of a shell ignore
            for standard in (1, 2):
                os.dup2(write_end, standard)
            _become(recipes, request, changes)
        os.close(write_end)
        with os.fdopen(read_end, errors="replace") as output:
            printed = output.read()  # to the end of the last process that holds it
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        ended = {"code": os.waitstatus_to_exitcode(status), "changes": _count(changes), "output": printed}
        answers.write(json.dumps(ended) + "\n")
        answers.flush()


def _become(recipes: dict, request: dict, changes: mmap.mmap) -> None:
    """Run the requested recipe in this fork, and end it."""
    import torch

    import hf_ilora.runs.pipeline as pipeline
    from hf_ilora.runs import run_main

    torch.set_num_threads(1)
    fork = request["fork"]
    if "largest_file" in fork:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fork["largest_file"],) * 2)
    pipeline._run = lambda stage, output_dir: _run_stage(recipes, stage, output_dir, run_main)
    kill = _kill_children if fork.get("kill_children") else _kill_session
    if "signal" in fork:
        kill = partial(os.kill, os.getpid(), fork["signal"])
    _count_changes(request["watched"], changes, fork.get("kill_at"), fork.get("delay", 0.0), kill)
    sys.argv = [f"{request['name']}.py", *request["words"]]
    _end_after(lambda: run_main(recipes[request["name"]].main))


def _run_stage(recipes: dict, stage, output_dir: Path, run_main: Callable) -> int:
    """Run a stage of a pipeline in a fork of the fork; both end together, as the pipeline and its stages do."""
    pid = os.fork()
    if pid == 0:
        sys.argv = [stage.recipe, *stage.recipe_options(output_dir)]
        _end_after(lambda: run_main(recipes[Path(stage.recipe).stem].main))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_after(run: Callable[[], None]) -> None:
    code = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_session() -> None:
    os.killpg(0, signal.SIGKILL)


def _kill_children() -> None:
    for child in psutil.Process().children():
        child.kill()


def _count_changes(
    watched: str, changes: mmap.mmap, kill_at: int | None, delay: float, kill: Callable[[], None]
) -> None:
    """Count the changes to files below `watched`, and kill before the change number `kill_at`."""

    def on_event(event: str, arguments: tuple) -> None:
        if event not in _CHANGES or not str(arguments[0]).startswith(watched):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        count = _count(changes) + 1
        changes[:8] = count.to_bytes(8, "little")
        if count == kill_at and delay:
            signal.setitimer(signal.ITIMER_REAL, delay)
        elif count == kill_at:
            kill()

    if delay:
        signal.signal(signal.SIGALRM, lambda *_: kill())
    sys.addaudithook(on_event)


def _count(changes: mmap.mmap) -> int:
    return int.from_bytes(changes[:8], "little")


if __name__ == "__main__":
    _serve()
