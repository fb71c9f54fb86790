"""Finds the locks that a killed DeepSpeed compilation leaves behind; every later launch would wait for them."""

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

_SECONDS_BETWEEN_LOOKS = 1.0


def check_compile_locks() -> None:
    """Raise a ValueError for a lock of torch's extensions that no process of this machine holds.

    DeepSpeed compiles an operation at its first use and locks it with a plain file. The other processes wait until that
    file is gone, without a timeout or a message. A process that compiles keeps the file open.
    """
    locks = _unheld_locks()
    if locks:
        time.sleep(_SECONDS_BETWEEN_LOOKS)  # a process that has compiled closes its file just before it deletes it
        locks = [lock for lock in _unheld_locks() if lock in locks]
    if locks:
        raise ValueError(
            f"{locks[0]} is the lock of a compilation that was killed: no process on this machine has it open, and "
            "DeepSpeed would wait for it forever; delete the file, unless another machine that shares the disk is "
            "compiling"
        )


def _unheld_locks() -> list[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given or get_default_build_root())
    locks = sorted(root.glob("*/lock" if given else "*/*/lock"))
    held = _open_files() if locks else set()
    return [lock for lock in locks if lock.resolve() not in held]


def _open_files() -> set[Path]:
    """The files that this user's processes have open; those of other users cannot be listed."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found.update(Path(file.path) for file in process.open_files())
    return found
