"""The losses against naive formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_ilora.models.next_item.next_item_losses import chunked_cross_entropy, gbce_loss, sampled_softmax_loss


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

    loss = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=chunk_size) / 7
    gradients = torch.autograd.grad(loss, parameters)

    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    assert gradients[1][0].abs().sum() == 0, "the padding row must not learn"


def test_chunked_cross_entropy_gives_a_loss_without_gradients():
    hidden_states, weight, item_bias, targets = random_problem()
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=5)
    with_gradients = chunked_cross_entropy(hidden_states, weight, item_bias, targets, chunk_size=5)
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

    loss = chunked_cross_entropy(
        hidden_states, weight, item_bias, targets, repeat_bias, repeated_items, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(torch.autograd.grad(loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_chunked_cross_entropy_of_no_position_is_zero():
    hidden_states, weight, item_bias, targets = random_problem()
    assert chunked_cross_entropy(hidden_states[:0], weight, item_bias, targets[:0]).item() == 0


def test_chunked_cross_entropy_keeps_gradient_types_under_bfloat16_autocast():
    hidden_states, weight, item_bias, targets = random_problem(positions=64)
    exact = chunked_cross_entropy(hidden_states, weight, item_bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden_states, weight, item_bias, targets)
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


def test_logq_correction_makes_popular_negatives_unbiased():
    """With many negatives the corrected gradient is the full softmax's; without the correction it is not."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, generator=generator)  # column 0 is padding
    q = torch.arange(12, dtype=torch.float32) ** 1.5
    q = q / q.sum()
    negatives = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    target = torch.tensor([3])

    def gradient(correct):
        leaf = scores.clone().requires_grad_()
        logs = (q.log()[target], q.log()[negatives]) if correct else ()
        collisions = (negatives == target).unsqueeze(0) & False
        sampled_softmax_loss(leaf[target], leaf[negatives].unsqueeze(0), collisions, *logs).backward()
        return leaf.grad[1:]

    expected = torch.softmax(scores[1:], 0) - F.one_hot(target[0] - 1, 11)
    assert (gradient(True) - expected).abs().max() < 0.01
    assert (gradient(False) - expected).abs().max() > 0.1


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
