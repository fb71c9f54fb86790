"""Ranking metrics as pure functions of ranks: one number per user.

A rank is the 1-based position of a relevant item; 1 is the best. The functions for one relevant item per user take
ranks of any shape and return the same shape; those for several take (users, relevant), each row in any order and padded
with 0, and return (users,). With one relevant item, both agree. All return float64, so that means do not depend on the
batches, and on the CPU, because not every accelerator has float64.
"""

import re

import torch


def hit_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """1 where the target is among the first `k`, else 0: HitRatio@k, and Recall@k with one relevant item.

    Args:
        ranks: integers >= 1, any shape.
        k: cut-off, at least 1.

    Returns:
        float64 of the shape of `ranks`, on the CPU.

    Raises:
        ValueError: for `k` < 1, ranks < 1 or ranks that are not integers.
    """
    ranks = _checked(ranks, k)
    return (ranks <= k).double()


def ndcg_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """1 / log2(rank + 1) where the target is among the first `k`, else 0; the ideal gain is 1, for rank 1.

    Args, Returns, Raises: as `hit_at`.
    """
    ranks = _checked(ranks, k)
    return torch.where(ranks <= k, 1 / torch.log2(ranks.double() + 1), 0.0)


def reciprocal_rank(ranks: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """1 / rank, or 0 where the target is not among the first `k`.

    Args, Returns, Raises: as `hit_at`, and None as `k` counts every rank.
    """
    ranks = _checked(ranks, k)
    values = 1 / ranks.double()
    return values if k is None else torch.where(ranks <= k, values, 0.0)


def precision_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the first `k` places that relevant items take.

    Args:
        ranks: (users, relevant) integers, the rank of each relevant item, in any order; 0 is padding.
        k: cut-off, at least 1.

    Returns:
        (users,) float64, on the CPU.

    Raises:
        ValueError: for `k` < 1, another shape, negative ranks, ranks that are not integers, equal ranks of a user, and
            users without relevant items.

    Source: `Precision` of RecTools.
    """
    return _first(ranks, k).sum(dim=1).double() / k


def recall_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Share of a user's relevant items that are among the first `k`.

    Args, Returns, Raises: as `precision_at`.

    Source: `Recall` of RecTools.
    """
    return _first(ranks, k).sum(dim=1).double() / (ranks.cpu() > 0).sum(dim=1)


def average_precision_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """The sum of the precision at each relevant item among the first `k`, divided by the number of relevant items.

    Args, Returns, Raises: as `precision_at`.

    Source: `MAP` of RecTools with `divide_by_k=False`, its default.
    """
    first = _first(ranks, k)
    # Padding comes last; it is not among the first k.
    ordered, order = ranks.cpu().long().masked_fill(~first, torch.iinfo(torch.int64).max).sort(dim=1)
    precisions = torch.arange(1, ranks.shape[1] + 1) / ordered.double()  # (users, relevant)
    return (precisions * first.gather(1, order)).sum(dim=1) / (ranks.cpu() > 0).sum(dim=1)


def ndcg_of_several_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Sum of 1 / log2(rank + 1) over the relevant items among the first `k`, divided by its highest possible value.

    Args, Returns, Raises: as `precision_at`.

    Source: `NDCG` of RecTools with `divide_by_achievable=True`. Its default divides by the value for `k` relevant
    items, which a user with fewer cannot reach.
    """
    first = _first(ranks, k)
    gains = torch.where(first, 1 / torch.log2(ranks.cpu().double() + 1), 0.0)
    num_relevant = (ranks.cpu() > 0).sum(dim=1).clamp(max=k)  # (users,)
    ideal = (1 / torch.log2(torch.arange(2, k + 2).double())).cumsum(dim=0)  # (k,)
    return gains.sum(dim=1) / ideal[num_relevant - 1]


def _best(ranks: torch.Tensor, k: int | None) -> torch.Tensor:
    """(users,) the rank of each user's first relevant item."""
    _first(ranks, k)
    ranks = ranks.cpu().long()
    return ranks.masked_fill(ranks == 0, torch.iinfo(torch.int64).max).amin(dim=1)


_METRICS = {
    "ndcg": ndcg_of_several_at,
    "hit_ratio": lambda ranks, k: hit_at(_best(ranks, k), k),
    "recall": recall_at,
    "precision": precision_at,
    "map": average_precision_at,
    "mrr": lambda ranks, k: reciprocal_rank(_best(ranks, k), k),
}


def metric_per_user(name: str, ranks: torch.Tensor) -> torch.Tensor:
    """Compute a metric by its name, such as "ndcg@10", "map@10", "precision@10", "recall@20", "mrr" or "mrr@10".

    Args:
        name: metric and cut-off; the cut-off is optional for "mrr" only.
        ranks: integers, (users,) >= 1 where each user has one relevant item, or (users, relevant), padded with 0.

    Returns:
        (users,) float64, on the CPU.

    Raises:
        ValueError: for a name of another form, and as `precision_at`.
    """
    match = re.fullmatch(r"(\w+?)(?:@(\d+))?", name)
    if match is None or match[1] not in _METRICS or (match[2] is None and match[1] != "mrr"):
        raise ValueError(
            f"metric {name!r} is unknown: expected one of {', '.join(_METRICS)} and a cut-off, such as ndcg@10 "
            "(optional for mrr only)"
        )
    k = None if match[2] is None else int(match[2])
    return _METRICS[match[1]](_checked(ranks, k).unsqueeze(1) if ranks.dim() == 1 else ranks, k)


def _first(ranks: torch.Tensor, k: int | None) -> torch.Tensor:
    """(users, relevant) bool: which ranks are those of relevant items among the first `k`."""
    if ranks.dim() != 2:
        raise ValueError(
            f"ranks have shape {tuple(ranks.shape)}: expected (users, relevant), the rank of each relevant item, "
            "padded with 0"
        )
    ranks = ranks.cpu()
    is_item = ranks != 0
    _checked(ranks[is_item], k)
    if not is_item.any(dim=1).all():
        row = int((~is_item.any(dim=1)).nonzero()[0])
        raise ValueError(f"user {row} has no relevant item: expected at least one; leave the user out")
    ordered = ranks.sort(dim=1).values
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any(dim=1)
    if repeated.any():
        row = int(repeated.nonzero()[0])
        raise ValueError(f"ranks of user {row} are {ranks[row].tolist()}: expected a different rank for each item")
    return is_item if k is None else is_item & (ranks <= k)


def _checked(ranks: torch.Tensor, k: int | None) -> torch.Tensor:
    """The ranks, on the CPU, after a check of both arguments."""
    ranks = ranks.cpu()
    if k is not None and k < 1:
        raise ValueError(f"k is {k}: expected a cut-off of at least 1")
    if ranks.is_floating_point():
        raise ValueError(f"ranks have type {ranks.dtype}: expected integers, the 1-based position of the target")
    if ranks.numel() and int(ranks.min()) < 1:
        raise ValueError(f"lowest rank is {int(ranks.min())}: expected at least 1, the 1-based position of the target")
    return ranks
