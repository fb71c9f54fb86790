"""Routers: a user's embedding becomes the gates that mix the LoRA experts (iLoRA)."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ilora import ROUTER_TYPES

# The convolutional router halves its signal twice; from 8 numbers at least 2 places are left for batch statistics.
MIN_CONV_GATE_SIZE = 8


class Router(nn.Module):
    """The frame of every router: logits of a subclass, softmax over the experts.

    It computes in the dtype of its parameters, also under autocast: it costs next to nothing, and rounded gates would
    touch every layer of the language model.

    Args:
        gate_size: numbers in a user embedding, the hidden size of the recommender.
        num_experts: gates per user.
    """

    def __init__(self, gate_size: int, num_experts: int):
        super().__init__()
        if gate_size < 1 or num_experts < 2:
            raise ValueError(
                f"gate_size is {gate_size} and num_experts {num_experts}: expected at least 1 and 2; with one expert "
                "use SingleExpert"
            )
        self.gate_size = gate_size
        self.num_experts = num_experts

    def forward(self, user_embedding: torch.Tensor) -> torch.Tensor:
        """Mix the experts for each user.

        Args:
            user_embedding: (batch, gate_size).

        Returns:
            Gates (batch, experts), float32; each row sums to 1.

        Raises:
            ValueError: when the embedding has another shape.
        """
        if user_embedding.ndim != 2 or user_embedding.shape[1] != self.gate_size:
            raise ValueError(
                f"user_embedding has shape {tuple(user_embedding.shape)}: expected (batch, {self.gate_size}); build "
                "the router with gate_size equal to the recommender's hidden size"
            )
        with torch.autocast(user_embedding.device.type, enabled=False):
            logits = self.logits(user_embedding.to(next(self.parameters()).dtype))  # (batch, experts)
            return self.gates(logits.float())

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        """(batch, gate_size) -> (batch, experts)"""
        raise NotImplementedError

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """(batch, experts) -> (batch, experts)"""
        return logits.softmax(dim=1)


class LinearRouter(Router):
    """One linear layer without bias."""

    def __init__(self, gate_size: int, num_experts: int):
        super().__init__(gate_size, num_experts)
        self.projection = nn.Linear(gate_size, num_experts, bias=False)

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        return self.projection(user_embedding)


class NoisyRouter(LinearRouter):
    """A linear router with normal noise on its logits in training, so that experts near a tie are all tried.

    Args:
        noise_std: standard deviation of the noise.
    """

    def __init__(self, gate_size: int, num_experts: int, noise_std: float = 0.1):
        super().__init__(gate_size, num_experts)
        if noise_std < 0:
            raise ValueError(f"noise_std is {noise_std}: expected a standard deviation, 0 or more")
        self.noise_std = noise_std

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        if self.training:
            logits = logits + self.noise_std * torch.randn_like(logits)
        return super().gates(logits)


class TopKRouter(LinearRouter):
    """A linear router that keeps `top_k` experts per user; the others get a gate of 0.

    As published, the second softmax is taken over the probabilities of the first and not over the logits. Probabilities
    differ by at most 1, so that no kept expert gets more than e times the gate of another. With top_k 1 the kept gate
    is always 1: no gradient reaches the router.

    Args:
        top_k: experts kept.
    """

    def __init__(self, gate_size: int, num_experts: int, top_k: int = 2):
        super().__init__(gate_size, num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}: expected 1 to {num_experts}, the number of experts")
        self.top_k = top_k

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        kept, experts = logits.softmax(dim=1).topk(self.top_k, dim=1)  # (batch, top_k) each
        return torch.zeros_like(logits).scatter(1, experts, kept.softmax(dim=1))


class MlpRouter(Router):
    """Two linear layers with a GELU between them.

    Args:
        hidden_size: numbers between them.
    """

    def __init__(self, gate_size: int, num_experts: int, hidden_size: int = 128):
        super().__init__(gate_size, num_experts)
        self.hidden = nn.Linear(gate_size, hidden_size)
        self.projection = nn.Linear(hidden_size, num_experts)

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        return self.projection(F.gelu(self.hidden(user_embedding)))


class ConvRouter(Router):
    """The published router: a ResNet over the user embedding, read as a signal of one channel.

    In training the gates of a user depend on the other users of the batch, through batch normalisation. Of several
    processes each normalises over its own part of the batch; the running statistics that evaluation uses, and that are
    saved, are the first process's. Losses so differ from those of one process with the whole batch; the other routers'
    do not.

    Source: iLoRA (arXiv 2408.10159) names a sequence encoder without its form; this is the published program's.
    """

    def __init__(self, gate_size: int, num_experts: int):
        super().__init__(gate_size, num_experts)
        if gate_size < MIN_CONV_GATE_SIZE:
            raise ValueError(
                f"gate_size is {gate_size}: expected at least {MIN_CONV_GATE_SIZE} for the conv router; use the linear "
                "or mlp router"
            )
        self.convolution = nn.Conv1d(1, 16, kernel_size=3, padding=1, bias=False)
        self.norm = BatchNorm(16)
        self.stages = nn.Sequential(
            *(ResidualBlock(16, 16) for _ in range(3)),
            *(ResidualBlock(16 if first else 32, 32) for first in (True, False, False)),
            *(ResidualBlock(32 if first else 64, 64) for first in (True, False, False)),
        )
        self.projection = nn.Linear(64, num_experts)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # The pooled signal is positive and much alike for all users: torch's default would begin with a favourite
        # expert for everyone. Near-zero logits begin with equal gates.
        nn.init.normal_(self.projection.weight, std=1e-3)
        nn.init.zeros_(self.projection.bias)

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        signal = F.relu(self.norm(self.convolution(user_embedding.unsqueeze(1))))  # (batch, 16, gate_size)
        signal = self.stages(signal)  # (batch, 64, gate_size / 4)
        return self.projection(signal.mean(dim=2))


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut; more channels out than in means half the length.

    The shortcut has no parameters: it takes every second place and adds channels of zeros on both sides.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.new_channels = out_channels - in_channels
        self.stride = 2 if self.new_channels else 1
        self.convolution1 = nn.Conv1d(
            in_channels, out_channels, kernel_size=3, stride=self.stride, padding=1, bias=False
        )
        self.norm1 = BatchNorm(out_channels)
        self.convolution2 = nn.Conv1d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = BatchNorm(out_channels)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """(batch, in channels, length) -> (batch, out channels, length / stride)"""
        half = self.new_channels // 2
        shortcut = F.pad(signal[:, :, :: self.stride], (0, 0, half, half))
        signal = F.relu(self.norm1(self.convolution1(signal)))
        return F.relu(self.norm2(self.convolution2(signal)) + shortcut)


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation in the dtype of its running statistics.

    DeepSpeed casts parameters to bfloat16 and may leave the statistics in float32, a mixture that torch refuses.
    """

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """(batch, channels, length) -> (batch, channels, length), in the dtype of `signal`"""
        dtype = self.running_mean.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        statistics = (self.running_mean, self.running_var)
        normed = F.batch_norm(signal.to(dtype), *statistics, weight, bias, self.training, self.momentum, self.eps)
        return normed.to(signal.dtype)


