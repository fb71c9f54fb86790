"""Initial weights as in the programs of LLaRA, iLoRA and DLLM2Rec."""

import math

from torch import nn
from transformers import initialization as init

from .teacher_embeddings import ItemEmbedding


def initialize_as_reference(module: nn.Module) -> None:
    """Initialise one module as PyTorch does; item tables and normalisations stay unchanged."""
    if isinstance(module, nn.Embedding) and not isinstance(module, ItemEmbedding):
        init.normal_(module.weight)
    elif isinstance(module, nn.Linear | nn.Conv1d):
        bound = 1 / math.sqrt(module.weight.shape[1:].numel())  # number of inputs of one output
        init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.RNNBase):
        bound = 1 / math.sqrt(module.hidden_size)
        for parameter in module.parameters():
            init.uniform_(parameter, -bound, bound)


__all__ = ["initialize_as_reference"]
