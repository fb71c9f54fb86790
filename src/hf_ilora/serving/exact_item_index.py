"""An exact index of the items of a model: 8-bit bounds of all scores, and the scores themselves where those decide."""

import torch
import torch.nn.functional as F

from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.histories import Histories
from hf_ilora.models.next_item.item_filters import ItemFilter
from hf_ilora.models.next_item.next_item_head import first_occurrences
from hf_ilora.models.next_item.top_k import ItemMasks, ordered_top_k

from .candidate_items import ITEMS_AT_ONCE, best_candidates, check_has_table, item_rows, recommend_candidates

# The largest integer after rounding. With 127, 16-bit products would overflow on processors without VNNI instructions,
# such as those with AVX2 alone.
_LARGEST = 63
_SMALLEST_SCALE = 1e-30


class ExactItemIndex:
    """Finds the best items of a user as the model does, but reads a quarter of its table.

    The index keeps the table as 8-bit integers with a scale per item. The product of these integers with a user's
    state, rounded in the same way, approximates a score with a bounded error. The model's own table then scores the
    items that this bound admits among the best, so no item is missed. Use the index for one user at a time: for a
    batch, the model's own `recommend` is faster. The index is on the CPU, takes (hidden size + 4) bytes per item, is
    built in about a second for a million items, and must be rebuilt when the model's table changes.

    Args:
        model: a SASRec, GRU4Rec or Caser; its teacher embeddings, if any, are included as in its scores.

    Raises:
        TypeError: for a model without a table of items.
        ValueError: for a table that contains NaN or infinity.
    """

    def __init__(self, model: EncoderForNextItem):
        check_has_table(model)
        self.model = model
        num_items, width = catalogue_size(model.config), model.head.in_features
        # Two columns at least: torch multiplies a single one wrongly, because it takes the transposed column for a row.
        self._integers = torch.zeros(num_items + 1, max(width, 2), dtype=torch.int8)
        self._scales = torch.zeros(1, num_items + 1)
        # Maxima over all rows, in units of their scales: of the length, and of the distance from the row's integers.
        self._longest_in_scales = self._rounding_in_scales = 0.0
        self._longest = 0.0
        for ids, rows in item_rows(model):
            rows = rows.cpu()
            if not rows.isfinite().all():
                item = int(ids[(~rows.isfinite()).any(1).nonzero()[0, 0]])
                raise ValueError(
                    f"the row of item {item} contains NaN or infinity: expected finite numbers; check the weights that "
                    "were loaded"
                )
            integers, scales = _rounded(rows)
            # Squares of very small numbers are zero in float32.
            lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            distances = torch.linalg.vector_norm(rows - integers * scales, dim=1, dtype=torch.float64)
            scales = scales.squeeze(1)
            self._longest = max(self._longest, float(lengths.max()))
            self._longest_in_scales = max(self._longest_in_scales, float((lengths / scales).max()))
            self._rounding_in_scales = max(self._rounding_in_scales, float((distances / scales).max()))
            items = slice(int(ids[0]), int(ids[-1]) + 1)
            self._integers[items, :width], self._scales[0, items] = integers.to(torch.int8), scales

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend the same items as the model's `recommend`.

        Args:
            histories, top_k, exclude_seen, allowed_items, excluded_items: as in the model's `recommend`.

        Returns:
            item_ids (batch, top_k) int64, best first, and scores (batch, top_k) float32: the logits of the model, since
            log p would need the scores of the whole catalogue. Items whose scores differ only by float32 rounding may
            change places.

        Raises:
            ValueError: as the model's `recommend`.
        """
        return recommend_candidates(
            self.model, self._best_in_catalogue, histories, top_k, exclude_seen, allowed_items, excluded_items
        )

    @property
    def catalogue(self) -> Catalogue | None:
        """The catalogue of the model."""
        return self.model.catalogue

    def _best_in_catalogue(
        self, states: torch.Tensor, newest: torch.Tensor, masks: ItemMasks, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item ids and scores (users, top_k); -inf where fewer items are left for a user."""
        answers = []
        for row in range(len(states)):
            one = slice(row, row + 1)
            user = states[one], newest[one], masks.of(one), top_k
            highest = masks.of(one).apply_(self._highest_scores(states[one], newest[one]))  # (1, num_items + 1)
            best = best_candidates(self.model, ordered_top_k(highest, top_k)[1], *user)
            # The bound of any better item is at least as high as the lowest of these scores.
            candidates = (highest[0] >= best[1][0, -1]).nonzero().T if best[1].isfinite().all() else best[0][:, :0]
            for some in candidates.split(ITEMS_AT_ONCE, dim=1):
                best = best_candidates(self.model, torch.cat([best[0], some], dim=1), *user)
            answers.append(best)
        item_ids, scores = map(torch.cat, zip(*answers, strict=True))
        return item_ids, scores

    def _highest_scores(self, state: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
        """Upper bounds (1, num_items + 1) of a user's scores, from the state (1, hidden size).

        With a state s and its integers i of scale a, a row r and its integers j of scale b:
        s.r = ab i.j + (s - ai).r + ai.(r - bj) <= b (a i.j + |s - ai| |r|/b + |ai| |r - bj|/b).
        """
        head = self.model.head
        integers, scale = _rounded(state.cpu())
        rounded = integers * scale
        error = float((state.cpu() - rounded).norm()) * self._longest_in_scales
        error += float(rounded.norm()) * self._rounding_in_scales
        # The rounding errors of float32, here and in the scores themselves.
        precision = torch.finfo(torch.float32)
        loss = 2 * precision.eps * (state.shape[1] + 16) * float(state.norm()) * self._longest + precision.tiny
        integers = F.pad(integers.to(torch.int8), (0, self._integers.shape[1] - integers.shape[1]))
        products = torch._int_mm(integers, self._integers.t())  # (1, num_items + 1) int32
        highest = products.float().mul_(scale).add_(error).mul_(self._scales).add_(loss).to(state.device)
        if head.bias is not None:
            highest += head.bias.float()
        if head.repeat_bias is not None:
            repeated = first_occurrences(newest)
            highest.scatter_add_(1, repeated, head.repeat_bias.float().expand(repeated.shape))
        return highest


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers, as float32, that rows (any, hidden size) are rounded to, and the scales (any, 1)."""
    scales = (rows.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(_SMALLEST_SCALE)
    return (rows / scales).round().clamp_(-_LARGEST, _LARGEST), scales


__all__ = ["ExactItemIndex"]
