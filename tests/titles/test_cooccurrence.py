"""Co-occurrence embeddings against a dense naive factorisation."""

import numpy as np
import pytest
import torch

from hf_ilora.titles.cooccurrence import cooccurrence_embeddings


def naive_matrix(sequences, num_items, max_gap, gap_decay):
    counts = np.zeros((num_items + 1, num_items + 1))
    for sequence in sequences:
        for first in range(len(sequence)):
            for second in range(first + 1, min(len(sequence), first + max_gap + 1)):
                weight = gap_decay ** (second - first - 1)
                counts[sequence[first], sequence[second]] += weight
                counts[sequence[second], sequence[first]] += weight
    np.fill_diagonal(counts, 0)
    totals = counts.sum(1)
    scale = np.where(totals > 0, totals, 1) ** -0.5
    return np.log1p(num_items * scale[:, None] * counts * scale[None, :])


def test_embeddings_are_the_best_positive_factors_of_the_naive_matrix():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 13, size=generator.integers(2, 15)).tolist() for _ in range(40)]
    matrix = naive_matrix(sequences, 14, 4, 0.7)
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    best = np.maximum(eigenvalues[-5:], 0) ** 0.5 * eigenvectors[:, -5:]

    embeddings = cooccurrence_embeddings(sequences, 14, 5, max_gap=4, gap_decay=0.7)

    assert embeddings.shape == (15, 5) and embeddings.dtype == torch.float32
    np.testing.assert_allclose((embeddings @ embeddings.T).numpy(), best @ best.T, atol=1e-4)
    assert embeddings[0].abs().sum() == 0
    assert embeddings[13:].abs().sum() == 0, "items 13 and 14 occur in no pair"


def test_items_of_one_group_are_closer_than_items_of_two():
    sequences = [[1, 2, 3], [2, 3, 1], [3, 1, 2], [4, 5, 6], [5, 6, 4], [1, 3, 2], [6, 4, 5], [1, 4]]
    embeddings = cooccurrence_embeddings(sequences, 6, 3)
    assert embeddings[1] @ embeddings[2] > embeddings[1] @ embeddings[5]


def test_equal_input_gives_equal_embeddings():
    sequences = [[1, 2, 3, 4, 5], [2, 4, 1], [5, 3, 2]]
    assert torch.equal(cooccurrence_embeddings(sequences, 5, 2), cooccurrence_embeddings(sequences, 5, 2))


def test_width_of_the_catalogue_is_refused():
    with pytest.raises(ValueError, match="size is 5 for 5 items"):
        cooccurrence_embeddings([[1, 2]], 5, 5)
