"""Folders of tiny title encoders, and their hidden states for one title at a time, without padding."""

import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, set_seed

from tests.tiny_tokenizers import word_piece

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def save_bert(folder: Path, seed: int = 0, max_position_embeddings: int = 24) -> Path:
    """A random BERT and its tokenizer, which makes lower-case word pieces."""
    set_seed(seed)
    config = BertConfig(vocab_size=260, initializer_range=0.3, max_position_embeddings=max_position_embeddings, **SIZES)
    BertModel(config).save_pretrained(folder)
    word_piece().save_pretrained(folder)
    return folder


def save_sentence_transformer(
    folder: Path,
    pooling: dict | None = None,
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
    **more,
) -> Path:
    """As `save_bert`, with the files that sentence-transformers adds; `more` goes to sentence_bert_config.json."""
    save_bert(folder)
    paths = {"Transformer": ""} | {name: f"{place}_{name}" for place, name in enumerate(modules) if place}
    entries = [
        {"idx": place, "name": str(place), "path": paths[name], "type": f"sentence_transformers.models.{name}"}
        for place, name in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False} | more))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 16} | (pooling or {"pooling_mode_mean_tokens": True}))
    )
    return folder


@torch.no_grad()
def states_by_hand(folder: Path, title: str, max_tokens: int = 24, layer: int = -1) -> torch.Tensor:
    """The hidden states of a title, (tokens, size)."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        title, return_tensors="pt", truncation=True, max_length=max_tokens, split_special_tokens=True
    )
    model = AutoModel.from_pretrained(folder)
    return model(input_ids=tokens["input_ids"], output_hidden_states=True).hidden_states[layer][0]
