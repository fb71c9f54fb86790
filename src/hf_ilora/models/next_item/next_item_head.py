"""The head of every trained next-item model: scores of the catalogue, and the training loss."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .configuration_next_item import PADDING_ITEM_ID, NextItemConfig
from .next_item_losses import (
    Columns,
    SeenItems,
    chunked_cross_entropy,
    chunked_sampled_softmax,
    gbce_loss,
    sampled_softmax_loss,
)
from .table_gradients import looked_up, table_for_lookups
from .top_k import columns_in_chunk, top_k_in_chunks

_ROWS_FOR_NUMPY = 2**15
_SHORTEST = 1e-12  # length of a row, as for `F.normalize`


class NextItemHead(nn.Linear):
    """Scores items against hidden states and computes the training loss with its own table.

    Loss and scores live in one module's forward, because ZeRO-3 gathers a module's weights only around its forward.
    """

    def __init__(self, config: NextItemConfig):
        super().__init__(config.user_embedding_size, config.num_items + 1, bias=config.head_bias)
        self.config, self.score_temperature = config, config.score_temperature
        self.sparse = False  # as in `nn.Embedding`, for the table of a head that is not tied
        # DeepSpeed cannot send parameters without a dimension
        self.repeat_bias = nn.Parameter(torch.zeros(1)) if config.repeat_bias else None

    def forward(
        self,
        hidden_states,
        repeated_items,
        targets=None,
        negatives=None,
        log_q=None,
        item_offsets=None,
        scored_items=None,
        counted=None,
        history_items=None,
        soft_targets=None,
        top_k=None,
        masks=None,
        table=None,
        best_items=None,
    ):
        """Scores, the best items with `top_k`, or the summed training loss when `targets` are given.

        Args:
            hidden_states: (positions, hidden).
            repeated_items: (positions, length) different items that each position has seen, padded with 0; only read
                with `repeat_bias`.
            targets: (positions,) item ids, or None.
            negatives: (negatives,) or (positions, negatives) item ids, for the sampled losses.
            log_q: log probability of each negative in one draw, of the shape of `negatives`, or a number for uniform
                draws; None does not correct for the draw.
            item_offsets: (num_items + 1, hidden), added to the table, or None.
            scored_items: (items,) different ids, none of them padding: the scores are of these, in their order; or
                (positions, items), other ones for each position, some perhaps more than once.
            counted: (positions,) bool, the positions that the loss counts; None counts all.
            history_items: (any,) item ids, those of `repeated_items` among them; only read with `repeat_bias` by the
                sampled softmax.
            soft_targets: (targets (positions,), negatives (negatives,) or None for the whole catalogue) ->
                `SoftTarget`s to learn from, or None.
            top_k: number of items to return per position instead of scores, without gradient; memory does not grow with
                positions x items.
            masks: `ItemMasks` of the positions, for `top_k`.
            table: the item table of a tied head as `table_for_lookups` returns it, for the sampled losses, or None.
            best_items: (positions, k) int64, which the cross-entropy writes the ids of the k best items to, or None.

        Returns:
            (positions, num_items + 1) scores with -inf for padding, or (positions, items) scores; with `top_k` what
            `top_k_in_chunks` returns: item ids, scores, and log of the sum of exp(score); with `targets` the
            scalar loss and its parts (1 + soft targets,), without gradient: the loss of the targets, then the
            divergence from each soft target without its weight.
        """
        hidden_states = self.scaled(hidden_states)
        if top_k is not None:
            return self._best(hidden_states, repeated_items, item_offsets, top_k, masks)
        if targets is None and scored_items is not None and scored_items.dim() == 2:
            return self._scores_of(scored_items, hidden_states, repeated_items, item_offsets)
        if targets is None or self.config.loss_type == "cross_entropy":
            weight = self.normalised(self.weight if item_offsets is None else self.weight + item_offsets)
        if targets is None:
            return self._scores(hidden_states, weight, repeated_items, scored_items)
        soft_targets = () if soft_targets is None else soft_targets(targets, negatives)
        if self.config.loss_type == "cross_entropy":
            return chunked_cross_entropy(
                hidden_states,
                weight,
                self.bias,
                targets,
                self.repeat_bias,
                repeated_items,
                counted=counted,
                soft_targets=soft_targets,
                best_items=best_items,
            )
        if table is None and not self.config.tie_word_embeddings:
            table = table_for_lookups(self)
        if self.config.loss_type == "sampled_softmax" and negatives.dim() == 1:
            return self._sampled_softmax(
                hidden_states, repeated_items, targets, negatives, log_q, item_offsets, counted, history_items,
                soft_targets, table,
            )  # fmt: skip
        rows = self.item_rows(torch.cat([targets, negatives.flatten()]), item_offsets, table)
        target_rows, negative_rows = rows.split([len(targets), negatives.numel()])
        target_scores = (hidden_states * target_rows).sum(-1)  # (positions,)
        if negatives.dim() == 1:
            negative_scores = F.linear(hidden_states, negative_rows)  # (positions, negatives)
        else:
            negative_rows = negative_rows.view(*negatives.shape, -1)
            negative_scores = torch.einsum("ph,pnh->pn", hidden_states, negative_rows)
        if self.bias is not None:
            target_scores, negative_scores = target_scores + self.bias[targets], negative_scores + self.bias[negatives]
        collisions = negatives == targets.unsqueeze(1)  # (positions, negatives)
        if self.config.loss_type == "sampled_softmax":
            loss = sampled_softmax_loss(target_scores, negative_scores, collisions, log_q, counted)
        else:
            calibration = self.config.gbce_calibration if self.config.loss_type == "gbce" else 0.0
            loss = gbce_loss(target_scores, negative_scores, collisions, self.config.num_items, calibration, counted)
        return loss, loss.detach().unsqueeze(0)

    def _sampled_softmax(
        self, hidden_states, repeated_items, targets, negatives, log_q, item_offsets, counted, history_items,
        soft_targets, table,
    ):  # fmt: skip
        """The sampled softmax with shared negatives; with a repeat bias the seen items compete too."""
        num_targets, num_negatives = len(targets), len(negatives)
        ids = [targets, negatives] if self.repeat_bias is None else [targets, negatives, history_items]
        ids = torch.cat(ids)
        rows = self.item_rows(ids, item_offsets, table)
        target_rows, negative_rows, seen_rows = rows.tensor_split((num_targets, num_targets + num_negatives))
        target_bias = negative_bias = seen = None
        if self.bias is not None or self.repeat_bias is not None:
            bias = self.weight.new_zeros(len(ids)) if self.bias is None else self.bias[ids]
            target_bias, negative_bias, seen_bias = bias.tensor_split((num_targets, num_targets + num_negatives))
        if self.repeat_bias is not None:
            is_repeat = repeated_items.eq(targets.unsqueeze(1)).any(1)  # (positions,)
            target_bias = target_bias + self.repeat_bias * is_repeat
            place_of = history_items.new_zeros(self.config.num_items + 1)
            place_of[history_items] = torch.arange(len(history_items), device=history_items.device)
            columns = Columns(negatives, self.config.num_items)
            seen = SeenItems(seen_rows, seen_bias + self.repeat_bias, columns, repeated_items, place_of[repeated_items])
        return chunked_sampled_softmax(
            hidden_states,
            target_rows,
            target_bias,
            negative_rows,
            negative_bias,
            targets,
            negatives,
            seen,
            log_q,
            counted=counted,
            soft_targets=soft_targets,
        )

    def scaled(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states (positions, hidden) whose products with `item_rows` are scores, before any bias."""
        if self.score_temperature is None:
            return hidden_states
        return F.normalize(hidden_states, dim=-1) / self.score_temperature

    def item_rows(
        self, item_ids: torch.Tensor, item_offsets: torch.Tensor | None = None, table: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The rows of the table (items, hidden) that hidden states are multiplied with, of item ids (items,).

        Ids of another shape (...) give (..., hidden).
        """
        rows = F.embedding(item_ids, self.weight) if table is None else looked_up(table, item_ids)
        if item_offsets is not None:
            rows = rows + F.embedding(item_ids, item_offsets)
        return self.normalised(rows)

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the table (items, hidden) whose products with `scaled` hidden states are scores, before any bias."""
        return rows if self.score_temperature is None else F.normalize(rows, dim=-1)

    @torch.no_grad()
    def _best(self, hidden_states, repeated_items, item_offsets, top_k, masks):
        states = hidden_states.float()

        def score_items(positions: slice, items: slice, scores: torch.Tensor) -> None:
            weight = self.weight[items] if item_offsets is None else self.weight[items] + item_offsets[items]
            lengths = None
            # The scores of few users are fewer numbers than the rows of the items, which need no copy then.
            if self.score_temperature is not None and len(scores) < weight.shape[1] and weight.dtype == torch.float32:
                lengths = torch.linalg.vector_norm(weight, dim=1).clamp_min_(_SHORTEST)  # (items,)
            else:
                weight = self.normalised(weight).float()  # (items, hidden)
            bias = None if self.bias is None else self.bias[items].float()
            if len(scores) == 1 and _numpy_is_faster(weight):
                _products_by_numpy(weight, states[positions][0], scores[0])
            elif bias is None or lengths is not None:
                torch.mm(states[positions], weight.t(), out=scores)
            else:
                torch.addmm(bias, states[positions], weight.t(), out=scores)
                bias = None
            if lengths is not None:
                scores.div_(lengths)
            if bias is not None:
                scores.add_(bias)
            if self.repeat_bias is not None:
                columns, bias = repeated_items[positions], self.repeat_bias.to(scores)
                if scores.shape[1] <= self.config.num_items:  # not all items: some columns are elsewhere
                    columns, inside = columns_in_chunk(columns, items)
                    bias = bias * inside
                scores.scatter_add_(1, columns, bias.expand(columns.shape))

        with _without_autocast(hidden_states):  # as for `_scores`
            return top_k_in_chunks(score_items, len(states), self.config.num_items, top_k, masks, states.device)

    def _scores_of(self, item_ids, hidden_states, repeated_items, item_offsets):
        """(positions, items) scores of the item ids (positions, items), which are looked up."""
        rows = self.item_rows(item_ids, item_offsets)  # (positions, items, hidden)
        with _without_autocast(hidden_states):  # as for `_scores`
            scores = torch.einsum("ph,pih->pi", hidden_states.float(), rows.float())
            if self.bias is not None:
                scores = scores + self.bias[item_ids].float()
            if self.repeat_bias is not None:
                is_repeat = item_ids.unsqueeze(2).eq(repeated_items.unsqueeze(1)).any(2)  # (positions, items)
                scores = scores + self.repeat_bias.float() * is_repeat
        return scores

    def _scores(self, hidden_states, weight, repeated_items, scored_items):
        bias = self.bias
        if scored_items is not None:
            weight, bias = weight[scored_items], None if bias is None else bias[scored_items]
        # In bfloat16 many items would tie, and ties cost quality: scores are always computed in float32.
        with _without_autocast(hidden_states):
            bias = None if bias is None else bias.float()
            scores = F.linear(hidden_states.float(), weight.float(), bias)  # (positions, items)
        if self.repeat_bias is not None:
            columns, added = repeated_items, self.repeat_bias.to(scores).expand(repeated_items.shape)
            if scored_items is not None:
                ascending = scored_items.argsort()  # (items,)
                places = torch.searchsorted(scored_items, repeated_items, sorter=ascending)  # (positions, length)
                columns = ascending[places.clamp(max=len(scored_items) - 1)]
                added = added * (scored_items[columns] == repeated_items)
            scores = scores.scatter_add(1, columns, added)
        if scored_items is None:
            scores[:, PADDING_ITEM_ID] = float("-inf")
        return scores


def _numpy_is_faster(weight: torch.Tensor) -> bool:
    """Whether numpy multiplies one vector with this many rows faster than torch, whose product reads them slowly."""
    return weight.device.type == "cpu" and len(weight) >= _ROWS_FOR_NUMPY and torch.get_num_threads() == 1


def _products_by_numpy(weight: torch.Tensor, state: torch.Tensor, products: torch.Tensor) -> None:
    """Write the products of the rows of weight (items, hidden) with a state (hidden,) to (items,)."""
    width = weight.shape[1]
    block = max(1, 8192 // width)  # numpy's library begins to use several threads above 9216 elements
    whole = len(weight) // block * block
    blocks = weight[:whole].view(-1, block, width).numpy()
    np.matmul(blocks, state.numpy(), out=products[:whole].view(-1, block).numpy())
    products[whole:] = weight[whole:] @ state


def first_occurrences(item_ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) item ids with every later occurrence of an item replaced by padding."""
    equal = item_ids.unsqueeze(2) == item_ids.unsqueeze(1)  # (batch, length, length)
    return item_ids.masked_fill(equal.tril(-1).any(-1), PADDING_ITEM_ID)


def _without_autocast(states: torch.Tensor) -> AbstractContextManager:
    """Keeps autocast from the scores; costs nothing where it is off, which counts when one user waits."""
    device_type = states.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


__all__ = ["NextItemHead", "first_occurrences"]
