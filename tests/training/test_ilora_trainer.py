"""The Trainer of iLoRA on splits as they are, and its errors for forgotten or unfit settings."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, set_seed

from hf_ilora import (
    ILoraConfig,
    ILoraForRecommendation,
    ILoraTrainer,
    ILoraTrainingArguments,
    SASRecForNextItem,
    SequenceDatasets,
)
from hf_ilora.evaluation.candidate_ranking import rank_candidates
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.training import ilora_trainer
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import HISTORY_ALONE, WITH_CANDIDATES, save_parts

TEMPLATES = [WITH_CANDIDATES, HISTORY_ALONE]
SETTINGS = {"rank": 4, "num_experts": 2, "router_type": "linear", "max_history": 4, "prompt_templates": TEMPLATES}
ITEM_HEAD = {"item_head": "residual", "item_loss_weight": 1.0}
HEAD_ALONE = ITEM_HEAD | {"language_loss_weight": 0.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), num_users=32)


@pytest.fixture(scope="module")
def sequences(parts):
    return SequenceDatasets.load(parts.data_dir)


@pytest.fixture
def ilora(parts):
    def build(**settings):
        llm, tokenizer, _ = load_language_model(str(parts.llm))
        recommender = SASRecForNextItem.from_pretrained(parts.recommender)
        set_seed(1)
        config = ILoraConfig(**SETTINGS | settings)
        return ILoraForRecommendation.from_base(llm, recommender, tokenizer, recommender.catalogue, config)

    return build


def arguments(folder, **settings):
    defaults = {"max_steps": 2, "num_candidates": 5, "per_device_train_batch_size": 8, "use_cpu": True}
    defaults |= {"gradient_accumulation_steps": 1, "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2}
    return ILoraTrainingArguments(str(folder), **defaults | settings)


def each_step(steps):
    """Evaluate and save after so many steps."""
    return {"eval_strategy": "steps", "eval_steps": steps, "save_strategy": "steps", "save_steps": steps}


def trainer_of(model, sequences, folder, **settings):
    given = {name: settings.pop(name) for name in ("train_dataset", "eval_dataset") if name in settings}
    splits = {"train_dataset": sequences["train"], "eval_dataset": sequences["validation"]}
    return ILoraTrainer(model, arguments(folder, **settings), **splits | given)


def test_ten_lines_train_evaluate_and_save_a_model_that_answers(ilora, sequences, tmp_path):
    model = ilora(**ITEM_HEAD)
    trainer = ILoraTrainer(
        model,
        arguments(tmp_path / "out", num_train_epochs=2, max_steps=-1),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model()
    loaded = ILoraForRecommendation.from_pretrained(tmp_path / "out")
    item_ids, scores = loaded.recommend([[1, 2, 3], [7]], top_k=3)
    assert item_ids.shape == (2, 3) and loaded.catalogue == sequences.catalogue
    torch.testing.assert_close(scores, model.eval().recommend([[1, 2, 3], [7]], top_k=3)[1], rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.rglob("training_args.bin"))


def test_the_evaluation_after_training_ranks_the_targets(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, **each_step(1))
    trainer.train()
    during = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(during) == 2 and not any("eval_mrr" in entry for entry in during)
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    ranks = rank_split(model, sequences["validation"], scorer=model.item_scores)
    assert metrics["eval_unmasked_mrr"] == pytest.approx((1 / ranks.unmasked).mean())
    assert metrics["eval_mrr"] == pytest.approx((1 / ranks.masked).mean())
    among = rank_candidates(model, sequences["validation"])
    assert metrics["eval_candidates_hit_ratio@1"] == pytest.approx((among == 1).mean())
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert f"the held-out item is first for {(among == 1).mean():.1%} of the users" in card
    assert f"the mean of 1 / rank is {metrics['eval_mrr']:.4f}".replace(" 0.", " .") in card
    assert "The lines need the Python package hf_ilora." in card and str(tmp_path) not in card
    predicted = trainer.predict(sequences["test"])
    of_test = rank_split(model, sequences["test"], scorer=model.item_scores)
    assert np.array_equal(predicted.predictions, np.stack([of_test.masked, of_test.unmasked], axis=1))
    assert predicted.label_ids.tolist() == list(sequences["test"]["target"])
    trainer.args.eval_ranking = False
    assert "eval_mrr" not in trainer.evaluate()


def test_a_model_that_is_trained_on_titles_ranks_candidates(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(), sequences, tmp_path)
    predicted = trainer.predict(sequences["test"])
    assert predicted.predictions.tolist() == rank_candidates(trainer.model, sequences["test"]).tolist()
    assert predicted.metrics.keys() == {"test_candidates_hit_ratio@1"}


@pytest.mark.parametrize(
    ("losses", "fraction", "kinds"),
    [({}, 1.0, [True]), (ITEM_HEAD, 0.5, [True, False]), (HEAD_ALONE, 0.0, [False])],
)
def test_prompts_show_candidates_as_the_losses_need_it(ilora, sequences, tmp_path, losses, fraction, kinds):
    trainer = trainer_of(ilora(**losses), sequences, tmp_path)
    assert trainer.candidate_fraction == fraction
    shown = [shows for batch in trainer.get_eval_dataloader() for shows in batch["shows_candidates"].tolist()]
    assert shown == [kind for kind in kinds for _ in range(len(sequences["validation"]))]
    asked_for = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, candidate_fraction=0.0)
    assert not any(batch["shows_candidates"].any() for batch in asked_for.get_train_dataloader())


def test_the_rows_of_evaluations_are_made_once(ilora, sequences, tmp_path, monkeypatch):
    made = []

    class CountedRows(ilora_trainer.CandidateRows):
        def __init__(self, split, *args, **kwargs):
            made.append(split)
            super().__init__(split, *args, **kwargs)

    monkeypatch.setattr(ilora_trainer, "CandidateRows", CountedRows)
    trainer = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, eval_ranking=False, **each_step(1))
    trainer.train()
    losses = {trainer.evaluate()["eval_loss"] for _ in range(2)}
    other = trainer.evaluate(sequences["test"])["eval_loss"]
    assert len(losses) == 1 and other not in losses
    # With candidates and without them.
    assert [sum(split is sequences[name] for split in made) for name in ("train", "validation", "test")] == [1, 2, 2]


def test_data_without_candidates_get_drawn_ones_for_evaluation(ilora, sequences, tmp_path):
    rows = sequences["validation"].remove_columns("candidates")
    trainer = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, eval_dataset=rows, eval_ranking=False)
    first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == second  # the draw is fixed
    shown = [shows for batch in trainer.get_eval_dataloader() for shows in batch["shows_candidates"].tolist()]
    assert shown == [True] * len(rows) + [False] * len(rows)


def test_data_without_candidates_are_learnt_from_and_evaluated(ilora, sequences, tmp_path):
    rows = {name: sequences[name].remove_columns("candidates") for name in ("validation", "test")}
    trainer = trainer_of(ilora(), sequences, tmp_path, eval_dataset=rows["validation"], **each_step(1))
    trainer.train()
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and "eval_candidates_hit_ratio@1" not in metrics
    with pytest.raises(ValueError, match="no column candidates, among which a model without an item head ranks"):
        trainer.predict(rows["test"])


def test_histories_ask_for_another_item_each_epoch_and_prefixes_for_their_last(ilora, sequences, tmp_path, parts):
    assert trainer_of(ilora(), sequences, tmp_path).train_dataset.target_items == "random"
    assert trainer_of(ilora(), sequences, tmp_path, target_items="last").train_dataset.target_items == "last"
    prefixes = cyclic_sequences(num_users=32, protocol="temporal_users")
    rows = trainer_of(ilora(), sequences, tmp_path, train_dataset=prefixes["train"]).train_dataset
    assert rows.target_items == "last"


def test_the_router_learns_more_slowly_and_the_lora_does_not_decay(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, weight_decay=0.5, router_learning_rate_factor=0.1)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    lora, others, router = (
        {names[parameter] for parameter in group["params"]} for group in trainer.optimizer.param_groups
    )
    assert all(name.startswith("llm.") and ".lora_" in name for name in lora)
    assert {name.split(".")[0] for name in others} == {"prompt_embedding", "item_head"}
    assert router == {"router.projection.weight"}
    assert lora | others | router == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-2, 1e-2, 1e-3])
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.0, 0.5, 0.5]


def test_a_frozen_lora_leaves_the_language_model_as_it_is(ilora, sequences, tmp_path):
    model = ilora(**HEAD_ALONE, num_experts=1, item_placeholders=False)
    trainer = trainer_of(model, sequences, tmp_path, lora_learning_rate_factor=0.0, eval_ranking=False)
    trainer.train()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"item_head.projection.weight", "item_head.log_scale"}
    assert model.item_head.projection.weight.any()
    # A fresh LoRA adds zero, and gets no gradients that would have to pass through the language model.
    lora = {name: value for name, value in model.named_parameters() if name.endswith((".lora_A", ".lora_B"))}
    assert lora and not any(value.any() for name, value in lora.items() if name.endswith("_B"))
    assert all(value.grad is None for value in lora.values())


def test_the_lora_may_learn_at_a_rate_of_its_own(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(**ITEM_HEAD), sequences, tmp_path, lora_learning_rate_factor=0.5)
    trainer.create_optimizer()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]  # LoRA, others, router
    assert rates == pytest.approx([5e-3, 1e-2, 3e-3])


def test_learning_rates_warm_up_and_fall_along_a_cosine_to_their_floor(ilora, sequences, tmp_path):
    peak = 8.0e-4
    trainer = trainer_of(ilora(), sequences, tmp_path, learning_rate=peak)
    trainer.create_optimizer_and_scheduler(num_training_steps=100)
    rates = []
    for _ in range(101):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    middle = 0.01 + 0.99 * (1 + math.cos(math.pi * (50 - 5) / 95)) / 2  # 5 of 100 steps warm up
    for step, fraction in {0: 0.0, 1: 0.2, 5: 1.0, 50: middle, 100: 0.01}.items():
        assert rates[step] == pytest.approx([peak * fraction, peak * fraction, 0.3 * peak * fraction]), step
    assert max(rate for rate, _, _ in rates) == pytest.approx(peak)


def test_the_log_says_how_the_experts_are_used(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(), sequences, tmp_path, **each_step(2))
    trainer.train()
    assert any("expert_0_gate" in entry for entry in trainer.state.log_history)


def test_the_curriculum_ends_with_every_prompt(ilora, sequences, tmp_path):
    trainer = trainer_of(ilora(), sequences, tmp_path, curriculum_steps=4, max_steps=3)
    trainer.train()
    assert trainer.model.item_embedding_probability == 0.5  # of the step that begins after two
    trainer = trainer_of(ilora(), sequences, tmp_path, curriculum_steps=2, max_steps=3)
    trainer.train()
    assert trainer.model.item_embedding_probability == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"candidate_fraction": 1.5}, ValueError, "candidate_fraction is 1.5: expected a fraction"),
        ({"num_candidates": 1}, ValueError, "num_candidates is 1: expected at least 2"),
        ({"num_candidates": 40}, ValueError, "lower num_candidates"),
        ({"target_items": "first"}, ValueError, "target_items is 'first': expected one of last, random"),
        ({"eval_dataset": None}, ValueError, "without an eval_dataset: pass"),
        ({"eval_strategy": "no"}, ValueError, "early_stopping_patience=0 and load_best_model_at_end=False"),
        ({"curriculum_steps": -1}, ValueError, "curriculum_steps is -1"),
        ({"lora_learning_rate_factor": -1.0}, ValueError, "lora_learning_rate_factor is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(ilora, sequences, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        trainer_of(ilora(), sequences, tmp_path, **changes)


def test_a_frozen_lora_with_nothing_else_to_train_is_refused(ilora, sequences, tmp_path):
    model = ilora(num_experts=1, item_placeholders=False)
    with pytest.raises(ValueError, match="nothing but a LoRA to train: expected an item head"):
        trainer_of(model, sequences, tmp_path, lora_learning_rate_factor=0.0)


def test_other_models_arguments_and_catalogues_are_refused(ilora, sequences, tmp_path, parts):
    recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    with pytest.raises(TypeError, match="model is a SASRecForNextItem: expected an ILoraForRecommendation"):
        trainer_of(recommender, sequences, tmp_path)
    plain = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args is a TrainingArguments: expected ILoraTrainingArguments"):
        ILoraTrainer(ilora(), plain, train_dataset=sequences["train"])
    splits = {"train_dataset": sequences["train"], "eval_dataset": sequences["validation"]}
    other = cyclic_sequences(num_users=40, num_items=31).catalogue
    with pytest.raises(TypeError, match="other than the model's catalogue"):
        ILoraTrainer(ilora(), arguments(tmp_path), processing_class=other, **splits)
    ILoraTrainer(ilora(), arguments(tmp_path), processing_class=sequences.catalogue, **splits)
    counted = sequences.catalogue.with_counts(np.arange(len(sequences.catalogue) + 1))
    ILoraTrainer(ilora(), arguments(tmp_path), processing_class=counted, **splits)  # the same items


def test_templates_and_heads_that_no_loss_uses_are_refused(ilora, sequences, tmp_path):
    with pytest.raises(ValueError, match="item_head is 'residual' and item_loss_weight 0"):
        trainer_of(ilora(item_head="residual"), sequences, tmp_path)
    with pytest.raises(ValueError, match=r"no template is with \{candidates\}"):
        trainer_of(ilora(prompt_templates=[HISTORY_ALONE]), sequences, tmp_path)


# --- prompts that do not fit into the context ---


@pytest.mark.parametrize("settings", [{}, {"language_loss_weight": 0.0, "candidate_loss_weight": 1.0}])
def test_a_prompt_that_is_too_long_is_found_before_the_first_step(ilora, sequences, tmp_path, settings):
    model = ilora(**settings)
    training = {"max_steps": 12, "eval_strategy": "no", "early_stopping_patience": 0, "load_best_model_at_end": False}
    trainer = trainer_of(model, sequences, tmp_path, **training)  # 32 rows in steps of 8: three epochs
    longest = 0
    for epoch in range(3):
        trainer.train_dataset.set_epoch(epoch)
        for row in range(32):
            batch = trainer.data_collator([trainer.train_dataset[row]])
            titles = model.title_tokens.lengths[batch["candidates"].numpy()].max() + 1 if settings else 0
            longest = max(longest, int(batch["attention_mask"].sum()) + titles)
    model.prompts.max_tokens = longest
    trainer_of(model, sequences, tmp_path, **training)
    model.prompts.max_tokens = longest - 1
    message = (
        rf"has {longest} tokens: expected at most {longest - 1}, the language model's context; its longest title is "
        r"that of item 1\d\d, 'Title 1\d\d', with \d+ tokens: shorten titles, lower max_history or num_candidates"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(model, sequences, tmp_path, **training)


def test_a_prompt_of_an_evaluation_that_is_too_long_is_found_before_the_first_step(ilora, sequences, tmp_path):
    model = ilora()
    model.prompts.max_tokens = 20
    with pytest.raises(ValueError, match="of eval_dataset in epoch 1 has"):
        trainer_of(model, sequences, tmp_path, train_dataset=None, **each_step(1))


def test_prompts_of_evaluations_that_do_not_take_place_may_be_too_long(ilora, sequences, tmp_path):
    model = ilora()
    model.prompts.max_tokens = 20
    settings = {"eval_strategy": "no", "early_stopping_patience": 0, "load_best_model_at_end": False}
    trainer_of(model, sequences, tmp_path, train_dataset=None, eval_dataset=sequences["validation"], **settings)
