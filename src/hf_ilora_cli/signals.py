"""How a program ends when it is asked to from outside: SIGTERM and SIGHUP end it as Ctrl-C does.

By default, SIGTERM kills a process on the spot: what it has started runs on, and its record says that it still runs.
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
    """SIGTERM, which batch systems and containers send, or SIGHUP of a terminal that is closed.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def termination_raises() -> Iterator[None]:
    """In this block, SIGTERM and SIGHUP raise `Terminated`, unless somebody ignores or handles them already."""
    if threading.current_thread() is not threading.main_thread():  # only that thread may set handlers
        yield
        return
    raised = -_SECONDS_OF_ONE_REQUEST

    def raise_terminated(number, frame):
        nonlocal raised
        # A process group and a parent that passes the signal on deliver it twice: the second must not disturb the
        # cleaning up. A later one raises again, since Python drops what is raised inside of a finalizer.
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
    """Have this process sent SIGTERM when the one that started it ends, even by SIGKILL; on Linux only."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_with_launcher() -> None:
    """Call `end_with_parent` if `accelerate launch` or torchrun started this process: neither ends it in all cases."""
    with suppress(OSError):  # no /proc
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        if any(os.path.basename(word) in _LAUNCHERS for word in words[:3]):
            end_with_parent()
