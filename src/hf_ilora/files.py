"""Files and folders that are written whole or not at all: a crash never leaves half of one under its real name."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends without an error.

    Until then, and after an error, an earlier file at `path` stays as it is. The file gets the permissions of the
    umask, even if the writer is stricter (safetensors is). The suffix is kept, for writers that choose their format by
    it. A killed process leaves `.<stem>.<process id>.unfinished<suffix>` behind, see `remove_unfinished`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    unfinished.unlink(missing_ok=True)  # left by a killed process that had the same id
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | os.PathLike, replaceable_files: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an error.

    Until then, and after an error, an earlier folder at `path` stays as it is. All files get the permissions of the
    umask. A killed process leaves `.<name>.<process id>.unfinished` behind, see `remove_unfinished`. If it is killed
    between the two renames of the exchange, the earlier folder is left as `previous_folder(path)`; the next call moves
    it back first.

    Args:
        path: the folder to write. A symbolic link stays a link; the folder it points to is replaced.
        replaceable_files: names that an earlier folder at `path` may contain.

    Raises:
        ValueError: on entry, when `path` is a file, or contains anything else, which the replacement would delete.
    """
    path = Path(path).resolve()
    previous = previous_folder(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    _check_replaceable(path, replaceable_files)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process that had the same id
    unfinished.mkdir(parents=True)
    try:
        probe = unfinished / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        _exchange(unfinished, path, previous)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def previous_folder(path: Path) -> Path:
    """Where `folder_written_whole` keeps the earlier folder during the exchange."""
    return path.with_name(f".{path.name}.previous")


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Delete what killed processes left in `folder`. Call it only while no other process writes there.

    Args:
        folder: where the unfinished files and folders are.
        name: of the file, without its suffix, or of the folder that they were to become; by default any.
    """
    for leftover in folder.glob(f".{name}.*.unfinished*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _exchange(unfinished: Path, path: Path, previous: Path) -> None:
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    try:
        unfinished.rename(path)
    except OSError:
        if previous.exists():
            previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _check_replaceable(path: Path, replaceable_files: Collection[str]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file: expected a folder; choose another name")
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in replaceable_files)
    if foreign:
        raise ValueError(
            f"{path} contains {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}: expected a new "
            "folder, an empty one or one that an earlier save wrote, because its content is replaced; choose another "
            "folder"
        )
