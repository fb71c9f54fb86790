"""Checks of settings that several recipes share; they run before a recipe reads or writes anything."""

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import torch

DTYPES = ("float32", "bfloat16", "float16")


def check_at_least_one(settings: object, *names: str) -> None:
    """Raise a ValueError unless all these fields of a dataclass are at least 1."""
    for name in names:
        if vars(settings)[name] < 1:
            raise ValueError(f"{name} is {vars(settings)[name]}: expected at least 1")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError for a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(map(str, choices))}")


def check_device(device: str) -> None:
    """Raise a ValueError for a device that this machine does not have."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # of torch without the device's libraries
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device is {device!r}: expected cpu, or one that torch finds here ({reason})") from error


def check_threads(name: str, threads: int) -> None:
    """Raise a ValueError for more threads than this machine has processors: OpenMP would end the process."""
    if threads > (os.cpu_count() or 1):
        raise ValueError(f"{name} is {threads}: expected at most {os.cpu_count()}, the processors of this machine")


def check_top_k(name: str, top_k: int, num_items: int, most_seen: int = 0) -> None:
    """Raise a ValueError if the catalogue has fewer than `top_k` items to recommend.

    Args:
        name: name of the setting, for the message.
        top_k: number of items to recommend.
        num_items: size of the catalogue.
        most_seen: the largest number of distinct items in a history, if seen items are excluded; else 0.
    """
    if top_k > num_items - most_seen:
        seen = f" minus the {most_seen} that one history contains" if most_seen else ""
        raise ValueError(
            f"{name} is {top_k}: expected at most {num_items - most_seen}, the {num_items} items of the catalogue"
            f"{seen}; lower it"
        )


def most_seen_items(histories: Sequence[np.ndarray]) -> int:
    """The largest number of distinct items in a history."""
    most = 0
    for history in sorted(histories, key=len, reverse=True):
        if len(history) <= most:
            break
        most = max(most, len(np.unique(history)))
    return most


def names_of_models(models: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The names of the models in a table: `names`, by default the folders and Hub names themselves.

    Raises:
        ValueError: there are no models, or the numbers of names and models differ.
    """
    if not models:
        raise ValueError("models is empty: expected at least one folder or Hub name")
    if not names:
        return [model.rstrip("/") for model in models]
    if len(names) != len(models):
        raise ValueError(f"names are {list(names)} for {len(models)} models: expected one name for each; pass --names")
    return list(names)


def checked_plot(plot: bool | None) -> bool:
    """Whether to plot: `plot` itself, or for None whether matplotlib is installed.

    Raises:
        ValueError: `plot` is true and matplotlib is not installed.
    """
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if plot and not has_matplotlib:
        raise ValueError("plot needs matplotlib: install hf_ilora[plot], or pass --plot false")
    return has_matplotlib if plot is None else plot
