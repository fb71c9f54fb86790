"""recipes/fit_counts.py and recipes/evaluate_models.py from data to table, as a user calls them."""

import csv
import importlib.util
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from hf_ilora import SASRecConfig, SASRecForNextItem, compare_runs
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.loading import load_recommender
from tests.paths import PROJECT
from tests.synthetic import cyclic_sequences

SHORT_SEARCH = ["--max_gap", "1", "3", "--backward_weight", "0.5", "0", "--max_length", "5", "1", "--max_rounds", "2"]


@pytest.fixture
def run_recipe(monkeypatch):
    """Runs a recipe's `main` in this process, with logging left as it is."""

    def run(name, *options):
        spec = importlib.util.spec_from_file_location(name, PROJECT / "recipes" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "set_up_logging", lambda folder: None)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        module.main()

    return run


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=60)


@pytest.fixture(scope="module")
def data_dir(sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cycle"
    sequences.save(folder)
    return folder


@pytest.fixture
def fitted(run_recipe, data_dir, tmp_path):
    run_recipe("fit_counts", "--data_dir", data_dir, "--output_dir", tmp_path / "counts", *SHORT_SEARCH)
    return tmp_path / "counts"


def test_fitted_counts_are_those_of_the_best_trial_on_validation(fitted, sequences):
    record = json.loads((fitted / "run.json").read_text())
    assert record["status"] == "finished" and record["data_fingerprint"] == sequences.fingerprint
    trials = record["metrics"]["search"]["trials"]
    assert len({json.dumps(trial, sort_keys=True) for trial in trials}) == len(trials) > 5
    best = max(trial["ndcg@10"] for trial in trials)
    model = load_recommender(fitted / "transition_counts")
    settings = model.config.to_dict()
    (chosen,) = (trial for trial in trials if all(settings[name] == trial[name] for name in trial if name != "ndcg@10"))
    assert chosen["ndcg@10"] == best  # several trials may be as good
    ranks = rank_split(model, sequences["validation"]).masked
    ndcg = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()
    assert best == pytest.approx(ndcg)
    assert record["metrics"]["validation_transition_counts"]["masked/ndcg@10"]["mean"] == pytest.approx(ndcg)
    # The walk goes forwards: counting it backwards as well can only hurt, and popularity knows nothing.
    assert chosen["backward_weight"] == 0
    assert ndcg > 2 * record["metrics"]["validation_popularity"]["masked/ndcg@10"]["mean"]


def test_fitting_reads_training_rows_only(fitted, sequences):
    popularity = load_recommender(fitted / "popularity")
    expected = np.zeros(sequences.num_items + 1)
    for row in sequences["train"]:
        for item in [*row["history"], row["target"]]:
            expected[item] += 1
    assert popularity.item_counts.tolist() == expected.tolist()
    assert popularity.catalogue.table["raw_id"].to_pylist() == sequences.raw_ids.tolist()


@pytest.fixture
def models(fitted, sequences, tmp_path):
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8, max_length=8))
    model.catalogue = load_recommender(fitted / "popularity").catalogue
    model.save_pretrained(tmp_path / "sasrec")
    return [fitted / "popularity", fitted / "transition_counts", tmp_path / "sasrec"]


QUICK = ["--latency_calls", "5", "--num_resamples", "200"]


def test_three_models_end_up_in_one_table_with_their_ranks(run_recipe, data_dir, models, sequences, tmp_path):
    output = tmp_path / "evaluation"
    names = ["popularity", "counts", "some/sasrec"]
    folders = ["--data_dir", data_dir, "--output_dir", output]
    run_recipe("evaluate_models", *folders, "--models", *models, "--names", *names, *QUICK)
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
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["metrics"]["counts"]["masked/mrr"]["mean"] == pytest.approx(float(rows["counts"]["masked/mrr"]))


def test_a_model_of_other_items_is_an_error_before_anything_runs(run_recipe, data_dir, models, tmp_path):
    other = SASRecForNextItem(SASRecConfig(num_items=7, hidden_size=8))
    other.save_pretrained(tmp_path / "other")
    options = ["--data_dir", data_dir, "--output_dir", tmp_path / "evaluation", *QUICK]
    with pytest.raises(ValueError, match="knows 7 items and the data set has 30"):
        run_recipe("evaluate_models", *options, "--models", *models, tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="missing is no folder here"):
        run_recipe("evaluate_models", *options, "--models", *models, tmp_path / "missing")
    assert not (tmp_path / "evaluation").exists()


