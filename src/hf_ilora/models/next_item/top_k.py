"""The best items of each user, exactly, without ever holding the scores of the whole catalogue."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .configuration_next_item import PADDING_ITEM_ID

# Scores in memory at once. On a CPU they stay in its cache; a GPU needs more work for each launch.
_SCORES_AT_ONCE = {"cpu": 2**19, "other": 2**24}
_USERS_AT_ONCE = {"cpu": 256, "other": 2048}
# Up to this many columns `torch.topk` beats a search through blocks.
_PLAIN_COLUMNS = 2**14
_SORTED_COLUMNS = 256


@dataclass(frozen=True)
class ItemMasks:
    """Which items the users may get. Item ids are padded with 0; padding is never recommended.

    Args:
        hidden: (users, any) ids that the user does not get, such as those of the history, or None.
        allowed: (users, any) ids, nothing else of which the user gets, or None.
        available: (num_items + 1,) bool, the items that anybody may get, or None for all.
    """

    hidden: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    available: torch.Tensor | None = None

    @classmethod
    def from_filters(
        cls,
        num_items: int,
        seen: torch.Tensor | None = None,
        allowed_items: torch.Tensor | None = None,
        excluded_items: torch.Tensor | None = None,
    ) -> "ItemMasks":
        """The masks of filters as `item_filter` returns them: ids (items,) for all users, or (users, any).

        Args:
            num_items: size of the catalogue.
            seen: (users, any) ids to leave out, or None.
            allowed_items: the only ids to choose from, or None.
            excluded_items: ids to leave out, or None.
        """
        hidden = [ids for ids in (seen, excluded_items) if ids is not None and ids.dim() == 2]
        available = None
        if allowed_items is not None and allowed_items.dim() == 1:
            available = torch.zeros(num_items + 1, dtype=torch.bool, device=allowed_items.device)
            available, allowed_items = available.index_fill(0, allowed_items, True), None
        if excluded_items is not None and excluded_items.dim() == 1:
            if available is None:
                available = torch.ones(num_items + 1, dtype=torch.bool, device=excluded_items.device)
            available = available.index_fill(0, excluded_items, False)
        return cls(torch.cat(hidden, dim=1) if hidden else None, allowed_items, available)

    def of(self, users: slice | torch.Tensor) -> "ItemMasks":
        """The masks of some users, (any,) indices or a slice."""
        hidden, allowed = (None if ids is None else ids[users] for ids in (self.hidden, self.allowed))
        return ItemMasks(hidden, allowed, self.available)

    def apply_(self, scores: torch.Tensor, items: slice | None = None) -> torch.Tensor:
        """Set scores (users, items) of a slice of item ids, None for all of them, to -inf where they are masked."""
        if self.available is not None:
            scores.masked_fill_(~(self.available if items is None else self.available[items]), float("-inf"))
        if self.allowed is not None:
            columns, values = _in_chunk(self.allowed, items, 0.0, float("-inf"))
            scores.add_(torch.full_like(scores, float("-inf")).scatter_reduce_(1, columns, values.to(scores), "amax"))
        if self.hidden is not None and items is None:
            scores.scatter_(1, self.hidden.long(), float("-inf"))
        elif self.hidden is not None:
            columns, values = _in_chunk(self.hidden, items, float("-inf"), float("inf"))
            scores.scatter_reduce_(1, columns, values.to(scores), "amin")
        if items is None or items.start == PADDING_ITEM_ID:
            scores[:, PADDING_ITEM_ID] = float("-inf")
        return scores


def columns_in_chunk(item_ids: torch.Tensor, items: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of item ids (users, any) in scores of a slice of item ids, and which of them are inside (bool)."""
    columns = item_ids.long() - items.start
    inside = (columns >= 0) & (columns < items.stop - items.start)
    return columns.clamp(0, items.stop - items.start - 1), inside


def _in_chunk(item_ids: torch.Tensor, items: slice | None, inner: float, outer: float):
    """Columns as `columns_in_chunk`, and the number `inner` or, for ids outside, `outer`."""
    if items is None:
        return item_ids.long(), torch.full(item_ids.shape, inner, device=item_ids.device)
    columns, inside = columns_in_chunk(item_ids, items)
    return columns, torch.where(inside, inner, outer)


