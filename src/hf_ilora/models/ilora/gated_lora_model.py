"""Gated LoRA on any model: iLoRA's layer, with gates that the caller computes, one vector per row of a batch."""

import copy
import dataclasses
import logging
import os
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hf_ilora.files import folder_written_whole
from hf_ilora.models.next_item.hub_upload import upload
from hf_ilora.models.next_item.next_item_model import check_has_weights
from hf_ilora.models.next_item.saved_model import check_download, saved_file

from .configuration_ilora import public_name
from .gated_lora import GatedLoraLinear, check_tensors, gated_layers, target_layers, wrap_layers
from .gated_lora_config import GatedLoraConfig
from .user_lora import CONFIG_FILE, LORA_FILES, WEIGHTS_FILE

logger = logging.getLogger(__name__)


class _GateStack(threading.local):
    """The gates in use in the calling thread, innermost last: pairs (expert_gates, in_recompute)."""

    def __init__(self) -> None:
        self.entries: list[tuple[torch.Tensor, bool]] = []

    def __reduce__(self) -> tuple:  # a copy starts without gates
        return _GateStack, ()


class _UsedGates(AbstractContextManager):
    """Puts gates on a stack. It may be entered several times: two backwards of one graph recompute twice."""

    def __init__(self, stack: _GateStack, expert_gates: torch.Tensor, in_recompute: bool = False):
        self.stack, self.entry = stack, (expert_gates, in_recompute)

    def __enter__(self) -> None:
        self.stack.entries.append(self.entry)

    def __exit__(self, *error: object) -> None:
        self.stack.entries.pop()


