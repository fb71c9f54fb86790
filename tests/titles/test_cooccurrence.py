"""Co-occurrence embeddings against a dense naive factorisation."""

import numpy as np
import pytest
import torch

from hf_ilora.titles.cooccurrence import cooccurrence_embeddings


def naive_lift(sequences, num_items, max_gap, gap_decay):
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
    return num_items * scale[:, None] * counts * scale[None, :]


@pytest.mark.parametrize("take_logarithm", [True, False])
def test_embeddings_are_the_best_positive_factors_of_the_naive_matrix(take_logarithm):
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 13, size=generator.integers(2, 15)).tolist() for _ in range(40)]
    lift = naive_lift(sequences, 14, 4, 0.7)
    eigenvalues, eigenvectors = np.linalg.eigh(np.log1p(lift) if take_logarithm else lift)
    best = np.maximum(eigenvalues[-5:], 0) ** 0.5 * eigenvectors[:, -5:]

    embeddings = cooccurrence_embeddings(sequences, 14, 5, max_gap=4, gap_decay=0.7, take_logarithm=take_logarithm)

    assert embeddings.shape == (15, 5) and embeddings.dtype == torch.float32
    np.testing.assert_allclose((embeddings @ embeddings.T).numpy(), best @ best.T, atol=1e-4)
    assert embeddings[0].abs().sum() == 0
    assert embeddings[13:].abs().sum() == 0, "items 13 and 14 occur in no pair"


def test_items_of_one_group_are_closer_than_items_of_two():
    sequences = [[1, 2, 3], [2, 3, 1], [3, 1, 2], [4, 5, 6], [5, 6, 4], [1, 3, 2], [6, 4, 5], [1, 4]]
    embeddings = cooccurrence_embeddings(sequences, 6, 3)
    assert embeddings[1] @ embeddings[2] > embeddings[1] @ embeddings[5]


def test_mean_norm_rescales_all_embeddings_alike():
    sequences = [[1, 2, 3, 4, 5], [2, 4, 1], [5, 3, 2]]
    plain, scaled = (cooccurrence_embeddings(sequences, 5, 2, mean_norm=norm) for norm in (None, 7.0))
    assert scaled[1:].norm(dim=1).mean() == pytest.approx(7)
    torch.testing.assert_close(scaled, plain * (7 / plain[1:].norm(dim=1).mean()))


def test_targets_only_counts_each_pair_of_a_history_once_over_its_prefixes():
    history = [1, 4, 2, 4, 3, 5, 1]
    prefixes = [history[:end] for end in range(2, len(history) + 1)]
    found = cooccurrence_embeddings(prefixes, 6, 3, targets_only=True)
    expected, repeated = (cooccurrence_embeddings(rows, 6, 3) for rows in ([history], prefixes))
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-4, rtol=0)
    assert not torch.allclose(repeated @ repeated.T, expected @ expected.T, atol=1e-2)


def test_equal_input_gives_equal_embeddings():
    sequences = [[1, 2, 3, 4, 5], [2, 4, 1], [5, 3, 2]]
    assert torch.equal(cooccurrence_embeddings(sequences, 5, 2), cooccurrence_embeddings(sequences, 5, 2))


def test_a_size_of_the_whole_catalogue_is_refused():
    with pytest.raises(ValueError, match="size is 5 for 5 items"):
        cooccurrence_embeddings([[1, 2]], 5, 5)
