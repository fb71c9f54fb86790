"""Which device this process computes on, and its state among the processes of a launch."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool


def launched_on_cpu() -> bool:
    """Whether `accelerate launch` runs with `use_cpu`, which it passes on in the environment.

    `TrainingArguments` and `PartialState` do not always read it: a model on the CPU would get batches on a GPU.
    """
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))


def uses_accelerator() -> bool:
    """Whether there is an accelerator and the launch does not forbid using it."""
    return torch.accelerator.is_available() and not launched_on_cpu()


def uses_cuda() -> bool:
    """Whether there is a CUDA device and the launch does not forbid using it."""
    return torch.cuda.is_available() and not launched_on_cpu()


def default_device() -> torch.device:
    """The accelerator if there is one and the launch does not forbid using it, else the CPU."""
    return torch.accelerator.current_accelerator() if uses_accelerator() else torch.device("cpu")


def process_state(**options) -> PartialState:
    """The state of this process among those of its launch, initialised if necessary.

    `PartialState()` would not find the other processes of a launch on CPUs: it looks for them only with `cpu=True`.

    Args:
        options: arguments of `PartialState`, used if this call initialises it.
    """
    return PartialState(cpu=not uses_accelerator(), **options)
