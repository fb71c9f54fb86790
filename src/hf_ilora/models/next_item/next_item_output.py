"""The output of next-item models, and how scores become recommendations."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .configuration_next_item import PADDING_ITEM_ID


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
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    user_embedding: torch.FloatTensor | None = None
    loss_parts: torch.FloatTensor | None = None


def popular_scores(counts: np.ndarray, device: torch.device) -> torch.Tensor:
    """(num_items + 1,) scores whose softmax is each item's share of `counts`, (num_items + 1,); -inf for padding."""
    scores = torch.from_numpy(counts).to(device, torch.float32).clamp(min=torch.finfo(torch.float32).tiny).log()
    scores[0] = float("-inf")
    return scores


def scores_or_popular(
    score: Callable[[torch.Tensor], torch.Tensor], popular: Callable[[], torch.Tensor], histories: torch.Tensor
) -> torch.Tensor:
    """Score histories; those without items all get the same scores.

    Args:
        score: histories (any, length) -> scores (any, num_items + 1).
        popular: returns the scores for histories without items, (num_items + 1,).
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
    allowed_items: torch.Tensor | None = None,
    excluded_items: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` best items of each user, best first; padding is never among them.

    Args:
        logits: (batch, num_items + 1); column 0 is padding. Left unchanged.
        histories: (batch, length) item ids, 0 for padding on either side.
        top_k: number of items per user.
        exclude_seen: leave out the items of the history.
        allowed_items: the only items to choose from, (items,) for all users or (batch, any), as `item_filter` returns
            them; None allows all.
        excluded_items: items to leave out, of the same shapes.

    Returns:
        item_ids (batch, top_k) int64 in 1..num_items, scores (batch, top_k).

    Raises:
        ValueError: when a user has fewer than `top_k` items to recommend, or a score that is not finite among the best.
    """
    num_items = logits.shape[-1] - 1
    if not isinstance(top_k, int) or not 1 <= top_k <= num_items:
        raise ValueError(f"top_k is {top_k}: expected 1 to {num_items}, the number of items in the catalogue")
    if exclude_seen:
        logits = logits.scatter(1, histories.long(), float("-inf"))
    if excluded_items is not None:
        if excluded_items.dim() == 1:
            logits = logits.index_fill(1, excluded_items, float("-inf"))
        else:
            logits = logits.scatter(1, excluded_items, float("-inf"))
    if allowed_items is None:
        scores, positions = logits[:, 1:].topk(top_k, dim=-1)  # (batch, top_k) each
        item_ids = positions + 1
    else:
        among = allowed_items.expand(logits.shape[0], -1)  # (batch, allowed)
        if among.shape[1] < top_k:
            among = F.pad(among, (0, top_k - among.shape[1]), value=PADDING_ITEM_ID)
        scores = logits.gather(1, among).masked_fill(among == PADDING_ITEM_ID, float("-inf"))
        scores, positions = scores.topk(top_k, dim=-1)
        item_ids = among.gather(1, positions)
    # One test for all that can go wrong: -inf is picked only when nothing else is left, NaN sorts above everything, and
    # amax passes it on. (torch.isfinite takes twice as long, which counts when one user waits.)
    if not scores.abs().amax() < torch.inf:
        _raise_for_scores(scores, num_items)
    return item_ids, scores


def _raise_for_scores(scores: torch.Tensor, num_items: int) -> None:
    row = int((~torch.isfinite(scores)).any(dim=-1).nonzero()[0])
    if torch.isnan(scores[row]).any() or torch.isposinf(scores[row]).any():
        raise ValueError(
            f"the scores of row {row} contain NaN or +inf: expected finite numbers; check the weights that were loaded"
        )
    available = int(torch.isfinite(scores[row]).sum())
    raise ValueError(
        f"top_k is {scores.shape[-1]}, but row {row} has {available} of {num_items} items left to recommend: ask for "
        "fewer items, pass exclude_seen=False, or loosen allowed_items and excluded_items"
    )
