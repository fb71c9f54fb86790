"""Starts the recipe of a command, and answers `--help` without importing torch."""

import difflib
import os
import sys
from importlib import metadata
from pathlib import Path

from . import openmp  # noqa: F401
from .closed_output import closed_output_ends
from .commands import COMMANDS, PROGRAM, PROGRAM_VARIABLE, Command
from .recipe_process import run_recipe
from .shipped import RECIPE, shipped_folder
from .shown_text import shown
from .signals import INTERRUPTED_CODE

HELP_FOLDER = Path(__file__).with_name("help")


def main(argv: list[str] | None = None) -> int:
    """Run a command line of `hf-ilora`.

    Args:
        argv: the words after `hf-ilora`; None reads `sys.argv`.

    Returns:
        The exit code: that of the recipe, 2 for a mistake on the command line, 130 after Ctrl-C.

    Raises:
        SystemExit: with code 141, when the reader of the output has left.
    """
    with closed_output_ends():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--debug"]:  # accepted before the command too
        words = [*words[1:], "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(PROGRAM, metadata.version("hf_ilora"))
        return 0
    name, *options = words
    if name not in COMMANDS:
        closest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        message = f"unknown command {shown(name)}: did you mean {closest}? See {PROGRAM} --help"
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if "-h" in options or "--help" in options:
        print(help_file(command).read_text(encoding="utf-8"), end="")
        return 0
    try:
        return start(command, options)
    except KeyboardInterrupt:
        return INTERRUPTED_CODE


def overview() -> str:
    """The text of `hf-ilora --help`."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {command.name:<{width}}{command.summary}" for command in COMMANDS.values())
    return f"""\
usage: {PROGRAM} COMMAND [CONFIG ...] [--option value ...]

Train LLM recommenders and distil them into a SASRec that is cheap to serve.

Example:
  {PROGRAM} pipeline quickstart

Commands:
{commands}

`{PROGRAM} COMMAND --help` describes a command and its options. `{PROGRAM} --version` prints the version."""


def help_file(command: Command) -> Path:
    """The rendered help of a command; `python -m hf_ilora_cli.write_help` writes it."""
    return HELP_FOLDER / f"{command.recipe}.txt"


def start(command: Command, options: list[str]) -> int:
    """Run the recipe of a command to its end, through accelerate's launcher if it needs that; returns the exit code."""
    recipe = shipped_folder(RECIPE) / f"{command.recipe}.py"
    os.environ[PROGRAM_VARIABLE] = command.program
    has_launch_option = any(
        word.partition("=")[0].replace("-", "_") in ("__launch", "__num_processes") for word in options
    )
    if (command.launched or (command.may_be_launched and has_launch_option)) and "--help-all" not in options:
        from .launching import launch_words

        return launch_words(recipe, options)
    run_recipe(str(recipe), options)
    return 0
