"""Item embeddings of a language model in a small recommender, added through a projection."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_next_item import PADDING_ITEM_ID, NextItemConfig
from .table_gradients import ShardedTable, looked_up


class TeacherEmbedding(nn.Module):
    """ed_weight * projection(the language model's embedding of an item).

    The table is a buffer: no optimizer changes it, and it is saved with the model, so that a checkpoint can resume and
    score without the label data set. It starts as zeros, and using it before `set_table` raises an error.

    Args:
        config: configuration of the recommender.

    Source: DLLM2Rec (RecSys 2024), section 4.3, and its published program (a projection with bias).
    """

    def __init__(self, config: NextItemConfig):
        super().__init__()
        self.ed_weight = config.ed_weight
        self.projection = nn.Linear(config.teacher_embedding_size, config.hidden_size)
        self.register_buffer("table", torch.zeros(config.num_items + 1, config.teacher_embedding_size))
        self.has_table = False  # whether the table is known to be non-zero

    def set_table(self, table: torch.Tensor) -> None:
        """Store the embeddings, (num_items + 1, teacher size), with zeros in the row of padding.

        Raises:
            ValueError: for another shape, numbers that are not finite, or nothing but zeros.
        """
        self._check_shape(table)
        if not torch.isfinite(table).all():
            item = int((~torch.isfinite(table)).any(1).nonzero()[0])
            raise ValueError(
                f"teacher embeddings of item {item} contain NaN or inf: expected finite numbers; encode again"
            )
        if not table[1:].any():
            raise ValueError("teacher embeddings are all zero: expected those that a teacher encoded")
        with torch.no_grad():
            self.table.copy_(table)
            self.table[PADDING_ITEM_ID] = 0

    def forward(self, item_ids: torch.Tensor | None = None, table: torch.Tensor | None = None) -> torch.Tensor:
        """The projected embeddings, which are added to those of the item table.

        Args:
            item_ids: (batch, length), or None for the whole catalogue.
            table: (num_items + 1, teacher size) to read instead of the stored one, or None.

        Returns:
            (batch, length, hidden), or (num_items + 1, hidden).

        Raises:
            ValueError: for a table of another shape, and when there is none.
        """
        if table is not None:
            self._check_shape(table)
        else:
            self._check_table()
            table = self.table
        table = table.to(self.projection.weight)
        # Projects the items of the batch or the whole table, whichever has fewer rows; a graph must fit any batch.
        if item_ids is None or (not torch.compiler.is_compiling() and item_ids.numel() >= len(table)):
            projected = self.projection(table)  # (num_items + 1, hidden)
            projected = projected if item_ids is None else F.embedding(item_ids, projected)
        else:
            projected = self.projection(F.embedding(item_ids, table))  # (batch, length, hidden)
        return self.ed_weight * projected

    def _check_table(self) -> None:
        """Raise a ValueError if there is no table; only the first call waits for the device."""
        if self.has_table or torch.compiler.is_compiling():
            return
        if not self.table.any():
            raise ValueError("there are no teacher embeddings: call set_teacher_embeddings before training")
        self.has_table = True

    def _check_shape(self, table: torch.Tensor) -> None:
        if table.shape != self.table.shape:
            raise ValueError(
                f"teacher embeddings have shape {tuple(table.shape)}: expected {tuple(self.table.shape)}, (num_items + "
                "1, teacher_embedding_size); encode the items of this model's catalogue, or change the configuration"
            )


class ItemEmbedding(nn.Embedding):
    """The item table, plus projected teacher embeddings until they are folded in."""

    def __init__(self, config: NextItemConfig):
        super().__init__(config.num_items + 1, config.hidden_size, padding_idx=PADDING_ITEM_ID)
        self.teacher = None if config.teacher_embedding_size is None else TeacherEmbedding(config)
        self.sharded: ShardedTable | None = None  # while a training spreads the rows over its processes

    def forward(
        self,
        item_ids: torch.Tensor,
        teacher_embeddings: torch.Tensor | None = None,
        table: torch.Tensor | ShardedTable | None = None,
    ) -> torch.Tensor:
        """(batch, length) item ids -> (batch, length, hidden); `table` is what `table_for_lookups` returns, or None."""
        embeddings = super().forward(item_ids) if table is None else looked_up(table, item_ids)
        if self.teacher is None:
            if teacher_embeddings is not None:
                raise ValueError(
                    "teacher_embeddings were given to a model without a place for them: expected a configuration with "
                    f"teacher_embedding_size={teacher_embeddings.shape[-1]}"
                )
            return embeddings
        return embeddings + self.teacher(item_ids, teacher_embeddings)


__all__ = ["ItemEmbedding", "TeacherEmbedding"]
