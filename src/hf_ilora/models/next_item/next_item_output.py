"""The output of next-item models, and functions that turn scores into recommendations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import ModelOutput

from .top_k import ItemMasks, masked_top_k


@dataclass
class NextItemOutput(ModelOutput):
    """Output of a next-item model.

    Args:
        loss: scalar, when labels were given and the model is trained by gradients.
        logits: (batch, num_items + 1), the scores of the next item after the last real one; column 0 (padding) is -inf.
        last_hidden_state: (batch, length, hidden).
        user_embedding: (batch, hidden), the hidden state at the last real item.
        loss_parts: (1 + soft targets,) without gradient: the loss of the labels, and the divergence from each soft
            target without its weight.
        best_items: (labels, k) int64, the best items at each label, if they were requested.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    user_embedding: torch.Tensor | None = None
    loss_parts: torch.Tensor | None = None
    best_items: torch.Tensor | None = None


def popular_scores(counts: np.ndarray, device: torch.device) -> torch.Tensor:
    """(num_items + 1,) scores whose softmax is each item's share of `counts`, (num_items + 1,); -inf for padding."""
    scores = torch.from_numpy(counts).to(device, torch.float32).clamp(min=torch.finfo(torch.float32).tiny).log()
    scores[0] = float("-inf")
    return scores


def scores_or_popular(
    score: Callable[[torch.Tensor], torch.Tensor], popular: Callable[[], torch.Tensor], histories: torch.Tensor
) -> torch.Tensor:
    """Score histories; all histories without items get the same scores.

    Args:
        score: histories (any, length) -> scores (any, num_items + 1).
        popular: function that returns the scores for histories without items, (num_items + 1,).
        histories: (batch, length) item ids, 0 for padding on either side.

    Returns:
        (batch, num_items + 1).
    """
    has_items = histories.any(1)  # (batch,)
    if has_items.all():
        return score(histories)
    scores = popular().float().repeat(histories.shape[0], 1)
    if has_items.any():
        scores[has_items] = score(histories[has_items]).float()
    return scores


def top_k_items(
    logits: torch.Tensor,
    histories: torch.Tensor,
    top_k: int,
    exclude_seen: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the `top_k` best items of each user, best first, the lower id first among equal scores; never padding.

    Args:
        logits: (batch, num_items + 1); column 0 is padding. Left unchanged.
        histories: (batch, length) item ids, 0 for padding on either side.
        top_k: number of items per user.
        exclude_seen: leave out the items of the history.

    Returns:
        item_ids (batch, top_k) int64 in 1..num_items, scores (batch, top_k).

    Raises:
        ValueError: when a user has fewer than `top_k` items to recommend, or a score that is not finite among the best.
    """
    return masked_top_k(logits, top_k, ItemMasks(hidden=histories if exclude_seen else None))
