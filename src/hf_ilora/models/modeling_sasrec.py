"""SASRec as a `PreTrainedModel`: a causal transformer over item ids that scores the next item."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .configuration_sasrec import PADDING_ITEM_ID, SASRecConfig
from .next_item_losses import chunked_cross_entropy, gbce_loss, sampled_softmax_loss
from .next_item_model import NextItemPreTrainedModel
from .next_item_output import NextItemOutput

IGNORED_LABEL = -100


class SASRecAttention(nn.Module):
    """Causal multi-head attention over right-padded sequences; padding needs no mask, since it stands last."""

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

    def forward(self, queries: torch.Tensor, keys_and_values: torch.Tensor, last: torch.Tensor | int | None = None):
        """(batch, queries, hidden): of every position, or only of the position `last` of each row."""
        mask = self.mask(keys_and_values.shape[1], last)
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

    def mask(self, length: int, last: torch.Tensor | int | None) -> torch.Tensor | None:
        """What each query may see, for `scaled_dot_product_attention`; None where a query sees all, or all before it.

        Without fading attention it is boolean, with it what is added to the scores: -decay x distance.
        """
        if self.log_decay is None and not isinstance(last, torch.Tensor):
            return None
        places = torch.arange(length, device=self.q_proj.weight.device)
        if last is None:
            distance = places.unsqueeze(1) - places  # (length, length), positive for earlier positions
        elif isinstance(last, int):
            distance = (last - places).unsqueeze(0)  # (1, length)
        else:
            distance = (last.unsqueeze(1) - places).view(-1, 1, 1, length)  # (batch, 1, 1, length)
        if self.log_decay is None:
            return distance >= 0
        bias = -self.log_decay.exp().view(-1, 1, 1) * distance.clamp(min=0)  # (..., heads, queries, length)
        return bias.masked_fill(distance < 0, float("-inf"))


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

    def forward(self, hidden_states: torch.Tensor, last: torch.Tensor | int | None = None) -> torch.Tensor:
        normed = queries = self.attention_norm(hidden_states)
        if last is not None:
            hidden_states, queries = at_position(hidden_states, last), at_position(normed, last)
        hidden_states = hidden_states + self.dropout(self.attention(queries, normed, last))
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

    def forward(self, hidden_states: torch.Tensor, last: torch.Tensor | int | None = None) -> torch.Tensor:
        queries = self.attention_norm(hidden_states)
        if last is not None:
            queries = at_position(queries, last)
        hidden_states = self.dropout(self.attention(queries, hidden_states, last)) + queries
        normed = self.feed_forward_norm(hidden_states)
        return self.output_norm(self.dropout(self.feed_forward(normed)) + normed)  # (batch, length, hidden)


class NextItemHead(nn.Linear):
    """Scores items against hidden states and computes the training loss with its own table.

    Loss and scores live in one module's forward, because ZeRO-3 gathers a module's weights only around its forward.
    """

    def __init__(self, config: SASRecConfig):
        super().__init__(config.hidden_size, config.num_items + 1, bias=config.head_bias)
        self.config, self.score_temperature = config, config.score_temperature
        self.repeat_bias = nn.Parameter(torch.zeros(())) if config.repeat_bias else None

    def forward(self, hidden_states, repeated_items, targets=None, negatives=None, log_q=None, scored_items=None):
        """Scores, or the summed training loss when `targets` are given.

        Args:
            hidden_states: (positions, hidden).
            repeated_items: (positions, length) different items that each position has seen, padded with 0; only read
                with `repeat_bias`.
            targets: (positions,) item ids, or None.
            negatives: (negatives,) or (positions, negatives) item ids, for the sampled losses.
            log_q: (num_items + 1,) log probability of each item in the draw of negatives, or None.
            scored_items: (items,) different ids, none of them padding: the scores are of these, in their order.

        Returns:
            (positions, num_items + 1) scores with -inf for padding, (positions, items) of the `scored_items`, or the
            scalar loss.
        """
        weight = self.weight
        if self.score_temperature is not None:
            hidden_states = F.normalize(hidden_states, dim=-1) / self.score_temperature
            weight = F.normalize(weight, dim=-1)
        if targets is None:
            # In bfloat16 many items would tie, and ties cost quality: scores are always computed in float32.
            rows = slice(None) if scored_items is None else scored_items
            with torch.autocast(hidden_states.device.type, enabled=False):
                bias = None if self.bias is None else self.bias.float()[rows]
                scores = F.linear(hidden_states.float(), weight[rows].float(), bias)  # (positions, items)
            if scored_items is not None:
                if self.repeat_bias is not None:
                    repeats = repeated_items.unsqueeze(2).eq(scored_items).any(1)  # (positions, items)
                    scores = scores + repeats * self.repeat_bias
                return scores
            if self.repeat_bias is not None:
                scores = scores.scatter_add(1, repeated_items, self.repeat_bias.to(scores).expand(repeated_items.shape))
            scores[:, PADDING_ITEM_ID] = float("-inf")
            return scores
        if self.config.loss_type == "cross_entropy":
            return chunked_cross_entropy(hidden_states, weight, self.bias, targets, self.repeat_bias, repeated_items)
        target_scores = (hidden_states * weight[targets]).sum(-1)  # (positions,)
        if negatives.dim() == 1:
            negative_scores = F.linear(hidden_states, weight[negatives])  # (positions, negatives)
        else:
            negative_scores = torch.einsum("ph,pnh->pn", hidden_states, weight[negatives])
        if self.bias is not None:
            target_scores, negative_scores = target_scores + self.bias[targets], negative_scores + self.bias[negatives]
        collisions = negatives == targets.unsqueeze(1)  # (positions, negatives)
        if self.config.loss_type == "sampled_softmax":
            corrections = () if log_q is None else (log_q[targets], log_q[negatives])
            return sampled_softmax_loss(target_scores, negative_scores, collisions, *corrections)
        calibration = self.config.gbce_calibration if self.config.loss_type == "gbce" else 0.0
        return gbce_loss(target_scores, negative_scores, collisions, self.config.num_items, calibration)


class SASRecPreTrainedModel(NextItemPreTrainedModel):
    config: SASRecConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SASRecPreNormLayer", "SASRecReferenceLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SASRecAttention) and module.log_decay is not None:
            # Speeds from 0.4 (half of the attention on the newest two items) to 0.1 (on the newest seven).
            speeds = torch.logspace(math.log10(0.4), math.log10(0.1), module.num_heads)
            init.copy_(module.log_decay, speeds.log())

    def check_input(self, input_ids, **aligned: torch.Tensor | None) -> None:
        """Raise a ValueError unless `input_ids` fit the model and `aligned` tensors have their shape."""
        self.check_item_ids(input_ids)
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}: expected (batch, length) with length <= "
                f"{self.config.max_length} (max_length); keep the newest items, as `recommend` does"
            )
        for name, tensor in aligned.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{name} have shape {tuple(tensor.shape)}: expected {tuple(input_ids.shape)}, that of input_ids"
                )


class SASRecModel(SASRecPreTrainedModel):
    """The encoder: item ids in, one hidden state per position out."""

    def __init__(self, config: SASRecConfig):
        if config.num_items is None:
            raise ValueError(
                "SASRecConfig.num_items is None: expected the size of the catalogue, as in SequenceDatasets"
            )
        super().__init__(config)
        # A configuration's attributes are slow to read, which counts when one user waits.
        self.max_length, self.counts_from_newest = config.max_length, config.position_alignment == "newest"
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=PADDING_ITEM_ID)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)
        layer_class = SASRecPreNormLayer if config.block_type == "pre_norm" else SASRecReferenceLayer
        self.layers = nn.ModuleList([layer_class(config) for _ in range(config.num_hidden_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    # What a saved recommender holds besides its encoder.
    _keys_to_ignore_on_load_unexpected = [r"^head\.", "item_counts"]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.item_embedding

    def forward(self, input_ids, attention_mask=None) -> BaseModelOutput:
        """(batch, length) item ids, padding on either side -> last_hidden_state (batch, length, hidden)."""
        self.check_input(input_ids, attention_mask=attention_mask)
        real, order, slots = padding_to_the_end(input_ids, attention_mask)
        hidden_states = self.encode((input_ids * real).gather(1, order), real.sum(1))
        return BaseModelOutput(last_hidden_state=restore_padding(hidden_states, real, slots))

    def encode(self, item_ids: torch.Tensor, lengths: torch.Tensor | None, only_last: bool = False) -> torch.Tensor:
        """Hidden states of right-padded sequences.

        Args:
            item_ids: (batch, length), padding last.
            lengths: (batch,), number of real items; None when there is no padding.
            only_last: spare the last block all positions but the last real one, which is all that a ranking needs.

        Returns:
            (batch, length, hidden), or (batch, 1, hidden) with `only_last`.
        """
        length = item_ids.shape[1]
        first = self.max_length - length if self.counts_from_newest and lengths is None else 0
        positions = torch.arange(first, first + length, device=item_ids.device)  # (length,)
        if self.counts_from_newest and lengths is not None:
            positions = positions + (self.max_length - lengths).unsqueeze(1)  # (batch, length)
            positions = positions.clamp(max=self.max_length - 1)  # padding stands behind the newest item
        hidden_states = self.dropout(self.item_embedding(item_ids) + self.position_embedding(positions))
        *layers, last_layer = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states)
        last = None
        if only_last:
            last = length - 1 if lengths is None else (lengths - 1).clamp(min=0)
        return self.final_norm(last_layer(hidden_states, last))


class SASRecForNextItem(SASRecPreTrainedModel):
    """SASRec with a head that scores the whole catalogue: the recommender that is served.

    Args:
        config: the architecture and the training loss.

    The loss is averaged over the labelled positions, or over `num_items_in_batch` of them when the Trainer counts the
    positions of a whole accumulated and distributed batch.
    """

    _tied_weights_keys = {"head.weight": "model.item_embedding.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.model = SASRecModel(config)
        self.head = NextItemHead(config)
        if config.tie_word_embeddings:
            self._keys_to_ignore_on_save = ["head.weight"]  # the Trainer would warn that a checkpoint lacks it
        if config.popularity_power:
            self.register_buffer("item_counts", torch.zeros(config.num_items + 1))
        self.post_init()

    def set_item_counts(self, item_counts: torch.Tensor) -> None:
        """Give the training counts, (num_items + 1,), that `popularity_power` draws negatives by."""
        if not self.config.popularity_power:
            raise ValueError("popularity_power is 0: expected a positive one, since uniform negatives read no counts")
        if item_counts.shape != self.item_counts.shape:
            raise ValueError(
                f"item_counts has shape {tuple(item_counts.shape)}: expected {tuple(self.item_counts.shape)}, "
                "one count per item and one for padding"
            )
        self.item_counts.copy_(item_counts)
        self.item_counts[PADDING_ITEM_ID] = 0

    @torch.no_grad()
    def start_from_item_embeddings(
        self, embeddings: torch.Tensor, mixing: float = 0.3, item_counts: torch.Tensor | None = None
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

        Raises:
            ValueError: for another shape, or for the reference block, whose attention has no output projection.
        """
        table = self.model.item_embedding.weight
        if embeddings.shape != table.shape:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}: expected {tuple(table.shape)}, (num_items + 1, "
                "hidden_size)"
            )
        if self.config.block_type != "pre_norm":
            raise ValueError(f"block_type is {self.config.block_type!r}: expected pre_norm to start from embeddings")
        identity = torch.eye(self.config.hidden_size, dtype=table.dtype, device=table.device)
        attention = self.model.layers[0].attention
        table.copy_(embeddings)
        table[PADDING_ITEM_ID] = 0
        attention.v_proj.weight.add_(identity)
        attention.o_proj.weight.add_(identity, alpha=mixing)
        if self.config.head_bias and item_counts is not None:
            log_counts = item_counts.to(table).log1p()
            self.head.bias.copy_(log_counts - log_counts[1:].mean())

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        seen_items: torch.Tensor | None = None,
        scored_positions: torch.Tensor | None = None,
        scored_items: torch.Tensor | None = None,
    ) -> NextItemOutput:
        """Score the next item of each history.

        Args:
            input_ids: (batch, length) item ids 1..num_items, 0 for padding on either side; length <= max_length.
            attention_mask: (batch, length), 0 where padding stands; None means `input_ids != 0`.
            labels: (batch, length), the next item at each position, -100 where there is none.
            num_items_in_batch: number of labels to average over; None means those of this call.
            seen_items: (batch, any); not read here. Evaluation batches carry it for the metrics.
            scored_positions: (batch, length) bool, real positions whose scores a distillation loss asks for.
            scored_items: (items,) different item ids, to score these alone at `scored_positions`.

        Returns:
            loss: scalar, when `labels` are given.
            logits: (batch, num_items + 1) after the last real item, -inf for padding; None in a training step, whose
                memory must not grow with the catalogue. With `scored_positions` those of (positions, num_items + 1) or
                (positions, items), in the order of rows and positions.
            last_hidden_state: (batch, length, hidden), zero at padding.
            user_embedding: (batch, hidden), the hidden state at the last real item.

        Raises:
            ValueError: for inputs of other shapes, longer than `max_length`, or, on a CPU, ids and labels outside the
                catalogue.
        """
        self.check_input(input_ids, attention_mask=attention_mask, labels=labels)
        real, order, slots = padding_to_the_end(input_ids, attention_mask)
        lengths = real.sum(1)  # (batch,)
        item_ids = (input_ids * real).gather(1, order)  # (batch, length), padding last
        hidden_states = self.model.encode(item_ids, lengths)  # (batch, length, hidden)
        user_embedding = at_position(hidden_states, (lengths - 1).clamp(min=0)).squeeze(1)  # (batch, hidden)
        loss = None
        if labels is not None:
            loss = self._loss(hidden_states, item_ids, labels.gather(1, order), num_items_in_batch)
        logits = None
        if scored_positions is not None:
            scored = scored_positions.gather(1, order)  # (batch, length)
            repeated_items = self._repeated_until(item_ids, scored)
            logits = self.head(hidden_states[scored], repeated_items, scored_items=scored_items)
        elif not self.training or labels is None:
            logits = self.head(user_embedding, self._repeated_items(item_ids))
        return NextItemOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=restore_padding(hidden_states, real, slots),
            user_embedding=user_embedding,
        )

    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of `forward`, (batch, num_items + 1), without the hidden states that only training reads."""
        return self.score_users(self.user_embeddings(input_ids), input_ids)

    def user_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The `user_embedding` of `forward`, (batch, hidden), of (batch, length) item ids."""
        lengths, item_ids = None, input_ids
        if not input_ids.all():  # with padding
            real, order, _ = padding_to_the_end(input_ids, None)
            lengths, item_ids = real.sum(1), input_ids.gather(1, order)
        return self.model.encode(item_ids, lengths, only_last=True).squeeze(1)

    def score_users(self, user_embeddings: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, num_items + 1) scores of user embeddings (batch, hidden) whose histories are `input_ids`."""
        return self.head(user_embeddings, self._repeated_items(input_ids))

    def _repeated_items(self, item_ids: torch.Tensor) -> torch.Tensor | None:
        """The different items of each history, (batch, length), where the head's repeat bias reads them."""
        return None if self.head.repeat_bias is None else first_occurrences(item_ids)

    def _repeated_until(self, item_ids: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor | None:
        """The different items up to each chosen position, (positions, length), where the repeat bias reads them.

        Args:
            item_ids: (batch, length), padding last.
            chosen: (batch, length) bool.
        """
        repeated_items = self._repeated_items(item_ids)  # (batch, length)
        if repeated_items is None:
            return None
        until_here = repeated_items.unsqueeze(1).expand(-1, item_ids.shape[1], -1).tril()  # (batch, length, length)
        return until_here[chosen]

    def _loss(self, hidden_states, item_ids, labels, num_items_in_batch):
        labelled = labels.ne(IGNORED_LABEL)  # (batch, length)
        # Selecting waits for the device once per step; it saves the scores of every padded position.
        positions, targets = hidden_states[labelled], labels[labelled]  # (positions, hidden), (positions,)
        if targets.device.type == "cpu" and len(targets):
            lowest, highest = torch.aminmax(targets)
            if lowest < 1 or highest > self.config.num_items:
                wrong = int(lowest if lowest < 1 else highest)
                raise ValueError(
                    f"labels hold {wrong}: expected item ids 1..{self.config.num_items}, and {IGNORED_LABEL} where "
                    "there is no next item"
                )
        negatives, log_q = self._draw_negatives(len(targets))
        loss = self.head(positions, self._repeated_until(item_ids, labelled), targets, negatives, log_q)
        return loss / (max(1, len(targets)) if num_items_in_batch is None else num_items_in_batch)

    def _draw_negatives(self, num_positions: int):
        config = self.config
        if config.loss_type == "cross_entropy":
            return None, None
        shape = (config.num_negatives,)
        if config.negative_sharing == "position":
            shape = (num_positions, config.num_negatives)
        if not config.popularity_power:
            return torch.randint(1, config.num_items + 1, shape, device=self.device), None
        if not self.item_counts.any():
            raise ValueError("popularity_power needs item counts: call set_item_counts before training")
        q = self.item_counts**config.popularity_power * (self.item_counts > 0)
        drawn = torch.multinomial(q, math.prod(shape), replacement=True).view(shape)
        if not config.logq_correction:
            return drawn, None
        # An item that training never drew counts as drawn once, so that the loss of evaluation stays finite.
        return drawn, (q / q.sum()).clamp(min=1 / self.item_counts.sum()).log()


def at_position(states: torch.Tensor, position: torch.Tensor | int) -> torch.Tensor:
    """(batch, length, hidden) and one position, or one per row (batch,), -> (batch, 1, hidden)."""
    if isinstance(position, int):
        return states[:, position : position + 1]
    return states.gather(1, position.view(-1, 1, 1).expand(-1, 1, states.shape[-1]))


def first_occurrences(item_ids: torch.Tensor) -> torch.Tensor:
    """(batch, length) item ids with every later occurrence of an item replaced by padding."""
    equal = item_ids.unsqueeze(2) == item_ids.unsqueeze(1)  # (batch, length, length)
    return item_ids.masked_fill(equal.tril(-1).any(-1), PADDING_ITEM_ID)


def padding_to_the_end(input_ids: torch.Tensor, attention_mask: torch.Tensor | None):
    """Where padding stands and how to move it behind the real items.

    Returns:
        real: (batch, length) bool.
        order: (batch, length), for `gather`: real items first, in their order.
        slots: (batch, length), the place of each input position in that order.
    """
    real = input_ids.ne(PADDING_ITEM_ID) if attention_mask is None else attention_mask.bool()
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return real, order, (real.cumsum(1) - 1).clamp(min=0)


def restore_padding(hidden_states: torch.Tensor, real: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Undo `padding_to_the_end`: (batch, length, hidden), zero where padding stands."""
    aligned = hidden_states.gather(1, slots.unsqueeze(-1).expand_as(hidden_states))
    return aligned * real.unsqueeze(-1)


__all__ = ["SASRecForNextItem", "SASRecModel"]
