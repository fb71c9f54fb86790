"""Trains iLoRA as recipes/train_ilora.py does, and reports what each process holds of the language model, in bytes.

accelerate launch ... launched_memory.py FOLDER [WORD OF THE RECIPE ...]
"""

import gc
import json
import os
import re
import sys
import threading
from functools import partial
from pathlib import Path

import deepspeed
import torch
from transformers import TrainerCallback

from hf_ilora.runs import leave_launch
from hf_ilora.runs.recipe_files import load_recipe

STATUS = Path("/proc/self/status")
MEASURED_STEP = 2  # counted from 0: earlier steps allocate what stays
report = {"gathered at once in loading": 0, "gathered in step": 0}


def allocated() -> int:
    """Bytes of this process in memory that are not pages of mapped files, which the system may drop."""
    return sum(int(kilobytes) * 1024 for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", STATUS.read_text()))


class Rise:
    """The highest `allocated` inside, above the one at the beginning, looked up every few milliseconds."""

    def __enter__(self):
        gc.collect()
        self.before = self.highest = allocated()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.002):
            self.highest = max(self.highest, allocated())

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self.bytes = max(self.highest, allocated()) - self.before


def bytes_of(llm: torch.nn.Module) -> dict[str, int]:
    """What the frozen weights of a language model take as a whole, in this process's own part, and gathered now."""
    found = {"whole": 0, "owned": 0, "gathered": 0}
    for parameter in llm.parameters():
        if parameter.requires_grad:
            continue
        is_divided = hasattr(parameter, "ds_tensor")
        own = parameter.ds_tensor if is_divided else parameter
        found["whole"] += (parameter.ds_numel if is_divided else parameter.numel()) * parameter.element_size()
        found["owned"] += own.numel() * own.element_size()
        found["gathered"] += parameter.numel() * parameter.element_size() if is_divided else 0
    return found


class CountingGatheredParameters(deepspeed.zero.GatheredParameters):
    """Reports how much was gathered at once."""

    def __enter__(self):
        gathered = sum(each.ds_numel * each.element_size() for each in self.params) if self.enabled else 0
        report["gathered at once in loading"] = max(report["gathered at once in loading"], gathered)
        return super().__enter__()


class WatchedStep(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == MEASURED_STEP:
            for layer in model.llm.get_decoder().layers:
                layer.register_forward_hook(partial(self.look, model.llm))
            self.rise = Rise().__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == MEASURED_STEP + 1:
            self.rise.__exit__()
            report["rise in step"] = self.rise.bytes

    def look(self, llm, layer, inputs, output):
        """After a layer's forward, and when the gradient of its output is known."""
        self.count(llm)
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:
            states.register_hook(lambda gradient: self.count(llm))

    def count(self, llm):
        report["gathered in step"] = max(report["gathered in step"], bytes_of(llm)["gathered"])


def load_watched(*arguments):
    load_parts(*arguments)  # what is imported and compiled stays
    deepspeed.zero.GatheredParameters = CountingGatheredParameters
    with Rise() as rise:
        parts = load_parts(*arguments)
    found = bytes_of(parts[0].requires_grad_(False))
    report.update({"whole": found["whole"], "owned": found["owned"], "rise in loading": rise.bytes})
    return parts


def build_watched(*arguments, **named_arguments):
    deepspeed.zero.GatheredParameters = CountingGatheredParameters.__base__
    trainer = trainer_class(*arguments, **named_arguments)
    trainer.add_callback(WatchedStep())
    return trainer


folder, words = Path(sys.argv[1]), sys.argv[2:]
recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "train_ilora.py")
load_parts, trainer_class = recipe.load_ilora_parts, recipe.ILoraTrainer
recipe.load_ilora_parts, recipe.ILoraTrainer = load_watched, build_watched
sys.argv = ["train_ilora.py", *words]
recipe.main()
(folder / f"report_{os.environ['RANK']}.json").write_text(json.dumps(report))
leave_launch()
