"""A Python process in which some packages cannot be imported, as on a machine without them."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

# The packages may be installed beside those that the program needs, so that a path without them would lack all.
_HIDE = """
import importlib, sys

hidden = {hidden!r}

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Hidden())
for name in hidden:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError(f"{{name}} can be imported")
"""


def run_without_hf_ilora(program: str, *arguments, home: Path, **environment: str) -> str:
    """`run_without` hf_ilora."""
    return run_without(["hf_ilora"], program, *arguments, home=home, **environment)


def run_without(hidden: Collection[str], program: str, *arguments, home: Path, **environment: str) -> str:
    """Run a program to its end and return what it printed; the test fails when the program does.

    Args:
        hidden: packages that it cannot import.
        program: Python code.
        arguments: become sys.argv[1:].
        home: working directory, and folder for the caches of the libraries, the code that comes with models among them.
        environment: further environment variables.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HIDE.format(hidden=list(hidden)) + program, *map(str, arguments)],
        cwd=home,
        env=os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
