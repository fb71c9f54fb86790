"""Item embeddings of a language model in a small recommender: added through a projection, or as a start."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_next_item import PADDING_ITEM_ID, NextItemConfig


class TeacherEmbedding(nn.Module):
    """ed_weight * projection(embedding that the language model gave an item).

    The table is a buffer: no optimizer moves it, and it is saved with the model, so that a checkpoint resumes and
    scores without the label data set. It is zero until it is given, and refused as long as it is.

    Args:
        config: of the recommender.

    Source: DLLM2Rec (RecSys 2024), section 4.3, and its published program (a projection with bias).
    """

    def __init__(self, config: NextItemConfig):
        super().__init__()
        self.ed_weight = config.ed_weight
        self.projection = nn.Linear(config.teacher_embedding_size, config.hidden_size)
        self.register_buffer("table", torch.zeros(config.num_items + 1, config.teacher_embedding_size))
        self.has_table = False  # whether the table was seen to hold something

    def set_table(self, table: torch.Tensor) -> None:
        """Take the embeddings, (num_items + 1, teacher size); the row of padding becomes zero.

        Raises:
            ValueError: for another shape, numbers that are not finite, or nothing but zeros.
        """
        self._check_shape(table)
        if not torch.isfinite(table).all():
            item = int((~torch.isfinite(table)).any(1).nonzero()[0])
            raise ValueError(
                f"teacher embeddings of item {item} hold NaN or inf: expected finite numbers; encode again"
            )
        if not table[1:].any():
            raise ValueError("teacher embeddings are all zero: expected those that a teacher encoded")
        with torch.no_grad():
            self.table.copy_(table)
            self.table[PADDING_ITEM_ID] = 0

    def forward(self, item_ids: torch.Tensor | None = None, table: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the embeddings of items.

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
        elif self.has_table or self.table.any():
            table, self.has_table = self.table, True
        else:
            raise ValueError("there are no teacher embeddings: call set_teacher_embeddings before training")
        table = table.to(self.projection.weight)
        # Whichever projects fewer rows: the items of the batch, or all that there are.
        if item_ids is None or item_ids.numel() >= len(table):
            projected = self.projection(table)  # (num_items + 1, hidden)
            projected = projected if item_ids is None else F.embedding(item_ids, projected)
        else:
            projected = self.projection(F.embedding(item_ids, table))  # (batch, length, hidden)
        return self.ed_weight * projected

    def _check_shape(self, table: torch.Tensor) -> None:
        if table.shape != self.table.shape:
            raise ValueError(
                f"teacher embeddings have shape {tuple(table.shape)}: expected {tuple(self.table.shape)}, (num_items + "
                "1, teacher_embedding_size); encode the items of this model's catalogue, or change the configuration"
            )


class ItemEmbedding(nn.Embedding):
    """The item table, and what a teacher adds to it until it is folded in."""

    def __init__(self, config: NextItemConfig):
        super().__init__(config.num_items + 1, config.hidden_size, padding_idx=PADDING_ITEM_ID)
        self.teacher = None if config.teacher_embedding_size is None else TeacherEmbedding(config)

    def forward(self, item_ids: torch.Tensor, teacher_embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, length) item ids -> (batch, length, hidden)."""
        embeddings = super().forward(item_ids)
        if self.teacher is None:
            if teacher_embeddings is not None:
                raise ValueError(
                    "teacher_embeddings were given to a model without a place for them: expected a configuration with "
                    f"teacher_embedding_size={teacher_embeddings.shape[-1]}"
                )
            return embeddings
        return embeddings + self.teacher(item_ids, teacher_embeddings)


def pca_embeddings(table: torch.Tensor, size: int, whiten: bool = True) -> torch.Tensor:
    """Principal components of item embeddings, such as a language model gives: a start for a small item table.

    Args:
        table: (num_items + 1, any), row 0 for padding.
        size: components to keep, at most as many as there are items or numbers per item.
        whiten: let every component vary by 1 over the items, instead of as much as it did; components that do not vary
            stay zero.

    Returns:
        (num_items + 1, size) float32, largest component first, mean zero over the items, row 0 zero. The sign of each
        component is such that its largest loading is positive, so that equal tables give equal embeddings.

    Raises:
        ValueError: for another shape, numbers that are not finite, or a `size` out of range.
    """
    if table.dim() != 2 or len(table) < 2:
        raise ValueError(f"table has shape {tuple(table.shape)}: expected (num_items + 1, numbers per item)")
    items = table[1:].detach().double()  # (items, any)
    if not torch.isfinite(items).all():
        item = int((~torch.isfinite(items)).any(1).nonzero()[0]) + 1
        raise ValueError(f"the embedding of item {item} holds NaN or inf: expected finite numbers; encode again")
    if not 1 <= size <= min(items.shape):
        raise ValueError(
            f"size is {size}: expected 1 to {min(items.shape)} components of {items.shape[0]} items with "
            f"{items.shape[1]} numbers each; take a smaller hidden_size"
        )
    items = items - items.mean(0)
    variances, directions = torch.linalg.eigh(items.t() @ items / len(items))  # (any,) ascending, (any, any)
    variances, directions = variances.flip(0)[:size].clamp(min=0), directions.flip(1)[:, :size]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))  # (1, size)
    components = items @ (directions * largest.sign())  # (items, size)
    if whiten:
        varies = variances > 1e-10 * variances[0]
        components = torch.where(varies, components / variances.sqrt(), 0.0)
    return F.pad(components, (0, 0, 1, 0)).float()


__all__ = ["ItemEmbedding", "TeacherEmbedding", "pca_embeddings"]
