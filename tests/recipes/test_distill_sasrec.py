"""recipes/distill_sasrec.py from labels or an online teacher to a saved student, in this process."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import SequenceDatasets
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import ScoreTableTeacher, load_teacher
from hf_ilora.models.loading import load_recommender
from tests.paths import RECIPES
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
    rows = len(sequences["train"])
    teacher = load_teacher(str(folder / "teacher"), rows, NUM_ITEMS)
    save_labels(folder / "labels", sequences, teacher, "all")
    save_file({"scores": torch.randn(rows, NUM_ITEMS + 1)}, folder / "scores.safetensors")
    table = EmbeddingTeacher(folder / "scores.safetensors", rows, NUM_ITEMS)
    save_labels(folder / "table_labels", sequences, table, "last")
    return folder


@pytest.fixture
def distill(parts, tmp_path, monkeypatch):
    """Runs the recipe with a data set and an output folder; returns the folder."""
    monkeypatch.syspath_prepend(str(RECIPES))  # it imports train_sasrec
    spec = importlib.util.spec_from_file_location("recipe_distill_sasrec", RECIPES / "distill_sasrec.py")
    recipe = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, recipe)
    spec.loader.exec_module(recipe)
    monkeypatch.setattr(recipe, "set_up_logging", lambda output_dir: None)  # for a process of its own

    def run(**changes) -> Path:
        settings = SETTINGS | {"data_dir": parts / "data", "output_dir": tmp_path / "student"} | changes
        words = []
        for name, value in settings.items():
            if value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        monkeypatch.setattr(sys, "argv", ["distill_sasrec.py", *words])
        recipe.main()
        return settings["output_dir"]

    return run


def logged(folder, name) -> list[float]:
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/trainer_state.json")]
    state = max(states, key=lambda state: state["global_step"])
    return [entry[name] for entry in state["log_history"] if name in entry]


def test_a_student_learns_from_labels_and_is_saved_as_a_plain_sasrec(distill, parts):
    folder = distill(teacher_labels=parts / "labels", distilled_positions="all")
    ranking = logged(folder, "ranking_loss")
    assert ranking[-1] < ranking[0] and len(logged(folder, "base_loss")) == len(ranking)
    model = load_recommender(folder)
    assert model.config.model_type == "sasrec" and model.catalogue is not None
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and "masked/ndcg@10" in record["metrics"]["test"]


def test_a_resumed_run_logs_and_learns_what_an_undisturbed_one_does(distill, parts, tmp_path):
    settings = {"teacher_labels": parts / "labels", "distilled_positions": "all", "save_total_limit": 5}
    whole = distill(**settings, output_dir=tmp_path / "whole")
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    last = max(killed.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    shutil.rmtree(last)
    record = json.loads((killed / "run.json").read_text()) | {"status": "running"}
    for name in ("fingerprint", "embeddings_fingerprint"):
        other = record | {"metrics": {"teacher_labels": record["metrics"]["teacher_labels"] | {name: "other"}}}
        (killed / "run.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"was trained on labels with the {name} other"):
            distill(**settings, output_dir=killed)
    (killed / "run.json").write_text(json.dumps(record))
    distill(**settings, output_dir=killed)
    assert logged(killed, "ranking_loss") == pytest.approx(logged(whole, "ranking_loss"), rel=1e-5)
    histories = torch.tensor([[1, 2, 3]])
    scores = [load_recommender(folder).next_item_scores(histories) for folder in (whole, killed)]
    torch.testing.assert_close(*scores)


def test_an_online_teacher_needs_no_labels(distill, parts):
    folder = distill(teacher=parts / "teacher", kl_weight=1.0, policy="kl_divergence", policy_threshold=0.01)
    divergence = logged(folder, "kl_loss")
    assert divergence[-1] < divergence[0]


@pytest.mark.parametrize("use", ["input", "input_and_head", "initial"])
def test_item_embeddings_leave_nothing_of_their_size(distill, parts, use):
    settings = {"teacher_labels": parts / "table_labels", "embedding_use": use, "embedding_weight": 0.5}
    settings["windows"] = "last"
    model = load_recommender(distill(**settings))
    assert model.config.teacher_embedding_size is None
    assert not any(EMBEDDING_SIZE in value.shape for value in model.state_dict().values())


@pytest.mark.parametrize("student_type", ["gru4rec", "caser"])
def test_other_students_learn_in_the_same_way(distill, parts, student_type, caplog):
    settings = {"student_type": student_type, "student_settings": '{"hidden_size": 8, "max_length": 8}'}
    folder = distill(teacher_labels=parts / "labels", targets="last", windows="last", **settings)
    assert load_recommender(folder).config.model_type == student_type
    unused = "hidden_size, max_length, num_hidden_layers, num_attention_heads"
    assert f"{unused} shape a SASRec from scratch and are not used here" in caplog.text


def test_early_stopping_keeps_the_best_epoch_and_folds_it(distill, parts):
    """Nothing is learnt, so that the first epoch stays the best; it is loaded again before embeddings are folded."""
    settings = {"early_stopping_patience": 2, "learning_rate": 0.0, "num_train_epochs": 9, "windows": "last"}
    folder = distill(teacher_labels=parts / "table_labels", embedding_use="input", save_total_limit=9, **settings)
    states = [json.loads(path.read_text()) for path in folder.glob("checkpoint-*/trainer_state.json")]
    last = max(states, key=lambda state: state["global_step"])
    assert last["epoch"] == 3 and last["best_global_step"] == min(state["global_step"] for state in states)
    assert load_recommender(folder).config.teacher_embedding_size is None


def test_a_trained_student_goes_on_from_its_weights(distill, parts, tmp_path):
    first = distill(teacher_labels=parts / "labels")
    settings = {
        "teacher_labels": parts / "labels",
        "student": first,
        "learning_rate": 0.0,
        "output_dir": tmp_path / "b",
    }
    second = distill(**settings)
    histories = torch.tensor([[1, 2, 3]])
    before, after = (load_recommender(folder).next_item_scores(histories) for folder in (first, second))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected either teacher_labels"),
        ({"teacher_labels": "{parts}/labels", "teacher": "{parts}/teacher"}, "expected either teacher_labels"),
        ({"teacher": "{parts}/teacher", "embedding_use": "input"}, "without teacher_labels"),
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
        ({"teacher_labels": "{parts}/table_labels"}, "which random windows hardly ever meet"),
        ({"teacher_labels": "{parts}/labels", "student_settings": "{{}}"}, "student_settings are for"),
        ({"teacher_labels": "{parts}/labels", "student_type": "bert"}, "student_type is 'bert': expected one of"),
        ({"teacher_labels": "{parts}/labels", "train_fraction": [0, 0.5]}, "labels go by rows of the split"),
        (
            {"teacher_labels": "{parts}/labels", "student_type": "gru4rec", "initial_items": "cooccurrence"},
            "expected random for a student",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_run_is_on_record(distill, parts, tmp_path, settings, message):
    for name, value in settings.items():
        settings[name] = value.format(parts=parts) if isinstance(value, str) else value
    with pytest.raises(ValueError, match=message):
        distill(**settings)
    assert not (tmp_path / "student" / "run.json").exists()


def test_a_student_of_other_data_is_refused(distill, parts, tmp_path):
    cyclic_sequences(num_users=40, num_items=31, seed=1).save(tmp_path / "other")
    with pytest.raises(ValueError, match="knows 30 items and the data set has 31"):
        distill(teacher=parts / "teacher", data_dir=tmp_path / "other")
    first = distill(teacher_labels=parts / "labels")
    other = cyclic_sequences(num_users=40, num_items=31, seed=1)
    teacher = known_recommender(other)
    teacher.save_pretrained(tmp_path / "other_teacher")
    settings = {"teacher": tmp_path / "other_teacher", "data_dir": tmp_path / "other", "output_dir": tmp_path / "b"}
    with pytest.raises(ValueError, match="knows 30 items and the data set has 31"):
        distill(**settings, student=first)


def test_labels_of_other_data_are_refused(distill, parts, tmp_path):
    other = cyclic_sequences(num_users=40, seed=1)
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the data of the labels in .* has the fingerprint"):
        distill(teacher_labels=parts / "labels", data_dir=tmp_path / "other")
    assert SequenceDatasets.load(tmp_path / "other").fingerprint != SequenceDatasets.load(parts / "data").fingerprint


def test_labels_of_the_teacher_that_is_expected_are_taken(distill, parts, tmp_path):
    """By what it is, and not by where it lies."""
    shutil.copytree(parts / "teacher", tmp_path / "copy")
    folder = distill(teacher_labels=parts / "labels", labels_teacher=tmp_path / "copy", num_train_epochs=1)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_teacher_of_labels_is_compared_in_the_dtype_in_which_it_answered(distill, tmp_path):
    parts = save_parts(tmp_path, num_users=12)
    save_ilora(parts, tmp_path / "ilora")
    sequences = SequenceDatasets.load(parts.data_dir)
    settings = {"data_dir": parts.data_dir, "labels_teacher": tmp_path / "ilora", "num_train_epochs": 1}
    settings |= {"windows": "last", "targets": "last"}
    teacher = load_teacher(str(tmp_path / "ilora"), len(sequences["train"]), NUM_ITEMS, dtype="bfloat16")
    save_labels(tmp_path / "labels", sequences, teacher, "last", dtype="bfloat16")
    distill(**settings, teacher_labels=tmp_path / "labels")
    save_labels(tmp_path / "of_float32", sequences, teacher, "last", dtype=None)
    with pytest.raises(ValueError, match=r"the teacher of the labels in .* has the fingerprint"):
        distill(**settings, teacher_labels=tmp_path / "of_float32", output_dir=tmp_path / "refused")