class _GateHook:
    """Forward pre-hook of a gated layer: passes it the gates in use."""

    def __init__(self, name: str, stack: _GateStack):
        self.name, self.stack = name, stack

    def __call__(self, layer: GatedLoraLinear, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        entries = self.stack.entries
        if not entries:
            raise ValueError(
                f"no expert_gates for {self.name}: expected (batch, experts); call the GatedLoraModel with "
                f"expert_gates=..., or inside of `with model.use_gates(...)`{_CHECKPOINTING}"
            )
        expert_gates, in_recompute = entries[-1]
        if not (in_recompute or torch.compiler.is_compiling()) and torch._C._current_graph_task_id() != -1:
            # The gates in use during a backward may be those of another forward.
            raise ValueError(
                f"{self.name} is recomputed without the gates of its forward: expected the same gates{_CHECKPOINTING}"
            )
        return args, kwargs | {"expert_gates": expert_gates.to(args[0].device)}


_CHECKPOINTING = (
    ". With gradient checkpointing: call activation_checkpointing_enable of the GatedLoraModel, not of its base_model, "
    "or pass context_fn=model.checkpoint_contexts, use_reentrant=False to torch.utils.checkpoint.checkpoint"
)


class GatedLoraModel(nn.Module):
    """A frozen model with gated LoRA layers, whose gates the caller passes to every forward.

    The layers are iLoRA's `GatedLoraLinear`. The first dimension of their input must be the batch: layers that see all
    tokens in one dimension, such as those of a mixture of experts, cannot be gated per row.

    `model(..., expert_gates=gates)` also works inside DistributedDataParallel, which passes keywords on. Gradients flow
    into the gates. Several threads may use one model, each with its own gates.

    The state dict contains the adapter alone, even if the model is part of another module. Checkpoints of the Trainer
    and of accelerate therefore stay small, and loading one leaves the frozen model unchanged.

    Args:
        model: any model. It is frozen, and its target layers are replaced in place.
        config: the settings; the model keeps a copy.

    Attributes:
        base_model: the model with the gated layers.
        lora_config: the settings.
        accepts_loss_kwargs: whether the model's forward takes the Trainer's `num_items_in_batch`.

    Raises:
        ValueError: if a target matches no layer or one that is not linear, and for a model with gated layers or with
            weights that are not in memory. The model is then left unchanged.

    Source: iLoRA (arXiv 2408.10159), section 3.
    """

    def __init__(self, model: nn.Module, config: GatedLoraConfig):
        super().__init__()
        check_has_weights(model)
        names = target_layers(model, config.target_modules)
        gated = wrap_layers(model, names, config.rank, config.num_experts, config.lora_alpha, config.lora_dropout)
        self.base_model, self.lora_config = model, copy.deepcopy(config)
        if config.base_model_name_or_path is None and (loaded_from := _name_of(model)) is not None:
            self.lora_config.base_model_name_or_path = loaded_from
            self.lora_config.revision = vars(model.config).get("_commit_hash")  # only set for models from the Hub
        self.accepts_loss_kwargs = _accepts_loss_kwargs(model)
        self._gates = _GateStack()
        self._layer_names = list(gated_layers(model))  # without the second name of a layer that has two
        for name in self._layer_names:
            gated[name].register_forward_pre_hook(_GateHook(name, self._gates), with_kwargs=True)
        self.training = model.training
        self.register_state_dict_post_hook(_keep_adapter)
        self.register_load_state_dict_post_hook(_expect_adapter)

    def forward(self, *args: Any, expert_gates: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Call the model.

        Args:
            args, kwargs: passed on to the model.
            expert_gates: (batch, experts), the gates of each row; None takes those of `use_gates`.

        Returns:
            The output of the model.

        Raises:
            ValueError: if there are no gates, or their shape does not fit.
        """
        if expert_gates is None:
            return self.base_model(*args, **kwargs)
        with self.use_gates(expert_gates):
            return self.base_model(*args, **kwargs)

    def use_gates(self, expert_gates: torch.Tensor) -> AbstractContextManager:
        """Context in which every call of the model in this thread uses these gates, for example in `generate`.

        Args:
            expert_gates: (batch, experts). Where the model repeats rows, as a beam search does, repeat the gates.

        Raises:
            ValueError: for another number of experts; the batch is checked when a layer is called.
        """
        self._check_has_adapter()
        experts = self.lora_config.num_experts
        if not isinstance(expert_gates, torch.Tensor) or expert_gates.dim() != 2 or expert_gates.shape[1] != experts:
            found = (
                f"shape {tuple(expert_gates.shape)}"
                if isinstance(expert_gates, torch.Tensor)
                else f"type {type(expert_gates).__name__}"
            )
            raise ValueError(
                f"expert_gates have {found}: expected a tensor (batch, {experts}), one gate per expert in each row"
            )
        return _UsedGates(self._gates, expert_gates)

    # --- gradient checkpointing ---

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` of `torch.utils.checkpoint.checkpoint`, with `use_reentrant=False`.

        The recompute, which runs in the backward and perhaps in another thread, then uses the gates of its forward.
        """
        entries = self._gates.entries
        recompute = _UsedGates(self._gates, entries[-1][0], in_recompute=True) if entries else nullcontext()
        return nullcontext(), recompute

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing in a model of transformers; the Trainer calls it.

        Raises:
            ValueError: for `use_reentrant=True`, which loses the gradients of the gates, and for a model that is not
                from transformers.
        """
        if not isinstance(self.base_model, PreTrainedModel):
            raise ValueError(
                f"{type(self.base_model).__name__} is not a transformers model: expected one; for other models, pass "
                "context_fn=model.checkpoint_contexts, use_reentrant=False to torch.utils.checkpoint.checkpoint"
            )
        checkpointing = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if checkpointing["use_reentrant"]:
            raise ValueError(
                'gradient checkpointing with use_reentrant=True loses the gradients of the gates: pass {"use_reentrant"'
                ": false}"
            )
        self.base_model.activation_checkpointing_enable(
            checkpointing | {"context_fn": self.checkpoint_contexts}, **kwargs
        )

    # --- what is trained ---

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, for the trained parameters."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def print_trainable_parameters(self) -> None:
        """Print how many parameters are trained, as PEFT does."""
        trained = sum(parameter.numel() for parameter in self.trainable_parameters().values())
        total = sum(parameter.numel() for parameter in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    # --- back to an ordinary model ---

    def unload(self) -> nn.Module:
        """Remove the adapter, in place, and return the original model, frozen."""
        modules = list(self.base_model.named_modules(remove_duplicate=False))  # a layer may have two names
        for name, module in modules:
            if isinstance(module, GatedLoraLinear):
                self.base_model.set_submodule(name, module.base_layer)
        self._layer_names = []
        return self.base_model

    @torch.no_grad()
    def merge_and_unload(self, expert_gates: torch.Tensor) -> nn.Module:
        """Merge the experts into the weights under fixed gates, in place.

        Args:
            expert_gates: (experts,), for example the gates of one user.

        Returns:
            The model, with ordinary linear layers that compute what the gated ones do for these gates.

        Raises:
            ValueError: for gates of another shape, and for a layer whose weight is quantised or shared with another
                module. The model is then left unchanged.
        """
        if expert_gates.shape != (self.lora_config.num_experts,):
            raise ValueError(
                f"expert_gates have shape {tuple(expert_gates.shape)}: expected {(self.lora_config.num_experts,)}, "
                "one gate per expert, since merged weights are the same for all rows"
            )
        owners: dict[torch.Tensor, set[nn.Module]] = {}
        for module in self.base_model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(parameter, set()).add(module)
        for name in self._layer_names:
            base_layer = self.base_model.get_submodule(name).base_layer
            if not isinstance(base_layer, nn.Linear) or not base_layer.weight.is_floating_point():
                raise ValueError(
                    f"{name} is a {type(base_layer).__name__}: expected a linear layer whose weight is in floating "
                    "point; load the model without quantization_config"
                )
            if len(owners[base_layer.weight]) > 1:
                raise ValueError(
                    f"the weight of {name} is shared with another module, which the merge would change: expected an "
                    "unshared weight; untie it first, or keep the adapter"
                )
        for name in self._layer_names:
            layer = self.base_model.get_submodule(name)
            assert isinstance(layer, GatedLoraLinear)
            delta = layer.delta_weight(expert_gates.to(layer.lora_A))
            weight = layer.base_layer.get_parameter("weight")
            weight.copy_(weight + delta)  # the sum is float32 at least, and rounded once
        return self.unload()

    def _check_has_adapter(self) -> None:
        if not self._layer_names:
            raise ValueError(
                f"the adapter of this {type(self.base_model).__name__} was removed: expected a GatedLoraModel with an "
                "adapter; call the model that unload or merge_and_unload returned"
            )

    # --- saving and loading ---

    def adapter_state(self, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """The tensors of the adapter, by their names in the model.

        Args:
            state_dict: state dict of this `GatedLoraModel`, for weights that are partitioned over processes (ZeRO-3);
                None takes the model's own.
        """
        if state_dict is None:
            state_dict = self.state_dict()
        return {name.removeprefix("base_model."): state_dict[name] for name in self._adapter_names()}

    def _adapter_names(self) -> list[str]:
        """Names of the adapter's tensors in the state dict."""
        return [f"base_model.{name}.lora_{matrix}" for name in self._layer_names for matrix in "AB"]

    def save_pretrained(
        self, save_directory: str | os.PathLike, state_dict: dict | None = None, is_main_process: bool = True
    ) -> None:
        """Save the adapter: adapter_config.json and adapter_model.safetensors, without the model's own weights.

        Args:
            save_directory: created if it does not exist; an earlier adapter stays whole until all is written.
            state_dict: as in `adapter_state`.
            is_main_process: False writes nothing.

        Raises:
            ValueError: if the folder contains other files.
        """
        if not is_main_process:
            return
        self._check_has_adapter()
        state = {name: value.contiguous() for name, value in self.adapter_state(state_dict).items()}
        with folder_written_whole(save_directory, LORA_FILES) as unfinished:
            save_file(state, unfinished / WEIGHTS_FILE, {"format": "pt"})
            (unfinished / CONFIG_FILE).write_text(self.lora_config.to_json(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, **arguments: Any) -> CommitInfo:
        """Upload the adapter to the Hub in one commit, with a card if the repository has none.

        The adapter names its base model only if that is a name on the Hub, not a folder on this machine.

        Args:
            repo_id: "user/name"; created if it does not exist.
            arguments: commit_message, private, token, revision, create_pr..., as in `HubUploads.push_to_hub`.

        Raises:
            PermissionError, ValueError, OSError: as in `HubUploads.push_to_hub`.
        """
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            self.save_pretrained(adapter)
            public = public_name(self.lora_config.base_model_name_or_path)
            config = dataclasses.replace(self.lora_config, base_model_name_or_path=public)
            files: dict[str, Path | bytes] = {
                WEIGHTS_FILE: adapter / WEIGHTS_FILE,
                CONFIG_FILE: config.to_json().encode(),
            }
            return upload(files, repo_id, card=self._card, **arguments)

    def _card(self, repo_id: str, existing: str | None) -> str:
        if existing is not None:
            return existing
        public = public_name(self.lora_config.base_model_name_or_path)
        metadata = ModelCardData(
            base_model=public, base_model_relation=public and "adapter", library_name="hf_ilora", tags=["gated-lora"]
        )
        text = (
            f"# {repo_id}\n\nA LoRA of {self.lora_config.num_experts} experts for {public or 'a model'}, mixed for "
            "each row by gates from outside (iLoRA, arXiv 2408.10159).\n\n"
            "```python\nfrom hf_ilora import GatedLoraModel\n\n"
            f'gated = GatedLoraModel.from_pretrained(model, "{repo_id}")\n'
            "gated(**inputs, expert_gates=gates)    # gates: (batch, experts)\n```\n"
        )
        return str(ModelCard(f"---\n{metadata}\n---\n\n{text}"))

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, path: str | os.PathLike, *, is_trainable: bool = False, **hub_arguments: Any
    ) -> "GatedLoraModel":
        """Put a saved adapter on the model that it was trained on.

        Args:
            model: the model, which is changed in place.
            path: folder that `save_pretrained` wrote, or repository on the Hub.
            is_trainable: keep the adapter trainable; otherwise it is frozen and the model is put in evaluation mode.
            hub_arguments: revision, token, cache_dir, local_files_only, subfolder...

        Raises:
            ValueError: if a file is missing or broken, and if the adapter does not fit the model, which is then left
                unchanged.
            OSError: if there is no such folder or repository.
        """
        files = {}
        for name in LORA_FILES:
            file = saved_file(path, name, hub_arguments)
            if file is None:
                raise ValueError(
                    f"{path} has no {name}: expected a folder or repository that GatedLoraModel.save_pretrained wrote"
                )
            files[name] = file
        config = GatedLoraConfig.from_json_file(files[CONFIG_FILE])
        check_download(files[WEIGHTS_FILE], path)
        try:
            state = load_file(files[WEIGHTS_FILE])
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{WEIGHTS_FILE} of {path} is broken ({error}): expected the file that GatedLoraModel.save_pretrained "
                "wrote; restore it"
            ) from error
        adapter = f"the adapter in {path} for {config.base_model_name_or_path or 'an unnamed model'}"
        try:
            names = target_layers(model, config.target_modules)
        except ValueError as error:
            raise ValueError(f"{adapter} does not fit this model: {error}") from error
        _check_state(state, model, names, config, adapter)
        trained_on = config.base_model_name_or_path
        if trained_on is not None and _name_of(model) not in (None, trained_on):
            logger.warning("the adapter in %s was trained on %s, not %s", path, trained_on, _name_of(model))
        gated = cls(model, config)
        with torch.no_grad():
            for name, parameter in gated.trainable_parameters().items():
                parameter.copy_(state[name.removeprefix("base_model.")])
        if not is_trainable:
            gated.requires_grad_(False).eval()
        return gated


def get_gated_lora_model(model: nn.Module, config: GatedLoraConfig) -> GatedLoraModel:
    """Freeze a model and add a gated LoRA to it, in place, as `peft.get_peft_model` adds an ungated one.

    Args:
        model: any model of torch or transformers, such as a language model, an encoder or a vision transformer.
        config: rank, experts, target modules...

    Returns:
        The `GatedLoraModel`. Call it with `expert_gates` (batch, experts); its output is unchanged until it is trained.

    Raises:
        ValueError: see `GatedLoraModel`.
    """
    return GatedLoraModel(model, config)


def _keep_adapter(model: GatedLoraModel, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Remove the frozen model from a state dict."""
    kept = {f"{prefix}{name}" for name in model._adapter_names()}
    for name in [name for name in state_dict if name.startswith(f"{prefix}base_model.") and name not in kept]:
        del state_dict[name]


def _expect_adapter(model: GatedLoraModel, incompatible_keys: Any) -> None:
    """Remove the frozen model's tensors from the missing keys of a loaded state dict."""
    frozen = {f"base_model.{name}" for name in model.base_model.state_dict()} - set(model._adapter_names())
    missing = incompatible_keys.missing_keys  # with the prefixes of the modules around the model

    def is_frozen(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[start:]) in frozen for start in range(len(parts)))

    missing[:] = [name for name in missing if not is_frozen(name)]


def _accepts_loss_kwargs(model: nn.Module) -> bool:
    """Whether the model's forward accepts loss arguments, by the Trainer's rule, which would see only the wrapper."""
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in signature(model.forward).parameters.values())
    return getattr(model, "accepts_loss_kwargs", takes_any)


def _name_of(model: nn.Module) -> str | None:
    """The name or folder that a model of transformers was loaded from."""
    if not isinstance(model, PreTrainedModel) or not model.name_or_path:
        return None
    folder = Path(model.name_or_path)
    return str(folder.resolve()) if folder.is_dir() else model.name_or_path


def _check_state(
    state: dict[str, torch.Tensor], model: nn.Module, names: list[str], config: GatedLoraConfig, origin: str
) -> None:
    """Raise a ValueError unless the tensors of an adapter are those that the model's layers need."""
    first_names: dict[nn.Linear, str] = {}  # a layer with two names is saved under the first
    for name in names:
        first_names.setdefault(cast(nn.Linear, model.get_submodule(name)), name)  # or another with its attributes
    expected: dict[str, tuple[int, ...]] = {}
    for layer, name in first_names.items():
        expected[f"{name}.lora_A"] = (config.rank, layer.in_features)
        expected[f"{name}.lora_B"] = (layer.out_features, config.rank)
    check_tensors(state, expected, origin, f"{len(first_names)} layers of {type(model).__name__}")


__all__ = ["GatedLoraModel", "get_gated_lora_model"]
