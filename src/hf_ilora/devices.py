"""Whether this process computes on an accelerator, and what it shares with the others of its launch."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import str_to_bool


def launched_on_cpu() -> bool:
    """Whether `accelerate launch` was told to use the CPU (`use_cpu`), which it passes on in the environment.

    `TrainingArguments` and `PartialState` do not read it everywhere: a model on the CPU would get batches on a GPU.
    """
    return bool(str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")))


def uses_accelerator() -> bool:
    """Whether there is an accelerator that the launch does not leave alone."""
    return torch.accelerator.is_available() and not launched_on_cpu()


def uses_cuda() -> bool:
    """Whether there is a CUDA device that the launch does not leave alone."""
    return torch.cuda.is_available() and not launched_on_cpu()


def default_device() -> torch.device:
    """The accelerator, unless there is none or the launch leaves it alone; else the CPU."""
    return torch.accelerator.current_accelerator() if uses_accelerator() else torch.device("cpu")


def process_state(**options) -> PartialState:
    """The state of this process among those of its launch, initialised if nobody has done so.

    `PartialState()` would not see the other processes of a launch on CPUs: it looks for them only with `cpu=True`.

    Args:
        options: of `PartialState`, used if this call initialises it.
    """
    return PartialState(cpu=not uses_accelerator(), **options)
