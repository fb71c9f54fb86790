"""Ends a program quietly when the reader of its output has left, as in `hf-ilora --help | head -3`."""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

CLOSED_OUTPUT_CODE = 128 + signal.SIGPIPE  # as a shell counts it


@contextmanager
def closed_output_ends(end: Callable[[int], object] = sys.exit) -> Iterator[None]:
    """In this block, writing to a pipe without a reader calls `end` with the exit code and prints nothing.

    Source: "Note on SIGPIPE" in the documentation of Python's module signal.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _reader_has_left(stream)]
        if not closed:  # another pipe broke, such as one to a child process
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # Python flushes them once more when it ends
            os.dup2(nowhere, stream.fileno())
        end(CLOSED_OUTPUT_CODE)


def _reader_has_left(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))
