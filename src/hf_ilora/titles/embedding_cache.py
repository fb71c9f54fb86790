"""Vectors that were computed once, kept in the cache folder."""

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


def kept_embeddings(
    titles: list[str], settings: dict, make: Callable[[], torch.Tensor], cache_dir: str | Path | None = None
) -> torch.Tensor:
    """What `make` returns, computed once for the same titles and settings.

    Processes that ask for the same at the same time wait for the first one. Where the cache cannot be written, or its
    file is broken, the vectors are computed again.

    Args:
        titles: (titles,) what is encoded.
        settings: what else the vectors depend on, as JSON takes it.
        make: computes them, (titles, size).
        cache_dir: parent folder; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.
    """
    digest = hashlib.sha256(json.dumps([settings, titles], sort_keys=True).encode()).hexdigest()
    folder = (Path(cache_dir).expanduser() if cache_dir else default_cache_dir()) / "title_embeddings"
    path = folder / f"{digest[:32]}.safetensors"
    kept = _read(path, len(titles))
    if kept is not None:
        return kept
    lock = FileLock(f"{path}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        logger.warning("%s cannot be written (%s): the vectors of these titles are not kept", folder, error)
        return make()
    try:
        kept = _read(path, len(titles))
        if kept is not None:
            return kept
        table = make()
        try:
            with written_whole(path) as unfinished:
                save_file({_NAME: table.contiguous()}, unfinished)
        except OSError as error:
            logger.warning("%s cannot be written (%s): the vectors of these titles are not kept", path, error)
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
        logger.warning("%s has no vectors of %d titles: encoding again", path, num_titles)
        return None
    logger.info("read the vectors of %d titles from %s", num_titles, path)
    return table


__all__ = ["kept_embeddings"]
