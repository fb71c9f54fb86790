"""A tiny iLoRA, made in milliseconds, and the same arithmetic done by hand: one row, no padding, merged weights."""

import copy
import functools

import pyarrow as pa
import torch
from transformers import PreTrainedModel, set_seed

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.gated_lora import gated_layers
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.training.prompt_collator import PromptCollator
from tests.tiny_language_models import base_llm
from tests.tiny_tokenizers import byte_level

TITLES = [
    "Toy Story", "Toy Story 2", "Heat", "Heat 2", "M", "Up", "Alien", "Aliens", "Brazil", "Ran", "Big", "Jaws", "Se7en",
    "Fargo", "Psycho", "Gigi", "Diva", "Ikiru", "Z", "Zelig", "Tron", "Dune", "Kes", "Amélie", "1984", "Speed", "Babe",
    "Nixon", "Casino", "Twister",
]  # fmt: skip
NUM_ITEMS = len(TITLES)
WITH_CANDIDATES, HISTORY_ALONE = "Saw {history}. Among {candidates}. Next:", "Had {history}, then:"
RANK, EXPERTS, ALPHA = 8, 4, 16.0
# Histories of several lengths, so that prompts are padded; targets of several lengths, so that titles are.
ROWS = [
    {"history": [3, 7, 30, 5], "target": 2, "candidates": [9, 2, 11], "uniforms": (0.0, 0.1)},
    {"history": [12, 21], "target": 5, "candidates": [4, 1, 5], "uniforms": (0.0, 0.9)},
    {"history": [1, 2], "target": 24, "candidates": [24, 8, 30], "uniforms": (0.0, 0.4)},
]

# Of different lengths, padded on either side.
HISTORIES = torch.tensor([[3, 7, 30, 5], [0, 0, 12, 21], [0, 1, 2, 0]])
CANDIDATES = torch.tensor([[9, 2, 11, 1], [4, 1, 5, 2], [24, 8, 30, 3]])


def catalogue(titles=TITLES) -> Catalogue:
    ids = list(range(1, len(titles) + 1))
    return Catalogue(pa.table({"item_id": ids, "raw_id": [f"raw {i}" for i in ids], "title": list(titles)}))


def recommender(num_items: int = NUM_ITEMS, **changes) -> SASRecForNextItem:
    set_seed(3)
    settings = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_length": 6} | changes
    model = SASRecForNextItem(SASRecConfig(num_items=num_items, **settings))
    spread(model, 0.5, seed=4)
    with torch.no_grad():
        model.model.item_embedding.weight[0] = 0
    return model.eval()


def spread(module: torch.nn.Module, deviation: float, seed: int) -> None:
    """Random values on all parameters, so that nothing that is left out goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))


def ilora_config(**changes) -> ILoraConfig:
    settings = {
        "rank": RANK,
        "num_experts": EXPERTS,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "router_type": "linear",
        "prompt_templates": [WITH_CANDIDATES, HISTORY_ALONE],
        "max_history": 4,
    }
    return ILoraConfig(**settings | changes)


def fresh_model(
    architecture: str = "llama", llm: PreTrainedModel | None = None, sasrec: SASRecForNextItem | None = None, **changes
) -> ILoraForRecommendation:
    """A model as `from_base` makes it; `changes` are of the configuration."""
    parts = (llm or base_llm(architecture), sasrec or recommender(), tokenizer(), catalogue())
    set_seed(5)
    return ILoraForRecommendation.from_base(*parts, ilora_config(**changes), untrained_recommender=True)


def tiny_model(*arguments, **changes) -> ILoraForRecommendation:
    """A model whose adapter, router, projector and item head all do something, in evaluation mode."""
    model = fresh_model(*arguments, **changes)
    randomise(model)
    return model.eval()


def randomise(model: ILoraForRecommendation, seed: int = 6) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in gated_layers(model.llm).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    spread(model.router, 0.7, seed)
    if model.config.item_placeholders:
        spread(model.prompt_embedding, 0.3, seed)
    if model.item_head is not None:
        spread(model.item_head, 0.3, seed)


@functools.cache
def tokenizer():
    """Every byte is a token, so that a prompt's tokens can be written down without the code under test."""
    return byte_level()


