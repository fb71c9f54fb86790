"""Stops training at the first loss that is not finite."""

import math

import torch
from accelerate import Accelerator
from torch import nn

_ROWS_AT_ONCE = 2**18


class FiniteLosses:
    """Checks the loss of every optimizer step, in all processes alike, without making the device wait.

    On an accelerator the loss of a step is read once the next step is queued, so that the device always has work; or at
    once, where something is about to be logged, evaluated or saved. The CPU has no queue.

    Args:
        accelerator: of the Trainer.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sum: torch.Tensor | None = None  # of the losses since the last optimizer step
        self._unread: tuple[torch.Tensor, torch.Event | None, int, float] | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one batch, a scalar, to those of the step."""
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss

    def end_step(self, step: int, learning_rate: float, wait: bool) -> None:
        """End an optimizer step, or a moment between two.

        Args:
            step: optimizer steps so far, this one included.
            learning_rate: of the step.
            wait: read the loss at once.

        Raises:
            ValueError: if the loss of this step, or without `wait` of the one before, is NaN or infinite.
        """
        before, total = self._unread, self._sum
        if total is not None:
            # The sum over processes is not finite if one of its parts is not: all of them stop at the same step.
            total = self.accelerator.reduce(total, reduction="sum")
            on_host, event = total.to("cpu", non_blocking=True), None
            if total.device.type != "cpu":
                event = torch.Event(total.device)
                event.record()
            self._unread, self._sum = (on_host, event, step, learning_rate), None
            if before is not None:
                _read(*before)
        if self._unread is not None and (wait or self._unread[1] is None):
            unread, self._unread = self._unread, None
            _read(*unread)


def check_weights(model: nn.Module, step: int, learning_rate: float, accelerator: Accelerator) -> None:
    """Raise a ValueError, in all processes, if a trained weight is NaN or infinite: the last step may have made it so.

    Args:
        model: to check.
        step, learning_rate: as in `FiniteLosses.end_step`.
        accelerator: of the Trainer.
    """
    trained = [value.detach() for value in model.parameters() if value.requires_grad and value.numel()]
    finite = not trained or bool(torch.stack([_is_finite(value).to(trained[0].device) for value in trained]).all())
    # Processes may have different parts of the weights.
    if accelerator.reduce(torch.tensor(int(not finite), device=accelerator.device), reduction="sum"):
        raise ValueError(
            f"the loss was finite, but the weights after step {step} are not, at learning rate {learning_rate:g}: "
            "expected finite numbers; nothing of this step is saved; lower learning_rate, or clip gradients with "
            "max_grad_norm"
        )


def _is_finite(value: torch.Tensor) -> torch.Tensor:
    """Whether all numbers are finite, in memory that does not grow with the rows of a table."""
    if type(value) is torch.Tensor and value.dim():  # FSDP has small pieces already, of a type that it cannot split
        return torch.stack([rows.isfinite().all() for rows in value.split(_ROWS_AT_ONCE)]).all()
    return value.isfinite().all()


def _read(loss: torch.Tensor, event: torch.Event | None, step: int, learning_rate: float) -> None:
    if event is not None:
        event.synchronize()
    value = float(loss.numpy())  # of a tensor on the CPU
    if not math.isfinite(value):
        raise ValueError(
            f"the loss of step {step} is {value}, at learning rate {learning_rate:g}: expected a finite number; "
            "nothing of this step is saved; lower learning_rate, or clip gradients with max_grad_norm"
        )


__all__ = ["FiniteLosses", "check_weights"]
