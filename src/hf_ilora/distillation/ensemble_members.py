"""The members of an ensemble of teachers, each of which scores the next item at every position of a batch.

A member's `at(positions)` returns its opinion about those positions, an object with two methods:

    about(items, columns)   -> a function that takes a slice of the positions and returns their scores (slice, items)
    of_targets(targets)     -> (positions,), the score of one item at each position

`items` (items,) are item ids, `columns` are the `Columns` of these items, and `targets` (positions,) are item ids.
Scores are logits without gradients. No tensor (positions, items) is ever built for the whole batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID, catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem
from hf_ilora.models.next_item.next_item_losses import Columns
from hf_ilora.models.next_item.padding import padding_to_the_end, places_behind_padding

# Items of a history that weigh less than this, relative to the newest one, are not read.
_SMALLEST_DECAY = 1e-3

Labels = tuple[torch.Tensor, torch.Tensor]  # items and distances, (positions, k) each


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that teachers are asked about.

    Args:
        item_ids: (batch, length), padding last.
        lengths: (batch,), number of real items in each row.
        places: (positions,), indices into the flattened `item_ids` (batch * length). A teacher reads the items up to
            and including this one and scores the next one.
        labels: items (positions, k) and distances (positions, k) from `TeacherLabels`; items are 0 where there is no
            label.
    """

    item_ids: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    labels: Labels | None = None

    @classmethod
    def of_batch(cls, input_ids: torch.Tensor, indices: torch.Tensor, labels: Labels | None = None) -> "Positions":
        """The positions at `indices` in the flattened `input_ids` (batch, length), which may be padded on either side.

        `labels` has a row per index.
        """
        real, order, slots = padding_to_the_end(input_ids, None)
        return cls(input_ids.gather(1, order), real.sum(1), places_behind_padding(slots, indices), labels)

    @classmethod
    def last_of_batch(cls, input_ids: torch.Tensor, labels: Labels | None = None) -> "Positions":
        """The position of each row's newest item in `input_ids` (batch, length), which may be padded on either side."""
        positions = cls.of_batch(input_ids, input_ids.new_zeros(0, dtype=torch.int64), labels)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return replace(positions, places=(positions.lengths - 1).clamp(min=0) + input_ids.shape[1] * rows)

    def newest(self, count: int) -> torch.Tensor:
        """(positions, count) item ids, the newest first, 0 where a history is shorter."""
        length = self.item_ids.shape[1]
        columns = (self.places % length).unsqueeze(1) - torch.arange(count, device=self.places.device)
        rows = (self.places // length).unsqueeze(1)
        return self.item_ids[rows, columns.clamp(min=0)] * (columns >= 0)


class _DotProductOpinion:
    """Scores items by the dot product of a position's state and the item's vector, plus a bias per item.

    Args:
        states: (positions, size).
        vectors_of: function from item ids (any,) to their vectors (any, size).
        bias: (num_items + 1,) or None.
        raised: item ids (positions, length), 0 for padding, and a number to add to their scores; or None.
    """

    def __init__(
        self,
        states: torch.Tensor,
        vectors_of: Callable[[torch.Tensor], torch.Tensor],
        bias: torch.Tensor | None = None,
        raised: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.states, self.vectors_of, self.bias, self.raised = states, vectors_of, bias, raised

    def about(self, items: torch.Tensor, columns: Columns) -> Callable[[slice], torch.Tensor]:
        vectors, bias = self.vectors_of(items), None if self.bias is None else self.bias[items]

        def scores(chunk: slice) -> torch.Tensor:
            products = F.linear(self.states[chunk], vectors, bias)
            if self.raised is not None:
                seen, by = self.raised
                products += columns.filled(seen[chunk], by.to(products).expand(seen[chunk].shape), 0.0)
            return products

        return scores

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        scores = (self.states * self.vectors_of(targets)).sum(1)
        if self.bias is not None:
            scores = scores + self.bias[targets]
        if self.raised is not None:
            seen, by = self.raised
            scores = scores + by * seen.eq(targets.unsqueeze(1)).any(1)
        return scores


class RecommenderScores(nn.Module):
    """The scores of a trained SASRec or GRU4Rec.

    Args:
        model: the recommender.

    Raises:
        ValueError: for a model that does not score every position.
    """

    def __init__(self, model: EncoderForNextItem):
        super().__init__()
        if not isinstance(model, EncoderForNextItem) or isinstance(model, CaserForNextItem):
            raise ValueError(
                f"a member of the ensemble is a {type(model).__name__}: expected a model that scores the next item at "
                "every position at little cost (SASRec, GRU4Rec, counts or popularity), title similarity, or labels; "
                "ask others with `hf-ilora label` and pass the labels"
            )
        self.model, self.num_items, self.max_length = model, catalogue_size(model.config), model.config.max_length

    def at(self, positions: Positions) -> _DotProductOpinion:
        head, item_ids = self.model.head, positions.item_ids
        hidden_states = self.model.model.encode(item_ids, positions.lengths)
        states, seen = self.model.states_at(hidden_states, item_ids, positions.places)
        raised = None if seen is None or head.repeat_bias is None else (seen, head.repeat_bias)
        offsets = self.model._item_offsets()
        return _DotProductOpinion(head.scaled(states), lambda items: head.item_rows(items, offsets), head.bias, raised)


class TitleSimilarity(nn.Module):
    """How similar an item's title is to the titles of the history: the cosine of whitened title vectors.

    A history's vector is the weighted average of its titles' vectors, scaled to length 1. The newest item weighs 1, the
    m-th newest decay ** (m - 1).

    Args:
        title_embeddings: (num_items + 1, size), row 0 for padding, as `whitened` returns them; rows are scaled to
            length 1.
        decay: weight of an item relative to the next newer one.

    Raises:
        ValueError: for another shape, numbers that are not finite, title embeddings that are all zero, or a decay
            outside [0, 1].
    """

    max_length = None
    table: torch.Tensor

    def __init__(self, title_embeddings: torch.Tensor, decay: float = 0.6):
        super().__init__()
        if title_embeddings.dim() != 2 or len(title_embeddings) < 2:
            raise ValueError(
                f"title_embeddings have shape {tuple(title_embeddings.shape)}: expected (num_items + 1, size), row 0 "
                "for padding"
            )
        if not torch.isfinite(title_embeddings).all():
            item = int((~torch.isfinite(title_embeddings)).any(1).nonzero()[0])
            raise ValueError(f"the title embedding of item {item} contains NaN or inf: expected finite numbers")
        if not title_embeddings[1:].any():
            raise ValueError("all title embeddings are zero: expected different titles")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}: expected a number in [0, 1]")
        table = F.normalize(title_embeddings.float(), dim=1)
        table[PADDING_ITEM_ID] = 0
        self.register_buffer("table", table)
        self.decay, self.num_items = decay, len(title_embeddings) - 1

    def rows(self, item_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(item_ids, self.table)

    def at(self, positions: Positions) -> _DotProductOpinion:
        length = positions.item_ids.shape[1]
        places = torch.arange(length, device=self.table.device)
        age = places.unsqueeze(1) - places  # (length, length)
        weights = (self.decay ** age.clamp(min=0).to(self.table.dtype)).tril()
        averages = weights @ self.rows(positions.item_ids)  # (batch, length, size)
        return _DotProductOpinion(F.normalize(averages.flatten(0, 1)[positions.places], dim=1), self.rows)

    def neighbours_of(self, targets: torch.Tensor, temperature: float) -> _DotProductOpinion:
        """An opinion that scores items by how similar their titles are to those of `targets` (positions,)."""
        return _DotProductOpinion(self.rows(targets) / temperature, self.rows)


class LogCounts(nn.Module):
    """log(score + floor) of transition counts or popularity, whose scores are numbers of occurrences.

    Args:
        model: a fitted counting model.
        floor: added to every score, so that an item that never occurred scores log(floor).

    Raises:
        ValueError: for a floor that is not positive.
    """

    max_length = None
    popularity: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, model: TransitionCountsForNextItem | PopularityForNextItem, floor: float = 0.01):
        super().__init__()
        if not 0 < floor < math.inf:
            raise ValueError(f"floor is {floor}: expected a positive number, whose logarithm is finite")
        self.model, self.floor, self.num_items = model, floor, catalogue_size(model.config)
        config = model.config
        if isinstance(model, PopularityForNextItem):
            self.num_read, popularity = 0, model.item_counts
            sources = targets = torch.zeros(0, dtype=torch.int64)
        else:
            self.num_read = config.max_length
            if config.history_decay < 1:
                num_heavy = math.ceil(math.log(_SMALLEST_DECAY) / math.log(config.history_decay))
                self.num_read = min(self.num_read, num_heavy)
            popularity = model.weighted_popularity()
            lengths = model.transition_starts[1:] - model.transition_starts[:-1]
            sources = torch.arange(len(lengths)).repeat_interleave(lengths.cpu())
            targets = model.transition_targets.cpu().long()
        self.register_buffer("popularity", popularity)
        # The number of a pair is source * (num_items + 1) + target. The model stores pairs in ascending order.
        self.register_buffer("pairs", sources * (self.num_items + 1) + targets)

    def at(self, positions: Positions) -> "_LogCountsOpinion":
        return _LogCountsOpinion(self, positions)

    def logarithm(self, scores: torch.Tensor) -> torch.Tensor:
        """log(scores + floor), in place."""
        return scores.add_(self.floor).log_()


class _LogCountsOpinion:
    def __init__(self, member: LogCounts, positions: Positions):
        self.member, self.model, self.places = member, member.model, positions.places
        if not member.num_read:
            return
        self.read = positions.newest(member.num_read)  # (positions, read)
        ages = torch.arange(member.num_read, device=self.read.device)  # (read,)
        weights = self.model.config.history_decay ** ages.float()
        self.weights = weights.repeat(len(self.read), 1)  # (positions, read); padding has no transitions to weigh

    def about(self, items: torch.Tensor, columns: Columns) -> Callable[[slice], torch.Tensor]:
        member, popularity = self.member, self.member.popularity[items]
        if not member.num_read:
            return lambda chunk: member.logarithm(popularity.repeat(len(self.places[chunk]), 1))
        sources, rows = self.read.unique(return_inverse=True)
        transitions = self._dense(sources, columns)  # (sources, items)

        def scores(chunk: slice) -> torch.Tensor:
            sums = F.embedding_bag(rows[chunk], transitions, mode="sum", per_sample_weights=self.weights[chunk])
            return member.logarithm(sums + popularity)

        return scores

    def _dense(self, sources: torch.Tensor, columns: Columns) -> torch.Tensor:
        """(sources, items), the weights of the transitions from `sources` to the items of the columns."""
        rows, stored = self.model.stored_transitions(sources)  # (pairs,) each
        targets, weights = self.model.transition_targets[stored].long(), self.model.transition_weights[stored]
        return columns.dense(rows, targets, weights, len(sources))

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        scores = self.member.popularity[targets]
        if self.member.num_read and len(self.member.pairs):
            pairs = self.read * (self.member.num_items + 1) + targets.unsqueeze(1)  # (positions, read)
            places = torch.searchsorted(self.member.pairs, pairs).clamp(max=len(self.member.pairs) - 1)
            found = self.member.pairs[places].eq(pairs)
            scores = scores + (self.model.transition_weights[places] * found * self.weights).sum(1)
        return self.member.logarithm(scores)


class LabelScores(nn.Module):
    """Stored labels of a teacher that is too slow to be asked online.

    The teacher's best items score log p. All other items share the rest of the probability equally. At positions
    without a label, all items score 0.

    Args:
        labels: the teacher's answers about the training split.
    """

    max_length = None

    def __init__(self, labels: TeacherLabels):
        super().__init__()
        self.labels, self.num_items = labels, labels.num_items

    def at(self, positions: Positions) -> "_LabelOpinion":
        if positions.labels is None:
            raise ValueError(
                "an ensemble with stored labels was given a batch without labels: expected batches of "
                "DistillationTrainer, since labels are about the training rows only"
            )
        return _LabelOpinion(self, *positions.labels)


class _LabelOpinion:
    def __init__(self, member: LabelScores, items: torch.Tensor, distances: torch.Tensor):
        self.items, self.is_item = items, items.ne(PADDING_ITEM_ID)
        self.scores = -distances.float()  # (positions, k)
        mass = (self.scores.exp() * self.is_item).sum(1, keepdim=True)  # (positions, 1)
        others = (member.num_items - self.is_item.sum(1, keepdim=True)).clamp(min=1)
        rest = ((1 - mass).clamp(min=1e-6) / others).log()
        # Other programs' distances may not be -log p. Items without a label never score above those with one.
        lowest = self.scores.masked_fill(~self.is_item, math.inf).amin(1, keepdim=True)
        self.rest = torch.minimum(rest, lowest).masked_fill(~self.is_item.any(1, keepdim=True), 0.0)

    def about(self, items: torch.Tensor, columns: Columns) -> Callable[[slice], torch.Tensor]:
        return lambda chunk: columns.filled(self.items[chunk], self.scores[chunk], self.rest[chunk])

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        found = self.items.eq(targets.unsqueeze(1)) & self.is_item  # (positions, k)
        return torch.where(found.any(1), (self.scores * found).sum(1), self.rest.squeeze(1))


__all__ = ["LabelScores", "LogCounts", "Positions", "RecommenderScores", "TitleSimilarity"]
