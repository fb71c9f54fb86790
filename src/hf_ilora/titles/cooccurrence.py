"""Item embeddings from co-occurrence counts, to initialise a SASRec."""

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.linalg import eigsh

from hf_ilora.models.next_item.configuration_counting import TransitionCountsConfig
from hf_ilora.models.next_item.modeling_counting import TransitionCountsForNextItem


def cooccurrence_embeddings(
    sequences: Iterable[Sequence[int]],
    num_items: int,
    size: int,
    max_gap: int = 20,
    gap_decay: float = 0.85,
    take_logarithm: bool = True,
    mean_norm: float | None = None,
    targets_only: bool = False,
) -> torch.Tensor:
    """Embeddings whose dot products approximate the lift of two items: how much more often than chance they co-occur.

        C[i, j] = sum of gap_decay ** (g - 1) over pairs of i and j at a distance g <= max_gap, in either order
        L[i, j] = num_items * C[i, j] / sqrt(sum_j C[i, j] * sum_i C[i, j])
        M[i, j] = log(1 + L[i, j]), or L[i, j] itself
        M is approximated by E E^T of rank `size`, from the largest positive eigenvalues of M

    Args:
        sequences: the items of each training row, oldest first, with the target last.
        num_items: size of the catalogue.
        size: size of the embeddings, smaller than the catalogue.
        max_gap: largest distance of the two items of a pair.
        gap_decay: factor by which the weight of a pair decreases with each step of distance.
        take_logarithm: factorise log(1 + L); False, for L itself, is better if most items have few interactions.
        mean_norm: rescale the embeddings to this mean Euclidean norm; None leaves them as factorised.
        targets_only: count only pairs whose later item is the last of its row, for rows that are prefixes of the same
            history.

    Returns:
        (num_items + 1, size) float32; zero for padding and for items without a pair.

    Raises:
        ValueError: `size` is not smaller than the catalogue, a row is empty, or an id is outside 1..num_items.

    Source: Levy and Goldberg, NIPS 2014: word2vec, and so item2vec, implicitly factorises such a matrix.
    """
    if size >= num_items:
        raise ValueError(
            f"size is {size} for {num_items} items: expected a size below the number of items; use a smaller "
            "hidden_size, or random initial embeddings"
        )
    counting = TransitionCountsConfig(
        num_items=num_items, max_gap=max_gap, gap_decay=gap_decay, backward_weight=1.0, source_power=0, target_power=0
    )
    counts = TransitionCountsForNextItem.fit(sequences, counting, targets_only=targets_only)
    shape = (num_items + 1, num_items + 1)
    parts = (counts.transition_weights, counts.transition_targets, counts.transition_starts)
    matrix = scipy.sparse.csr_array(tuple(part.numpy() for part in parts), shape=shape, dtype=np.float64)
    matrix.setdiag(0)  # repeats of an item say nothing about other items
    totals = np.maximum(matrix.sum(axis=1), np.finfo(np.float64).tiny)  # (num_items + 1,)
    scale = scipy.sparse.dia_array((totals[None] ** -0.5, [0]), shape=shape)
    lift = (scale @ matrix @ scale).tocsr() * num_items
    # A fixed start vector makes the result reproducible.
    factorised = lift.log1p() if take_logarithm else lift
    eigenvalues, eigenvectors = eigsh(factorised, k=size, which="LA", v0=np.ones(num_items + 1))
    embeddings = eigenvectors * np.maximum(eigenvalues, 0) ** 0.5  # (num_items + 1, size)
    embeddings[np.asarray(matrix.sum(axis=1)) == 0] = 0
    if mean_norm is not None:
        embeddings *= mean_norm / np.linalg.norm(embeddings[1:], axis=1).mean()
    return torch.from_numpy(embeddings.astype(np.float32))


__all__ = ["cooccurrence_embeddings"]
