"""Caser as a `PreTrainedModel`: convolutions over the newest items that score the next one."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_caser import CaserConfig
from .configuration_next_item import PADDING_ITEM_ID, check_config
from .encoder_for_next_item import EncoderForNextItem
from .next_item_head import NextItemHead
from .padding import last_positions
from .teacher_embeddings import ItemEmbedding


class CaserEncoder(nn.Module):
    """Computes one hidden state from the newest `max_length` items.

        horizontal: for each height h = 1..max_length, filters over h consecutive items; ReLU, maximum over positions
        vertical:   weighted sums over the positions, with the same weights for every embedding dimension
        state     = ReLU(W [horizontal, vertical] + b)

    The reference block departs from the paper: state = [horizontal, ReLU(vertical)], and histories shorter than
    `max_length` are padded after their newest item.

    Source: Caser (WSDM 2018), eq. 3 to 10; the published programs of LLaRA and DLLM2Rec.
    """

    def __init__(self, config: CaserConfig):
        super().__init__()
        self.max_length, self.is_reference = config.max_length, config.block_type == "reference"
        self.item_embedding = ItemEmbedding(config)
        self.horizontal_filters = nn.ModuleList(
            [
                nn.Conv1d(config.hidden_size, config.num_horizontal_filters, height)
                for height in config.horizontal_heights
            ]
        )
        self.vertical_filters = nn.Linear(config.max_length, config.vertical_filters)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.projection = None if self.is_reference else nn.Linear(config.num_filter_outputs, config.hidden_size)

    def encode(
        self,
        item_ids: torch.Tensor,
        lengths: torch.Tensor | None,
        only_last: bool = False,
        teacher_embeddings: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Encoder.encode`; the states are zero except at the last real position of each row."""
        window = self._window(item_ids, lengths)  # (batch, max_length)
        embeddings = self.item_embedding(window, teacher_embeddings, table)  # (batch, max_length, hidden)
        # Teacher embeddings of padding are not zero and would reach the filters; elsewhere padding follows the items.
        embeddings = (embeddings * window.ne(PADDING_ITEM_ID).unsqueeze(-1)).transpose(1, 2)
        horizontal = [filters(embeddings).relu().amax(-1) for filters in self.horizontal_filters]  # (batch, filters)
        vertical = self.vertical_filters(embeddings).transpose(1, 2).flatten(1)  # (batch, filters * hidden)
        if self.is_reference:
            vertical = vertical.relu()
        state = self.dropout(torch.cat([*horizontal, vertical], -1)).unsqueeze(1)  # (batch, 1, filter outputs)
        if self.projection is not None:
            state = self.projection(state).relu()  # (batch, 1, hidden)
        if only_last:
            return state
        newest = _is_last(lengths, item_ids.shape[1], item_ids.device)  # (batch, length), or (length,)
        return state * newest.unsqueeze(-1)

    def _window(self, item_ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """(batch, length), padding last -> (batch, max_length), padding first (last in the reference block)."""
        length = item_ids.shape[1]
        if self.is_reference:
            return F.pad(item_ids, (0, self.max_length - length), value=PADDING_ITEM_ID)
        places = torch.arange(self.max_length, device=item_ids.device) - self.max_length
        ends = item_ids.new_full((item_ids.shape[0],), length) if lengths is None else lengths
        places = places + ends.unsqueeze(1)  # (batch, max_length), negative before the oldest item
        return item_ids.gather(1, places.clamp(min=0)).masked_fill(places < 0, PADDING_ITEM_ID)


class CaserForNextItem(EncoderForNextItem):
    """Caser with a head that scores the whole catalogue; the interface is that of `SASRecForNextItem`.

    It reads a history as one picture and predicts after its last item only. Labels and scored positions elsewhere are
    refused (train with `labelled_positions="last"`), and `last_hidden_state` is zero there. It departs from the paper
    in three ways: it has no user embedding of its own, since it must recommend to users that training never saw; it has
    one target per window; and it has the losses and defaults of the other models here. With `block_type="reference"` it
    is the Caser of LLaRA and DLLM2Rec.

    Args:
        config: the architecture and the training loss.

    Source: Caser (WSDM 2018); the published programs of LLaRA and DLLM2Rec.
    """

    config: CaserConfig
    model: CaserEncoder

    def __init__(self, config: CaserConfig):
        check_config(config, CaserConfig)
        super().__init__(config, CaserEncoder(config))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_filter = isinstance(module, nn.Conv1d) or module is self.model.vertical_filters
        if self.config.initialization == "reference":
            if isinstance(module, nn.Conv1d | nn.Linear) and is_filter:
                # Xavier as in the published program, whose filters are two-dimensional and read one channel.
                fan_in, fan_out = module.weight.shape[1:].numel(), module.weight.shape.numel()
                init.normal_(module.weight, std=math.sqrt(2 / (fan_in + fan_out)))
                init.constant_(module.bias, 0.1)
        elif isinstance(module, nn.Conv1d | nn.Linear) and not isinstance(module, NextItemHead):
            init.xavier_uniform_(module.weight)

    def check_positions(self, chosen: torch.Tensor, lengths: torch.Tensor, name: str) -> None:
        """Raise a ValueError for positions other than the last real one; on a GPU a device assertion fails."""
        if torch.compiler.is_compiling():
            return
        elsewhere = chosen & ~_is_last(lengths, chosen.shape[1], chosen.device)  # (batch, length)
        if elsewhere.device.type == "cuda":  # raising here would wait for the device
            torch._assert_async(
                ~elsewhere.any(),
                f"{name} choose a position other than the last, the only one that Caser predicts after",
            )
        elif elsewhere.device.type == "cpu" and elsewhere.numpy().any():
            row, position = elsewhere.nonzero()[0].tolist()
            raise ValueError(
                f"{name} choose position {position} of history {row}, which has {int(lengths[row])} items: expected "
                'the last one only, since Caser predicts nothing in between; train with labelled_positions="last"'
            )


def _is_last(lengths: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """(batch, length) bool, (length,) without lengths: true at the newest item of right-padded rows."""
    places, last = torch.arange(length, device=device), last_positions(lengths, length)
    return places == (last.unsqueeze(1) if isinstance(last, torch.Tensor) else last)


CaserForNextItem.register_for_auto_class("AutoModel")

__all__ = ["CaserForNextItem"]
