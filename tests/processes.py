"""Killing what a test has started."""

import subprocess
from contextlib import suppress

import psutil


def kill_with_children(process: subprocess.Popen) -> None:
    """Kill a process and all below it, one by one: torchrun starts each in a session that no group reaches."""
    with suppress(psutil.NoSuchProcess):
        for running in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                running.kill()
