"""Filters of recommendations: the items to choose from, or to leave out, for all users or per user."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np
import torch

from .configuration_next_item import PADDING_ITEM_ID
from .histories import is_integer, padded_rows
from .top_k import ItemMasks

# Ids for all users, or a row of them per user.
ItemFilter = Iterable[int] | Iterable[Iterable[int]] | np.ndarray | torch.Tensor | None

_FORMS = "such as [3, 1, 2] for all users, or a row per history such as [[3, 1], [2]]"


def item_masks(
    num_rows: int,
    num_items: int,
    device: torch.device,
    seen: torch.Tensor | None = None,
    allowed_items: ItemFilter = None,
    excluded_items: ItemFilter = None,
) -> ItemMasks:
    """Convert the filters of `recommend` to masks.

    Args:
        num_rows: number of users.
        num_items: size of the catalogue.
        device: device of the scores.
        seen: (users, any) ids to leave out, padded with 0, or None.
        allowed_items, excluded_items: as in `item_filter`.

    Raises:
        ValueError: as `item_filter`.
    """
    allowed = item_filter("allowed_items", allowed_items, num_rows, num_items, device)
    excluded = item_filter("excluded_items", excluded_items, num_rows, num_items, device)
    return ItemMasks.from_filters(num_items, seen, allowed, excluded)


def item_filter(
    name: str, given: ItemFilter, num_rows: int, num_items: int, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """Turn the items of a filter into one tensor.

    Args:
        name: name of the argument, for messages.
        given: item ids for all users, a list, set, array or tensor (items,); or a row of them per user, of different
            lengths or padded with 0; or None.
        num_rows: number of users.
        num_items: size of the catalogue.
        device: device of the result.

    Returns:
        Ids (items,) for all users, or (batch, any) padded with 0, without repetitions; None if `given` is None.

    Raises:
        ValueError: for anything else, another number of rows, and ids outside the catalogue.
    """
    if given is None:
        return None
    ids = _as_tensor(name, given)
    if ids.dim() not in (1, 2) or not is_integer(ids.dtype):
        raise ValueError(
            f"{name} have shape {tuple(ids.shape)} and type {ids.dtype}: expected item ids as integers, {_FORMS}"
        )
    if ids.dim() == 2 and len(ids) != num_rows:
        raise ValueError(
            f"{name} have {len(ids)} rows for {num_rows} histories: expected a row of item ids per history, or ids "
            "(items,) for all of them"
        )
    ids = ids.to(device, torch.int64)
    if ids.numel():
        lowest, highest = map(int, torch.aminmax(ids))
        if lowest < 0 or highest > num_items:
            place = ((ids < 0) | (ids > num_items)).nonzero()[0].tolist()
            where = f"row {place[0]} of {name} contains" if ids.dim() == 2 else f"{name} contain"
            raise ValueError(
                f"{where} item {int(ids[tuple(place)])}: expected ids 1..{num_items} of this model's catalogue; map "
                "raw ids with model.catalogue.item_ids"
            )
    if ids.dim() == 1:
        ids = ids.unique()
        return ids[ids != PADDING_ITEM_ID]
    ids, _ = ids.sort(1)
    repeats = ids[:, 1:] == ids[:, :-1]  # (batch, any - 1)
    ids[:, 1:].masked_fill_(repeats, PADDING_ITEM_ID)
    return ids


def _as_tensor(name: str, given: Any) -> torch.Tensor:
    """(items,) or (rows, longest), padded with 0."""
    if isinstance(given, torch.Tensor):
        return given
    if isinstance(given, np.ndarray) and given.dtype.kind in "iufb":
        return torch.tensor(given)
    if isinstance(given, str):
        raise ValueError(
            f"{name} are the string {given!r}: expected item ids, {_FORMS}; map raw ids with model.catalogue.item_ids"
        )
    try:
        rows = list(given)
    except TypeError as error:
        raise ValueError(f"{name} are of type {type(given).__name__}: expected item ids, {_FORMS}") from error
    if all(isinstance(row, Integral) and not isinstance(row, bool) for row in rows):
        try:
            return torch.from_numpy(np.array(rows, dtype=np.int64))
        except OverflowError as error:
            raise ValueError(f"{name} contain an id beyond int64 ({error}): expected item ids, {_FORMS}") from error
    if any(isinstance(row, str) for row in rows):
        found = next(row for row in rows if isinstance(row, str))
        raise ValueError(f"{name} contain {found!r}: expected item ids; map raw ids with model.catalogue.item_ids")
    rows = [sorted(row) if isinstance(row, set | frozenset) else row for row in rows]
    return padded_rows(rows, True, lambda number: f"row {number} of {name}")


__all__ = ["item_filter", "item_masks"]
