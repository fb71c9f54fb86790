"""The losses of iLoRA, as functions of tensors. Each is a sum over the examples, divided by `num_examples`.

`num_examples` counts the examples of the whole optimizer step, so that accumulated batches add up to the mean.
"""

import torch
import torch.nn.functional as F

from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL
from hf_ilora.models.next_item.padding import can_look


def title_loss(logits: torch.Tensor, title_labels: torch.Tensor, num_examples: torch.Tensor | int) -> torch.Tensor:
    """-log p(title | prompt) from the logits of each title's tokens.

    Args:
        logits: (batch, title tokens, vocabulary), which predict the labels at the same positions.
        title_labels: (batch, title tokens): the target's title with its terminator, -100 elsewhere.
        num_examples: number of examples to average over.

    Returns:
        Scalar in nats per title, float32.

    Source: iLoRA (arXiv 2408.10159), whose loss is the cross-entropy on the tokens of the target's title.
    """
    token_losses = F.cross_entropy(
        logits.flatten(0, 1).float(), title_labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return token_losses / num_examples


def target_columns(candidates: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Find each target among its candidates.

    Args:
        candidates: (batch, candidates) item ids, 0 for padding.
        labels: (batch,) target items.

    Returns:
        (batch,) int64: the column of the target.

    Raises:
        ValueError: if the candidates of a row lack its target or contain it twice; on a GPU a device assertion fails.
    """
    is_target = candidates == labels.unsqueeze(1)  # (batch, candidates)
    occurrences = is_target.sum(1)  # (batch,)
    if occurrences.device.type == "cuda":  # raising here would wait for the device
        torch._assert_async(occurrences.eq(1).all(), "the candidates of a row must contain its target exactly once")
    elif can_look(occurrences) and (occurrences.numpy() != 1).any():
        row = int(occurrences.ne(1).nonzero()[0])
        raise ValueError(
            f"candidates of row {row} contain its target {int(labels[row])} {int(occurrences[row])} times: expected "
            "it exactly once; add the target to the candidates, or remove repetitions"
        )
    return is_target.int().argmax(1)


def target_title_loss(
    title_log_likelihoods: torch.Tensor, target_columns: torch.Tensor, num_examples: torch.Tensor | int
) -> torch.Tensor:
    """Compute `title_loss` from the log-likelihoods of all candidates' titles: the target's, negated.

    Args:
        title_log_likelihoods: (batch, candidates) log p(title | prompt).
        target_columns: (batch,) column of the target.
        num_examples: number of examples to average over.

    Returns:
        Scalar in nats per title, float32.
    """
    target_log_likelihoods = title_log_likelihoods.gather(1, target_columns.unsqueeze(1))  # (batch, 1)
    return -target_log_likelihoods.sum() / num_examples


def candidate_loss(
    scores: torch.Tensor, target_columns: torch.Tensor, num_examples: torch.Tensor | int
) -> torch.Tensor:
    """-log p(target among the candidates): the cross-entropy of the candidates' scores.

    Args:
        scores: (batch, candidates) as `score_candidates` gives them, -inf for padding.
        target_columns: (batch,) column of the target.
        num_examples: number of examples to average over.

    Returns:
        Scalar in nats, float32.
    """
    return F.cross_entropy(scores, target_columns, reduction="sum") / num_examples


def opinion_pool(
    title_log_likelihoods: torch.Tensor,
    recommender_scores: torch.Tensor,
    candidates: torch.Tensor,
    recommender_weight: float,
) -> torch.Tensor:
    """Logarithmic opinion pool of language model and recommender: w log p_recommender + (1 - w) log p_language model.

    Up to a constant per row, which changes neither the ranking nor a softmax over the candidates, it is the logarithm
    of the weighted geometric mean of the two models' probabilities.

    Args:
        title_log_likelihoods: (batch, candidates) log p(title | prompt).
        recommender_scores: (batch, num_items + 1) logits of the recommender over the whole catalogue.
        candidates: (batch, candidates) item ids.
        recommender_weight: w in [0, 1).

    Returns:
        (batch, candidates) float32.

    Source: Genest and Zidek, "Combining Probability Distributions" (Statistical Science 1986).
    """
    recommender_log_p = recommender_scores.float().log_softmax(-1).gather(1, candidates)  # (batch, candidates)
    return recommender_weight * recommender_log_p + (1 - recommender_weight) * title_log_likelihoods


def item_loss(
    item_logits: torch.Tensor,
    labels: torch.Tensor,
    shows_candidates: torch.Tensor | None,
    num_examples: torch.Tensor | int,
) -> torch.Tensor:
    """-log p(item | prompt) by the item head.

    Args:
        item_logits: (batch, num_items + 1), -inf for padding.
        labels: (batch,) target items.
        shows_candidates: (batch,) bool, examples whose prompt shows candidates. Their loss is 0, since the head would
            learn from them to find the target in the prompt. None means no example.
        num_examples: number of examples to average over, those with candidates included.

    Returns:
        Scalar in nats, float32.
    """
    losses = F.cross_entropy(item_logits, labels, reduction="none")  # (batch,)
    if shows_candidates is not None:
        losses = losses.masked_fill(shows_candidates, 0.0)
    return losses.sum() / num_examples


__all__ = ["candidate_loss", "item_loss", "opinion_pool", "target_columns", "target_title_loss", "title_loss"]
