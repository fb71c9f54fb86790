"""Writes files and folders whole or not at all, and locks output folders.

A crash never leaves half of a file under its final name, and a folder never has two writers.
"""

import errno
import json
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
SECONDS_TO_SEE = 30.0  # network disks show with a delay what another machine wrote
# Errors of file systems without locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends without an error.

    Until then, and after an error, an earlier file at `path` stays unchanged. The file gets the permissions of the
    umask, even if the writer is stricter (safetensors is). The temporary path has the same suffix, for writers that
    choose their format by it. If a process is killed, the next write of the file removes the leftover
    `.<stem>.<number>.unfinished<suffix>`.
    """
    path = Path(path)
    with staged(path, path.stem, path.suffix) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        unfinished.replace(path)


@contextmanager
def folder_written_whole(path: str | os.PathLike, replaceable_files: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends without an error.

    Until then, and after an error, an earlier folder at `path` stays unchanged. All files get the permissions of the
    umask. If a process is killed, the next call removes the leftover `.<name>.<number>.unfinished`. If it is killed
    between the two renames of the exchange, the earlier folder remains as `previous_folder(path)`, and the next call
    first moves it back.

    Args:
        path: the folder to write. A symbolic link stays a link; the folder it points to is replaced.
        replaceable_files: names of the files that an earlier folder at `path` may contain.

    Raises:
        ValueError: on entry, if `path` is a file or contains anything else, which the replacement would delete.
    """
    path = Path(path).resolve()
    previous = previous_folder(path)
    if previous.exists() and not path.exists():
        previous.rename(path)
    check_replaceable(path, replaceable_files)
    with staged(path, path.name) as unfinished:
        unfinished.mkdir()
        probe = unfinished / ".mode"
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        _exchange(unfinished, path, previous)


def previous_folder(path: Path) -> Path:
    """Where `folder_written_whole` keeps the earlier folder during the exchange."""
    return path.with_name(f".{path.name}.previous")


