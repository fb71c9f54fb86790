"""Recommendations from candidates: an index finds some items for a user, and the model's own table scores them."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID, catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.histories import Histories, padded_histories
from hf_ilora.models.next_item.item_filters import ItemFilter, item_masks
from hf_ilora.models.next_item.next_item_model import evaluation_mode
from hf_ilora.models.next_item.top_k import ItemMasks, check_best_scores, check_top_k, ordered_top_k

ITEMS_AT_ONCE = 2**16  # rows of the item table that are read or scored at a time
_NUMBERS_AT_ONCE = 2**26  # numbers of candidates' rows in memory: 256 MB of float32


def check_has_table(model: EncoderForNextItem) -> None:
    """Raise a TypeError unless the scores of a model are products with a table of items."""
    if not isinstance(model, EncoderForNextItem):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a SASRec, GRU4Rec or Caser, whose scores are products with a "
            "table of items"
        )


@torch.no_grad()
def item_rows(model: EncoderForNextItem, ids: np.ndarray | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield item ids, all or the given ones, in chunks with the rows that score them, (items, hidden size) float32."""
    head, offsets = model.head, model._item_offsets()
    ids = np.arange(1, catalogue_size(model.config) + 1) if ids is None else ids
    for chunk in torch.from_numpy(ids).to(head.weight.device).split(ITEMS_AT_ONCE):
        yield chunk, head.item_rows(chunk, offsets).float()


def recommend_candidates(
    model: EncoderForNextItem,
    best_in_catalogue: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    histories: Histories,
    top_k: int,
    exclude_seen: bool,
    allowed_items: ItemFilter,
    excluded_items: ItemFilter,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recommend items that an index finds.

    Args:
        model: a SASRec, GRU4Rec or Caser.
        best_in_catalogue: called with states (users, hidden size), newest items (users, length), `ItemMasks` and
            `top_k`; returns item ids and scores (users, top_k), -inf where fewer items are left for a user. It is not
            called for users who have a row of `allowed_items`: all of these are scored.
        histories, top_k, exclude_seen, allowed_items, excluded_items: as in the model's `recommend`.

    Returns:
        item_ids (batch, top_k) int64, best first, and scores (batch, top_k) float32: the logits of the model.

    Raises:
        ValueError: as the model's `recommend`.
    """
    num_items = catalogue_size(model.config)
    check_top_k(top_k, num_items)
    with evaluation_mode(model), torch.inference_mode():
        histories = padded_histories(histories, num_items, model.device, model.knows_popular_items)
        seen = histories if exclude_seen else None
        masks = item_masks(len(histories), num_items, model.device, seen, allowed_items, excluded_items)
        item_ids = histories.new_empty(len(histories), top_k)
        scores = torch.empty(item_ids.shape, device=model.device)
        has_items = histories.any(1)  # (batch,)
        if not has_items.all():
            popular = model.popular_scores().float().repeat(int((~has_items).sum()), 1)
            best = ordered_top_k(masks.of(~has_items).apply_(popular), top_k)
            scores[~has_items], item_ids[~has_items] = best
        asked = has_items.nonzero().squeeze(1)
        for users in asked.split(_users_at_once(model, masks, top_k)) if len(asked) else ():
            newest, masks_of_users = model.newest_items(histories[users]), masks.of(users)
            states = model.head.scaled(model.user_embeddings(newest)).float()
            if masks_of_users.allowed is not None:
                best = best_candidates(model, masks_of_users.allowed, states, newest, masks_of_users, top_k)
            else:
                best = best_in_catalogue(states, newest, masks_of_users, top_k)
            item_ids[users], scores[users] = best
        check_best_scores(scores, num_items)
    return item_ids.clone(), scores.clone()


def _users_at_once(model: EncoderForNextItem, masks: ItemMasks, top_k: int) -> int:
    """The number of users whose candidates, with their rows of the table, fit in memory together."""
    candidates = top_k + sum(ids.shape[1] for ids in (masks.hidden, masks.allowed) if ids is not None)
    return max(1, _NUMBERS_AT_ONCE // (candidates * model.head.in_features))


def best_candidates(
    model: EncoderForNextItem,
    candidates: torch.Tensor,
    states: torch.Tensor,
    newest: torch.Tensor,
    masks: ItemMasks,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score the candidates of each user that the masks leave, and return the best.

    Args:
        model: its table scores the candidates.
        candidates: (users, any) item ids, padded with 0.
        states: (users, hidden size), to be multiplied with rows of the table.
        newest: (users, length), the items that the model reads.
        masks: masks of these users.
        top_k: items per user.

    Returns:
        item_ids (users, top_k) int64, best first, the lower id first among equal scores, and scores (users, top_k),
        -inf where fewer items are left for a user.
    """
    head = model.head
    if head.repeat_bias is not None and masks.allowed is None:  # no index includes this bias
        candidates = torch.cat([candidates, newest], dim=1)
    candidates = F.pad(candidates, (0, max(0, top_k - candidates.shape[1])), value=PADDING_ITEM_ID)
    candidates = candidates.sort(1).values  # equal scores come in the order of ids
    rows = head.item_rows(candidates.flatten(), model._item_offsets()).float().view(*candidates.shape, -1)
    # A matrix product rounds equal rows differently, by their place in it.
    scores = (rows * states.unsqueeze(1)).sum(2)  # (users, candidates)
    if head.bias is not None:
        scores = scores + head.bias[candidates].float()
    if head.repeat_bias is not None:
        scores = scores + head.repeat_bias.float() * _isin(candidates, newest)
    masked = candidates == PADDING_ITEM_ID
    masked[:, 1:] |= candidates[:, 1:] == candidates[:, :-1]
    if masks.hidden is not None:
        masked |= _isin(candidates, masks.hidden)
    if masks.available is not None:
        masked |= ~masks.available[candidates]
    best, places = ordered_top_k(scores.masked_fill(masked, float("-inf")), top_k)
    return candidates.gather(1, places), best


def _isin(item_ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(users, items) bool: which ids of each user are among the same user's (users, any) others."""
    if not others.shape[1]:
        return torch.zeros_like(item_ids, dtype=torch.bool)
    others = others.sort(1).values
    places = torch.searchsorted(others, item_ids).clamp(max=others.shape[1] - 1)  # (users, items)
    return others.gather(1, places).eq(item_ids)


__all__ = ["ITEMS_AT_ONCE", "best_candidates", "check_has_table", "item_rows", "recommend_candidates"]
