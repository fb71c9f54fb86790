"""Lookups in an item table that give one gradient: as large as the table once, or of the rows that were looked up."""

from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_next_item import PADDING_ITEM_ID


class ShardedTable(Protocol):
    """An item table whose rows are spread over processes, so that no process has it whole."""

    def rows(self, item_ids: torch.Tensor) -> torch.Tensor:
        """(...) item ids -> (..., hidden); gradients flow back to where the rows are."""


def table_for_lookups(module: nn.Module) -> torch.Tensor | None:
    """The table of a module, for `looked_up`.

    torch gives every lookup a gradient of the size of the table, and adds them. Here the rows of all lookups of a
    forward come together and are added to one gradient.

    Args:
        module: has `weight` (num_items + 1, hidden), and `sparse`: whether the gradient is a sparse tensor of the rows
            that were looked up, some perhaps more than once, with zeros for padding.

    Returns:
        (num_items + 1, hidden), or None where lookups stay as torch makes them: in a graph that is compiled, and under
        ZeRO-3, which keeps no whole table.
    """
    if torch.compiler.is_compiling() or not module.weight.numel() or not torch.is_grad_enabled():
        return None
    return _OneGradient.apply(module.weight, module)


def looked_up(table: torch.Tensor | ShardedTable, item_ids: torch.Tensor) -> torch.Tensor:
    """(...) item ids -> (..., hidden), the rows of what `table_for_lookups` returns, or of a sharded table."""
    if not isinstance(table, torch.Tensor):
        return table.rows(item_ids)
    return F.embedding(item_ids, table, sparse=True)


class _OneGradient(torch.autograd.Function):
    """The table itself. Autograd joins the rows that its lookups give back, and `backward` gets all of them at once."""

    @staticmethod
    def forward(ctx, table, module):
        ctx.module, ctx.size = module, table.shape
        return table.view_as(table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        item_ids, rows = gradient._indices()[0], gradient._values()  # (lookups,), (lookups, hidden)
        if ctx.module.sparse:
            rows = rows * item_ids.ne(PADDING_ITEM_ID).unsqueeze(1)
            return torch.sparse_coo_tensor(item_ids.unsqueeze(0), rows, ctx.size, check_invariants=False), None
        if rows.device.type != "cpu":  # whose allocators keep memory; and the order of the sums is fixed there
            return torch.ops.aten.embedding_dense_backward(rows, item_ids, ctx.size[0], PADDING_ITEM_ID, False), None
        dense = _zeros(ctx.module, ctx.size, rows.dtype).index_add_(0, item_ids, rows)
        dense[PADDING_ITEM_ID] = 0
        return dense, None


# The memory of the last gradient of each module: to get so much from the system takes longer than to fill it.
_kept: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()


def _zeros(module: nn.Module, size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Zeros on the CPU, in the memory of an earlier gradient that nobody has any more."""
    kept = _kept.get(module)
    if kept is None or kept.shape != size or kept.dtype != dtype:
        kept = _kept[module] = torch.empty(size, dtype=dtype)
    storage = kept.untyped_storage()
    if torch._C._storage_Use_Count(storage._cdata) > 2:  # besides `kept` and `storage`: a gradient that is in use
        return torch.zeros(size, dtype=dtype)
    return kept.detach().zero_()  # a tensor of its own, which becomes `weight.grad` without a copy


__all__ = ["ShardedTable", "looked_up", "table_for_lookups"]
