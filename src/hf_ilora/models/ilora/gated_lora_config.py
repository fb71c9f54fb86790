"""Settings of a gated LoRA on any model, and the file that stores them."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora.models.next_item.saved_model import WRONG_TYPES

from .configuration_ilora import ALL_LINEAR_MODULES, check_lora_settings

PEFT_TYPE = "GATED_LORA"  # PEFT refuses an adapter of a type that it does not know


@dataclass
class GatedLoraConfig:
    """Settings of a gated LoRA, in the words of iLoRA and PEFT.

    Args:
        rank: LoRA rank, summed over all experts; divisible by `num_experts`. PEFT calls it `r`.
        num_experts: number of experts that the rank is divided among; 1 is plain LoRA with a gate.
        lora_alpha: scaling numerator: each expert's output is multiplied by lora_alpha / (rank / num_experts) and by
            its gate.
        lora_dropout: dropout probability on the input of the experts.
        target_modules: names of linear layers or ends of them, such as "q_proj" or "self_attn.q_proj"; or one regular
            expression that matches whole names; or "all-linear", for every linear layer except the output embeddings.
        base_model_name_or_path, revision: the model that the adapter was trained on. For a model that transformers
            loaded by name, `get_gated_lora_model` fills them in.

    Raises:
        ValueError: for values of a wrong type or out of range.
    """

    rank: int = 8
    num_experts: int = 4
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    target_modules: list[str] | str = field(default_factory=lambda: list(ALL_LINEAR_MODULES))
    base_model_name_or_path: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        kinds = {
            "rank": (int, "a whole number"),
            "num_experts": (int, "a whole number"),
            "lora_alpha": (int | float, "a number"),
            "lora_dropout": (int | float, "a number"),
            "base_model_name_or_path": (str | None, "a name, or None"),
            "revision": (str | None, "a name, or None"),
        }
        for name, (kind, expected) in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}: expected {expected}")
        targets = self.target_modules
        if not isinstance(targets, str):
            if not isinstance(targets, list | tuple | set) or not all(isinstance(each, str) for each in targets):
                raise ValueError(f"target_modules is {targets!r}: expected a list of names, or one string")
            self.target_modules = list(targets)
        if not self.target_modules:
            raise ValueError("target_modules is empty: expected names of linear layers, such as q_proj")
        check_lora_settings(self.rank, self.num_experts, self.lora_alpha, self.lora_dropout)

    def to_json(self) -> str:
        """The content of adapter_config.json."""
        return json.dumps({"peft_type": PEFT_TYPE, **dataclasses.asdict(self)}, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json_file(cls, file: str | os.PathLike) -> "GatedLoraConfig":
        """Read adapter_config.json.

        Raises:
            ValueError: if it cannot be read, describes another kind of adapter, or has wrong values.
        """
        remedy = "expected the file that GatedLoraModel.save_pretrained wrote; restore it"
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8"))
            peft_type = saved.pop("peft_type", None)
        except (OSError, ValueError, *WRONG_TYPES) as error:
            raise ValueError(f"{file} is not the configuration of an adapter ({error}): {remedy}") from error
        if peft_type != PEFT_TYPE:
            raise ValueError(
                f"{file} has peft_type {peft_type!r}: expected {PEFT_TYPE!r}; load an adapter of another type with PEFT"
            )
        try:
            return cls(**saved)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} has a wrong value ({error}): {remedy}") from error


__all__ = ["GatedLoraConfig"]
