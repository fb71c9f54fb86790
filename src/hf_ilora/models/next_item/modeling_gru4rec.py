"""GRU4Rec as a `PreTrainedModel`: a recurrent network over item ids that scores the next item."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_gru4rec import GRU4RecConfig
from .encoder_for_next_item import EncoderForNextItem, require_item_count
from .padding import at_position, last_positions
from .teacher_embeddings import ItemEmbedding


class GRU4RecEncoder(nn.Module):
    """Item ids in, one state of the GRU per position out."""

    def __init__(self, config: GRU4RecConfig):
        super().__init__()
        self.item_embedding = ItemEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.gru = nn.GRU(
            config.hidden_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.hidden_dropout if config.num_hidden_layers > 1 else 0.0,
        )

    def encode(
        self,
        item_ids: torch.Tensor,
        lengths: torch.Tensor | None,
        only_last: bool = False,
        teacher_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of right-padded sequences; padding comes last and needs no mask.

        Args:
            item_ids: (batch, length), padding last.
            lengths: (batch,), number of real items; None when there is no padding.
            only_last: return the last real position only.
            teacher_embeddings: (num_items + 1, teacher_embedding_size) to read instead of the stored ones, or None.

        Returns:
            (batch, length, hidden), or (batch, 1, hidden) with `only_last`.
        """
        embeddings = self.dropout(self.item_embedding(item_ids, teacher_embeddings))
        hidden_states, _ = self.gru(embeddings)  # (batch, length, hidden)
        if only_last:
            hidden_states = at_position(hidden_states, last_positions(lengths, item_ids.shape[1]))
        return self.dropout(hidden_states)


class GRU4RecForNextItem(EncoderForNextItem):
    """GRU4Rec with a head that scores the whole catalogue; interface and losses are those of `SASRecForNextItem`.

    It departs from the paper in its default loss (cross-entropy over the catalogue at every position, where the paper
    draws the negatives of a ranking loss from the batch) and in starting every history from a state of zeros.

    Args:
        config: the architecture and the training loss.

    Source: GRU4Rec (ICLR 2016).
    """

    config: GRU4RecConfig

    def __init__(self, config: GRU4RecConfig):
        require_item_count(config)
        super().__init__(config, GRU4RecEncoder(config))

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.GRU) and self.config.initialization == "normal":
            # Uniform for each gate, as in the authors' program; one matrix stacks the three gates.
            bound = math.sqrt(6 / (module.input_size + module.hidden_size))
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    init.uniform_(parameter, -bound, bound)
                else:
                    init.zeros_(parameter)


GRU4RecForNextItem.register_for_auto_class("AutoModel")

__all__ = ["GRU4RecForNextItem"]
