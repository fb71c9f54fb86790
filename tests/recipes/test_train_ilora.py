"""recipes/train_ilora.py: a tiny Llama and a SASRec that knows the data, from the command line to a saved model."""

import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import Trainer

from hf_ilora import ILoraForRecommendation, SASRecConfig, SASRecForNextItem
from hf_ilora.models.ilora.candidate_order import preferred_order
from tests.models.ilora.ilora_fixtures import fresh_model
from tests.paths import PROJECT
from tests.tiny_ilora_parts import save_parts

SETTINGS = {
    "use_cpu": True,
    "disable_tqdm": True,
    "max_history": 4,
    "num_candidates": 5,
    "rank": 4,
    "num_experts": 2,
    "router_type": "linear",
    "learning_rate": 1.0e-2,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 2,
    "logging_steps": 1,
}
ITEM_HEAD = {"item_head": "residual", "item_loss_weight": 1.0}
HISTORIES = torch.tensor([[1, 2, 3, 4], [0, 0, 20, 22]])
CANDIDATES = torch.tensor([[5, 6, 20], [24, 3, 9]])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), num_users=32)


def arguments(parts, output_dir, **changes) -> list[str]:
    """The command line; a setting of None is left out."""
    settings = {**vars(parts), "output_dir": output_dir, **SETTINGS, **changes}
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# --- in this process ---


@pytest.fixture(scope="module")
def recipe():
    path = PROJECT / "recipes" / "train_ilora.py"
    spec = importlib.util.spec_from_file_location("train_ilora", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "train_ilora", module)
        spec.loader.exec_module(module)
        patch.setattr(module, "set_up_logging", lambda folder: None)
        yield module


@pytest.fixture(scope="module")
def train(recipe, parts):
    """Runs the recipe in this process and returns its Trainer."""

    def run(output_dir, **changes):
        trainers = []

        class KeptTrainer(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                trainers.append(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "Trainer", KeptTrainer)
            patch.setattr(sys, "argv", ["train_ilora.py", *arguments(parts, output_dir, **changes)])
            recipe.main()
        return trainers[0]

    return run


def losses(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def check_loads_and_scores(folder) -> ILoraForRecommendation:
    model = ILoraForRecommendation.from_pretrained(folder)
    scores = model.score_candidates(HISTORIES, CANDIDATES)
    assert scores.shape == (2, 3) and scores.isfinite().all() and (scores < 0).all()
    return model


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """A run with the settings above."""
    folder = tmp_path_factory.mktemp("plain")
    return train(folder), folder


def test_the_saved_model_is_the_trained_one(plain, parts):
    trainer, folder = plain
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert losses(trainer, "eval_loss")[1] < losses(trainer, "eval_loss")[0]
    loaded = check_loads_and_scores(folder)
    expected = trainer.model.eval().score_candidates(HISTORIES, CANDIDATES)
    torch.testing.assert_close(loaded.score_candidates(HISTORIES, CANDIDATES), expected, rtol=1e-5, atol=1e-4)
    assert loaded.config.llm_name_or_path == str(parts.llm)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["data_fingerprint"]
    assert record["metrics"]["validation"]["eval_loss"] == pytest.approx(min(losses(trainer, "eval_loss")))


def test_optimizer_of_the_run_has_a_slower_router_and_a_lora_without_decay(plain):
    _, folder = plain
    (checkpoint,) = folder.glob("checkpoint-*")
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["initial_lr"] for group in groups] == [1.0e-2, 1.0e-2, pytest.approx(0.3e-2)]
    assert [group["weight_decay"] for group in groups] == [0.0, 1.0e-5, 1.0e-5]
    # two LoRA matrices for 7 layers of 2 blocks; projector (4) and plain placeholders; the linear router
    assert [len(group["params"]) for group in groups] == [28, 5, 1]


def test_learning_rate_warms_up_and_falls_along_a_cosine_to_its_floor(recipe, tmp_path):
    model = fresh_model(item_head="residual", item_loss_weight=1.0)
    settings = recipe.ILoraTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    trainer = Trainer(model, settings, optimizer_cls_and_kwargs=recipe.ilora_optimizer(model, settings, 0.3))
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    names = {parameter: name for name, parameter in model.named_parameters()}
    lora, others, router = (
        {names[parameter] for parameter in group["params"]} for group in trainer.optimizer.param_groups
    )
    assert all(name.startswith("llm.") and ".lora_" in name for name in lora)
    assert {name.split(".")[0] for name in others} == {"prompt_embedding", "item_head"}
    assert router == {"router.projection.weight"}
    assert lora | others | router == {name for name, value in model.named_parameters() if value.requires_grad}

    rates = []
    for _ in range(101):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    peak = 8.0e-4
    middle = 0.01 + 0.99 * (1 + math.cos(math.pi * (50 - 5) / 95)) / 2  # 5 of 100 steps warm up
    for step, share in {0: 0.0, 1: 0.2, 5: 1.0, 50: middle, 100: 0.01}.items():
        assert rates[step] == pytest.approx([peak * share, peak * share, 0.3 * peak * share]), step
    assert max(rate for rate, _, _ in rates) == pytest.approx(peak)


@pytest.mark.slow
def test_one_expert_is_plain_lora_without_a_router(train, tmp_path):
    trainer = train(tmp_path, num_experts=1)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert not losses(trainer, "expert_deviation")
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("router")]
    check_loads_and_scores(tmp_path)


