"""A tiny gated language model with a router, and the rows of each of two processes."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_ilora import GatedLoraConfig, GatedLoraModel, get_gated_lora_model
from hf_ilora.models.ilora.gated_lora import gated_layers


def gated_llm() -> tuple[GatedLoraModel, nn.Linear]:
    """The model and the router, the same in every process."""
    set_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=200, initializer_range=0.2, **sizes))
    model = get_gated_lora_model(llm, GatedLoraConfig(lora_dropout=0.0))
    for layer in gated_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model, nn.Linear(5, 4)


class WithRouter(nn.Module):
    """A router outside of the gated model, trained with it.

    Args:
        uses_context: pass the gates by `use_gates` instead of with the forward.
    """

    def __init__(self, uses_context: bool = False):
        super().__init__()
        self.gated, self.router = gated_llm()
        self.uses_context = uses_context

    def forward(self, input_ids, users):
        gates = self.router(users).softmax(-1)  # (batch, experts)
        if self.uses_context:
            with self.gated.use_gates(gates):
                return self.gated(input_ids, labels=input_ids).loss
        return self.gated(input_ids, labels=input_ids, expert_gates=gates).loss


def rows_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids (batch, tokens) and users (batch, 5)."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(1, 200, (3, 6), generator=generator), torch.randn(3, 5, generator=generator)
