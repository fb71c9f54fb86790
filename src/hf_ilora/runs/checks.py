"""Checks of settings that several recipes share."""

import importlib.util
from collections.abc import Sequence


def check_at_least_one(settings: object, *names: str) -> None:
    """Raise a ValueError unless all these fields of a dataclass are at least 1."""
    for name in names:
        if vars(settings)[name] < 1:
            raise ValueError(f"{name} is {vars(settings)[name]}: expected at least 1")


def names_of_models(models: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The names of the models in a table: `names`, by default the folders and Hub names themselves.

    Raises:
        ValueError: for no models, and a number of names other than that of the models.
    """
    if not models:
        raise ValueError("models is empty: expected at least one folder or Hub name")
    if not names:
        return [model.rstrip("/") for model in models]
    if len(names) != len(models):
        raise ValueError(f"names are {list(names)} for {len(models)} models: expected one name for each; pass --names")
    return list(names)


def checked_plot(plot: bool | None) -> bool:
    """Whether to plot: as asked for, by default where matplotlib is installed.

    Raises:
        ValueError: if a plot is asked for and matplotlib is not installed.
    """
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if plot and not has_matplotlib:
        raise ValueError("plot needs matplotlib: install hf_ilora[plot], or pass --plot false")
    return has_matplotlib if plot is None else plot
