"""A model with the methods of iLoRA that evaluation needs, whose answers are known."""

from types import SimpleNamespace

import torch
from torch import nn


class ChoosingModel(nn.Module):
    """Scores an item by a table and by whether it follows the newest item; calls item i "Item <i in letters>"."""

    def __init__(self, num_items: int = 40, seed: int = 0, num_experts: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(num_items + 1, generator=generator).mul(4).round() / 4)  # with ties
        self.config = SimpleNamespace(num_items=num_items, max_length=2, num_experts=num_experts)
        self.title_tokens = SimpleNamespace(titles=[title(item) for item in range(1, num_items + 1)])
        self.device = torch.device("cpu")
        self.lengths_seen = []

    def item_scores(self, histories):
        assert not self.training
        self.lengths_seen.append(histories.shape[1])
        newest = histories.gather(1, histories.ne(0).sum(1, keepdim=True) - 1)  # (batch, 1)
        follows = torch.arange(len(self.table)) == newest + 1  # (batch, num_items + 1)
        return (self.table + 2 * follows).index_fill(1, torch.tensor([0]), -torch.inf)

    def score_candidates(self, histories, candidates):
        return self.item_scores(histories).gather(1, candidates)

    def expert_gates(self, histories):
        assert not self.training
        return torch.nn.functional.one_hot(histories[:, 0] % self.config.num_experts, self.config.num_experts).float()

    def generate_recommendation(self, histories, candidates, top_k, constrained, max_new_tokens):
        """The best candidate; when free, users with an odd newest item get an answer that names nothing."""
        best = candidates.gather(1, self.score_candidates(histories, candidates).argmax(1, keepdim=True))
        newest = histories.gather(1, histories.ne(0).sum(1, keepdim=True) - 1)
        texts = [
            ["no idea"] if int(last) % 2 and not constrained else [f"I say {title(int(item)).upper()}"]
            for last, item in zip(newest, best, strict=True)
        ]
        return SimpleNamespace(texts=texts, item_ids=best)


def title(item: int) -> str:
    return "Item " + "".join("abcdefghij"[int(digit)] for digit in f"{item:02d}")
