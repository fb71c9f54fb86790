"""The folders of the project and of the files that it is checked against."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
RECIPES = PROJECT / "recipes"
# Golden files that are not part of the project; tests that read them are skipped where they are missing.
SHARED = PROJECT.parent / "shared"
