"""Embeds prompts: a recommender's item embeddings, projected, replace the placeholders."""

import torch
from torch import nn

from .prompts import CANDIDATE_PLACEHOLDER_ID


class PromptEmbedding(nn.Module):
    """Replaces the placeholders of prompts by vectors.

    A placeholder with an item becomes the projected embedding of the item. A plain placeholder, with which the
    reference's curriculum starts, becomes a learned vector: one for histories, one for candidates.

    Args:
        item_size: size of the recommender's item embeddings.
        llm_size: size of the language model's token embeddings.
        initializer_range: standard deviation of the initial vectors of plain placeholders.

    Source: the projector of LLaRA (SIGIR 2024), which iLoRA uses as well.
    """

    def __init__(self, item_size: int, llm_size: int, initializer_range: float):
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(item_size, llm_size), nn.GELU(), nn.Linear(llm_size, llm_size))
        self.plain = nn.Parameter(torch.empty(2, llm_size))  # for a history's and a candidate's placeholder
        nn.init.normal_(self.plain, std=initializer_range)

    def forward(
        self,
        token_embeddings: torch.Tensor,
        input_ids: torch.Tensor,
        placeholder_items: torch.Tensor,
        item_embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Replace the embeddings of the placeholders.

        Args:
            token_embeddings: (batch, tokens, llm size); values at the placeholders are ignored.
            input_ids: (batch, tokens); placeholders are negative.
            placeholder_items: (batch, placeholders): the item of each placeholder, in the order of the row, padded with
                0 on the right; 0 for a plain placeholder.
            item_embeddings: (batch, placeholders, item size).

        Returns:
            (batch, tokens, llm size) in the dtype of `token_embeddings`.
        """
        placeholders = input_ids < 0  # (batch, tokens)
        dtype = self.plain.dtype
        projected = self.projector(item_embeddings.to(dtype))  # (batch, placeholders, llm size)
        # The index of each token among the placeholders of its row, without a loop and without waiting for the device.
        ordinals = (placeholders.cumsum(1) - 1).clamp(0, placeholder_items.shape[1] - 1)  # (batch, tokens)
        carries_item = placeholder_items.gather(1, ordinals).ne(0).unsqueeze(-1)  # (batch, tokens, 1)
        items = projected.gather(1, ordinals.unsqueeze(-1).expand(-1, -1, projected.shape[-1]))
        plain = self.plain[input_ids.eq(CANDIDATE_PLACEHOLDER_ID).long()]  # (batch, tokens, llm size)
        replaced = torch.where(carries_item, items.to(dtype), plain).to(token_embeddings.dtype)
        return torch.where(placeholders.unsqueeze(-1), replaced, token_embeddings)


def check_placeholders(input_ids: torch.Tensor, placeholder_items: torch.Tensor) -> None:
    """Raise a ValueError unless every row has as many placeholders as items; on a GPU a device assertion fails."""
    found, expected = input_ids.lt(0).sum(1), placeholder_items.ne(0).sum(1)  # (batch,)
    if input_ids.device.type != "cpu":  # raising here would wait for the device
        if input_ids.device.type == "cuda":
            torch._assert_async((found == expected).all(), "a row has more or fewer placeholders than items")
        return
    if (found.numpy() != expected.numpy()).any():
        row = int((found != expected).nonzero()[0])
        raise ValueError(
            f"row {row} has {int(found[row])} placeholders for {int(expected[row])} items: expected equal numbers; "
            "build input_ids and placeholder_items with PromptBuilder"
        )


__all__ = ["PromptEmbedding", "check_placeholders"]
