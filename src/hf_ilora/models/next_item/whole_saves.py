"""Saves a model over an earlier one, which stays whole until all files of the new one are written."""

import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import CONFIG_NAME

from .catalogue import CATALOGUE_FILE


@contextmanager
def saved_whole(save_directory: str | os.PathLike, variant: str | None = None) -> Iterator[Path]:
    """Yield a new folder inside `save_directory`. When the block ends, its files replace those of an earlier save.

    An error or a crash in the block leaves the earlier model unchanged. After the block, the files are renamed one by
    one, config.json last. If more than one file has changed, config.json is deleted before the first rename: a crash
    between two renames leaves a folder that no class loads, but never the weights of one model with the configuration
    of another. Weights and a catalogue of the earlier save that the new one does not replace, such as further shards,
    are deleted. The next save deletes the folder `.model.<number>.unfinished` of a crashed process.

    Args:
        save_directory: created if it does not exist.
        variant: part of the weights' file names, as in transformers.

    Raises:
        ValueError: when `save_directory` is a file.
    """
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: expected a folder; choose another name")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    unfinished = folder / f".model.{os.getpid()}-{secrets.token_hex(4)}.unfinished"
    # The operating system frees the lock when the process ends: another process that gets it knows that the writer is
    # gone.
    lock = FileLock(unfinished.with_suffix(".writer"))
    with suppress(OSError):  # a disk without locks, on which folders of crashed processes stay
        lock.acquire()
    try:
        unfinished.mkdir()
        yield unfinished
        _apply_umask(unfinished)
        _move(unfinished, folder, variant)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if is_new:
            with suppress(OSError):  # the folder has files unless the save failed
                folder.rmdir()


def _apply_umask(unfinished: Path) -> None:
    """Give the weights the permissions of the umask: safetensors writes files that only their owner can read."""
    mode = (unfinished / CONFIG_NAME).stat().st_mode  # this file was created in the usual way, with the umask
    for weights in unfinished.glob("model*.safetensors"):
        weights.chmod(mode)


def _remove_leftovers(folder: Path) -> None:
    for writer in folder.glob(".model.*.writer"):
        with suppress(Timeout, OSError), FileLock(writer, timeout=0):
            shutil.rmtree(writer.with_suffix(".unfinished"), ignore_errors=True)
            writer.unlink(missing_ok=True)


def _move(unfinished: Path, folder: Path, variant: str | None) -> None:
    new = sorted(path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file())
    infix = "" if variant is None else re.escape(f".{variant}")
    weights = re.compile(rf"model{infix}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{infix}\.json")
    stale = [path for path in folder.iterdir() if weights.fullmatch(path.name) and Path(path.name) not in new]
    if (folder / CONFIG_NAME).exists() and Path(CATALOGUE_FILE) not in new and (folder / CATALOGUE_FILE).exists():
        stale.append(folder / CATALOGUE_FILE)  # its items are not those of a new model without catalogue
    changed = [name for name in new if not _is_same(unfinished / name, folder / name)]
    if len(changed) + len(stale) > 1:
        (folder / CONFIG_NAME).unlink(missing_ok=True)
    for name in new:
        if name != Path(CONFIG_NAME):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).replace(folder / name)
    for path in stale:
        path.unlink()
    (unfinished / CONFIG_NAME).replace(folder / CONFIG_NAME)


def _is_same(file: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(file, other, shallow=False)


__all__ = ["saved_whole"]
