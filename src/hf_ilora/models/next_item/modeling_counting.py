"""Recommenders that only count, with the interface of SASRec: baselines that need no training."""

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from .configuration_counting import PopularityConfig, TransitionCountsConfig
from .configuration_next_item import PADDING_ITEM_ID, catalogue_size, check_config
from .next_item_model import NextItemPreTrainedModel
from .next_item_output import NextItemOutput
from .top_k import columns_in_chunk


class CountingPreTrainedModel(NextItemPreTrainedModel):
    """A recommender without parameters: its counts are buffers, which define its device and dtype."""

    def __init__(self, config: PopularityConfig | TransitionCountsConfig):
        check_config(config, self.config_class)
        super().__init__(config)
        self.register_buffer("item_counts", torch.zeros(catalogue_size(config) + 1))

    def log_probabilities(self, best_scores: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """log p as in `NextItemPreTrainedModel`, where p is an item's share of all scores, since these are not logits.

        An item that was never counted gets the smallest normal float32 as p, so that its log is finite.
        """
        smallest = torch.finfo(torch.float32).tiny
        total = scores[:, 1:].float().sum(-1, keepdim=True).clamp(min=smallest)  # (batch, 1)
        return (best_scores.float() / total).clamp(min=smallest).log()

    knows_popular_items = True

    def popular_scores(self) -> torch.Tensor:
        """(num_items + 1,) the counts of the items, -inf for padding."""
        scores = self.item_counts.clone()
        scores[PADDING_ITEM_ID] = float("-inf")
        return scores

    @property
    def device(self) -> torch.device:
        return self.item_counts.device

    @property
    def dtype(self) -> torch.dtype:
        return self.item_counts.dtype


class PopularityForNextItem(CountingPreTrainedModel):
    """Scores every item by its number of occurrences in the training rows.

    Args:
        config: size of the catalogue. All counts are 0; `fit` builds a model with counts.
    """

    config: PopularityConfig

    def __init__(self, config: PopularityConfig):
        super().__init__(config)
        self.post_init()

    @classmethod
    def fit(
        cls, sequences: Iterable[Sequence[int]], config: PopularityConfig, *, targets_only: bool = False
    ) -> "PopularityForNextItem":
        """Count the items of the training rows.

        Args:
            sequences: one per training row, oldest item first, the row's target last.
            config: size of the catalogue.
            targets_only: count only the last item of each row, for data whose rows are all prefixes of a history.

        Raises:
            ValueError: for an empty row, no rows at all, or ids outside 1..num_items.
        """
        num_items = catalogue_size(config)
        items, row_ends = _flatten(sequences, num_items)
        model = cls(config)
        model.item_counts.copy_(_item_counts(items, row_ends, num_items, targets_only))
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> NextItemOutput:
        """The same scores for every history.

        Args:
            input_ids: (batch, length) item ids, 0 for padding on either side; any length.
            attention_mask: (batch, length); ignored.
            labels: (batch, length); ignored, since there is nothing to train.

        Returns:
            logits: (batch, num_items + 1), -inf for padding; a view of one row, expanded to the batch.

        Raises:
            ValueError: on a CPU, for ids outside the catalogue.
        """
        self.check_item_ids(input_ids)
        return NextItemOutput(logits=self.next_item_scores(input_ids))

    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of `forward`, (batch, num_items + 1), without a check of the ids."""
        return self.popular_scores().expand(input_ids.shape[0], -1)


class TransitionCountsForNextItem(CountingPreTrainedModel):
    """Scores items by how often they followed, a few steps later, the newest items of the history.

        C[i, j]  = sum of gap_decay ** (g - 1) over pairs "i, then g <= max_gap steps later j" of the training rows
                   + backward_weight times the same sum over pairs "j, then i"
        W[i, j]  = C[i, j] / (sum_j C[i, j]) ** source_power / popularity(j) ** target_power
        score(j) = sum over the newest max_length items h_m, m = 0 the newest, of history_decay ** m * W[h_m, j]
                   + popularity_weight * popularity(j) / largest popularity

    Only pairs that occur are stored, row after row: `transition_targets` and `transition_weights` contain the items j
    and W[i, j] of item i at positions `transition_starts[i]` to `transition_starts[i + 1]`.

    Args:
        config: hyper-parameters and sizes. All counts are 0; `fit` builds a model with counts.
    """

    config: TransitionCountsConfig

    def __init__(self, config: TransitionCountsConfig):
        super().__init__(config)
        self.register_buffer("transition_weights", torch.zeros(config.num_transitions))
        self.register_buffer("transition_targets", torch.zeros(config.num_transitions, dtype=torch.int32))
        self.register_buffer("transition_starts", torch.zeros(catalogue_size(config) + 2, dtype=torch.int64))
        self.post_init()

    @classmethod
    def fit(
        cls, sequences: Iterable[Sequence[int]], config: TransitionCountsConfig, *, targets_only: bool = False
    ) -> "TransitionCountsForNextItem":
        """Count the transitions of the training rows.

        Args:
            sequences: one per training row, oldest item first, the row's target last.
            config: hyper-parameters. The model gets a copy with `num_transitions` set to the number of pairs found.
            targets_only: count only pairs whose later item is the last of its row, for data whose rows are all
                prefixes of a history, in which all other pairs occur several times.

        Raises:
            ValueError: for an empty row, no rows at all, or ids outside 1..num_items.
        """
        num_items = catalogue_size(config)
        items, row_ends = _flatten(sequences, num_items)
        item_counts = _item_counts(items, row_ends, num_items, targets_only)
        sources, targets, weights = _count_transitions(items, row_ends, config, targets_only)
        weights = _normalised(sources, targets, weights, item_counts.numpy(), config)
        config = copy.deepcopy(config)
        config.num_transitions = len(weights)
        model = cls(config)
        model.item_counts.copy_(item_counts)
        model.transition_weights.copy_(torch.from_numpy(weights))
        model.transition_targets.copy_(torch.from_numpy(targets))
        model.transition_starts.copy_(torch.from_numpy(np.searchsorted(sources, np.arange(num_items + 2))))
        return model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> NextItemOutput:
        """Score the next item of each history.

        Args:
            input_ids: (batch, length) item ids, 0 for padding on either side; any length.
            attention_mask: (batch, length), 0 at padding; None means `input_ids != 0`.
            labels: (batch, length); ignored, since there is nothing to train.

        Returns:
            logits: (batch, num_items + 1), -inf for padding.

        Raises:
            ValueError: on a CPU, for ids outside the catalogue.
        """
        self.check_item_ids(input_ids)
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, PADDING_ITEM_ID)
        return NextItemOutput(logits=self.next_item_scores(input_ids))

    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of `forward`, (batch, num_items + 1), without a check of the ids."""
        scores = self.weighted_popularity().repeat(input_ids.shape[0], 1)  # (batch, num_items + 1)
        if torch.compiler.is_compiling():
            scores = scores + self._dense_transition_scores(input_ids)
        else:
            self._add_transitions(scores, *self._newest_real_items(input_ids))
        scores[:, PADDING_ITEM_ID] = float("-inf")
        return scores

    def weighted_popularity(self) -> torch.Tensor:
        """(num_items + 1,) popularity_weight * popularity / largest popularity."""
        return self.item_counts * (self.config.popularity_weight / self.item_counts.max().clamp(min=1))

    def _similarities(self, asked: torch.Tensor) -> Callable[[slice, slice, torch.Tensor], None]:
        # Items that never followed have no weight. Popularity orders them, scaled far below any weight.
        smallest = (self.item_counts * (1e-30 / self.item_counts.max().clamp(min=1))).float()

        def score_items(rows: slice, items: slice, scores: torch.Tensor) -> None:
            scores.copy_(smallest[items].expand_as(scores))
            source, stored = self.stored_transitions(asked[rows])  # (pairs,) each
            columns, inside = columns_in_chunk(self.transition_targets[stored], items)
            weights = self.transition_weights[stored].to(scores) * inside
            scores.index_put_((source, columns), weights, accumulate=True)

        return score_items

    def _add_transitions(
        self, scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, item_weights: torch.Tensor
    ) -> None:
        """Add the transitions of `items` (sources,), times `item_weights`, to `rows` (sources,) of scores, in place."""
        source, stored = self.stored_transitions(items)  # (pairs,) each
        columns = self.transition_targets[stored] + (rows * scores.shape[1])[source]
        weights = self.transition_weights[stored] * item_weights[source]
        scores.view(-1).index_add_(0, columns, weights.to(scores))

    def stored_transitions(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the stored transitions that start at `items` (sources,).

        Returns:
            For each transition the index of its source in `items`, and its index in `transition_targets`: (pairs,)
            each.
        """
        starts = self.transition_starts[items]
        lengths = self.transition_starts[items + 1] - starts  # (sources,)
        source = torch.arange(len(items), device=items.device).repeat_interleave(lengths)  # (pairs,)
        # The pairs of all sources are concatenated: those of source s begin at `begins[s]`.
        begins = lengths.cumsum(0) - lengths
        return source, torch.arange(len(source), device=items.device) + (starts - begins)[source]

    def _dense_transition_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, num_items + 1) from all stored transitions: slower, but in the static shapes that a graph needs."""
        is_read, age = self._newest(input_ids)
        weights = is_read * self.config.history_decay ** age.to(self.dtype)  # (batch, length)
        per_item = weights.new_zeros(input_ids.shape[0], len(self.item_counts))
        per_item = per_item.scatter_add(1, input_ids.long(), weights)  # (batch, num_items + 1)
        ends = self.transition_starts[1:]
        is_end = ends.new_zeros(self.config.num_transitions + 1).index_add(0, ends, torch.ones_like(ends))
        sources = is_end.cumsum(0)[:-1]  # (transitions,): an item's transitions begin where the last item's end
        stored = per_item[:, sources] * self.transition_weights  # (batch, transitions)
        return torch.zeros_like(per_item).index_add(1, self.transition_targets, stored)

    def _newest(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each item is among the newest `max_length`, and its age, 0 for the newest: (batch, length) each."""
        real = input_ids.ne(PADDING_ITEM_ID)
        age = real.flip(1).cumsum(1).flip(1) - 1
        return real & (age < self.config.max_length), age

    def _newest_real_items(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, item id and weight of each row's newest `max_length` items: (sources,) each."""
        is_read, age = self._newest(input_ids)
        users, positions = is_read.nonzero(as_tuple=True)
        weights = self.config.history_decay ** age[users, positions].to(self.dtype)
        return users, input_ids[users, positions].long(), weights


def _flatten(sequences: Iterable[Sequence[int]], num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Concatenate the rows: items (total,), and the index after each row's last item (rows,)."""
    try:
        rows = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the training rows are not rows of item ids ({error}): expected one per history, such as [[3, 1], [7, 4]]"
        ) from error
    if not rows:
        raise ValueError("there are no training rows: expected at least one history with its target")
    wrong = next((number for number, row in enumerate(rows) if row.ndim != 1), None)
    if wrong is not None:
        raise ValueError(
            f"training row {wrong} has shape {rows[wrong].shape}: expected the item ids of a history, such as [3, 1]"
        )
    lengths = np.array([len(row) for row in rows])
    if (lengths == 0).any():
        raise ValueError(f"training row {int(lengths.argmin())} is empty: expected at least one item; drop such rows")
    items = np.concatenate(rows)
    if items.min() < 1 or items.max() > num_items:
        wrong = items.min() if items.min() < 1 else items.max()
        raise ValueError(
            f"training rows contain item {wrong}: expected ids 1..{num_items}; fit on the data set whose catalogue "
            "has that size, without padding"
        )
    return items, lengths.cumsum()


def _item_counts(items: np.ndarray, row_ends: np.ndarray, num_items: int, targets_only: bool) -> torch.Tensor:
    counted = items[row_ends - 1] if targets_only else items
    return torch.from_numpy(np.bincount(counted, minlength=num_items + 1).astype(np.float32))


def _count_transitions(
    items: np.ndarray, row_ends: np.ndarray, config: TransitionCountsConfig, targets_only: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C as sources, targets and counts of the pairs that occur, sorted by source, then target: (pairs,) each."""
    rows = np.repeat(np.arange(len(row_ends)), np.diff(row_ends, prepend=0))  # (total,)
    is_last = np.zeros(len(items), dtype=bool)
    is_last[row_ends - 1] = True
    base = catalogue_size(config) + 1  # a pair is the number source * base + target
    pairs, counts = np.empty(0, dtype=np.int64), np.empty(0)
    for gap in range(1, config.max_gap + 1):
        counted = rows[:-gap] == rows[gap:]
        if targets_only:
            counted &= is_last[gap:]
        found = items[:-gap][counted] * base + items[gap:][counted]
        # One gap at a time, so that memory grows with the number of distinct pairs, not of all occurrences.
        pairs, counts = _sum_by_pair(pairs, counts, found, np.full(len(found), config.gap_decay ** (gap - 1)))
    if config.backward_weight:
        reversed_pairs = pairs % base * base + pairs // base
        pairs, counts = _sum_by_pair(pairs, counts, reversed_pairs, counts * config.backward_weight)
    return pairs // base, (pairs % base).astype(np.int32), counts


def _sum_by_pair(
    pairs: np.ndarray, counts: np.ndarray, more_pairs: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    pairs, counts = np.concatenate([pairs, more_pairs]), np.concatenate([counts, more_counts])
    if not len(pairs):
        return pairs, counts
    order = np.argsort(pairs)
    pairs = pairs[order]
    firsts = np.flatnonzero(np.diff(pairs, prepend=-1))
    return pairs[firsts], np.add.reduceat(counts[order], firsts)


def _normalised(
    sources: np.ndarray,
    targets: np.ndarray,
    counts: np.ndarray,
    item_counts: np.ndarray,
    config: TransitionCountsConfig,
) -> np.ndarray:
    """W of the pairs, (pairs,) float32."""
    source_totals = np.bincount(sources, weights=counts, minlength=len(item_counts))
    # With `targets_only`, an item of a pair may never be a target; it then counts as a target once.
    popularity = np.maximum(item_counts.astype(np.float64), 1)
    weights = counts / source_totals[sources] ** config.source_power / popularity[targets] ** config.target_power
    return weights.astype(np.float32)


PopularityForNextItem.register_for_auto_class("AutoModel")
TransitionCountsForNextItem.register_for_auto_class("AutoModel")

__all__ = ["PopularityForNextItem", "TransitionCountsForNextItem"]
