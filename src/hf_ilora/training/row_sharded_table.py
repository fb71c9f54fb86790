"""An item table that is spread by rows over the processes of a launch."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_ilora.files import written_whole
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID, catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.next_item_head import NextItemHead
from hf_ilora.models.next_item.top_k import columns_in_chunk

# Bytes that are sent, or scores that are computed, at once.
_BYTES_AT_ONCE = 2**26
_SCORES_AT_ONCE = 2**24

# Of a model: what has a row for each item, and is no buffer.
TABLE_NAMES = ("model.item_embedding.weight", "head.weight")


class RowShardedTable:
    """The item table of a model, of which each process has a block of rows: item i is row i // processes of process
    i % processes.

    So neighbouring ids, which are often equally popular, are spread evenly. `EncoderForNextItem` reads all rows of a
    training step by `rows`; whoever needs another engine puts an object with that method in its place.

    Args:
        model: whose `item_embedding` has the whole table, the same one in all processes; or a model on the device
            "meta", which gets random weights. Afterwards it has the block alone, as `item_embedding.weight` and
            `head.weight`, which DistributedDataParallel leaves alone.
        seed: for the random rows of a model on the device "meta".
    """

    def __init__(self, model: EncoderForNextItem, seed: int):
        self.num_rows = catalogue_size(model.config) + 1
        self.rank, self.num_processes = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group()  # so that no exchange waits for the gradients of the other weights
        self._embedding = model.get_input_embeddings()
        self._block_size = self._rows_of(0)  # the largest
        with torch.no_grad():
            if self._embedding.weight.is_meta:
                block = self._random_block(model, seed)
                _draw_other_weights(model)
            else:
                block = self._embedding.weight[self.rank :: self.num_processes].clone()
        self._embedding.weight = model.head.weight = nn.Parameter(block)
        self._embedding.sharded = self
        model._keys_to_ignore_on_save = list(TABLE_NAMES)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, TABLE_NAMES)

    @property
    def block(self) -> nn.Parameter:
        """The rows of this process, (rows, hidden)."""
        return self._embedding.weight

    def rows(self, item_ids: torch.Tensor) -> torch.Tensor:
        """(...) item ids -> (..., hidden), the same number of times in all processes, forward and backward.

        The gradient of the block is a sparse tensor of the rows that any process has looked up: the mean over the
        processes, as DistributedDataParallel has it for the other weights. Padding has a gradient of zeros.
        """
        return _Lookup.apply(self.block, item_ids, self)

    def whole(self) -> torch.Tensor | None:
        """The table, (num_items + 1, hidden) on the CPU, in the main process, else None; in all processes at once.

        The main process needs its memory, and 64 MB.
        """
        pieces = self.block.detach().split(self._rows_at_once())
        if self.rank:
            for piece in pieces:
                dist.send(piece.contiguous(), 0, group=self._group)
            return None
        table = torch.empty(self.num_rows, self.block.shape[1], dtype=self.block.dtype)
        for process in range(self.num_processes):
            rows, first = table[process :: self.num_processes], 0
            while first < len(rows):
                if process:
                    piece = self.block.new_empty(len(rows[first : first + self._rows_at_once()]), rows.shape[1])
                    dist.recv(piece, process, group=self._group)
                else:
                    piece = pieces[first // self._rows_at_once()]
                rows[first : first + len(piece)] = piece
                first += len(piece)
        return table

    @torch.no_grad()
    def ranks(
        self, head: NextItemHead, users: torch.Tensor, targets: torch.Tensor, seen: torch.Tensor, repeated: torch.Tensor
    ) -> torch.Tensor:
        """The ranks of targets in the whole catalogue: each process scores its items for the users of all processes.

        Items with the score of the target are ranked before it, as by `target_ranks`.

        Args:
            head: of the model.
            users: (batch, hidden) user embeddings; batches may differ between processes.
            targets: (batch,) item ids.
            seen: (batch, any) item ids, padded with 0, that the first rank leaves out; the target stays.
            repeated: (batch, length) different item ids, padded with 0, that get the head's repeat bias, if it has one.

        Returns:
            (batch, 2) int64: without the seen items, and with them.
        """
        states = head.scaled(users.float())  # (batch, hidden)
        target_scores = (states * head.normalised(self.rows(targets)).float()).sum(1, keepdim=True)  # (batch, 1)
        if head.repeat_bias is not None:
            target_scores += head.repeat_bias.float() * repeated.eq(targets.unsqueeze(1)).any(1, keepdim=True)
        states, scores, targets, seen, repeated = (
            self._of_all(each) for each in (states, target_scores, targets.unsqueeze(1), seen, repeated)
        )
        counts = self._not_below(head, states, scores, targets, seen, repeated)  # (all users, 2)
        dist.all_reduce(counts, group=self._group)
        return 1 + counts.chunk(self.num_processes)[self.rank][: len(users)]

    def save(self, folder: str | os.PathLike, moments: dict[str, torch.Tensor]) -> None:
        """Write the block of this process, and the optimizer's state of it, into a folder; in all processes at once."""
        path = Path(folder, self._file_name())
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as unfinished:
            save_file({"rows": self.block.detach(), **moments}, unfinished)
        dist.barrier(group=self._group)

    def load(self, folder: str | os.PathLike) -> dict[str, torch.Tensor]:
        """Read what `save` wrote.

        Returns:
            The optimizer's state of the block, empty if it was saved without.

        Raises:
            ValueError: when the folder has no blocks of as many processes and items.
        """
        path = Path(folder, self._file_name())
        if not path.is_file():
            found = ", ".join(path.name for path in saved_blocks(folder)) or "no item_table_*.safetensors"
            raise ValueError(
                f"{folder} has {found}: expected {path.name}, since item_table is 'row_sharded' in "
                f"{self.num_processes} processes; resume with the item_table and the number of processes that it has"
            )
        moments = load_file(path, str(self.block.device))
        rows = moments.pop("rows")
        if rows.shape != self.block.shape:
            raise ValueError(
                f"{path} has {len(rows)} rows of {rows.shape[1]}: expected {len(self.block)} of "
                f"{self.block.shape[1]}; resume with the model that it was saved from"
            )
        with torch.no_grad():
            self.block.copy_(rows)
        return moments

    # --- parts ---

    def _rows_of(self, process: int) -> int:
        return len(range(process, self.num_rows, self.num_processes))

    def _rows_at_once(self) -> int:
        return max(1, _BYTES_AT_ONCE // (self.block.shape[1] * self.block.element_size()))

    def _file_name(self) -> str:
        return f"item_table_{self.rank}_of_{self.num_processes}.safetensors"

    def _random_block(self, model: EncoderForNextItem, seed: int) -> torch.Tensor:
        block = torch.empty(self._rows_of(self.rank), model.config.hidden_size, dtype=self._embedding.weight.dtype)
        generator = torch.Generator().manual_seed(seed + self.rank)
        block.normal_(0, model.config.initializer_range, generator=generator)
        if self.rank == PADDING_ITEM_ID:
            block[0] = 0
        return block

    def _exchange(self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Rows of `tensor` for each process -> rows from each process."""
        found = tensor.new_empty(sum(received), *tensor.shape[1:])
        dist.all_to_all_single(found, tensor.contiguous(), received, sent, group=self._group)
        return found

    def _of_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, any) -> (processes x largest batch, largest any), padded with 0, one process after the other."""
        sizes = [torch.tensor(tensor.shape, device=tensor.device) for _ in range(self.num_processes)]
        dist.all_gather(sizes, sizes[0].clone(), group=self._group)
        rows, columns = torch.stack(sizes).amax(0).tolist()
        padded = tensor.new_zeros(rows, columns)
        padded[: len(tensor), : tensor.shape[1]] = tensor
        found = [torch.empty_like(padded) for _ in range(self.num_processes)]
        dist.all_gather(found, padded, group=self._group)
        return torch.cat(found)

    def _places(self, item_ids: torch.Tensor) -> torch.Tensor:
        """Item ids -> their rows in the block of this process, -1 for those of others and padding."""
        is_own = (item_ids % self.num_processes == self.rank) & (item_ids != PADDING_ITEM_ID)
        return (item_ids // self.num_processes).where(is_own, -1)

    def _not_below(self, head, states, target_scores, targets, seen, repeated) -> torch.Tensor:
        """(users, 2) int64: items of this process but the target that score as much, without the seen ones and with."""
        counts = targets.new_zeros(len(states), 2)
        targets, seen, repeated = (self._places(ids) for ids in (targets, seen, repeated))
        size = max(1, _SCORES_AT_ONCE // max(1, len(states)))
        with torch.autocast(states.device.type, enabled=False):
            for first in range(0, len(self.block), size):
                items = slice(first, min(first + size, len(self.block)))
                scores = states @ head.normalised(self.block[items]).float().t()  # (users, items)
                if head.repeat_bias is not None:
                    columns, inside = columns_in_chunk(repeated, items)
                    scores.scatter_add_(1, columns, head.repeat_bias.float() * inside)
                not_below = scores >= target_scores
                if first == 0 and self.rank == PADDING_ITEM_ID:
                    not_below[:, 0] = False
                for column, hidden in ((1, targets), (0, seen)):
                    columns, inside = columns_in_chunk(hidden, items)
                    # Columns that are outside go behind the last one, which is then cut off.
                    shown = torch.ones(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
                    shown.scatter_(1, columns.where(inside, scores.shape[1]), False)
                    not_below &= shown[:, :-1]
                    counts[:, column] += not_below.sum(1)
        return counts


class _Lookup(torch.autograd.Function):
    """The rows of item ids, each sent once by the process that has it; `backward` returns their gradients to it."""

    @staticmethod
    def forward(ctx, block, item_ids, table):
        # The place of each item in the blocks of all processes, one after the other.
        places = item_ids % table.num_processes * table._block_size + item_ids // table.num_processes
        places, ctx.place_of = places.flatten().unique(return_inverse=True)  # (items,), (lookups,)
        sent = torch.bincount(places // table._block_size, minlength=table.num_processes)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=table._group)
        ctx.table, ctx.sent, ctx.received, ctx.shape = table, sent.tolist(), received.tolist(), block.shape
        ctx.is_padding = places.eq(PADDING_ITEM_ID)
        ctx.asked = table._exchange(places % table._block_size, ctx.sent, ctx.received)  # (rows,) of this process
        rows = table._exchange(block[ctx.asked], ctx.received, ctx.sent)  # (items, hidden)
        return rows[ctx.place_of].view(*item_ids.shape, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.flatten(0, -2)  # (lookups, hidden)
        summed = gradient.new_zeros(len(ctx.is_padding), gradient.shape[1]).index_add_(0, ctx.place_of, gradient)
        summed.masked_fill_(ctx.is_padding.unsqueeze(1), 0)
        rows = ctx.table._exchange(summed, ctx.sent, ctx.received).div_(ctx.table.num_processes)
        return torch.sparse_coo_tensor(ctx.asked.unsqueeze(0), rows, ctx.shape, check_invariants=False), None, None


def saved_blocks(folder: str | os.PathLike) -> list[Path]:
    """What `RowShardedTable.save` has written into a folder."""
    return sorted(Path(folder).glob("item_table_*_of_*.safetensors"))


def _draw_other_weights(model: EncoderForNextItem) -> None:
    """Give a model on the device "meta" the initial weights of one with a single item, which has the same others."""
    config = copy.deepcopy(model.config)
    config.num_items = 1
    drawn = type(model)(config).state_dict()
    names = [name for name in drawn if name not in (*TABLE_NAMES, "item_counts")]
    model.load_state_dict({name: drawn[name] for name in names}, strict=False, assign=True)
    if model.config.popularity_power:
        model.item_counts = torch.zeros(catalogue_size(model.config) + 1)


def check_row_sharded(model: EncoderForNextItem, arguments: TrainingArguments, own_metrics: bool) -> None:
    """Raise a ValueError for a training whose item table cannot be spread over processes.

    Args:
        model: to train.
        arguments: of the training.
        own_metrics: whether the user's functions compute the metrics.
    """
    config = model.config
    pushes = arguments.push_to_hub and arguments.hub_strategy != HubStrategy.END
    start, optimizer = arguments.initial_items, arguments.item_optimizer
    for is_wrong, found, expected in (
        (arguments.world_size < 2, "in one process", "two or more, such as --launch multi_cpu or ddp"),
        (optimizer != "lazy_adam", f"with item_optimizer {optimizer!r}", "item_optimizer 'lazy_adam'"),
        (not config.tie_word_embeddings, "with tie_word_embeddings False", "a tied head"),
        (config.head_bias, "with head_bias, which is not spread", "head_bias False"),
        (
            config.teacher_embedding_size is not None,
            "with teacher_embedding_size, whose table is not spread",
            "no teacher embeddings",
        ),
        (start != "random", f"with initial_items {start!r}, which makes a whole table", "initial_items 'random'"),
        (arguments.fp16, "with fp16, whose scale differs between processes", "bf16 or float32"),
        (own_metrics, "with compute_metrics or preprocess_logits_for_metrics, which read scores", "neither"),
        (arguments.save_on_each_node, "with save_on_each_node", "a disk that all processes share"),
        (pushes, f"with hub_strategy {arguments.hub_strategy.value!r}, which sends checkpoints", "hub_strategy 'end'"),
    ):
        if is_wrong:
            raise ValueError(f"item_table is 'row_sharded' {found}: expected {expected}, or item_table 'replicated'")


__all__ = ["TABLE_NAMES", "RowShardedTable", "check_row_sharded", "saved_blocks"]
