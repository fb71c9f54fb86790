"""A shelf of soaps and pens whose recommendations are known by hand: items like the newest one come next."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

from hf_ilora import (
    Catalogue,
    ILoraConfig,
    ILoraForRecommendation,
    SASRecConfig,
    SASRecForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.demo.shown_models import ShownModel
from hf_ilora.models.ilora.language_models import load_language_model
from tests.tiny_language_models import save_llm

SCRIPT = "Lavender soap <script>window.broken = 1</script> ${1 + 1} {{value}}"
SOAPS = ["Lavender soap one", "Lavender soap two", "Lavender soap three", SCRIPT]
PENS = ["Fountain pen black", "Fountain pen bleu céleste", "Fountain pen grey", "Fountain pen black"]
TITLES = [*SOAPS, *PENS]  # items 1 to 8; 5 and 8 have the same title
COUNTS = np.array([0, 4, 9, 3, 2, 8, 7, 6, 5])
SIZE = 8


def catalogue(with_counts: bool = True) -> Catalogue:
    ids = list(range(1, len(TITLES) + 1))
    table = pa.table({"item_id": ids, "raw_id": [100 + item for item in ids], "title": TITLES})
    return Catalogue(table).with_counts(COUNTS) if with_counts else Catalogue(table)


def sasrec(seed: int = 0, with_counts: bool = True) -> SASRecForNextItem:
    """A SASRec whose blocks add next to nothing, so that it scores by the vector of the newest item.

    Soaps point one way and pens another one; each item has something of its own.
    """
    config = SASRecConfig(
        num_items=len(TITLES), hidden_size=SIZE, max_length=4, num_hidden_layers=1, num_attention_heads=1
    )
    model = SASRecForNextItem(config).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = 0.5 * torch.randn(len(TITLES) + 1, SIZE, generator=generator)
    rows[1 : len(SOAPS) + 1, 0] += 3
    rows[len(SOAPS) + 1 :, 1] += 3
    rows[0] = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.mul_(0.01)
        model.get_input_embeddings().weight.copy_(rows)
    model.catalogue = catalogue(with_counts)
    return model


def counts() -> TransitionCountsForNextItem:
    """Transition counts: item 2 follows 1 twice, 3 follows 1 once, 6 follows 5 once."""
    settings = TransitionCountsConfig(num_items=len(TITLES), max_gap=1, backward_weight=0)
    model = TransitionCountsForNextItem.fit([[1, 2], [1, 2], [1, 3], [5, 6]], settings)
    model.catalogue = catalogue()
    return model


def ilora(folder: Path) -> ILoraForRecommendation:
    """An iLoRA on the SASRec, with random gates; its language model is saved in `folder`."""
    save_llm(folder / "llm")
    llm, tokenizer, _ = load_language_model(str(folder / "llm"))
    config = ILoraConfig(
        rank=6,
        num_experts=3,
        router_type="linear",
        item_head="residual",
        max_history=4,
        llm_name_or_path=str(folder / "llm"),
        duplicate_titles="number",
    )
    model = ILoraForRecommendation.from_base(llm, sasrec(), tokenizer, catalogue(), config, untrained_recommender=True)
    torch.nn.init.normal_(model.router.projection.weight)
    return model.eval()


def words_of_titles() -> PreTrainedTokenizerFast:
    """The words of the titles and of new ones; trained vocabularies differ from process to process."""
    words = sorted({"five", "white", *(word for title in TITLES for word in re.findall(r"\w+", title.lower()))})
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def save_encoder(folder: Path) -> str:
    """A title encoder that counts words: a BERT whose layer and positions add nothing."""
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=260, initializer_range=0.3, max_position_embeddings=64, **sizes))
    nothing = [model.embeddings.position_embeddings, model.embeddings.token_type_embeddings, *model.encoder.modules()]
    for module in nothing:
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            torch.nn.init.zeros_(module.weight)
    model.save_pretrained(folder)
    words_of_titles().save_pretrained(folder)
    return str(folder)


def shown(*models) -> list[ShownModel]:
    """The models as a demo shows them, without folders."""
    return [ShownModel(f"model {number}", f"folder {number}", model) for number, model in enumerate(models, start=1)]
