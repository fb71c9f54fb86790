"""What a model costs to serve: time of one recommendation, and size."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation


@dataclass(frozen=True)
class Latency:
    """Time of `recommend` for one user at a time.

    Args:
        p50_ms: median, milliseconds.
        p95_ms: 95th percentile, milliseconds.
        num_calls: calls measured.
        threads: threads of the CPU that torch was given.
        device: where the model was.
    """

    p50_ms: float
    p95_ms: float
    num_calls: int
    threads: int
    device: str


@dataclass(frozen=True)
class ModelSize:
    """How big a model is.

    Args:
        num_parameters: numbers the model holds: parameters, and buffers that are saved (a recommender that counts has
            nothing else); shared tensors count once.
        num_bytes: size of its weight files; of its tensors for an iLoRA, whose language model lies elsewhere.
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
    """Time `recommend` for one user at a time, history in memory, seen items left out.

    Args:
        model: has `recommend(input_ids, top_k)` and `device`.
        histories: (length,) item ids of one user each, oldest first; each is asked once, in turn.
        top_k: items to recommend.
        num_warm_up: calls before the first that is measured; they take the histories from the start.
        threads: threads of the CPU that torch may use meanwhile; the former number is restored.

    Returns:
        Median and 95th percentile over the histories.

    Raises:
        ValueError: for no histories, and numbers out of range.
    """
    if not len(histories):
        raise ValueError("there are no histories to time: expected at least one, and 100 or more for a percentile")
    if threads < 1 or num_warm_up < 0:
        raise ValueError(f"threads is {threads} and num_warm_up {num_warm_up}: expected at least 1 and at least 0")
    inputs = [torch.as_tensor(history, dtype=torch.int64, device=model.device).unsqueeze(0) for history in histories]
    former_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for call in range(num_warm_up):
            model.recommend(inputs[call % len(inputs)], top_k=top_k)
        seconds = [_time_of_call(model, input_ids, top_k) for input_ids in inputs]
    finally:
        torch.set_num_threads(former_threads)
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    return Latency(float(p50), float(p95), len(seconds), threads, str(model.device))


def _time_of_call(model, input_ids: torch.Tensor, top_k: int) -> float:
    start = time.perf_counter()
    item_ids, _ = model.recommend(input_ids, top_k=top_k)
    # Work on an accelerator is not done before its result has been fetched.
    item_ids.cpu()
    return time.perf_counter() - start


def model_size(model: torch.nn.Module, folder: Path) -> ModelSize:
    """Numbers a model holds, and bytes of its weights.

    Args:
        model: what was loaded from `folder`.
        folder: holds its `*.safetensors`.

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