def ordered_top_k(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores of each row, best first, and their columns; among equal scores the lower column comes first.

    `torch.topk` leaves the order of equal scores open, so that it would depend on the device and on the chunks.

    Args:
        scores: (rows, columns), at least `top_k` columns.
        top_k: scores per row.

    Returns:
        (rows, top_k) scores, and (rows, top_k) int64 columns.
    """
    width = scores.shape[1]
    if scores.device.type != "cpu" or width > _PLAIN_COLUMNS:  # a look at the scores would wait for a GPU
        return _top_k_of_blocks(scores, top_k)
    best, columns = scores.topk(min(top_k + 1, width), dim=1)
    tied = best[:, :-1].eq(best[:, 1:])
    if tied.any():
        rows = tied.any(1).nonzero().squeeze(1)
        best[rows, :top_k], columns[rows, :top_k] = _top_k_of_blocks(scores[rows], top_k)
    return best[:, :top_k], columns[:, :top_k]


def _top_k_of_blocks(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `ordered_top_k`: whoever is among the best is in one of the `top_k` blocks with the highest maxima.

    Among blocks with the same maximum the first ones count, as the lower columns are in them.
    """
    rows, width = scores.shape
    size = math.isqrt(width // top_k)  # as many maxima as candidates
    if width <= _SORTED_COLUMNS or size < 4:
        best, columns = scores.sort(dim=1, descending=True, stable=True)
        return best[:, :top_k], columns[:, :top_k]
    whole = width // size * size
    blocks = scores[:, :whole].unflatten(1, (-1, size))  # (rows, blocks, size)
    _, chosen = _top_k_of_blocks(blocks.amax(2), top_k)
    chosen = chosen.sort(1).values  # so that candidates keep the order of their columns
    candidates = blocks.gather(1, chosen.unsqueeze(2).expand(-1, -1, size)).flatten(1)  # (rows, top_k * size)
    columns = (chosen.unsqueeze(2) * size + torch.arange(size, device=scores.device)).flatten(1)
    if whole < width:
        candidates = torch.cat([candidates, scores[:, whole:]], dim=1)
        rest = torch.arange(whole, width, device=scores.device).expand(rows, -1)
        columns = torch.cat([columns, rest], dim=1)
    best, places = _top_k_of_blocks(candidates, top_k)
    return best, columns.gather(1, places)


def check_top_k(top_k: int, num_items: int) -> None:
    """Raise a ValueError unless `top_k` is a number of items that the catalogue has."""
    if not isinstance(top_k, int) or not 1 <= top_k <= num_items:
        raise ValueError(f"top_k is {top_k}: expected 1 to {num_items}, the number of items in the catalogue")


def check_best_scores(scores: torch.Tensor, num_items: int) -> None:
    """Raise a ValueError if any of the best scores (users, top_k) is not finite."""
    # One test for all that can go wrong: -inf is picked only when nothing else is left, NaN sorts above everything, and
    # amax passes it on. (torch.isfinite takes twice as long, which counts when one user waits.)
    if scores.abs().amax() < torch.inf:
        return
    row = int((~torch.isfinite(scores)).any(dim=-1).nonzero()[0])
    if torch.isnan(scores[row]).any() or torch.isposinf(scores[row]).any():
        raise ValueError(
            f"the scores of row {row} contain NaN or +inf: expected finite numbers; check the weights that were loaded"
        )
    available = int(torch.isfinite(scores[row]).sum())
    raise ValueError(
        f"top_k is {scores.shape[-1]}, but row {row} has {available} of {num_items} items left to recommend: "
        "ask for fewer items, pass exclude_seen=False, or loosen allowed_items and excluded_items"
    )


def masked_top_k(scores: torch.Tensor, top_k: int, masks: ItemMasks) -> tuple[torch.Tensor, torch.Tensor]:
    """The best items of each user, of scores of the whole catalogue.

    Args:
        scores: (users, num_items + 1); column 0 is padding. Left unchanged.
        top_k: items per user.
        masks: which items the users may get.

    Returns:
        item_ids (users, top_k) int64, best first, the lower id first among equal scores; and scores (users, top_k).

    Raises:
        ValueError: when a user may get fewer than `top_k` items, or a score that is not finite is among the best.
    """
    num_items = scores.shape[1] - 1
    check_top_k(top_k, num_items)
    best, item_ids = ordered_top_k(masks.apply_(scores.clone()), top_k)
    check_best_scores(best, num_items)
    return item_ids, best


def top_k_in_chunks(
    score_items: Callable[[slice, slice, torch.Tensor], None],
    num_users: int,
    num_items: int,
    top_k: int,
    masks: ItemMasks,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best items of each user, while only some users' scores of some items are in memory.

    Args:
        score_items: called with a slice of users, a slice of item ids and a tensor (users, items), float32, which it
            fills with their scores; the score of padding is ignored.
        num_users: users that are scored.
        num_items: items of the catalogue, whose ids are 1..num_items.
        top_k: items per user.
        masks: which items the users may get.
        device: where the scores are computed.

    Returns:
        item_ids (num_users, top_k) int64, best first, the lower id first among equal scores; their scores
        (num_users, top_k); and the logarithm of the sum of exp(score) over the whole catalogue, masked items included,
        (num_users,).

    Raises:
        ValueError: as `masked_top_k`.
    """
    check_top_k(top_k, num_items)
    kind = "cpu" if device.type == "cpu" else "other"
    users_at_once = min(num_users, _USERS_AT_ONCE[kind])
    items_at_once = min(num_items + 1, max(_SCORES_AT_ONCE[kind] // users_at_once, 2 * top_k))
    if users_at_once == num_users and items_at_once > num_items:
        scores = torch.empty(num_users, num_items + 1, device=device)
        score_items(slice(0, num_users), slice(0, num_items + 1), scores)
        scores[:, PADDING_ITEM_ID] = float("-inf")
        log_sum_exp = scores.logsumexp(1)
        best, item_ids = ordered_top_k(masks.apply_(scores), top_k)
        check_best_scores(best, num_items)
        return item_ids, best, log_sum_exp
    memory = torch.empty(2, users_at_once * items_at_once, device=device)
    answers = []
    for first_user in range(0, num_users, users_at_once):
        users = slice(first_user, min(first_user + users_at_once, num_users))
        running = _Best(users.stop - users.start, top_k, masks.of(users), device)
        for first in range(0, num_items + 1, items_at_once):
            items = slice(first, min(first + items_at_once, num_items + 1))
            shape = running.num_users, items.stop - items.start
            scores, exponentials = memory[:, : math.prod(shape)].view(2, *shape)
            score_items(users, items, scores)
            if items.start == PADDING_ITEM_ID:
                scores[:, PADDING_ITEM_ID] = float("-inf")
            running.see(scores, items, exponentials)
        answers.append((running.item_ids, running.scores, running.log_sum_exp()))
    item_ids, scores, log_sum_exp = (torch.cat(parts) for parts in zip(*answers, strict=True))
    check_best_scores(scores, num_items)
    return item_ids, scores, log_sum_exp


class _Best:
    """The best items that some users have so far, and the sum of exp(score) so far."""

    def __init__(self, num_users: int, top_k: int, masks: ItemMasks, device: torch.device):
        self.num_users, self.top_k, self.masks = num_users, top_k, masks
        self.item_ids = torch.zeros(num_users, top_k, dtype=torch.int64, device=device)
        self.scores = torch.full((num_users, top_k), float("-inf"), device=device)
        self.highest = torch.full((num_users,), float("-inf"), device=device)
        self.sum = torch.zeros(num_users, device=device)  # of exp(score - highest)

    def log_sum_exp(self) -> torch.Tensor:
        return self.highest + self.sum.log()

    def see(self, scores: torch.Tensor, items: slice, exponentials: torch.Tensor) -> None:
        """Take in the scores (users, items) of the next item ids; both tensors are overwritten."""
        highest_here = scores.amax(1)  # (users,)
        highest = torch.maximum(self.highest, highest_here).clamp(min=torch.finfo(torch.float32).min)
        torch.sub(scores, highest.unsqueeze(1), out=exponentials)
        exponentials.mul_(math.log2(math.e)).exp2_()  # twice as fast as exp_
        self.sum = self.sum * (self.highest - highest).exp() + exponentials.sum(1)
        self.highest = highest
        if scores.device.type != "cpu":  # to look for the users whose best change would wait for a GPU
            self._rank(slice(None), scores, items)
            return
        # Later items have higher ids: equal scores do not change the best. NaN is ranked, to be found in the end.
        users = (~(highest_here <= self.scores[:, -1])).nonzero().squeeze(1)
        if len(users) == self.num_users:
            self._rank(slice(None), scores, items)
        elif len(users):
            self._rank(users, scores[users], items)

    def _rank(self, users: slice | torch.Tensor, scores: torch.Tensor, items: slice) -> None:
        masked = self.masks.of(users).apply_(scores, items)
        best, columns = ordered_top_k(masked, min(self.top_k, masked.shape[1]))
        # The best so far come first, since their ids are lower and the sort is stable.
        both = torch.cat([self.scores[users], best], dim=1)
        ids = torch.cat([self.item_ids[users], columns + items.start], dim=1)
        both, order = both.sort(dim=1, descending=True, stable=True)
        self.scores[users] = both[:, : self.top_k]
        self.item_ids[users] = ids.gather(1, order)[:, : self.top_k]


__all__ = [
    "ItemMasks",
    "check_best_scores",
    "check_top_k",
    "columns_in_chunk",
    "masked_top_k",
    "ordered_top_k",
    "top_k_in_chunks",
]
