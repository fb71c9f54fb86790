"""The losses against naive formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.models.next_item.next_item_losses import (
    _chunk_size,
    chunked_cross_entropy,
    gbce_loss,
    sampled_softmax_loss,
)


def random_problem(positions=13, num_items=29, hidden=8, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(positions, hidden, generator=generator).requires_grad_()
    weight = torch.randn(num_items + 1, hidden, generator=generator).requires_grad_()
    item_bias = torch.randn(num_items + 1, generator=generator).requires_grad_() if bias else None
    targets = torch.randint(1, num_items + 1, (positions,), generator=generator)
    return hidden_states, weight, item_bias, targets


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_cross_entropy_equals_cross_entropy_without_padding_column(chunk_size, bias):
    hidden_states, weight, item_bias, targets = random_problem(bias=bias)
    parameters = [hidden_states, weight] + ([item_bias] if bias else [])
    scores = hidden_states @ weight[1:].t() + (item_bias[1:] if bias else 0)
    expected = F.cross_entropy(scores, targets - 1, reduction="sum") / 7
    expected_gradients = torch.autograd.grad(expected, parameters)

    loss = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=chunk_size)[0] / 7
    gradients = torch.autograd.grad(loss, parameters)

    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert gradients[1][0].abs().sum() == 0, "the padding row must not learn"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_chunks_of_a_million_items_have_less_than_200_megabytes_of_logits(device):
    positions = _chunk_size(torch.empty(6400, 64, device=device), 1_000_001)
    assert positions >= 20 and 2 * 4 * positions * 1_000_001 < 200e6  # scores and their log-probabilities


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_best_items_come_with_the_cross_entropy(chunk_size):
    hidden_states, weight, item_bias, targets = random_problem()
    best = torch.empty(len(targets), 4, dtype=torch.int64)
    chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=chunk_size, best_items=best)
    scores = hidden_states @ weight[1:].t() + item_bias[1:]
    assert torch.equal(best, scores.topk(4).indices + 1)


def test_chunked_cross_entropy_gives_a_loss_without_gradients():
    hidden_states, weight, item_bias, targets = random_problem()
    with torch.no_grad():
        loss, _ = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=5)
    with_gradients, _ = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=5)
    torch.testing.assert_close(loss, with_gradients.detach())


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_repeat_bias_is_added_to_the_scores_of_repeated_items(chunk_size):
    hidden_states, weight, item_bias, targets = random_problem()
    repeat_bias = torch.tensor(-0.7, requires_grad=True)
    repeated_items = torch.tensor([[1, 0, 4], [0, 0, 0], [9, 7, 1]]).repeat(5, 1)[:13]
    repeated_items[3, 1] = targets[3]
    parameters = [hidden_states, weight, item_bias, repeat_bias]
    scores = hidden_states @ weight.t() + item_bias
    mask = torch.zeros_like(scores).scatter(1, repeated_items, 1.0)
    expected = F.cross_entropy((scores + repeat_bias * mask)[:, 1:], targets - 1, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, parameters)

    loss, _ = chunked_cross_entropy(
        hidden_states, weight, item_bias, targets, repeat_bias, repeated_items, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(torch.autograd.grad(loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_chunked_cross_entropy_of_no_position_is_zero():
    hidden_states, weight, item_bias, targets = random_problem()
    assert chunked_cross_entropy(hidden_states[:0], weight, item_bias, targets[:0])[0].item() == 0


def test_chunked_cross_entropy_keeps_gradient_types_under_bfloat16_autocast():
    hidden_states, weight, item_bias, targets = random_problem(positions=64)
    exact, _ = chunked_cross_entropy(hidden_states, weight, item_bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden_states, weight, item_bias, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert weight.grad.dtype == hidden_states.grad.dtype == torch.float32


def test_sampled_softmax_by_hand():
    target_scores = torch.tensor([1.0, 0.0])
    negative_scores = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    collisions = torch.tensor([[False, False], [False, True]])
    expected = math.log(math.exp(1) + math.exp(0.5) + math.exp(-1)) - 1 + math.log(1 + math.exp(2))
    loss = sampled_softmax_loss(target_scores, negative_scores, collisions)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_sampled_softmax_with_only_collisions_is_zero_and_has_finite_gradients():
    target_scores = torch.tensor([3.0], requires_grad=True)
    negative_scores = torch.tensor([[3.0]], requires_grad=True)
    loss = sampled_softmax_loss(target_scores, negative_scores, torch.tensor([[True]]))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(target_scores.grad).all() and torch.isfinite(negative_scores.grad).all()


def popular_problem(num_items=40):
    """Scores of a catalogue, a popular target, and draws in proportion to counts that fall off steeply."""
    scores = torch.randn(num_items, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q = 1 / torch.arange(1.0, num_items + 1, dtype=torch.float64) ** 1.2
    return scores, torch.tensor([1]), q / q.sum()


def expected_gradient(scores, target, q, k, correct, draws=400_000):
    """Gradient and p(target) of the sampled softmax with k negatives, averaged over many draws."""
    rows = draws // k
    drawn = torch.multinomial(q, rows * k, replacement=True, generator=torch.Generator().manual_seed(k)).view(rows, k)
    leaf = scores.float().clone().requires_grad_()
    log_q = q.log().float()[drawn] if correct else None
    targets = target.expand(rows)
    loss = sampled_softmax_loss(leaf[targets], leaf[drawn], drawn == targets.unsqueeze(1), log_q)
    loss.backward()
    return leaf.grad.double() / rows, math.exp(-loss.item() / rows)


def test_logq_correction_approaches_the_full_softmax_as_negatives_grow():
    """The error falls like 1 / negatives; without the correction, or with the target corrected too, it does not."""
    scores, target, q = popular_problem()
    p = scores.softmax(0)
    full = p - F.one_hot(target[0], len(p))
    errors = []
    for k in (8, 64, 512):
        gradient, estimate = expected_gradient(scores, target, q, k, correct=True)
        errors.append(((gradient - full).norm() / full.norm()).item())
    assert errors[0] < 0.25 and errors[1] < 0.08 and errors[2] < 0.03
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert estimate == pytest.approx(p[target[0]].item(), rel=0.05)
    for k in (64, 512):
        gradient, estimate = expected_gradient(scores, target, q, k, correct=False)
        assert (gradient - full).norm() / full.norm() > 0.2
    assert estimate < p[target[0]].item() / 2  # tends to 0


def test_logq_correction_by_hand():
    """Two negatives with probabilities 1/4 and 1/8: they count 1 / (2 q) times, the target once."""
    scores, log_q = torch.tensor([[0.5, -1.0]]), torch.tensor([1 / 4, 1 / 8]).log()
    expected = math.log(math.exp(1) + 2 * math.exp(0.5) + 4 * math.exp(-1)) - 1
    loss = sampled_softmax_loss(torch.tensor([1.0]), scores, torch.zeros(1, 2, dtype=torch.bool), log_q)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("sharing", ["batch", "position"])
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_loss_of_a_model_with_many_negatives_is_that_of_the_full_softmax(sharing, power):
    """Whatever the negatives are drawn by, also where an item is drawn more rarely than it occurs (power 2)."""
    counts = torch.tensor([0.0, 30, 1, 7, 2, 12, 3])
    torch.manual_seed(0)
    settings = {"num_items": 6, "hidden_size": 8, "num_hidden_layers": 1, "max_length": 4, "initializer_range": 0.5}
    history, labels = torch.tensor([[3, 1, 5]]), torch.tensor([[1, 5, 2]])
    losses, weights = {}, None
    for loss_type in ("cross_entropy", "sampled_softmax"):
        config = SASRecConfig(
            loss_type=loss_type, popularity_power=power, negative_sharing=sharing, num_negatives=100_000, **settings
        )
        model = SASRecForNextItem(config).eval()
        if power:
            model.set_item_counts(counts)
        if weights is not None:
            model.load_state_dict(weights)
        weights = model.state_dict()
        loss = model(history, labels=labels).loss
        gradient = torch.autograd.grad(loss, model.model.item_embedding.weight)[0]
        losses[loss_type] = loss, gradient
    torch.testing.assert_close(losses["sampled_softmax"][0], losses["cross_entropy"][0], rtol=0.02, atol=0)
    torch.testing.assert_close(losses["sampled_softmax"][1], losses["cross_entropy"][1], rtol=0, atol=0.02)


def naive_gbce(positive, negatives, num_items, t):
    alpha = len(negatives) / (num_items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)

    def sigmoid(score):
        return 1 / (1 + math.exp(-score))

    terms = [math.log(sigmoid(positive) ** beta)] + [math.log(1 - sigmoid(score)) for score in negatives]
    return -sum(terms) / (len(negatives) + 1)


@pytest.mark.parametrize("calibration", [0.0, 0.5, 0.75, 1.0])
def test_gbce_equals_the_paper_s_formula(calibration):
    positives, negatives = [0.3, -2.0], [[1.0, 0.2, -0.5], [0.0, 3.0, -3.0]]
    expected = sum(naive_gbce(p, n, 101, calibration) for p, n in zip(positives, negatives, strict=True))
    loss = gbce_loss(
        torch.tensor(positives), torch.tensor(negatives), torch.zeros(2, 3, dtype=torch.bool), 101, calibration
    )
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_gbce_without_calibration_is_binary_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    positives, negatives = torch.randn(5, generator=generator), torch.randn(5, 1, generator=generator)
    scores = torch.stack([positives, negatives[:, 0]])
    labels = torch.stack([torch.ones(5), torch.zeros(5)])
    expected = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum") / 2
    loss = gbce_loss(positives, negatives, torch.zeros(5, 1, dtype=torch.bool), 50, 0.0)
    torch.testing.assert_close(loss, expected)
