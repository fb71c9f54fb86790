"""Which rows the acquisition policies choose, by hand and by naive loops."""

import tracemalloc

import numpy as np
import pytest
import torch

from hf_ilora.distillation import acquisition
from hf_ilora.distillation.acquisition import acquire

# Row 0 is certain, row 1 nearly flat, row 2 has two equally good items, row 3 two best items one apart.
SCORES = np.array([[9.0, 0, 0, 0], [0.1, 0, 0, 0], [6.0, 6, 0, 0], [3.0, 2, 1, 0]], np.float32)
NEEDED = {
    "random": {"num_rows": 40},
    "entropy": {"scores": np.random.default_rng(0).normal(size=(40, 7))},
    "margin": {"scores": np.random.default_rng(1).normal(size=(40, 7))},
    "loss": {"scores": np.random.default_rng(2).normal(size=(40, 7)), "targets": np.arange(40) % 7},
    "k_center": {"user_embeddings": np.random.default_rng(3).normal(size=(40, 5))},
}


@pytest.mark.parametrize("policy", acquisition.ACQUISITION_POLICIES)
@pytest.mark.parametrize("budget", [1, 17, 40])
def test_rows_are_different_sorted_and_the_same_at_every_call(policy, budget):
    rows = acquire(policy, budget, **NEEDED[policy])
    assert rows.dtype == np.int64 and rows.shape == (budget,)
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < 40
    np.testing.assert_array_equal(rows, acquire(policy, budget, **NEEDED[policy]))


@pytest.mark.parametrize("policy, differs", [("random", True), ("k_center", True), ("entropy", False)])
def test_seed_matters_where_there_is_chance(policy, differs):
    chosen = {tuple(acquire(policy, 8, seed=seed, **NEEDED[policy])) for seed in range(5)}
    assert (len(chosen) > 1) == differs


def test_entropy_takes_the_flattest_rows():
    assert acquire("entropy", 1, scores=SCORES).tolist() == [1]
    assert acquire("entropy", 2, scores=SCORES).tolist() == [1, 3]


def test_margin_takes_rows_whose_best_two_are_closest():
    assert acquire("margin", 1, scores=SCORES).tolist() == [2]
    assert acquire("margin", 2, scores=SCORES).tolist() == [1, 2]


def test_loss_takes_rows_whose_true_item_is_least_likely():
    assert acquire("loss", 1, scores=SCORES, targets=[0, 3, 0, 0]).tolist() == [1]
    assert acquire("loss", 2, scores=SCORES, targets=[1, 3, 3, 0]).tolist() == [0, 2]


@pytest.mark.parametrize("policy", ["entropy", "margin", "loss"])
def test_chunks_and_the_whole_matrix_choose_the_same(policy, monkeypatch):
    inputs = NEEDED[policy]
    whole = acquire(policy, 9, **inputs)
    pieces = (torch.as_tensor(piece) for piece in np.array_split(inputs["scores"], [3, 3, 20]))
    np.testing.assert_array_equal(whole, acquire(policy, 9, **inputs | {"scores": pieces}))
    monkeypatch.setattr(acquisition, "CHUNK_ROWS", 6)
    np.testing.assert_array_equal(whole, acquire(policy, 9, **inputs))


@pytest.mark.parametrize("policy", ["entropy", "margin", "loss"])
def test_a_column_that_does_not_compete_changes_nothing(policy):
    """Logits of a recommender have -inf for padding; a target is then an item id."""
    inputs = NEEDED[policy]
    padded = {"scores": np.insert(inputs["scores"], 0, -np.inf, axis=1)}
    if policy == "loss":
        padded["targets"] = inputs["targets"] + 1
    np.testing.assert_array_equal(acquire(policy, 9, **padded), acquire(policy, 9, **inputs))


def test_equal_rows_are_taken_from_the_front():
    assert acquire("entropy", 3, scores=np.zeros((6, 4))).tolist() == [0, 1, 2]


