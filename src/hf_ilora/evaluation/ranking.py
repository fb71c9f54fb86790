"""The rank of each user's target among the scores of a model, without ever holding users x items.

A rank is 1-based. Ties count against the model: every other item with the score of the target is ranked before it. So
constant scores rank the target last, and no model gains by giving many items the same score.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, reduce

from hf_ilora.evaluation.evaluation_rows import EvaluationRows, check_known_items
from hf_ilora.evaluation.rank_metrics import hit_at, ndcg_at, reciprocal_rank
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_model import evaluation_mode
from hf_ilora.models.next_item.top_k import ordered_top_k


@dataclass(frozen=True)
class SplitRanks:
    """Ranks of the targets of a split, in the order of its rows.

    Args:
        masked: (users,) int64, in the whole catalogue without the items of the history (the target itself stays).
        unmasked: (users,) int64, in the whole catalogue.
        candidates: (users,) int64, among the row's candidates; None for a split without candidates.
        new_items: (users,) int64, as masked, but among the new items only; 0 where the target is not new. None unless
            `is_new` was given.
        relevant: (users, relevant) int64, as masked, of each relevant item; padded with 0. None for a split with one
            target per row.
        recommended: (users, top_k) int64 item ids, the best items outside the history, best first, padded with 0 where
            fewer are left. None unless `top_k` was given.
    """

    masked: np.ndarray
    unmasked: np.ndarray
    candidates: np.ndarray | None = None
    new_items: np.ndarray | None = None
    relevant: np.ndarray | None = None
    recommended: np.ndarray | None = None

    @property
    def main(self) -> str:
        """The ranking that judges users: "relevant" if the split has several relevant items per row, else "masked"."""
        return "masked" if self.relevant is None else "relevant"


def target_ranks(scores: torch.Tensor, target: torch.Tensor, seen_items: torch.Tensor | None = None) -> torch.Tensor:
    """1 + the number of other items that score at least as much as the target.

    Args:
        scores: (batch, num_items + 1); column 0 is padding and is ignored.
        target: (batch,) item ids 1..num_items.
        seen_items: (batch, any) item ids, padded with 0, to exclude from the ranking; the target always stays in it.

    Returns:
        (batch,) int64.

    Raises:
        ValueError: for shapes that do not fit, targets outside the catalogue, and NaN among the scores.
    """
    _check_scores(scores, target)
    target_scores = scores.gather(1, target.unsqueeze(1))  # (batch, 1)
    not_below = scores >= target_scores  # (batch, num_items + 1), the target itself among them
    # Adding up whole rows in 32 bits is several times faster than a slice of them in 64.
    ranks = not_below.sum(dim=1, dtype=torch.int32).long() - not_below[:, PADDING_ITEM_ID].long()  # (batch,)
    if seen_items is None:
        return ranks
    return ranks - _seen_before_target(scores, target, seen_items)


def relevant_ranks(
    scores: torch.Tensor, relevant_items: torch.Tensor, seen_items: torch.Tensor | None = None
) -> torch.Tensor:
    """The rank of each relevant item; among equal scores, other items come first.

    Args:
        scores: (batch, num_items + 1); column 0 is padding and is ignored.
        relevant_items: (batch, relevant) item ids, different ones in a row, padded with 0.
        seen_items: (batch, any) item ids, padded with 0, to exclude from the ranking; the relevant ones stay in it.

    Returns:
        (batch, relevant) int64, different ranks in a row; 0 for padding.

    Raises:
        ValueError: for shapes that do not fit, a row without relevant items or with an item twice, ids outside the
            catalogue, and NaN among the scores.
    """
    if relevant_items.dim() != 2 or len(relevant_items) != len(scores):
        raise ValueError(
            f"relevant_items have shape {tuple(relevant_items.shape)}: expected (batch, relevant) with batch "
            f"{len(scores)}"
        )
    _check_scores(scores, relevant_items.amax(dim=1))  # 0, which is refused, for a row of padding alone
    if int(relevant_items.min()) < 0:
        raise ValueError(f"relevant_items contain {int(relevant_items.min())}: expected item ids, or 0 for padding")
    ordered = relevant_items.sort(dim=1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any():
        raise ValueError("relevant_items contain an item twice in a row: expected different items")
    is_item = relevant_items != PADDING_ITEM_ID  # (batch, relevant)
    eligible = torch.ones_like(scores, dtype=torch.bool)
    if seen_items is not None:
        eligible.scatter_(1, seen_items, False)
    eligible.scatter_(1, relevant_items, True)
    eligible[:, PADDING_ITEM_ID] = False
    relevant_scores = scores.gather(1, relevant_items)  # (batch, relevant)
    ranks = torch.zeros_like(relevant_items, dtype=torch.int64)
    for place in range(relevant_items.shape[1]):  # one at a time: (batch, relevant, items) might not fit in memory
        score = relevant_scores[:, place, None]  # (batch, 1)
        not_below = ((scores >= score) & eligible).sum(dim=1)  # (batch,), the item itself among them
        # Among relevant items with equal scores, the first in the row is ranked first.
        later = is_item[:, place + 1 :] & (relevant_scores[:, place + 1 :] == score)
        ranks[:, place] = not_below - later.sum(dim=1)
    return ranks * is_item


def recommended_items(scores: torch.Tensor, seen_items: torch.Tensor, top_k: int) -> torch.Tensor:
    """The best items of each user outside the history, in the order of `recommend`, and 0 where none is left.

    Args:
        scores: (batch, num_items + 1); column 0 is padding.
        seen_items: (batch, any) item ids, padded with 0.
        top_k: number of items, 1 to num_items.

    Returns:
        (batch, top_k) int64.
    """
    excluded = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, seen_items, True)
    excluded[:, PADDING_ITEM_ID] = True
    _, items = ordered_top_k(scores.masked_fill(excluded, float("-inf")), top_k)  # (batch, top_k)
    return items.masked_fill(excluded.gather(1, items), PADDING_ITEM_ID)


def candidate_ranks(scores: torch.Tensor, candidates: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 + the number of other candidates that score at least as much as the target.

    Args:
        scores: (batch, num_items + 1); column 0 is padding.
        candidates: (batch, candidates) different item ids, the target among them.
        target: (batch,) item ids 1..num_items.

    Returns:
        (batch,) int64 in 1..candidates.

    Raises:
        ValueError: for shapes that do not fit, ids outside the catalogue, a target that is not among its candidates,
            a repeated candidate, and NaN among the scores.
    """
    _check_scores(scores, target)
    _check_candidates(candidates, target)
    check_known_items("candidates", candidates, scores.shape[1] - 1)
    return ranks_among_candidates(scores.gather(1, candidates), candidates, target)


