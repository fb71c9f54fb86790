"""Converts histories in any usual form to one padded tensor, and checks them once."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from .configuration_next_item import PADDING_ITEM_ID

ItemIds = Sequence[int] | np.ndarray | torch.Tensor  # (items,)
Histories = Iterable[ItemIds] | np.ndarray | torch.Tensor  # (batch, length), or rows of different lengths

_EXAMPLE = "such as [[3, 1, 2], [7, 4]]"


def padded_histories(
    histories: Histories, num_items: int, device: torch.device | str = "cpu", may_be_empty: bool = False
) -> torch.Tensor:
    """Turn histories into one tensor of item ids.

    Args:
        histories: a row of item ids per user, oldest first: lists, arrays or tensors, of different lengths or padded
            with 0 on either side.
        num_items: size of the catalogue.
        device: device of the result.
        may_be_empty: accept rows without items, which become padding only.

    Returns:
        (batch, length) int64, 0 for padding.

    Raises:
        ValueError: for anything else, an empty history, and item ids outside the catalogue, naming the row.
    """
    if isinstance(histories, str):
        raise ValueError(
            f"histories are the string {shortened(histories)}: expected a row of item ids per user, {_EXAMPLE}; map "
            "raw ids with model.catalogue.item_ids"
        )
    if isinstance(histories, np.ndarray) and histories.dtype != object:
        histories = torch.tensor(histories)
    elif not isinstance(histories, torch.Tensor):
        try:
            rows = list(histories)
        except TypeError as error:
            raise ValueError(
                f"histories are of type {type(histories).__name__}: expected a row of item ids per user, {_EXAMPLE}"
            ) from error
        if not rows:
            raise ValueError(f"there are no histories: expected at least one row of item ids, {_EXAMPLE}")
        histories = padded_rows(rows, may_be_empty)
    if histories.dim() != 2 or not histories.numel():
        raise ValueError(
            f"histories have shape {tuple(histories.shape)}: expected (batch, length), at least one row of item ids, "
            f"{_EXAMPLE}"
        )
    if not is_integer(histories.dtype):
        raise ValueError(
            f"histories are {histories.dtype}: expected item ids as int64 or another integer type, {_EXAMPLE}"
        )
    histories = histories.to(device, torch.int64)
    lowest, highest = map(int, torch.aminmax(histories))
    if lowest < 0 or highest > num_items:
        row, column = ((histories < 0) | (histories > num_items)).nonzero()[0].tolist()
        raise ValueError(
            f"history {row} contains item {int(histories[row, column])}: expected ids 1..{num_items} of this "
            "model's catalogue, and 0 for padding; map raw ids with model.catalogue.item_ids"
        )
    if lowest == PADDING_ITEM_ID and not may_be_empty and not histories.any(1).all():
        raise ValueError(_empty(int((~histories.any(1)).nonzero()[0])))
    return histories


def single_items(items: ItemIds, num_items: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Convert item ids that form no history to a tensor, and check them.

    Args:
        items: (items,) item ids, in a list, array or tensor.
        num_items: size of the catalogue.
        device: device of the result.

    Returns:
        (items,) int64.

    Raises:
        ValueError: for anything else, no items, and ids outside 1..num_items.
    """
    try:
        ids = torch.as_tensor(items)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"items are not item ids ({error}): expected integers, such as [3, 1]; map raw ids with "
            "model.catalogue.item_ids"
        ) from error
    if ids.dim() != 1 or not len(ids) or not is_integer(ids.dtype):
        raise ValueError(
            f"items have shape {tuple(ids.shape)} and type {ids.dtype}: expected at least one item id, such as [3, 1]"
        )
    lowest, highest = map(int, torch.aminmax(ids))
    if lowest < 1 or highest > num_items:
        raise ValueError(
            f"items contain {lowest if lowest < 1 else highest}: expected ids 1..{num_items} of this model's "
            "catalogue; map raw ids with model.catalogue.item_ids"
        )
    return ids.to(device, torch.int64)


def padded_rows(
    rows: Sequence, may_be_empty: bool, row_name: Callable[[int], str] = "history {}".format
) -> torch.Tensor:
    """Pad rows of item ids on the right: (batch, longest) on the CPU.

    Args:
        rows: at least one list, array or tensor, of any lengths.
        may_be_empty: accept rows without items, which become padding only.
        row_name: function from a row's number to its name in messages.

    Raises:
        ValueError: for a row of something else.
    """
    padded = []
    for number, row in enumerate(rows):
        try:
            items = row.cpu() if isinstance(row, torch.Tensor) else torch.tensor(row)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{row_name(number)} is {shortened(row)}, which is not a row of item ids ({error}): expected rows of "
                f"integers, {_EXAMPLE}; map raw ids with model.catalogue.item_ids"
            ) from error
        if items.dim() != 1:
            raise ValueError(
                f"{row_name(number)} is {shortened(row)}, of shape {tuple(items.shape)}: expected a row of item ids "
                f"per user, {_EXAMPLE}"
            )
        if not len(items):
            if not may_be_empty:
                raise ValueError(_empty(number))
            items = torch.tensor([PADDING_ITEM_ID])
        if not is_integer(items.dtype):
            raise ValueError(f"{row_name(number)} is {items.dtype}: expected item ids as int64 or another integer type")
        padded.append(items)
    return pad_sequence(padded, batch_first=True, padding_value=PADDING_ITEM_ID)


def check_batch_size(batch_size: int) -> None:
    """Raise a ValueError unless `batch_size` is a whole number, at least 1."""
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: expected at least 1, a whole number of rows per step")


def is_integer(dtype: torch.dtype) -> bool:
    """Whether item ids can have this type."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _empty(row: int) -> str:
    return (
        f"history {row} is empty: expected at least one item; leave the row out. A model whose catalogue has the "
        "column count, as build_sequences makes it, recommends popular items instead"
    )


def shortened(value: object) -> str:
    """The `repr` of a value for messages, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


__all__ = ["check_batch_size", "is_integer", "padded_histories", "padded_rows", "shortened", "single_items"]
