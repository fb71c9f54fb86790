"""Tiny inputs of recipes/train_ilora.py on disk: data, a language model, a SASRec and templates."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.data.columns import training_sequences
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings
from tests.synthetic import cyclic_sequences
from tests.tiny_language_models import save_llm

WITH_CANDIDATES, HISTORY_ALONE = "{history}; one of {candidates}:", "After {history}:"


def save_parts(folder: Path, **data_settings) -> SimpleNamespace:
    """Write the parts.

    Args:
        folder: the folder to write them to.
        data_settings: arguments of `cyclic_sequences`.

    Returns:
        Paths: data_dir, llm, recommender, prompt_file.
    """
    sequences = cyclic_sequences(**data_settings)
    parts = SimpleNamespace(
        data_dir=folder / "data",
        llm=folder / "llm",
        recommender=folder / "sasrec",
        prompt_file=folder / "prompts.txt",
    )
    sequences.save(parts.data_dir)
    save_llm(parts.llm)
    known_recommender(sequences).save_pretrained(parts.recommender)
    parts.prompt_file.write_text(f"{WITH_CANDIDATES}\n---\n{HISTORY_ALONE}\n")
    return parts


def known_recommender(sequences: SequenceDatasets) -> SASRecForNextItem:
    """A SASRec that knows which items meet, without the minute of training."""
    torch.manual_seed(1)
    size = 16
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=size, max_length=8)).eval()
    rows = np.split(*training_sequences(sequences["train"]))[1:-1]
    model.start_from_item_embeddings(cooccurrence_embeddings(rows, sequences.num_items, size))
    model.catalogue = sequences.catalogue
    return model


def save_ilora(parts, folder: Path) -> None:
    """Save an iLoRA with an item head and a fresh adapter, made from the parts of `save_parts`."""
    llm, tokenizer, _ = load_language_model(str(parts.llm))
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    config = ILoraConfig(
        rank=4,
        num_experts=2,
        router_type="linear",
        item_head="residual",
        max_history=6,
        llm_name_or_path=str(parts.llm),
    )
    model = ILoraForRecommendation.from_base(llm, recommender, tokenizer, recommender.catalogue, config)
    model.save_pretrained(folder)