def test_random_is_uniform_and_without_replacement():
    counts = np.zeros(10)
    for seed in range(400):
        counts[acquire("random", 3, targets=np.zeros(10), seed=seed)] += 1
    assert counts.sum() == 1200 and counts.min() > 80 and counts.max() < 160


def test_k_center_equals_the_naive_greedy_choice():
    embeddings = np.random.default_rng(5).normal(size=(60, 4)).astype(np.float32)
    chosen = [int(acquire("k_center", 1, user_embeddings=embeddings, seed=3)[0])]
    for _ in range(11):
        to_chosen = np.linalg.norm(embeddings[:, None] - embeddings[None, chosen], axis=2).min(1)
        chosen.append(int(to_chosen.argmax()))
    assert acquire("k_center", 12, user_embeddings=embeddings, seed=3).tolist() == sorted(chosen)


def test_k_center_takes_one_row_of_each_cluster_before_a_second_one():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(6), 30)
    embeddings = 20 * np.eye(6)[clusters] + generator.normal(size=(180, 6))
    assert set(clusters[acquire("k_center", 6, user_embeddings=embeddings)]) == set(range(6))
    # negative control: chance hardly ever meets all six
    assert any(len(set(clusters[acquire("random", 6, num_rows=180, seed=seed)])) < 6 for seed in range(5))


def test_k_center_chooses_different_rows_among_equal_ones():
    embeddings = torch.ones(5, 3, requires_grad=True)  # as a model returns them
    assert acquire("k_center", 5, user_embeddings=embeddings).tolist() == [0, 1, 2, 3, 4]


def test_k_center_holds_no_matrix_of_distances():
    embeddings = torch.randn(4000, 8)
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                sizes.append(result.numel())
            return result

    tracemalloc.start()
    with Sizes():
        acquire("k_center", 50, user_embeddings=embeddings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(sizes) <= embeddings.numel() and peak < 4_000_000


@pytest.mark.parametrize("policy", acquisition.ACQUISITION_POLICIES)
@pytest.mark.parametrize("budget", [0, -1, 41])
def test_budgets_that_cannot_be_met_are_refused(policy, budget):
    with pytest.raises(ValueError, match=rf"budget is {budget}: expected 1\.\.40"):
        acquire(policy, budget, **NEEDED[policy])


@pytest.mark.parametrize(
    "policy, inputs, message",
    [
        ("best", {}, "policy_name is 'best': expected one of random, entropy, margin, loss, k_center"),
        ("random", {}, "num_rows is None: policy 'random' needs the number of rows"),
        (
            "entropy",
            {"targets": [0]},
            "scores is None: policy 'entropy' needs it; pass it, or use policy 'random'",
        ),
        ("loss", {"scores": SCORES}, "targets is None"),
        ("k_center", {"scores": SCORES}, "user_embeddings is None"),
        ("entropy", {"scores": np.zeros(4)}, r"scores have shape \(4,\): expected \(rows, items\)"),
        ("margin", {"scores": np.zeros((4, 1))}, "at least two items"),
        ("loss", {"scores": SCORES, "targets": [0, 1, 2]}, "targets end 1 rows before the scores"),
        ("loss", {"scores": SCORES, "targets": [0, 1, 2, 3, 0]}, "targets have length 5: expected 4"),
        ("loss", {"scores": SCORES, "targets": [0, 1, 2, 4]}, r"targets contain 4: expected columns 0\.\.3"),
        ("entropy", {"scores": np.where(SCORES == 3, np.nan, SCORES)}, "scores of row 3 contain NaN"),
        ("k_center", {"user_embeddings": np.zeros(4)}, r"user_embeddings have shape \(4,\)"),
        (
            "k_center",
            {"user_embeddings": np.array([[0.0], [np.inf]])},
            "user_embeddings of row 1 contain NaN or infinity",
        ),
    ],
)
def test_inputs_that_are_missing_or_do_not_fit_are_refused(policy, inputs, message):
    with pytest.raises(ValueError, match=message):
        acquire(policy, 1, **inputs)
