"""Training steps never wait for the device: nothing in them needs a value, or a number of rows, from it."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ilora import SASRecForNextItem
from tests.invariant import runs
from tests.invariant.runs import TRAINERS, save_inputs

# Each of them needs numbers from the device, to continue in Python or to give its result a shape.
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal"}


class Waits(TorchDispatchMode):
    """Collects operations for which Python waits while a model is trained."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        picks = args[1] if name.startswith("index") and len(args) > 1 else ()
        if name in WAITING or any(
            isinstance(pick, torch.Tensor) and pick.dtype == torch.bool for pick in (picks or ()) if pick is not None
        ):
            callers = [frame.filename for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            if "/transformers/" not in callers[-1]:  # the language model's own are not ours to avoid
                self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def waits_of_a_step(trainer) -> list[str]:
    """Of forward, backward and optimizer in the second step, with the batch that the Trainer's data loader makes."""
    found = []
    step = type(trainer).training_step

    def watched(model, inputs, num_items_in_batch=None):
        with pytest.MonkeyPatch.context() as patch, Waits() as waits:
            # On a CPU, `cpu` copies nothing, so that no operation would show it.
            patch.setattr(torch.Tensor, "cpu", lambda tensor: waits.found.append("cpu") or tensor)
            loss = step(trainer, model, inputs, num_items_in_batch)
        found.append(waits.found)
        return loss

    trainer.training_step = watched
    trainer.train()
    return found[1]


@pytest.mark.parametrize(
    "wait", [lambda x: x[x > 0], lambda x: x.max().item(), bool, torch.nonzero, lambda x: x.unique(), torch.argwhere]
)
def test_what_waits_is_found(wait):
    with Waits() as waits:
        wait(torch.ones(1))
    assert waits.found


SASREC_LOSSES = [
    {"loss_type": "cross_entropy", "repeat_bias": True, "head_bias": True},
    {"loss_type": "sampled_softmax", "popularity_power": 0.5, "num_negatives": 8},
    {"loss_type": "gbce", "negative_sharing": "position", "num_negatives": 8},
]


@pytest.mark.parametrize(
    ("settings", "item_optimizer"),
    [(settings, "same") for settings in SASREC_LOSSES] + [(settings, "lazy_adam") for settings in SASREC_LOSSES[1:]],
)
def test_a_step_of_sasrec_never_waits(parts, tmp_path, settings, item_optimizer):
    trainer = TRAINERS["sasrec"](parts, tmp_path, max_steps=2)
    settings = settings | {"attention_decay": True, "position_alignment": "newest"}
    trainer.model = trainer.model_wrapped = SASRecForNextItem(
        type(trainer.model.config)(**trainer.model.config.to_diff_dict() | settings)
    )
    trainer.args.initial_items = "random"
    trainer.args.item_optimizer, trainer.args.max_grad_norm = item_optimizer, 0.0
    if "popularity_power" in settings:
        trainer.model.set_item_counts(torch.ones(trainer.model.config.num_items + 1))
    assert waits_of_a_step(trainer) == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distilled_positions": "last", "rank_gap_weighting": True, "policy": "ground_truth_error"},
        {"base_loss": "sampled_softmax", "num_scored_items": 4},
        {"base_loss": "bce", "form": "reference"},
        {"num_scored_items": 4, "alpha": 0.0, "distilled_positions": "last"},
    ],
)
def test_a_step_of_distillation_never_waits(parts, tmp_path, settings):
    if settings.get("distilled_positions") == "last":
        settings = settings | {"windows": "last"}
    trainer = TRAINERS["distilled"](parts, tmp_path, max_steps=2, **settings)
    assert waits_of_a_step(trainer) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["index_put"]),  # the gradient of the tokens that transformers keeps by a mask (logits_to_keep)
        ({"item_head": "none", "item_loss_weight": 0.0, "candidate_loss_weight": 0.0, "recommender_weight": 0.0}, []),
        ({"candidate_loss_weight": 0.0, "recommender_weight": 0.0}, []),
    ],
)
def test_a_step_of_ilora_waits_for_nothing_of_ours(parts, tmp_path, monkeypatch, settings, expected):
    monkeypatch.setattr(runs, "ILORA", runs.ILORA | settings)
    trainer = TRAINERS["ilora"](parts, tmp_path, max_steps=2)
    assert waits_of_a_step(trainer) == expected
