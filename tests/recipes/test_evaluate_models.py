"""recipes/evaluate_models.py from saved models to one table."""

import csv
import importlib.util
import json
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_ilora import (
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
    compare_runs,
    item_title_embeddings,
)
from hf_ilora.data.columns import training_sequences
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.loading import load_recommender
from hf_ilora.runs.recipe_files import load_recipe
from tests.paths import RECIPES
from tests.recipe_runs import RecipeRun, recipe_words
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import save_ilora, save_parts

QUICK = {"latency_calls": 5, "num_resamples": 200}


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=60)


@pytest.fixture(scope="module")
def data_dir(sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cycle"
    sequences.save(folder)
    return folder


@pytest.fixture(scope="module")
def models(sequences, tmp_path_factory):
    """Folders of popularity, transition counts and an untrained SASRec, with the catalogue of the data."""
    folder = tmp_path_factory.mktemp("models")
    items, boundaries = training_sequences(sequences["train"])
    rows = [items[start:end] for start, end in pairwise(boundaries)]
    sizes = {"num_items": sequences.num_items}
    made = {
        "popularity": PopularityForNextItem.fit(rows, PopularityConfig(**sizes)),
        "counts": TransitionCountsForNextItem.fit(rows, TransitionCountsConfig(**sizes)),
        "sasrec": SASRecForNextItem(SASRecConfig(**sizes, hidden_size=8, max_length=8)),
    }
    for name, model in made.items():
        model.catalogue = sequences.catalogue
        model.save_pretrained(folder / name)
    return [folder / name for name in made]


@pytest.fixture
def evaluate(run_recipe, data_dir, tmp_path):
    """Runs the recipe in this process."""

    def run(**changes) -> RecipeRun:
        settings = {"data_dir": data_dir, "output_dir": tmp_path / "evaluation", **QUICK}
        return run_recipe("evaluate_models", **settings | changes)

    return run


def test_three_models_end_up_in_one_table_with_their_ranks(evaluate, models, sequences):
    names = ["popularity", "counts", "some/sasrec"]
    run = evaluate(models=models, names=names)
    output = run.output_dir
    found = {path.name for path in output.iterdir()}
    assert found == {"results.md", "results.csv", "results.json", "results.png", "ranks", "run.json"}
    with (output / "results.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert list(rows) == names
    saved = {name: next((output / "ranks").glob(f"*{name.split('/')[-1]}-*.parquet")) for name in names}
    for name, folder in zip(names, models, strict=True):
        ranks = rank_split(load_recommender(folder), sequences["test"])
        table = pq.read_table(saved[name])
        assert table["user_id"].to_pylist() == sequences["test"]["user_id"][:]
        assert table["rank_masked"].to_pylist() == ranks.masked.tolist()
        assert table["rank_candidates"].to_pylist() == ranks.candidates.tolist()
        assert float(rows[name]["masked/hit_ratio@10"]) == pytest.approx((ranks.masked <= 10).mean())
        assert float(rows[name]["candidates/hit_ratio@1"]) == pytest.approx((ranks.candidates == 1).mean())
        assert int(rows[name]["num_bytes"]) == (folder / "model.safetensors").stat().st_size
        assert float(rows[name]["latency p50_ms"]) > 0
    comparison = compare_runs(saved["popularity"], saved["counts"], num_resamples=200)
    assert float(rows["counts"]["difference"]) == comparison.difference.mean > 0
    assert float(rows["counts"]["p_value"]) == comparison.p_value
    content = json.loads((output / "results.json").read_text())
    lengths = np.array([len(history) for history in sequences["test"]["history"]])
    for folder, found in zip(models, content["models"], strict=True):
        items, _ = load_recommender(folder).recommend(sequences["test"]["history"][:], top_k=10)
        assert found["lists"]["coverage@10"]["mean"] == pytest.approx(len(np.unique(items)) / 30)
        assert found["lists"]["decile_10@10"]["low"] <= found["lists"]["decile_10@10"]["high"]
        of_length = found["by_length"]["11-20"]
        assert content["context"]["users_by_length"] == {"11-20": len(lengths)} and lengths.min() > 10
        assert of_length["masked/ndcg@10"] == found["quality"]["masked/ndcg@10"]
        assert of_length["novelty@10"] == found["lists"]["novelty@10"]
    text = (output / "results.md").read_text()
    for title in ("## Beyond accuracy", "## Share of the recommendations by popularity", "## By the length of the"):
        assert title in text
    assert run.record["status"] == "finished"
    assert run.record["metrics"]["counts"]["masked/mrr"]["mean"] == pytest.approx(float(rows["counts"]["masked/mrr"]))


def test_an_encoder_of_titles_measures_diversity(evaluate, sequences, models):
    pytest.importorskip("sklearn", reason="TF-IDF needs the extra 'titles'")
    run = evaluate(models=models[0], names="popularity", title_encoder="tf-idf", plot=False)
    found = json.loads((run.output_dir / "results.json").read_text())["models"][0]["lists"]["diversity@10"]
    items, _ = load_recommender(models[0]).recommend(sequences["test"]["history"][:], top_k=10)
    vectors = item_title_embeddings(sequences.catalogue, "tf-idf").numpy()[items]  # (users, 10, size)
    cosines = vectors @ vectors.transpose(0, 2, 1)
    assert found["mean"] == pytest.approx(1 - (cosines.sum(axis=(1, 2)) - 10).mean() / 90)
    text = (run.output_dir / "results.md").read_text()
    assert "| diversity |" in text and "as vectors of\ntf-idf." in text


def test_models_of_one_name_are_runs_of_one_model(evaluate, models):
    run = evaluate(models=[models[0], models[1], models[1].parent / "sasrec"], names=["popularity", "two", "two"])
    assert sorted(path.name.partition("-")[0] for path in (run.output_dir / "ranks").iterdir()) == [
        *("popularity", "two", "two")
    ]
    content = json.loads((run.output_dir / "results.json").read_text())
    assert content["seeds"]["two"]["masked/ndcg@10"]["runs"] == 2
    assert [model["kind"] for model in content["models"]] == ["baseline", "baseline", "ids"]
    assert "| two | 2 |" in (run.output_dir / "results.md").read_text()
    assert len(run.record["metrics"]) == 3


@pytest.mark.parametrize(
    ("configuration", "start", "kind"),
    [
        ({"DistillationArguments": {}}, "cooccurrence", "student"),
        ({"NextItemTrainingArguments": {}}, "titles_and_cooccurrence", "student"),
        ({"NextItemTrainingArguments": {}}, "cooccurrence", "ids"),
    ],
)
def test_the_run_of_a_model_says_what_it_learnt_from(models, tmp_path, configuration, start, kind):
    record = dict.fromkeys(("status", "started", "seed", "data_fingerprint", "git", "durations_seconds"))
    record |= {"configuration": configuration, "metrics": {"start": {"initial_items": start}}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert load_recipe(RECIPES / "evaluate_models.py").kind_of(load_recommender(models[2]), tmp_path) == kind


def test_metrics_count_all_relevant_items_of_a_user(evaluate, models, tmp_path):
    sequences = cyclic_sequences(num_users=40, protocol="last_n")
    sequences.save(tmp_path / "data")
    run = evaluate(data_dir=tmp_path / "data", models=models[:2], names=["popularity", "counts"], plot=False)
    content = json.loads((run.output_dir / "results.json").read_text())
    assert content["context"]["compared"] == "relevant/ndcg@10"
    for folder, found in zip(models, content["models"], strict=False):
        ranks = rank_split(load_recommender(folder), sequences["test"]).relevant  # (users, relevant)
        recall = ((ranks > 0) & (ranks <= 10)).sum(axis=1) / (ranks > 0).sum(axis=1)
        assert found["quality"]["relevant/recall@10"]["mean"] == pytest.approx(recall.mean())
        assert "relevant/recall@10" in found["by_length"]["6-10"]
    difference = content["models"][1]["comparison"]["difference"]["mean"]
    means = [model["quality"]["relevant/ndcg@10"]["mean"] for model in content["models"]]
    assert difference == pytest.approx(means[1] - means[0])
    assert "| recall@10 of all |" in (run.output_dir / "results.md").read_text()
    runs = sorted((run.output_dir / "ranks").iterdir())
    assert compare_runs(*runs, metric="map@10", ranking="relevant", num_resamples=50).num_users == 40


def test_targets_outside_training_are_ranked_among_the_new_items(evaluate, models, tmp_path):
    sequences = cyclic_sequences(num_users=60, protocol="cold_items")
    sequences.save(tmp_path / "data")
    counts = sequences.catalogue.counts
    target_counts = counts[sequences["test"]["target"][:]]
    output = evaluate(data_dir=tmp_path / "data", models=models[1:], names=["counts", "sasrec"]).output_dir
    content = json.loads((output / "results.json").read_text())
    is_new = counts == 0
    is_new[0] = False
    ranks = rank_split(load_recommender(models[1]), sequences["test"], is_new=is_new)
    new = target_counts == 0
    assert content["context"]["num_new_items"] == is_new.sum() >= 3
    assert content["context"]["users_by_count"]["0"] == new.sum() > 0
    group = content["models"][0]["by_count"]["0"]
    assert group["masked/hit_ratio@10"]["mean"] == (ranks.masked[new] <= 10).mean()
    assert group["new_items/ndcg@10"]["mean"] == pytest.approx((1 / np.log2(1 + ranks.new_items[new])).mean())
    runs = sorted((output / "ranks").iterdir())
    assert compare_runs(*runs, ranking="new_items", num_resamples=100).num_users == new.sum()
    assert "## By the training count of the target" in (output / "results.md").read_text()


def test_an_ilora_may_rank_a_sample_of_the_users_and_is_compared_on_them(evaluate, tmp_path):
    parts = save_parts(tmp_path / "parts", num_users=12)
    save_ilora(parts, tmp_path / "ilora")
    settings = {"data_dir": parts.data_dir, "models": [parts.recommender, tmp_path / "ilora"], "names": ["a", "b"]}
    output = evaluate(**settings, k=3, ilora_users=5, seed=1).output_dir
    tables = {path.name[0]: pq.read_table(path).to_pydict() for path in (output / "ranks").iterdir()}
    asked = np.isin(tables["a"]["user_id"], tables["b"]["user_id"])
    assert len(asked) == 12 and asked.sum() == len(tables["b"]["user_id"]) == 5
    ranks = {"a": np.array(tables["a"]["rank_masked"])[asked], "b": np.array(tables["b"]["rank_masked"])}
    quality = {name: np.where(rank <= 3, 1 / np.log2(1 + rank), 0).mean() for name, rank in ranks.items()}
    models = json.loads((output / "results.json").read_text())["models"]
    assert [model["num_users"] for model in models] == [12, 5]
    assert models[1]["quality"]["masked/ndcg@3"]["mean"] == pytest.approx(quality["b"])
    assert models[1]["comparison"]["difference"]["mean"] == pytest.approx(quality["b"] - quality["a"])
    text = (output / "results.md").read_text()
    assert "| model | users | NDCG@3 masked |" in text and "| b | 5 |" in text
    assert "| b |" not in text.partition("## By the training count")[2]
    with pytest.raises(ValueError, match="ilora_users is 13: expected at most 12, the users of the split"):
        evaluate(**settings, k=3, ilora_users=13, output_dir=tmp_path / "other")


def test_a_model_of_other_items_is_an_error_before_anything_runs(evaluate, models, tmp_path):
    other = SASRecForNextItem(SASRecConfig(num_items=7, hidden_size=8))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="knows 7 items and the data set has 30"):
        evaluate(models=[*models, tmp_path / "other"])
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        evaluate(models=[*models, tmp_path / "missing"])
    assert not (tmp_path / "evaluation").exists()


def test_data_without_candidates_is_measured_in_the_catalogue_alone(evaluate, sequences, models, tmp_path):
    sequences_without = type(sequences)(
        {name: split.select_columns(["user_id", "history", "target"]) for name, split in sequences.items()},
        sequences.catalogue,
        sequences.protocol | {"num_candidates": 0},
    )
    sequences_without.save(tmp_path / "data")
    output = evaluate(data_dir=tmp_path / "data", models=models[:2]).output_dir
    quality = [model["quality"] for model in json.loads((output / "results.json").read_text())["models"]]
    for folder, found in zip(models, quality, strict=False):
        ranks = rank_split(load_recommender(folder), sequences["test"]).masked
        assert found["masked/hit_ratio@10"]["mean"] == pytest.approx((ranks <= 10).mean())
        assert not any(name.startswith("candidates/") for name in found)
    header = next(line for line in (output / "results.md").read_text().splitlines() if "|" in line)
    assert "HR@10 masked" in header and "HR@1 of" not in header
    runs = sorted((output / "ranks").iterdir())
    assert compare_runs(*runs, num_resamples=100).num_users == len(sequences["test"])
    with pytest.raises(ValueError, match="data without candidates: expected ranking masked or unmasked"):
        compare_runs(*runs, ranking="candidates")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "train"}, "invalid choice: 'train' .*validation.*test"),
        ({"names": "one"}, "for 2 models: expected one name for each"),
        ({"models": ["a", "a"], "names": ["same", "same"]}, "expected no model twice under one name"),
        ({"k": 0}, "k is 0: expected at least 1"),
        ({"ilora_users": 0}, "ilora_users is 0: expected at least 1"),
        ({"latency_threads": 0}, "latency_threads is 0"),
        ({"modles": "x"}, "unknown option"),
    ],
)
def test_bad_options_are_refused(evaluate, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(**{"models": ["a", "b"]} | settings)


def test_without_matplotlib_the_plot_is_left_out_or_refused_if_asked_for(evaluate, models, monkeypatch):
    find_spec = importlib.util.find_spec
    missing = lambda name: None if name == "matplotlib" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(ValueError, match=r"install hf_ilora\[plot\], or pass --plot false"):
        evaluate(models=models[0], plot=True)
    output = evaluate(models=models[0]).output_dir
    assert (output / "results.md").exists() and not (output / "results.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml"])
def test_two_processes_give_the_ranks_of_one(launch, run_recipe, config, data_dir, models, tmp_path):
    settings = {"data_dir": data_dir, "models": models, "names": ["popularity", "counts", "sasrec"], **QUICK}
    settings["batch_size"] = 7  # nine batches: the last round has a process without one
    one = run_recipe("evaluate_models", output_dir=tmp_path / "one", **settings)
    two = RecipeRun(tmp_path / "two")
    launch(config, RECIPES / "evaluate_models.py", *recipe_words(output_dir=two.output_dir, **settings))
    assert two.record["world_size"] == 2
    alone, together = (
        {path.name: pq.read_table(path) for path in (run.output_dir / "ranks").iterdir()} for run in (one, two)
    )
    assert len(alone) == 3 and alone == together