@contextmanager
def staged(path: Path, name: str, suffix: str = "") -> Iterator[Path]:
    """Yield `.<name>.<number>.unfinished<suffix>`, a new path beside `path`, and delete anything left there afterwards.

    While the block runs, a lock file beside it shows that the writer is alive. The operating system releases the lock
    when the process ends, even for other machines and containers, which cannot look up a process id. On entry, this
    creates the folder of `path` and removes leftovers of killed processes with the same name.

    Raises:
        OSError: the file system refuses; the error names `path`.
    """
    number = f"{os.getpid()}-{secrets.token_hex(4)}"
    unfinished, writer = (path.with_name(f".{name}.{number}.{end}") for end in (f"unfinished{suffix}", "writer"))
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, name)
    lock = _lock(writer)
    try:
        with write_errors_named(path, writer):
            lock.acquire(timeout=-1)  # no other writer has this number
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        with write_errors_named(path, unfinished):
            yield unfinished
    finally:
        _delete(unfinished)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Delete unfinished files and folders of killed processes; those of living processes stay.

    Args:
        folder: where to look for them.
        name: final name of the folder, or of the file without its suffix; None for any.
    """
    pattern = re.compile(
        rf"\.{'.+' if name is None else re.escape(name)}\.\d+(-[0-9a-f]+)?\.(unfinished.*|writer)", re.DOTALL
    )
    leftovers: dict[str, list[Path]] = {}
    for entry in folder.iterdir():
        if found := pattern.fullmatch(entry.name):
            leftovers.setdefault(entry.name[: found.start(2)], []).append(entry)
    for prefix, entries in leftovers.items():
        lock = _lock(folder / f"{prefix}writer")
        try:
            lock.acquire(blocking=False)
        except (Timeout, OSError):  # the writer is alive, or might be
            continue
        for entry in entries:
            _delete(entry)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _lock(path: Path) -> FileLock:
    # Without real locks, a soft lock would not do: a killed process would keep it for ever.
    # Tries for a moment, because a holder that ends deletes its lock file.
    return FileLock(path, timeout=0.2, thread_local=False, fallback_to_soft=False)


def _delete(path: Path) -> None:
    """Delete a file or folder if it exists and may be deleted; another user's, for example, stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def held_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Create `folder` and lock it against other processes until the block or this process ends.

    The operating system keeps the lock, even between machines that share a network disk, and releases it when the
    process ends, however it ends. A killed process leaves the file `.lock` behind, which locks nothing; its content
    only serves error messages. A new folder in which the block writes nothing is removed.

    Raises:
        ValueError: another process holds the lock, or there is a file in place of the folder.
    """
    folder = Path(folder)
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file, or inside one: expected a folder; choose another output_dir") from error
    lock = _lock(path)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use: {_holder(path)}; wait until it ends, stop it, or choose another output_dir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("the disk of %s has no locks: make sure that no other process writes there", folder)
    try:
        if lock.is_locked:
            _write_holder(path)
        yield
    finally:
        if lock.is_locked:
            path.unlink(missing_ok=True)  # before the release: the file of the next holder stays
        lock.release()
        if is_new:
            with suppress(OSError):  # it is not empty, or gone
                folder.rmdir()


def sees_holder(folder: str | os.PathLike, holder: str | None) -> bool:
    """Whether this process sees in `folder` the lock file of its holder, which a network disk may show late.

    Args:
        folder: a folder that another process holds.
        holder: content of the lock file as that process reads it; None, on a disk without locks, is always seen.
    """
    end = time.monotonic() + SECONDS_TO_SEE
    while holder is not None and lock_text(folder) != holder:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def lock_text(folder: str | os.PathLike) -> str | None:
    """The content of the lock file of a folder; None if there is no such file."""
    try:
        return (Path(folder) / LOCK_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def remove_folder(folder: str | os.PathLike) -> None:
    """Delete a folder if it exists.

    Raises:
        ValueError: another process holds it.
    """
    if (Path(folder) / LOCK_FILE).exists():
        with held_folder(folder):
            shutil.rmtree(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _write_holder(lock_file: Path) -> None:
    holder = {
        "process": os.getpid(),
        "since": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        "machine": platform.node(),
    }
    with suppress(OSError):  # on a full disk, the run will fail where it matters
        lock_file.write_text(json.dumps(holder) + "\n", encoding="utf-8")


def _holder(lock_file: Path) -> str:
    """A clause that names the process that holds a folder, from its lock file."""
    try:
        holder = json.loads(lock_file.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['machine']} has been writing there since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # the holder has only just begun
        return "another process is writing there"


@contextmanager
def write_errors_named(path: str | os.PathLike, unfinished: str | os.PathLike | None = None) -> Iterator[None]:
    """Turn errors of writing in this block into OSErrors that have a number and name `path`, whatever library writes.

    Errors of a full disk name no file, and safetensors and torch raise errors of their own.

    Args:
        path: the file or folder to write.
        unfinished: the temporary path, which means nothing to the user.

    Raises:
        OSError: the file system refuses.
    """
    try:
        yield
    except Exception as error:
        failure = failed_write(error)
        if failure is None:
            raise
        named = failure.filename is not None and str(failure.filename) != str(unfinished)
        failure.filename = failure.filename if named else str(path)
        if failure is error:
            raise
        if failure.errno == errno.EIO and _is_full(Path(path)):
            failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        raise failure from error


def failed_write(error: Exception) -> OSError | None:
    """The error of the file system that `error` is or reports (then without a file name); None for other errors."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers, which are written in Rust
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|unexpected pos \d+ vs \d+", str(error)):
        return OSError(errno.EIO, "Not written whole")  # torch.save gives no reason
    return None


def _is_full(path: Path) -> bool:
    """Whether the disk of `path`, or of its nearest existing parent, has less than a megabyte left."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free < 1 << 20


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


def check_replaceable(path: str | os.PathLike, replaceable_files: Collection[str]) -> None:
    """Raise the ValueError of `folder_written_whole` early, before doing work that could not be saved."""
    path = Path(path)
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
