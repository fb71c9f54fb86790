"""What all tests share. No test reaches a hub: without a network the libraries would wait for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import PROJECT
from tests.processes import kill_with_children

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(variable, "1")  # read when the libraries are imported, which no test has done yet


@pytest.fixture(scope="session")
def launch():
    """Runs `accelerate launch --config_file accelerate_configs/<config> <program and arguments>` to its end.

    Returns the finished process with what it printed, standard error included; a failed launch fails the test.
    """

    def run(config: str, *program: str | Path, timeout_seconds: float = 600) -> subprocess.CompletedProcess:
        if config.startswith("zero") and " " in sys.prefix:
            pytest.skip(f"torch cannot compile DeepSpeed's operation with a space in a path: {sys.prefix}")
        programs = Path(sys.executable).parent
        config_file = PROJECT / "accelerate_configs" / config
        command = [str(word) for word in (programs / "accelerate", "launch", "--config_file", config_file, *program)]
        environment = os.environ | {
            # pytest may run without the environment's programs on PATH: DeepSpeed compiles with its ninja
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            # what DeepSpeed compiles holds paths of this environment, so another one must not find it
            "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
        }
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            kill_with_children(process)
            output, _ = process.communicate()
            pytest.fail(f"{config}: no end after {timeout_seconds} s\n{output}")
        assert process.returncode == 0, output
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
