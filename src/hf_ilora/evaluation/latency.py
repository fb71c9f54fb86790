"""Measures the serving cost of a model: its size and the time of one recommendation."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation


@dataclass(frozen=True)
class Latency:
    """The time of `recommend` for one user at a time.

    Args:
        p50_ms: median, milliseconds.
        p95_ms: 95th percentile, milliseconds.
        num_calls: number of calls.
        threads: number of CPU threads of torch.
        device: device of the model.
    """

    p50_ms: float
    p95_ms: float
    num_calls: int
    threads: int
    device: str


@dataclass(frozen=True)
class ModelSize:
    """The size of a model.

    Args:
        num_parameters: number of parameters and of saved buffers (recommenders that count have buffers only); shared
            tensors count once.
        num_bytes: size of the weight files; for an iLoRA, size of all tensors, because its folder lacks the language
            model.
    """

    num_parameters: int
    num_bytes: int


def measure_latency(
    model,
    histories: Sequence[np.ndarray],
    *,
    top_k: int = 10,
    num_warm_up: int = 20,
    threads: int = 1,
) -> Latency:
    """Time `recommend` for one user at a time, with the history in memory and seen items excluded.

    Args:
        model: has `recommend(histories, top_k)` and `device`.
        histories: the item ids of each user, (length,), oldest first; each is timed in one call.
        top_k: items to recommend.
        num_warm_up: number of calls before the measurement, with the first histories.
        threads: number of CPU threads during the measurement; the previous number is restored afterwards.

    Returns:
        Median and 95th percentile over the histories.

    Raises:
        ValueError: for no histories and numbers out of range.
    """
    if not len(histories):
        raise ValueError("there are no histories to time: expected at least one, and 100 or more for a percentile")
    if threads < 1 or num_warm_up < 0:
        raise ValueError(f"threads is {threads} and num_warm_up {num_warm_up}: expected at least 1 and at least 0")
    rows = [torch.as_tensor(history, dtype=torch.int64, device=model.device).unsqueeze(0) for history in histories]
    former_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in range(num_warm_up):
            model.recommend(rows[call % len(rows)], top_k=top_k)
        seconds = [_time_of_call(model, row, top_k) for row in rows]
    finally:
        torch.set_num_threads(former_threads)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return Latency(float(p50), float(p95), len(seconds), threads, str(model.device))


def _time_of_call(model, history: torch.Tensor, top_k: int) -> float:
    start = time.perf_counter()
    item_ids, _ = model.recommend(history, top_k=top_k)
    # Copying the result waits until an accelerator has computed it.
    item_ids.cpu()
    return time.perf_counter() - start


def model_size(model: torch.nn.Module, folder: Path) -> ModelSize:
    """Number of parameters and size in bytes of a model.

    Args:
        model: the model in `folder`.
        folder: contains its `*.safetensors`.

    Raises:
        ValueError: when the folder has no weight files.
    """
    # Tied weights are one tensor under two names.
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: expected a folder that save_pretrained wrote")
    return ModelSize(
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=sum(tensor.nbytes for tensor in tensors.values())
        if isinstance(model, ILoraForRecommendation)
        else sum(file.stat().st_size for file in files),
    )
