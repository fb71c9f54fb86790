"""Principal components of title embeddings: whitened for similarities, or reduced to the size of an item table."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Tables are read in pieces of at most so many numbers, each 32 MB in double precision.
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Components:
    """A map from embeddings to principal components: (embedding - mean) @ directions.

    Attributes:
        mean: (any,) float64.
        directions: (any, components) float64.
    """

    mean: torch.Tensor
    directions: torch.Tensor

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """The components of embeddings, in the table or not: (items, any) -> (items, components) float64."""
        return (rows.detach().cpu().double() - self.mean) @ self.directions


def principal_components(table: torch.Tensor, size: int, whiten: bool = True) -> Components:
    """The map that `pca_embeddings` applies to its own table; arguments and errors are the same."""
    if table.dim() != 2 or len(table) < 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected (num_items + 1, numbers per item)")
    num_items, width = len(table) - 1, table.shape[1]
    if not 1 <= size <= min(num_items, width):
        raise ValueError(
            f"size is {size}: expected 1 to {min(num_items, width)} components of {num_items} items with {width} "
            "numbers each; use a smaller hidden_size"
        )
    total = torch.zeros(width, dtype=torch.float64)
    for first, items in item_pieces(table):
        finite = torch.isfinite(items).all(1)
        if not finite.all():
            item = first + int(finite.int().argmin())
            raise ValueError(f"the embedding of item {item} contains NaN or inf: expected finite numbers; encode again")
        total += items.sum(0)
    mean = total / num_items
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for _, items in item_pieces(table):
        items = items - mean
        covariance += items.t() @ items / num_items
    directions, variances = leading_directions(covariance, size)  # (any, size), (size,) descending
    if variances[0] <= 1e-12 * mean.square().sum():
        raise ValueError(f"the embeddings of all {num_items} items are equal: expected some that tell items apart")
    if whiten:
        varies = variances > 1e-10 * variances[0]
        directions = torch.where(varies, directions / variances.sqrt(), 0.0)
    return Components(mean, directions)


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
        ValueError: the table has another shape, a number is not finite, `size` is out of range, or all embeddings are
            equal.
    """
    components = principal_components(table, size, whiten)
    embeddings = torch.zeros(len(table), size)
    for first, items in item_pieces(table):
        embeddings[first : first + len(items)] = components.project(items)
    return embeddings


def whitened(table: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Item embeddings with mean zero and, in every direction, variance 1 over the items.

    Directions that most titles share dominate the cosines of raw title embeddings, but not of whitened ones.

    Args:
        table: (num_items + 1, any), row 0 for padding, such as `item_title_embeddings`.
        size: number of principal components; None keeps all.

    Returns:
        (num_items + 1, size) float32, with zeros in row 0.

    Raises:
        ValueError: as `pca_embeddings`.
    """
    if size is None:
        size = max(1, min(len(table) - 1, table.shape[-1]))
    return pca_embeddings(table, size)


def item_pieces(table: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Pieces of a table (num_items + 1, any): the id of the first item, and embeddings (items, any) float64."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, table.shape[1]))
    for first in range(1, len(table), step):
        yield first, table[first : first + step].detach().cpu().double()


def leading_directions(second_moments: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The eigenvectors of the largest eigenvalues, with positive largest loading: (any, size) and values (size,)."""
    values, directions = torch.linalg.eigh(second_moments)  # (any,) ascending, (any, any)
    values, directions = values.flip(0)[:size].clamp(min=0), directions.flip(1)[:, :size]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, size)
    return directions * largest.sign(), values


__all__ = ["Components", "item_pieces", "leading_directions", "pca_embeddings", "principal_components", "whitened"]
