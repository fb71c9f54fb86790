"""LoRAs in PEFT's format: one user's mix of the experts, and the stack of all experts that it is made from."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_ilora.files import check_replaceable, folder_written_whole

from .configuration_ilora import ILoraConfig
from .embedded_llm import WHEEL_REQUIREMENT, embedded_llm_folder
from .gated_lora import gated_layers

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_NUM_EXPERTS = "num_experts"  # in the metadata of a stack's file; files of one user lack it
_SUM_TOLERANCE = 0.02  # for gates that were stored in bfloat16


def stacked_lora(llm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Collect all experts of a language model with gated layers as one LoRA, each with a gate of 1.

    Returns:
        State dict in PEFT's format, for `r=rank` and `lora_alpha=lora_alpha`. PEFT scales by lora_alpha / rank and
        iLoRA by lora_alpha / (rank / num_experts), so A is multiplied by num_experts.
    """
    state = {}
    for name, layer in gated_layers(llm).items():
        state[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach() * layer.num_experts  # (rank, in)
        state[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().clone()  # (out, rank)
    return state


def gated_stack(
    stack: dict[str, torch.Tensor], num_experts: int, expert_gates: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Make one user's LoRA from a stack, by multiplying each expert's rows of A by its gate.

    Args:
        stack: state dict from `stacked_lora`.
        num_experts: number of experts in it.
        expert_gates: (experts,).

    Returns:
        State dict like `stack`, which shares its B.

    Raises:
        ValueError: for gates of another shape, and for gates that are negative or do not sum to 1.
    """
    if expert_gates.shape != (num_experts,):
        raise ValueError(
            f"expert_gates have shape {tuple(expert_gates.shape)}: expected {(num_experts,)}, those of one user"
        )
    if not ((expert_gates >= 0).all() and (expert_gates.sum() - 1).abs() < _SUM_TOLERANCE):  # NaN is neither
        raise ValueError(
            f"expert_gates are {expert_gates.tolist()}: expected numbers of at least 0 that sum to 1, a row of "
            "ILoraForRecommendation.expert_gates(histories)"
        )
    state = {}
    for name, value in stack.items():
        if name.endswith(".lora_A.weight"):
            rank_gates = expert_gates.detach().to(value).repeat_interleave(len(value) // num_experts)  # (rank,)
            value = value * rank_gates.unsqueeze(1)  # (rank, in)
        state[name] = value
    return state


def user_lora(
    stack_dir: str | os.PathLike, expert_gates: Any, output_dir: str | os.PathLike | None = None
) -> dict[str, torch.Tensor]:
    """Make one user's LoRA from the folder that `ILoraForRecommendation.stacked_lora` wrote, without the model.

    Args:
        stack_dir: the folder.
        expert_gates: (experts,) gates of the user, a row from `ILoraForRecommendation.expert_gates`: a list, array or
            tensor.
        output_dir: folder to write the LoRA to, for PEFT and engines that read its format; None writes nothing.

    Returns:
        State dict in PEFT's format, on the CPU, which fits the stack's adapter_config.json.

    Raises:
        ValueError: if a file of the stack is missing, broken, or the LoRA of one user; if `expert_gates` have another
            shape or do not sum to 1; and if `output_dir` contains other files.
    """
    if output_dir is not None:
        check_replaceable(output_dir, LORA_FILES)
    config, stack, num_experts = _read_stack(Path(stack_dir))
    try:
        expert_gates = torch.as_tensor(expert_gates, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"expert_gates are {expert_gates!r}: expected {num_experts} numbers ({error})") from error
    state = gated_stack(stack, num_experts, expert_gates)
    if output_dir is not None:
        write_lora(output_dir, state, config)
    return state


def write_lora(
    folder: str | os.PathLike, state: dict[str, torch.Tensor], config: dict, num_experts: int | None = None
) -> None:
    """Write a LoRA as PEFT does.

    Args:
        folder: replaced if it contains a LoRA.
        state: state dict in PEFT's format.
        config: content of adapter_config.json, see `lora_config`.
        num_experts: number of experts, if `state` is a stack.

    Raises:
        ValueError: if the folder contains other files.
    """
    metadata = {"format": "pt"} | ({} if num_experts is None else {_NUM_EXPERTS: str(num_experts)})
    with folder_written_whole(folder, LORA_FILES) as unfinished:
        save_file(state, unfinished / WEIGHTS_FILE, metadata)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (unfinished / CONFIG_FILE).write_text(text, encoding="utf-8")


def lora_config(config: ILoraConfig, base_model: str | os.PathLike | None = None) -> dict:
    """Content of adapter_config.json for the LoRAs of an iLoRA.

    Args:
        config: configuration of the iLoRA.
        base_model: name or folder of the base model. None takes the language model that `config` names, and logs a
            warning if `config` names none, or one that the iLoRA uses only in part or from another file.
    """
    name, revision = base_model, None
    if base_model is None:
        name, revision = config.llm_name_or_path, config.llm_revision
        if name == WHEEL_REQUIREMENT:
            name = embedded_llm_folder()
        elif name is not None and Path(name).is_dir():
            name = Path(name).resolve()  # the folder of the LoRA may be read from anywhere
        _warn_of_base_model(config, name)
    alpha = config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if name is None else str(name),
        "revision": revision,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # an integer in PEFT
        "lora_dropout": 0.0,
        "target_modules": list(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _warn_of_base_model(config: ILoraConfig, name: str | Path | None) -> None:
    if name is None:
        problem = "names no base model, as the language model was not loaded by name"
    elif config.num_llm_layers is not None:
        problem = f"names {name} as base model, but the LoRA fits its first {config.num_llm_layers} layers alone"
    elif config.llm_gguf_file is not None:
        problem = f"names {name} as base model, but the language model was read from its file {config.llm_gguf_file}"
    else:
        return
    logger.warning(
        "%s %s: save_language_model(folder) writes the base model; pass base_model=folder", CONFIG_FILE, problem
    )


def _read_stack(folder: Path) -> tuple[dict, dict[str, torch.Tensor], int]:
    """adapter_config.json, tensors and number of experts of a stack."""
    remedy = "expected a folder that ILoraForRecommendation.stacked_lora(output_dir) wrote; write it again"
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            metadata = file.metadata() or {}
            stack = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} has no stack of experts that can be read ({error}): {remedy}") from error
    if _NUM_EXPERTS not in metadata:
        raise ValueError(
            f"{WEIGHTS_FILE} of {folder} is not a stack of experts, but the LoRA of one user or of another program: "
            f"{remedy}"
        )
    return config, stack, int(metadata[_NUM_EXPERTS])


__all__ = ["LORA_FILES", "gated_stack", "lora_config", "stacked_lora", "user_lora", "write_lora"]
