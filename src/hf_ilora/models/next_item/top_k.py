"""Finds the best items of each user exactly, without keeping the scores of the whole catalogue in memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .configuration_next_item import PADDING_ITEM_ID

# Number of scores in memory at once. On a CPU they stay in its cache; a GPU needs more work per launch.
_SCORES_AT_ONCE = {"cpu": 2**20, "other": 2**24}
_USERS_AT_ONCE = {"cpu": 256, "other": 2048}
_FEW_SCORES = 2**14  # up to which there are no chunks: fewer steps take less time, which matters for a single user
_BLOCK = 64  # items whose maximum is compared before their scores; rows of scores have a block as margin
# Up to this many columns `torch.topk` beats a search through blocks.
_PLAIN_COLUMNS = 2**14
_SORTED_COLUMNS = 256
_SCORES_PER_CANDIDATE = 64  # number of scores that `torch.topk` reads in the time that sorting one candidate takes
_LOG2_E = math.log2(math.e)

# Remedies in the message that too few items are left for a user, or similar to an item.
REMEDY_FOR_USERS = "ask for fewer items, pass exclude_seen=False, or loosen allowed_items and excluded_items"
REMEDY_FOR_ITEMS = "ask for fewer items, or loosen allowed_items and excluded_items; an item is not similar to itself"


@dataclass(frozen=True)
class ItemMasks:
    """Which items the users may get. Item ids are padded with 0; padding is never recommended.

    Args:
        hidden: (users, any) ids that the user does not get, such as those of the history, or None.
        allowed: (users, any) the only ids that the user may get, or None for all.
        available: (num_items + 1,) bool, the items that any user may get, or None for all.
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
        """Make masks from filters as `item_filter` returns them: ids (items,) for all users, or (users, any).

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

    def apply_(self, scores: torch.Tensor, first: int | None = None) -> torch.Tensor:
        """Set scores to -inf where they are masked.

        Args:
            scores: (users, columns), of the item ids `first`, `first + 1`, ..., whose first and last column are
                overwritten.
            first: the item id of the first column; None for scores of all items, (users, num_items + 1).

        Returns:
            The scores.
        """
        start, last_column = first or 0, scores.shape[1] - 1
        if self.available is not None:
            items = slice(max(start, 0), min(start + last_column + 1, len(self.available)))
            unavailable = ~self.available[items]
            scores[:, items.start - start : items.stop - start].masked_fill_(unavailable, float("-inf"))
        hidden, allowed = (None if ids is None else ids.long() for ids in (self.hidden, self.allowed))
        if first is not None:
            # Writing ids outside the columns to the first and last column takes less time than finding such ids.
            hidden, allowed = (
                None if ids is None else (ids - first).clamp_(0, last_column) for ids in (hidden, allowed)
            )
        if allowed is not None:
            scores.add_(torch.full_like(scores, float("-inf")).scatter_(1, allowed, 0.0))
        if hidden is not None:
            scores.scatter_(1, hidden, float("-inf"))
        if start <= PADDING_ITEM_ID <= start + last_column:
            scores[:, PADDING_ITEM_ID - start] = float("-inf")
        return scores


def columns_in_chunk(item_ids: torch.Tensor, items: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of item ids (users, any) in scores of a slice of item ids, and which of them are inside (bool)."""
    columns = item_ids.long() - items.start
    inside = (columns >= 0) & (columns < items.stop - items.start)
    return columns.clamp(0, items.stop - items.start - 1), inside


