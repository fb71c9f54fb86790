"""The sampled softmax in chunks, its seen items and soft targets, against naive formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.models.next_item.next_item_losses import (
    Columns,
    SeenItems,
    SoftTarget,
    chunked_cross_entropy,
    chunked_sampled_softmax,
    sampled_softmax_loss,
)

NUM_ITEMS, POSITIONS, HIDDEN = 20, 11, 6


@pytest.fixture
def problem():
    """Hidden states, table, biases, targets and negatives, some of them twice and some of them targets."""
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    table = torch.randn(NUM_ITEMS + 1, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(NUM_ITEMS + 1, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(1, NUM_ITEMS + 1, (POSITIONS,), generator=generator)
    negatives = torch.randint(1, NUM_ITEMS + 1, (15,), generator=generator)
    assert len(negatives.unique()) < 15 and torch.isin(targets, negatives).any()
    return hidden_states, table, bias, targets, negatives


def in_chunks(problem, chunk_size=4, **settings):
    hidden_states, table, bias, targets, negatives = problem
    return chunked_sampled_softmax(
        hidden_states, table[targets], bias[targets], table[negatives], bias[negatives], targets, negatives,
        chunk_size=chunk_size, **settings,
    )  # fmt: skip


def competing(problem):
    """Scores (positions, 1 + negatives), target first, with -inf where a negative is the target."""
    hidden_states, table, bias, targets, negatives = problem
    scores = hidden_states @ table.t() + bias
    of_negatives = scores[:, negatives].masked_fill(negatives == targets.unsqueeze(1), -math.inf)
    return torch.cat([scores.gather(1, targets.unsqueeze(1)), of_negatives], 1)


def assert_same(loss, expected, problem):
    parameters = problem[:3]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    expected_gradients = torch.autograd.grad(expected, parameters)
    for gradient, wanted in zip(torch.autograd.grad(loss, parameters), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("log_q", [None, -math.log(NUM_ITEMS), torch.linspace(-5, -1, 15).double()])
def test_chunks_give_loss_and_gradients_of_the_whole(problem, chunk_size, log_q):
    scores = competing(problem)
    collisions = scores[:, 1:].isneginf()
    hidden_states, table, bias, _, negatives = problem
    expected = sampled_softmax_loss(
        scores[:, 0], (hidden_states @ table.t() + bias)[:, negatives], collisions, log_q
    ).double()
    loss, parts = in_chunks(problem, chunk_size, negative_log_q=log_q)
    assert_same(loss, expected, problem)
    torch.testing.assert_close(parts, loss.detach().unsqueeze(0))


def test_only_counted_positions_learn(problem):
    counted = torch.arange(POSITIONS) % 3 != 0
    losses = -competing(problem).log_softmax(1)[:, 0]
    loss, _ = in_chunks(problem, counted=counted)
    assert_same(loss, (losses * counted).sum(), problem)
    (gradient,) = torch.autograd.grad(in_chunks(problem, counted=counted)[0], problem[0])
    assert not gradient[~counted].any()


def divergence(scores, logits):
    """KL of the softmax of logits from that of scores, summed, over the columns that compete."""
    absent = scores.isneginf()
    own, soft = scores.log_softmax(1), logits.masked_fill(absent, -math.inf).log_softmax(1)
    return (soft.exp() * (soft - own)).masked_fill(absent | soft.isneginf(), 0.0).sum()


def test_soft_targets_pull_with_their_weights(problem):
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(POSITIONS, 16, generator=generator, dtype=torch.float64)
    second = torch.randn(POSITIONS, 16, generator=generator, dtype=torch.float64)
    weights = torch.rand(POSITIONS, generator=generator, dtype=torch.float64)
    soft_targets = [
        SoftTarget(lambda chunk: (first[chunk, 1:].clone(), first[chunk, :1]), 0.7),
        SoftTarget(lambda chunk: (second[chunk, 1:].clone(), None), 1.5, weights),
    ]
    scores = competing(problem)
    second[:, 0] = -math.inf  # says nothing about the target
    base = -scores.log_softmax(1)[:, 0].sum()
    rows = [divergence(scores[row : row + 1], second[row : row + 1]) for row in range(POSITIONS)]
    kl, other = divergence(scores, first), (torch.stack(rows) * weights).sum()
    loss, parts = in_chunks(problem, soft_targets=soft_targets)
    assert_same(loss, base + 0.7 * kl + 1.5 * other, problem)
    torch.testing.assert_close(parts.double(), torch.stack([base, kl, other]).detach(), rtol=1e-5, atol=1e-6)


def test_a_student_equal_to_its_teacher_is_at_rest(problem):
    scores = competing(problem).detach()
    soft = SoftTarget(lambda chunk: (scores[chunk, 1:].clone(), scores[chunk, :1]), 3.0)
    with_teacher, parts = in_chunks(problem, soft_targets=[soft])
    alone, _ = in_chunks(problem)
    assert parts[1].abs() < 1e-6
    for found, wanted in zip(
        torch.autograd.grad(with_teacher, problem[:3]), torch.autograd.grad(alone, problem[:3]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_soft_targets_of_the_whole_catalogue(problem):
    hidden_states, table, bias, targets, _ = problem
    logits = torch.randn(POSITIONS, NUM_ITEMS, dtype=torch.float64)
    scores = (hidden_states @ table.t() + bias)[:, 1:]
    expected = F.cross_entropy(scores, targets - 1, reduction="sum") + 0.5 * divergence(scores, logits)
    loss, parts = chunked_cross_entropy(
        hidden_states, table, bias, targets, chunk_size=4,
        soft_targets=[SoftTarget(lambda chunk: (logits[chunk].clone(), None), 0.5)],
    )  # fmt: skip
    assert_same(loss, expected, problem)
    assert len(parts) == 2


def test_seen_items_compete_once_with_the_bias_of_repeats(problem):
    hidden_states, table, bias, targets, negatives = problem
    repeat_bias = torch.tensor(-1.3, dtype=torch.float64, requires_grad=True)
    seen = torch.zeros(POSITIONS, 3, dtype=torch.int64)
    seen[:, 0] = negatives[0]  # a negative that was seen
    seen[1:, 1] = torch.arange(1, POSITIONS)
    seen[2, 2] = targets[2]  # a target that was seen
    seen[2, 1] = 0 if seen[2, 1] == targets[2] else seen[2, 1]
    mask = torch.zeros(POSITIONS, NUM_ITEMS + 1, dtype=torch.bool).scatter(1, seen, True)
    mask[:, 0] = False
    scores = hidden_states @ table.t() + bias + repeat_bias * mask
    total = 0
    for row in range(POSITIONS):
        drawn = [item for item in negatives.tolist() if item != targets[row] and not mask[row, item]]
        again = [item for item in mask[row].nonzero().flatten().tolist() if item != targets[row]]
        columns = torch.tensor([int(targets[row]), *drawn, *again])
        total = total - scores[row, columns].log_softmax(0)[0]
    ids = torch.arange(NUM_ITEMS + 1)
    is_repeat = seen.eq(targets.unsqueeze(1)).any(1)
    loss, _ = chunked_sampled_softmax(
        hidden_states, table[targets], bias[targets] + repeat_bias * is_repeat, table[negatives], bias[negatives],
        targets, negatives, SeenItems(table[ids], bias[ids] + repeat_bias, Columns(negatives, NUM_ITEMS), seen, seen),
        chunk_size=4,
    )  # fmt: skip
    assert_same(loss, total, (hidden_states, table, repeat_bias))


def test_a_model_learns_that_nobody_comes_back():
    config = SASRecConfig(
        num_items=12, hidden_size=8, loss_type="sampled_softmax", num_negatives=8, repeat_bias=True, hidden_dropout=0.0,
        attention_dropout=0.0, score_temperature=0.1,
    )  # fmt: skip
    model = SASRecForNextItem(config)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        rows = torch.stack([torch.randperm(12)[:6] + 1 for _ in range(16)])
        optimizer.zero_grad()
        model(rows[:, :-1], labels=rows[:, 1:]).loss.backward()
        optimizer.step()
    assert model.head.repeat_bias.item() < -1
    rows = torch.stack([torch.randperm(12)[:5] + 1 for _ in range(16)])
    best, _ = model.recommend(rows, top_k=3, exclude_seen=False)
    assert not (best.unsqueeze(2) == rows.unsqueeze(1)).any()


def test_columns_fill_every_column_of_an_item():
    columns = Columns(torch.tensor([3, 1, 3, 5]), 6)
    filled = columns.filled(torch.tensor([[3, 2], [5, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), -1.0)
    assert filled.tolist() == [[1.0, -1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 3.0]]
    dense = columns.dense(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.tensor([7.0, 8.0, 9.0]), 2)
    assert dense.tolist() == [[0.0, 7.0, 0.0, 0.0], [9.0, 0.0, 9.0, 0.0]]
