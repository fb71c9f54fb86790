"""Principal components of title embeddings, to reduce them to the size of a small item table."""

import torch
import torch.nn.functional as F


def pca_embeddings(table: torch.Tensor, size: int, whiten: bool = True) -> torch.Tensor:
    """Principal components of item embeddings, such as those of a language model, to initialise a small item table.

    Args:
        table: (num_items + 1, any), row 0 for padding.
        size: number of components, at most the number of items and the size of an embedding.
        whiten: scale every component to variance 1 over the items; components without variance are zero.

    Returns:
        (num_items + 1, size) float32, largest component first, with mean zero over the items and zeros in row 0. The
        sign of each component makes its largest loading positive, so equal tables give equal embeddings.

    Raises:
        ValueError: for another shape, numbers that are not finite, or a `size` out of range.
    """
    if table.dim() != 2 or len(table) < 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected (num_items + 1, numbers per item)")
    items = table[1:].detach().cpu().double()  # (items, any)
    if not torch.isfinite(items).all():
        item = int((~torch.isfinite(items)).any(1).nonzero()[0]) + 1
        raise ValueError(f"the embedding of item {item} contains NaN or inf: expected finite numbers; encode again")
    if not 1 <= size <= min(items.shape):
        raise ValueError(
            f"size is {size}: expected 1 to {min(items.shape)} components of {items.shape[0]} items with "
            f"{items.shape[1]} numbers each; use a smaller hidden_size"
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
