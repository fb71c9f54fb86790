"""recipes/distill_sasrec.py from labels or an online teacher to a saved student, in this process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import (
    PopularityConfig,
    PopularityForNextItem,
    SequenceDatasets,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.distillation.teachers import ScoreTableTeacher, load_teacher
from hf_ilora.models.loading import load_recommender
from hf_ilora.training import initial_items
from tests.recipe_runs import RecipeRun, checkpoint_step, newest_checkpoint
from tests.saved_labels import save_labels
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender, save_ilora, save_parts
from tests.titles.encoder_folders import save_bert

NUM_ITEMS, EMBEDDING_SIZE = 30, 24
SETTINGS = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8, "top_k": 4, "use_cpu": True,
    "disable_tqdm": True, "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 1.0e-2,
    "logging_strategy": "steps", "logging_steps": 1, "early_stopping_patience": 0,
}  # fmt: skip


class EmbeddingTeacher(ScoreTableTeacher):
    """A table of scores from a teacher that has item embeddings, too."""

    def item_embeddings(self):
        table = torch.randn(NUM_ITEMS + 1, EMBEDDING_SIZE, generator=torch.Generator().manual_seed(3))
        table[0] = 0
        return table


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A data set, a SASRec that knows it, its labels for every position, and a table's labels with embeddings."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "teacher")
    histories = sequences["train"]["history"]
    PopularityForNextItem.fit(histories, PopularityConfig(num_items=NUM_ITEMS)).save_pretrained(folder / "popularity")
    config = TransitionCountsConfig(num_items=NUM_ITEMS, max_length=2)
    counts = TransitionCountsForNextItem.fit(histories, config)
    counts.catalogue = sequences.catalogue
    counts.save_pretrained(folder / "counts")
    save_bert(folder / "encoder")
    rows = len(sequences["train"])
    teacher = load_teacher(str(folder / "teacher"), rows, NUM_ITEMS)
    save_labels(folder / "labels", sequences, teacher, "all")
    save_file({"scores": torch.randn(rows, NUM_ITEMS + 1)}, folder / "scores.safetensors")
    table = EmbeddingTeacher(folder / "scores.safetensors", rows, NUM_ITEMS)
    save_labels(folder / "table_labels", sequences, table, "last")
    return folder


@pytest.fixture
def distill(run_recipe, parts, tmp_path, monkeypatch):
    """Runs the recipe in this process with a data set and an output folder; encoded titles are kept there too."""
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))

    def run(**changes) -> RecipeRun:
        settings = SETTINGS | {"data_dir": parts / "data", "output_dir": tmp_path / "student"} | changes
        return run_recipe("distill_sasrec", **settings)

    return run


def test_a_student_learns_from_labels_and_is_saved_as_a_plain_sasrec(distill, parts):
    run = distill(teacher_labels=parts / "labels", distilled_positions="all")
    ranking = run.logged("ranking_loss")
    assert ranking[-1] < ranking[0] and len(run.logged("base_loss")) == len(ranking)
    model = load_recommender(run.output_dir)
    assert model.config.model_type == "sasrec" and model.catalogue is not None
    assert run.record["status"] == "finished" and "masked/ndcg@10" in run.record["metrics"]["test"]


def as_if_killed(whole, folder):
    """A copy of a run that lacks its last checkpoint, and the record that a killed run leaves."""
    shutil.copytree(whole.output_dir, folder)
    shutil.rmtree(newest_checkpoint(folder))
    record = whole.record | {"status": "running"}
    (folder / "run.json").write_text(json.dumps(record))
    return folder, record


def test_a_resumed_run_logs_and_learns_what_an_undisturbed_one_does(distill, parts, tmp_path):
    settings = {"teacher_labels": parts / "labels", "distilled_positions": "all", "save_total_limit": 5}
    whole = distill(**settings, output_dir=tmp_path / "whole")
    killed, record = as_if_killed(whole, tmp_path / "killed")
    for name in ("fingerprint", "embeddings_fingerprint"):
        other = record | {"metrics": {"teacher_labels": record["metrics"]["teacher_labels"] | {name: "other"}}}
        (killed / "run.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"was trained on teacher_labels whose {name} was other"):
            distill(**settings, output_dir=killed)
    (killed / "run.json").write_text(json.dumps(record))
    resumed = distill(**settings, output_dir=killed)
    assert resumed.logged("ranking_loss") == pytest.approx(whole.logged("ranking_loss"), rel=1e-5)
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value)


def test_an_online_teacher_needs_no_labels(distill, parts):
    run = distill(teacher=parts / "teacher", kl_weight=1.0, policy="kl_divergence", policy_threshold=0.01)
    divergence = run.logged("kl_loss")
    assert divergence[-1] < divergence[0]


ENSEMBLE = {"distilled_positions": "all", "lam": 0, "kl_weight": 1, "windows": "all"}


def test_an_ensemble_teaches_at_every_position_and_shares_the_titles(distill, parts, monkeypatch):
    encoded = []
    monkeypatch.setattr(initial_items, "item_title_embeddings", counting(encoded, initial_items.item_title_embeddings))
    run = distill(
        teacher=[parts / "teacher", "titles", parts / "counts"], teacher_weights=[1, 3, 0.5], title_decay=0.5,
        initial_items="titles_and_cooccurrence", title_neighbours=0.2, title_encoder=parts / "encoder", **ENSEMBLE,
    )  # fmt: skip
    assert len(encoded) == 1
    divergence = run.logged("kl_loss")
    assert 0 < divergence[-1] < divergence[0] and min(run.logged("title_neighbour_loss")) > 0
    teacher = run.trainer._ensemble
    assert (teacher.weights, teacher.members[1].decay) == ((1.0, 3.0, 0.5), 0.5)
    metrics = run.record["metrics"]
    fingerprint = load_teacher(str(parts / "teacher"), 1, NUM_ITEMS).fingerprint
    assert metrics[f"teacher {parts / 'teacher'}"] == {"fingerprint": fingerprint}
    assert metrics["teacher titles"]["decay"] == 0.5 and metrics["teacher titles"]["encoder"]
    assert load_recommender(run.output_dir).config.model_type == "sasrec"


def counting(calls, function):
    def call(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    return call


def test_title_neighbours_need_no_teacher(distill, parts):
    run = distill(title_neighbours=5, title_encoder=parts / "encoder", windows="all")
    values = run.logged("title_neighbour_loss")
    assert 0 < values[-1] < values[0] and not run.logged("kl_loss")
    assert run.record["metrics"]["the titles"]["encoder"]


@pytest.mark.parametrize("labels", ["labels", "table_labels"])
def test_labels_are_a_member(distill, parts, labels):
    settings = ENSEMBLE | ({"windows": "last"} if labels == "table_labels" else {})
    run = distill(teacher=[parts / labels, parts / "counts"], **settings)
    values = run.logged("kl_loss")
    assert values[-1] < values[0]
    assert run.record["metrics"][f"teacher {parts / labels}"]["fingerprint"]


def test_a_resumed_run_asks_the_same_ensemble_and_learns_what_an_undisturbed_one_does(distill, parts, tmp_path):
    shutil.copytree(parts / "counts", tmp_path / "counts")
    settings = {"teacher": [parts / "teacher", "titles", tmp_path / "counts"], "title_encoder": parts / "encoder"}
    settings |= ENSEMBLE | {"save_total_limit": 5}
    whole = distill(**settings, output_dir=tmp_path / "whole")
    killed, record = as_if_killed(whole, tmp_path / "killed")
    for name in settings["teacher"]:
        other = json.loads(json.dumps(record))
        key = "encoder" if name == "titles" else "fingerprint"
        other["metrics"][f"teacher {name}"][key] = "other"
        (killed / "run.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"was trained on teacher {name} whose {key} was other and"):
            distill(**settings, output_dir=killed)
    (killed / "run.json").write_text(json.dumps(record))
    resumed = distill(**settings, output_dir=killed)
    assert resumed.logged("kl_loss") == pytest.approx(whole.logged("kl_loss"), rel=1e-5)
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value)


# --- tuned ensembles ---


@pytest.fixture(scope="module")
def validation_labels(run_recipe, parts):
    """Labels of the validation split, and of the train split, of one teacher."""
    label = {"data_dir": parts / "data", "teacher": parts / "counts", "top_k": 4}
    for split in ("validation", "train"):
        run_recipe("label_with_teacher", **label, output_dir=parts / f"{split}_of_counts", split=split)


@pytest.fixture
def tuned(run_recipe, parts, tmp_path):
    """Runs tune_ensemble.py on some members, and sets the weights in its folder by hand."""

    def run(members, weights, **changes):
        settings = {"data_dir": parts / "data", "grid": [1], "max_rounds": 1, "validation_users": 5}
        folder = tmp_path / "ensemble"
        run_recipe("tune_ensemble", **settings, members=members, output_dir=folder, **changes)
        path = folder / "ensemble.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": weights}))
        return folder

    return run


def test_a_tuned_ensemble_teaches_with_its_weights(distill, parts, tuned, tmp_path):
    shutil.copytree(parts / "teacher", tmp_path / "sasrec")
    encoder = {"title_encoder": parts / "encoder"}
    folder = tuned([tmp_path / "sasrec", parts / "counts", "titles"], [1, 0, 3], teacher_temperature=2, **encoder)
    run = distill(ensemble=folder, **encoder, **ENSEMBLE)
    teacher = run.trainer._ensemble
    assert (teacher.weights, teacher.temperature) == ((1.0, 3.0), 2.0)
    assert run.record["metrics"]["the ensemble"] == {"weights": [1, 3], "temperature": 2.0}
    with pytest.raises(
        ValueError, match=r"title_encoder is '.*MiniLM.* was tuned with '.*encoder'.*pass --title_encoder"
    ):
        distill(ensemble=folder, output_dir=tmp_path / "refused", **ENSEMBLE)
    shutil.rmtree(tmp_path / "sasrec")
    shutil.copytree(run.output_dir, tmp_path / "sasrec")
    with pytest.raises(ValueError, match=r"tuned with a teacher .*sasrec that had the fingerprint .*, and has .* now"):
        distill(ensemble=folder, output_dir=tmp_path / "refused", **encoder, **ENSEMBLE)
    assert not (tmp_path / "refused" / "run.json").exists()


def test_labels_of_the_train_split_stand_in_for_those_that_an_ensemble_was_tuned_with(
    distill, parts, tuned, validation_labels, tmp_path
):
    folder = tuned([parts / "teacher", parts / "validation_of_counts"], [1, 0.5])
    settings = {"ensemble": folder, "windows": "last", "labelled_positions": "last"}
    run = distill(**ENSEMBLE | settings, teacher_labels=parts / "train_of_counts")
    assert run.trainer._ensemble.labels[0].folder == parts / "train_of_counts"
    refused = {"output_dir": tmp_path / "refused"}
    with pytest.raises(ValueError, match="which are labels of the validation split: expected the same teacher's"):
        distill(**ENSEMBLE | settings | refused)
    with pytest.raises(
        ValueError, match=r"tuned with a teacher .*/labels that had the teacher_fingerprint .*, and has"
    ):
        distill(**ENSEMBLE | settings | refused, teacher_labels=parts / "labels")
    with pytest.raises(ValueError, match="are about the validation split: expected labels of the train split"):
        distill(**ENSEMBLE | settings | refused, teacher_labels=parts / "validation_of_counts")
    without = tuned([parts / "teacher", parts / "counts"], [1, 0.5])
    with pytest.raises(ValueError, match="has no labels among its members: leave it out"):
        distill(**ENSEMBLE | settings | refused | {"ensemble": without}, teacher_labels=parts / "train_of_counts")


# --- other students and item embeddings ---


@pytest.mark.parametrize(
    "settings", [{"embedding_use": "input"}, {"embedding_use": "input_and_head"}, {"initial_items": "teacher"}]
)
def test_item_embeddings_leave_nothing_of_their_size(distill, parts, settings):
    run = distill(teacher_labels=parts / "table_labels", embedding_weight=0.5, windows="last", **settings)
    assert load_recommender(run.output_dir).config.teacher_embedding_size is None
    assert not any(EMBEDDING_SIZE in value.shape for value in run.weights.values())


@pytest.mark.parametrize("student_type", ["gru4rec", "caser"])
def test_other_students_learn_in_the_same_way(distill, parts, student_type, caplog):
    settings = {"student_type": student_type, "student_settings": '{"hidden_size": 8, "max_length": 8}'}
    run = distill(teacher_labels=parts / "labels", labelled_positions="last", windows="last", **settings)
    assert load_recommender(run.output_dir).config.model_type == student_type
    unused = "hidden_size, max_length, num_hidden_layers, num_attention_heads"
    assert f"{unused} shape a SASRec from scratch and are not used here" in caplog.text


def test_early_stopping_keeps_the_best_epoch_and_folds_it(distill, parts):
    """Nothing is learnt, so that the first epoch stays the best; it is loaded again before embeddings are folded."""
    settings = {"early_stopping_patience": 2, "learning_rate": 0.0, "num_train_epochs": 9, "windows": "last"}
    run = distill(teacher_labels=parts / "table_labels", embedding_use="input", save_total_limit=9, **settings)
    first = min(map(checkpoint_step, run.output_dir.glob("checkpoint-*")))
    assert run.state.epoch == 3 and run.state.best_global_step == first
    assert load_recommender(run.output_dir).config.teacher_embedding_size is None


def test_a_trained_student_starts_from_its_weights(distill, parts, tmp_path):
    first = distill(teacher_labels=parts / "labels", distilled_positions="all")
    settings = {"student": first.output_dir, "learning_rate": 0.0, "output_dir": tmp_path / "second"}
    second = distill(teacher_labels=parts / "labels", distilled_positions="all", **settings)
    for name, value in first.weights.items():
        torch.testing.assert_close(second.weights[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no teacher is given: expected teacher_labels"),
        ({"teacher_labels": "{parts}/labels", "teacher": "{parts}/teacher"}, "expected either teacher_labels"),
        ({"ensemble": "{parts}", "teacher": "{parts}/teacher"}, "teacher and ensemble are given: expected either"),
        (
            {"ensemble": "{parts}", "teacher_labels": "{parts}/labels", "labels_teacher": "{parts}/teacher"},
            "with an ensemble, which knows the teacher of its labels",
        ),
        ({"ensemble": "{parts}"}, "ensemble.json does not exist: expected a folder that"),
        (
            {"ensemble": "{parts}", "teacher_weights": 2},
            "teacher_weights is .2.0. without teacher, and the ensemble has",
        ),
        (
            {"teacher_labels": "{parts}/labels", "teacher_temperature": 2},
            "teacher_temperature is 2.0 without teacher: ",
        ),
        ({"teacher": "{parts}/teacher", "title_decay": 0.2}, "title_decay is 0.2 without the teacher titles: leave it"),
        (
            {"teacher": ["{parts}/teacher", "titles"], "teacher_weights": [1, -1]},
            "the weight of titles is -1.0: expected",
        ),
        ({"teacher": ["{parts}/teacher", "titles"], "teacher_weights": 1}, "there are 1 weights .* for the 2 teachers"),
        ({"teacher": ["{parts}/teacher", "titles"], "teacher_weights": [0, 0]}, "all weights are 0"),
        ({"teacher": ["titles", "titles"]}, "expected different teachers"),
        ({"teacher": ["{parts}/teacher", "title"]}, "the teacher 'title' cannot be loaded: .* or the word titles"),
        ({"teacher": "title"}, "the teacher 'title' cannot be loaded: expected the folder"),
        ({"teacher": "titles", "teacher_temperature": 0}, "teacher_temperature is 0.0: expected a finite number"),
        ({"teacher": "titles", "title_decay": -1}, "title_decay is -1.0: expected a number from 0 to 1"),
        ({"teacher": "titles", "title_encoder": "{parts}/data"}, "has no config.json"),
        ({"title_neighbours": 1, "title_encoder": "{parts}/data"}, "has no config.json"),
        ({"teacher": "{parts}/teacher", "embedding_use": "input"}, "without teacher_labels, which have the embeddings"),
        ({"teacher": "{parts}/teacher", "labels_teacher": "{parts}/teacher"}, "without teacher_labels, whose teacher"),
        (
            {"teacher_labels": "{parts}/labels", "labels_teacher": "{parts}/scores.safetensors"},
            "the teacher of the labels in .* has the fingerprint",
        ),
        (
            {"teacher_labels": "{parts}/labels", "labels_teacher": "nowhere"},
            "labels_teacher is nowhere: expected the teacher that .*/labels was made with",
        ),
        ({"teacher_labels": "{parts}/labels", "embedding_use": "input"}, "has no item embeddings"),
        ({"teacher_labels": "{parts}/labels", "student_settings": "{{}}"}, "student_settings are for"),
        ({"teacher_labels": "{parts}/labels", "student_type": "bert"}, "invalid choice: 'bert'"),
        (
            {
                "teacher_labels": "{parts}/labels",
                "student_type": "gru4rec",
                "student_settings": '{{"num_heads": 2}}',
            },
            "student_settings name num_heads: expected settings of GRU4RecConfig",
        ),
        ({"teacher_labels": "{parts}/labels", "student": "{parts}/popularity"}, "expected a SASRec, GRU4Rec or Caser"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_run_is_on_record(distill, parts, tmp_path, settings, message):
    def filled(value):
        if isinstance(value, list):
            return [filled(each) for each in value]
        return value.format(parts=parts) if isinstance(value, str) else value

    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distill(**{name: filled(value) for name, value in settings.items()})
    assert not (tmp_path / "student" / "run.json").exists()


def test_a_teacher_or_student_of_other_data_is_refused(distill, parts, tmp_path):
    other = cyclic_sequences(num_users=40, num_items=31, seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="teacher knows 30 items and the data set has 31"):
        distill(teacher=parts / "teacher", data_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="counts knows 30 items and the data set has 31"):
        distill(teacher=["titles", parts / "counts"], data_dir=tmp_path / "other")
    known_recommender(other).save_pretrained(tmp_path / "other_teacher")
    settings = {"teacher": tmp_path / "other_teacher", "data_dir": tmp_path / "other"}
    with pytest.raises(ValueError, match=r"parts\d/teacher knows 30 items and the data set has 31"):
        distill(**settings, student=parts / "teacher")


def test_labels_of_other_data_are_refused(distill, parts, tmp_path):
    other = cyclic_sequences(num_users=40, seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the data of the labels in .* has the fingerprint"):
        distill(teacher_labels=parts / "labels", data_dir=tmp_path / "other")
    assert SequenceDatasets.load(tmp_path / "other").fingerprint != SequenceDatasets.load(parts / "data").fingerprint


def test_the_teacher_of_labels_is_recognised_by_its_content_in_any_folder(distill, parts, tmp_path):
    shutil.copytree(parts / "teacher", tmp_path / "copy")
    run = distill(teacher_labels=parts / "labels", labels_teacher=tmp_path / "copy", num_train_epochs=1)
    assert run.record["status"] == "finished"


def test_teacher_of_labels_is_compared_in_the_dtype_in_which_it_answered(distill, tmp_path):
    parts = save_parts(tmp_path, num_users=12)
    save_ilora(parts, tmp_path / "ilora")
    sequences = SequenceDatasets.load(parts.data_dir)
    settings = {"data_dir": parts.data_dir, "labels_teacher": tmp_path / "ilora", "num_train_epochs": 1}
    settings |= {"windows": "last", "labelled_positions": "last"}
    teacher = load_teacher(str(tmp_path / "ilora"), len(sequences["train"]), NUM_ITEMS, dtype="bfloat16")
    save_labels(tmp_path / "labels", sequences, teacher, "last", dtype="bfloat16")
    distill(**settings, teacher_labels=tmp_path / "labels")
    save_labels(tmp_path / "of_float32", sequences, teacher, "last", dtype=None)
    with pytest.raises(ValueError, match=r"the teacher of the labels in .* has the fingerprint"):
        distill(**settings, teacher_labels=tmp_path / "of_float32", output_dir=tmp_path / "refused")
