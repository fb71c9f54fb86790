"""LoRA whose rank is divided among experts, mixed by one gate per sequence (iLoRA)."""

import math
import threading
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


class _HandedGates(threading.local):
    """Gates on their way from the attention of a decoder layer to one gated layer, seen by the calling thread only.

    Several threads may ask one model at once, and the recompute of gradient checkpointing may run in a thread of
    autograd.
    """

    gates: torch.Tensor | None = None

    def take(self) -> torch.Tensor | None:
        """Remove the gates and return them."""
        gates, self.gates = self.gates, None
        return gates

    def __reduce__(self):  # a copy starts without gates
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

    The adapter is float32, whatever the dtype of the base layer.

    Raises:
        ValueError: for a rank that the experts cannot share, and numbers out of range.

    Source: iLoRA (arXiv 2408.10159), section 3.
    """

    def __init__(
        self, base_layer: nn.Module, rank: int, num_experts: int, lora_alpha: float, lora_dropout: float = 0.0
    ):
        super().__init__()
        if rank < 1 or num_experts < 1 or rank % num_experts:
            raise ValueError(
                f"rank {rank} cannot be divided among {num_experts} experts: expected a multiple of num_experts"
            )
        if not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {lora_alpha}: expected a positive, finite number")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}: expected a probability in [0, 1)")
        self.base_layer = base_layer
        self.rank = rank  # under ZeRO-3 parameters have shape (0,) outside of forward
        self.num_experts = num_experts
        self.scaling = lora_alpha / (rank // num_experts)
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        # Sizes come from the features, since the weight has shape (0,) under ZeRO-3.
        device = next((parameter.device for parameter in base_layer.parameters()), None)
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=torch.float32, device=device))
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
            hidden_states: (batch, tokens, in).
            expert_gates: (batch, experts); None takes those set by `hand_gates`.

        Returns:
            (batch, tokens, out), in the dtype of the base layer's output.

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
        output = self.base_layer(hidden_states)  # (batch, tokens, out)
        # each expert's gate for each of its ranks: (batch, rank), then (batch, 1, rank)
        rank_gates = (gates * self.scaling).repeat_interleave(self.rank // self.num_experts, dim=1).unsqueeze(1)
        # Computed in the dtype of the hidden states, since casting the states would cost more than the adapter. The
        # parameters stay float32, so that small optimizer steps are not rounded away.
        dtype = hidden_states.dtype
        rank_states = F.linear(self.dropout(hidden_states), self.lora_A.to(dtype))  # (batch, tokens, rank)
        gated = (rank_states * rank_gates.to(rank_states.dtype)).flatten(0, 1)  # (batch * tokens, rank)
        # Product and sum in one operation, which saves one pass over the output.
        to_output = self.lora_B.to(output.dtype).t()  # (rank, out)
        return torch.addmm(output.flatten(0, 1), gated.to(output.dtype), to_output).view_as(output)


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
    layer takes the keyword and passes it to all gated layers of that decoder layer. Attention runs first in a decoder
    layer, also when gradient checkpointing recomputes the layer, so no layer sees the gates of another call. Several
    threads may call the language model at once.

    Args:
        llm: a causal language model.
        target_modules: last parts of the names of the linear layers, such as "q_proj".
        rank, num_experts, lora_alpha, lora_dropout: arguments of every `GatedLoraLinear`.

    Returns:
        The names of the wrapped layers.

    Raises:
        ValueError: if a target matches no layer, a layer that is not linear, or a decoder layer without attention, and
            if the language model has gated layers already. It is left unchanged then.
    """
    targets = set(target_modules)
    if not targets:
        raise ValueError("target_modules is empty: expected names of linear layers, such as q_proj")
    if gated_layers(llm):
        raise ValueError(
            f"{type(llm).__name__} has gated LoRA layers already: expected a language model without them; load it again"
        )
    decoder = llm.get_decoder()
    layers = dict(decoder.named_children()).get("layers")
    if layers is None:
        raise ValueError(
            f"{type(decoder).__name__} has no layers (it has {', '.join(dict(decoder.named_children()))}): expected a "
            "decoder as in Llama, Mistral, Qwen or Gemma"
        )
    prefix = next(name for name, module in llm.named_modules() if module is layers)
    found, plan = set(), []  # everything is checked before anything changes
    for index, layer in enumerate(layers):
        names = [name for name, _ in layer.named_modules() if name.rpartition(".")[2] in targets]
        for name in names:
            module = layer.get_submodule(name)
            if not _is_linear(module):
                raise ValueError(
                    f"{prefix}.{index}.{name} is a {type(module).__name__}: expected a linear layer; change "
                    "target_modules"
                )
            found.add(name.rpartition(".")[2])
        if names:
            plan.append((f"{prefix}.{index}", layer, names, _attention(layer, f"{prefix}.{index}")))
    if found != targets:
        linear = sorted({name.rpartition(".")[2] for name, module in layers.named_modules() if _is_linear(module)})
        raise ValueError(
            f"target_modules {', '.join(sorted(targets - found))} match nothing in {type(llm).__name__}: expected "
            f"some of {', '.join(linear)}"
        )
    llm.requires_grad_(False)
    wrapped = []
    for layer_name, layer, names, attention in plan:
        gated = []
        for name in names:
            linear = layer.get_submodule(name)
            gated.append(GatedLoraLinear(linear, rank, num_experts, lora_alpha, lora_dropout))
            layer.set_submodule(name, gated[-1])
            wrapped.append(f"{layer_name}.{name}")
        attention.register_forward_pre_hook(_GateHook(gated), with_kwargs=True)
    return wrapped


def gated_layers(llm: PreTrainedModel) -> dict[str, GatedLoraLinear]:
    """Map the names of the gated layers of a language model to the layers."""
    return {name: module for name, module in llm.named_modules() if isinstance(module, GatedLoraLinear)}


class _GateHook:
    """Forward pre-hook of an attention module: moves `expert_gates` from its keywords to the gated layers."""

    def __init__(self, gated: list[GatedLoraLinear]):
        self.gated = gated

    def __call__(self, module, args, kwargs):
        expert_gates = kwargs.pop("expert_gates", None)
        for layer in self.gated:
            layer.hand_gates(expert_gates)
        return args, kwargs


def _is_linear(module: nn.Module) -> bool:
    return {"in_features", "out_features"} <= set(dir(module))


def _attention(layer: nn.Module, name: str) -> nn.Module:
    attention = dict(layer.named_children()).get("self_attn")
    if attention is None:
        raise ValueError(
            f"{name} has no self_attn (it has {', '.join(dict(layer.named_children()))}): expected decoder layers as "
            "in Llama, Mistral, Qwen or Gemma, whose attention passes the gates on"
        )
    return attention


__all__ = ["GatedLoraLinear", "add_gated_lora", "gated_layers"]
