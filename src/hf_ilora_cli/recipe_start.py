"""Answers `--help`, and lets OpenMP's threads sleep. A recipe imports it before anything else.

The other imports of a recipe take seconds, so `python recipes/x.py --help` ends here; it prints the same options as
`hf-ilora x --help`. Importing a recipe as a module prints nothing.
"""

import sys
from pathlib import Path

from . import openmp  # noqa: F401
from .closed_output import closed_output_ends
from .commands import COMMANDS
from .main import help_file
from .shipped import RECIPE, shipped_folder


def help_of_recipe(recipe: Path, docstring: str) -> str:
    """The help text of a recipe that is started as a file, without `hf-ilora`.

    Args:
        recipe: the file.
        docstring: the recipe's docstring; its first indented block is an example.
    """
    command = next(command for command in COMMANDS.values() if command.recipe == recipe.stem)
    usage, summary, _, *groups = help_file(command).read_text(encoding="utf-8").split("\n\n")
    groups = [group for group in groups if not group.startswith("How to launch:")]  # the options of `hf-ilora` alone
    usage = usage.replace(command.program, recipe.name, 1)
    return "\n\n".join([usage, summary, f"Example:\n{docstring_example(docstring)}", *groups])


def docstring_example(docstring: str) -> str:
    """The first indented block of a docstring, indented by two spaces."""
    blocks = [block for block in docstring.split("\n\n")[1:] if block.startswith("    ")]
    return "\n".join(f"  {line[4:]}" for line in blocks[0].splitlines()) if blocks else "  (none)"


def answer_help() -> None:
    """Print the help and end the program, if the program is a shipped recipe and `--help` is among its options."""
    recipe, words = Path(sys.argv[0]).resolve(), set(sys.argv[1:])
    asks_for_help = {"-h", "--help"} & words and "--help-all" not in words
    if asks_for_help and recipe.parent == shipped_folder(RECIPE).resolve():
        with closed_output_ends():
            print(help_of_recipe(recipe, sys.modules["__main__"].__doc__), end="")
        sys.exit(0)


answer_help()
