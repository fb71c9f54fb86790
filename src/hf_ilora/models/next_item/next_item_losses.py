"""Losses of next-item prediction: pure functions of hidden states, an item table and targets.

All return the SUM over positions, as a float32 scalar, so that the caller divides by the number of positions of the
whole (accumulated, distributed) batch. Item ids run 1..num_items; row 0 of the table is padding and never competes.
"""

import math

import torch
import torch.nn.functional as F

# Score elements that the full cross-entropy computes at once: on a CPU a chunk that stays in the cache, on a GPU one
# that fills the device.
CHUNK_ELEMENTS = {"cpu": 2**20, "default": 2**26}

# Every chunk adds to the gradient of the whole table, so chunks of very few positions would be bound by memory traffic.
MIN_CHUNK_POSITIONS = 32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over the catalogue that computes its gradient chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, repeat_bias, repeated_items, chunk_size, counted):
        item_weight = weight[1:]  # (items, hidden)
        item_targets = (targets - 1).unsqueeze(1)  # (positions, 1)
        needs_gradient = any(ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        gradients = [None, None, None, None]  # of hidden_states, weight, bias, repeat_bias
        if needs_gradient:
            gradients[0] = torch.empty_like(hidden_states)
            for place, parameter in ((1, weight), (2, bias), (3, repeat_bias)):
                if parameter is not None:
                    gradients[place] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        for start in range(0, hidden_states.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_hidden, chunk_targets = hidden_states[chunk], item_targets[chunk]
            scores = F.linear(chunk_hidden, item_weight, None if bias is None else bias[1:])  # (chunk, items)
            if repeat_bias is not None:
                # Where there is nothing to add, column 0 of the chunk gets zeros.
                repeated = repeated_items[chunk]  # (chunk, length)
                columns, real = (repeated - 1).clamp(min=0), repeated.gt(0).to(scores.dtype)
                scores.scatter_add_(1, columns, real * repeat_bias.to(scores.dtype))
            log_probabilities = F.log_softmax(scores, dim=-1, dtype=torch.float32)
            of_targets = log_probabilities.gather(1, chunk_targets)  # (chunk, 1)
            if counted is not None:
                counts = counted[chunk].unsqueeze(1)  # (chunk, 1)
                of_targets = of_targets * counts
            loss -= of_targets.sum()
            if needs_gradient:
                grad_scores = log_probabilities.exp_()
                grad_scores.scatter_add_(1, chunk_targets, grad_scores.new_full(chunk_targets.shape, -1.0))
                if counted is not None:
                    grad_scores.mul_(counts)
                if bias is not None:
                    gradients[2][1:] += grad_scores.sum(0)
                if repeat_bias is not None:
                    gradients[3] += (grad_scores.gather(1, columns) * real).sum()
                grad_scores = grad_scores.to(scores.dtype)
                gradients[0][chunk] = grad_scores @ item_weight.to(scores.dtype)
                gradients[1][1:] += grad_scores.t() @ chunk_hidden.to(scores.dtype)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, weight, bias, repeat_bias)]
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled[:3], None, scaled[3], None, None, None


def chunked_cross_entropy(
    hidden_states, weight, bias, targets, repeat_bias=None, repeated_items=None, chunk_size=None, counted=None
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

    Returns:
        Scalar, summed over positions, float32.
    """
    if chunk_size is None:
        budget = CHUNK_ELEMENTS.get(hidden_states.device.type, CHUNK_ELEMENTS["default"])
        chunk_size = max(MIN_CHUNK_POSITIONS, budget // weight.shape[0])
    return _ChunkedCrossEntropy.apply(
        hidden_states, weight, bias, targets, repeat_bias, repeated_items, chunk_size, counted
    )


def sampled_softmax_loss(target_scores, negative_scores, collisions, negative_log_q=None, counted=None):
    """Cross-entropy of the target among itself and sampled negatives.

    With the log probabilities q of the draws, k negatives estimate the sum over all other items without bias,

        loss = -s_target + log(exp s_target + sum over negatives j of exp(s_j - log(k q_j)))

    so that loss and gradient approach those of the softmax over the catalogue as k grows; their bias shrinks as 1 / k.
    The target's score stays as it is: the target always takes part, and is no draw. That holds where q is what the
    negatives were drawn by, with replacement, and every item that competes can be drawn. Without the log probabilities
    the loss approaches that of no softmax over the catalogue, whatever k is: popular negatives count too much.

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
