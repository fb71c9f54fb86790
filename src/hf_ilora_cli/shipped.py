"""Finds the files that ship with hf_ilora: recipes, their configurations and prompts, accelerate's configurations."""

import difflib
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kind:
    """A kind of shipped file.

    Args:
        description: the name of such a file in error messages.
        folder: the files' folder, relative to the root of the project.
        suffix: the files' suffix, which a name may leave out.
    """

    description: str
    folder: str
    suffix: str


RECIPE = Kind("recipe", "recipes", ".py")
CONFIG = Kind("configuration", "recipes/configs", ".yaml")
PROMPT = Kind("prompt file", "recipes/prompts", ".txt")
LAUNCH = Kind("accelerate configuration", "accelerate_configs", ".yaml")


def shipped_folder(kind: Kind) -> Path:
    """The folder of the shipped files of a kind.

    An installed wheel has them inside the package hf_ilora, a checkout beside `src`.
    """
    package = Path(importlib.util.find_spec("hf_ilora").origin).parent  # found, not imported
    installed = package / kind.folder
    return installed if installed.is_dir() else package.parents[1] / kind.folder


def shipped_names(kind: Kind) -> list[str]:
    """The names of the shipped files of a kind, such as `ml-100k/sasrec`, in alphabetical order."""
    folder = shipped_folder(kind)
    return sorted(str(path.relative_to(folder).with_suffix("").as_posix()) for path in folder.rglob(f"*{kind.suffix}"))


def find_file(kind: Kind, word: str) -> Path:
    """The existing file `word`, or else the shipped file of that name.

    Args:
        kind: the kind of file.
        word: a path, which counts from the working directory, or the name of a shipped file, with or without suffix.

    Raises:
        ValueError: neither exists. The message lists the shipped files, the closest first.
    """
    if Path(word).is_file():
        return Path(word)
    names = shipped_names(kind)
    name = word.removesuffix(kind.suffix)
    if name in names:
        return shipped_folder(kind) / f"{name}{kind.suffix}"
    raise ValueError(
        f"{kind.description} {word} not found: expected a file (paths count from the working directory, {Path.cwd()}) "
        f"or one of the shipped {', '.join(closest_first(name, names))}"
    )


def closest_first(word: str, names: list[str]) -> list[str]:
    """The names, the most similar to `word` first."""
    # the last part counts too: `sasrec` is close to `ml-100k/sasrec`
    return sorted(names, key=lambda name: -max(_likeness(word, name), _likeness(word, name.rpartition("/")[2])))


def _likeness(word: str, name: str) -> float:
    return difflib.SequenceMatcher(None, word, name).ratio()
