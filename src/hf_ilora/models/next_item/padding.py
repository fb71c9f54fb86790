"""Moves the padding of histories behind the real items, and back."""

import torch

from .configuration_next_item import PADDING_ITEM_ID


def at_position(states: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
    """(batch, length, hidden) and one position, or one per row (batch,), -> (batch, 1, hidden)."""
    if isinstance(position, int):
        return states[:, position : position + 1]
    return states.gather(1, position.view(-1, 1, 1).expand(-1, 1, states.shape[-1]))


def last_positions(lengths: torch.Tensor | None, length: int) -> torch.Tensor | int:
    """Places of the newest items in right-padded rows of width `length`; `lengths` (batch,), None without padding."""
    return length - 1 if lengths is None else (lengths - 1).clamp(min=0)


def padding_to_the_end(input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
    """Find the padding, and the order that moves it behind the real items.

    Returns:
        real: (batch, length) bool.
        order: (batch, length), for `gather`: real items first, in their order.
        slots: (batch, length), the index of each input position in that order.
    """
    real = input_ids.ne(PADDING_ITEM_ID) if attention_mask is None else attention_mask.bool()
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return real, order, (real.cumsum(1) - 1).clamp(min=0)


def restore_padding(hidden_states: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Undo `padding_to_the_end`: (batch, length, hidden), zero at padding."""
    aligned = hidden_states.gather(1, slots.unsqueeze(-1).expand_as(hidden_states))
    return aligned * real.unsqueeze(-1)


__all__ = ["at_position", "last_positions", "padding_to_the_end", "restore_padding"]
