"""The end of a program that several processes run."""

import atexit
import os
import sys

import torch


def leave_launch() -> None:
    """End this process, with success, when it is one of several of a launch; the last thing that a program does.

    Gloo's threads may hold tensors for a moment longer than the program runs. A thread that lets go of one when the
    interpreter is being taken down aborts the process ("terminate called without an active exception"), now and then,
    and the launcher calls a finished run failed; destroying the process group first does not help while a wrapped model
    refers to it (pytorch/pytorch, pull request 179291). So what is registered for the exit is run here, and the
    interpreter is not taken down. A single process returns.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    torch.distributed.barrier()  # nobody leaves while another still waits for it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