def ranks_among_candidates(
    candidate_scores: torch.Tensor, candidates: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """As `candidate_ranks`, from the scores of the candidates alone.

    Args:
        candidate_scores: (batch, candidates).
        candidates: (batch, candidates) different item ids, the target among them.
        target: (batch,) item ids.

    Returns:
        (batch,) int64 in 1..candidates.

    Raises:
        ValueError: for shapes that do not fit, a target that is not among its candidates, a repeated candidate, and
            NaN among the scores.
    """
    _check_candidates(candidates, target)
    if candidate_scores.shape != candidates.shape:
        raise ValueError(
            f"candidate_scores have shape {tuple(candidate_scores.shape)}: expected {tuple(candidates.shape)}, a score "
            "for each candidate"
        )
    is_nan = torch.isnan(candidate_scores).any(dim=1)  # (batch,)
    if is_nan.any():
        raise ValueError(
            f"scores of row {int(is_nan.nonzero()[0])} contain NaN: expected numbers; check the loaded weights"
        )
    target_scores = candidate_scores[candidates == target.unsqueeze(1)]  # (batch,), one per row
    return (candidate_scores >= target_scores.unsqueeze(1)).sum(dim=1)


def _check_candidates(candidates: torch.Tensor, target: torch.Tensor) -> None:
    if candidates.dim() != 2 or len(candidates) != len(target):
        raise ValueError(
            f"candidates have shape {tuple(candidates.shape)}: expected (batch, candidates) with batch {len(target)}"
        )
    ordered = candidates.sort(dim=1).values
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        row = int((ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero()[0])
        raise ValueError(f"candidates of row {row} contain an item twice: expected different items")
    found = (candidates == target.unsqueeze(1)).any(dim=1)  # (batch,)
    if not found.all():
        row = int((~found).nonzero()[0])
        raise ValueError(f"candidates of row {row} lack its target {int(target[row])}: expected it to be one of them")


def _seen_before_target(scores: torch.Tensor, target: torch.Tensor, seen_items: torch.Tensor) -> torch.Tensor:
    """(batch,) number of different seen items, other than the target, that score at least as much as the target."""
    # Looking up the few seen items is cheaper than masking a second (batch, items) matrix.
    items = seen_items.masked_fill(seen_items == target.unsqueeze(1), PADDING_ITEM_ID).sort(dim=1).values
    counts = items != PADDING_ITEM_ID  # (batch, seen)
    counts[:, 1:] &= items[:, 1:] != items[:, :-1]
    counts &= scores.gather(1, items) >= scores.gather(1, target.unsqueeze(1))
    return counts.sum(dim=1)


def _check_scores(scores: torch.Tensor, target: torch.Tensor) -> None:
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and target {tuple(target.shape)}: "
            "expected (batch, num_items + 1) and (batch,)"
        )
    check_known_items("target", target, scores.shape[1] - 1)
    highest = scores[:, 1:].amax(dim=1)  # (batch,); the maximum of a row with NaN is NaN
    if torch.isnan(highest).any():
        row = int(torch.isnan(highest).nonzero()[0])
        raise ValueError(f"scores of row {row} contain NaN: expected numbers; check the loaded weights")


def rank_split(
    model: torch.nn.Module,
    split,
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    scorer: Callable[[torch.Tensor], torch.Tensor] | None = None,
    is_new: np.ndarray | None = None,
    top_k: int | None = None,
) -> SplitRanks:
    """Rank the target of every row of an evaluation split, in the catalogue and among the row's candidates.

    Rows are batched by length to save padding, and each batch is reduced to ranks before the next one is scored: memory
    grows with the batch and the catalogue, not with users x items. With several processes, each ranks a part of the
    batches and all receive all ranks.

    Args:
        model: `forward(input_ids, attention_mask)` returns `.logits`, (batch, num_items + 1), and `config` has
            `num_items` and `max_length`, the number of newest items to pass to the model. It may be wrapped for
            distributed evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and, unless it was
            prepared without them, candidates. Where users are judged by several items, it has relevant_items too.
        batch_size: rows per step and process.
        device: device on which to score; None means that of the model.
        scorer: maps whole histories, (batch, length), padded with 0 on the right, to scores, (batch, num_items + 1).
            For models whose forward does not score the catalogue, such as `ilora.item_scores`; None uses the logits.
        is_new: (num_items + 1,) bool, the items among which new targets are ranked too; None ranks in the catalogue
            alone.
        top_k: number of recommended items to return with the ranks; None returns none.

    Returns:
        Ranks of all rows, in the split's order. Without candidates in the split, `candidates` is None.

    Raises:
        ValueError: for missing columns, no rows, empty histories, ids outside the catalogue, candidates without the
            target, a `top_k` outside 1..num_items, and NaN among the scores.
    """
    config = extract_model_from_parallel(model).config
    rows = EvaluationRows(split, config.num_items)
    if device is None:
        device = extract_model_from_parallel(model).device
    if scorer is None:
        scorer = partial(_logits, model, config.max_length)
    if top_k is not None and not 1 <= top_k <= config.num_items:
        raise ValueError(f"top_k is {top_k}: expected 1 to {config.num_items}, the items of the catalogue")
    if is_new is not None:
        is_new = torch.from_numpy(is_new).to(device)
    of_split: dict[str, torch.Tensor] = {}
    with evaluation_mode(model), torch.inference_mode():
        for batch_rows, is_own in rows.batches_of_process(batch_size):
            for name, values in _rank_batch(scorer, rows, batch_rows, device, is_new, top_k).items():
                if name not in of_split:
                    of_split[name] = values.new_zeros(len(rows), *values.shape[1:])
                if is_own:
                    of_split[name][torch.from_numpy(batch_rows).to(device)] = values
    # Every row was ranked by one process and is zero in the others.
    return SplitRanks(**{name: values.cpu().numpy() for name, values in reduce(of_split, reduction="sum").items()})


def _logits(model, max_length: int, histories: torch.Tensor) -> torch.Tensor:
    """The model's logits, (batch, num_items + 1), for the newest `max_length` items of right-padded histories."""
    lengths = (histories != PADDING_ITEM_ID).sum(dim=1, keepdim=True)  # (batch, 1)
    newest = min(max_length, histories.shape[1])
    positions = (lengths - newest).clamp(min=0) + torch.arange(newest, device=histories.device)  # (batch, newest)
    input_ids = histories.gather(1, positions)
    if isinstance(extract_model_from_parallel(model), EncoderForNextItem):
        return model(input_ids=input_ids, only_last=True).logits
    return model(input_ids=input_ids, attention_mask=(input_ids != PADDING_ITEM_ID).long()).logits


def _rank_batch(scorer, rows: EvaluationRows, batch_rows: np.ndarray, device, is_new, top_k) -> dict[str, torch.Tensor]:
    """The fields of `SplitRanks` that apply, for the rows of a batch."""
    histories = rows.histories(batch_rows).to(device)  # (batch, longest)
    target = torch.from_numpy(rows.target[batch_rows]).to(device)  # (batch,)
    scores = scorer(histories)  # (batch, num_items + 1)
    unmasked = target_ranks(scores, target)
    ranks = {"masked": unmasked - _seen_before_target(scores, target, histories), "unmasked": unmasked}
    if rows.candidates is not None:
        candidates = torch.from_numpy(rows.candidates[batch_rows]).to(device)  # (batch, candidates)
        ranks["candidates"] = candidate_ranks(scores, candidates, target)
    if is_new is not None:
        new = is_new[target].nonzero().squeeze(1)  # rows whose target is new
        ranks["new_items"] = torch.zeros_like(unmasked)
        if len(new):
            new_scores = scores[new].masked_fill(~is_new, float("-inf"))
            ranks["new_items"][new] = target_ranks(new_scores, target[new], histories[new])
    if rows.relevant_items is not None:
        relevant_items = torch.from_numpy(rows.relevant_items[batch_rows]).to(device)  # (batch, relevant)
        ranks["relevant"] = relevant_ranks(scores, relevant_items, histories)
    if top_k is not None:
        ranks["recommended"] = recommended_items(scores, histories, top_k)
    return ranks


def ranks_from_logits(logits: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Reduce an evaluation batch to ranks: the Trainer's `preprocess_logits_for_metrics`.

    It needs `label_names=["labels", "seen_items"]`, and a config whose `keys_to_ignore_at_inference` names every
    output except the logits.

    Args:
        logits: (batch, num_items + 1).
        labels: the labels, (batch, length), ignored (-100) except for the target at the last real position, and the
            seen items, (batch, any), padded with 0. Across processes, the Trainer pads both with -100.

    Returns:
        (batch, 2) int64: the rank with the seen items masked, and without masking.

    Raises:
        ValueError: for a row without a label, and as `target_ranks`.
    """
    next_items, seen_items = labels
    target = last_labels(next_items)  # (batch,)
    unmasked = target_ranks(logits, target)
    masked = unmasked - _seen_before_target(logits, target, seen_items.clamp(min=PADDING_ITEM_ID))
    return torch.stack([masked, unmasked], dim=1)


def last_labels(labels: torch.Tensor) -> torch.Tensor:
    """The target of each row, (batch,), of labels (batch, length), -100 except at the last real position.

    Raises:
        ValueError: for a row without a label.
    """
    labelled = labels != IGNORED_LABEL  # (batch, length)
    if not labelled.any(dim=1).all():
        row = int((~labelled.any(dim=1)).nonzero()[0])
        raise ValueError(f"labels of row {row} are all {IGNORED_LABEL}: expected the target at the last real position")
    last = (labelled * torch.arange(1, labelled.shape[1] + 1, device=labelled.device)).argmax(dim=1, keepdim=True)
    return labels.gather(1, last).squeeze(1)


class RankingMetrics:
    """`compute_metrics` of a Trainer with `batch_eval_metrics=True`, fed with the ranks of `ranks_from_logits`.

    It sums over the batches of one evaluation and resets the sums with the result, so do not reuse the object after an
    evaluation that was interrupted.

    Args:
        k: cut-off of NDCG and hit ratio.

    Raises:
        ValueError: for `k` < 1.
    """

    def __init__(self, k: int = 10):
        if k < 1:
            raise ValueError(f"k is {k}: expected a cut-off of at least 1")
        self.k = k
        self._sums, self._num_users = 0.0, 0

    def __call__(self, eval_prediction, compute_result: bool = True) -> dict[str, float]:
        """Add a batch; after the last one, return the means over all batches.

        Args:
            eval_prediction: its `predictions` are (batch, 2) ranks, masked and unmasked.
            compute_result: whether this is the last batch.

        Returns:
            ndcg@k, hit_ratio@k and mrr with the seen items masked, and without masking under the prefix "unmasked_";
            an empty dictionary before the last batch.

        Raises:
            ValueError: for ranks < 1, or predictions of another shape.
        """
        ranks = torch.as_tensor(eval_prediction.predictions)
        if ranks.dim() != 2 or ranks.shape[1] != 2:
            raise ValueError(
                f"predictions have shape {tuple(ranks.shape)}: expected (batch, 2) ranks; pass "
                "preprocess_logits_for_metrics=ranks_from_logits to the Trainer"
            )
        values = torch.stack([ndcg_at(ranks, self.k), hit_at(ranks, self.k), reciprocal_rank(ranks)])  # (3, batch, 2)
        self._sums = self._sums + values.sum(dim=1)  # (3, 2)
        self._num_users += len(ranks)
        if not compute_result:
            return {}
        means = (self._sums / self._num_users).tolist()
        self._sums, self._num_users = 0.0, 0
        names = (f"ndcg@{self.k}", f"hit_ratio@{self.k}", "mrr")
        return {
            prefix + name: means[row][column]
            for column, prefix in enumerate(("", "unmasked_"))
            for row, name in enumerate(names)
        }
