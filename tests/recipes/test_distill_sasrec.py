"""recipes/distill_sasrec.py from labels or an online teacher to a saved student, in this process."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import PopularityConfig, PopularityForNextItem, SequenceDatasets
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import ScoreTableTeacher, load_teacher
from hf_ilora.models.loading import load_recommender
from tests.recipe_runs import RecipeRun, checkpoint_step, newest_checkpoint
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender, save_ilora, save_parts

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


def save_labels(folder, sequences, teacher, labelled_positions, **changes):
    requests = LabelRequests.of_split(sequences["train"], labelled_positions)
    settings = {
        "data_fingerprint": sequences.fingerprint, "teacher_fingerprint": teacher.fingerprint, "num_items": NUM_ITEMS,
        "top_k": 4, "shard_rows": 64, "labelled_positions": labelled_positions,
    }  # fmt: skip
    labels = LabelFolder(folder, settings | changes)
    labels.start(lambda: requests)
    label_shards(
        labels, labels.requests(requests), teacher, exclude_seen=False, batch_size=16, process=0, num_processes=1
    )
    labels.finish(labels.requests(requests), teacher)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A data set, a SASRec that knows it, its labels for every position, and a table's labels with embeddings."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "teacher")
    histories = sequences["train"]["history"]
    PopularityForNextItem.fit(histories, PopularityConfig(num_items=NUM_ITEMS)).save_pretrained(folder / "popularity")
    rows = len(sequences["train"])
    teacher = load_teacher(str(folder / "teacher"), rows, NUM_ITEMS)
    save_labels(folder / "labels", sequences, teacher, "all")
    save_file({"scores": torch.randn(rows, NUM_ITEMS + 1)}, folder / "scores.safetensors")
    table = EmbeddingTeacher(folder / "scores.safetensors", rows, NUM_ITEMS)
    save_labels(folder / "table_labels", sequences, table, "last")
    return folder


@pytest.fixture
def distill(run_recipe, parts, tmp_path):
    """Runs the recipe in this process with a data set and an output folder."""

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


def test_a_resumed_run_logs_and_learns_what_an_undisturbed_one_does(distill, parts, tmp_path):
    settings = {"teacher_labels": parts / "labels", "distilled_positions": "all", "save_total_limit": 5}
    whole = distill(**settings, output_dir=tmp_path / "whole")
    killed = tmp_path / "killed"
    shutil.copytree(whole.output_dir, killed)
    shutil.rmtree(newest_checkpoint(killed))
    record = whole.record | {"status": "running"}
    for name in ("fingerprint", "embeddings_fingerprint"):
        other = record | {"metrics": {"teacher_labels": record["metrics"]["teacher_labels"] | {name: "other"}}}
        (killed / "run.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"was trained on teacher_labels with the {name} other"):
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


def test_a_trained_student_goes_on_from_its_weights(distill, parts, tmp_path):
    first = distill(teacher_labels=parts / "labels", distilled_positions="all")
    settings = {"student": first.output_dir, "learning_rate": 0.0, "output_dir": tmp_path / "second"}
    second = distill(teacher_labels=parts / "labels", distilled_positions="all", **settings)
    for name, value in first.weights.items():
        torch.testing.assert_close(second.weights[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected either teacher_labels"),
        ({"teacher_labels": "{parts}/labels", "teacher": "{parts}/teacher"}, "expected either teacher_labels"),
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
            "student_settings name num_heads: expected GRU4RecConfig",
        ),
        ({"teacher_labels": "{parts}/labels", "student": "{parts}/popularity"}, "expected a SASRec, GRU4Rec or Caser"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_run_is_on_record(distill, parts, tmp_path, settings, message):
    filled = {name: value.format(parts=parts) for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        distill(**filled)
    assert not (tmp_path / "student" / "run.json").exists()


def test_a_teacher_or_student_of_other_data_is_refused(distill, parts, tmp_path):
    other = cyclic_sequences(num_users=40, num_items=31, seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match="the teacher knows 30 items and the data set has 31"):
        distill(teacher=parts / "teacher", data_dir=tmp_path / "other")
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


def test_labels_of_the_teacher_that_is_expected_are_taken(distill, parts, tmp_path):
    """By what it is, and not by where it lies."""
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
