"""Runs programs with the real clients of the Hub, each in a fork of a process that has imported the libraries already.

Reads one JSON object per line, {"program", "arguments", "environment", "output"}, and prints the exit code of each.
"""

import json
import os
import sys
import traceback

import hf_ilora.data.sequences
import hf_ilora.distillation.teacher_labels
import hf_ilora.models.ilora.modeling_ilora
import hf_ilora.models.next_item.hub_upload
import hf_ilora.publishing

hf_ilora.models.next_item.hub_upload.WAITS_SECONDS = (0.01, 0.02, 0.04)


def run(program: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Run a program in the fork, and exit."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = ["program", *arguments]
    exit_code = 0
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        run(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
