"""Long runs survive a clock that is set back and loader processes, and their memory does not grow."""

import gc
import os
import time

import psutil
import pytest
import torch
from transformers import TrainerCallback, set_seed

from hf_ilora import (
    DistillationArguments,
    DistillationTrainer,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
)
from tests.recipe_runs import checkpoint_step
from tests.synthetic import cyclic_sequences

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 6}


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=64)


class AtStep(TrainerCallback):
    """Calls a function after each step, with the number of steps."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(state.global_step)


def trainer_of(folder, sequences, at_step=lambda step: None, model_settings=None, **settings):
    defaults = {"max_steps": 6, "per_device_train_batch_size": 16, "use_cpu": True, "disable_tqdm": True}
    set_seed(0)
    return NextItemTrainer(
        SASRecForNextItem(SASRecConfig(num_items=30, **SIZES, **(model_settings or {}))),
        NextItemTrainingArguments(str(folder), **defaults | settings),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
        callbacks=[AtStep(at_step)],
    )


STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def test_a_clock_that_is_set_back_deletes_no_new_checkpoint(sequences, tmp_path):
    def age(step):  # the newest checkpoint seems the oldest
        for checkpoint in tmp_path.glob("checkpoint-*"):
            os.utime(checkpoint, times=(2_000_000_000 - 10 * checkpoint_step(checkpoint),) * 2)

    trainer_of(
        tmp_path, sequences, age, **STEPS, load_best_model_at_end=False, early_stopping_patience=0, save_total_limit=2
    ).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_clock_that_is_set_back_gives_no_negative_durations(sequences, tmp_path, monkeypatch):
    real, readings = time.time, iter(range(1_000_000))
    trainer = trainer_of(tmp_path, sequences)
    monkeypatch.setattr(time, "time", lambda: real() - 100 * next(readings))
    trainer.train()
    metrics = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "eval_runtime" in entry or "train_runtime" in entry]
    assert len(logged) > 2
    for entry in [metrics, *logged]:
        timed = [value for name, value in entry.items() if name.endswith(("_runtime", "_per_second"))]
        assert len(timed) >= 3 and all(0 <= value < 1e6 for value in timed)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax"])
def test_loader_processes_change_no_loss(sequences, tmp_path, loss):
    losses = []
    for workers in (0, 2):
        settings = {"dataloader_num_workers": workers, "logging_strategy": "steps", "logging_steps": 1}
        trainer = trainer_of(tmp_path / str(workers), sequences, model_settings={"loss_type": loss}, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0] == losses[1]


@pytest.mark.slow
def test_memory_does_not_grow_over_2000_steps(sequences, tmp_path):
    """Of distillation, whose steps do all that those of a plain SASRec do."""
    used, tensors = {}, {}

    def measure(step):
        if step in (500, 2000):
            gc.collect()
            used[step] = psutil.Process().memory_info().rss
            tensors[step] = sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    DistillationTrainer(
        SASRecForNextItem(SASRecConfig(num_items=30, **SIZES)),
        DistillationArguments(
            str(tmp_path), max_steps=2000, per_device_train_batch_size=16, top_k=4, eval_strategy="steps",
            eval_steps=500, save_strategy="no", load_best_model_at_end=False, early_stopping_patience=0,
            logging_strategy="steps", logging_steps=50, use_cpu=True, disable_tqdm=True,
        ),
        teacher=SASRecForNextItem(SASRecConfig(num_items=30, **SIZES)).eval(),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
        callbacks=[AtStep(measure)],
    ).train()  # fmt: skip
    assert tensors[2000] <= tensors[500] + 50
    assert used[2000] - used[500] < 20e6  # the scores of one batch, left behind at each step, would be 17 MB
