"""Caches title embeddings in files, so that each model encodes the same titles once."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_ilora.downloads import default_cache_dir
from hf_ilora.files import written_whole

logger = logging.getLogger(__name__)

_NAME = "embeddings"


def cached_embeddings(
    titles: list[str], settings: dict, encode: Callable[[], torch.Tensor], cache_dir: str | Path | None = None
) -> torch.Tensor:
    """The embeddings of `titles`, (titles, size), from the cache or from `encode`.

    Processes that need the same embeddings at the same time wait for the first one. If the cache cannot be written or
    its file is broken, `encode` computes them again.

    Args:
        titles: (titles,) texts to encode.
        settings: everything else that the embeddings depend on, JSON types only.
        encode: computes the embeddings.
        cache_dir: parent folder; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.
    """
    digest = hashlib.sha256(json.dumps([settings, titles], sort_keys=True).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "title_embeddings"
    path = folder / f"{digest[:32]}.safetensors"
    cached = _read(path, len(titles))
    if cached is not None:
        return cached
    lock = FileLock(f"{path}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        logger.warning("%s cannot be written (%s): these title embeddings are not cached", folder, error)
        return encode()
    try:
        cached = _read(path, len(titles))
        if cached is not None:
            return cached
        table = encode()
        try:
            with written_whole(path) as unfinished:
                save_file({_NAME: table.contiguous()}, unfinished)
        except OSError as error:
            logger.warning("%s cannot be written (%s): these title embeddings are not cached", path, error)
        return table
    finally:
        lock.release()


def _read(path: Path, num_titles: int) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        table = load_file(path)[_NAME]
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s is broken (%s): encoding again", path, error)
        return None
    if table.dim() != 2 or len(table) != num_titles or not torch.isfinite(table).all():
        logger.warning("%s does not contain %d finite embeddings: encoding again", path, num_titles)
        return None
    logger.info("read the embeddings of %d titles from %s", num_titles, path)
    return table


__all__ = ["cached_embeddings"]
