"""Selects the rows to ask a slow teacher about when the budget does not cover all of them."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

ACQUISITION_POLICIES = ("random", "entropy", "margin", "loss", "k_center")

Scores = np.ndarray | torch.Tensor | Iterable  # all rows, or chunks of them
Targets = np.ndarray | torch.Tensor

# Number of rows whose probabilities are computed at once.
CHUNK_ROWS = 1024


def acquire(
    policy_name: str,
    budget: int,
    *,
    scores: Scores | None = None,
    targets: Targets | None = None,
    user_embeddings: np.ndarray | torch.Tensor | None = None,
    num_rows: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Select the rows to ask a teacher about.

    Args:
        policy_name: "random" (the baseline for the others), "entropy" (the student's distribution is flattest),
            "margin" (the student's two best items have the closest probabilities), "loss" (the student gives the
            target the lowest probability) or "k_center" (rows far apart, so that every row is near a selected one).
        budget: number of rows to select.
        scores: (rows, items) scores of the student, or an iterable of (chunk, items) in row order; -inf for items that
            do not compete. Needed by entropy, margin and loss.
        targets: (rows,) the targets, as columns of `scores`. Needed by loss.
        user_embeddings: (rows, hidden). Needed by k_center.
        num_rows: number of rows. Needed by random if no array above gives it.
        seed: random seed of random, and of the first row of k_center.

    Returns:
        (budget,) distinct row numbers, int64, ascending. The same input gives the same rows; of equal rows, the first
        are selected.

    Raises:
        ValueError: for an unknown policy, a missing input, a budget outside 1..rows, targets that are not one column
            per row, and NaN.

    Source: entropy, margin and loss as in active learning (Settles 2009); the greedy k-centre of Sener and Savarese
    (ICLR 2018), a 2-approximation (Gonzalez 1985).
    """
    if policy_name not in ACQUISITION_POLICIES:
        raise ValueError(f"policy_name is {policy_name!r}: expected one of {', '.join(ACQUISITION_POLICIES)}")
    given = {"scores": scores, "targets": targets, "user_embeddings": user_embeddings, "num_rows": num_rows}
    needed = {
        "entropy": ["scores"],
        "margin": ["scores"],
        "loss": ["scores", "targets"],
        "k_center": ["user_embeddings"],
    }
    for name in needed.get(policy_name, []):
        if given[name] is None:
            raise ValueError(f"{name} is None: policy {policy_name!r} needs it; pass it, or use policy 'random'")
    if policy_name == "random":
        rows = _number_of_rows(given)
        _check_budget(budget, rows)
        chosen = np.random.default_rng(seed).choice(rows, size=budget, replace=False)
    elif policy_name == "k_center":
        chosen = _k_center(torch.as_tensor(user_embeddings), budget, seed)
    else:
        assert scores is not None  # see `needed`
        values = _uncertainty(policy_name, scores, targets)  # (rows,)
        _check_budget(budget, len(values))
        chosen = np.argsort(-values, kind="stable")[:budget]
    return np.sort(chosen).astype(np.int64)


def _number_of_rows(given: dict) -> int:
    if given["num_rows"] is not None:
        return given["num_rows"]
    for name in ("targets", "user_embeddings", "scores"):
        if isinstance(given[name], (np.ndarray, torch.Tensor)):
            return len(given[name])
    raise ValueError("num_rows is None: policy 'random' needs the number of rows, or an array with that many rows")


def _check_budget(budget: int, rows: int) -> None:
    if not 1 <= budget <= rows:
        raise ValueError(f"budget is {budget}: expected 1..{rows}, the number of rows to select from")


def _uncertainty(policy_name: str, scores: Scores, targets: Targets | None) -> np.ndarray:
    """(rows,) float32, large for the rows to ask about."""
    if targets is not None:
        targets = torch.as_tensor(targets)
    values, start = [np.zeros(0, np.float32)], 0
    for chunk in _chunks(scores):
        chunk_targets = None if targets is None else targets[start : start + len(chunk)]
        start += len(chunk)
        values.append(_MEASURES[policy_name](chunk, chunk_targets).numpy())
        if np.isnan(values[-1]).any():
            row = start - len(chunk) + int(np.isnan(values[-1]).argmax())
            raise ValueError(f"scores of row {row} contain NaN: expected numbers; check the loaded weights")
    if targets is not None and len(targets) != start:
        raise ValueError(f"targets have length {len(targets)}: expected {start}, one for each row of scores")
    return np.concatenate(values)


def _chunks(scores: Scores) -> Iterator[torch.Tensor]:
    """(chunk, items) float32 on the CPU, few rows at a time."""
    for block in [scores] if isinstance(scores, (np.ndarray, torch.Tensor)) else scores:
        block = torch.as_tensor(block)
        if block.dim() != 2 or block.shape[1] < 2:
            raise ValueError(f"scores have shape {tuple(block.shape)}: expected (rows, items) with at least two items")
        for chunk in block.detach().split(CHUNK_ROWS):
            if len(chunk):
                yield chunk.float().cpu()


def _entropy(scores: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    return torch.special.entr(scores.softmax(1)).sum(1)  # (chunk,)


def _margin(scores: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    best = scores.softmax(1).topk(2, dim=1).values  # (chunk, 2)
    return best[:, 1] - best[:, 0]  # (chunk,), 0 where the two are equal


def _loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if len(targets) != len(scores):
        raise ValueError(f"targets end {len(scores) - len(targets)} rows before the scores: expected one for each row")
    lowest, highest = map(int, torch.aminmax(targets))
    if lowest < 0 or highest >= scores.shape[1]:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"targets contain {wrong}: expected columns 0..{scores.shape[1] - 1} of the scores")
    return -scores.log_softmax(1).gather(1, targets.long().unsqueeze(1)).squeeze(1)  # (chunk,)


_MEASURES: dict[str, Callable] = {"entropy": _entropy, "margin": _margin, "loss": _loss}


def _k_center(embeddings: torch.Tensor, budget: int, seed: int) -> np.ndarray:
    """(budget,) rows: a random one, then repeatedly the row farthest from all selected ones.

    It needs a few numbers per row in addition to the embeddings, and budget x rows x hidden multiplications.
    """
    if embeddings.dim() != 2:
        raise ValueError(f"user_embeddings have shape {tuple(embeddings.shape)}: expected (rows, hidden)")
    embeddings = embeddings.detach().float().cpu()
    rows = len(embeddings)
    _check_budget(budget, rows)
    lengths = torch.linalg.vector_norm(embeddings, dim=1).square()  # (rows,)
    if not lengths.isfinite().all():
        row = int((~lengths.isfinite()).nonzero()[0])
        raise ValueError(f"user_embeddings of row {row} contain NaN or infinity: expected numbers")
    chosen = np.empty(budget, np.int64)
    chosen[0] = np.random.default_rng(seed).integers(rows)
    nearest = torch.full((rows,), float("inf"))  # (rows,), squared distance to the nearest selected row
    for place in range(1, budget):
        centre = chosen[place - 1]
        distance = lengths + lengths[centre] - 2 * (embeddings @ embeddings[centre])  # (rows,)
        nearest = torch.minimum(nearest, distance.clamp_(min=0))
        nearest[centre] = -1  # below all others for good, so that no row is selected twice
        chosen[place] = int(nearest.argmax())
    return chosen
