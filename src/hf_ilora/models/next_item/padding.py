"""Moves the padding of histories after the real items, and back; reads ids in Python only where that costs nothing."""

import torch

from .configuration_next_item import PADDING_ITEM_ID


def can_look(ids: torch.Tensor) -> bool:
    """Whether Python may read values: not while a graph is captured, nor if reading would wait for a device."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def lowest_and_highest(ids: torch.Tensor) -> tuple[int, int] | None:
    """The range of some ids; None if there are none, or if Python may not read them (`can_look`)."""
    if not ids.numel() or not can_look(ids):
        return None
    values = ids.detach().numpy()
    return int(values.min()), int(values.max())


def at_position(states: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
    """Select one position, or one per row (batch,), of states (batch, length, hidden): (batch, 1, hidden)."""
    if not isinstance(position, torch.Tensor):
        return states[:, position : position + 1]
    return states.gather(1, position.view(-1, 1, 1).expand(-1, 1, states.shape[-1]))


def last_positions(lengths: torch.Tensor | None, length: int) -> torch.Tensor | int:
    """The newest items' positions in right-padded rows of width `length`; `lengths` (batch,), None without padding."""
    return length - 1 if lengths is None else (lengths - 1).clamp(min=0)


def padding_to_the_end(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the padding, and the order that moves it after the real items.

    Returns:
        real: (batch, length) bool.
        order: (batch, length), for `gather`: real items first, in their order.
        slots: (batch, length), the index of each input position in that order.
    """
    real = input_ids.ne(PADDING_ITEM_ID) if attention_mask is None else attention_mask.bool()
    slots = _slots(real)
    return real, _inverse(slots), slots


def padding_to_the_front(input_ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) with the padding moved before the real items, which keep their order."""
    return input_ids.gather(1, _inverse(_slots(input_ids.eq(PADDING_ITEM_ID))))


def places_behind_padding(slots: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """Map positions of an input to the flattened (batch * length) whose rows have their padding last.

    Args:
        slots: (batch, length), from `padding_to_the_end`.
        indices: (positions,) in the flattened input; None means all positions.

    Returns:
        (positions,) int64.
    """
    batch, length = slots.shape
    row_starts = length * torch.arange(batch, device=slots.device).unsqueeze(1)  # (batch, 1)
    places = (slots + row_starts).flatten()
    return places if indices is None else places[indices]


def _slots(first: torch.Tensor) -> torch.Tensor:
    """(batch, length) bool -> the place of each position when those that are True come first, all in their order.

    Counting instead of a stable sort, which ONNX does not have.
    """
    counts = first.cumsum(1)  # (batch, length)
    others = counts[:, -1:] + first.logical_not().cumsum(1)
    return torch.where(first, counts, others) - 1


def _inverse(slots: torch.Tensor) -> torch.Tensor:
    """(batch, length) permutations, inverted."""
    places = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    return torch.zeros_like(slots).scatter(1, slots, places)


def restore_padding(hidden_states: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Undo `padding_to_the_end`: (batch, length, hidden), zero at padding."""
    aligned = hidden_states.gather(1, slots.unsqueeze(-1).expand_as(hidden_states))
    return aligned * real.unsqueeze(-1)


__all__ = [
    "at_position",
    "can_look",
    "last_positions",
    "lowest_and_highest",
    "padding_to_the_end",
    "padding_to_the_front",
    "places_behind_padding",
    "restore_padding",
]
