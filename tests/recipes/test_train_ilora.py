"""recipes/train_ilora.py: a tiny Llama and a SASRec that knows the data, from the command line to a saved model."""

import json
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from hf_ilora import ILoraForRecommendation, SASRecConfig, SASRecForNextItem
from hf_ilora.models.ilora.candidate_order import preferred_order
from hf_ilora.training import ilora_parts
from tests.recipe_runs import RecipeRun
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


@pytest.fixture(scope="module")
def train(run_recipe, parts):
    """Runs the recipe in this process."""

    def run(output_dir, **changes) -> RecipeRun:
        return run_recipe("train_ilora", **{**vars(parts), "output_dir": output_dir, **SETTINGS, **changes})

    return run


def check_loads_and_scores(folder) -> ILoraForRecommendation:
    model = ILoraForRecommendation.from_pretrained(folder)
    scores = model.score_candidates(HISTORIES, CANDIDATES)
    assert scores.shape == (2, 3) and scores.isfinite().all() and (scores < 0).all()
    return model


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    """A run with the settings above."""
    return train(tmp_path_factory.mktemp("plain"))


def test_the_saved_model_is_the_trained_one(plain, parts):
    losses, eval_losses = plain.logged("loss"), plain.logged("eval_loss")
    assert losses[-1] < 0.9 * losses[0] and eval_losses[1] < eval_losses[0]
    loaded = check_loads_and_scores(plain.output_dir)
    expected = plain.trainer.model.eval().score_candidates(HISTORIES, CANDIDATES)
    torch.testing.assert_close(loaded.score_candidates(HISTORIES, CANDIDATES), expected, rtol=1e-5, atol=1e-4)
    assert loaded.config.llm_name_or_path == str(parts.llm)
    record = plain.record
    assert record["status"] == "finished" and record["data_fingerprint"]
    assert record["metrics"]["validation"]["eval_loss"] == pytest.approx(min(eval_losses))


def test_validation_may_be_on_some_users(train, tmp_path):
    run = train(tmp_path / "run", max_steps=1, validation_users=5)
    assert len(run.trainer.eval_dataset) == 5
    with pytest.raises(ValueError, match="validation_users is 33: expected at most 32, the users of the split"):
        train(tmp_path / "other", validation_users=33)


@pytest.mark.slow
def test_one_expert_is_plain_lora_without_a_router(train, tmp_path):
    run = train(tmp_path, num_experts=1)
    assert run.logged("loss")[-1] < 0.9 * run.logged("loss")[0]
    assert not run.logged("expert_deviation")
    assert not [name for name in run.weights if name.startswith("router")]
    check_loads_and_scores(tmp_path)


@pytest.mark.slow
def test_both_losses_train_together(train, tmp_path):
    run = train(tmp_path, **ITEM_HEAD)
    trainer, eval_losses = run.trainer, run.logged("eval_loss")
    assert eval_losses[1] < eval_losses[0]
    shown = trainer.data_collator([trainer.train_dataset[row] for row in range(32)])["shows_candidates"]
    assert 4 < shown.sum() < 28  # half of the prompts, by default
    kinds = [batch["shows_candidates"].tolist() for batch in trainer.get_eval_dataloader()]
    assert [shows for batch in kinds for shows in batch] == [True] * 32 + [False] * 32
    model = check_loads_and_scores(tmp_path)
    assert model.item_head.projection.weight.any()
    assert model.rank_items(HISTORIES, top_k=3)[0].shape == (2, 3)


@pytest.mark.slow
def test_the_candidate_loss_trains_the_ranking_of_titles(train, tmp_path):
    run = train(tmp_path, candidate_loss_weight=1.0, language_loss_weight=0.1, **ITEM_HEAD)
    assert run.logged("loss")[-1] < run.logged("loss")[0]
    loaded = check_loads_and_scores(tmp_path)
    assert loaded.config.candidate_loss_weight == 1.0


def test_item_head_alone_starts_from_the_recommender_and_improves_on_it(train, parts, tmp_path):
    run = train(tmp_path, **ITEM_HEAD, language_loss_weight=0.0, num_train_epochs=8, learning_rate=5.0e-2)
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    batches = list(run.trainer.get_eval_dataloader())
    assert not any(batch["shows_candidates"].any() for batch in batches)
    total = sum(
        cross_entropy(recommender.next_item_scores(batch["histories"]), batch["labels"], reduction="sum")
        for batch in batches
    )
    untrained = total.item() / 32
    assert run.logged("loss")[0] == pytest.approx(untrained, rel=0.3)  # other rows of the same users
    assert run.record["metrics"]["validation"]["eval_loss"] < 0.99 * untrained
    model = check_loads_and_scores(tmp_path)
    assert model.rank_items(HISTORIES, top_k=3)[0].shape == (2, 3)


