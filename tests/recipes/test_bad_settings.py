"""Settings that cannot work are refused before run.json is written, and do not block the corrected command."""

import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_ilora.distillation.teachers import load_teacher
from tests.saved_labels import save_labels
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender, save_ilora, save_parts

SMALL = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8, "num_train_epochs": 1,
    "use_cpu": True, "disable_tqdm": True, "initial_items": "random",
}  # fmt: skip
WITHOUT_BEST = {"load_best_model_at_end": False, "early_stopping_patience": 0}

TRAINING = [
    ({"seed": -1}, "seed is -1: expected a whole number from 0 to 4294967295"),
    ({"data_seed": 2**32}, "data_seed is 4294967296: expected a whole number"),
    ({"metric_for_best_model": "ndcg"}, "metric_for_best_model is 'ndcg': expected one of loss"),
    ({"metric_for_best_model": "ndcg"} | WITHOUT_BEST, "metric_for_best_model is 'ndcg': expected one of loss"),
    ({"learning_rate": "nan"}, "learning_rate is nan: expected at least 0, and finite"),
    ({"weight_decay": -1}, "weight_decay is -1.0: expected"),
    ({"num_train_epochs": 0}, "num_train_epochs is 0.0: expected a finite number above 0"),
    ({"max_steps": 0}, "max_steps is 0: expected at least 1, or -1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: expected"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: expected"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1: expected"),
    ({"adam_beta2": 1}, r"adam_beta2 is 1.0: expected a number in \[0, 1\)"),
    ({"save_strategy": "steps", "save_steps": 0} | WITHOUT_BEST, "save_steps is 0.0 with save_strategy 'steps'"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1: expected 0"),
    ({"optim": "adamw_bnb_8bit"}, "optim .*adamw_bnb_8bit.* cannot be used: "),
    ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"pow": 1}'}, "'pow': 1}, cannot be used: "),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A data set with a SASRec, labels and an iLoRA."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "sasrec")
    teacher = load_teacher(str(folder / "sasrec"), len(sequences["train"]), sequences.num_items)
    save_labels(folder / "labels", sequences, teacher, "all")
    save_ilora(save_parts(folder / "parts", num_users=40), folder / "ilora")
    return folder


@pytest.fixture
def refused(run_recipe, parts, tmp_path):
    """Checks that a recipe refuses its settings with a message, and writes nothing."""

    def run(name, message, settings):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            run_recipe(name, output_dir=tmp_path / "out", **{"data_dir": parts / "data"} | settings)
        assert not (tmp_path / "out").exists()

    return run


@pytest.mark.parametrize(("settings", "message"), TRAINING)
def test_bad_settings_of_a_training_are_refused(refused, settings, message):
    refused("train_sasrec", message, SMALL | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "top_k is 5 and the labels in .* have 4 items each: expected at most 4"),
        ({"initial_items": "teacher"}, "has no item embeddings"),
        ({"kl_temperature": 0}, "kl_temperature is 0.0: expected a finite number above 0"),
        ({"student_type": "caser", "student_settings": "{"}, "student_settings is '{': expected JSON such as"),
        ({"student_type": "caser", "student_settings": "[1]"}, "expected names with values in braces"),
        ({"student_type": "caser", "windows": "all", "labelled_positions": "all"}, "Caser predicts the item after"),
    ],
)
def test_bad_settings_of_a_distillation_are_refused(refused, parts, settings, message):
    labels = {"teacher_labels": parts / "labels", "top_k": 4, "windows": "last"}
    refused("distill_sasrec", message, SMALL | labels | settings)


def test_bad_settings_of_a_distillation_by_an_online_teacher_are_refused(refused, parts):
    message = "top_k is 31: expected at most 30, the number of items that the teacher ranks"
    refused("distill_sasrec", message, SMALL | {"teacher": parts / "sasrec", "top_k": 31})


