"""Writes the help texts that `hf-ilora COMMAND --help` prints, from the options of the recipes.

    python -m hf_ilora_cli.write_help      # or: make help-texts

Run it after a change to the options, docstring or configurations of a recipe; a test compares the texts.
"""

from hf_ilora.runs.help_text import recipe_help
from hf_ilora.runs.recipe_files import load_recipe

from .commands import COMMANDS, Command
from .main import help_file
from .shipped import RECIPE, shipped_folder


def rendered_help(command: Command) -> str:
    """The help text of a command, from the current options of its recipe."""
    recipe = shipped_folder(RECIPE) / f"{command.recipe}.py"
    module = load_recipe(recipe)
    return recipe_help(recipe, module.__doc__, module.ARGUMENTS, command.program)


def main() -> None:
    """Write the help text of every command."""
    for command in COMMANDS.values():
        help_file(command).write_text(rendered_help(command), encoding="utf-8")


if __name__ == "__main__":
    main()
