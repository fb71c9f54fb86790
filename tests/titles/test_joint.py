"""Joint factors of co-occurrence and titles, and whitened titles, against dense arithmetic."""

import numpy as np
import pytest
import torch

from hf_ilora import joint_item_embeddings, whitened
from hf_ilora.titles import pca

NUM_ITEMS = 40


def table(width, seed, num_items=NUM_ITEMS):
    made = torch.randn(num_items + 1, width, generator=torch.Generator().manual_seed(seed))
    made[0] = 0
    return made


def unit(rows):
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def counts():
    return torch.cat([torch.zeros(1), torch.arange(NUM_ITEMS).float() * 3])


def naive_mixture(cooccurrence, titles, prior):
    """The mixture of both cosines, (num_items, num_items)."""
    c, e = (each[1:].double().numpy() for each in (cooccurrence, titles))
    left, _, _ = np.linalg.svd(e - e.mean(0), full_matrices=False)
    t, a = unit(left), prior / (prior + counts()[1:].numpy())
    return np.sqrt(np.outer(1 - a, 1 - a)) * (unit(c) @ unit(c).T) + np.sqrt(np.outer(a, a)) * (t @ t.T)


def test_embeddings_are_the_best_factors_of_the_mixture_of_both_cosines(monkeypatch):
    cooccurrence, titles = table(8, 1), table(6, 2)
    cooccurrence[3] = 0  # never bought with another item
    mixture = naive_mixture(cooccurrence, titles, prior=30)
    values, vectors = np.linalg.eigh(mixture)
    best = vectors[:, -6:] * np.sqrt(values[-6:])  # (items, size)
    best /= np.linalg.norm(best, axis=1).mean()

    embeddings = joint_item_embeddings(cooccurrence, titles, counts(), 6)

    assert embeddings.shape == (NUM_ITEMS + 1, 6) and embeddings.dtype == torch.float32
    assert not embeddings[0].any()
    assert embeddings[1:].norm(dim=1).mean() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose((embeddings @ embeddings.T)[1:, 1:].numpy(), best @ best.T, atol=1e-4)
    monkeypatch.setattr(pca, "_NUMBERS_AT_ONCE", 25)  # pieces of three and four items
    in_pieces = joint_item_embeddings(cooccurrence, titles, counts(), 6)
    torch.testing.assert_close(in_pieces, embeddings, rtol=1e-4, atol=1e-5)


def test_whitened_titles_give_the_same_as_raw_ones():
    cooccurrence, titles = table(8, 1), table(6, 2) @ torch.randn(6, 6) + 5
    expected = joint_item_embeddings(cooccurrence, titles, counts(), 7)
    found = joint_item_embeddings(cooccurrence, whitened(titles), counts(), 7)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=1e-3, atol=1e-4)


def test_the_prior_says_whether_titles_or_cooccurrence_count():
    cooccurrence, titles = table(4, 1), table(4, 2)
    seen = torch.full((NUM_ITEMS + 1,), 10)
    by_titles = joint_item_embeddings(cooccurrence, titles, seen, 4, prior=1e9)[1:]
    cosines = torch.nn.functional.normalize(whitened(titles)[1:], dim=1)
    torch.testing.assert_close(by_titles @ by_titles.T, cosines @ cosines.T, rtol=1e-3, atol=1e-3)
    by_counts = joint_item_embeddings(cooccurrence, titles, seen, 4, prior=1e-9)[1:]
    cosines = torch.nn.functional.normalize(cooccurrence[1:], dim=1)
    torch.testing.assert_close(by_counts @ by_counts.T, cosines @ cosines.T, rtol=1e-3, atol=1e-3)


def test_whitened_titles_have_unit_variance_in_every_direction(monkeypatch):
    titles = table(5, 3) @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.1, 0.01])) + 7
    made = whitened(titles)
    torch.testing.assert_close(made[1:].T @ made[1:] / NUM_ITEMS, torch.eye(5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whitened(titles, 2), made[:, :2])
    monkeypatch.setattr(pca, "_NUMBERS_AT_ONCE", 15)
    torch.testing.assert_close(whitened(titles), made, rtol=1e-3, atol=1e-4)
    assert whitened(table(300, 1)).shape == (NUM_ITEMS + 1, NUM_ITEMS)


def test_a_new_item_is_placed_by_the_components_of_the_others():
    titles = table(5, 3)
    components = pca.principal_components(titles, 5)
    torch.testing.assert_close(components.project(titles[4:6]).float(), whitened(titles)[4:6])


BROKEN = table(4, 1)
BROKEN[7, 2] = torch.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titles": table(4, 1, num_items=39)}, r"have shapes \(41, 4\), \(40, 4\) and \(41,\): expected num_items"),
        ({"item_counts": torch.ones(40)}, r"and \(40,\): expected num_items \+ 1 rows in each, of the same items"),
        ({"item_counts": torch.ones(41, 1)}, r"and \(41, 1\): expected"),
        ({"item_counts": -counts()}, "item_counts has a negative number"),
        ({"titles": BROKEN}, "the embedding of item 7 contains NaN or inf"),
        ({"cooccurrence": BROKEN}, "cooccurrence of item 7 contains NaN or inf"),
        ({"cooccurrence": torch.ones(41)}, r"cooccurrence has shape \(41,\): expected \(num_items \+ 1, numbers"),
        ({"titles": torch.ones(41, 4)}, "the embeddings of all 40 items are equal: expected some that tell"),
        ({"titles": torch.zeros(41, 4)}, "the embeddings of all 40 items are equal"),
        ({"size": 9}, "size is 9: expected 1 to 8, the numbers per item in both tables together"),
        ({"size": 0}, "size is 0: expected 1 to 8"),
        ({"prior": 0}, "prior is 0: expected a finite number above 0"),
        ({"prior": float("nan")}, "prior is nan"),
    ],
)
def test_tables_that_do_not_fit_are_refused(changes, message):
    given = {"cooccurrence": table(4, 1), "titles": table(4, 2), "item_counts": counts(), "size": 4}
    with pytest.raises(ValueError, match=message):
        joint_item_embeddings(**given | changes)
