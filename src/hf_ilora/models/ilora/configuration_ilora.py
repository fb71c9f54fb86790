"""Configuration of iLoRA."""

import math
import os
from dataclasses import field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_ilora.models.next_item.configuration_next_item import check_finite, strict_config
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig

from .embedded_llm import EMBEDDED_LLM, WHEEL_REQUIREMENT

ROUTER_TYPES = ("conv", "linear", "mlp", "top_k", "noisy")
ITEM_HEADS = ("residual", "plain", "none")
DUPLICATE_TITLES = ("raise", "number")
CANDIDATE_ORDERS = ("given", "recommender")
LOSS_WEIGHTS = ("language_loss_weight", "candidate_loss_weight", "item_loss_weight")
ALL_LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_TEMPLATES = (
    "A user chose these items, oldest first: {history}.\nThe next one is among: {candidates}.\nNext item:",
    "A user chose these items, oldest first: {history}.\nNext item:",
)


@strict_config
class ILoraConfig(PreTrainedConfig):
    r"""Architecture, prompts and loss weights of an iLoRA recommender.

    Args:
        recommender_config: configuration of the frozen SASRec. Its hidden size is the size of the router's input.
        text_config: configuration of the frozen language model, after `num_llm_layers` has been applied.
        llm_name_or_path: name or folder that the language model was loaded from. A checkpoint stores this instead of
            the weights, a folder as its absolute path. A relative path in a checkpoint counts from the checkpoint's
            folder, or from the working directory if there is no such folder.
        llm_revision: commit of the language model on the Hub, or None.
        llm_gguf_file: GGUF file in that repository or folder, if the language model was read from one.
        num_llm_layers: number of decoder layers to keep, counted from the input; None keeps all.
        rank: LoRA rank, summed over all experts; divisible by `num_experts`.
        num_experts: number of experts that the rank is divided among; 1 is plain LoRA without a router.
        lora_alpha: scaling numerator: each expert's output is multiplied by lora_alpha / (rank / num_experts) and by
            its gate.
        lora_dropout: dropout probability on the input of the experts.
        target_modules: last parts of the names of the linear layers that get experts, such as "q_proj".
        router_type: module that computes the gates from the user embedding: "conv" (the reference program's),
            "linear", "mlp", "top_k" or "noisy".
        router_top_k: number of experts that the "top_k" router keeps.
        router_noise: standard deviation of the noise that the "noisy" router adds to its logits in training.
        item_placeholders: append the recommender's embedding of the item, projected, to every title in a prompt.
        item_head: how the last hidden state ranks the catalogue: "residual" (it corrects the recommender's user
            embedding), "plain" (it replaces the user embedding) or "none" (no item head).
        language_loss_weight: weight of -log p(title | prompt), in nats per title.
        candidate_loss_weight: weight of -log p(target among the candidates): the cross-entropy of the scores that
            `score_candidates` returns. Reading the titles of all candidates nearly doubles the time of a step.
        item_loss_weight: weight of -log p(item | prompt) by the item head, on prompts that show no candidates.
        recommender_weight: weight w in [0, 1) of the frozen recommender in a candidate's score. The score is a
            logarithmic opinion pool of two models, w log p(item | recommender) + (1 - w) log p(title | prompt). The
            candidate loss therefore teaches the language model to correct the recommender.
        prompt_templates: texts with {history} and, in those that show candidates, {candidates}. Training picks one at
            random for each example; evaluation and answers use the first template of the kind.
        title_separator: text between two titles.
        candidate_order: "given" shows candidates in the order in which they are passed. "recommender" shows them in the
            order of the frozen recommender's ranking, so that the prompt tells the language model its preference.
        duplicate_titles: "raise" rejects equal titles, "number" appends (2), (3)... to repeated ones.
        max_history: maximum number of titles in a prompt; older ones are cut.

    Source: iLoRA (arXiv 2408.10159). The item head, the candidate loss and the pool are additions of this package.
    """

    model_type = "ilora"
    sub_configs_defaults = {
        "recommender_config": SASRecConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    keys_to_ignore_at_inference = ["logits", "past_key_values", "item_logits", "expert_gates"]

    recommender_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    llm_name_or_path: str | None = None
    llm_revision: str | None = None
    llm_gguf_file: str | None = None
    num_llm_layers: int | None = None
    rank: int = 8
    num_experts: int = 4
    lora_alpha: float | int = 32
    lora_dropout: float | int = 0.1
    target_modules: list[str] = field(default_factory=lambda: list(ALL_LINEAR_MODULES))
    router_type: str = "conv"
    router_top_k: int = 2
    router_noise: float | int = 0.1
    item_placeholders: bool = True
    item_head: str = "none"
    language_loss_weight: float | int = 1.0
    candidate_loss_weight: float | int = 0.0
    item_loss_weight: float | int = 0.0
    recommender_weight: float | int = 0.0
    prompt_templates: list[str] = field(default_factory=lambda: list(PROMPT_TEMPLATES))
    title_separator: str = ", "
    candidate_order: str = "given"
    duplicate_titles: str = "raise"
    max_history: int = 10
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        text_config = self.text_config
        if isinstance(text_config, dict) and text_config.get("model_type", "llama") not in CONFIG_MAPPING:
            # This language model comes with its own code, which defines its configuration class.
            self.text_config = PreTrainedConfig(**text_config)
        super().__post_init__(**kwargs)

    @property
    def num_items(self) -> int | None:
        """Size of the catalogue."""
        config = self.recommender_config
        assert isinstance(config, PreTrainedConfig)  # transformers has made one of a dict or None
        return config.num_items

    def make_llm_path_absolute(self, folder: str | os.PathLike = "") -> None:
        """Make a relative path to the language model's folder absolute, so that it works from any working directory.

        Args:
            folder: the folder that a relative path counts from; if it leads to no folder there, it counts from the
                working directory.
        """
        if self.llm_name_or_path is None:
            return
        for start in (folder, ""):
            path = os.path.join(start, self.llm_name_or_path)
            if os.path.isdir(path):
                self.llm_name_or_path = os.path.abspath(path)
                return

    @property
    def public_llm_name(self) -> str | None:
        """Name of the language model on the Hub; None if it has no name, or only a path on this machine."""
        return EMBEDDED_LLM if self.llm_name_or_path == WHEEL_REQUIREMENT else public_name(self.llm_name_or_path)

    def validate_architecture(self) -> None:
        """Check the ranges of all fields; `@strict_config` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        check_finite(self)
        check_lora_settings(self.rank, self.num_experts, self.lora_alpha, self.lora_dropout)
        for name in ("router_top_k", "max_history"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.num_llm_layers is not None and self.num_llm_layers < 1:
            raise ValueError(f"num_llm_layers is {self.num_llm_layers}: expected at least 1, or None for all")
        if not 0 <= self.recommender_weight < 1:
            raise ValueError(f"recommender_weight is {self.recommender_weight}: expected a weight in [0, 1)")
        if self.router_noise < 0:
            raise ValueError(f"router_noise is {self.router_noise}: expected a standard deviation, at least 0")
        if not self.target_modules:
            raise ValueError("target_modules is empty: expected names of linear layers, such as q_proj")
        allowed_values = {
            "router_type": ROUTER_TYPES,
            "item_head": ITEM_HEADS,
            "candidate_order": CANDIDATE_ORDERS,
            "duplicate_titles": DUPLICATE_TITLES,
        }
        for name, allowed in allowed_values.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.router_type == "top_k" and self.router_top_k > self.num_experts:
            raise ValueError(f"router_top_k is {self.router_top_k}: expected at most num_experts, {self.num_experts}")
        weights = {name: getattr(self, name) for name in LOSS_WEIGHTS}
        if min(weights.values()) < 0 or not any(weights.values()):
            found = ", ".join(f"{name} {weight}" for name, weight in weights.items())
            raise ValueError(f"the loss weights are {found}: expected none below 0 and at least one above")
        if self.item_loss_weight and self.item_head == "none":
            raise ValueError(
                f"item_loss_weight is {self.item_loss_weight} without an item head: set item_head to residual or plain"
            )


def check_lora_settings(rank: int, num_experts: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise a ValueError for settings that `GatedLoraLinear` cannot have."""
    for name, value in (("rank", rank), ("num_experts", num_experts)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    if rank % num_experts:
        raise ValueError(f"rank {rank} is not divisible by num_experts {num_experts}: change one of them")
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha is {lora_alpha}: expected a positive, finite number")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout}: expected a probability in [0, 1)")


def public_name(name: str | None) -> str | None:
    """Return `name` if it is a valid name on the Hub; None for a path on this machine, or no name."""
    if name is None or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:  # a path
        return None
    return name


def check_public_llm(config: ILoraConfig) -> None:
    """Raise a ValueError unless the configuration names a language model that others can load."""
    if config.public_llm_name is None:
        raise ValueError(
            f"the adapter names {config.llm_name_or_path!r} as its language model, which only this machine has: "
            "expected a name on the Hub; push the language model too and set config.llm_name_or_path to its name there "
            "(llm_revision to the commit)"
        )


__all__ = ["ALL_LINEAR_MODULES", "ILoraConfig", "check_lora_settings", "check_public_llm", "public_name"]
