"""SASRec as a `PreTrainedModel`: a causal transformer over item ids that scores the next item."""

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .configuration_next_item import check_config
from .configuration_sasrec import SASRecConfig
from .encoder_for_next_item import EncoderForNextItem
from .next_item_model import NextItemPreTrainedModel
from .padding import at_position, last_positions, padding_to_the_end, restore_padding
from .teacher_embeddings import ItemEmbedding

# Distance of a key that a query must not see; with infinity the gradient of the decay would be NaN.
_UNSEEN = 1e30


class SASRecAttention(nn.Module):
    """Causal multi-head attention over right-padded sequences; padding comes last and needs no mask."""

    def __init__(self, config: SASRecConfig, output_projection: bool):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size) if output_projection else nn.Identity()
        # log of how fast each head's attention fades with distance
        self.log_decay = nn.Parameter(torch.empty(config.num_attention_heads)) if config.attention_decay else None

    def forward(
        self,
        queries: torch.Tensor,
        keys_and_values: torch.Tensor,
        last: torch.Tensor | int | None = None,
        distances: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(batch, queries, hidden): of every position, or only of the position `last` of each row."""
        mask = self.mask(keys_and_values.shape[1], last, distances, keys_and_values.device)
        attended = F.scaled_dot_product_attention(
            self.split_heads(self.q_proj(queries)),  # (batch, heads, queries, head size)
            self.split_heads(self.k_proj(keys_and_values)),
            self.split_heads(self.v_proj(keys_and_values)),
            attn_mask=mask.to(queries.dtype) if mask is not None and mask.is_floating_point() else mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and last is None,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def split_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) -> (batch, heads, length, head size)"""
        batch, length, hidden = projected.shape
        return projected.view(batch, length, self.num_heads, hidden // self.num_heads).transpose(1, 2)

    def mask(
        self, length: int, last: torch.Tensor | int | None, distances: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """The mask for `scaled_dot_product_attention`; None where a query sees all positions, or all before it.

        It is boolean, or with `attention_decay` the bias on the scores, -decay x distance; `distances` are those of
        `attention_distances`.
        """
        if self.log_decay is not None:
            assert distances is not None  # the encoder has them for all layers
            if last is not None:
                distances = distances[last].view(-1, 1, 1, length)  # (batch or 1, 1, 1, length)
            return -self.log_decay.exp().view(1, -1, 1, 1) * distances  # (batch or 1, heads, queries, length)
        if isinstance(last, torch.Tensor):
            return torch.arange(length, device=device) <= last.view(-1, 1, 1, 1)  # (batch, 1, 1, length)
        return None


def attention_distances(length: int, device: torch.device) -> torch.Tensor:
    """(length, length): how many positions each query is behind each key, and `_UNSEEN` for later keys."""
    places = torch.arange(length, device=device, dtype=torch.float32)
    distances = places.unsqueeze(1) - places
    return distances.masked_fill(distances < 0, _UNSEEN)


class SASRecFeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: nn.Module):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.activation = activation
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class SASRecPreNormLayer(GradientCheckpointingLayer):
    """The modern block: x + attention(LN(x)), then x + feed-forward(LN(x)), GELU, feed-forward 4 x as wide."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SASRecAttention(config, output_projection=True)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = SASRecFeedForward(
            config.hidden_size, config.intermediate_size or 4 * config.hidden_size, nn.GELU()
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        last: torch.Tensor | int | None = None,
        distances: torch.Tensor | None = None,
    ) -> torch.Tensor:
        normed = queries = self.attention_norm(hidden_states)
        if last is not None:
            hidden_states, queries = at_position(hidden_states, last), at_position(normed, last)
        hidden_states = hidden_states + self.dropout(self.attention(queries, normed, last, distances))
        feed_forward = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + self.dropout(feed_forward)  # (batch, length, hidden)


class SASRecReferenceLayer(GradientCheckpointingLayer):
    """The block of LLaRA, iLoRA and DLLM2Rec, to the digit (dropout sits where the published program has it).

    It departs from the SASRec paper: queries are normalised but keys and values are not, the residual is taken on the
    normalised query, and the feed-forward has its own residual and layer normalisation inside.
    """

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SASRecAttention(config, output_projection=False)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = SASRecFeedForward(
            config.hidden_size, config.intermediate_size or config.hidden_size, nn.ReLU()
        )
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        last: torch.Tensor | int | None = None,
        distances: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries = self.attention_norm(hidden_states)
        if last is not None:
            queries = at_position(queries, last)
        hidden_states = self.dropout(self.attention(queries, hidden_states, last, distances)) + queries
        normed = self.feed_forward_norm(hidden_states)
        return self.output_norm(self.dropout(self.feed_forward(normed)) + normed)  # (batch, length, hidden)


class SASRecPreTrainedModel(NextItemPreTrainedModel):
    config: SASRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SASRecAttention) and module.log_decay is not None:
            # Speeds from 0.4 (half of the attention on the newest two items) to 0.1 (on the newest seven).
            speeds = torch.logspace(math.log10(0.4), math.log10(0.1), module.num_heads)
            init.copy_(module.log_decay, speeds.log())


class SASRecModel(SASRecPreTrainedModel):
    """The encoder: item ids in, one hidden state per position out."""

    def __init__(self, config: SASRecConfig):
        check_config(config, SASRecConfig)
        super().__init__(config)
        # A configuration's attributes are slow to read, which counts when one user waits.
        self.max_length, self.counts_from_newest = config.max_length, config.position_alignment == "newest"
        self.decays = config.attention_decay
        self.item_embedding = ItemEmbedding(config)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        layer_class = SASRecPreNormLayer if config.block_type == "pre_norm" else SASRecReferenceLayer
        self._no_split_modules = [layer_class.__name__]  # FSDP refuses names of layers that the model lacks
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    # Weights that a saved recommender has besides its encoder.
    _keys_to_ignore_on_load_unexpected = [r"^head\.", "item_counts"]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.item_embedding

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> CommitInfo | None:
        """As in `NextItemPreTrainedModel`, but only to a folder: an encoder has no card, since it recommends nothing.

        Raises:
            ValueError: with `push_to_hub`.
        """
        if push_to_hub:
            raise ValueError(
                "SASRecModel is an encoder, which recommends nothing: expected a model with a head; push the "
                "SASRecForNextItem whose encoder it is"
            )
        return super().save_pretrained(save_directory, **kwargs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        """(batch, length) item ids, padding on either side -> last_hidden_state (batch, length, hidden)."""
        self.check_input(input_ids, attention_mask=attention_mask)
        real, order, slots = padding_to_the_end(input_ids, attention_mask)
        hidden_states = self.encode((input_ids * real).gather(1, order), real.sum(1))
        return BaseModelOutput(last_hidden_state=restore_padding(hidden_states, real, slots))

    def encode(
        self,
        item_ids: torch.Tensor,
        lengths: torch.Tensor | None,
        only_last: bool = False,
        teacher_embeddings: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Encoder.encode`; with `only_last`, the last block computes no other position."""
        length = item_ids.shape[1]
        first = self.max_length - length if self.counts_from_newest and lengths is None else 0
        positions = torch.arange(first, first + length, device=item_ids.device)  # (length,)
        if self.counts_from_newest and lengths is not None:
            positions = positions + (self.max_length - lengths).unsqueeze(1)  # (batch, length)
            positions = positions.clamp(max=self.max_length - 1)  # padding comes after the newest item
        item_embeddings = self.item_embedding(item_ids, teacher_embeddings, table)  # (batch, length, hidden)
        hidden_states = self.dropout(item_embeddings + self.position_embedding(positions))
        distances = attention_distances(length, item_ids.device) if self.decays else None  # the same in all layers
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, None, distances)
        last = last_positions(lengths, length) if only_last else None
        return self.final_norm(last_layer(hidden_states, last, distances))


class SASRecForNextItem(EncoderForNextItem, SASRecPreTrainedModel):
    """SASRec with a head that scores the whole catalogue: the recommender that is served.

    Args:
        config: the architecture and the training loss.
    """

    config: SASRecConfig
    model: SASRecModel

    def __init__(self, config: SASRecConfig):
        super().__init__(config, SASRecModel(config))

    @torch.no_grad()
    def start_from_item_embeddings(
        self,
        embeddings: torch.Tensor,
        mixing: float = 0.3,
        item_counts: torch.Tensor | None = None,
        repeat_share: float | None = None,
    ) -> None:
        """Let training begin from known item embeddings instead of random numbers.

        The table takes the embeddings, and the first block's values and output become the identity, the latter times
        `mixing`: before any training, a history is the sum of its newest item and an average of the others, and the
        nearest items are recommended.

        Args:
            embeddings: (num_items + 1, hidden), row 0 for padding.
            mixing: weight of the average in the sum.
            item_counts: (num_items + 1,), the occurrences of each item in training; with `head_bias` the biases
                start from their logarithms.
            repeat_share: share of the targets in training that their history contains; with `repeat_bias` this bias
                starts from its logarithm. Before training, the model recommends the items of a history: a bias
                that had to be learnt first would come too late to keep the embeddings that training starts from.

        Raises:
            ValueError: for another shape, for the reference block, whose attention has no output projection, and for a
                share outside (0, 1].
        """
        table = self.model.item_embedding.weight
        if embeddings.shape != table.shape:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}: expected {tuple(table.shape)}, (num_items + 1, "
                "hidden_size)"
            )
        first_layer = self.model.layers[0]
        if not isinstance(first_layer, SASRecPreNormLayer):
            raise ValueError(f"block_type is {self.config.block_type!r}: expected pre_norm to start from embeddings")
        if repeat_share is not None and not 0 < repeat_share <= 1:
            raise ValueError(f"repeat_share is {repeat_share}: expected a number above 0 and at most 1")
        identity = torch.eye(self.config.hidden_size, dtype=table.dtype, device=table.device)
        table.copy_(embeddings)
        table[self.config.pad_token_id] = 0
        first_layer.attention.v_proj.weight.add_(identity)
        first_layer.attention.o_proj.get_parameter("weight").add_(identity, alpha=mixing)
        if self.config.head_bias and item_counts is not None:
            log_counts = item_counts.to(table).log1p()
            self.head.bias.copy_(log_counts - log_counts[1:].mean())
        if self.head.repeat_bias is not None and repeat_share is not None:
            self.head.repeat_bias.fill_(math.log(repeat_share))


SASRecForNextItem.register_for_auto_class("AutoModel")

__all__ = ["SASRecForNextItem", "SASRecModel"]
