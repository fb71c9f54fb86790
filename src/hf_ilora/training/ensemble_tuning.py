"""Weights of an ensemble of teachers, by how well mixtures of their scores rank the targets of an evaluation split."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch

from hf_ilora.distillation.ensemble_members import LabelScores, Positions
from hf_ilora.evaluation.evaluation_rows import EvaluationRows
from hf_ilora.evaluation.rank_metrics import hit_at, ndcg_at
from hf_ilora.evaluation.ranking import SplitRanks, target_ranks
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.histories import check_batch_size
from hf_ilora.models.next_item.next_item_losses import Columns
from hf_ilora.models.next_item.next_item_model import newest_items

logger = logging.getLogger(__name__)

METRICS_CUTOFF = 10  # of NDCG and hit ratio
_SECONDS_BETWEEN_REPORTS = 10
# Largest number of scores of one member in a batch: 32 MB, and ten times that for transition counts.
_SCORES_AT_ONCE = 1 << 23

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """Weights of the members' scores, and the quality of the weighted sum on some rows, seen items masked."""

    weights: Weights
    ndcg: float
    hit_ratio: float


class MixtureRanking:
    """Ranks the targets of evaluation rows by weighted sums of the scores of several members.

    Every batch is scored once per call, whatever the number of mixtures, and reduced to ranks before the next one:
    memory does not grow with the number of rows.

    Args:
        members: members of an ensemble, on `device`, with the same catalogue. Stored labels are about `split`.
        split: rows with history and target.
        row_ids: (rows,) the rows of `split` to rank.
        batch_size: rows per step; fewer for large catalogues.
        device: where to score.
    """

    def __init__(
        self,
        members: Sequence[torch.nn.Module],
        split: datasets.Dataset,
        row_ids: np.ndarray,
        batch_size: int = 256,
        device: torch.device | str = "cpu",
    ):
        check_batch_size(batch_size)
        self.members, self.row_ids, self.device = members, row_ids, torch.device(device)
        self.num_items = members[0].num_items
        self.rows = EvaluationRows(split.select(row_ids), self.num_items)
        self.batch_size = max(1, min(batch_size, _SCORES_AT_ONCE // self.num_items))
        self.max_length = min((each.max_length for each in members if each.max_length is not None), default=None)

    @torch.inference_mode()
    def __call__(self, candidates: Sequence[Weights]) -> list[Mixture]:
        """The quality of every candidate, in one pass over the rows."""
        sums = torch.zeros(len(candidates), 2, dtype=torch.float64)  # of NDCG and hits
        order = self.rows.by_length()
        begin = reported = time.monotonic()
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            for place, ranks in enumerate(self._ranks(batch, candidates)):
                sums[place, 0] += ndcg_at(ranks, METRICS_CUTOFF).sum()
                sums[place, 1] += hit_at(ranks, METRICS_CUTOFF).sum()
            now, done = time.monotonic(), first + len(batch)
            if now - reported > _SECONDS_BETWEEN_REPORTS:
                reported = now
                left = (now - begin) / done * (len(order) - done)
                logger.info("%d mixtures: %d of %d rows, %.0f s left", len(candidates), done, len(order), left)
        means = (sums / len(order)).tolist()
        return [Mixture(tuple(weights), *mean) for weights, mean in zip(candidates, means, strict=True)]

    @torch.inference_mode()
    def ranks(self, weights: Weights) -> SplitRanks:
        """The rank of every row's target by one mixture, in the order of `row_ids`."""
        masked, unmasked = (np.zeros(len(self.rows), dtype=np.int64) for _ in range(2))
        for batch in np.split(self.rows.by_length(), range(self.batch_size, len(self.rows), self.batch_size)):
            histories, target = self._read(batch)
            (total,) = self._mixed(self._scores(batch, histories), [weights])
            unmasked[batch] = target_ranks(total, target).cpu().numpy()
            masked[batch] = target_ranks(total, target, histories).cpu().numpy()
        return SplitRanks(masked, unmasked)

    def _ranks(self, batch: np.ndarray, candidates: Sequence[Weights]):
        """For each candidate, the ranks (rows,) of some rows' targets without their seen items."""
        histories, target = self._read(batch)
        seen = histories.masked_fill(histories == target.unsqueeze(1), PADDING_ITEM_ID)
        for total in self._mixed(self._scores(batch, histories), candidates):
            total.scatter_(1, seen, float("-inf"))
            yield target_ranks(total, target)

    def _read(self, batch: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Histories (rows, longest) and targets (rows,) of some rows."""
        return self.rows.histories(batch).to(self.device), torch.from_numpy(self.rows.target[batch]).to(self.device)

    def _mixed(self, scores: list[torch.Tensor], candidates: Sequence[Weights]) -> Iterator[torch.Tensor]:
        """(rows, num_items + 1) weighted sums, in the same memory for each candidate."""
        total = torch.zeros(len(scores[0]), self.num_items + 1, device=self.device)
        mixed = total[:, PADDING_ITEM_ID + 1 :]
        for weights in candidates:
            mixed.zero_()
            for part, weight in zip(scores, weights, strict=True):
                if weight:
                    mixed.add_(part, alpha=weight)
            yield total

    def _scores(self, batch: np.ndarray, histories: torch.Tensor) -> list[torch.Tensor]:
        """(rows, num_items) of each member."""
        read = histories if self.max_length is None else newest_items(histories, self.max_length)
        items = torch.arange(1, self.num_items + 1, device=self.device)
        columns, scores = Columns(items, self.num_items), []
        for member in self.members:
            labels = None
            if isinstance(member, LabelScores):
                found = member.labels.lookup(self.row_ids[batch], self.rows.lengths[batch])
                labels = tuple(values.to(self.device) for values in found)  # (rows, k) each
            opinion = member.at(Positions.last_of_batch(read, labels))
            scores.append(opinion.about(items, columns)(slice(0, len(batch))).float())
        return scores


def tune_weights(
    measure: Callable[[Sequence[Weights]], list[Mixture]], num_members: int, grid: Sequence[float], max_rounds: int
) -> tuple[Mixture, list[Mixture]]:
    """Search the weights with the best NDCG, one weight at a time, until a whole round brings no improvement.

    The first member has weight 1. The others begin at 0 and take the value of the grid with the best NDCG, the smallest
    of equally good ones, so a member that does not help ends at 0.

    Args:
        measure: returns the quality of mixtures, such as a `MixtureRanking`.
        num_members: at least 2.
        grid: weights to try; 0 is tried too.
        max_rounds: largest number of rounds through the members.

    Returns:
        The best mixture, and all that were tried, each once: first the members alone, and also the best mixture without
        each member.
    """
    grid = sorted({0.0, *map(float, grid)})
    tried: dict[Weights, Mixture] = {}

    def try_all(candidates: Sequence[Weights]) -> None:
        new = [weights for weights in candidates if weights not in tried]
        if new:
            tried.update(zip(new, measure(new), strict=True))

    alone = [tuple(float(member == other) for other in range(num_members)) for member in range(num_members)]
    try_all(alone)
    best = alone[0]
    for number in range(1, max_rounds + 1):
        before = best
        for member in range(1, num_members):
            candidates = [(*best[:member], weight, *best[member + 1 :]) for weight in grid]
            try_all(candidates)
            best = max(candidates, key=lambda weights: tried[weights].ndcg)
            logger.info("round %d, weight of member %d: NDCG@10 %.4f at weights %s",
                        number, member + 1, tried[best].ndcg, ", ".join(f"{weight:g}" for weight in best))  # fmt: skip
        if best == before:
            break
    without = [(*best[:member], 0.0, *best[member + 1 :]) for member in range(num_members)]
    try_all([weights for weights in without if any(weights)])
    return tried[best], list(tried.values())


__all__ = ["Mixture", "MixtureRanking", "Weights", "tune_weights"]
