"""Makes the folders of finished runs in milliseconds, and the results that an evaluation writes."""

import json
from pathlib import Path

import pyarrow as pa
import torch

from hf_ilora import Catalogue, ILoraForRecommendation, SASRecConfig, SASRecForNextItem
from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.report import ModelReport, ReportContext, write_table
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.models.ilora.language_models import load_language_model
from tests.models.ilora.ilora_fixtures import ilora_config, randomise
from tests.tiny_ilora_parts import save_llm

FINGERPRINT = "0123456789abcdef" * 4
NUM_ITEMS = 30
HISTORIES = torch.tensor([[3, 1, 2], [0, 7, 8]])


def catalogue() -> Catalogue:
    ids = list(range(1, NUM_ITEMS + 1))
    titles = {"item_id": ids, "raw_id": [f"raw-{i}" for i in ids], "title": [f"Title {i}" for i in ids]}
    return Catalogue(pa.table(titles))


def sasrec(seed: int = 0) -> SASRecForNextItem:
    torch.manual_seed(seed)
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=16, max_length=8, initializer_range=0.5)
    model = SASRecForNextItem(config).eval()
    model.catalogue = catalogue()
    return model


def write_run(folder: Path, **changes) -> None:
    run = {
        "status": "finished",
        "seed": 7,
        "data_fingerprint": FINGERPRINT,
        "versions": {"hf_ilora": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }
    (folder / "run.json").write_text(json.dumps(run | changes))


def save_sasrec_run(folder: Path, seed: int = 0) -> Path:
    """A SASRec with its record, beside files that are not published."""
    sasrec(seed).save_pretrained(folder)
    write_run(folder)
    for name in ("run.log", "training_args.bin", "checkpoint-3/model.safetensors", "checkpoint-3/optimizer.pt"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"stays behind")
    return folder


def save_ilora_run(folder: Path) -> Path:
    """An iLoRA on a language model in `<folder>/../llm`, with its record."""
    llm_folder = folder.parent / "llm"
    save_llm(llm_folder)
    llm, tokenizer, _ = load_language_model(llm_folder)
    model = ILoraForRecommendation.from_base(
        llm, sasrec(), tokenizer, catalogue(), ilora_config(item_head="residual"), untrained_recommender=True
    )
    randomise(model)
    model.eval().save_pretrained(folder)
    write_run(folder)
    return folder


def write_results(folder: Path) -> Path:
    """The results.json of two models on the test split."""
    quality = {
        "masked/ndcg@10": Interval(0.1155, 0.1, 0.13),
        "masked/hit_ratio@10": Interval(0.2125, 0.19, 0.24),
        "masked/recall@10": Interval(0.2125, 0.19, 0.24),
        "masked/mrr": Interval(0.09, 0.08, 0.1),
        "unmasked/ndcg@10": Interval(0.07, 0.06, 0.08),
        "unmasked/hit_ratio@10": Interval(0.14, 0.12, 0.16),
        "unmasked/mrr": Interval(0.06, 0.05, 0.07),
        "candidates/hit_ratio@1": Interval(0.5, 0.47, 0.53),
    }
    context = ReportContext(
        "outputs/data", FINGERPRINT, "test", 943, NUM_ITEMS, 20, 10, 2000, 0, compared="masked/ndcg@10"
    )
    parts = {"latency": Latency(0.44, 0.5, 300, 1, "cpu"), "size": ModelSize(3000, 12000)}
    worse = {name: Interval(value.mean / 2, value.low / 2, value.high / 2) for name, value in quality.items()}
    comparison = RunComparison(0.05775, 0.1155, Interval(0.05775, 0.04, 0.07), 0.0005, 943)
    reports = [
        ModelReport("popularity", "popularity", worse, **parts, comparison=None),
        ModelReport("SASRec", "sasrec", quality, **parts, comparison=comparison),
    ]
    write_table(reports, context, folder)
    return folder / "results.json"
