"""A Python process in which hf_ilora cannot be imported, as on the machine of somebody who has not installed it."""

import os
import subprocess
import sys
from pathlib import Path

# hf_ilora may be installed beside transformers, so that a path without it would lack both.
_HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_ilora":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Hidden())
try:
    import hf_ilora
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("hf_ilora can be imported")
"""


def run_without_hf_ilora(program: str, *arguments, home: Path, **environment: str) -> str:
    """Run a program to its end and return what it printed; the test fails when the program does.

    Args:
        program: Python code.
        arguments: become sys.argv[1:].
        home: folder for the caches of the libraries, the code that comes with models among them.
        environment: further environment variables.
    """
    done = subprocess.run(
        [sys.executable, "-c", _HIDE + program, *map(str, arguments)],
        cwd=home,
        env=os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
