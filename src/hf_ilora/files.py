"""Files and folders that are written whole or not at all, and the lock of an output folder.

A crash never leaves half of a file under its real name, and a folder never has two writers.
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
SECONDS_TO_SEE = 30.0  # network disks show what another machine wrote after a while
# What a disk answers that knows no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends without an error.

    Until then, and after an error, an earlier file at `path` stays as it is. The file gets the permissions of the
    umask, even if the writer is stricter (safetensors is). The suffix is kept, for writers that choose their format by
    it. What a killed process leaves, `.<stem>.<number>.unfinished<suffix>`, is removed by the next write of the file.
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

    Until then, and after an error, an earlier folder at `path` stays as it is. All files get the permissions of the
    umask. What a killed process leaves, `.<name>.<number>.unfinished`, is removed by the next call. If it is killed
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
    """Yield `.<name>.<number>.unfinished<suffix>`, a new path beside `path`; what the block leaves there is deleted.

    Beside that, a lock file shows as long as the block runs that the writer lives: the operating system frees the lock
    with the process, also for other machines and containers, which cannot see a process by its id. First, what killed
    processes left of the same name is removed. The folder of `path` is created.

    Raises:
        OSError: with the name of `path`, when the file system refuses.
    """
    number = f"{os.getpid()}-{secrets.token_hex(4)}"
    unfinished, writer = (path.with_name(f".{name}.{number}.{end}") for end in (f"unfinished{suffix}", "writer"))
    with write_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path.parent, name)
    lock = _lock(writer)
    try:
        with write_errors_named(path, writer):
            lock.acquire(timeout=-1)  # nobody else has this number
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
    """Delete what killed processes left in `folder`; what a living process writes stays.

    Args:
        folder: where the unfinished files and folders are.
        name: of the file, without its suffix, or of the folder that they were to become; None for any.
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
        except (Timeout, OSError):  # its writer lives, or nobody knows
            continue
        for entry in entries:
            _delete(entry)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _lock(path: Path) -> FileLock:
    # No soft lock where the disk has no real ones: the file of a killed process would hold for ever.
    # A few attempts, since a holder that ends takes its file with it.
    return FileLock(path, timeout=0.2, thread_local=False, fallback_to_soft=False)


def _delete(path: Path) -> None:
    """Delete a file or folder that may be gone; what cannot be deleted, such as another user's, stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def held_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Create `folder` and hold it: until the block or this process ends, no other process can.

    The operating system keeps the lock, also between machines that share a network disk, and frees it with the process,
    however that ends. A killed process leaves the file `.lock` behind, which holds nothing: what it says about the
    holder is for messages alone. A new folder in which the block writes nothing is removed.

    Raises:
        ValueError: when another process holds the folder, and when there is a file in its place.
    """
    folder = Path(folder)
    path, is_new = folder / LOCK_FILE, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(
            f"{folder} is a file, or inside of one: expected a folder; choose another output_dir"
        ) from error
    lock = _lock(path)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} has another writer: {_holder(path)}; wait for its end, end it, or choose another output_dir"
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
    """Whether this process finds in `folder` what its holder wrote there, which a network disk may show late.

    Args:
        folder: held by another process.
        holder: what that process reads in the lock file; None, on a disk without locks, is found anywhere.
    """
    end = time.monotonic() + SECONDS_TO_SEE
    while holder is not None and lock_text(folder) != holder:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def lock_text(folder: str | os.PathLike) -> str | None:
    """What the lock file of a folder says about its holder; None without one."""
    try:
        return (Path(folder) / LOCK_FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def remove_folder(folder: str | os.PathLike) -> None:
    """Delete a folder, if it exists, unless a process holds it.

    Raises:
        ValueError: when a process holds it.
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
    with suppress(OSError):  # a full disk: the run will say so where it matters
        lock_file.write_text(json.dumps(holder) + "\n", encoding="utf-8")


def _holder(lock_file: Path) -> str:
    """A sentence that names the holder of a folder, read from its lock file."""
    try:
        holder = json.loads(lock_file.read_text(encoding="utf-8"))
        return f"process {holder['process']} holds this folder since {holder['since']} (on {holder['machine']})"
    except (OSError, ValueError, LookupError, TypeError):  # it has only just begun
        return "another process holds this folder"


@contextmanager
def write_errors_named(path: str | os.PathLike, unfinished: str | os.PathLike | None = None) -> Iterator[None]:
    """What fails to be written in this block raises an OSError with a number and `path`, whatever library writes it.

    A full disk names no file, and safetensors and torch raise errors of their own.

    Args:
        path: what is written.
        unfinished: the temporary path that is written to, which says nothing to the user.

    Raises:
        OSError: when the file system refuses.
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
    """The error of the file system that `error` is or, without the file, reports; None for other errors."""
    if isinstance(error, OSError):
        return error if error.errno is not None else None
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors and tokenizers, which are written in Rust
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|unexpected pos \d+ vs \d+", str(error)):
        return OSError(errno.EIO, "Not written whole")  # torch.save does not say why
    return None


def _is_full(path: Path) -> bool:
    """Whether the disk of a folder that exists, or that one above it is on, has no megabyte left."""
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
    """Raise the ValueError of `folder_written_whole` before work begins whose result would be lost."""
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
