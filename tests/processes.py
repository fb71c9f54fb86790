"""Kills processes that a test has started."""

import subprocess
from contextlib import suppress

import psutil


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a process and its descendants one by one: torchrun starts each in its own session, outside the group."""
    with suppress(psutil.NoSuchProcess):
        for running in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                running.kill()
