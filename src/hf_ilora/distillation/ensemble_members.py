"""The members of an ensemble of teachers: what each says about the next item at every position of a batch.

A member's `at(positions)` returns its opinion of those positions, which has

    about(items, columns)   -> a function of a slice of the positions, returning scores (its positions, items)
    of_targets(targets)     -> (positions,), the score of one item at each position

where `items` (items,) are item ids, `columns` the `Columns` of the same, and `targets` (positions,) item ids. Scores
are logits. Nothing has a gradient, and no tensor (positions, items) of the whole batch is ever made.
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

# A history's older items weigh less than this beside its newest one, and are not read.
_SMALLEST_DECAY = 1e-3

Labels = tuple[torch.Tensor, torch.Tensor]  # items and distances, (positions, k) each


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that teachers are asked about.

    Args:
        item_ids: (batch, length), padding last.
        lengths: (batch,), real items of each row.
        places: (positions,), indices in the flattened (batch * length) of `item_ids`: a teacher reads the items up to
            and including this one, and says what follows.
        labels: of `TeacherLabels`, the items (positions, k), 0 where there is no label, and distances (positions, k).
    """

    item_ids: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    labels: Labels | None = None

    @classmethod
    def of_batch(cls, input_ids: torch.Tensor, indices: torch.Tensor, labels: Labels | None = None) -> "Positions":
        """Of a batch (batch, length) with padding on either side, and indices in its flattened form."""
        real, order, slots = padding_to_the_end(input_ids, None)
        return cls(input_ids.gather(1, order), real.sum(1), places_behind_padding(slots, indices), labels)

    @classmethod
    def last_of_batch(cls, input_ids: torch.Tensor, labels: Labels | None = None) -> "Positions":
        """The newest item of each row of a batch (batch, length) with padding on either side."""
        positions = cls.of_batch(input_ids, input_ids.new_zeros(0, dtype=torch.int64), labels)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return replace(positions, places=(positions.lengths - 1).clamp(min=0) + input_ids.shape[1] * rows)

    def newest(self, count: int) -> torch.Tensor:
        """(positions, count) item ids, the newest first, 0 where a history is shorter."""
        length = self.item_ids.shape[1]
        columns = (self.places % length).unsqueeze(1) - torch.arange(count, device=self.places.device)
        rows = (self.places // length).unsqueeze(1)
        return self.item_ids[rows, columns.clamp(min=0)] * (columns >= 0)


class _DotProducts:
    """An opinion that is a product of states and rows of a table, plus a bias of each item.

    Args:
        states: (positions, size).
        rows_of: item ids (any,) -> their rows (any, size).
        bias: (num_items + 1,) or None.
        raised: item ids (positions, length), 0 for padding, and a number that is added to their scores; or None.
    """

    def __init__(
        self,
        states: torch.Tensor,
        rows_of: Callable[[torch.Tensor], torch.Tensor],
        bias: torch.Tensor | None = None,
        raised: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        self.states, self.rows_of, self.bias, self.raised = states, rows_of, bias, raised

    def about(self, items: torch.Tensor, columns: Columns) -> Callable[[slice], torch.Tensor]:
        rows, bias = self.rows_of(items), None if self.bias is None else self.bias[items]

        def scores(chunk: slice) -> torch.Tensor:
            products = F.linear(self.states[chunk], rows, bias)
            if self.raised is not None:
                seen, by = self.raised
                products += columns.filled(seen[chunk], by.to(products).expand(seen[chunk].shape), 0.0)
            return products

        return scores

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        scores = (self.states * self.rows_of(targets)).sum(1)
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
        ValueError: for a model that has no scores at every position.
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

    def at(self, positions: Positions) -> _DotProducts:
        head, item_ids = self.model.head, positions.item_ids
        hidden_states = self.model.model.encode(item_ids, positions.lengths)
        states, seen = self.model.states_at(hidden_states, item_ids, positions.places)
        raised = None if seen is None or head.repeat_bias is None else (seen, head.repeat_bias)
        offsets = self.model._item_offsets()
        return _DotProducts(head.scaled(states), lambda items: head.item_rows(items, offsets), head.bias, raised)


class TitleSimilarity(nn.Module):
    """How similar an item's title is to the titles of the history: the cosine of whitened title vectors.

    A history is the average of its titles' vectors, scaled to length 1, in which the newest item weighs 1 and the m-th
    newest decay ** (m - 1).

    Args:
        title_embeddings: (num_items + 1, size), row 0 for padding, whitened (`whitened`); rows are scaled to length 1.
        decay: weight of an item relative to the next newer one.

    Raises:
        ValueError: for another shape, numbers that are not finite, titles without a difference, or a decay outside
            [0, 1].
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

    def at(self, positions: Positions) -> _DotProducts:
        length = positions.item_ids.shape[1]
        places = torch.arange(length, device=self.table.device)
        age = places.unsqueeze(1) - places  # (length, length)
        weights = (self.decay ** age.clamp(min=0).to(self.table.dtype)).tril()
        averages = weights @ self.rows(positions.item_ids)  # (batch, length, size)
        return _DotProducts(F.normalize(averages.flatten(0, 1)[positions.places], dim=1), self.rows)

    def neighbours_of(self, targets: torch.Tensor, temperature: float) -> _DotProducts:
        """The opinion that items whose titles are near that of `targets` (positions,) are as good."""
        return _DotProducts(self.rows(targets) / temperature, self.rows)


class LogCounts(nn.Module):
    """log(score + floor) of transition counts or popularity, whose scores are numbers of occurrences.

    Args:
        model: the fitted model that counts.
        floor: added to every count; what has never occurred scores log(floor).

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
            lasting = config.max_length
            if config.history_decay < 1:
                lasting = math.ceil(math.log(_SMALLEST_DECAY) / math.log(config.history_decay))
            self.num_read = min(config.max_length, lasting)
            popularity = model.item_counts * (config.popularity_weight / model.item_counts.max().clamp(min=1))
            lengths = model.transition_starts[1:] - model.transition_starts[:-1]
            sources = torch.arange(len(lengths)).repeat_interleave(lengths.cpu())
            targets = model.transition_targets.cpu().long()
        self.register_buffer("popularity", popularity)
        # A pair is the number source * (num_items + 1) + target: the model stores them in ascending order.
        self.register_buffer("pairs", sources * (self.num_items + 1) + targets)

    def at(self, positions: Positions) -> "_LogCountsThere":
        return _LogCountsThere(self, positions)

    def logarithm(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.add_(self.floor).log_()


class _LogCountsThere:
    def __init__(self, member: LogCounts, positions: Positions):
        self.member, self.model, self.places = member, member.model, positions.places
        if not member.num_read:
            return
        self.read = positions.newest(member.num_read)  # (positions, read)
        ages = torch.arange(member.num_read, device=self.read.device)
        self.weights = (self.model.config.history_decay ** ages.float()).repeat(
            len(self.read), 1
        )  # padding adds nothing

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
        starts = self.model.transition_starts[sources]
        lengths = self.model.transition_starts[sources + 1] - starts
        row = torch.arange(len(sources), device=sources.device).repeat_interleave(lengths)  # (transitions,)
        begins = lengths.cumsum(0) - lengths
        stored = torch.arange(len(row), device=sources.device) + (starts - begins)[row]
        return columns.dense(
            row, self.model.transition_targets[stored].long(), self.model.transition_weights[stored], len(sources)
        )

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        scores = self.member.popularity[targets]
        if self.member.num_read and len(self.member.pairs):
            pairs = self.read * (self.member.num_items + 1) + targets.unsqueeze(1)  # (positions, read)
            places = torch.searchsorted(self.member.pairs, pairs).clamp(max=len(self.member.pairs) - 1)
            found = self.member.pairs[places].eq(pairs)
            scores = scores + (self.model.transition_weights[places] * found * self.weights).sum(1)
        return self.member.logarithm(scores)


class LabelScores(nn.Module):
    """Stored labels of a teacher that is too slow to be asked: log p of its best items, the rest of the mass elsewhere.

    Positions without a label get no opinion.

    Args:
        labels: the teacher's answers about the split that is trained on.
    """

    max_length = None

    def __init__(self, labels: TeacherLabels):
        super().__init__()
        self.labels, self.num_items = labels, labels.num_items

    def at(self, positions: Positions) -> "_LabelsThere":
        if positions.labels is None:
            raise ValueError(
                "stored labels were asked about a batch without them: expected batches of DistillationTrainer, since "
                "labels are about the training rows only"
            )
        return _LabelsThere(self, *positions.labels)


class _LabelsThere:
    def __init__(self, member: LabelScores, items: torch.Tensor, distances: torch.Tensor):
        self.items, self.is_item = items, items.ne(PADDING_ITEM_ID)
        self.scores = -distances.float()  # (positions, k)
        mass = (self.scores.exp() * self.is_item).sum(1, keepdim=True)  # (positions, 1)
        others = (member.num_items - self.is_item.sum(1, keepdim=True)).clamp(min=1)
        rest = ((1 - mass).clamp(min=1e-6) / others).log()
        # Distances of other programs are no -log p: what a teacher does not name is never above what it names.
        lowest = self.scores.masked_fill(~self.is_item, math.inf).amin(1, keepdim=True)
        self.rest = torch.minimum(rest, lowest).masked_fill(~self.is_item.any(1, keepdim=True), 0.0)

    def about(self, items: torch.Tensor, columns: Columns) -> Callable[[slice], torch.Tensor]:
        return lambda chunk: columns.filled(self.items[chunk], self.scores[chunk], self.rest[chunk])

    def of_targets(self, targets: torch.Tensor) -> torch.Tensor:
        found = self.items.eq(targets.unsqueeze(1)) & self.is_item  # (positions, k)
        return torch.where(found.any(1), (self.scores * found).sum(1), self.rest.squeeze(1))


__all__ = ["LabelScores", "LogCounts", "Positions", "RecommenderScores", "TitleSimilarity"]
