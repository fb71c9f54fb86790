"""The item head: one forward of the language model ranks the whole catalogue."""

import torch
import torch.nn.functional as F
from torch import nn


class ItemHead(nn.Module):
    """Turns the last hidden state of a prompt into a query against the recommender's item table.

    The query is scored by the recommender's own frozen head. A fresh head changes nothing: its projection starts at
    zero, so that "residual" starts from the recommender's scores and learns what the language model adds to them.

    Args:
        llm_size: of the hidden states.
        user_size: of the recommender's user embeddings.
        residual: add the query to the user embedding, instead of asking with the query alone.
    """

    def __init__(self, llm_size: int, user_size: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.projection = nn.Linear(llm_size, user_size, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot send parameters without a dimension
        nn.init.zeros_(self.projection.weight)

    def forward(self, hidden_states: torch.Tensor, user_embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask for the next item.

        Args:
            hidden_states: (batch, llm size).
            user_embeddings: (batch, user size).

        Returns:
            Queries (batch, user size), and a scale () of the scores: the recommender's were not fitted to a softmax.
        """
        # Of unit length, so that a step of the optimizer moves a query by about learning rate x sqrt(llm size).
        directions = F.normalize(hidden_states.to(self.projection.weight.dtype), dim=-1)
        queries = self.projection(directions)
        return (user_embeddings + queries if self.residual else queries), self.log_scale.exp().squeeze(0)


__all__ = ["ItemHead"]
