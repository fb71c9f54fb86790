"""Imports a recipe as a module, to read its options without starting it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_recipe(recipe: Path) -> ModuleType:
    """The recipe as a module, whose `ARGUMENTS` are the dataclasses of its options."""
    name = f"hf_ilora_recipe_{recipe.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, recipe)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their types up there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
