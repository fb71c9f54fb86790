"""The settings that a launch decides, such as the number of processes. A resumed run must be launched with the same."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import str_to_bool
from transformers import TrainingArguments

from hf_ilora.devices import process_state

# `accelerate launch` passes its settings on in environment variables: the prefixes of their names, by the variable that
# switches the way to distribute on.
_PREFIXES_BY_SWITCH = {
    "ACCELERATE_USE_DEEPSPEED": ("ACCELERATE_DEEPSPEED_", "ACCELERATE_GRADIENT_", "ACCELERATE_CONFIG_DS_"),
    "ACCELERATE_USE_FSDP": ("FSDP_",),
    "ACCELERATE_USE_MEGATRON_LM": ("MEGATRON_LM_",),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("PARALLELISM_CONFIG_",),
}


def launch_settings(arguments: Sequence[object] = ()) -> dict[str, object]:
    """The settings of this launch in JSON types; `python recipe.py` has those of a launch without options.

    Args:
        arguments: the dataclasses of the run; the `TrainingArguments` among them say which precision is in effect.
    """
    state = process_state()
    # The state shows FSDP only once an Accelerator exists, which is after a run has looked for checkpoints.
    uses_fsdp = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    training = [part for part in arguments if isinstance(part, TrainingArguments)]
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    settings = {
        "num_processes": state.num_processes,
        "mixed_precision": training[0].mixed_precision if training else launched_precision,
        "distributed_type": "FSDP" if uses_fsdp else state.distributed_type.value,
        "device_type": state.device.type,
    }
    prefixes = [
        prefix
        for switch, switched_prefixes in _PREFIXES_BY_SWITCH.items()
        if str_to_bool(os.environ.get(switch, "false"))
        for prefix in switched_prefixes
    ]
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        prefixes.append("ACCELERATE_DYNAMO_")
    for name, value in sorted(os.environ.items()):
        if name.startswith(tuple(prefixes)):
            settings[name.removeprefix("ACCELERATE_").lower()] = _content(value)
    return settings


def launch_differences(record: dict, arguments: Sequence[object]) -> list[str]:
    """The settings in which this launch differs from that of an earlier run's record, one sentence each."""
    now = launch_settings(arguments)
    before = record.get("launch", {"num_processes": record.get("world_size", now["num_processes"])})
    names = [*now, *(name for name in before if name not in now)] if "launch" in record else before
    return [
        f"{name} of the launch was {before.get(name)!r} and is {now.get(name)!r}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _content(value: str) -> str:
    """The value; if it names a file, such as a DeepSpeed configuration, the sha256 of the file."""
    path = Path(value)
    return f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}" if value and path.is_file() else value
