"""Small next-item models with everything that may enter a score, with random weights."""

import torch

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, SASRecConfig, SASRecForNextItem

SIZES = {"hidden_size": 8, "max_length": 6}


def sasrec(num_items: int, seed: int = 0, **settings) -> SASRecForNextItem:
    torch.manual_seed(seed)
    model = SASRecForNextItem(SASRecConfig(num_items=num_items, **SIZES, **settings)).eval()
    for name, parameter in model.named_parameters():
        if name in ("head.bias", "head.repeat_bias"):
            torch.nn.init.normal_(parameter)
    return model


def with_teacher_embeddings(num_items: int) -> SASRecForNextItem:
    model = sasrec(num_items, teacher_embedding_size=4, teacher_embedding_use="input_and_head")
    model.set_teacher_embeddings(torch.cat([torch.zeros(1, 4), torch.randn(num_items, 4)]))
    return model


# Each takes the number of items.
MODELS = {
    "plain": sasrec,
    "biases": lambda num_items: sasrec(num_items, head_bias=True, repeat_bias=True),
    "temperature": lambda num_items: sasrec(num_items, score_temperature=0.1),
    "teacher embeddings": with_teacher_embeddings,
    "bfloat16": lambda num_items: sasrec(num_items).bfloat16(),
    "gru4rec": lambda num_items: GRU4RecForNextItem(GRU4RecConfig(num_items=num_items, **SIZES)).eval(),
    "caser": lambda num_items: CaserForNextItem(CaserConfig(num_items=num_items, **SIZES)).eval(),
}
