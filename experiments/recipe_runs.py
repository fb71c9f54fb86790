"""Runs recipes in their own processes, and reads their records; shared by the experiments."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from hf_ilora.files import written_whole
from hf_ilora.runs import ProgramFailed, configuration_differences, is_finished, parse_arguments, read_record
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.shipped import RECIPE, find_file

logger = logging.getLogger(__name__)

_loading = threading.Lock()  # another thread would take a half-loaded module for a whole one

_Setting, _Result = TypeVar("_Setting"), TypeVar("_Result")


def in_parallel(run: Callable[[_Setting], _Result], settings: Sequence[_Setting], parallel: int) -> list[_Result]:
    """The results of `run` for all settings, in their order, `parallel` of them at a time."""
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(run, settings))


def threads_per_run(parallel: int) -> int:
    """CPU threads of each of `parallel` runs."""
    return max(1, (os.cpu_count() or 1) // parallel)


def run_recipe(recipe: str, options: Sequence[object], threads: int) -> None:
    """Run a recipe in its own process.

    Args:
        recipe: name of the recipe, such as "train_sasrec".
        options: its command line.
        threads: CPU threads of the process.

    Raises:
        ProgramFailed: when the recipe fails; the message ends with its output.
    """
    command = [sys.executable, str(find_file(RECIPE, recipe)), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        message = f"{' '.join(command[1:])} failed: {finished.stderr[-2000:].rstrip()}"
        raise ProgramFailed(message, finished.returncode)


def record_of_run(recipe: str, options: Sequence[object], folder: Path, threads: int) -> dict:
    """Run a recipe unless its run is finished, and return the record of the run.

    Args:
        recipe: name of the recipe.
        options: its command line without `output_dir`.
        folder: folder of the run.
        threads: CPU threads of the process.

    Raises:
        ProgramFailed: the recipe failed.
        ValueError: the folder contains a finished run of another configuration.
    """
    words = [*map(str, options), "--output_dir", str(folder)]
    if not is_finished(folder):
        logger.info("%s begins in %s, see run.log there", recipe, folder)
        run_recipe(recipe, words, threads)
    record = read_record(folder / "run.json")
    with _loading:
        module = load_recipe(find_file(RECIPE, recipe))
    arguments = parse_arguments(module.ARGUMENTS, words)
    differences = configuration_differences(record, arguments)
    if differences:
        raise ValueError(
            f"{folder} contains a finished run of another configuration than {recipe} {' '.join(words)}: "
            f"{'; '.join(differences)}; choose another output_dir, or delete the folder"
        )
    return record


def described_origin(records: Sequence[dict]) -> str:
    """Data, code and versions of the runs; all values where the runs differ."""
    commits = [
        "no checkout" if git is None else git["commit"][:10] + (" with uncommitted changes" if git["dirty"] else "")
        for git in (record["git"] for record in records)
    ]
    values = {
        "data fingerprint": [record["data_fingerprint"][:16] for record in records],
        "commit": commits,
        "torch": [record["versions"]["torch"] for record in records],
        "threads per run": [str(record["threads"]) for record in records],
    }
    return "; ".join(f"{name} {', '.join(dict.fromkeys(each))}" for name, each in values.items())


def write_table(table: str, text: str, content: str) -> None:
    """Write `text` to <table>.md and `content` to <table>.json."""
    for suffix, each in ((".md", text), (".json", content)):
        with written_whole(table + suffix) as path:
            path.write_text(each + "\n", encoding="utf-8")