@pytest.mark.slow
def test_both_losses_train_together(train, tmp_path):
    trainer = train(tmp_path, **ITEM_HEAD)
    assert losses(trainer, "eval_loss")[1] < losses(trainer, "eval_loss")[0]
    shown = trainer.data_collator([trainer.train_dataset[row] for row in range(32)])["shows_candidates"]
    assert 4 < shown.sum() < 28  # half of the prompts, by default
    kinds = [batch["shows_candidates"].tolist() for batch in trainer.get_eval_dataloader()]
    assert [shows for batch in kinds for shows in batch] == [True] * 32 + [False] * 32
    model = check_loads_and_scores(tmp_path)
    assert model.item_head.projection.weight.any()
    assert model.rank_items(HISTORIES, top_k=3)[0].shape == (2, 3)


@pytest.mark.slow
def test_the_candidate_loss_trains_the_ranking_of_titles(train, parts, tmp_path):
    trainer = train(tmp_path / "run", candidate_loss_weight=1.0, language_loss_weight=0.1, **ITEM_HEAD)
    assert losses(trainer)[-1] < losses(trainer)[0]
    loaded = check_loads_and_scores(tmp_path / "run")
    assert loaded.config.candidate_loss_weight == 1.0


def test_item_head_alone_starts_from_the_recommender_and_improves_on_it(train, parts, tmp_path):
    trainer = train(tmp_path, **ITEM_HEAD, language_loss_weight=0.0, num_train_epochs=8, learning_rate=5.0e-2)
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    batches = list(trainer.get_eval_dataloader())
    assert not any(batch["shows_candidates"].any() for batch in batches)
    total = sum(
        cross_entropy(recommender.next_item_scores(batch["histories"]), batch["labels"], reduction="sum")
        for batch in batches
    )
    untrained = total.item() / 32
    assert losses(trainer)[0] == pytest.approx(untrained, rel=0.3)  # other rows of the same users
    assert trainer.evaluate()["eval_loss"] < 0.99 * untrained
    model = check_loads_and_scores(tmp_path)
    assert model.rank_items(HISTORIES, top_k=3)[0].shape == (2, 3)


@pytest.mark.slow
def test_plain_placeholders_are_trained_by_the_curriculum_only(train, plain, tmp_path):
    def change(trainer, first):
        name = "prompt_embedding.plain"
        return (trainer.model.state_dict()[name] - load_file(first / "model.safetensors")[name]).abs().max()

    still = train(tmp_path / "still", learning_rate=0.0)
    assert change(plain[0], tmp_path / "still") < 1e-6
    trainer = train(tmp_path / "curriculum", curriculum_steps=3)
    assert change(trainer, tmp_path / "still") > 1e-3
    assert trainer.model.item_embedding_probability == 1.0 and still.model.item_embedding_probability == 1.0


@pytest.mark.slow
def test_candidates_stand_in_the_order_of_the_recommender(train, parts, tmp_path):
    trainer = train(tmp_path, candidate_order="recommender")
    rows = [trainer.train_dataset[row] for row in range(4)]
    batch = trainer.data_collator([row | {"draws": (0.0, 0.0)} for row in rows])
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    drawn = torch.tensor([row["candidates"].tolist() for row in rows])  # (4, 5)
    expected = preferred_order(recommender, batch["histories"], drawn)
    shown = [items[items > 0][-5:].tolist() for items in batch["placeholder_items"]]  # behind the history
    assert shown == expected.tolist() != drawn.tolist()
    assert check_loads_and_scores(tmp_path).config.candidate_order == "recommender"


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing_but_memory(train, plain, tmp_path):
    train(tmp_path / "whole", lora_dropout=0.0)
    train(tmp_path / "recomputed", lora_dropout=0.0, activation_checkpointing=True)
    whole, recomputed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "recomputed"))
    for name, expected in whole.items():
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-4, atol=1e-5)
    other = load_file(plain[1] / "model.safetensors")  # with dropout
    assert any((whole[name] - other[name]).abs().max() > 1e-3 for name in whole if name.endswith("lora_B"))


