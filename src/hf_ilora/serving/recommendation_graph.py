"""`recommend` of a trained next-item model as one graph of tensors: for `torch.compile`, `torch.export` and ONNX."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID, catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_head import first_occurrences
from hf_ilora.models.next_item.next_item_model import check_has_weights
from hf_ilora.models.next_item.padding import padding_to_the_end


class RecommendationGraph(nn.Module):
    """A copy of a model in float32 on the CPU that answers as `recommend` does, but checks nothing.

    Item ids outside 1..num_items are read as padding. `torch.topk` leaves the order of equal scores open; in ONNX,
    whose TopK takes the lower index first, it is that of `recommend`.

    Args:
        model: a SASRec, GRU4Rec or Caser. The copy shares weights that are in float32 on the CPU already.
        top_k: items per history; None scores the whole catalogue.
        exclude_seen: leave out the items of the history.

    Raises:
        ValueError: for other models, teacher embeddings that are not folded in, and `top_k` out of range.
    """

    def __init__(self, model: EncoderForNextItem, top_k: int | None = None, exclude_seen: bool = True):
        super().__init__()
        _check_model(model)
        self.num_items, self.max_length = catalogue_size(model.config), model.config.max_length
        if top_k is not None and (not isinstance(top_k, int) or not 1 <= top_k <= self.num_items):
            raise ValueError(f"top_k is {top_k!r}: expected 1 to {self.num_items}, the catalogue, or None for scores")
        self.top_k, self.exclude_seen = top_k, exclude_seen
        self.encoder, self.head = _float32_copy(model)
        # Scaling the scores instead of the table saves storing and reading a second table.
        row_scales = None
        if model.config.score_temperature is not None:
            row_scales = 1 / self.head.weight.detach().norm(dim=-1).clamp(min=1e-12)  # (num_items + 1,)
        popular_scores = model.popular_scores().detach().float().cpu() if model.knows_popular_items else None
        self.register_buffer("row_scales", row_scales)
        self.register_buffer("popular_scores", popular_scores)
        self.eval()

    def forward(self, histories: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Score the whole catalogue, and recommend.

        Args:
            histories: (batch, length) int64 item ids, oldest first, padded with 0 on either side, of any length.

        Returns:
            item_scores (batch, num_items + 1), those of the model's `next_item_scores`, then the result of `answers`.
        """
        is_item = (histories > PADDING_ITEM_ID) & (histories <= self.num_items)
        histories = histories.where(is_item, PADDING_ITEM_ID)
        item_scores = self.item_scores(histories)
        return item_scores, *self.answers(item_scores, histories)

    def item_scores(self, histories: torch.Tensor) -> torch.Tensor:
        """(batch, num_items + 1) scores, -inf for padding; rows without items get the popular scores, if known."""
        real, order, _ = padding_to_the_end(histories, None)
        num_real = real.sum(1)  # (batch,)
        lengths = num_real.clamp(max=self.max_length)
        width = torch.sym_min(histories.shape[1], self.max_length)
        places = torch.arange(width, device=histories.device) + (num_real - lengths).unsqueeze(1)
        item_ids = histories.gather(1, order).gather(1, places)  # (batch, width), the newest, padding last
        states = self.encoder.encode(item_ids, lengths, only_last=True).squeeze(1)  # (batch, hidden)
        scores = F.linear(self.head.scaled(states), self.head.weight)  # (batch, num_items + 1)
        if self.row_scales is not None:
            scores = scores * self.row_scales
        if self.head.bias is not None:
            scores = scores + self.head.bias
        if self.head.repeat_bias is not None:
            repeated_items = first_occurrences(item_ids)  # (batch, width)
            scores = scores.scatter_add(1, repeated_items, self.head.repeat_bias.expand(repeated_items.shape))
        padding = scores.new_full((scores.shape[0], 1), float("-inf"))
        scores = torch.cat([padding, scores[:, PADDING_ITEM_ID + 1 :]], 1)
        if self.popular_scores is not None:
            scores = torch.where(real.any(1, keepdim=True), scores, self.popular_scores)
        return scores

    def answers(self, item_scores: torch.Tensor, histories: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Recommend to histories (batch, length) by scores (batch, num_items + 1).

        Returns:
            With `top_k`, item_ids (batch, top_k) int64, best first, and scores (batch, top_k): log p over the whole
            catalogue. Where nothing is left to recommend, the id is 0 and the score -inf. Without `top_k`, the scores
            of all items (batch, num_items + 1).
        """
        scores, log_sum_exp = item_scores, item_scores.logsumexp(1, keepdim=True)
        if self.popular_scores is None:
            scores = scores.masked_fill(histories.eq(PADDING_ITEM_ID).all(1, keepdim=True), float("-inf"))
        if self.exclude_seen:
            scores = scores.scatter(1, histories, float("-inf"))
        if self.top_k is None:
            return ((scores - log_sum_exp).clamp(max=0),)
        scores, item_ids = scores.topk(self.top_k, dim=1)  # (batch, top_k) each; before log p rounds scores to ties
        scores = (scores - log_sum_exp).clamp(max=0)
        return item_ids.masked_fill(scores.isneginf(), PADDING_ITEM_ID), scores


def _check_model(model) -> None:
    if not isinstance(model, EncoderForNextItem):
        raise ValueError(
            f"a {type(model).__name__} cannot be exported: expected a SASRecForNextItem, GRU4RecForNextItem or "
            "CaserForNextItem; distil other recommenders into one of them (hf-ilora distill)"
        )
    if model.model.item_embedding.teacher is not None:
        raise ValueError(
            "the model reads teacher embeddings that are not folded in: expected a model as it is served; call "
            "model.fold_teacher_embeddings() first, which changes no scores"
        )
    check_has_weights(model)


def _float32_copy(model: EncoderForNextItem) -> tuple[nn.Module, nn.Module]:
    """The encoder and the head in float32 on the CPU; tied tables stay one."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        copied = tensor.detach().to("cpu", dtype)
        memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy((model.model, model.head), memo)


__all__ = ["RecommendationGraph"]
