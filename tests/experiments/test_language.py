"""The study on language from the data to its tables, with models that take a second."""

import json
import shutil
import sys

import pyarrow as pa
import pytest
import torch
import yaml

from experiments import language, language_rows, recipe_runs
from experiments.language_rows import Settings
from hf_ilora import SequenceDatasets
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.saved_ranks import SavedRanks
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.runs.recipe_files import load_recipe
from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences
from tests.tiny_language_models import save_llm

STUDENT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8, "num_train_epochs": 2,
    "early_stopping_patience": 0, "use_cpu": True, "initial_items": "cooccurrence",
}  # fmt: skip

ILORA = {
    "duplicate_titles": "number", "max_history": 3, "rank": 4, "num_experts": 2, "router_type": "linear",
    "item_head": "residual", "item_loss_weight": 1.0, "max_steps": 2, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1, "eval_strategy": "no", "eval_ranking": False, "early_stopping_patience": 0,
    "load_best_model_at_end": False, "validation_users": 4, "num_candidates": 5, "use_cpu": True,
}  # fmt: skip

TABLES = {
    "main": ("popularity", "ids_tuned", "start", "ensemble_counts"),
    "parts": ("start_neighbours", "ensemble_counts_mixed"),
    "controls": ("shuffled_start",),
}

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the study on a small data set, its recipes in this process; returns the names of the recipes that ran."""
    pytest.importorskip("sklearn")
    sequences = cyclic_sequences(num_users=60)
    colours, things = ["red", "blue", "green"], ["soap", "brush", "cream", "oil", "mask"]
    titles = [f"{colours[item % 3]} {things[item // 6]}" for item in range(30)]
    table = sequences.catalogue.table
    table = table.set_column(table.column_names.index("title"), "title", pa.array(titles))
    SequenceDatasets(dict(sequences), Catalogue(table), sequences.protocol).save(tmp_path / "data")
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(STUDENT))
    (tmp_path / "ilora.yaml").write_text(yaml.safe_dump(ILORA | {"llm": str(tmp_path / "llm")}))
    settings = Settings(
        config=str(tmp_path / "student.yaml"),
        counts={"max_gap": 5, "gap_decay": 0.5, "max_rounds": 1},
        ids=({}, {"learning_rate": 1e-2}),
        joint_start={"initial_items": "titles_and_cooccurrence"},
        start=({},),
        title_weight=1.0,
        count_weight=0.5,
        taught=({"teacher_weights": [1.0, 1.0, 0.5], "kl_weight": 1.0},),
        trial_seeds=1,
        ilora=str(tmp_path / "ilora.yaml"),
        llm_users=40,
        title_encoder="tf-idf",
    )
    monkeypatch.setattr(language, "SETTINGS", {"beauty": settings})
    monkeypatch.setattr(language, "TABLES", TABLES)
    ran = []

    def in_process(recipe, options, threads):
        module = load_recipe(RECIPES / f"{recipe}.py")
        monkeypatch.setattr(module, "set_up_logging", lambda folder: None)
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, options)])
        ran.append(recipe)
        module.main()

    monkeypatch.setattr(recipe_runs, "run_recipe", in_process)
    monkeypatch.setattr(language, "set_up_logging", lambda folder: None)

    def run(**options):
        ran.clear()
        language.make_tables(
            language.LanguageArguments(
                data="beauty",
                output_dir=str(tmp_path / "study"),
                data_dir=str(tmp_path / "data"),
                report=str(tmp_path / "report"),
                seeds=[1],
                latency_calls=3,
                **options,
            )
        )
        return list(ran)

    return run


def test_the_study_trains_missing_runs_and_tabulates_them(study, tmp_path):
    ran = study(table="all", test=True)
    assert ran.count("fit_counts") == ran.count("tune_ensemble") == 1
    assert ran.count("train_sasrec") == 2 + 1 + 1  # trials of ids only, the start and the shuffled one
    assert ran.count("distill_sasrec") == 1 + 2  # the student of the ensemble, and two parts
    content = json.loads((tmp_path / "report.json").read_text())
    rows = content["rows"]
    assert {name for names in content["tables"].values() for name in names} == set(rows)
    for name, row in rows.items():
        assert 0 <= row["splits"]["validation"]["metrics"]["masked/ndcg@10"][0] <= 1
        assert (row["splits"]["validation"]["to_reference"] is None) == (name == "ids_tuned")
    assert set(rows["ensemble_counts"]["splits"]) == {"validation", "test"}
    assert set(rows["shuffled_start"]["splits"]) == {"validation"}
    assert rows["ensemble_counts"]["splits"]["test"]["to_reference"]["num_users"] == 60
    minutes = {name: row["training_minutes"] for name, row in rows.items()}
    assert minutes["ensemble_counts"] > minutes["start"] > 0 and minutes["ensemble_counts"] > minutes["popularity"] > 0
    trials = {name: len(row["trials"]) for name, row in rows.items()}
    assert trials["ids_tuned"] == 2 and trials["start"] == 0
    text = (tmp_path / "report.md").read_text()
    assert all(f"\n# {table}\n" in text for table in ("main", "parts", "controls"))
    assert (tmp_path / "report.png").is_file()

    assert study(rows=["start"]) == []
    content = json.loads((tmp_path / "report.json").read_text())
    assert list(content["rows"]) == content["tables"]["rows"] == ["ids_tuned", "start"]
    with pytest.raises(ValueError, match="rows contains begin: expected some of counts, "):
        study(rows=["start", "begin"])

    assert study(table="main") == []
    shutil.rmtree(tmp_path / "study" / "ensemble_counts")
    assert study(table="main", run=False) == []
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert "ensemble_counts" not in rows and set(rows["start"]["splits"]) == {"validation"}


def test_a_language_model_is_asked_as_a_member_as_a_start_and_as_both(study, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "TABLES", {"llm": language_rows.TABLES["llm"]})
    monkeypatch.setattr(language_rows, "ITEMS_OF_ANSWER", 5)
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    save_llm(tmp_path / "llm")
    ran = study(table="llm")
    assert ran.count("train_ilora") == ran.count("label_with_teacher") == 2  # iLoRA and its control
    assert ran.count("train_sasrec") == 2 + 4  # trials of ids only, the start, the gate, and two starts from titles
    assert ran.count("tune_ensemble") == 6
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content["rows"]) == {"ids_tuned", "start", "plain_llm_start", "ilora_start"}
    assert content["rows"]["ilora_start"]["splits"]["validation"]["to_twin"]["num_users"] == 60
    mixtures = content["mixtures"]
    assert len(mixtures) == 6 and mixtures["mixture_sample"]["to_reference"] is None
    for name, mixture in mixtures.items():
        saved = SavedRanks.load(next((tmp_path / "study" / name).rglob("validation.parquet")))
        assert mixture["num_users"] == 40 and len(saved.table) == 40
        assert ndcg_at(torch.tensor(saved.ranks("masked")), 10).mean().item() == pytest.approx(mixture["ndcg"])
        assert mixture["ndcg"] >= mixture["alone"][next(iter(mixture["weights"]))]
        if name != "mixture_sample":
            assert mixture["to_reference"]["mean_b"] == pytest.approx(mixture["ndcg"])
    assert mixtures["mixture_gate"]["to_twin"] is None
    difference = mixtures["mixture_ilora"]["ndcg"] - mixtures["mixture_plain_llm"]["ndcg"]
    assert mixtures["mixture_ilora"]["to_twin"]["difference"]["mean"] == pytest.approx(difference)
    assert "| mixture of scores, validation |" in (tmp_path / "report.md").read_text()
    assert study(table="llm") == []