@pytest.mark.slow
def test_plain_placeholders_are_trained_by_the_curriculum_only(train, plain, tmp_path):
    def change(run, first):
        name = "prompt_embedding.plain"
        return (run.weights[name] - first.weights[name]).abs().max()

    still = train(tmp_path / "still", learning_rate=0.0)
    assert change(plain, still) < 1e-6
    curriculum = train(tmp_path / "curriculum", curriculum_steps=3)
    assert change(curriculum, still) > 1e-3
    assert all(run.trainer.model.item_embedding_probability == 1.0 for run in (curriculum, still))


@pytest.mark.slow
def test_prompts_show_candidates_in_the_order_of_the_recommender(train, parts, tmp_path):
    trainer = train(tmp_path, candidate_order="recommender").trainer
    rows = [trainer.train_dataset[row] for row in range(4)]
    batch = trainer.data_collator([row | {"uniforms": (0.0, 0.0)} for row in rows])
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    drawn = torch.tensor([row["candidates"].tolist() for row in rows])  # (4, 5)
    expected = preferred_order(recommender, batch["histories"], drawn)
    shown = [items[items > 0][-5:].tolist() for items in batch["placeholder_items"]]  # behind the history
    assert shown == expected.tolist() != drawn.tolist()
    assert check_loads_and_scores(tmp_path).config.candidate_order == "recommender"


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing_but_memory(train, plain, tmp_path):
    whole = train(tmp_path / "whole", lora_dropout=0.0).weights
    recomputed = train(tmp_path / "recomputed", lora_dropout=0.0, activation_checkpointing=True).weights
    for name, expected in whole.items():
        torch.testing.assert_close(recomputed[name], expected, rtol=1e-4, atol=1e-5)
    other = plain.weights  # with dropout
    assert any((whole[name] - other[name]).abs().max() > 1e-3 for name in whole if name.endswith("lora_B"))


@pytest.mark.slow
def test_worker_processes_give_the_batches_of_the_main_process(train, tmp_path):
    settings = {"lora_dropout": 0.0, "candidate_order": "recommender", **ITEM_HEAD}
    here = train(tmp_path / "here", **settings)
    workers = train(tmp_path / "workers", **settings, dataloader_num_workers=1)
    for name in ("loss", "eval_loss"):
        assert workers.logged(name) == pytest.approx(here.logged(name), rel=1e-5)


@pytest.mark.slow
def test_training_stops_when_the_validation_loss_no_longer_falls(train, tmp_path):
    run = train(tmp_path, learning_rate=0.0, num_train_epochs=9, early_stopping_patience=2)
    assert run.state.epoch == 3
    check_loads_and_scores(tmp_path)


@pytest.mark.slow
def test_resumed_run_has_the_patience_that_was_left(train, tmp_path):
    settings = {"learning_rate": 0.0, "num_train_epochs": 9, "save_total_limit": 9}
    whole = train(tmp_path / "whole", **settings)
    assert whole.state.epoch == 4  # three evaluations without progress after the first
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
    (tmp_path / "killed" / "run.json").write_text(json.dumps(whole.record | {"status": "running"}))
    assert train(tmp_path / "killed", **settings).state.epoch == 4


@pytest.mark.slow
def test_an_untrained_recommender_may_be_asked_for(train, tmp_path):
    train(tmp_path, recommender=None, untrained_recommender=True, num_llm_layers=1, router_type="conv")
    model = check_loads_and_scores(tmp_path)
    assert model.config.text_config.num_hidden_layers == 1


@pytest.mark.slow
def test_rows_that_are_prefixes_keep_their_last_target(train, tmp_path):
    parts = save_parts(tmp_path, num_users=40, protocol="temporal_users")
    run = train(tmp_path / "run", **vars(parts), num_train_epochs=1)
    assert run.trainer.train_dataset.target_items == "last"
    check_loads_and_scores(tmp_path / "run")


# --- bad input ---

