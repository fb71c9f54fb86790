"""The losses against the published program's numbers and against naive formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from hf_ilora.distillation.losses import (
    BASE_LOSSES,
    DLLM2RecLoss,
    base_losses,
    distribution_loss,
    dro_loss,
    embedding_loss,
    propensity_scores,
    ranking_distillation_weights,
)
from tests.paths import SHARED

GOLDEN = SHARED / "reference" / "dllm2rec"
GAMMAS = (0.3, 0.5, 0.1)
NUMBERS = ("alpha", "beta", "lam", "gamma_position", "gamma_confidence", "gamma_consistency")


def random_problem(batch=6, items=23, labels=4, size=1.0, seed=0, dtype=torch.float32):
    """Scores that need gradients, target, negative, teacher items (different ones in a row) and distances."""
    generator = torch.Generator().manual_seed(seed)
    scores = (size * torch.randn(batch, items, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(0, items, (batch,), generator=generator)
    negative = (target + torch.randint(1, items, (batch,), generator=generator)) % items
    teacher_items = torch.rand(batch, items, generator=generator).argsort(1)[:, :labels]
    distances = 3 * torch.rand(batch, labels, generator=generator)
    return scores, target, negative, teacher_items, distances


def some_propensity(items=23):
    return propensity_scores(torch.arange(items) ** 2)


# --- naive formulas, in Python loops and float64 ---


def naive_dro(scores: torch.Tensor, target: int, propensity: torch.Tensor, beta: float) -> torch.Tensor:
    """One row; the exponentials are summed without ever being taken out again, shifted so that none overflows."""
    truth = F.one_hot(torch.tensor(target), len(scores)).double()
    exponents = propensity.double() * (scores.double() - truth) ** 2 / beta
    shift = exponents.detach().max()
    return torch.log(torch.exp(exponents - shift).sum()) + shift


def naive_weights(scores, items, distances, gammas) -> list[float]:
    """One row, labels that are not -1."""
    k = len(items)
    own = set(scores.double().argsort(descending=True)[:k].tolist())
    position = [math.exp(-place) for place in range(1, k + 1)]
    confidence = [math.exp(-distance) + 1e-8 for distance in distances]
    consistency = [(item in own) + 1e-8 for item in items]
    weights = [
        gammas[0] * p / sum(position) + gammas[1] * c / sum(confidence) + gammas[2] * a
        for p, c, a in zip(position, confidence, consistency, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def naive_loss(scores, target, negative, items, distances, form, propensity, alpha, beta, lam, gammas):
    """The whole loss with BCE, k terms of k separate sums."""
    scores = scores.double()
    rows = range(len(scores))
    sigmoid_of_negative = (lambda s: 1 - s) if form == "reference" else (lambda s: -s)
    base = sum((F.softplus(-scores[r, target[r]]) + F.softplus(scores[r, negative[r]])) / 2 for r in rows) / len(scores)
    dro = sum(naive_dro(scores[r], int(target[r]), propensity, beta) for r in rows) / len(scores)
    weights = [naive_weights(scores[r].detach(), items[r].tolist(), distances[r].tolist(), gammas) for r in rows]
    named = [{int(target[r]), *items[r].tolist()} for r in rows]
    counts = [form == "reference" or int(negative[r]) not in named[r] for r in rows]
    ranking = 0.0
    for k in range(items.shape[1]):
        labels = [int(items[r, k]) for r in rows]
        pairs = [
            -F.logsigmoid(scores[r, labels[r]]) - counts[r] * F.logsigmoid(sigmoid_of_negative(scores[r, negative[r]]))
            for r in rows
        ]
        terms = [naive_dro(scores[r], labels[r], propensity, beta) for r in rows]
        ranking += sum(weights[r][k] * pairs[r] for r in rows) / len(scores)
        if form == "reference":
            mean_weight = sum(weights[r][k] for r in rows) / len(scores)
            ranking += alpha * mean_weight * sum(terms) / len(scores)
        else:
            ranking += alpha * sum(weights[r][k] * terms[r] for r in rows) / len(scores)
    return base + alpha * dro + lam * ranking


# --- the published program ---


@pytest.mark.parametrize("case", range(7))
def test_reference_form_repeats_the_published_program(case):
    path = GOLDEN / f"case_{case}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent: the golden numbers lie beside the project")
    with safe_open(path, "pt") as file:
        arguments, golden = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    propensity = propensity_scores(golden["item_counts"])
    torch.testing.assert_close(propensity, golden["propensity"], rtol=2e-7, atol=0)
    numbers = {name: float(arguments[name]) for name in NUMBERS}
    top_k = int(arguments["candidate_topk"])
    program = DLLM2RecLoss(**numbers, top_k=top_k, propensity=propensity, form="reference")
    scores = golden["student_scores"].requires_grad_()
    labels = golden["teacher_items"], golden["teacher_distance"]
    output = program(scores, golden["target"], golden["negative"], *labels)
    output.loss.backward()

    zero = torch.zeros(1)
    for value, name in (
        (output.loss, "loss"),
        (output.base_loss, "bce_loss"),
        (output.dro_loss, "dro_loss"),
        (output.ranking_loss, "ranking_loss"),
    ):
        torch.testing.assert_close(value.double().view(1), golden.get(name, zero).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scores.grad, golden["grad_student_scores"], rtol=1e-5, atol=1e-6)
    if "ranking_weight" in golden:
        gammas = [numbers[name] for name in NUMBERS[3:]]
        weights = ranking_distillation_weights(scores, *(part[:, :top_k] for part in labels), *gammas)
        torch.testing.assert_close(weights, golden["ranking_weight"], rtol=1e-5, atol=1e-7)
    if numbers["lam"]:
        other = DLLM2RecLoss(**numbers, top_k=top_k, propensity=propensity)  # the corrected form
        other_loss = other(scores, golden["target"], golden["negative"], *labels).loss
        assert abs(other_loss.item() - golden["loss"].item()) > 1e-3


@pytest.mark.parametrize("form", ["reference", "corrected"])
@pytest.mark.parametrize("alpha, lam, gammas", [(0.5, 0.7, GAMMAS), (1.0, 0.3, (0.0, 0.0, 1.0)), (0.2, 1.0, (1, 0, 0))])
@pytest.mark.parametrize("size, tolerance", [(2.0, 1e-4), (20.0, 1e-3)])  # 20: up to 68, exponentials overflow
def test_loss_and_gradient_equal_the_naive_formula(form, alpha, lam, gammas, size, tolerance):
    scores, target, negative, items, distances = random_problem(size=size)
    propensity = some_propensity()
    program = DLLM2RecLoss(alpha, 0.8, lam, *gammas, top_k=4, propensity=propensity, form=form)
    loss = program(scores, target, negative, items, distances).loss
    (gradient,) = torch.autograd.grad(loss, scores)
    settings = {"propensity": propensity, "alpha": alpha, "beta": 0.8, "lam": lam, "gammas": gammas}
    expected = naive_loss(scores, target, negative, items, distances, form, **settings)
    (expected_gradient,) = torch.autograd.grad(expected, scores)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=1e-6 if size == 2 else 1e-4)


def test_forms_agree_for_one_row_but_for_the_margin_of_negatives():
    """With one row the product of two means is the mean of products; what remains is sigmoid(1 - s) for sigmoid(-s)."""
    scores, target, negative, items, distances = random_problem(batch=1)
    losses = {}
    for form in ("reference", "corrected"):
        program = DLLM2RecLoss(top_k=4, propensity=some_propensity(), form=form)
        losses[form] = program(scores, target, negative, items, distances)
    score = scores[0, negative[0]]
    difference = F.softplus(score - 1) - F.softplus(score)
    torch.testing.assert_close(losses["reference"].ranking_loss - losses["corrected"].ranking_loss, difference)
    torch.testing.assert_close(losses["reference"].base_loss, losses["corrected"].base_loss)


def test_loss_is_the_weighted_sum_of_its_parts():
    problem = random_problem()
    output = DLLM2RecLoss(alpha=0.4, lam=0.6, top_k=4, propensity=some_propensity())(*problem)
    expected = output.base_loss + 0.4 * output.dro_loss + 0.6 * output.ranking_loss
    torch.testing.assert_close(output.loss, expected)
    without_dro = DLLM2RecLoss(alpha=0, lam=0.6, top_k=4)(*problem)
    assert without_dro.dro_loss == 0 and without_dro.ranking_loss < output.ranking_loss
    base_alone = DLLM2RecLoss(alpha=0, lam=0)(*problem[:3])
    assert base_alone.loss == base_alone.base_loss == output.base_loss and base_alone.ranking_loss == 0


# --- DROS ---


def test_dro_of_several_targets_equals_one_at_a_time():
    scores, target, _, items, _ = random_problem(size=3.0)
    propensity = some_propensity()
    together = dro_loss(scores, items, propensity, beta=0.7)
    for place in range(items.shape[1]):
        torch.testing.assert_close(together[:, place], dro_loss(scores, items[:, place], propensity, beta=0.7))
    assert dro_loss(scores, target, propensity, beta=0.7).shape == target.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dro_is_exact_where_its_exponentials_overflow(dtype, beta):
    """Scores of 50 give exponents of up to 5000, but float32 can represent exponentials of up to 88 only."""
    scores, target, _, _, _ = random_problem(size=25.0, dtype=dtype)
    with torch.no_grad():
        scores.clamp_(-50, 50)
        scores[0, :2], scores[1, 3] = torch.tensor([50.0, -50.0]), 50.0
    target[:2] = torch.tensor([1, 3])
    propensity = some_propensity()
    loss = dro_loss(scores, target, propensity, beta)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    expected = torch.stack([naive_dro(scores[r], int(target[r]), propensity, beta) for r in range(len(scores))])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), scores)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    coarse = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 1e-3}
    torch.testing.assert_close(gradient.float(), expected_gradient.float(), **coarse)


@pytest.mark.parametrize("largest_score", [4.0, 9.0, 15.0, 50.0, -50.0])
def test_dro_is_exact_where_the_target_is_most_of_the_sum(largest_score):
    """Taking exp(a_t) out of a sum that it dominates would leave rounding, zero, or a negative number."""
    scores = torch.full((1, 5), 0.1)
    scores[0, 2] = largest_score
    scores.requires_grad_()
    propensity = torch.full((5,), 0.9)
    targets = torch.tensor([[2, 0, 4]])
    losses = dro_loss(scores, targets, propensity, beta=1.0)[0]
    for loss, target in zip(losses, targets[0].tolist(), strict=True):
        expected = naive_dro(scores[0], target, propensity, beta=1.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        gradient, expected_gradient = (
            torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (loss, expected)
        )
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


def test_dro_of_equal_scores_counts_items():
    """All scores 0: exp(0) for each item but the target, exp(ps) for the target."""
    loss = dro_loss(torch.zeros(2, 4), torch.tensor([0, 3]), torch.full((4,), 0.5), beta=0.25)
    torch.testing.assert_close(loss, torch.full((2,), math.log(3 + math.exp(2))))


def test_dro_of_many_targets_keeps_nothing_of_items_times_targets():
    """All K terms read the two numbers that a row is summed up in: nothing of batch x items x targets is kept."""
    scores, _, _, _, _ = random_problem(batch=2, items=300)
    targets = torch.arange(300).expand(2, 300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        dro_loss(scores, targets, some_propensity(300), beta=1.0)
    assert max(kept) == 2 * 300


def test_dro_takes_a_propensity_for_each_row_of_its_own_items():
    scores, target, _, _, _ = random_problem(items=9)
    propensity = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    losses = dro_loss(scores, target, propensity, beta=1.0)
    for row in range(6):
        expected = dro_loss(scores[row : row + 1], target[row : row + 1], propensity[row], beta=1.0)
        torch.testing.assert_close(losses[row : row + 1], expected)


@pytest.mark.parametrize("form", ["reference", "corrected"])
@pytest.mark.parametrize("base_loss", BASE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_finite_for_scores_of_fifty(form, base_loss, dtype):
    _, target, negative, items, distances = random_problem()
    signs = torch.rand(6, 23, generator=torch.Generator().manual_seed(2)).sub(0.5).sign()
    scores = (50 * signs).to(dtype).requires_grad_()
    program = DLLM2RecLoss(top_k=4, propensity=some_propensity(), form=form, base_loss=base_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = program(scores, target, negative, items, distances * 20)
    output.loss.backward()
    for value in vars(output).values():
        assert value.isfinite() and value.dtype == torch.float32
    assert scores.grad.isfinite().all() and scores.grad.dtype == dtype


# --- propensity ---


def test_propensity_of_counts_by_hand():
    """Counts 0, 1, 5 become 1/9, 2/9, 6/9."""
    scores = propensity_scores(torch.tensor([0, 1, 5]), power=0.5)
    torch.testing.assert_close(scores, torch.tensor([1 / 3, math.sqrt(2) / 3, math.sqrt(6) / 3]))
    torch.testing.assert_close(propensity_scores(torch.tensor([4, 7]), power=0.0), torch.ones(2))


def test_propensity_refuses_what_are_no_counts():
    with pytest.raises(ValueError, match=r"item_counts contain -1: expected numbers of occurrences"):
        propensity_scores(torch.tensor([3, -1]))
    with pytest.raises(ValueError, match=r"shape \(2, 2\): expected \(items,\)"):
        propensity_scores(torch.ones(2, 2))


# --- weights of the teacher's items ---


def test_weights_by_hand():
    scores = torch.tensor([[5.0, 4.0, 0.0, 1.0]])  # the student's own two best are 0 and 1
    items, distances = torch.tensor([[1, 2]]), torch.tensor([[0.0, math.log(3.0)]])
    first = math.e / (1 + math.e)
    by_position = ranking_distillation_weights(scores, items, distances, 1, 0, 0)
    torch.testing.assert_close(by_position, torch.tensor([[first, 1 - first]]))
    torch.testing.assert_close(
        ranking_distillation_weights(scores, items, distances, 0, 2, 0), torch.tensor([[0.75, 0.25]])
    )
    by_agreement = ranking_distillation_weights(scores, items, distances, 0, 0, 1)
    torch.testing.assert_close(by_agreement, torch.tensor([[1.0, 0.0]]))
    together = torch.tensor([first + 0.75 + 1, 1 - first + 0.25])
    torch.testing.assert_close(
        ranking_distillation_weights(scores, items, distances, 1, 1, 1), (together / 3).unsqueeze(0)
    )


def test_missing_labels_weigh_nothing_and_the_others_share():
    scores, _, _, items, distances = random_problem()
    few, few_distances = items.clone(), distances.clone()
    few[0, 2:], few[1] = -1, -1
    few_distances[0, 2:], few_distances[1] = 7.0, 0.0  # ignored
    weights = ranking_distillation_weights(scores, few, few_distances, 0.3, 0.5, 0.0)
    pair = ranking_distillation_weights(scores[:1], items[:1, :2], distances[:1, :2], 0.3, 0.5, 0.0)
    torch.testing.assert_close(weights[:1], torch.cat([pair, torch.zeros(1, 2)], dim=1))
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 0, 1, 1, 1, 1]))
    whole = ranking_distillation_weights(scores, items, distances, 0.3, 0.5, 0.0)
    torch.testing.assert_close(weights[2:], whole[2:])


def test_weights_have_no_gradient():
    scores, _, _, items, distances = random_problem()
    assert not ranking_distillation_weights(scores, items, distances, *GAMMAS).requires_grad


# --- rows that the teacher was not asked about ---


@pytest.mark.parametrize("form", ["reference", "corrected"])
@pytest.mark.parametrize("how", ["sample_weights", "no labels", "bool"])
def test_rows_without_labels_count_only_in_the_base_loss(form, how):
    scores, target, negative, items, distances = random_problem()
    program = DLLM2RecLoss(alpha=0.5, lam=0.7, top_k=4, propensity=some_propensity(), form=form)
    asked = torch.tensor([1.0, 0, 1, 1, 0, 1])
    if how == "no labels":
        labels = torch.where(asked.bool().unsqueeze(1), items, -1)
        output = program(scores, target, negative, labels, distances)
    else:
        weights = asked.bool() if how == "bool" else asked
        output = program(scores, target, negative, items, distances, weights)
    kept = asked.bool()
    of_kept = program(scores[kept], target[kept], negative[kept], items[kept], distances[kept])
    torch.testing.assert_close(output.ranking_loss, of_kept.ranking_loss * 4 / 6)
    everywhere = program(scores, target, negative, items, distances)
    torch.testing.assert_close((output.base_loss, output.dro_loss), (everywhere.base_loss, everywhere.dro_loss))
    none = program(scores, target, negative, torch.full_like(items, -1), distances)
    assert none.ranking_loss == 0 and none.loss.isfinite()


def test_sample_weights_scale_each_rows_ranking():
    problem = random_problem()
    program = DLLM2RecLoss(alpha=0.5, lam=1.0, top_k=4, propensity=some_propensity())
    weights = torch.tensor([0.5, 0, 2, 1, 0.1, 0])
    rows = [program(*(part[r : r + 1] for part in problem)).ranking_loss for r in range(6)]
    expected = sum(weight * row for weight, row in zip(weights, rows, strict=True)) / 6
    torch.testing.assert_close(program(*problem, weights).ranking_loss, expected)


def test_corrected_batch_is_the_mean_of_its_halves():
    """Accumulation equals the bigger batch; the reference form, which multiplies means of a batch, cannot have this."""
    problem = random_problem()
    for form, same in (("corrected", True), ("reference", False)):
        program = DLLM2RecLoss(top_k=4, propensity=some_propensity(), form=form)
        halves = [program(*(part[half] for part in problem)).loss for half in (slice(0, 3), slice(3, 6))]
        whole = program(*problem).loss
        assert (abs(whole - sum(halves) / 2) < 1e-5) == same


# --- sampled scores ---


def test_a_sample_of_items_is_a_catalogue_of_its_own():
    """Columns shuffled and a few left out: the same loss as a student that has only these items."""
    scores, target, negative, items, distances = random_problem(items=30)
    named = torch.cat([target, negative, items.flatten()]).unique()
    propensity = some_propensity(30)
    columns = [torch.searchsorted(named, ids.contiguous()) for ids in (target, negative, items)]
    program = DLLM2RecLoss(alpha=0.5, top_k=4, propensity=propensity)
    sampled = program(scores[:, named], *columns, distances, propensity=propensity[named])
    with pytest.raises(ValueError, match=r"propensity has shape \(30,\): expected .* select their propensities"):
        program(scores[:, named], *columns, distances)
    small = {"propensity": propensity[named], "alpha": 0.5, "beta": 1.0, "lam": 0.8, "gammas": GAMMAS}
    expected = naive_loss(scores[:, named], *columns, distances, "corrected", **small)
    assert sampled.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_fewer_columns_than_labels_still_work():
    scores, target, negative, _, _ = random_problem(items=3)
    items = torch.tensor([[2, 0, -1, -1]]).expand(6, 4)
    output = DLLM2RecLoss(top_k=4, propensity=some_propensity(3))(scores, target, negative, items, torch.rand(6, 4))
    assert output.loss.isfinite()


# --- base losses ---


@pytest.mark.parametrize("base_loss", BASE_LOSSES)
def test_base_losses_by_the_naive_formula(base_loss):
    scores, target, _, items, distances = random_problem()
    negative = torch.stack([(target + 1) % 23, (target + 5) % 23, target], dim=1)  # the last one collides
    losses = base_losses(scores, target, negative, base_loss, num_items=101, gbce_calibration=0.6)
    for row in range(len(scores)):
        row_scores, truth = scores[row].double(), scores[row, target[row]].double()
        others = row_scores[negative[row, :2]]
        if base_loss == "cross_entropy":
            expected = row_scores.logsumexp(0) - truth
        elif base_loss == "sampled_softmax":
            # three draws from 101 items: each represents 101 / 3 of them
            expected = torch.cat([truth.view(1), others + math.log(101 / 3)]).logsumexp(0) - truth
        else:
            rate = 3 / 100
            power = rate * (0.6 * (1 - 1 / rate) + 1 / rate) if base_loss == "gbce" else 1.0
            expected = (-power * F.logsigmoid(truth) - F.logsigmoid(-others).sum()) / 4
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)
    program = DLLM2RecLoss(
        alpha=0, lam=0.5, top_k=4, base_loss=base_loss, num_items=101, gbce_calibration=0.6, propensity=None
    )
    output = program(scores, target, negative, items, distances)
    torch.testing.assert_close(output.base_loss, losses.mean())
    gradient, expected = (
        torch.autograd.grad(v, scores, retain_graph=True)[0] for v in (output.base_loss, losses.mean())
    )
    torch.testing.assert_close(gradient, expected)


def test_several_negatives_are_averaged_in_the_ranking():
    scores, target, negative, items, distances = random_problem()
    program = DLLM2RecLoss(alpha=0, lam=1.0, top_k=4)
    named = torch.cat([target.unsqueeze(1), items], dim=1)  # (batch, 5)
    free = [[item for item in range(23) if item not in row] for row in named.tolist()]
    negative, other = (torch.tensor([row[place] for row in free]) for place in (0, 5))
    both = program(scores, target, torch.stack([negative, other], dim=1), items, distances).ranking_loss
    each = [program(scores, target, one, items, distances).ranking_loss for one in (negative, other)]
    torch.testing.assert_close(both, sum(each) / 2)


@pytest.mark.parametrize("form", ["reference", "corrected"])
def test_no_negative_pushes_down_the_target_or_an_item_of_the_teacher(form):
    scores = torch.zeros(3, 6, requires_grad=True)
    target, items = torch.tensor([1, 1, 1]), torch.tensor([[2, 3], [2, 3], [2, -1]])
    negative = torch.tensor([[1, 5], [3, 5], [0, 5]])  # the target, a label, and column 0, which is no missing label
    program = DLLM2RecLoss(alpha=0, lam=1.0, top_k=2, form=form, base_loss="student")
    program(scores, target, negative, items, torch.ones(3, 2)).loss.backward()
    pushed_down = [sorted((row > 1e-6).nonzero().flatten().tolist()) for row in scores.grad]
    if form == "corrected":
        assert pushed_down == [[5], [5], [0, 5]]
    else:
        assert pushed_down[0] == [1, 5]


def test_the_student_may_have_a_base_loss_of_its_own():
    problem = random_problem()
    settings = {"alpha": 0.5, "lam": 0.7, "top_k": 4, "propensity": some_propensity()}
    student, bce = DLLM2RecLoss(**settings, base_loss="student")(*problem), DLLM2RecLoss(**settings)(*problem)
    assert student.base_loss == 0
    torch.testing.assert_close(student.loss, bce.loss - bce.base_loss)


def test_propensity_moves_with_the_loss_and_stays_out_of_its_weights():
    program = DLLM2RecLoss(propensity=some_propensity())
    assert program.to("meta").propensity.is_meta and not program.state_dict()


# --- whole distributions, embeddings ---


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distribution_loss_by_the_definition(direction, temperature):
    student, *_ = random_problem()
    teacher, *_ = random_problem(seed=1)
    losses = distribution_loss(student, teacher, temperature, direction)
    p, q = (torch.softmax(scores.double() / temperature, dim=1) for scores in (teacher, student))
    if direction == "reverse":
        p, q = q, p
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert distribution_loss(student, student, temperature, direction).abs().max() < 1e-6


def test_directions_differ_and_large_scores_stay_finite():
    student, teacher = torch.tensor([[50.0, -50.0, 0.0]], requires_grad=True), torch.tensor([[-50.0, 50.0, 0.0]])
    torch.testing.assert_close(distribution_loss(student, teacher), torch.tensor([100.0]))
    forward, reverse = (distribution_loss(student.bfloat16(), teacher / 50, 1.0, d) for d in ("forward", "reverse"))
    assert abs(forward - reverse) > 1
    (forward + reverse).sum().backward()
    assert student.grad.isfinite().all()


def test_embedding_losses_by_hand():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(embedding_loss(student, teacher), torch.tensor([8.0, 2.5]))
    torch.testing.assert_close(embedding_loss(student, teacher, "cosine"), torch.tensor([0.4, 1.0]))
    assert embedding_loss(torch.zeros(1, 2, requires_grad=True), teacher[:1], "cosine").isfinite().all()


# --- what is refused ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": -0.1}, "alpha is -0.1: expected a finite number, 0 or more"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"gamma_confidence": -1}, "gamma_confidence is -1"),
        ({"gamma_position": 0, "gamma_confidence": 0, "gamma_consistency": 0}, "all gammas are 0"),
        ({"beta": 0}, "beta is 0: expected a positive number"),
        ({"top_k": 0}, "top_k is 0: expected at least 1"),
        ({"form": "published"}, "form is 'published': expected one of corrected, reference"),
        ({"base_loss": "hinge"}, "base_loss is 'hinge': expected one of bce, cross_entropy, sampled_softmax, gbce"),
    ],
)
def test_settings_outside_their_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DLLM2RecLoss(**settings)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"target": torch.tensor([23] * 6)},
            r"target contains 23: expected columns 0\.\.22 .*; subtract 1 from item ids",
        ),
        ({"target": torch.tensor([1] * 5)}, r"scores have shape \(6, 23\) and target \(5,\)"),
        ({"target": torch.zeros(6, 1).long()}, r"target \(6, 1\): expected \(batch, items\) and \(batch,\)"),
        ({"negative": torch.tensor([-1] * 6)}, r"negative contains -1: expected columns 0\.\.22"),
        ({"negative": None}, "negative is None"),
        ({"teacher_items": torch.full((6, 4), -2)}, r"teacher_items contains -2: expected columns -1\.\.22"),
        (
            {"teacher_items": torch.zeros(6, 3).long()},
            r"teacher_items have shape \(6, 3\): expected \(batch, at least 4",
        ),
        ({"teacher_items": None}, "teacher_items or teacher_distances is None with lam 0.8"),
        ({"teacher_distances": torch.zeros(6, 3)}, r"teacher_distances have shape \(6, 3\): expected \(6, 4\)"),
        ({"teacher_distances": torch.full((6, 4), math.nan)}, "teacher_distances contain NaN"),
        ({"sample_weights": torch.ones(5)}, r"sample_weights have shape \(5,\): expected \(6,\)"),
        ({"propensity": torch.ones(22)}, r"propensity has shape \(22,\): expected \(23,\) or \(6, 23\)"),
    ],
)
def test_input_that_does_not_fit_is_refused(changes, message):
    names = ("student_scores", "target", "negative", "teacher_items", "teacher_distances")
    batch = dict(zip(names, random_problem(), strict=True))
    program = DLLM2RecLoss(top_k=4, propensity=some_propensity())
    program(**batch)
    with pytest.raises(ValueError, match=message):
        program(**batch | changes)


def test_dros_needs_propensity_beta_and_two_items():
    problem = random_problem()
    with pytest.raises(ValueError, match=r"propensity is None with alpha 1\.0: expected propensity_scores"):
        DLLM2RecLoss(alpha=1.0, top_k=4)(*problem)
    with pytest.raises(ValueError, match="beta is 0: expected a positive number"):
        dro_loss(problem[0], problem[1], some_propensity(), beta=0)
    with pytest.raises(ValueError, match=r"scores have shape \(6, 1\): expected at least two items"):
        dro_loss(torch.zeros(6, 1), torch.zeros(6).long(), torch.ones(1), beta=1.0)


def test_the_other_losses_refuse_what_does_not_fit():
    scores, target, _, _, _ = random_problem()
    with pytest.raises(ValueError, match=r"teacher_scores \(6, 22\): expected \(batch, items\) of the same items"):
        distribution_loss(scores, scores[:, 1:])
    with pytest.raises(ValueError, match="temperature is 0: expected a positive number"):
        distribution_loss(scores, scores, temperature=0)
    with pytest.raises(ValueError, match="direction is 'sideways': expected one of forward, reverse"):
        distribution_loss(scores, scores, direction="sideways")
    with pytest.raises(ValueError, match="project the larger embeddings first"):
        embedding_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="kind is 'l1': expected one of mse, cosine"):
        embedding_loss(torch.zeros(2, 3), torch.zeros(2, 3), kind="l1")
    with pytest.raises(ValueError, match="negative is None: expected"):
        base_losses(scores, target)
    with pytest.raises(ValueError, match="base_loss is 'none': expected one of bce"):
        base_losses(scores, target, base_loss="none")
