"""docs/paper_index.md names options that are accepted, and tests that exist."""

import re

import pytest

import hf_ilora
from hf_ilora.runs import parse_arguments
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.commands import COMMANDS
from tests.paths import PROJECT, RECIPES

PAGE = (PROJECT / "docs" / "paper_index.md").read_text(encoding="utf-8")
LINES = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| Method")]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in LINES]
SOURCES = [path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("test_*.py")]
TESTS = {name for source in SOURCES for name in re.findall(r"^ *def (test_\w+)", source, re.MULTILINE)}


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_has_these_tables():
    assert all(len(row) == 4 and all(row) for row in ROWS) and len(ROWS) > 20


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_options_of_a_method_are_accepted(row):
    assert code(row[2])
    for option in code(row[2]):
        if option.startswith("hf-ilora "):
            words = option.split()
            recipe = load_recipe(RECIPES / f"{COMMANDS[words[1]].recipe}.py")
            assert parse_arguments(recipe.ARGUMENTS, words[2:])
        else:
            name = re.match(r"\w+", option)[0]
            assert eval(option, {name: getattr(hf_ilora, name)}) is not None


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_of_a_method_exist(row):
    assert code(row[3]) and set(code(row[3])) <= TESTS