@pytest.mark.slow
def test_worker_processes_give_the_batches_of_the_main_process(train, tmp_path):
    settings = {"lora_dropout": 0.0, "candidate_order": "recommender", **ITEM_HEAD}
    here = train(tmp_path / "here", **settings)
    workers = train(tmp_path / "workers", **settings, dataloader_num_workers=1)
    assert losses(workers) == pytest.approx(losses(here), rel=1e-5)
    assert losses(workers, "eval_loss") == pytest.approx(losses(here, "eval_loss"), rel=1e-5)


@pytest.mark.slow
def test_training_stops_when_the_validation_loss_no_longer_falls(train, tmp_path):
    trainer = train(tmp_path, learning_rate=0.0, num_train_epochs=9, early_stopping_patience=2)
    assert trainer.state.epoch == 3
    check_loads_and_scores(tmp_path)


@pytest.mark.slow
def test_resumed_run_has_the_patience_that_was_left(train, tmp_path):
    settings = {"learning_rate": 0.0, "num_train_epochs": 9, "save_total_limit": 9}
    assert train(tmp_path / "whole", **settings).state.epoch == 4  # three evaluations without progress after the first
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "killed" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert train(tmp_path / "killed", **settings).state.epoch == 4


@pytest.mark.slow
def test_an_untrained_recommender_may_be_asked_for(train, tmp_path):
    train(tmp_path, recommender=None, untrained_recommender=True, num_llm_layers=1, router_type="conv")
    model = check_loads_and_scores(tmp_path)
    assert model.config.text_config.num_hidden_layers == 1


@pytest.mark.slow
def test_rows_that_are_prefixes_keep_their_last_target(train, tmp_path):
    parts = save_parts(tmp_path, num_users=40, protocol="temporal_users")
    trainer = train(tmp_path / "run", **vars(parts), num_train_epochs=1)
    assert trainer.train_dataset.target_kind == "last"
    check_loads_and_scores(tmp_path / "run")


# --- bad input ---

