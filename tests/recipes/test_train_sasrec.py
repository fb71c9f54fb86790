"""recipes/train_sasrec.py from a prepared data set to a saved model, and as a user runs it: killed and resumed."""

import json
import re
import shutil

import pyarrow as pa
import pytest
import torch

from hf_ilora import SASRecForNextItem, SequenceDatasets
from hf_ilora.downloads import DownloadError
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.training import initial_items
from tests.recipe_runs import RecipeRun, kill_recipe
from tests.synthetic import cyclic_sequences
from tests.titles.encoder_folders import save_bert

SETTINGS = {
    "hidden_size": 16, "max_length": 8, "per_device_train_batch_size": 64, "num_train_epochs": 12, "use_cpu": True,
    "disable_tqdm": True, "learning_rate": 5.0e-3, "initial_items": "random",
}  # fmt: skip
STEPS_PER_EPOCH = 4  # 240 users / 64


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "cycle"
    cyclic_sequences().save(folder)
    return folder


@pytest.fixture(scope="module")
def train(run_recipe, data_dir):
    """Runs the recipe in this process."""

    def run(output_dir, **changes) -> RecipeRun:
        return run_recipe("train_sasrec", **{"data_dir": data_dir, "output_dir": output_dir, **SETTINGS, **changes})

    return run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "trained")


def test_run_writes_a_model_that_knows_the_rule_and_a_full_record(trained):
    record = trained.record
    assert record["status"] == "finished" and record["seed"] == 42
    assert record["configuration"]["SASRecArguments"]["hidden_size"] == 16
    assert record["versions"]["torch"] and record["durations_seconds"]["train"] > 0
    # Two of thirty items can come next, so a model that knows the rule is right about half the time.
    assert record["metrics"]["test"]["unmasked/hit_ratio@10"]["mean"] > 0.95
    assert record["metrics"]["test"]["unmasked/mrr"]["mean"] > 0.5
    model = SASRecForNextItem.from_pretrained(trained.output_dir)
    item_ids, _ = model.recommend(torch.tensor([[1, 2, 3]]), top_k=2)
    assert set(model.catalogue.titles(item_ids[0])) == {"Title 103", "Title 104"}
    assert not list(trained.output_dir.glob("*.bin"))