def test_data_without_candidates_is_measured_in_the_catalogue_alone(run_recipe, sequences, models, tmp_path):
    sequences_without = type(sequences)(
        {name: split.select_columns(["user_id", "history", "target"]) for name, split in sequences.items()},
        sequences.catalogue,
        sequences.protocol | {"num_candidates": 0},
    )
    sequences_without.save(tmp_path / "data")
    folders = ["--data_dir", tmp_path / "data", "--output_dir", tmp_path / "evaluation"]
    run_recipe("evaluate_models", *folders, "--models", *models[:2], *QUICK)
    quality = [
        model["quality"] for model in json.loads((tmp_path / "evaluation" / "results.json").read_text())["models"]
    ]
    for folder, found in zip(models, quality, strict=False):
        ranks = rank_split(load_recommender(folder), sequences["test"]).masked
        assert found["masked/hit_ratio@10"]["mean"] == pytest.approx((ranks <= 10).mean())
        assert not any(name.startswith("candidates/") for name in found)
    header = next(line for line in (tmp_path / "evaluation" / "results.md").read_text().splitlines() if "|" in line)
    assert "HR@10 masked" in header and "HR@1 of" not in header
    runs = sorted((tmp_path / "evaluation" / "ranks").iterdir())
    assert compare_runs(*runs, num_resamples=100).num_users == len(sequences["test"])
    with pytest.raises(ValueError, match="of data without candidates: expected ranking masked or unmasked"):
        compare_runs(*runs, ranking="candidates")
    run_recipe("fit_counts", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "counts2", *SHORT_SEARCH)
    assert load_recommender(tmp_path / "counts2" / "transition_counts").config.num_items == sequences.num_items


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "train"], "--split: invalid choice: 'train' .*validation.*test"),
        (["--names", "one"], "for 2 models: expected one name for each"),
        (["--names", "same", "same"], "expected different names"),
        (["--k", "0"], "k is 0: expected at least 1"),
        (["--latency_threads", "0"], "latency_threads is 0"),
        (["--modles", "x"], "unknown option"),
    ],
)
def test_bad_options_are_refused(run_recipe, tmp_path, options, message):
    required = ["--models", "a", "b", "--data_dir", tmp_path, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match=message):
        run_recipe("evaluate_models", *required, *options)


def test_a_plot_without_matplotlib_is_an_error_before_anything_runs(
    run_recipe, data_dir, models, monkeypatch, tmp_path
):
    find_spec = importlib.util.find_spec
    missing = lambda name: None if name == "matplotlib" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    options = ["--models", models[0], "--data_dir", data_dir, "--output_dir", tmp_path / "evaluation", *QUICK]
    with pytest.raises(ValueError, match=r"install hf_ilora\[plot\], or pass --plot false"):
        run_recipe("evaluate_models", *options)
    run_recipe("evaluate_models", *options, "--plot", "false")
    assert (tmp_path / "evaluation" / "results.md").exists()
    assert not (tmp_path / "evaluation" / "results.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml"])
def test_two_processes_give_the_ranks_of_one(launch, run_recipe, config, data_dir, models, tmp_path):
    options = ["--data_dir", data_dir, "--models", *models, "--names", "popularity", "counts", "sasrec", *QUICK]
    options += ["--batch_size", "7"]  # nine batches: the last round has a process without one
    run_recipe("evaluate_models", *options, "--output_dir", tmp_path / "one")
    launch(config, PROJECT / "recipes" / "evaluate_models.py", *options, "--output_dir", tmp_path / "two")
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["world_size"] == 2
    alone = {path.name: pq.read_table(path) for path in (tmp_path / "one" / "ranks").iterdir()}
    together = {path.name: pq.read_table(path) for path in (tmp_path / "two" / "ranks").iterdir()}
    assert len(alone) == 3 and alone == together
