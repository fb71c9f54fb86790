"""The prompts of an optimizer step are sorted into its batches, and it sees and learns the same as in random order."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, set_seed

from hf_ilora import (
    ILoraConfig,
    ILoraForRecommendation,
    ILoraTrainer,
    ILoraTrainingArguments,
    SASRecForNextItem,
    SequenceDatasets,
)
from hf_ilora.models.ilora.language_models import load_language_model
from tests.tiny_ilora_parts import HISTORY_ALONE, WITH_CANDIDATES, save_parts

BATCH, ACCUMULATION = 2, 4
CONFIG = {
    "rank": 4, "num_experts": 2, "router_type": "linear", "max_history": 4, "lora_dropout": 0.0,
    "prompt_templates": [WITH_CANDIDATES, HISTORY_ALONE], "item_head": "residual", "item_loss_weight": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"), num_users=32)


@pytest.fixture
def build(parts):
    def trainer(folder, seed=1, **settings):
        llm, tokenizer, _ = load_language_model(str(parts.llm))
        recommender = SASRecForNextItem.from_pretrained(parts.recommender)
        set_seed(seed)
        model = ILoraForRecommendation.from_base(
            llm, recommender, tokenizer, recommender.catalogue, ILoraConfig(**CONFIG)
        )
        defaults = {
            "num_train_epochs": 2, "num_candidates": 5, "per_device_train_batch_size": BATCH, "use_cpu": True,
            "gradient_accumulation_steps": ACCUMULATION, "disable_tqdm": True, "eval_strategy": "no",
            "load_best_model_at_end": False, "early_stopping_patience": 0, "save_strategy": "no",
            "logging_steps": 1, "save_total_limit": 9,
        }  # fmt: skip
        arguments = ILoraTrainingArguments(str(folder), **defaults | settings)
        return ILoraTrainer(model, arguments, train_dataset=SequenceDatasets.load(parts.data_dir)["train"])

    return trainer


def batches_of(trainer) -> list[list[dict]]:
    """The batches of each step of an epoch."""
    trainer.is_in_train = True
    batches = list(trainer.get_train_dataloader())
    return [batches[start : start + ACCUMULATION] for start in range(0, len(batches), ACCUMULATION)]


def tokens(batches: list[dict]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches)


def test_steps_have_the_rows_of_the_random_order_with_less_padding(build, tmp_path, monkeypatch):
    trainer = build(tmp_path)
    sorted_steps = batches_of(trainer)
    monkeypatch.setattr(ILoraTrainer, "_get_train_sampler", Trainer._get_train_sampler)
    random_steps = batches_of(trainer)
    assert len(sorted_steps) == len(random_steps) == 4
    for ours, theirs in zip(sorted_steps, random_steps, strict=True):
        found, expected = (
            sorted(zip(torch.cat([b["labels"] for b in step]).tolist(), lengths_of(step), strict=True))
            for step in (ours, theirs)
        )
        assert found == expected
        assert lengths_of(ours) == sorted(lengths_of(ours), reverse=True)
    assert sum(map(tokens, sorted_steps)) < 0.9 * sum(map(tokens, random_steps))


def lengths_of(step: list[dict]) -> list[int]:
    return torch.cat([batch["attention_mask"].sum(1) for batch in step]).tolist()


def test_losses_are_those_of_the_random_order(build, tmp_path, monkeypatch):
    found = []
    for _ in range(2):
        trainer = build(tmp_path)
        trainer.train()
        log = trainer.state.log_history
        found.append([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry])
        monkeypatch.setattr(ILoraTrainer, "_get_train_sampler", Trainer._get_train_sampler)
    assert len(found[0]) == 8
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_resumed_run_ends_where_the_whole_run_does(build, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    build(tmp_path / "whole", **settings).train()
    resumed = build(tmp_path / "resumed", seed=5, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    whole, found = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_an_epoch_has_an_order_of_its_own(build, tmp_path):
    sampler = build(tmp_path)._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.rows.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[1]) == list(range(32))