EARLY = [  # found before the language model is loaded
    ({"recommender": None}, "recommender is missing"),
    ({"untrained_recommender": True}, "both given"),
    ({"recommender": "no/such folder"}, "no/such folder"),
    ({"candidate_fraction": 1.5}, "expected a share in [0, 1]"),
    ({"learning_rte": 1e-3}, "did you mean --learning_rate"),
    ({"item_head": "residual"}, "expected a weight above 0"),
    ({"item_loss_weight": 1.0}, "without an item head"),
    ({"num_experts": 3}, "rank 4 is not divisible by num_experts 3"),
    ({"router_type": "dense"}, "router_type is 'dense'"),
    ({"llm_dtype": "int8"}, "llm_dtype is 'int8'"),
    ({"num_candidates": 1}, "num_candidates is 1"),
    ({"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}, "early_stopping_patience 0"),
    ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "dataloader_persistent_workers"),
    ({"data_dir": "nowhere"}, "nowhere"),
    ({"prompt_file": "nowhere.txt"}, "nowhere.txt"),
]
LATE = [
    ({"target_modules": ["q_proj", "query"]}, "target_modules query match nothing"),
    ({"llm_revision": "main"}, "has no revision 'main'"),
    ({"num_llm_layers": 3}, "cannot keep 3 layers"),
    ({"num_candidates": 40}, "lower num_candidates"),
]


def check_refused(train, output_dir, message, **changes):
    with pytest.raises((ValueError, OSError, StrictDataclassClassValidationError)) as raised:
        train(output_dir, **changes)
    assert message in str(raised.value)
    assert not list(output_dir.glob("**/*.safetensors")) and not (output_dir / "run.json").exists()


@pytest.mark.parametrize(("changes", "message"), EARLY, ids=[message for _, message in EARLY])
def test_settings_that_cannot_work_are_refused_before_the_language_model_is_loaded(
    recipe, train, monkeypatch, tmp_path, changes, message
):
    monkeypatch.setattr(recipe, "load_language_model", None)
    check_refused(train, tmp_path / "run", message, **changes)


@pytest.mark.parametrize(("changes", "message"), LATE, ids=[message for _, message in LATE])
def test_settings_that_do_not_fit_the_parts_are_refused_before_the_run_is_on_record(train, tmp_path, changes, message):
    check_refused(train, tmp_path / "run", message, **changes)


def test_output_dir_is_required(recipe, parts, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ilora.py", *arguments(parts, None)])
    with pytest.raises(ValueError, match="output_dir is missing"):
        recipe.main()


def test_unknown_keys_of_a_configuration_file_are_refused(recipe, parts, monkeypatch, tmp_path):
    (tmp_path / "ilora.yaml").write_text("lerning_rate: 1.0e-3\n")
    words = ["train_ilora.py", str(tmp_path / "ilora.yaml"), *arguments(parts, tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="did you mean learning_rate"):
        recipe.main()


@pytest.mark.parametrize(
    ("template", "share", "message"),
    [
        ("After {history}:", 0.5, "no template is with {candidates}"),
        ("{history}; one of {candidates}:", 0.5, "no template is without {candidates}"),
        ("After that:", 0.0, "{history} 0 times"),
    ],
)
def test_templates_that_lack_what_the_share_asks_for_are_refused(train, tmp_path, template, share, message):
    (tmp_path / "prompts.txt").write_text(template)
    changes = {"prompt_file": tmp_path / "prompts.txt", "candidate_fraction": share}
    check_refused(train, tmp_path / "run", message, **changes)


def test_recommender_of_another_catalogue_is_refused(recipe, train, monkeypatch, tmp_path):
    SASRecForNextItem(SASRecConfig(num_items=31, hidden_size=16)).save_pretrained(tmp_path / "sasrec")
    monkeypatch.setattr(recipe, "load_language_model", None)
    message = "the recommender knows 31 items and the catalogue has 30"
    check_refused(train, tmp_path / "run", message, recommender=tmp_path / "sasrec")


def test_language_model_without_a_tokenizer_is_refused(train, parts, tmp_path):
    (tmp_path / "llm").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "llm" / name).write_bytes((parts.llm / name).read_bytes())
    check_refused(train, tmp_path / "run", "has no tokenizer", llm=tmp_path / "llm")


def test_a_refused_run_leaves_its_folder_free_and_a_finished_one_keeps_it(train, tmp_path):
    check_refused(train, tmp_path, "match nothing", target_modules=["query"])
    train(tmp_path, num_train_epochs=1, max_steps=1)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="contains a finished run: choose another output_dir"):
        train(tmp_path, learning_rate=1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# --- as a user runs it ---


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads add up in another order each time, and the last digits with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def command(parts, output_dir, **changes) -> list[str]:
    return [sys.executable, str(PROJECT / "recipes" / "train_ilora.py"), *arguments(parts, output_dir, **changes)]


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """A real run, long enough to be killed."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = subprocess.run(command(parts, output_dir, **LONG), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output_dir, result.stderr


LONG = ITEM_HEAD | {"num_train_epochs": 12, "curriculum_steps": 12, "early_stopping_patience": 0}


@pytest.mark.slow
def test_log_tells_the_run_without_warnings(finished):
    output_dir, console = finished
    log = (output_dir / "run.log").read_text()
    # The file system's clock is not the recipe's concern.
    warnings = [line for line in log.splitlines() if " WARNING " in line and "mtime may not be reliable" not in line]
    assert not warnings and "Warning" not in console
    assert "step 24 of 24, 0 s left: eval_loss" in log and "expert_0_gate" in log
    assert "parameters, of which" in log
    check_loads_and_scores(output_dir)


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_result(finished, parts, tmp_path):
    output_dir = tmp_path / "killed"
    kills = 0
    for steps_before_kill in (4, 12):  # 32 users / 16 = 2 steps per epoch
        process = subprocess.Popen(
            command(parts, output_dir, **LONG), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            steps = [int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")]
            if steps and max(steps) >= steps_before_kill:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        process.wait()
    assert kills == 2, "the run ended before it could be killed: train longer"
    assert json.loads((output_dir / "run.json").read_text())["status"] == "running"
    result = subprocess.run(command(parts, output_dir, **LONG), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stderr
    metrics, expected_metrics = (
        json.loads((folder / "run.json").read_text())["metrics"]["validation"] for folder in (output_dir, finished[0])
    )
    assert metrics["eval_loss"] == expected_metrics["eval_loss"]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished[0], output_dir))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
