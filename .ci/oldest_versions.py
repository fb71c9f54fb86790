"""Prints the lower bounds of pyproject.toml as constraints for pip, without torch, which `make test-oldest` chooses."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
ranges = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
for requirement in map(Requirement, ranges):
    if requirement.name not in ("torch", project["name"]):
        (lowest,) = [each.version for each in requirement.specifier if each.operator == ">="]
        print(f"{requirement.name}=={lowest}")
