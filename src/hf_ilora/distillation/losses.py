"""Losses of DLLM2Rec and of plain distillation: pure functions of scores, and `DLLM2RecLoss`, which combines them.

Items are given as columns of the score matrix, counted from 0. The scores may cover the whole catalogue or any sample
of it, and have no column for padding. Everything is computed in float32, regardless of the dtype of the scores.

Source: DLLM2Rec (arXiv 2405.00338, RecSys 2024); the DROS term is that of DROS (SIGIR 2023).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hf_ilora.models.next_item.next_item_losses import gbce_loss, sampled_softmax_loss
from hf_ilora.models.next_item.padding import can_look, lowest_and_highest

FORMS = ("corrected", "reference")
BASE_LOSSES = ("bce", "cross_entropy", "sampled_softmax", "gbce")
STUDENT_LOSS = "student"  # the base loss is computed by the student itself
NO_LABEL = -1  # fills teacher_items of rows with fewer labels than columns

# Added to the confidence and the consistency weights, as in DLLM2Rec's program.
WEIGHT_FLOOR = 1e-8


def propensity_scores(item_counts: torch.Tensor, power: float = 0.05) -> torch.Tensor:
    """The probability of each item to be seen, raised to `power`.

    Args:
        item_counts: (items,) occurrences of each item in training.
        power: 0 makes all items equal; 1 gives the fraction of all occurrences.

    Returns:
        (items,) float32 in (0, 1].

    Raises:
        ValueError: for another shape and negative counts.

    Source: DROS, with the counts smoothed by one as in DLLM2Rec's program.
    """
    if item_counts.dim() != 1 or not len(item_counts):
        raise ValueError(f"item_counts have shape {tuple(item_counts.shape)}: expected (items,), one count per item")
    if item_counts.min() < 0:
        raise ValueError(f"item_counts contain {item_counts.min().item()}: expected numbers of occurrences, 0 or more")
    smoothed = item_counts.cpu().double() + 1  # not every accelerator has float64
    return ((smoothed / smoothed.sum()) ** power).float().to(item_counts.device)


def dro_loss(scores: torch.Tensor, target: torch.Tensor, propensity: torch.Tensor, beta: float) -> torch.Tensor:
    """The distributionally robust term of each target: log of the sum over items i of exp(ps_i (s_i - y_i)^2 / beta).

    ps is the propensity, s the score, and y is 1 for the target and 0 for all other items.

    Args:
        scores: (batch, items), at least two items.
        target: (batch,) or (batch, targets), columns of `scores`; each gives one term, in which it is the only target.
        propensity: (items,), or (batch, items) when rows score different items.
        beta: temperature, positive.

    Returns:
        As `target`, float32.

    Raises:
        ValueError: for shapes that do not fit, columns out of range, and a beta that is not positive.

    Source: DROS (SIGIR 2023) as in DLLM2Rec's program, which adds 1e-24 inside the logarithm. Every exponent is at
    least 0, so the sum is at least 1, and adding 1e-24 to it changes nothing in float32.
    """
    _check_columns("target", target, scores)
    _check_dro(scores, propensity, beta)
    targets = target.reshape(len(target), -1)  # (batch, targets)
    scores = scores.float()
    return _dro_terms(scores, scores.gather(1, targets), targets, propensity.float() / beta).view_as(target)


def _dro_terms(
    scores: torch.Tensor, target_scores: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """DROS terms (batch, targets) of scores (batch, items), where scale is propensity / beta."""
    # Subtracting the target's exponential from the sum of all is accurate unless it makes up most of the sum. Only the
    # largest can make up more than half of it, so the sum without the largest is computed directly.
    without_largest, largest_exponent, largest = _LogSumExpAndLargest.apply(scores, scale)  # (batch, 1) each
    of_all = torch.logaddexp(without_largest, largest_exponent)  # (batch, 1)
    target_scale = scale.expand_as(scores).gather(1, targets)  # (batch, targets)
    is_largest = targets == largest  # (batch, targets)
    fraction = (target_scores.square() * target_scale - of_all).masked_fill(is_largest, float("-inf")).exp()  # <= 1/2
    without_target = torch.where(is_largest, without_largest, of_all + torch.log1p(-fraction))  # (batch, targets)
    with_target = (target_scores - 1).square() * target_scale  # (batch, targets)
    return torch.logaddexp(without_target, with_target)


class _LogSumExpAndLargest(torch.autograd.Function):
    """The largest exponent scale * s^2 of each row, and the log of the sum of the other items' exponentials.

    It has its own backward because autograd's would make several passes over (batch, items).
    """

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        exponents = scores.square().mul_(scale)  # (batch, items)
        largest_exponent, largest = exponents.max(1, keepdim=True)  # (batch, 1) each
        exponents.scatter_(1, largest, float("-inf"))
        highest = exponents.amax(1, keepdim=True)  # (batch, 1)
        exponentials = exponents.sub_(highest).exp_()
        total = exponentials.sum(1, keepdim=True)  # (batch, 1), at least 1
        ctx.save_for_backward(scores, scale, exponentials, total, largest)
        ctx.mark_non_differentiable(largest)
        return highest + total.log(), largest_exponent, largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_others: torch.Tensor, grad_largest: torch.Tensor, _: None) -> tuple[torch.Tensor, None]:
        scores, scale, exponentials, total, largest = ctx.saved_tensors
        grad_exponents = (exponentials * (grad_others / total)).scatter_(1, largest, grad_largest)  # (batch, items)
        return grad_exponents.mul_(scores).mul_(2 * scale), None


@torch.no_grad()
def ranking_distillation_weights(
    student_scores: torch.Tensor,
    teacher_items: torch.Tensor,
    teacher_distances: torch.Tensor,
    gamma_position: float,
    gamma_confidence: float,
    gamma_consistency: float,
) -> torch.Tensor:
    """The weight of each of the teacher's items: by its rank, the teacher's confidence and the student's agreement.

    Args:
        student_scores: (batch, items).
        teacher_items: (batch, k) columns of `student_scores`, best first; -1 where there are fewer labels.
        teacher_distances: (batch, k), smaller is more confident, such as -log p.
        gamma_position: weight of exp(-rank), where the first item has rank 1.
        gamma_confidence: weight of exp(-distance).
        gamma_consistency: weight of being among the student's own k best items.

    Returns:
        (batch, k) float32 without gradients; a row sums to 1, or to 0 if it has no label.

    Raises:
        ValueError: for shapes that do not fit, columns out of range, and NaN among the distances.

    Source: DLLM2Rec, importance-aware ranking distillation.
    """
    _check_columns("teacher_items", teacher_items, student_scores, lowest=NO_LABEL, dimensions=(2,))
    if teacher_distances.shape != teacher_items.shape:
        raise ValueError(
            f"teacher_distances have shape {tuple(teacher_distances.shape)}: expected {tuple(teacher_items.shape)}, "
            "one for each of teacher_items"
        )
    if can_look(teacher_distances) and np.isnan(teacher_distances.numpy()).any():
        raise ValueError("teacher_distances contain NaN: expected numbers, smaller where the teacher is more confident")
    student_items = None
    if gamma_consistency:
        num_labels = min(teacher_items.shape[1], student_scores.shape[1])
        student_items = student_scores.topk(num_labels, dim=1).indices  # (batch, k)
    gammas = (gamma_position, gamma_confidence, gamma_consistency)
    return label_weights(teacher_items, teacher_distances, student_items, *gammas)


@torch.no_grad()
def label_weights(
    teacher_items: torch.Tensor,
    teacher_distances: torch.Tensor,
    student_items: torch.Tensor | None,
    gamma_position: float,
    gamma_confidence: float,
    gamma_consistency: float,
) -> torch.Tensor:
    """Compute `ranking_distillation_weights` from the student's best items instead of its scores.

    Args:
        teacher_items: (batch, k) item ids or columns, best first; -1 where there are fewer labels.
        teacher_distances: (batch, k).
        student_items: (batch, k) the student's best items, as ids or columns like `teacher_items`; None if
            gamma_consistency is 0.
        gamma_position, gamma_confidence, gamma_consistency: as in `ranking_distillation_weights`.
    """
    labelled = (teacher_items != NO_LABEL).float()  # (batch, k)
    num_labels = teacher_items.shape[1]
    ranks = torch.arange(1, num_labels + 1, device=teacher_items.device, dtype=torch.float32)
    weights = gamma_position * _normalised((-ranks).exp() * labelled)  # (batch, k)
    weights += gamma_confidence * _normalised(((-teacher_distances.float()).exp() + WEIGHT_FLOOR) * labelled)
    if gamma_consistency:
        assert student_items is not None
        agreed = (teacher_items.unsqueeze(2) == student_items.unsqueeze(1)).any(2)  # (batch, k)
        # Not normalised, as in DLLM2Rec's program.
        weights += gamma_consistency * (agreed.float() + WEIGHT_FLOOR) * labelled
    return _normalised(weights)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    """(batch, k) weights divided by the sum of their row; rows of zeros stay zero."""
    total = weights.sum(1, keepdim=True)  # (batch, 1)
    return weights / total.masked_fill(total == 0, 1.0)


def base_losses(
    student_scores: torch.Tensor,
    target: torch.Tensor,
    negative: torch.Tensor | None = None,
    base_loss: str = "bce",
    num_items: int | None = None,
    gbce_calibration: float = 0.75,
) -> torch.Tensor:
    """The loss of each row's target, which needs no teacher.

    Args:
        student_scores: (batch, items).
        target: (batch,) columns.
        negative: (batch,) or (batch, negatives) columns; negatives that equal the target are ignored. None for
            "cross_entropy", which needs none.
        base_loss: "bce" (the average over the target and its negatives), "cross_entropy" (over all columns),
            "sampled_softmax" (corrected for the draw: an estimate of the cross-entropy over the catalogue) or "gbce".
        num_items: size of the catalogue, from which the negatives are drawn uniformly, for the corrections of
            "sampled_softmax" and "gbce"; None if the columns cover all of it.
        gbce_calibration: t of gBCE.

    Returns:
        (batch,) float32.

    Raises:
        ValueError: for shapes that do not fit, columns out of range, missing negatives and an unknown base_loss.
    """
    _check_choice("base_loss", base_loss, BASE_LOSSES)
    _check_columns("target", target, student_scores, dimensions=(1,))
    if base_loss == "cross_entropy":
        return F.cross_entropy(student_scores.float(), target, reduction="none")
    if negative is None:
        raise ValueError(f"negative is None: expected (batch,) or (batch, negatives) columns for {base_loss!r}")
    _check_columns("negative", negative, student_scores)
    target, negative = target.unsqueeze(1), negative.view(len(negative), -1)  # (batch, 1), (batch, negatives)
    num_items = student_scores.shape[1] if num_items is None else num_items
    calibration = gbce_calibration if base_loss == "gbce" else 0.0
    scores = student_scores.gather(1, torch.cat([target, negative], dim=1)).float()  # (batch, 1 + negatives)
    return _sampled_losses(base_loss, scores[:, :1], scores[:, 1:], negative == target, num_items, calibration)


def _sampled_losses(
    base_loss: str,
    target_scores: torch.Tensor,
    negative_scores: torch.Tensor,
    collisions: torch.Tensor,
    num_items: int,
    calibration: float,
) -> torch.Tensor:
    """(batch,) losses of target scores (batch, 1), negative scores and collisions (batch, negatives)."""
    # The losses of the next-item models sum over positions; vmap gives them one row at a time.
    rows = (target_scores, negative_scores.unsqueeze(1), collisions.unsqueeze(1))
    if base_loss == "sampled_softmax":
        return torch.vmap(sampled_softmax_loss, in_dims=(0, 0, 0, None))(*rows, -math.log(num_items))
    return torch.vmap(gbce_loss, in_dims=(0, 0, 0, None, None))(*rows, num_items, calibration)


@dataclass
class DLLM2RecOutput:
    """The loss of a batch and its parts, scalars in float32: loss = base_loss + alpha dro_loss + lam ranking_loss."""

    loss: torch.Tensor
    base_loss: torch.Tensor
    dro_loss: torch.Tensor
    ranking_loss: torch.Tensor


class DLLM2RecLoss(nn.Module):
    """The base loss of the target, its DROS term, and the distillation of the teacher's ranking.

    Args:
        alpha: weight of the DROS terms; 0 disables them.
        beta: temperature of the DROS terms.
        lam: weight of the ranking distillation; 0 disables it, and the teacher's items are not read.
        gamma_position, gamma_confidence, gamma_consistency: see `ranking_distillation_weights`.
        top_k: number of the teacher's items to learn from, the best ones.
        propensity: (items,) from `propensity_scores`, one for each column of the scores; needed with alpha.
        form: "corrected" or "reference", the published program. For negatives, the reference has sigmoid(1 - s), the
            corrected form the logistic sigmoid(-s). The reference multiplies the batch's mean weight of a label by the
            batch's mean DROS term, the corrected form weights each row's own term, as the paper does. The reference
            also includes negatives that equal the target or one of the teacher's items.
        base_loss: "bce" (DLLM2Rec's), "cross_entropy", "sampled_softmax" or "gbce", see `base_losses`; "student" if the
            student computes its own loss, which is not part of the output.
        num_items: size of the catalogue, from which the negatives are drawn uniformly; None if the scores cover the
            whole catalogue.
        gbce_calibration: t of gBCE.

    Raises:
        ValueError: for a number outside its range or an unknown name.

    Source: DLLM2Rec, equations of section 3 of the paper; defaults are those of the published program.
    """

    propensity: torch.Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        lam: float = 0.8,
        gamma_position: float = 0.3,
        gamma_confidence: float = 0.5,
        gamma_consistency: float = 0.1,
        top_k: int = 10,
        propensity: torch.Tensor | None = None,
        form: str = "corrected",
        base_loss: str = "bce",
        num_items: int | None = None,
        gbce_calibration: float = 0.75,
    ):
        super().__init__()
        gammas = {"position": gamma_position, "confidence": gamma_confidence, "consistency": gamma_consistency}
        numbers = {"alpha": alpha, "lam": lam} | {f"gamma_{name}": gamma for name, gamma in gammas.items()}
        for name, number in numbers.items():
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} is {number}: expected a finite number, 0 or more")
        if not any(gammas.values()):
            raise ValueError("all gammas are 0: expected at least one positive, or lam=0 for no ranking distillation")
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta is {beta}: expected a positive number")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: expected at least 1, or lam=0 for no ranking distillation")
        _check_choice("form", form, FORMS)
        _check_choice("base_loss", base_loss, (*BASE_LOSSES, STUDENT_LOSS))
        self.alpha, self.beta, self.lam, self.top_k = alpha, beta, lam, top_k
        self.gammas = (gamma_position, gamma_confidence, gamma_consistency)
        self.form, self.base_loss = form, base_loss
        self.num_items, self.gbce_calibration = num_items, gbce_calibration
        self.register_buffer("propensity", propensity, persistent=False)

    def forward(
        self,
        student_scores: torch.Tensor,
        target: torch.Tensor,
        negative: torch.Tensor | None,
        teacher_items: torch.Tensor | None = None,
        teacher_distances: torch.Tensor | None = None,
        sample_weights: torch.Tensor | None = None,
        propensity: torch.Tensor | None = None,
    ) -> DLLM2RecOutput:
        """Compute the loss of a batch; all parts are means over its rows.

        Args:
            student_scores: (batch, items), of the whole catalogue or a sample of it.
            target: (batch,) columns.
            negative: (batch,) or (batch, negatives) columns; None if nothing reads them (lam 0 with "cross_entropy" or
                "student").
            teacher_items: (batch, labels) columns, best first, at least `top_k` of them; -1 where there are fewer.
            teacher_distances: (batch, labels), smaller is more confident.
            sample_weights: (batch,) weight of each row's ranking distillation, 0 for rows without labels; None for 1.
                The mean is always over all rows, so a labelled row's weight does not depend on the fraction of labelled
                rows.
            propensity: (items,) or (batch, items) of these columns; None takes the constructor's.

        Raises:
            ValueError: for a missing input, shapes that do not fit, and columns out of range.
        """
        propensity = self.propensity if propensity is None else propensity
        self._check_inputs(
            student_scores, target, negative, teacher_items, teacher_distances, sample_weights, propensity
        )
        scores, target = student_scores.float(), target.unsqueeze(1)  # (batch, items), (batch, 1)
        negative = target[:, :0] if negative is None else negative.view(len(negative), -1)  # (batch, negatives)
        labels = weights = target[:, :0]  # (batch, 0)
        if self.lam:
            assert teacher_items is not None and teacher_distances is not None  # see `_check_inputs`
            labels = teacher_items[:, : self.top_k]  # (batch, k)
            weights = ranking_distillation_weights(scores, labels, teacher_distances[:, : self.top_k], *self.gammas)
            if sample_weights is not None:
                weights = weights * sample_weights.float().unsqueeze(1)
        # One gather instead of three, because the gradient of each is a (batch, items) matrix.
        columns = torch.cat([negative, target, labels.clamp(min=0)], dim=1)
        picked = scores.gather(1, columns)  # (batch, negatives + 1 + k)
        negative_scores, target_scores, label_scores = picked.split([negative.shape[1], 1, labels.shape[1]], dim=1)

        base = dro = ranking = scores.new_zeros(())
        if self.base_loss == "cross_entropy":
            base = F.cross_entropy(scores, target.squeeze(1))
        elif self.base_loss != STUDENT_LOSS:
            collisions = (negative == target) & (self.form == "corrected")  # (batch, negatives)
            num_items = scores.shape[1] if self.num_items is None else self.num_items
            calibration = self.gbce_calibration if self.base_loss == "gbce" else 0.0
            base = _sampled_losses(
                self.base_loss, target_scores, negative_scores, collisions, num_items, calibration
            ).mean()
        if self.lam:
            ranking = self.ranking_loss(negative_scores, label_scores, negative, target, labels, weights)
        if self.alpha:
            assert propensity is not None  # see `_check_inputs`
            _check_dro(scores, propensity, self.beta)
            targets = columns[:, negative.shape[1] :]  # (batch, 1 + k)
            terms = _dro_terms(scores, picked[:, negative.shape[1] :], targets, propensity.float() / self.beta)
            dro = terms[:, 0].mean()
            if self.lam:
                ranking = ranking + self.alpha * self._ranking_dro(terms[:, 1:], weights, labels, sample_weights)
        return DLLM2RecOutput(base + self.alpha * dro + self.lam * ranking, base, dro, ranking)

    def ranking_loss(
        self,
        negative_scores: torch.Tensor,
        label_scores: torch.Tensor,
        negative: torch.Tensor,
        target: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The distillation of the teacher's ranking without its DROS terms, a scalar, the mean over the rows.

        Args:
            negative_scores, label_scores: (batch, negatives) and (batch, k) scores of the student.
            negative, target, labels: (batch, negatives), (batch, 1) and (batch, k) columns of these items; -1 where
                there are fewer labels.
            weights: (batch, k) weights of the labels, 0 where there are fewer.
        """
        # The reference has sigmoid(1 - s): a negative is pushed below 1, not below 0.
        margin = 1.0 if self.form == "reference" else 0.0
        counts = self._counted_negatives(negative, target, labels)  # (batch, negatives)
        against = (F.softplus(negative_scores - margin) * counts).sum(1, keepdim=True)  # equal for all labels
        against = against / counts.sum(1, keepdim=True).clamp(min=1)  # (batch, 1)
        return (weights * (F.softplus(-label_scores) + against)).sum(1).mean()

    def _counted_negatives(self, negative: torch.Tensor, target: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(batch, negatives) float32: 0 for negatives that are the target or one of the labels."""
        if self.form == "reference":
            return torch.ones_like(negative, dtype=torch.float32)
        named = torch.cat([target, labels], dim=1)  # (batch, 1 + k); no negative is NO_LABEL
        return 1.0 - (negative.unsqueeze(2) == named.unsqueeze(1)).any(2).float()

    def _ranking_dro(
        self, terms: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor, sample_weights: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted mean of the labels' DROS terms, (batch, k): a scalar."""
        if self.form == "corrected":
            return (weights * terms).sum(1).mean()
        # The second mean excludes rows without labels, so the result is the published product over the labelled rows,
        # times their fraction of the batch.
        counts = (labels != NO_LABEL).float()  # (batch, k)
        if sample_weights is not None:
            counts = counts * sample_weights.float().unsqueeze(1)
        total = counts.sum(0)  # (k,)
        mean_terms = (counts * terms).sum(0) / total.masked_fill(total == 0, 1.0)  # (k,)
        return (weights.mean(0) * mean_terms).sum()

    def _check_inputs(
        self,
        student_scores: torch.Tensor,
        target: torch.Tensor,
        negative: torch.Tensor | None,
        teacher_items: torch.Tensor | None,
        teacher_distances: torch.Tensor | None,
        sample_weights: torch.Tensor | None,
        propensity: torch.Tensor | None,
    ) -> None:
        _check_columns("target", target, student_scores, dimensions=(1,))
        if negative is not None:
            _check_columns("negative", negative, student_scores)
        elif self.lam or self.base_loss not in ("cross_entropy", STUDENT_LOSS):
            raise ValueError(
                f"negative is None: base_loss {self.base_loss!r} with lam {self.lam} needs (batch,) or (batch, "
                "negatives) columns; only lam=0 with cross_entropy or student needs none"
            )
        if self.alpha and propensity is None:
            raise ValueError(
                f"propensity is None with alpha {self.alpha}: expected propensity_scores(item_counts), or alpha=0"
            )
        if not self.lam:
            return
        if teacher_items is None or teacher_distances is None:
            raise ValueError(
                f"teacher_items or teacher_distances is None with lam {self.lam}: expected (batch, k) each, or lam=0; "
                "fill rows without labels with -1"
            )
        if teacher_items.dim() != 2 or teacher_items.shape[1] < self.top_k:
            raise ValueError(
                f"teacher_items have shape {tuple(teacher_items.shape)}: expected (batch, at least {self.top_k}), the "
                "top_k; fill missing items with -1, or lower top_k"
            )
        if sample_weights is not None and sample_weights.shape != target.shape:
            raise ValueError(
                f"sample_weights have shape {tuple(sample_weights.shape)}: expected {tuple(target.shape)}, one per row"
            )


def distribution_loss(
    student_scores: torch.Tensor, teacher_scores: torch.Tensor, temperature: float = 1.0, direction: str = "forward"
) -> torch.Tensor:
    """Kullback-Leibler divergence between the teacher's and the student's distributions over all columns.

    Args:
        student_scores: (batch, items).
        teacher_scores: (batch, items), logits or log-probabilities.
        temperature: divides both; the loss is multiplied by its square, so that gradients keep their scale.
        direction: "forward" is KL(teacher || student), "reverse" is KL(student || teacher).

    Returns:
        (batch,) float32.

    Raises:
        ValueError: for shapes that differ, a temperature that is not positive, and an unknown direction.

    Source: Hinton et al. 2015, section 2; the reverse direction as in MiniLLM (ICLR 2024).
    """
    if student_scores.dim() != 2 or student_scores.shape != teacher_scores.shape:
        raise ValueError(
            f"student_scores have shape {tuple(student_scores.shape)} and teacher_scores "
            f"{tuple(teacher_scores.shape)}: expected (batch, items) of the same items"
        )
    check_temperature(temperature)
    _check_choice("direction", direction, ("forward", "reverse"))
    student = F.log_softmax(student_scores.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_scores.float() / temperature, dim=1)
    if direction == "reverse":
        student, teacher = teacher, student
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def embedding_loss(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Distance between output embeddings of the student and of the teacher.

    Args:
        student: (batch, hidden).
        teacher: (batch, hidden); project it if the teacher's size differs.
        kind: "mse", the mean of the squared differences, or "cosine", 1 - cosine similarity.

    Returns:
        (batch,) float32.

    Raises:
        ValueError: for shapes that differ and an unknown kind.
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: expected the same (batch, "
            "hidden); project the larger embeddings first"
        )
    _check_choice("kind", kind, ("mse", "cosine"))
    if kind == "mse":
        return (student.float() - teacher.float()).square().mean(1)
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless `temperature` is positive."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: expected a positive number; 1 leaves the scores unchanged")


def _check_dro(scores: torch.Tensor, propensity: torch.Tensor, beta: float) -> None:
    if scores.shape[1] < 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: expected at least two items to compare")
    if propensity.shape not in (scores.shape, scores.shape[1:]):
        raise ValueError(
            f"propensity has shape {tuple(propensity.shape)}: expected {tuple(scores.shape[1:])} or "
            f"{tuple(scores.shape)}, one for each column of the scores; for sampled items, select their propensities"
        )
    if not beta > 0:
        raise ValueError(f"beta is {beta}: expected a positive number")


def _check_columns(
    name: str, columns: torch.Tensor, scores: torch.Tensor, lowest: int = 0, dimensions: tuple[int, ...] = (1, 2)
) -> None:
    if scores.dim() != 2 or columns.dim() not in dimensions or len(columns) != len(scores):
        shapes = " or ".join({1: "(batch,)", 2: "(batch, any)"}[number] for number in dimensions)
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and {name} {tuple(columns.shape)}: expected (batch, items) and "
            f"{shapes}"
        )
    found = lowest_and_highest(columns)
    if found is None:
        return
    smallest, largest = found
    if smallest < lowest or largest >= scores.shape[1]:
        raise ValueError(
            f"{name} contains {smallest if smallest < lowest else largest}: expected columns {lowest}.."
            f"{scores.shape[1] - 1} of the scores; subtract 1 from item ids, and drop the column of padding"
        )
