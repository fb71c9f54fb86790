"""LoRA whose rank is divided among experts, mixed by one gate per sequence (iLoRA)."""

import math
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .configuration_ilora import check_lora_settings

ALL_LINEAR = "all-linear"
# Modules that read the weights of their linear layers instead of calling the layers: the first always, the second in
# its fast path for evaluation.
_WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _HandedGates(threading.local):
    """Gates that a hook hands to one gated layer, for its next forward in the calling thread only.

    Several threads may call one model at once, and the recompute of gradient checkpointing may run in a thread of
    autograd.
    """

    gates: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        """Remove the gates and return them."""
        gates, self.gates = self.gates, None
        return gates

    def __reduce__(self) -> tuple:  # a copy starts without gates
        return _HandedGates, ()


class GatedLoraLinear(nn.Module):
    """A frozen linear layer plus a LoRA of `num_experts` experts of rank / num_experts each.

    A (rank, in) is divided into experts A_e by rows, and B (out, rank) into B_e by columns:

        y = W x + lora_alpha / (rank / num_experts) * sum_e g_e B_e A_e dropout(x)

    The gates scale the rank states, `B ((A x) * repeat(g))`: one matmul for all experts. Computing the experts one by
    one would need a (batch, tokens, experts, out) tensor. With one expert this is plain LoRA.

    Args:
        base_layer: any layer with `in_features` and `out_features` that maps (..., in) to (..., out), possibly
            quantised; it is not trained.
        rank: rank of all experts together.
        num_experts: number of experts; divides `rank`.
        lora_alpha: numerator of the scale, see above.
        lora_dropout: dropout probability on the input of the experts.

    The adapter is float32, regardless of the dtype of the base layer.

    Raises:
        ValueError: for a rank that the experts cannot share, and numbers out of range.

    Source: iLoRA (arXiv 2408.10159), section 3.
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, num_experts: int, lora_alpha: float, lora_dropout: float = 0.0
    ):
        super().__init__()
        check_lora_settings(rank, num_experts, lora_alpha, lora_dropout)
        self.base_layer = base_layer
        self.rank = rank  # under ZeRO-3 parameters have shape (0,) outside of forward
        self.num_experts = num_experts
        self.scaling = lora_alpha / (rank // num_experts)
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        # Sizes come from the features, since the weight has shape (0,) under ZeRO-3.
        linear = cast(nn.Linear, base_layer)  # of which it has these two attributes
        device = next((parameter.device for parameter in base_layer.parameters()), None)
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self._handed = _HandedGates()  # filled by `_GateHook` before each forward

    def extra_repr(self) -> str:
        return f"rank={self.rank}, num_experts={self.num_experts}, scaling={self.scaling:g}"

    def hand_gates(self, expert_gates: torch.Tensor | None) -> None:
        """Set the gates, (batch, experts), for the next forward of the calling thread only."""
        self._handed.gates = expert_gates

    def forward(self, hidden_states: torch.Tensor, expert_gates: torch.Tensor | None = None) -> torch.Tensor:
        """Apply the layer.

        Args:
            hidden_states: (batch, ..., in), for example (batch, tokens, in).
            expert_gates: (batch, experts); None takes those set by `hand_gates`.

        Returns:
            (batch, ..., out), in the dtype of the base layer's output.

        Raises:
            ValueError: if there are no gates, or they have another shape.
        """
        handed_gates = self._handed.take()
        gates = handed_gates if expert_gates is None else expert_gates
        if gates is None:
            raise ValueError(
                "no expert_gates reached this layer: expected (batch, experts); pass expert_gates to the forward of "
                "the language model, whose attention modules must receive its keywords"
            )
        if gates.shape != (hidden_states.shape[0], self.num_experts):
            raise ValueError(
                f"expert_gates have shape {tuple(gates.shape)}: expected {(hidden_states.shape[0], self.num_experts)}, "
                "(batch, experts); repeat the gates where sequences are repeated"
            )
        output = self.base_layer(hidden_states)  # (batch, ..., out)
        rank_gates = self._rank_gates(gates)  # (batch, rank)
        rank_gates = rank_gates.view(len(gates), *[1] * (hidden_states.dim() - 2), self.rank)  # (batch, 1..., rank)
        # Computed in the dtype of the hidden states, since casting the states would cost more than the adapter. The
        # parameters stay float32, so that small optimizer steps are not rounded away.
        dtype = hidden_states.dtype
        rank_states = F.linear(self.dropout(hidden_states), self.lora_A.to(dtype))  # (batch, ..., rank)
        gated = (rank_states * rank_gates.to(rank_states.dtype)).flatten(0, -2)  # (batch * tokens, rank)
        # Product and sum in one operation, which saves one pass over the output.
        to_output = self.lora_B.to(output.dtype).t()  # (rank, out)
        return torch.addmm(output.flatten(0, -2), gated.to(output.dtype), to_output).view_as(output)

    def delta_weight(self, expert_gates: torch.Tensor) -> torch.Tensor:
        """Compute the matrix that the experts add to the weight of the base layer under fixed gates.

        Args:
            expert_gates: (experts,).

        Returns:
            (out, in), float32.
        """
        return (self.lora_B * self._rank_gates(expert_gates)) @ self.lora_A

    def _rank_gates(self, expert_gates: torch.Tensor) -> torch.Tensor:
        """Scale the gates (..., experts) and repeat each for all ranks of its expert: (..., rank)."""
        return (expert_gates * self.scaling).repeat_interleave(self.rank // self.num_experts, dim=-1)


def check_tensors(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], origin: str, owner: str
) -> None:
    """Raise a ValueError unless a saved adapter has exactly the tensors that its model needs.

    Args:
        state: the saved tensors.
        expected: name -> shape of each tensor that the model needs.
        origin: the place that the tensors came from, for messages.
        owner: the model that needs the tensors, for messages.
    """
    remedy = "load it on the model that it was trained on, or restore the folder that save_pretrained wrote"
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{origin} lacks {len(missing)} tensors ({missing[:5] or 'none'}) and has {len(unexpected)} unexpected "
            f"ones ({unexpected[:5] or 'none'}): expected those of {owner}; {remedy}"
        )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(
                f"{name} of {origin} has shape {tuple(state[name].shape)}: expected {shape} for {owner}; {remedy}"
            )


def target_layers(model: nn.Module, target_modules: Iterable[str] | str, inside: str = "") -> list[str]:
    """Find the linear layers of a model that will get experts, without changing the model.

    Args:
        model: a model without gated layers.
        target_modules: names of linear layers or ends of them, such as "q_proj" or "self_attn.q_proj"; or one regular
            expression that matches whole names; or "all-linear", for every linear layer except the output embeddings
            of a transformers model. PEFT's `target_modules` means the same.
        inside: name of the submodule to search; "" searches the whole model.

    Returns:
        Names of layers.

    Raises:
        ValueError: if there are no targets, if one of them matches no layer or one that is not linear or cannot be
            replaced, and if the model has gated layers already.
    """
    kind = type(model).__name__
    if not target_modules:
        raise ValueError("target_modules is empty: expected names of linear layers, such as q_proj")
    if gated_layers(model):
        raise ValueError(f"{kind} has gated LoRA layers already: expected a model without them; load it again")
    # A layer with two names is found under both.
    modules = dict(model.get_submodule(inside).named_modules(prefix=inside, remove_duplicate=False))
    modules.pop(inside)
    linear = {name: module for name, module in modules.items() if _is_linear(module)}
    offered = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "a linear layer, and it has none"
    if target_modules == ALL_LINEAR:
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        names = [name for name in linear if linear[name] is not output and _reader(model, name) is None]
        unmatched = [] if names else [ALL_LINEAR]
    elif isinstance(target_modules, str):
        try:
            names = [name for name in modules if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ValueError(
                f"target_modules is {target_modules!r}: expected a valid regular expression ({error}); fix it"
            ) from error
        unmatched = [] if names else [repr(target_modules)]
    else:
        found = {target: [name for name in modules if f".{name}".endswith(f".{target}")] for target in target_modules}
        unmatched = sorted(target for target, its_names in found.items() if not its_names)
        matched = set().union(*found.values())
        names = [name for name in modules if name in matched]
    for name in names:
        if name not in linear:
            raise ValueError(
                f"{name} is a {type(modules[name]).__name__}: expected a linear layer; change target_modules"
            )
        if (reader := _reader(model, name)) is not None:
            raise ValueError(
                f"{name} belongs to a {reader}, which reads its weight and may not call it: expected a layer that is "
                "called; change target_modules"
            )
    if unmatched:
        raise ValueError(f"target_modules {', '.join(unmatched)} match nothing in {kind}: expected some of {offered}")
    return names


def wrap_layers(
    model: nn.Module, names: Iterable[str], rank: int, num_experts: int, lora_alpha: float, lora_dropout: float
) -> dict[str, GatedLoraLinear]:
    """Freeze a model and put a `GatedLoraLinear` around some of its layers, in place.

    Args:
        model: any module.
        names: names of layers, as `target_layers` returns them.
        rank, num_experts, lora_alpha, lora_dropout: arguments of every `GatedLoraLinear`.

    Returns:
        Name -> gated layer. A layer with two names stays one layer.
    """
    check_lora_settings(rank, num_experts, lora_alpha, lora_dropout)  # before anything changes
    model.requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in names}
    gated = {}
    for layer in layers.values():
        if layer not in gated:
            gated[layer] = GatedLoraLinear(layer, rank, num_experts, lora_alpha, lora_dropout).train(layer.training)
    for name, layer in layers.items():
        model.set_submodule(name, gated[layer])
    return {name: gated[layer] for name, layer in layers.items()}


def add_gated_lora(
    llm: PreTrainedModel,
    target_modules: Iterable[str],
    rank: int,
    num_experts: int,
    lora_alpha: float,
    lora_dropout: float,
) -> list[str]:
    """Freeze a language model and wrap its linear layers, in place.

    Afterwards its forward requires the keyword `expert_gates` (batch, experts). A hook on the attention of each decoder
    layer removes the keyword and hands the gates to all gated layers of that decoder layer. Attention runs first in a
    decoder layer, also when gradient checkpointing recomputes the layer, so no layer sees the gates of another call.
    Several threads may call the language model at once.

    Args:
        llm: a causal language model.
        target_modules: last parts of the names of the linear layers, such as "q_proj".
        rank, num_experts, lora_alpha, lora_dropout: arguments of every `GatedLoraLinear`.

    Returns:
        The names of the wrapped layers.

    Raises:
        ValueError: if a target matches no layer, a layer that is not linear, or a decoder layer without attention, and
            if the language model already has gated layers. The language model is then left unchanged.
    """
    decoder = llm.get_decoder()
    layers = dict(decoder.named_children()).get("layers")
    if layers is None:
        raise ValueError(
            f"{type(decoder).__name__} has no layers (it has {', '.join(dict(decoder.named_children()))}): expected a "
            "decoder as in Llama, Mistral, Qwen or Gemma"
        )
    inside = next(name for name, module in llm.named_modules() if module is layers)
    names = target_layers(llm, target_modules, inside)
    names_of = {
        index: [name for name in names if name.startswith(f"{inside}.{index}.")] for index in range(len(layers))
    }
    attention_of = {index: _attention(layers[index], f"{inside}.{index}") for index in names_of if names_of[index]}
    gated = wrap_layers(llm, names, rank, num_experts, lora_alpha, lora_dropout)
    for index, attention in attention_of.items():
        hook = _GateHook([gated[name] for name in names_of[index]])
        attention.register_forward_pre_hook(hook, with_kwargs=True)
    return names


def gated_layers(model: nn.Module) -> dict[str, GatedLoraLinear]:
    """Name -> layer, for the gated layers of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GatedLoraLinear)}


class _GateHook:
    """Forward pre-hook of an attention module: moves `expert_gates` from its keywords to the gated layers."""

    def __init__(self, gated: list[GatedLoraLinear]):
        self.gated = gated

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        expert_gates = kwargs.pop("expert_gates", None)
        for layer in self.gated:
            layer.hand_gates(expert_gates)
        return args, kwargs


def _is_linear(module: nn.Module) -> bool:
    return {"in_features", "out_features"} <= set(dir(module))


def _reader(model: nn.Module, name: str) -> str | None:
    """The class of a layer's parent if that may read the layer's weight and so bypass the experts; else None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return type(parent).__name__ if isinstance(parent, _WEIGHT_READERS) else None


def _attention(layer: nn.Module, name: str) -> nn.Module:
    attention = dict(layer.named_children()).get("self_attn")
    if attention is None:
        raise ValueError(
            f"{name} has no self_attn (it has {', '.join(dict(layer.named_children()))}): expected decoder layers as "
            "in Llama, Mistral, Qwen or Gemma, whose attention passes the gates on"
        )
    return attention


__all__ = ["ALL_LINEAR", "GatedLoraLinear", "add_gated_lora", "check_tensors", "gated_layers", "target_layers"]
__all__ += ["wrap_layers"]