EARLY = [  # found before the language model is loaded
    ({"recommender": None}, "recommender is missing"),
    ({"untrained_recommender": True}, "both given"),
    ({"recommender": "no/such folder"}, "no/such folder"),
    ({"learning_rte": 1e-3}, "did you mean --learning_rate"),
    ({"item_head": "residual"}, "expected a weight above 0"),
    ({"item_loss_weight": 1.0}, "without an item head"),
    ({"num_experts": 3}, "rank 4 is not divisible by num_experts 3"),
    ({"router_type": "dense"}, "router_type is 'dense'"),
    ({"llm_dtype": "int8"}, "invalid choice: 'int8'"),
    ({"data_dir": "nowhere"}, "nowhere"),
    ({"prompt_file": "nowhere.txt"}, "nowhere.txt"),
]
LATE = [
    ({"target_modules": ["q_proj", "query"]}, "target_modules query match nothing"),
    ({"llm_revision": "main"}, "has no revision 'main'"),
    ({"num_llm_layers": 3}, "cannot keep 3 layers"),
]


def check_refused(train, output_dir, message, **changes):
    with pytest.raises((ValueError, OSError)) as raised:
        train(output_dir, **changes)
    assert message in str(raised.value)
    assert not list(output_dir.glob("**/*.safetensors")) and not (output_dir / "run.json").exists()


@pytest.mark.parametrize(("changes", "message"), EARLY, ids=[message for _, message in EARLY])
def test_settings_that_cannot_work_are_refused_before_the_language_model_is_loaded(
    train, monkeypatch, tmp_path, changes, message
):
    monkeypatch.setattr(ilora_parts, "load_language_model", None)
    check_refused(train, tmp_path / "run", message, **changes)


@pytest.mark.parametrize(("changes", "message"), LATE, ids=[message for _, message in LATE])
def test_settings_that_do_not_fit_the_parts_are_refused_before_the_run_is_on_record(train, tmp_path, changes, message):
    check_refused(train, tmp_path / "run", message, **changes)


def test_output_dir_is_required(train):
    with pytest.raises(ValueError, match="output_dir is missing"):
        train(None)


def test_a_configuration_file_is_read_and_its_unknown_keys_are_refused(train, tmp_path):
    (tmp_path / "ilora.yaml").write_text("lerning_rate: 1.0e-3\n")
    check_refused(train, tmp_path / "run", "did you mean learning_rate", config=tmp_path / "ilora.yaml")


@pytest.mark.parametrize(
    ("template", "fraction", "message"),
    [
        ("After {history}:", 0.5, "no template is with {candidates}"),
        ("{history}; one of {candidates}:", 0.5, "no template is without {candidates}"),
        ("After that:", 0.0, "{history} 0 times"),
    ],
)
def test_templates_that_lack_what_the_fraction_asks_for_are_refused(train, tmp_path, template, fraction, message):
    (tmp_path / "prompts.txt").write_text(template)
    changes = {"prompt_file": tmp_path / "prompts.txt", "candidate_fraction": fraction}
    check_refused(train, tmp_path / "run", message, **changes)


def test_recommender_of_another_catalogue_is_refused(train, monkeypatch, tmp_path):
    SASRecForNextItem(SASRecConfig(num_items=31, hidden_size=16)).save_pretrained(tmp_path / "sasrec")
    monkeypatch.setattr(ilora_parts, "load_language_model", None)
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
    with pytest.raises(ValueError, match="a finished run: choose another output_dir"):
        train(tmp_path, learning_rate=1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# --- as a user runs it ---


LONG = ITEM_HEAD | {"num_train_epochs": 12, "curriculum_steps": 12, "early_stopping_patience": 0}


@pytest.fixture(scope="module")
def finished(start_recipe, parts, tmp_path_factory):
    """A run as a process, long enough to be killed, and what it printed."""
    output_dir = tmp_path_factory.mktemp("runs") / "whole"
    result = start_recipe("train_ilora", **{**vars(parts), "output_dir": output_dir, **SETTINGS, **LONG})
    assert result.returncode == 0, result.stderr
    return RecipeRun(output_dir), result.stderr


@pytest.mark.slow
def test_the_log_has_the_run_and_no_warnings(finished):
    run, console = finished
    log = (run.output_dir / "run.log").read_text()
    # The file system's clock is not the recipe's concern.
    warnings = [line for line in log.splitlines() if " WARNING " in line and "mtime may not be reliable" not in line]
    assert not warnings and "Warning" not in console
    assert log.count("step 24 of 24, 0 s left: eval_loss") == 1 and "expert_0_gate" in log
    assert "parameters, of which" in log
    check_loads_and_scores(run.output_dir)
