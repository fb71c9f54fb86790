"""Ranking metrics as pure functions of the target's rank: one number per user.

A rank is the 1-based position of the only relevant item; 1 is the best. All functions take ranks of any shape and
return float64 of the same shape, so that means do not depend on the batches; on the CPU, since not every accelerator
has float64.
"""

import re

import torch


def hit_at(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """1 where the target is among the first `k`, else 0; with one relevant item this is HitRatio@k and Recall@k.

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

    Args:
        ranks: integers >= 1, any shape.
        k: cut-off, at least 1.

    Returns:
        float64 of the shape of `ranks`, on the CPU.

    Raises:
        ValueError: for `k` < 1, ranks < 1 or ranks that are not integers.
    """
    ranks = _checked(ranks, k)
    return torch.where(ranks <= k, 1 / torch.log2(ranks.double() + 1), 0.0)


def reciprocal_rank(ranks: torch.Tensor, k: int | None = None) -> torch.Tensor:
    """1 / rank, or 0 where the target is not among the first `k`.

    Args:
        ranks: integers >= 1, any shape.
        k: cut-off, at least 1; None counts every rank.

    Returns:
        float64 of the shape of `ranks`, on the CPU.

    Raises:
        ValueError: for `k` < 1, ranks < 1 or ranks that are not integers.
    """
    ranks = _checked(ranks, k)
    values = 1 / ranks.double()
    return values if k is None else torch.where(ranks <= k, values, 0.0)


_METRICS = {"ndcg": ndcg_at, "hit_ratio": hit_at, "recall": hit_at, "mrr": reciprocal_rank}


def metric_per_user(name: str, ranks: torch.Tensor) -> torch.Tensor:
    """The metric that `name` spells, such as "ndcg@10", "hit_ratio@1", "recall@20", "mrr" or "mrr@10".

    Args:
        name: metric and cut-off; the cut-off is optional for "mrr" only.
        ranks: integers >= 1, any shape.

    Returns:
        float64 of the shape of `ranks`, on the CPU.

    Raises:
        ValueError: for a name of another form, ranks < 1 or ranks that are not integers.
    """
    match = re.fullmatch(r"(\w+?)(?:@(\d+))?", name)
    if match is None or match[1] not in _METRICS or (match[2] is None and match[1] != "mrr"):
        raise ValueError(
            f"metric {name!r} is unknown: expected one of {', '.join(_METRICS)} and a cut-off, such as ndcg@10 "
            "(optional for mrr only)"
        )
    return _METRICS[match[1]](ranks, None if match[2] is None else int(match[2]))


def _checked(ranks: torch.Tensor, k: int | None) -> torch.Tensor:
    """The ranks, on the CPU."""
    ranks = ranks.cpu()
    if k is not None and k < 1:
        raise ValueError(f"k is {k}: expected a cut-off of at least 1")
    if ranks.is_floating_point():
        raise ValueError(f"ranks have type {ranks.dtype}: expected integers, the 1-based position of the target")
    if ranks.numel() and int(ranks.min()) < 1:
        raise ValueError(f"lowest rank is {int(ranks.min())}: expected at least 1, the 1-based position of the target")
    return ranks
