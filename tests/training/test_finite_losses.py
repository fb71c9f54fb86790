"""A loss that is not finite ends training at once, whatever trains, and leaves nothing behind."""

import re
from types import SimpleNamespace

import pytest
import torch

from hf_ilora import GRU4RecConfig, GRU4RecForNextItem, NextItemTrainer, NextItemTrainingArguments
from hf_ilora.training.finite_losses import FiniteLosses
from tests.invariant.runs import TRAINERS, save_inputs
from tests.synthetic import cyclic_sequences


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def weights_in(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")]


@pytest.mark.parametrize(("kind", "rate"), [("sasrec", 1e38), ("ilora", 1e20), ("distilled", 1e38)])
def test_a_learning_rate_that_explodes_stops_the_run_and_saves_nothing(parts, tmp_path, kind, rate):
    trainer = TRAINERS[kind](parts, tmp_path, learning_rate=rate, logging_steps=100, lr_scheduler_type="constant")
    expected = rf"loss of step \d is (nan|-?inf), at learning rate {re.escape(format(rate, 'g'))}: expected"
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    assert not weights_in(tmp_path)
    assert trainer.state.global_step < trainer.args.max_steps


class PoisonedTrainer(NextItemTrainer):
    """Its loss of one batch is not finite."""

    poisoned_batch, poison, batches = 0, float("nan"), 0

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if not model.training:
            return loss
        self.batches += 1
        return loss * self.poison if self.batches == self.poisoned_batch else loss


def poisoned(folder, batch, poison=float("nan"), **settings):
    sequences = cyclic_sequences(num_users=64)
    settings = {"max_steps": 8, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True} | settings
    model = GRU4RecForNextItem(GRU4RecConfig(num_items=sequences.num_items, hidden_size=8, max_length=6))
    trainer = PoisonedTrainer(
        model,
        NextItemTrainingArguments(str(folder), **settings),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
    )
    trainer.poisoned_batch, trainer.poison = batch, poison
    return trainer


@pytest.mark.parametrize(
    ("batch", "step", "poison", "settings"),
    [
        (1, 1, float("nan"), {}),
        (5, 5, float("inf"), {"logging_nan_inf_filter": True}),
        (5, 3, float("nan"), {"gradient_accumulation_steps": 2}),  # the first batch of the third step
        (8, 8, -float("inf"), {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": 0}),
    ],
)
def test_the_first_step_with_such_a_loss_is_named_and_earlier_checkpoints_stay(tmp_path, batch, step, poison, settings):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1} | settings
    trainer = poisoned(tmp_path, batch, poison, save_total_limit=None, learning_rate=2e-3, **settings)
    with pytest.raises(ValueError, match=f"the loss of step {step} is (nan|inf|-inf), at learning rate 0.002"):
        trainer.train()
    expected = [f"checkpoint-{n}/model.safetensors" for n in range(1, step)]
    assert sorted(weights_in(tmp_path)) == expected
    assert all(entry["step"] < step for entry in trainer.state.log_history)


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path):
    trainer = poisoned(tmp_path, 0, learning_rate=1e39, max_steps=1)
    with pytest.raises(ValueError, match=r"weights after step 1 are not, at learning rate 1e\+39"):
        trainer.train()
    assert not weights_in(tmp_path)


def test_a_run_that_stopped_can_be_trained_anew(tmp_path):
    trainer = poisoned(tmp_path, 2)
    with pytest.raises(ValueError, match="step 2"):
        trainer.train()
    trainer.model.load_state_dict(poisoned(tmp_path, 0).model.state_dict())
    trainer.optimizer = trainer.lr_scheduler = None
    assert trainer.train().global_step == 8


class OnDevice:
    """Stands in for a loss on an accelerator."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, value):
        self.value = value

    def detach(self):
        return self

    float = detach

    def to(self, device, non_blocking):
        assert (device, non_blocking) == ("cpu", True)
        return torch.tensor(self.value)


def test_on_an_accelerator_a_loss_is_read_when_the_next_step_is_queued(monkeypatch):
    waited = []

    class Event:
        def __init__(self, device):
            self.recorded = False

        def record(self):
            self.recorded = True

        def synchronize(self):
            assert self.recorded
            waited.append(self)

    monkeypatch.setattr(torch, "Event", Event)
    losses = FiniteLosses(SimpleNamespace(reduce=lambda value, reduction: value))
    for step, value in enumerate((1.0, 2.0, float("nan")), start=1):
        losses.add(OnDevice(value))
        losses.end_step(step, 0.1, wait=False)
        assert len(waited) == step - 1
    with pytest.raises(ValueError, match="the loss of step 3 is nan"):
        losses.end_step(3, 0.1, wait=True)
