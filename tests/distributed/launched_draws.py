"""Runs a recipe whose negatives depend on the step and the target alone, so that two processes draw what one draws.

accelerate launch ... launched_draws.py RECIPE [WORD ...]
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_ilora import DistillationTrainer
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.runs import leave_launch
from hf_ilora.runs.recipe_files import load_recipe

draw_of_model, draw_of_trainer = EncoderForNextItem._draw_negatives, DistillationTrainer._draw_negatives
calls = Counter()


@contextmanager
def seed_of_next_call(caller: str) -> Iterator[None]:
    calls[caller] += 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(calls[caller])
        yield


def draw_comparably(self: EncoderForNextItem, targets: torch.Tensor):
    if not self.training:
        return draw_of_model(self, targets)
    with seed_of_next_call("model"):
        if self.config.negative_sharing == "batch":
            return draw_of_model(self, targets)
        negatives, log_q = draw_of_model(self, torch.arange(self.config.num_items + 1))
    return negatives[targets], log_q


def draw_for_distillation(self: DistillationTrainer, targets: torch.Tensor) -> torch.Tensor:
    with seed_of_next_call("trainer"):
        return draw_of_trainer(self, torch.arange(self.model.config.num_items + 1))[targets]


EncoderForNextItem._draw_negatives = draw_comparably
DistillationTrainer._draw_negatives = draw_for_distillation
recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{sys.argv[1]}.py")
sys.argv = sys.argv[1:]
recipe.main()
leave_launch()