def batch_of(model: ILoraForRecommendation, rows=ROWS, candidate_fraction: float = 0.5) -> dict:
    return PromptCollator(model.prompts, candidate_fraction)(rows)


# --- by hand ---


def real(row) -> list[int]:
    return [item for item in row.tolist() if item]


def naive_gates(model: ILoraForRecommendation, history: list[int]) -> torch.Tensor:
    """(experts,) of a linear router."""
    user_embedding = model.recommender(torch.tensor([history])).user_embedding[0]
    return (model.router.projection.weight @ user_embedding).softmax(0)


def merged_llm(
    gated: PreTrainedModel, gates: torch.Tensor, base: PreTrainedModel, lora_alpha: float = ALPHA
) -> PreTrainedModel:
    """A copy of `base` with one user's experts of the language model `gated` added to its weights, one by one."""
    llm, size = copy.deepcopy(base), RANK // EXPERTS
    with torch.no_grad():
        for name, layer in gated_layers(gated).items():
            for expert, gate in enumerate(gates):
                part = slice(expert * size, (expert + 1) * size)
                delta = layer.lora_B[:, part] @ layer.lora_A[part]
                llm.get_submodule(name).weight += lora_alpha / size * gate * delta
    return llm


def text_ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def naive_prompt(model: ILoraForRecommendation, llm: PreTrainedModel, history, candidates=None) -> torch.Tensor:
    """Embeddings (tokens, llm hidden) of a prompt, written out and put together piece by piece."""
    embed = llm.get_input_embeddings()
    pieces = []

    def text(words: str):
        if words:
            pieces.append(embed(torch.tensor(text_ids(words))))

    def items(ids):
        for place, item in enumerate(ids):
            text((", " if place else " ") + TITLES[item - 1])
            if model.config.item_placeholders:
                pieces.append(
                    model.prompt_embedding.projector(model.recommender.model.item_embedding.weight[item])[None]
                )

    template = HISTORY_ALONE if candidates is None else WITH_CANDIDATES
    before, _, rest = template.partition(" {history}")
    text(before)
    items(history)
    if candidates is not None:
        between, _, rest = rest.partition(" {candidates}")
        text(between)
        items(candidates)
    text(rest)
    return torch.cat(pieces)


@torch.no_grad()
def naive_log_p(model, base, history, candidates, item, gates=None, lora_alpha=ALPHA) -> torch.Tensor:
    """log p(title and terminator | prompt) of one row: one sequence without padding, a softmax per token."""
    llm = merged_llm(model.llm, naive_gates(model, history) if gates is None else gates, base, lora_alpha)
    prompt = naive_prompt(model, llm, history, candidates)
    title = [*text_ids(" " + TITLES[item - 1]), tokenizer().eos_token_id]
    embeddings = torch.cat([prompt, llm.get_input_embeddings()(torch.tensor(title))])
    log_p = llm(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + place, token] for place, token in enumerate(title))


@torch.no_grad()
def naive_item_logits(model, base, history) -> torch.Tensor:
    """(num_items + 1,) of the item head on a prompt without candidates."""
    llm = merged_llm(model.llm, naive_gates(model, history), base)
    prompt = naive_prompt(model, llm, history)
    state = llm(inputs_embeds=prompt[None], output_hidden_states=True).hidden_states[-1][0, -1]
    query = model.item_head.projection.weight @ (state / state.norm())
    output = model.recommender(torch.tensor([history]))
    if model.config.item_head == "residual":
        query = query + output.user_embedding[0]
    head = model.recommender.head
    scores = head.weight @ query + (0 if head.bias is None else head.bias)
    scores[0] = float("-inf")
    return scores * model.item_head.log_scale.exp()