@pytest.mark.parametrize("settings", [{}, {"early_stopping_patience": 0, "load_best_model_at_end": False}])
def test_a_metric_that_an_ilora_does_not_compute_in_training_is_refused(refused, parts, settings):
    parts_of_ilora = {"recommender": parts / "parts" / "sasrec", "llm": parts / "parts" / "llm", "num_candidates": 5}
    settings |= parts_of_ilora | {"metric_for_best_model": "ndcg@10", "use_cpu": True}
    message = "metric_for_best_model is 'ndcg@10': expected one of loss"
    refused("train_ilora", message, settings | {"data_dir": parts / "parts" / "data"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 1000}, "k is 1000: expected at most 17, the 30 items of the catalogue minus the 13 that"),
        ({"seed": -1}, "seed is -1: expected a whole number"),
        ({"device": "evil"}, "device is 'evil': expected cpu, or one that torch finds here"),
        ({"latency_threads": 100000}, "latency_threads is 100000: expected at most"),
    ],
)
def test_bad_settings_of_an_evaluation_are_refused(refused, parts, settings, message):
    refused("evaluate_models", message, {"models": parts / "sasrec"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "evil"}, "invalid choice: 'evil' .choose from 'float32', 'bfloat16', 'float16'"),
        ({"seed": -1}, "seed is -1: expected a whole number"),
        ({"k": 31}, "k is 31: expected at most 30, the 30 items of the catalogue"),
    ],
)
def test_bad_settings_of_an_evaluation_of_ilora_are_refused(refused, parts, settings, message):
    refused("evaluate_ilora", message, {"models": parts / "ilora"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_gap": [5, -1]}, "max_gap is -1: expected at least 1"),
        ({"history_decay": ["nan"]}, "history_decay is nan: expected"),
        ({"max_rounds": 0}, "max_rounds is 0: expected at least 1"),
    ],
)
def test_bad_settings_of_counts_are_refused(refused, settings, message):
    refused("fit_counts", message, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_candidates": 1}, "num_candidates is 1, the target alone"),
        ({"min_user_interactions": 1}, "leave_one_out needs 3 or more"),
        ({"limit_data_rows": 0}, "limit_data_rows is 0: expected at least 1, or -1 for all"),
    ],
)
def test_bad_settings_of_a_data_set_and_foreign_folders_are_refused(run_recipe, tmp_path, settings, message):
    table = {"interactions": "nowhere.csv", "user_column": "user", "item_column": "item"}
    with pytest.raises(ValueError, match=message):
        run_recipe("prepare_data", output_dir=tmp_path / "out", **table | settings)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"out contains thesis.tex: expected a new folder"):
        run_recipe("prepare_data", output_dir=tmp_path / "out", **table)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("top_k", [31, 20])
def test_labels_that_the_catalogue_cannot_fill_are_refused_and_do_not_block_others(run_recipe, parts, tmp_path, top_k):
    settings = {"data_dir": parts / "data", "output_dir": tmp_path / "labels", "teacher": parts / "sasrec"}
    with pytest.raises(ValueError, match=f"top_k is {top_k}: expected at most (30|19), the 30 items of the catalogue"):
        run_recipe("label_with_teacher", **settings, top_k=top_k)
    assert not (tmp_path / "labels" / "run.json").exists()
    run_recipe("label_with_teacher", **settings, top_k=19)


def test_a_training_that_failed_before_a_checkpoint_does_not_block_the_corrected_command(run_recipe, parts, tmp_path):
    settings = SMALL | {"data_dir": parts / "data", "output_dir": tmp_path / "out", "max_steps": 1}
    with pytest.raises(ValueError, match="expected finite numbers"):
        run_recipe("train_sasrec", **settings, learning_rate=1e38, per_device_train_batch_size=4)
    run = run_recipe("train_sasrec", **settings)
    assert run.record["status"] == "finished" and run.record["earlier_runs"][0]["status"] == "failed"
