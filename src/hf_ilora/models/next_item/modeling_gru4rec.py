"""GRU4Rec as a `PreTrainedModel`: a recurrent network over item ids that scores the next item."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch._higher_order_ops import scan
from transformers import initialization as init

from .configuration_gru4rec import GRU4RecConfig
from .configuration_next_item import check_config
from .encoder_for_next_item import EncoderForNextItem
from .padding import at_position, last_positions
from .teacher_embeddings import ItemEmbedding


class GRU(nn.RNNBase):
    """An `nn.GRU` with equal input and state sizes that graphs can capture; an `nn.GRU` breaks the graph.

    Args:
        hidden_size: width of inputs and states.
        num_layers: number of layers.
        dropout: dropout probability between the layers.
    """

    def __init__(self, hidden_size: int, num_layers: int, dropout: float):
        super().__init__("GRU", hidden_size, hidden_size, num_layers, batch_first=True, dropout=dropout)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) -> the states of the last layer, (batch, length, hidden)."""
        # torch.gru needs a graph for each length, and compiled scans may return wrong gradients (torch 2.13).
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and not torch.is_grad_enabled()):
            for layer in range(self.num_layers):
                inputs = self._scan(inputs, layer)
            return inputs
        state = inputs.new_zeros(self.num_layers, inputs.shape[0], self.hidden_size)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        settings = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        return torch.gru(inputs, state, weights, *settings)[0]

    def _scan(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        """Run one layer as a loop over any number of positions."""
        hidden_weight, hidden_bias = getattr(self, f"weight_hh_l{layer}"), getattr(self, f"bias_hh_l{layer}")
        read = F.linear(inputs, getattr(self, f"weight_ih_l{layer}"), getattr(self, f"bias_ih_l{layer}"))

        def step(state: torch.Tensor, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """state (batch, hidden), read (batch, 3 * hidden): reset and update gates, candidate."""
            kept = F.linear(state, hidden_weight, hidden_bias).chunk(3, dim=-1)
            reset, update, candidate = read.chunk(3, dim=-1)
            reset, update = torch.sigmoid(reset + kept[0]), torch.sigmoid(update + kept[1])
            candidate = torch.tanh(candidate + reset * kept[2])
            state = candidate + update * (state - candidate)
            return state, state.clone()

        start = inputs.new_zeros(inputs.shape[0], self.hidden_size)
        _, states = scan(step, start, read.transpose(0, 1), dim=0)  # (length, batch, hidden)
        return states.transpose(0, 1)


class GRU4RecEncoder(nn.Module):
    """Computes one state of the GRU per position from item ids."""

    def __init__(self, config: GRU4RecConfig):
        super().__init__()
        self.item_embedding = ItemEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        dropout = config.hidden_dropout if config.num_hidden_layers > 1 else 0.0
        self.gru = GRU(config.hidden_size, config.num_hidden_layers, dropout)

    def encode(
        self,
        item_ids: torch.Tensor,
        lengths: torch.Tensor | None,
        only_last: bool = False,
        teacher_embeddings: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Encoder.encode`; padding comes last and needs no mask."""
        embeddings = self.dropout(self.item_embedding(item_ids, teacher_embeddings, table))
        hidden_states = self.gru(embeddings)  # (batch, length, hidden)
        if only_last:
            hidden_states = at_position(hidden_states, last_positions(lengths, item_ids.shape[1]))
        return self.dropout(hidden_states)


class GRU4RecForNextItem(EncoderForNextItem):
    """GRU4Rec with a head that scores the whole catalogue; interface and losses are those of `SASRecForNextItem`.

    It departs from the paper in two ways: its default loss is the cross-entropy over the catalogue at every position,
    where the paper has a ranking loss with negatives from the batch; and every history starts from a state of zeros.

    Args:
        config: the architecture and the training loss.

    Source: GRU4Rec (ICLR 2016).
    """

    config: GRU4RecConfig
    model: GRU4RecEncoder

    def __init__(self, config: GRU4RecConfig):
        check_config(config, GRU4RecConfig)
        super().__init__(config, GRU4RecEncoder(config))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GRU) and self.config.initialization == "normal":
            # Uniform for each gate, as in the authors' program; one matrix stacks the three gates.
            bound = math.sqrt(6 / (module.input_size + module.hidden_size))
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    init.uniform_(parameter, -bound, bound)
                else:
                    init.zeros_(parameter)


GRU4RecForNextItem.register_for_auto_class("AutoModel")

__all__ = ["GRU4RecForNextItem"]
