"""Runs a recipe in this process as `python recipe.py` does, but ends quietly after Ctrl-C from its first line on.

The launcher starts this file, with the recipe and its options: the imports of a recipe take seconds, and `run_main`
handles Ctrl-C only after them. The process ends with the launcher.
"""

import os
import runpy
import sys

from hf_ilora_cli.signals import INTERRUPTED_CODE, end_with_parent


def run_recipe(recipe: str, options: list[str]) -> None:
    """Run a recipe to its end; a recipe that fails raises SystemExit."""
    sys.argv = [recipe, *options]
    sys.path[0] = os.path.dirname(recipe)
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    end_with_parent()
    try:
        run_recipe(sys.argv[1], sys.argv[2:])
    except KeyboardInterrupt:
        os._exit(INTERRUPTED_CODE)
