"""An encoder of histories with a head over the catalogue: the part that all trained next-item models share."""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID, TEACHER_FIELDS, NextItemConfig
from .next_item_head import NextItemHead, first_occurrences
from .next_item_model import NextItemPreTrainedModel
from .next_item_output import NextItemOutput
from .padding import (
    at_position,
    can_look,
    last_positions,
    lowest_and_highest,
    padding_to_the_end,
    places_behind_padding,
    restore_padding,
)
from .popular_negatives import draw_items, ends_of_shares, log_probabilities
from .table_gradients import table_for_lookups
from .teacher_embeddings import ItemEmbedding
from .top_k import ItemMasks, top_k_in_chunks

_TEACHER_TABLE = "model.item_embedding.teacher.table"


class _KeptShares(NamedTuple):
    """The shares that negatives are drawn by, with what they were computed from.

    Args:
        ends: of `ends_of_shares`.
        counts: the tensor of the counts itself.
        version: of its contents.
    """

    ends: torch.Tensor
    counts: torch.Tensor
    version: int | None


class Encoder(Protocol):
    """Reads histories: what `EncoderForNextItem` asks of the module that it is built around."""

    item_embedding: ItemEmbedding

    def encode(
        self,
        item_ids: torch.Tensor,
        lengths: torch.Tensor | None,
        only_last: bool = False,
        teacher_embeddings: torch.Tensor | None = None,
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of sequences.

        Args:
            item_ids: (batch, length), padding last.
            lengths: (batch,), number of real items; None when there is no padding.
            only_last: return the last real position only.
            teacher_embeddings: (num_items + 1, teacher_embedding_size) to read instead of the stored ones, or None.
            table: the item table as `table_for_lookups` returns it, or None.

        Returns:
            (batch, length, hidden), or (batch, 1, hidden) with `only_last`.
        """


class EncoderForNextItem(NextItemPreTrainedModel):
    """A next-item model that is trained by gradients.

    The loss is averaged over the labelled positions, or over `num_items_in_batch` of them when the Trainer counts the
    positions of a whole accumulated and distributed batch.

    Args:
        config: the architecture and the training loss.
        encoder: a module that reads histories.
    """

    config: NextItemConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"head.weight": "model.item_embedding.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: NextItemConfig, encoder: Encoder):
        super().__init__(config)
        self.model = encoder
        self.head = NextItemHead(config)
        if config.tie_word_embeddings:
            self._keys_to_ignore_on_save = ["head.weight"]  # the Trainer would warn that a checkpoint lacks it
        self._shares: _KeptShares | None = None
        if config.popularity_power:
            self.register_buffer("item_counts", torch.zeros(config.num_items + 1))
        self._keep_buffers_from_broadcasts()
        self._find_head_offsets()
        self.post_init()

    def _keep_buffers_from_broadcasts(self) -> None:
        """Every process has the same tables: broadcasting them in every step would waste time."""
        tables = [name for name, _ in self.named_buffers() if name in ("item_counts", _TEACHER_TABLE)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, tables)

    def _find_head_offsets(self) -> None:
        both = self.config.teacher_embedding_use == "input_and_head"
        self._head_has_offsets = self.config.teacher_embedding_size is not None and both

    @property
    def device(self) -> torch.device:
        """As in transformers, without a walk through the model, which counts when one user waits."""
        return self.head.weight.device

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.item_embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head: FSDP keeps it together with the table that it is tied to."""
        return self.head

    def set_item_counts(self, item_counts: torch.Tensor) -> None:
        """Set the training counts, (num_items + 1,), from which `popularity_power` draws negatives.

        Raises:
            ValueError: without `popularity_power` in the configuration, for another shape, and for counts of which none
                is positive or some are not finite.
        """
        if not self.config.popularity_power:
            raise ValueError("popularity_power is 0: expected a positive one, since uniform negatives read no counts")
        if item_counts.shape != self.item_counts.shape:
            raise ValueError(
                f"item_counts has shape {tuple(item_counts.shape)}: expected {tuple(self.item_counts.shape)}, "
                "one count per item and one for padding"
            )
        self.item_counts.copy_(item_counts)
        self.item_counts[PADDING_ITEM_ID] = 0
        self._shares = self._shares_of_counts()

    def set_teacher_embeddings(self, table: torch.Tensor) -> None:
        """Set the language model's item embeddings, (num_items + 1, teacher_embedding_size), row 0 for padding.

        They are saved with the model until `fold_teacher_embeddings`, so a checkpoint needs nothing else to resume.

        Raises:
            ValueError: without `teacher_embedding_size` in the configuration, for another shape, numbers that are not
                finite, or nothing but zeros.
        """
        if self.model.item_embedding.teacher is None:
            raise ValueError(
                "teacher_embedding_size is None: expected a model whose configuration has teacher_embedding_size="
                f"{table.shape[-1]}"
            )
        self.model.item_embedding.teacher.set_table(table)

    @torch.no_grad()
    def fold_teacher_embeddings(self):
        """Add the projected teacher embeddings to the item table and remove them from the model.

        Scores do not change, and serving costs as little as with a model that never had teacher embeddings. With
        teacher_embedding_use="input" a tied head is untied, because it keeps scoring with the table without them.

        Returns:
            The model itself, unchanged when it has no teacher embeddings.

        Raises:
            ValueError: before `set_teacher_embeddings`, and while the weights are spread over processes.
        """
        embedding = self.model.item_embedding
        if embedding.teacher is None:
            return self
        if not embedding.weight.numel():
            raise ValueError(
                "the weights are spread over processes (ZeRO-3): save the model, load it in one process, fold there"
            )
        offsets = embedding.teacher().to(embedding.weight)  # (num_items + 1, hidden)
        config = copy.deepcopy(self.config)
        if config.tie_word_embeddings and not self._head_has_offsets:
            self.head.weight = nn.Parameter(embedding.weight.clone())
            config.tie_word_embeddings, self._keys_to_ignore_on_save = False, None
            self.all_tied_weights_keys = {}
        embedding.weight[1:] += offsets[1:]
        embedding.teacher = None
        plain = type(config)()
        for name in TEACHER_FIELDS:
            setattr(config, name, getattr(plain, name))
        for module in self.modules():
            if isinstance(module, NextItemPreTrainedModel | NextItemHead):
                module.config = config
        self._keep_buffers_from_broadcasts()
        self._find_head_offsets()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        seen_items: torch.Tensor | None = None,
        teacher_embeddings: torch.Tensor | None = None,
        scored_positions: torch.Tensor | None = None,
        scored_items: torch.Tensor | None = None,
        label_indices: torch.Tensor | None = None,
        soft_targets: Callable | None = None,
        num_best: int = 0,
        only_last: bool = False,
    ) -> NextItemOutput:
        """Score the next item of each history.

        Args:
            input_ids: (batch, length) item ids 1..num_items, 0 for padding on either side; length <= max_length.
            attention_mask: (batch, length), 0 at padding; None means `input_ids != 0`.
            labels: (batch, length), the next item at each position, -100 where there is none.
            num_items_in_batch: number of labels to average over; None means those of this call.
            seen_items: (batch, any); ignored. Evaluation batches carry it for the metrics.
            teacher_embeddings: (num_items + 1, teacher_embedding_size) to use in this call instead of those that
                `set_teacher_embeddings` stored.
            scored_positions: (batch, length) bool, real positions whose scores are returned, instead of the last ones:
                for losses on scores; or (positions,) int64, their indices in the flattened (batch * length), ascending.
                Rows of `logits` are then these positions, one history after the other.
            scored_items: (items,) different ids, none of them padding, whose scores are returned, in their order; None
                means the catalogue. With `scored_positions`, also (positions, items), other items for each position.
            label_indices: (labels,) int64, the indices of all labels in the flattened (batch * length), ascending, as
                the Trainer's batches carry them. None finds them, which waits for an accelerator; while a graph is
                captured, the loss is then computed at unlabelled positions too, and left out.
            soft_targets: further distributions to learn from at the labelled positions, as `NextItemHead.forward` takes
                them; for the losses cross_entropy and sampled_softmax with negative_sharing "batch".
            num_best: number of best items to return at each label, for the loss cross_entropy.
            only_last: return `logits` and `user_embedding` only, of the stored tables, and spare the last layer all
                other positions: for evaluation. Of the other arguments, only `attention_mask` may be given.

        Returns:
            loss: scalar, when `labels` are given.
            loss_parts: (1 + soft targets,) without gradient, when `labels` are given.
            best_items: (labels, num_best) item ids with the highest scores, best first, when asked for.
            logits: (batch, num_items + 1) after the last real item, -inf for padding; None in a training step without
                `scored_positions`, whose memory must not grow with the catalogue, and while the table is sharded. With
                `scored_positions` (positions, num_items + 1), with `scored_items` (..., items).
            last_hidden_state: (batch, length, hidden), zero at padding.
            user_embedding: (batch, hidden), the hidden state at the last real item.

        Raises:
            ValueError: for inputs of other shapes, longer than `max_length`, or, on a CPU, ids and labels outside the
                catalogue; and for `only_last` with labels or what else it does not read.
        """
        if only_last:
            unread = (labels, teacher_embeddings, scored_positions, scored_items, soft_targets)
            if any(each is not None for each in unread):
                raise ValueError(
                    "only_last returns the scores of the whole catalogue after the newest items: expected no labels, "
                    "teacher_embeddings, scored_positions, scored_items or soft_targets beside it"
                )
            self.check_input(input_ids, attention_mask=attention_mask)
            newest = input_ids if attention_mask is None else input_ids * attention_mask.ne(0)
            user_embedding = self.user_embeddings(newest)
            return NextItemOutput(logits=self.score_users(user_embedding, newest), user_embedding=user_embedding)
        mask = scored_positions if scored_positions is not None and scored_positions.dtype == torch.bool else None
        self.check_input(input_ids, attention_mask=attention_mask, labels=labels, scored_positions=mask)
        real, order, slots = padding_to_the_end(input_ids, attention_mask)
        lengths = real.sum(1)  # (batch,)
        item_ids = (input_ids * real).gather(1, order)  # (batch, length), padding last
        if labels is None or scored_positions is not None:
            self.check_table_is_whole()
        table = self.model.item_embedding.sharded  # where a loss reads all that it needs of the item table by lookups
        if table is None and labels is not None and self.config.loss_type != "cross_entropy":
            table = table_for_lookups(self.model.item_embedding)
        hidden_states = self.model.encode(item_ids, lengths, teacher_embeddings=teacher_embeddings, table=table)
        user_embedding = at_position(hidden_states, last_positions(lengths, item_ids.shape[1])).squeeze(1)
        item_offsets = self._item_offsets(teacher_embeddings)
        loss = loss_parts = best_items = None
        if labels is not None:
            self.check_positions(labels.ne(IGNORED_LABEL).gather(1, order), lengths, "labels")
            if label_indices is None and not torch.compiler.is_compiling():
                label_indices = labels.ne(IGNORED_LABEL).flatten().nonzero().squeeze(1)
            if num_best:
                best_items = item_ids.new_empty(len(label_indices), num_best)
            loss, loss_parts = self._loss(
                hidden_states, item_ids, labels, label_indices, slots, num_items_in_batch, item_offsets, soft_targets,
                table if self.config.tie_word_embeddings else None, best_items,
            )  # fmt: skip
        logits = None
        if scored_positions is not None:
            if mask is not None:
                self.check_positions(mask.gather(1, order), lengths, "scored_positions")
                scored_positions = mask.flatten().nonzero().squeeze(1)
            positions, repeated_items = self._select(hidden_states, item_ids, scored_positions, slots)
            logits = self.head(positions, repeated_items, item_offsets=item_offsets, scored_items=scored_items)
        elif (not self.training and self.model.item_embedding.sharded is None) or labels is None:
            repeated_items = self._repeated_items(item_ids)
            logits = self.head(user_embedding, repeated_items, item_offsets=item_offsets, scored_items=scored_items)
        return NextItemOutput(
            loss=loss,
            loss_parts=loss_parts,
            best_items=best_items,
            logits=logits,
            last_hidden_state=restore_padding(hidden_states, real, slots),
            user_embedding=user_embedding,
        )

    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits of `forward`, (batch, num_items + 1), without the hidden states that only training reads."""
        return self.score_users(self.user_embeddings(input_ids), input_ids)

    def user_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The `user_embedding` of `forward`, (batch, hidden), of (batch, length) item ids."""
        self.check_table_is_whole()
        lengths, item_ids = None, input_ids
        if not can_look(input_ids) or not input_ids.numpy().all():  # with padding, as far as one can know
            real, order, _ = padding_to_the_end(input_ids, None)
            lengths, item_ids = real.sum(1), input_ids.gather(1, order)
        return self.model.encode(item_ids, lengths, only_last=True).squeeze(1)

    def score_users(self, user_embeddings: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, num_items + 1) scores of user embeddings (batch, hidden) whose histories are `input_ids`."""
        self.check_table_is_whole()
        return self.head(user_embeddings, self._repeated_items(input_ids), item_offsets=self._item_offsets())

    def _similarities(self, asked: torch.Tensor) -> Callable[[slice, slice, torch.Tensor], None]:
        self.check_table_is_whole()
        table, offsets = self.head.weight, self._item_offsets()

        def directions(items: slice | torch.Tensor) -> torch.Tensor:
            rows = table[items] if offsets is None else table[items] + offsets[items]
            return F.normalize(rows.float(), dim=-1)  # (items, hidden)

        of_asked = directions(asked)
        return lambda rows, items, scores: torch.mm(of_asked[rows], directions(items).t(), out=scores)

    def best_items(self, histories: torch.Tensor, top_k: int, masks: ItemMasks) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `NextItemPreTrainedModel`; memory does not grow with histories x items."""
        if can_look(histories) and histories.numpy().any(1).all():  # the common case, without a tensor
            return self._best_of_newest(histories, top_k, masks)
        has_items = histories.any(1)  # (batch,)
        if has_items.all():
            return self._best_of_newest(histories, top_k, masks)
        item_ids = histories.new_empty(len(histories), top_k)
        log_probabilities = torch.empty(item_ids.shape, device=self.device)
        if has_items.any():
            answers = self._best_of_newest(histories[has_items], top_k, masks.of(has_items))
            item_ids[has_items], log_probabilities[has_items] = answers
        scores = self.popular_scores()  # (num_items + 1,)
        answers = top_k_in_chunks(
            lambda users, items, out: out.copy_(scores[items].expand_as(out)),
            int((~has_items).sum()),
            self.config.num_items,
            top_k,
            masks.of(~has_items),
            self.device,
        )
        item_ids[~has_items], log_probabilities[~has_items] = _with_log_probabilities(*answers)
        return item_ids, log_probabilities

    def _best_of_newest(self, histories: torch.Tensor, top_k: int, masks: ItemMasks):
        newest = self.newest_items(histories)
        answers = self.head(
            self.user_embeddings(newest),
            self._repeated_items(newest),
            item_offsets=self._item_offsets(),
            top_k=top_k,
            masks=masks,
        )
        return _with_log_probabilities(*answers)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in `NextItemPreTrainedModel`.

        Raises:
            ValueError: while the item table is sharded, unless `state_dict` is given.
        """
        if kwargs.get("state_dict") is None:
            self.check_table_is_whole()
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def check_table_is_whole(self) -> None:
        """Raise a ValueError while a training spreads the item table over its processes."""
        if self.model.item_embedding.sharded is not None:
            raise ValueError(
                "the item table is spread over processes (item_table 'row_sharded'): expected a model that has it "
                "whole; write the model by trainer.save_model in all processes, and load it with from_pretrained"
            )

    def check_positions(self, chosen: torch.Tensor, lengths: torch.Tensor, name: str) -> None:
        """Raise a ValueError where `chosen` (batch, length), padding last, has positions without a hidden state."""

    def _item_offsets(self, teacher_embeddings: torch.Tensor | None = None) -> torch.Tensor | None:
        """(num_items + 1, hidden), the projected teacher embeddings that are added to the table that scores."""
        if not self._head_has_offsets:
            return None
        return self.model.item_embedding.teacher(table=teacher_embeddings)

    def _repeated_items(self, item_ids: torch.Tensor) -> torch.Tensor | None:
        """The different items of each history, (batch, length), where the head's repeat bias reads them."""
        return None if self.head.repeat_bias is None else first_occurrences(item_ids)

    def _select(self, hidden_states, item_ids, indices, slots):
        """Hidden states of the chosen positions, (positions, hidden), and the items seen there, (positions, length).

        `indices` (positions,) count in the flattened input; None means all positions. `slots` are those of
        `padding_to_the_end`, behind which the padding of the hidden states lies.
        """
        return self.states_at(hidden_states, item_ids, places_behind_padding(slots, indices))

    def states_at(
        self, hidden_states: torch.Tensor, item_ids: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Some hidden states, and the items seen there.

        Args:
            hidden_states: (batch, length, hidden), of `encode`.
            item_ids: (batch, length), padding last.
            places: (positions,) in the flattened (batch * length).

        Returns:
            (positions, hidden), and the different items of each history up to there, (positions, length), padded with
            0, where the head's repeat bias reads them, else None.
        """
        length = item_ids.shape[1]
        repeated_items = self._repeated_items(item_ids)  # (batch, length)
        if repeated_items is not None:
            until_here = repeated_items.unsqueeze(1).expand(-1, length, -1).tril()  # (batch, length, length)
            repeated_items = until_here.flatten(0, 1)[places]  # (positions, length)
        return hidden_states.flatten(0, 1)[places], repeated_items

    def _loss(
        self, hidden_states, item_ids, labels, label_indices, slots, num_items_in_batch, item_offsets, soft_targets,
        table, best_items,
    ):  # fmt: skip
        # Selecting the labelled positions saves the scores of every padded one.
        positions, repeated_items = self._select(hidden_states, item_ids, label_indices, slots)
        targets, counted = labels.flatten(), None  # (batch * length,)
        if label_indices is None:
            counted = targets.ne(IGNORED_LABEL)
            targets = targets.where(counted, 1)
            num_labels = counted.sum().clamp(min=1)
        else:
            targets = targets[label_indices]  # (positions,)
            num_labels = max(1, targets.shape[0])
        self._check_targets(targets)
        negatives, log_q = self._draw_negatives(targets)
        loss, parts = self.head(
            positions,
            repeated_items,
            targets,
            negatives,
            log_q,
            item_offsets,
            counted=counted,
            history_items=item_ids.flatten(),
            soft_targets=soft_targets,
            table=table,
            best_items=best_items,
        )
        count = num_labels if num_items_in_batch is None else num_items_in_batch
        return loss / count, parts / count

    def _check_targets(self, targets: torch.Tensor) -> None:
        found = lowest_and_highest(targets)
        if found is not None and (found[0] < 1 or found[1] > self.config.num_items):
            raise ValueError(
                f"labels contain {found[0] if found[0] < 1 else found[1]}: expected item ids "
                f"1..{self.config.num_items}, and {IGNORED_LABEL} where there is no next item"
            )

    def _draw_negatives(self, targets: torch.Tensor):
        config = self.config
        if config.loss_type == "cross_entropy":
            return None, None
        shape = (config.num_negatives,)
        if config.negative_sharing == "position":
            shape = (targets.shape[0], config.num_negatives)
        if not config.popularity_power:
            log_q = -math.log(config.num_items) if config.logq_correction else None
            return torch.randint(1, config.num_items + 1, shape, device=targets.device), log_q
        ends = self._ends_of_shares()
        drawn = draw_items(ends, shape)
        return drawn, log_probabilities(ends, drawn) if config.logq_correction else None

    def _ends_of_shares(self) -> torch.Tensor:
        """What popular negatives are drawn by, computed again only after the counts have changed."""
        if torch.compiler.is_compiling():  # a graph cannot ask for versions: see `_apply` and `_load_from_state_dict`
            kept = self._shares
            return ends_of_shares(self.item_counts, self.config.popularity_power) if kept is None else kept.ends
        kept, version = self._shares, _version(self.item_counts)
        if kept is None or kept.counts is not self.item_counts or version is None or kept.version != version:
            self._shares = self._shares_of_counts()
        return self._shares.ends

    def _shares_of_counts(self) -> _KeptShares:
        counts = self.item_counts
        if not counts.gt(0).any():
            raise ValueError(
                "popularity_power needs item counts, of which some are positive: call set_item_counts before training"
            )
        if not counts.isfinite().all():
            raise ValueError(
                f"item_counts have numbers that are not finite in {counts.dtype}: expected finite counts; float16 ends "
                "at 65504, so train in bfloat16 or float32"
            )
        return _KeptShares(ends_of_shares(counts, self.config.popularity_power), counts, _version(counts))

    def _apply(self, *args, **kwargs):
        """As in torch; what negatives are drawn by moves along."""
        super()._apply(*args, **kwargs)
        if self._shares is not None and self.item_counts is not self._shares.counts:
            ends, device = self._shares.ends, self.item_counts.device
            self._shares = None if device.type == "meta" else self._shares._replace(ends=ends.to(device))
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        """As in torch; forgets what negatives were drawn by."""
        self._shares = None
        super()._load_from_state_dict(*args, **kwargs)


def _version(tensor: torch.Tensor) -> int | None:
    """A number that every change in place increases, or None for tensors of inference mode, which have none."""
    return None if tensor.is_inference() else tensor._version


def _with_log_probabilities(
    item_ids: torch.Tensor, scores: torch.Tensor, log_sum_exp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Item ids and the log of their softmax over the catalogue, of what `top_k_in_chunks` returns."""
    return item_ids, (scores - log_sum_exp.unsqueeze(1)).clamp(max=0)


__all__ = ["EncoderForNextItem"]