class SingleExpert(nn.Module):
    """No router: the only expert's gate is 1, which makes a gated LoRA a plain one."""

    def forward(self, user_embedding: torch.Tensor) -> torch.Tensor:
        """(batch, gate_size) -> ones (batch, 1), float32"""
        return torch.ones(user_embedding.shape[0], 1, device=user_embedding.device)


def build_router(
    router_type: str, gate_size: int, num_experts: int, top_k: int = 2, noise_std: float = 0.1
) -> Router | SingleExpert:
    """The router of a configuration.

    Args:
        router_type: one of `ROUTER_TYPES`.
        gate_size: the recommender's hidden size.
        num_experts: 1 gives `SingleExpert` whatever the type.
        top_k: experts that the top_k router keeps.
        noise_std: of the noisy router.

    Raises:
        ValueError: for an unknown type, or what the router refuses.
    """
    if router_type not in ROUTER_TYPES:
        raise ValueError(f"router_type is {router_type!r}: expected one of {', '.join(ROUTER_TYPES)}")
    if num_experts == 1:
        return SingleExpert()
    if router_type == "top_k":
        return TopKRouter(gate_size, num_experts, top_k)
    if router_type == "noisy":
        return NoisyRouter(gate_size, num_experts, noise_std)
    return {"conv": ConvRouter, "linear": LinearRouter, "mlp": MlpRouter}[router_type](gate_size, num_experts)


__all__ = [
    "ROUTER_TYPES",
    "ConvRouter",
    "LinearRouter",
    "MlpRouter",
    "NoisyRouter",
    "Router",
    "SingleExpert",
    "TopKRouter",
    "build_router",
]
