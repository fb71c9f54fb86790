"""Starts a recipe through accelerate's launcher, and returns the recipe's exit code.

`accelerate launch` itself ends with code 1 and a traceback of its own, whatever the recipe's exit code was.
"""

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from .commands import PROGRAM_VARIABLE
from .shipped import LAUNCH, find_file
from .shown_text import shown, shown_lines
from .signals import Terminated, interrupted_code, termination_raises

RECIPE_PROCESS = str(Path(__file__).with_name("recipe_process.py"))
SECONDS_TO_NOTICE, SECONDS_TO_END = 3, 10


def launch_words(recipe: Path, words: list[str]) -> int:
    """Launch a recipe with the words of a command line, `--launch` and `--num_processes` among them.

    Args:
        recipe: the file to start.
        words: the options of the recipe and those of the launch.

    Returns:
        The exit code of the recipe, or 2 for a mistake in the options of the launch.
    """
    program = os.environ.get(PROGRAM_VARIABLE, recipe.name)
    try:
        launch, num_processes, options = take_launch_options(words)
        config_file = launch_config(launch, num_processes)
    except ValueError as error:
        print(f"{program}: error: {shown(error)}", file=sys.stderr)
        return 2
    return run_launched(recipe, options, config_file, num_processes, program)


def take_launch_options(words: list[str]) -> tuple[str | None, int | None, list[str]]:
    """Split a command line into the value of `--launch`, that of `--num_processes`, and the other words.

    Raises:
        ValueError: an option has no value, or the number of processes is no positive whole number.
    """
    found: dict[str, str | None] = {"launch": None, "num_processes": None}
    rest, remaining = [], list(words)
    while remaining:
        word = remaining.pop(0)
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not word.startswith("--") or name not in found:
            rest.append(word)
        elif equals:
            found[name] = value
        elif remaining:
            found[name] = remaining.pop(0)
        else:
            raise ValueError(f"{word} expects a value after it, found the end of the command line")
    count = found["num_processes"]
    if count is not None and not (count.isdecimal() and int(count) > 0):
        raise ValueError(f"--num_processes is {count}: expected a number of processes, such as 2")
    return found["launch"], None if count is None else int(count), rest


def launch_config(launch: str | None, num_processes: int | None) -> Path:
    """The accelerate configuration that `launch` names; None takes the one that fits this machine.

    Raises:
        ValueError: the configuration is unknown, or it starts a single process and `num_processes` is larger.
    """
    if launch is None:
        several = num_processes is not None and num_processes > 1
        if torch.accelerator.is_available():
            launch = "ddp" if several else "single_gpu"
        else:
            launch = "multi_cpu" if several else "cpu"
    config_file = find_file(LAUNCH, launch)
    settings = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if num_processes is not None and num_processes > 1 and settings["distributed_type"] == "NO":
        raise ValueError(
            f"--num_processes is {num_processes} and --launch {launch} starts one process: expected a configuration "
            "for several, such as multi_cpu or ddp"
        )
    return config_file


def run_launched(recipe: Path, options: list[str], config_file: Path, num_processes: int | None, program: str) -> int:
    """Start the processes and wait for them; returns their exit code."""
    words = ["--config_file", str(config_file)]
    if config_file.stem == "single_gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        words += ["--gpu_ids", visible.split(",")[0]] if visible else []
    if num_processes is not None:
        words += ["--num_processes", str(num_processes)]
    if "--debug" not in options:
        logging.disable(logging.CRITICAL)  # accelerate and torchrun report the failure of a child at length
    try:
        with termination_raises():
            launch_command(launch_command_parser().parse_args([*words, RECIPE_PROCESS, str(recipe), *options]))
    except subprocess.CalledProcessError as error:  # of one process
        return _exit_code(error.returncode, program)
    except ChildFailedError as error:  # of several
        return _report(error, program)
    except SignalException as error:
        return 128 + int(error.sigval)
    except KeyboardInterrupt as error:
        end_children(error)
        return interrupted_code(error)
    except (ImportError, ValueError) as error:  # DeepSpeed is not installed; accelerate refuses the configuration
        print(f"{program}: error: {shown(error)}", file=sys.stderr)
        return 2
    return 0


def end_children(error: KeyboardInterrupt) -> None:
    """End the children of this process after `error`. A terminal sends them Ctrl-C too, so they first get a moment."""
    alive = psutil.Process().children(recursive=True)
    if not isinstance(error, Terminated):
        _, alive = psutil.wait_procs(alive, timeout=SECONDS_TO_NOTICE)
    for child in alive:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    _, alive = psutil.wait_procs(alive, timeout=SECONDS_TO_END)
    for child in alive:
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _report(error: ChildFailedError, program: str) -> int:
    """Print the error unless the main process has; returns the exit code of the failure that caused the others.

    When one process fails, the others fail with it: torchrun ends them, or they lose the connection. A user's mistake
    comes first, then a killed process, then an error that `run_main` recorded in a process other than the main one.
    """
    failures = list(error.failures.values())
    recorded = [failure for failure in failures if isinstance(failure.message, dict)]
    if 0 in error.failures and error.failures[0].exitcode == 2:
        return 2
    for failure in recorded:
        if failure.exitcode == 2:
            print(f"{program}: error: {shown(failure.message['message'].partition(': ')[2])}", file=sys.stderr)
            return 2
    for failure in failures:
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # by which torchrun ends the others
            return _exit_code(failure.exitcode, program, f"process {failure.local_rank}")
    for failure in recorded:
        callstack = shown_lines(failure.message["extraInfo"]["py_callstack"])
        print(f"process {failure.local_rank}: {callstack}", file=sys.stderr)
    exit_codes = [failure.exitcode for failure in [*recorded, *failures] if failure.exitcode > 0]
    return exit_codes[0] if exit_codes else _exit_code(error.get_first_failure()[1].exitcode, program)


def _exit_code(returncode: int, program: str, process: str = "the process") -> int:
    """The exit code as a shell counts it; a process that was killed is reported."""
    if returncode >= 0:
        return returncode
    name = signal.Signals(-returncode).name
    reason = ", as the system does when memory runs out" if returncode == -signal.SIGKILL else ""
    print(f"{program}: error: {process} was ended by {name}{reason}", file=sys.stderr)
    return 128 - returncode
