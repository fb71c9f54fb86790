"""Data that were prepared with `--num_candidates 0` go through every recipe."""

import json

import pytest

from hf_ilora import SequenceDatasets
from tests.tiny_ilora_parts import save_parts

SMALL = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8, "num_train_epochs": 1,
    "use_cpu": True, "disable_tqdm": True, "initial_items": "random",
}  # fmt: skip


@pytest.mark.slow
def test_every_recipe_works_without_the_protocol_of_candidates(run_recipe, tmp_path):
    llm = save_parts(tmp_path / "parts", num_users=4).llm
    rows = [f"{user},{item},Title {item}\n" for user in range(40) for item in range(user % 5, user % 5 + 9)]
    (tmp_path / "plays.csv").write_text("user,item,name\n" + "".join(rows))
    data = {"data_dir": tmp_path / "data"}

    def run(name, folder, **settings):
        return run_recipe(name, output_dir=tmp_path / folder, **settings)

    table = {"interactions": tmp_path / "plays.csv", "user_column": "user", "item_column": "item"}
    run("prepare_data", "data", **table, title_column="name", num_candidates=0)
    assert "candidates" not in SequenceDatasets.load(tmp_path / "data")["test"].column_names
    one_each = {"gap_decay": 0.9, "backward_weight": 0.5, "source_power": 0.5, "target_power": 0.2, "max_length": 5}
    run("fit_counts", "counts", **data, **one_each, max_gap=5, history_decay=0.7, max_rounds=1)
    sasrec = run("train_sasrec", "sasrec", **data, **SMALL)
    assert "candidates/hit_ratio@1" not in sasrec.record["metrics"]["test"]
    run("label_with_teacher", "labels", **data, teacher=tmp_path / "sasrec", top_k=3)
    labels = {"teacher_labels": tmp_path / "labels", "top_k": 3, "windows": "last"}
    run("distill_sasrec", "student", **data, **SMALL, **labels)
    models = [tmp_path / "counts" / "popularity", tmp_path / "sasrec", tmp_path / "student"]
    measured = {"num_resamples": 5, "plot": False, "k": 3}
    run("evaluate_models", "evaluation", **data, **measured, models=models, latency_calls=2)
    ilora = {"recommender": tmp_path / "sasrec", "llm": llm, "max_steps": 1, "num_candidates": 3, "max_history": 4}
    trained = run("train_ilora", "ilora", **data, **ilora, use_cpu=True, disable_tqdm=True)
    assert trained.record["status"] == "finished" and "eval_loss" in trained.record["metrics"]["validation"]
    run("evaluate_ilora", "ilora_evaluation", **data, **measured, models=tmp_path / "ilora")
    results = json.loads((tmp_path / "ilora_evaluation" / "results.json").read_text())
    assert 0 < results["models"][0]["quality"]["candidates/hit_ratio@1"]["mean"] <= 1
