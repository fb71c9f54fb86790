"""recipes/distill_sasrec.py under `accelerate launch` with two real processes, against one."""

from pathlib import Path

import pytest
import torch

from tests.paths import RECIPES
from tests.recipe_runs import RecipeRun, recipe_words
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender
from tests.titles.encoder_folders import save_bert

DRAWS = Path(__file__).with_name("launched_draws.py")  # negatives that do not depend on the number of processes
# Without dropout two processes with half the batch must compute what one computes with the whole.
SETTINGS = {
    "hidden_size": 16, "max_length": 8, "hidden_dropout": 0, "attention_dropout": 0, "num_train_epochs": 4,
    "learning_rate": 5.0e-3, "optim": "adamw_torch", "early_stopping_patience": 0, "logging_strategy": "steps",
    "logging_steps": 1, "gradient_accumulation_steps": 2, "disable_tqdm": True,
}  # fmt: skip
KINDS = {
    "teacher": {"lam": 0, "kl_weight": 2, "kl_temperature": 2},
    "ensemble": {
        "lam": 0,
        "kl_weight": 2,
        "distilled_positions": "all",
        "title_neighbours": 0.2,
        "num_train_epochs": 2,
    },
    # So few labels that a process may meet none.
    "labels": {
        "top_k": 3,
        "num_distillation_negatives": 3,
        "distilled_positions": "all",
        "alpha": 0.1,
        "save_total_limit": 2,  # the checkpoint of the last step stays beside the best
    },
}


@pytest.fixture(scope="module")
def parts(run_recipe, tmp_path_factory):
    """A data set, a teacher, and sixty of its labels."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=228)  # 7 batches of 32 and 4, which leave the second process no row at last
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "teacher")
    save_bert(folder / "encoder")
    settings = {"data_dir": folder / "data", "teacher": folder / "teacher", "output_dir": folder / "labels"}
    run_recipe("label_with_teacher", **settings, labelled_positions="all", budget=60, top_k=3)
    return folder


@pytest.fixture(scope="module")
def run_of(launch, parts, tmp_path_factory):
    """The run of a launch configuration and a kind of teacher; each runs once."""
    runs = {}

    def run(config, kind) -> RecipeRun:
        if (config, kind) not in runs:
            output_dir = tmp_path_factory.mktemp("runs") / "run"
            settings = {"data_dir": parts / "data", "output_dir": output_dir, **SETTINGS, **KINDS[kind]}
            if kind == "ensemble":
                settings |= {"teacher": [parts / "teacher", "titles", parts / "labels"], "teacher_weights": [1, 3, 0.5]}
                settings["title_encoder"] = parts / "encoder"
            else:
                settings["teacher_labels" if kind == "labels" else "teacher"] = parts / kind
            settings["per_device_train_batch_size"] = 32 if config == "cpu.yaml" else 16
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HF_ILORA_CACHE", str(output_dir.parent / "cache"))
                program = [DRAWS, "distill_sasrec"] if kind == "labels" else [RECIPES / "distill_sasrec.py"]
                launch(config, *program, *recipe_words(**settings))
            runs[config, kind] = RecipeRun(output_dir)
        return runs[config, kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml"])
def test_two_processes_distil_what_one_distils(run_of, config):
    one, two = run_of("cpu.yaml", "teacher"), run_of(config, "teacher")
    assert (one.record["world_size"], two.record["world_size"]) == (1, 2)
    for name in ("loss", "base_loss", "kl_loss"):
        values = two.logged(name)
        assert len(values) == 16 and values[-1] < values[0]
        assert values == pytest.approx(one.logged(name), rel=1e-3), name
    weights = two.weights
    for name, value in one.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_ask_an_ensemble_at_every_position_as_one_does(run_of):
    one, two = run_of("cpu.yaml", "ensemble"), run_of("multi_cpu.yaml", "ensemble")
    for name in ("loss", "base_loss", "kl_loss", "title_neighbour_loss"):
        values = two.logged(name)
        assert len(values) == 8 and values == pytest.approx(one.logged(name), rel=1e-3), name
    weights = two.weights
    for name, value in one.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml", "fsdp2_cpu.yaml"])
def test_two_processes_learn_the_labels_that_one_learns(run_of, config):
    one, two = run_of("cpu.yaml", "labels"), run_of(config, "labels")
    for name in ("loss", "base_loss", "ranking_loss", "dro_loss"):
        values, wanted = two.logged(name), one.logged(name)
        assert len(values) == 16 and sum(value > 0 for value in wanted) > 8, name
        assert values == pytest.approx(wanted, rel=1e-3, abs=1e-5), name
    weights = two.weights
    for name, value in one.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
