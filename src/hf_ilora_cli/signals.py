"""Makes SIGTERM and SIGHUP end a program as Ctrl-C does.

By default, SIGTERM kills a process on the spot: its children keep running, and its record says that it still runs.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERRUPTED_CODE = 130
_SECONDS_OF_ONE_REQUEST = 1.0
_LAUNCHERS = {"accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems and containers send, or SIGHUP of a closed terminal.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def termination_raises() -> Iterator[None]:
    """In this block, SIGTERM and SIGHUP raise `Terminated`, unless they are already ignored or handled."""
    if threading.current_thread() is not threading.main_thread():  # only that thread may set handlers
        yield
        return
    raised = -_SECONDS_OF_ONE_REQUEST

    def raise_terminated(number, frame):
        nonlocal raised
        # The process group and a parent that forwards the signal may both deliver it; the second must not disturb the
        # cleanup. A later one raises again, since Python drops an exception raised inside a finalizer.
        if time.monotonic() - raised >= _SECONDS_OF_ONE_REQUEST:
            raised = time.monotonic()
            raise Terminated(number)

    handled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, raise_terminated)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is raise_terminated:
                signal.signal(number, signal.SIG_DFL)


def interrupted_code(error: KeyboardInterrupt) -> int:
    """The exit code of a program that `error` ended, as a shell counts it."""
    return 128 + error.number if isinstance(error, Terminated) else INTERRUPTED_CODE


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent ends, even by SIGKILL; does nothing elsewhere."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_launcher() -> None:
    """Call `end_with_parent` if `accelerate launch` or torchrun started this process: they do not always end it."""
    with suppress(OSError):  # no /proc
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        if any(os.path.basename(word) in _LAUNCHERS for word in words[:3]):
            end_with_parent()
