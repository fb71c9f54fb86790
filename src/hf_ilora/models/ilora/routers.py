"""Routers, which map a user embedding to the gates of the LoRA experts (iLoRA)."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_ilora import ROUTER_TYPES

# The convolutional router halves its signal twice: a signal of length 8 leaves 2 positions for batch statistics.
MIN_CONV_GATE_SIZE = 8


class Router(nn.Module):
    """Base of all routers: a softmax over logits that a subclass computes.

    Routers compute in the dtype of their parameters, also under autocast. The cost is negligible, and rounded gates
    would affect every layer of the language model.

    Args:
        gate_size: size of a user embedding, which is the hidden size of the recommender.
        num_experts: number of gates per user.
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
        """Compute the gates of each user.

        Args:
            user_embedding: (batch, gate_size).

        Returns:
            Gates (batch, experts), float32; each row sums to 1.

        Raises:
            ValueError: if the embedding has another shape.
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
    """A linear router that adds Gaussian noise to its logits in training, so that experts near a tie are all used.

    Args:
        noise_std: standard deviation of the noise.
    """

    def __init__(self, gate_size: int, num_experts: int, noise_std: float = 0.1):
        super().__init__(gate_size, num_experts)
        if noise_std < 0:
            raise ValueError(f"noise_std is {noise_std}: expected a standard deviation of at least 0")
        self.noise_std = noise_std

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        if self.training:
            logits = logits + self.noise_std * torch.randn_like(logits)
        return super().gates(logits)


class TopKRouter(LinearRouter):
    """A linear router that keeps `top_k` experts per user; the others get a gate of 0.

    As in the reference program of iLoRA, the second softmax is over the probabilities of the first one instead of the
    logits. Probabilities differ by at most 1, so the gate of a kept expert is at most e times that of another. With
    top_k 1 the gate is always 1, and no gradient reaches the router.

    Args:
        top_k: number of experts to keep.
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
        hidden_size: size of the layer between them.
    """

    def __init__(self, gate_size: int, num_experts: int, hidden_size: int = 128):
        super().__init__(gate_size, num_experts)
        self.hidden = nn.Linear(gate_size, hidden_size)
        self.projection = nn.Linear(hidden_size, num_experts)

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        return self.projection(F.gelu(self.hidden(user_embedding)))


class ConvRouter(Router):
    """The reference program's router: a ResNet over the user embedding, read as a signal of one channel.

    In training, batch normalisation makes a user's gates depend on the other users of the batch; other routers have no
    such dependence. With several processes, each normalises over its own part of the batch, so losses differ from those
    of one process with the whole batch. Evaluation and checkpoints use the running statistics of the first process.

    Source: the program of iLoRA (arXiv 2408.10159); the paper leaves the form of the router open.
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
        # The pooled signal is positive and similar for all users, so torch's default initialisation would favour the
        # same expert for everyone. Logits near zero start from equal gates.
        nn.init.normal_(self.projection.weight, std=1e-3)
        nn.init.zeros_(self.projection.bias)

    def logits(self, user_embedding: torch.Tensor) -> torch.Tensor:
        signal = F.relu(self.norm(self.convolution(user_embedding.unsqueeze(1))))  # (batch, 16, gate_size)
        signal = self.stages(signal)  # (batch, 64, gate_size / 4)
        return self.projection(signal.mean(dim=2))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut around them. A block that adds channels halves the length.

    The shortcut has no parameters: it takes every second position and pads the channels with zeros on both sides.
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

    DeepSpeed casts parameters to bfloat16 and may leave the statistics in float32, a mixture that torch rejects.
    """

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """(batch, channels, length) -> (batch, channels, length), in the dtype of `signal`"""
        dtype = self.running_mean.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        statistics = (self.running_mean, self.running_var)
        normed = F.batch_norm(signal.to(dtype), *statistics, weight, bias, self.training, self.momentum, self.eps)
        return normed.to(signal.dtype)


class SingleExpert(nn.Module):
    """Stands in for a router when there is one expert: its gate is 1, so the gated LoRA is a plain one."""

    def forward(self, user_embedding: torch.Tensor) -> torch.Tensor:
        """(batch, gate_size) -> ones (batch, 1), float32"""
        return torch.ones(user_embedding.shape[0], 1, device=user_embedding.device)


def build_router(
    router_type: str, gate_size: int, num_experts: int, top_k: int = 2, noise_std: float = 0.1
) -> Router | SingleExpert:
    """Build the router that a configuration describes.

    Args:
        router_type: one of `ROUTER_TYPES`.
        gate_size: the recommender's hidden size.
        num_experts: number of experts; 1 gives `SingleExpert` for every type.
        top_k: number of experts that the top_k router keeps.
        noise_std: standard deviation of the noise of the noisy router.

    Raises:
        ValueError: for an unknown type, and for sizes that the router does not accept.
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
    "ConvRouter",
    "LinearRouter",
    "MlpRouter",
    "NoisyRouter",
    "Router",
    "SingleExpert",
    "TopKRouter",
    "build_router",
]
