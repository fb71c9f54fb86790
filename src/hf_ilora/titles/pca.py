"""Principal components of title embeddings, in the size of a small item table."""

import torch
import torch.nn.functional as F


def pca_embeddings(table: torch.Tensor, size: int, whiten: bool = True) -> torch.Tensor:
    """Principal components of item embeddings, such as a language model gives: a start for a small item table.

    Args:
        table: (num_items + 1, any), row 0 for padding.
        size: components to keep, at most as many as there are items or numbers per item.
        whiten: let every component vary by 1 over the items, instead of as much as it did; components that do not vary
            stay zero.

    Returns:
        (num_items + 1, size) float32, largest component first, mean zero over the items, row 0 zero. The sign of each
        component is such that its largest loading is positive, so that equal tables give equal embeddings.

    Raises:
        ValueError: for another shape, numbers that are not finite, or a `size` out of range.
    """
    if table.dim() != 2 or len(table) < 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected (num_items + 1, numbers per item)")
    items = table[1:].detach().double()  # (items, any)
    if not torch.isfinite(items).all():
        item = int((~torch.isfinite(items)).any(1).nonzero()[0]) + 1
        raise ValueError(f"the embedding of item {item} holds NaN or inf: expected finite numbers; encode again")
    if not 1 <= size <= min(items.shape):
        raise ValueError(
            f"size is {size}: expected 1 to {min(items.shape)} components of {items.shape[0]} items with "
            f"{items.shape[1]} numbers each; take a smaller hidden_size"
        )
    items = items - items.mean(0)
    variances, directions = torch.linalg.eigh(items.t() @ items / len(items))  # (any,) ascending, (any, any)
    variances, directions = variances.flip(0)[:size].clamp(min=0), directions.flip(1)[:, :size]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, size)
    components = items @ (directions * largest.sign())  # (items, size)
    if whiten:
        varies = variances > 1e-10 * variances[0]
        components = torch.where(varies, components / variances.sqrt(), 0.0)
    return F.pad(components, (0, 0, 1, 0)).float()


__all__ = ["pca_embeddings"]
