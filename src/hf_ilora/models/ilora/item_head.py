"""The item head, which ranks the whole catalogue with one forward of the language model."""

import torch
import torch.nn.functional as F
from torch import nn


class ItemHead(nn.Module):
    """Maps the last hidden state of a prompt to a query, which the recommender's frozen head scores.

    The projection starts at zero. A fresh "residual" head therefore gives the recommender's scores, and training adds
    the language model's contribution.

    Args:
        llm_size: size of the language model's hidden states.
        user_size: size of the recommender's user embeddings.
        residual: add the projected state to the user embedding; otherwise the projected state is the query.
    """

    def __init__(self, llm_size: int, user_size: int, residual: bool):
        super().__init__()
        self.residual = residual
        self.projection = nn.Linear(llm_size, user_size, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot communicate 0-dimensional parameters
        nn.init.zeros_(self.projection.weight)

    def forward(self, hidden_states: torch.Tensor, user_embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the queries.

        Args:
            hidden_states: (batch, llm size).
            user_embeddings: (batch, user size).

        Returns:
            Queries (batch, user size), and a learned scale () for their scores, since the recommender's scores need not
            be calibrated logits.
        """
        # Unit length, so that an optimizer step moves a query by about learning rate x sqrt(llm size).
        directions = F.normalize(hidden_states.to(self.projection.weight.dtype), dim=-1)
        queries = self.projection(directions)
        return (user_embeddings + queries if self.residual else queries), self.log_scale.exp().squeeze(0)


__all__ = ["ItemHead"]
