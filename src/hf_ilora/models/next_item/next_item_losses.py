"""Losses of next-item prediction: pure functions of hidden states, an item table and targets.

All return the SUM over positions, in float32, so that the caller divides by the number of positions of the
whole (accumulated, distributed) batch. Item ids run 1..num_items; row 0 of the table is padding and never competes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .configuration_next_item import PADDING_ITEM_ID

# Score elements that the full cross-entropy computes at once: on a CPU a chunk that stays in the cache, on a GPU one
# that fills the device.
CHUNK_ELEMENTS = {"cpu": 2**20, "default": 2**26}

# Every chunk adds to the gradient of the whole table, so chunks of very few positions would be bound by memory traffic.
MIN_CHUNK_POSITIONS = 32

# Scores and their log-probabilities of a chunk over a very large catalogue.
_MAX_CHUNK_BYTES = 200 * 10**6


class SoftTarget(NamedTuple):
    """A distribution over the competing items at each position, to learn from beside the true next item.

    Args:
        scores: function of a slice of positions. It returns finite logits (its positions, items that the loss scores),
            which the loss overwrites, and the logits of the targets (its positions, 1), which only a sampled loss
            reads; None in their place leaves the targets out of the distribution.
        weight: weight of the divergence KL(distribution || model) in the loss.
        position_weights: (positions,), how much each position counts, or None for 1.
    """

    scores: Callable[[slice], tuple[torch.Tensor, torch.Tensor | None]]
    weight: float
    position_weights: torch.Tensor | None = None


class Columns:
    """Where items are among those that compete: the columns of a matrix of scores.

    Args:
        items: (columns,) item ids, some perhaps more than once.
        num_items: size of the catalogue.
    """

    def __init__(self, items: torch.Tensor, num_items: int):
        self.size = len(items)
        # One column of every item that occurs, else the one behind the last: nothing waits for the device to know more.
        self._of_item = items.new_full((num_items + 1,), self.size)
        self._of_item[items] = torch.arange(self.size, device=items.device)
        self._same_item = self._of_item[items]  # (columns,)

    def filled(self, item_ids: torch.Tensor, values: torch.Tensor, fill: float | torch.Tensor) -> torch.Tensor:
        """(positions, columns): `values` (positions, k) where the columns are `item_ids` (positions, k), else `fill`.

        Padding among the ids has no column. `fill` is a number, or (positions, 1).
        """
        filled = values.new_empty(len(item_ids), self.size + 1)
        filled[:] = fill
        places = self._of_item[item_ids].masked_fill(item_ids.eq(PADDING_ITEM_ID), self.size)
        return filled.scatter_(1, places, values).gather(1, self._same_item.expand(len(item_ids), -1))

    def dense(self, rows: torch.Tensor, item_ids: torch.Tensor, values: torch.Tensor, num_rows: int) -> torch.Tensor:
        """(num_rows, columns) of different entries, given as rows, item ids and values (entries,); else 0."""
        dense = values.new_zeros(num_rows, self.size + 1)
        dense[rows, self._of_item[item_ids]] = values  # those of other items all go into the last column
        return dense.index_select(1, self._same_item)


def _absent(scores: torch.Tensor) -> float:
    """The score of an item that does not compete: its probability is 0, and 0 times it is 0, unlike 0 times -inf."""
    return max(torch.finfo(scores.dtype).min, torch.finfo(torch.float32).min)  # losses are computed in float32


def _softmax_gradient(scores, target_columns, counts, soft_targets, chunk, soft_scores, needs_gradient):
    """Cross-entropy of the targets, divergences from soft targets, and the gradient of their weighted sum.

    Args:
        scores: (chunk, columns), `_absent` where an item does not compete.
        target_columns: (chunk, 1).
        counts: (chunk, 1) bool, the positions that count, or None.
        soft_targets, chunk: the soft targets, and the slice of their positions that is the chunk.
        soft_scores: logits (chunk, columns) of each soft target, likewise.
        needs_gradient: whether to compute the gradient.

    Returns:
        losses (1 + soft targets,), sums over the positions, and the gradient (chunk, columns), float32, or None.
    """
    log_probabilities = F.log_softmax(scores, dim=-1, dtype=torch.float32)
    of_targets = log_probabilities.gather(1, target_columns)  # (chunk, 1)
    losses = [-(of_targets if counts is None else of_targets * counts).sum()]
    distributions = []
    for soft_target, logits in zip(soft_targets, soft_scores, strict=True):
        soft = F.softmax(logits, dim=-1, dtype=torch.float32)
        # sum of q (log q - log p), without a matrix for the logarithms of each
        normaliser = scores.gather(1, target_columns).float() - of_targets  # (chunk, 1)
        soft_normaliser = logits.amax(1, keepdim=True).float() - soft.amax(1, keepdim=True).log()
        differences = (soft * (logits.float() - scores.float())).sum(1, keepdim=True)
        divergences = differences - soft_normaliser + normaliser
        weights = soft_target.position_weights
        weights = counts if weights is None else weights[chunk].unsqueeze(1) * (1.0 if counts is None else counts)
        losses.append((divergences if weights is None else divergences * weights).sum())
        distributions.append((soft, soft_target.weight if weights is None else soft_target.weight * weights))
    if not needs_gradient:
        return torch.stack(losses), None
    gradient = log_probabilities.exp_()
    if distributions:  # every one pulls with its weight towards itself
        gradient *= sum(weight for _, weight in distributions) + (1.0 if counts is None else counts)
    elif counts is not None:
        gradient *= counts
    one_hot = gradient.new_full(target_columns.shape, -1.0)
    gradient.scatter_add_(1, target_columns, one_hot if counts is None else one_hot * counts)
    for soft, weight in distributions:
        if isinstance(weight, float):
            gradient.sub_(soft, alpha=weight)
        else:
            gradient -= soft.mul_(weight)
    return torch.stack(losses), gradient


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over the catalogue that computes its gradient chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx, hidden_states, weight, bias, repeat_bias, targets, repeated_items, chunk_size, counted, soft_targets,
        best_items,
    ):  # fmt: skip
        item_weight = weight[1:]  # (items, hidden)
        item_targets = (targets - 1).unsqueeze(1)  # (positions, 1)
        parameters = (hidden_states, weight, bias, repeat_bias)
        needs_gradient = any(ctx.needs_input_grad[:4])
        losses = torch.zeros(1 + len(soft_targets), dtype=torch.float32, device=hidden_states.device)
        gradients = _empty_gradients(parameters) if needs_gradient else [None] * len(parameters)
        for start in range(0, hidden_states.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_hidden = hidden_states[chunk]
            scores = F.linear(chunk_hidden, item_weight, None if bias is None else bias[1:])  # (chunk, items)
            if repeat_bias is not None:
                # Where there is nothing to add, column 0 of the chunk gets zeros.
                repeated = repeated_items[chunk]  # (chunk, length)
                columns, real = (repeated - 1).clamp(min=0), repeated.gt(0).to(scores.dtype)
                scores.scatter_add_(1, columns, real * repeat_bias.to(scores.dtype))
            if best_items is not None:
                best_items[chunk] = scores.topk(best_items.shape[1], dim=1).indices + 1
            counts = None if counted is None else counted[chunk].unsqueeze(1)
            soft_scores = [soft_target.scores(chunk)[0] for soft_target in soft_targets]
            chunk_losses, grad_scores = _softmax_gradient(
                scores, item_targets[chunk], counts, soft_targets, chunk, soft_scores, needs_gradient
            )
            losses += chunk_losses
            if needs_gradient:
                if bias is not None:
                    gradients[2][1:] += grad_scores.sum(0)
                if repeat_bias is not None:
                    gradients[3] += (grad_scores.gather(1, columns) * real).sum()
                grad_scores = grad_scores.to(scores.dtype)
                gradients[0][chunk] = grad_scores @ item_weight.to(scores.dtype)
                chunk_hidden = chunk_hidden.to(scores.dtype)
                if len(scores) <= chunk_hidden.shape[1] and scores.dtype == torch.float32:
                    gradients[1][1:].addmm_(grad_scores.t(), chunk_hidden)  # a product would be larger than the scores
                else:
                    gradients[1][1:] += grad_scores.t() @ chunk_hidden
            del scores, grad_scores  # before the next ones are made beside them
        return _finish(ctx, parameters, gradients, losses, soft_targets)

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *_scaled(ctx, grad_loss), *[None] * 6


class _ChunkedSampledSoftmax(torch.autograd.Function):
    """As `_ChunkedCrossEntropy`, among the target, negatives that all positions share, and the items seen before."""

    @staticmethod
    def forward(
        ctx, hidden_states, target_rows, target_bias, negative_rows, negative_bias, seen_rows, seen_bias, targets,
        negatives, columns, seen_items, seen_places, negative_log_q, chunk_size, counted, soft_targets,
    ):  # fmt: skip
        parameters = (
            hidden_states, target_rows, target_bias, negative_rows, negative_bias, seen_rows, seen_bias
        )  # fmt: skip
        needs_gradient = any(ctx.needs_input_grad[:7])
        losses = torch.zeros(1 + len(soft_targets), dtype=torch.float32, device=hidden_states.device)
        gradients = _empty_gradients(parameters) if needs_gradient else [None] * len(parameters)
        offsets = negative_bias
        if negative_log_q is not None:
            correction = -(negative_log_q + math.log(len(negatives)))
            offsets = correction if offsets is None else offsets + correction
        if offsets is not None and not isinstance(offsets, torch.Tensor):
            offsets = hidden_states.new_full((len(negatives),), offsets)
        for start in range(0, hidden_states.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_hidden, chunk_targets = hidden_states[chunk], targets[chunk].unsqueeze(1)
            of_targets = (chunk_hidden * target_rows[chunk]).sum(1, keepdim=True)  # (chunk, 1)
            if target_bias is not None:
                of_targets = of_targets + target_bias[chunk].unsqueeze(1)
            scores = F.linear(chunk_hidden, negative_rows, offsets)  # (chunk, negatives)
            absent = negatives == chunk_targets  # (chunk, negatives)
            if seen_rows is not None:
                seen, places = seen_items[chunk], seen_places[chunk]  # (chunk, length) both
                rows = seen_rows[places]  # (chunk, length, hidden)
                of_seen = torch.einsum("ch,clh->cl", chunk_hidden, rows) + seen_bias[places]
                # A seen item competes once: here, unless it is the target.
                absent |= columns.filled(seen, torch.ones_like(seen, dtype=torch.bool), False)
                of_seen.masked_fill_(seen.eq(PADDING_ITEM_ID) | seen.eq(chunk_targets), _absent(of_seen))
            scores.masked_fill_(absent, _absent(scores))
            parts = [of_targets.to(scores.dtype), scores]
            if seen_rows is not None:
                parts.append(of_seen.to(scores.dtype))
            counts = None if counted is None else counted[chunk].unsqueeze(1)
            soft_scores = [_in_columns(*soft_target.scores(chunk), absent, parts) for soft_target in soft_targets]
            chunk_losses, grad_scores = _softmax_gradient(
                torch.cat(parts, 1),
                torch.zeros_like(chunk_targets),
                counts,
                soft_targets,
                chunk,
                soft_scores,
                needs_gradient,
            )
            losses += chunk_losses
            if not needs_gradient:
                continue
            of_target, of_negatives, of_seen = grad_scores.tensor_split((1, 1 + len(negatives)), dim=1)
            if target_bias is not None:
                gradients[2][chunk] = of_target.squeeze(1)
            if negative_bias is not None:
                gradients[4] += of_negatives.sum(0)
            of_target, of_negatives, of_seen = (part.to(scores.dtype) for part in (of_target, of_negatives, of_seen))
            hidden = chunk_hidden.to(scores.dtype)
            gradients[0][chunk] = of_negatives @ negative_rows.to(scores.dtype)
            gradients[0][chunk] += of_target * target_rows[chunk]
            gradients[1][chunk] = of_target * hidden
            gradients[3].addmm_(of_negatives.t().to(gradients[3].dtype), hidden.to(gradients[3].dtype))
            if seen_rows is not None:
                gradients[0][chunk] += torch.einsum("cl,clh->ch", of_seen, rows.to(scores.dtype))
                of_rows = of_seen.unsqueeze(2) * hidden.unsqueeze(1)  # (chunk, length, hidden)
                gradients[5].index_add_(0, places.flatten(), of_rows.flatten(0, 1).to(gradients[5].dtype))
                gradients[6].index_add_(0, places.flatten(), of_seen.flatten().to(gradients[6].dtype))
        return _finish(ctx, parameters, gradients, losses, soft_targets)

    @staticmethod
    def backward(ctx, grad_loss, _):
        return *_scaled(ctx, grad_loss), *[None] * 9


def _in_columns(logits, of_targets, absent, parts) -> torch.Tensor:
    """Logits of a soft target in the columns of target, negatives and seen items; it gives seen items no part."""
    if of_targets is None:
        of_targets = logits.new_full((len(logits), 1), _absent(logits))
    columns = [of_targets.to(logits.dtype), logits.masked_fill_(absent, _absent(logits))]
    columns += [torch.full_like(part, _absent(logits), dtype=logits.dtype) for part in parts[2:]]
    return torch.cat(columns, 1)


def _empty_gradients(parameters) -> list[torch.Tensor | None]:
    """Zeros in float32, in which chunks add up."""
    return [
        None if parameter is None else torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for parameter in parameters
    ]


def _finish(ctx, parameters, gradients, losses, soft_targets):
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in parameters]
    ctx.mark_non_differentiable(losses)
    loss = losses[0] + sum(soft.weight * divergence for soft, divergence in zip(soft_targets, losses[1:], strict=True))
    return loss, losses


def _scaled(ctx, grad_loss):
    return [
        None if gradient is None else (gradient * grad_loss).to(dtype)
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]


def chunked_cross_entropy(
    hidden_states,
    weight,
    bias,
    targets,
    repeat_bias=None,
    repeated_items=None,
    chunk_size=None,
    counted=None,
    soft_targets=(),
    best_items=None,
):
    """Cross-entropy of the next item over the whole catalogue, in memory that does not grow with positions x items.

    Args:
        hidden_states: (positions, hidden).
        weight: (num_items + 1, hidden), the item table.
        bias: (num_items + 1,) or None.
        targets: (positions,), item ids 1..num_items.
        repeat_bias: scalar added to the scores of the items in `repeated_items`, or None.
        repeated_items: (positions, length), different items that each position has seen, padded with 0.
        chunk_size: positions per chunk; None takes as many as fit `CHUNK_ELEMENTS` scores.
        counted: (positions,) bool, the positions that count; None counts all.
        soft_targets: `SoftTarget`s with logits of all items; each adds its weighted divergence.
        best_items: (positions, k) int64, into which the ids of each position's k best items are written, or None.

    Returns:
        Scalar, summed over positions, float32, and its parts (1 + soft targets,) without gradient: the cross-entropy
        and each divergence without its weight.
    """
    chunk_size = chunk_size or _chunk_size(hidden_states, weight.shape[0])
    return _ChunkedCrossEntropy.apply(
        hidden_states, weight, bias, repeat_bias, targets, repeated_items, chunk_size, counted, tuple(soft_targets),
        best_items,
    )  # fmt: skip


def _chunk_size(hidden_states: torch.Tensor, columns: int) -> int:
    budget = CHUNK_ELEMENTS.get(hidden_states.device.type, CHUNK_ELEMENTS["default"])
    largest = max(1, _MAX_CHUNK_BYTES // (2 * torch.finfo(torch.float32).bits // 8 * columns))
    return min(largest, max(MIN_CHUNK_POSITIONS, budget // columns))


def chunked_sampled_softmax(
    hidden_states,
    target_rows,
    target_bias,
    negative_rows,
    negative_bias,
    targets,
    negatives,
    seen=None,
    negative_log_q=None,
    chunk_size=None,
    counted=None,
    soft_targets=(),
):
    """As `sampled_softmax_loss` of scores hidden . row + bias, with negatives that all positions share, in memory that
    does not grow with positions x negatives.

    Args:
        hidden_states: (positions, hidden).
        target_rows: (positions, hidden), the items' rows of the table.
        target_bias: (positions,) or None.
        negative_rows: (negatives, hidden).
        negative_bias: (negatives,) or None.
        targets: (positions,) item ids.
        negatives: (negatives,) item ids; those that are a position's target do not compete there.
        seen: None, or `SeenItems`, which all compete, in place of negatives that are among them.
        negative_log_q: as in `sampled_softmax_loss`, a number or (negatives,).
        chunk_size, counted: as in `chunked_cross_entropy`.
        soft_targets: `SoftTarget`s with logits of the negatives; their distributions are over what competes but seen
            items.

    Returns:
        As `chunked_cross_entropy`.
    """
    chunk_size = chunk_size or _chunk_size(hidden_states, len(negatives))
    seen_rows, seen_bias, columns, seen_items, places = (None,) * 5 if seen is None else seen
    return _ChunkedSampledSoftmax.apply(
        hidden_states, target_rows, target_bias, negative_rows, negative_bias, seen_rows, seen_bias, targets,
        negatives, columns, seen_items, places, negative_log_q, chunk_size, counted, tuple(soft_targets),
    )  # fmt: skip


class SeenItems(NamedTuple):
    """The items that positions have seen before, which a sampled softmax scores besides its negatives.

    Args:
        rows: (any, hidden) rows of the table.
        bias: (any,).
        columns: the columns of the negatives.
        items: (positions, length) different item ids, padded with 0.
        places: (positions, length), the row of each.
    """

    rows: torch.Tensor
    bias: torch.Tensor
    columns: Columns
    items: torch.Tensor
    places: torch.Tensor


def sampled_softmax_loss(target_scores, negative_scores, collisions, negative_log_q=None, counted=None):
    """Cross-entropy of the target among itself and sampled negatives.

    With the log probabilities q of the draws, k negatives estimate the sum over all other items without bias,

        loss = -s_target + log(exp s_target + sum over negatives j of exp(s_j - log(k q_j)))

    so that loss and gradient approach those of the softmax over the catalogue as k grows; their bias shrinks as 1 / k.
    The target's score stays as it is: the target always takes part, and is no draw. This holds where the
    negatives were drawn by q, with replacement, and every item that competes can be drawn. Without the log
    probabilities popular negatives count too much, and the loss approaches that of no softmax, whatever k is.

    Args:
        target_scores: (positions,).
        negative_scores: (positions, negatives).
        collisions: (positions, negatives) bool, where a negative is the target itself; these do not compete.
        negative_log_q: log probability of each negative in one draw, a number for uniform draws, or (negatives,) or
            (positions, negatives); None leaves the scores as they are.
        counted: (positions,) bool, the positions that count; None counts all.

    Returns:
        Scalar, summed over positions, float32.

    Source: Bengio and Senecal 2008; "Correcting the LogQ Correction" (RecSys 2025), which leaves the target's score
    alone, unlike Yi et al. (RecSys 2019, eq. 3).
    """
    target_scores, negative_scores = target_scores.float(), negative_scores.float()
    if negative_log_q is not None:
        negative_scores = negative_scores - (negative_log_q + math.log(negative_scores.shape[-1]))
    negative_scores = negative_scores.masked_fill(collisions, float("-inf"))
    log_normaliser = torch.logaddexp(target_scores, negative_scores.logsumexp(-1))  # (positions,)
    return _sum(log_normaliser - target_scores, counted)


def gbce_loss(target_scores, negative_scores, collisions, num_items, calibration, counted=None):
    """Generalised binary cross-entropy; `calibration=0` is plain BCE with several negatives.

    Args:
        target_scores: (positions,).
        negative_scores: (positions, negatives).
        collisions: (positions, negatives) bool, where a negative is the target itself; these are ignored.
        num_items: size of the catalogue, for the sampling rate negatives / (num_items - 1).
        calibration: t in [0, 1]. It corrects for the share of the catalogue that is drawn, uniformly: with popular
            negatives the predicted probabilities are those of a catalogue in which these occur more often.
        counted: (positions,) bool, the positions that count; None counts all.

    Returns:
        Scalar, summed over positions, float32; each position averages over its target and its negatives.

    Source: gSASRec (RecSys 2023), eq. 13 to 15.
    """
    num_negatives = negative_scores.shape[-1]
    sampling_rate = min(1.0, num_negatives / max(1, num_items - 1))
    beta = sampling_rate * (calibration * (1 - 1 / sampling_rate) + 1 / sampling_rate)
    positive_loss = -beta * F.logsigmoid(target_scores.float())  # (positions,)
    negative_loss = -F.logsigmoid(-negative_scores.float()).masked_fill(collisions, 0.0).sum(-1)  # (positions,)
    return _sum((positive_loss + negative_loss) / (num_negatives + 1), counted)


def _sum(losses: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """The sum of losses (positions,) where `counted`, or of all."""
    return losses.sum() if counted is None else (losses * counted).sum()
