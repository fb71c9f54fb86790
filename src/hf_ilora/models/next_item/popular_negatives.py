"""Draws items in proportion to a power of their counts, in time that hardly grows with the catalogue.

The items share the integers below `RESOLUTION`, each as many as its probability says, in the order of their ids. A
random integer is looked up among the ends of these shares; the width of a share is the exact probability of its item.
"""

import torch

# Shares come from sums in float64, which tells this many apart; a power of two, so that random integers are uniform.
RESOLUTION = 2**53


def ends_of_shares(item_counts: torch.Tensor, power: float) -> torch.Tensor:
    """Where the share of each item ends: the sum of the probabilities of all ids up to it.

    Args:
        item_counts: (num_items + 1,), finite, some of them positive; others have probability 0.
        power: items are drawn in proportion to count ** power.

    Returns:
        (num_items + 1,) int64, ascending from 0 or more to `RESOLUTION`, on the device of the counts.
    """
    counts = item_counts.cpu().double()  # not every accelerator has float64
    ends = torch.where(counts > 0, counts**power, 0.0).cumsum(0)  # (num_items + 1,)
    return (ends / ends[-1] * RESOLUTION).to(torch.int64).to(item_counts.device)


def draw_items(ends: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Item ids of this shape, independent draws with replacement, of `ends_of_shares`."""
    return torch.searchsorted(ends, torch.randint(RESOLUTION, shape, device=ends.device), right=True)


def log_probabilities(ends: torch.Tensor, item_ids: torch.Tensor) -> torch.Tensor:
    """The log of the probability of item ids (...), each at least 1, in one draw: (...), float32."""
    shares = ends[item_ids] - ends[item_ids - 1]  # (...)
    return (shares.float() / RESOLUTION).log()


__all__ = ["RESOLUTION", "draw_items", "ends_of_shares", "log_probabilities"]
