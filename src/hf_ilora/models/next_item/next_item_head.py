"""The head of every trained next-item model: scores of the catalogue, and the training loss."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_next_item import PADDING_ITEM_ID, NextItemConfig
from .next_item_losses import chunked_cross_entropy, gbce_loss, sampled_softmax_loss


class NextItemHead(nn.Linear):
    """Scores items against hidden states and computes the training loss with its own table.

    Loss and scores live in one module's forward, because ZeRO-3 gathers a module's weights only around its forward.
    """

    def __init__(self, config: NextItemConfig):
        super().__init__(config.user_embedding_size, config.num_items + 1, bias=config.head_bias)
        self.config, self.score_temperature = config, config.score_temperature
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
    ):
        """Scores, or the summed training loss when `targets` are given.

        Args:
            hidden_states: (positions, hidden).
            repeated_items: (positions, length) different items that each position has seen, padded with 0; only read
                with `repeat_bias`.
            targets: (positions,) item ids, or None.
            negatives: (negatives,) or (positions, negatives) item ids, for the sampled losses.
            log_q: log probability of each item in a draw of negatives, (num_items + 1,), or a number for uniform draws;
                None does not correct for the draw.
            item_offsets: (num_items + 1, hidden), added to the table, or None.
            scored_items: (items,) different ids, none of them padding: the scores are of these, in their order.
            counted: (positions,) bool, the positions that the loss counts; None counts all.

        Returns:
            (positions, num_items + 1) scores with -inf for padding, (positions, items) scores, or the scalar loss.
        """
        weight = self.weight if item_offsets is None else self.weight + item_offsets
        if self.score_temperature is not None:
            hidden_states = F.normalize(hidden_states, dim=-1) / self.score_temperature
            weight = F.normalize(weight, dim=-1)
        if targets is None:
            return self._scores(hidden_states, weight, repeated_items, scored_items)
        if self.config.loss_type == "cross_entropy":
            return chunked_cross_entropy(
                hidden_states, weight, self.bias, targets, self.repeat_bias, repeated_items, counted=counted
            )
        target_scores = (hidden_states * weight[targets]).sum(-1)  # (positions,)
        if negatives.dim() == 1:
            negative_scores = F.linear(hidden_states, weight[negatives])  # (positions, negatives)
        else:
            negative_scores = torch.einsum("ph,pnh->pn", hidden_states, weight[negatives])
        if self.bias is not None:
            target_scores, negative_scores = target_scores + self.bias[targets], negative_scores + self.bias[negatives]
        collisions = negatives == targets.unsqueeze(1)  # (positions, negatives)
        if self.config.loss_type == "sampled_softmax":
            negative_log_q = log_q[negatives] if isinstance(log_q, torch.Tensor) else log_q
            return sampled_softmax_loss(target_scores, negative_scores, collisions, negative_log_q, counted)
        calibration = self.config.gbce_calibration if self.config.loss_type == "gbce" else 0.0
        return gbce_loss(target_scores, negative_scores, collisions, self.config.num_items, calibration, counted)

    def _scores(self, hidden_states, weight, repeated_items, scored_items):
        bias = self.bias
        if scored_items is not None:
            weight, bias = weight[scored_items], None if bias is None else bias[scored_items]
        # In bfloat16 many items would tie, and ties cost quality: scores are always computed in float32.
        with torch.autocast(hidden_states.device.type, enabled=False):
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


def first_occurrences(item_ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) item ids with every later occurrence of an item replaced by padding."""
    equal = item_ids.unsqueeze(2) == item_ids.unsqueeze(1)  # (batch, length, length)
    return item_ids.masked_fill(equal.tril(-1).any(-1), PADDING_ITEM_ID)


__all__ = ["NextItemHead", "first_occurrences"]
