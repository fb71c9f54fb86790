"""OpenMP's waiting threads sleep in every recipe and command; spinning threads are slow beside a busy program."""

import os
import subprocess
import sys

import pytest

from tests.paths import PROJECT, RECIPES


def openmp_settings(*command: str, **environment: str) -> str:
    """The settings that OpenMP prints when a program loads it."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = inherited | {"OMP_DISPLAY_ENV": "true"} | environment
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.stderr


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda recipe: recipe.stem)
def test_a_recipe_sets_the_policy_before_it_imports_anything(recipe):
    lines = recipe.read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports[0].startswith("import hf_ilora_cli.recipe_start ")


@pytest.mark.slow
def test_threads_wait_asleep_in_recipes_and_commands():
    recipe = [sys.executable, str(RECIPES / "recommend.py"), "--top_k", "0"]
    command = [sys.executable, "-m", "hf_ilora", "recommend", "--top_k", "0"]
    for words in (recipe, command):
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in openmp_settings(*words)
        assert "OMP_WAIT_POLICY = 'ACTIVE'" in openmp_settings(*words, OMP_WAIT_POLICY="active")