def ordered_top_k(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scores of each row, best first, and their columns; among equal scores the lower column comes first.

    `torch.topk` does not define the order of equal scores, which would depend on the device and on the chunks.

    Args:
        scores: (rows, columns), at least `top_k` columns.
        top_k: scores per row.

    Returns:
        (rows, top_k) scores, and (rows, top_k) int64 columns.
    """
    width = scores.shape[1]
    if scores.device.type != "cpu" or width > _PLAIN_COLUMNS:  # reading `tied` below would wait for a GPU
        return _top_k_of_blocks(scores, top_k)
    best, columns = scores.topk(min(top_k + 1, width), dim=1)
    tied = best[:, :-1].eq(best[:, 1:])
    if tied.any():
        rows = tied.any(1).nonzero().squeeze(1)
        best[rows, :top_k], columns[rows, :top_k] = _top_k_of_blocks(scores[rows], top_k)
    return best[:, :top_k], columns[:, :top_k]


def _top_k_of_blocks(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `ordered_top_k` through blocks: the best scores are all in the `top_k` blocks with the highest maxima.

    Among blocks with equal maxima the first ones are chosen, since they have the lower columns.
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
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise ValueError(f"top_k is {top_k!r}: expected an int, 1 to {num_items}, the number of items in the catalogue")
    if not 1 <= top_k <= num_items:
        raise ValueError(f"top_k is {top_k}: expected 1 to {num_items}, the number of items in the catalogue")


def check_best_scores(scores: torch.Tensor, num_items: int, remedy: str = REMEDY_FOR_USERS) -> None:
    """Raise a ValueError if any of the best scores (users, top_k) is not finite."""
    # One test finds every error: -inf is among the best only if nothing else is left, NaN sorts above everything, and
    # amax propagates it. (torch.isfinite takes twice as long, which matters for a single user.)
    if scores.abs().amax() < torch.inf:
        return
    row = int((~torch.isfinite(scores)).any(dim=-1).nonzero()[0])
    if torch.isnan(scores[row]).any() or torch.isposinf(scores[row]).any():
        raise ValueError(
            f"the scores of row {row} contain NaN or +inf: expected finite numbers; check the loaded weights"
        )
    available = int(torch.isfinite(scores[row]).sum())
    raise ValueError(
        f"top_k is {scores.shape[-1]}, but row {row} has {available} of {num_items} items left to recommend: {remedy}"
    )


def masked_top_k(scores: torch.Tensor, top_k: int, masks: ItemMasks) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best items of each user among scores of the whole catalogue.

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
    remedy: str = REMEDY_FOR_USERS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the best items of each user while only some users' scores of some items are in memory.

    Args:
        score_items: called with a slice of users, a slice of item ids and a tensor (users, items), float32, which it
            fills with their scores; the score of padding is ignored.
        num_users: number of users to score.
        num_items: size of the catalogue.
        top_k: items per user.
        masks: which items the users may get.
        device: device on which the scores are computed.
        remedy: end of the error message for a user who may get fewer than `top_k` items.

    Returns:
        item_ids (num_users, top_k) int64, best first, the lower id first among equal scores; their scores
        (num_users, top_k); and the logarithm of the sum of exp(score) over the whole catalogue, masked items included,
        (num_users,).

    Raises:
        ValueError: as `masked_top_k`.
    """
    check_top_k(top_k, num_items)
    if num_users * num_items <= _FEW_SCORES:
        scores = torch.empty(num_users, num_items + 1, device=device)
        score_items(slice(0, num_users), slice(0, num_items + 1), scores)
        scores[:, PADDING_ITEM_ID] = float("-inf")
        log_sum_exp = scores.logsumexp(1)
        best, item_ids = ordered_top_k(masks.apply_(scores), top_k)
        check_best_scores(best, num_items, remedy)
        return item_ids, best, log_sum_exp
    kind = "cpu" if device.type == "cpu" else "other"
    users_at_once = min(num_users, _USERS_AT_ONCE[kind])
    items_at_once = min(num_items + 1, max(_SCORES_AT_ONCE[kind] // users_at_once, 2 * top_k))
    memory = torch.empty(2, users_at_once, _BLOCK + items_at_once + _BLOCK, device=device)
    answers = []
    for first_user in range(0, num_users, users_at_once):
        users = slice(first_user, min(first_user + users_at_once, num_users))
        best, masks_of_users = _Best(top_k), masks.of(users)
        for first in range(0, num_items + 1, items_at_once):
            items = slice(first, min(first + items_at_once, num_items + 1))
            width = items.stop - items.start
            end = _BLOCK + -(-width // _BLOCK) * _BLOCK  # of whole blocks
            rows, exponentials = memory[:, : users.stop - users.start]
            scores = rows[:, _BLOCK : _BLOCK + width]
            score_items(users, items, scores)
            if items.start == PADDING_ITEM_ID:
                scores[:, PADDING_ITEM_ID] = float("-inf")
            best.add(scores, exponentials[:, :width])
            masks_of_users.apply_(rows[:, _BLOCK - 1 : _BLOCK + width + 1], items.start - 1)
            rows[:, _BLOCK + width : end] = float("-inf")
            best.rank(rows[:, _BLOCK:end], items.start)
        best.merge()
        answers.append((best.item_ids, best.scores, best.log_sum_exp()))
    item_ids, scores, log_sum_exp = answers[0] if len(answers) == 1 else map(torch.cat, zip(*answers, strict=True))
    check_best_scores(scores, num_items, remedy)
    return item_ids, scores, log_sum_exp


class _Best:
    """The best items that some users have so far, and the sum of exp(score) so far."""

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.scores = self.item_ids = None  # (users, top_k)
        self.reference = self.sum = None  # (users,), the sum of exp(score) x 2 ** -reference
        # Users, scores and item ids, (any,) each, that `merge` has to compare.
        self.candidates, self.num_candidates = [], 0

    def log_sum_exp(self) -> torch.Tensor:
        return (self.reference + self.sum.log2()) / _LOG2_E

    def add(self, scores: torch.Tensor, exponentials: torch.Tensor) -> None:
        """Add exp of scores (users, items) to the sum; `exponentials` of the same shape is overwritten."""
        reference = scores.amax(1).mul_(_LOG2_E).clamp_(min=torch.finfo(torch.float32).min)  # (users,)
        if self.reference is not None:
            reference = torch.maximum(self.reference, reference)
        # exp2 takes half the time of exp; the subtraction and the multiplication share one pass.
        torch.add(-reference.unsqueeze(1), scores, alpha=_LOG2_E, out=exponentials).exp2_()
        added = exponentials.sum(1)
        self.sum = added if self.sum is None else self.sum * (self.reference - reference).exp2_() + added
        self.reference = reference

    def rank(self, scores: torch.Tensor, first: int) -> None:
        """Update the best items with the scores (users, items) of the next item ids, which start at `first`."""
        if self.scores is None:
            self.scores, columns = ordered_top_k(scores, self.top_k)
            self.item_ids = columns + first
        # Looking for the few scores above the worst of the best would wait for a GPU.
        elif scores.device.type != "cpu" or not self._add_candidates(scores, first):
            best, columns = ordered_top_k(scores, min(self.top_k, scores.shape[1]))
            self.candidates.append(_flat(best, columns + first))
            self.merge()

    def _add_candidates(self, scores: torch.Tensor, first: int) -> bool:
        """Keep the scores that change the best, unless there are so many that `ordered_top_k` takes less time.

        Later items have higher ids, so equal scores change nothing. NaN is kept, so that the final check finds it.
        """
        worst = self.scores[:, -1]  # (users,)
        blocks = scores.unflatten(1, (-1, _BLOCK))  # (users, blocks, block)
        users, block = _above(worst, blocks.amax(2))
        if users.numel() > scores.numel() // (2 * _BLOCK):
            return False
        chosen = blocks[users, block]  # (any, block)
        places, columns = _above(worst[users], chosen)
        if places.numel() > scores.numel() // _SCORES_PER_CANDIDATE:
            return False
        item_ids = block[places] * _BLOCK + columns + first
        self.candidates.append((users[places], chosen[places, columns], item_ids))
        self.num_candidates += places.numel()
        if self.num_candidates > self.scores.numel():
            self.merge()
        return True

    def merge(self) -> None:
        """Find the best among the best so far and the candidates."""
        if not self.candidates:
            return
        everybody = torch.arange(len(self.scores), device=self.scores.device)
        best = _flat(self.scores, self.item_ids)
        users, scores, item_ids = map(torch.cat, zip(best, *self.candidates, strict=True))  # (any,)
        # Lower ids come first, and stay first among equal scores, since the sorts are stable.
        scores, order = scores.sort(descending=True, stable=True)
        users, by_user = users[order].sort(stable=True)
        first = torch.searchsorted(users, everybody)  # (users,)
        chosen = by_user[first.unsqueeze(1) + torch.arange(self.top_k, device=first.device)]  # (users, top_k)
        self.scores, self.item_ids = scores[chosen], item_ids[order[chosen]]
        self.candidates, self.num_candidates = [], 0


def _flat(scores: torch.Tensor, item_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The users, scores and item ids, (users * items,) each, of scores and item ids (users, items)."""
    users = torch.arange(len(scores), device=scores.device).unsqueeze(1).expand_as(scores)
    return users.flatten(), scores.flatten(), item_ids.flatten()


def _above(limits: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, in this order, of the scores (rows, columns) above the limits (rows,), and of NaN."""
    return (~(scores <= limits.unsqueeze(1))).nonzero().unbind(1)


__all__ = [
    "REMEDY_FOR_ITEMS",
    "REMEDY_FOR_USERS",
    "ItemMasks",
    "check_best_scores",
    "check_top_k",
    "columns_in_chunk",
    "masked_top_k",
    "ordered_top_k",
    "top_k_in_chunks",
]