def test_items_start_from_titles_by_default_if_there_are_any(train, data_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    settings = {"initial_items": "auto", "num_train_epochs": 1, "title_encoder": save_bert(tmp_path / "bert")}
    sequences = SequenceDatasets.load(data_dir)
    table = sequences.catalogue.table
    ids = table["raw_id"].cast(pa.string())
    without = Catalogue(table.set_column(table.column_names.index("title"), "title", ids))
    SequenceDatasets(dict(sequences), without, sequences.protocol).save(tmp_path / "ids")
    for changes, decided, told in (
        ({}, "titles_and_cooccurrence", "since the data have titles, which .*; --initial_items random starts without"),
        ({"data_dir": tmp_path / "ids"}, "random", "the data have no titles that tell items apart"),
        ({"hidden_size": 32}, "random", "needs a hidden_size below the 30 items, and it is 32"),
        ({"block_type": "reference"}, "random", "needs block_type pre_norm, and it is reference"),
        ({"initial_items": "cooccurrence"}, "cooccurrence", None),
    ):
        caplog.clear()
        run = train(tmp_path / decided / str(len(changes)) / next(iter(changes), "plain"), **settings | changes)
        assert run.record["metrics"]["start"] == {"initial_items": decided}
        assert (told is None and "initial_items is" not in caplog.text) or re.search(told, caplog.text)


def test_an_encoder_that_cannot_be_downloaded_is_reported_with_alternatives(train, tmp_path, monkeypatch):
    def offline(*arguments, **settings):
        raise DownloadError("no network")

    monkeypatch.setattr(initial_items, "item_title_embeddings", offline)
    message = "all-MiniLM-L6-v2 cannot be downloaded: .* --title_encoder tf-idf .* --initial_items cooccurrence"
    with pytest.raises(DownloadError, match=message):
        train(tmp_path, initial_items="auto")


def test_a_fraction_of_the_rows_is_learnt_from(train, tmp_path):
    run = train(tmp_path, train_fraction=[0.5, 1.0], num_train_epochs=1)
    assert len(run.trainer.train_dataset) == 120
    assert run.record["configuration"]["DataArguments"]["train_fraction"] == [0.5, 1.0]


def test_rows_that_are_prefixes_teach_their_last_target_only(train, tmp_path):
    cyclic_sequences(num_users=100, protocol="temporal_users").save(tmp_path / "data")
    run = train(tmp_path / "run", data_dir=tmp_path / "data", num_train_epochs=1)
    assert run.trainer.train_dataset.labelled_positions == "last"
    assert run.record["metrics"]["test"]["candidates/hit_ratio@1"]["mean"] >= 0


def test_items_outside_training_get_rows_from_their_titles(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    sequences = cyclic_sequences(num_users=60, protocol="cold_items")
    sequences.save(tmp_path / "data")
    settings = {"data_dir": tmp_path / "data", "num_train_epochs": 1, "title_encoder": save_bert(tmp_path / "bert")}
    with_titles = settings | {"initial_items": "titles_and_cooccurrence"}
    runs = {
        "filled": train(tmp_path / "filled", **with_titles),  # as is the rule for a start from titles
        "kept": train(tmp_path / "kept", fill_new_items=False, **with_titles),
        "asked": train(tmp_path / "asked", fill_new_items=True, **settings),
        "random": train(tmp_path / "random", **settings),
    }
    tables = {
        name: SASRecForNextItem.from_pretrained(run.output_dir).get_input_embeddings().weight.detach()
        for name, run in runs.items()
    }
    new = torch.from_numpy(sequences.catalogue.counts == 0)
    new[0] = False
    assert new.sum() >= 3
    for filled, kept in (("filled", "kept"), ("asked", "random")):
        differs = (tables[filled] - tables[kept]).abs().amax(1) > 1e-3
        assert differs.tolist() == new.tolist()


def test_finished_run_is_never_overwritten(trained, train):
    before = {path.name: path.read_bytes() for path in trained.output_dir.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="a finished run: choose another output_dir"):
        train(trained.output_dir, learning_rate=1.0)
    assert {path.name: path.read_bytes() for path in trained.output_dir.iterdir() if path.is_file()} == before


def test_unfinished_run_with_other_settings_is_never_continued(trained, train, tmp_path):
    shutil.copytree(trained.output_dir, tmp_path / "killed")
    (tmp_path / "killed" / "run.json").write_text(json.dumps(trained.record | {"status": "running"}))
    with pytest.raises(ValueError, match=r"learning_rate was 0.005 and is 1.0; choose another output_dir"):
        train(tmp_path / "killed", learning_rate=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1e-3}, "did you mean --learning_rate"),
        ({"hidden_size": "wide"}, "invalid int value: 'wide'"),
        ({"block_type": "post"}, "pre_norm"),
        ({"data_dir": "nowhere"}, "nowhere"),
        ({"train_fraction": [0.5, 0.5]}, "train_fraction"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(train, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError)) as raised:
        train(tmp_path / "bad", **changes)
    assert message in str(raised.value)
    assert not (tmp_path / "bad").exists()


# --- as a user runs it ---


@pytest.fixture(scope="module")
def finished(start_recipe, data_dir, tmp_path_factory):
    """A run as a process, and what it printed."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    folders = {"data_dir": data_dir, "output_dir": output_dir}
    result = start_recipe("train_sasrec", **folders, **SETTINGS, report_to="tensorboard")
    assert result.returncode == 0, result.stderr
    return RecipeRun(output_dir), result.stderr


@pytest.mark.slow
def test_the_log_has_every_epoch_once(finished):
    run, console = finished
    log = (run.output_dir / "run.log").read_text()
    for text in (log, console):
        assert text.count("step 48 of 48, 0 s left: eval_loss") == 1
        assert text.count("eval_ndcg@10") == 12
    assert list(run.output_dir.rglob("events.out.tfevents.*")), "TensorBoard was asked for"


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_result(finished, start_recipe, data_dir, tmp_path):
    whole, killed = finished[0], RecipeRun(tmp_path / "killed")
    settings = {"data_dir": data_dir, "output_dir": killed.output_dir, **SETTINGS}
    for epochs in (2, 5):
        kill_recipe("train_sasrec", epochs * STEPS_PER_EPOCH, **settings)
    assert killed.record["status"] == "running"
    result = start_recipe("train_sasrec", **settings)
    assert result.returncode == 0, result.stderr
    assert f"from {killed.output_dir}/checkpoint-" in result.stderr
    assert killed.record["metrics"] == whole.record["metrics"]
    assert len(killed.record["earlier_runs"]) == 2
    assert killed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(value, killed.weights[name]) for name, value in whole.weights.items())
