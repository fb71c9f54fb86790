"""Item embeddings that mix co-occurrence and titles, according to how often an item occurs in training."""

import torch
import torch.nn.functional as F

from .pca import item_pieces, leading_directions, principal_components


def joint_item_embeddings(
    cooccurrence: torch.Tensor,
    titles: torch.Tensor,
    item_counts: torch.Tensor,
    size: int,
    prior: float = 30.0,
) -> torch.Tensor:
    """The best approximation, with `size` numbers per item, of a mixture of two cosines between items.

        share of the titles    a[i] = prior / (prior + item_counts[i])
        both side by side      X[i] = (sqrt(1 - a[i]) unit(cooccurrence[i]), sqrt(a[i]) unit(whitened(titles)[i]))
        embeddings             X P, with P the `size` leading eigenvectors of X'X

    X[i] . X[j] mixes the cosines of co-occurrence and titles: the more often both items occur, the more co-occurrence
    counts. The tables are read in pieces, so beyond them and the result, memory does not grow with the number of items.

    Args:
        cooccurrence: (num_items + 1, any), such as `cooccurrence_embeddings`; zeros for items without a pair.
        titles: (num_items + 1, any), such as `item_title_embeddings`; reduced to its `size` leading components and
            whitened.
        item_counts: (num_items + 1,), how often each item occurs in training.
        size: numbers per item.
        prior: number of occurrences at which co-occurrence and titles have equal weight.

    Returns:
        (num_items + 1, size) float32, with zeros in row 0 and a mean length of 1 over the items.

    Raises:
        ValueError: tables have different numbers of items or a wrong shape; a number is not finite, or a count is
            negative; `size` or `prior` is out of range; or all titles are equal.
    """
    _check(cooccurrence, titles, item_counts, size, prior)
    num_items = len(titles) - 1
    components = principal_components(titles, min(size, num_items, titles.shape[1]))
    shares = prior / (prior + item_counts.detach().cpu().double())  # (num_items + 1,)

    def side_by_side(first: int, items: torch.Tensor) -> torch.Tensor:
        share = shares[first : first + len(items), None]
        by_titles = F.normalize(components.project(titles[first : first + len(items)]), dim=1)
        return torch.cat([(1 - share).sqrt() * F.normalize(items, dim=1), share.sqrt() * by_titles], dim=1)

    width = cooccurrence.shape[1] + components.directions.shape[1]
    second_moments = torch.zeros(width, width, dtype=torch.float64)
    for first, items in item_pieces(cooccurrence):
        joint = side_by_side(first, items)  # (items, width)
        second_moments += joint.t() @ joint
    directions, _ = leading_directions(second_moments, size)  # (width, size)
    embeddings, total = torch.zeros(num_items + 1, size), 0.0
    for first, items in item_pieces(cooccurrence):
        projected = side_by_side(first, items) @ directions  # (items, size)
        embeddings[first : first + len(items)] = projected
        total += projected.norm(dim=1).sum().item()
    return embeddings.mul_(num_items / total)


def _check(
    cooccurrence: torch.Tensor, titles: torch.Tensor, item_counts: torch.Tensor, size: int, prior: float
) -> None:
    for name, table in (("cooccurrence", cooccurrence), ("titles", titles)):
        if table.dim() != 2 or len(table) < 2:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}: expected (num_items + 1, numbers per item), row 0 for padding"
            )
    rows = (len(cooccurrence), len(titles), item_counts.numel() if item_counts.dim() == 1 else None)
    if len(set(rows)) > 1:
        raise ValueError(
            f"cooccurrence, titles and item_counts have shapes {tuple(cooccurrence.shape)}, {tuple(titles.shape)} and "
            f"{tuple(item_counts.shape)}: expected num_items + 1 rows in each, of the same items"
        )
    if not torch.isfinite(cooccurrence).all():
        item = int((~torch.isfinite(cooccurrence)).any(1).nonzero()[0])
        raise ValueError(f"cooccurrence of item {item} contains NaN or inf: expected finite numbers")
    if not (torch.isfinite(item_counts) & (item_counts >= 0)).all():
        raise ValueError("item_counts has a negative number, NaN or inf: expected counts of at least 0")
    if not 0 < prior < float("inf"):
        raise ValueError(f"prior is {prior}: expected a finite number above 0")
    largest = cooccurrence.shape[1] + min(len(titles) - 1, titles.shape[1])
    if not 1 <= size <= largest:
        raise ValueError(f"size is {size}: expected 1 to {largest}, the numbers per item in both tables together")


__all__ = ["joint_item_embeddings"]
