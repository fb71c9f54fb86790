"""The end of a program that several processes run."""

import torch


def close_process_group() -> None:
    """Close the connections between the processes of a launch, as the last thing a program does; for one, nothing.

    A process that leaves with them open now and then aborts on exit, "terminate called without an active exception":
    Gloo's threads may still hold tensors when the interpreter is gone (pytorch/pytorch, pull request 179291). The
    launcher then calls a finished run failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
