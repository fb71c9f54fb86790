"""Logs how a router uses its experts at each evaluation of the Trainer."""

import torch
from transformers import Trainer, TrainerCallback

from hf_ilora.evaluation.expert_usage import expert_usage, gates_of_histories


class ExpertUsageCallback(TrainerCallback):
    """Logs the expert usage at each evaluation through the Trainer; pass it to `trainer.add_callback`.

    It logs expert_entropy_of_mean, expert_mean_entropy, expert_deviation (the largest between users) and
    expert_<number>_gate, the mean gate of each expert. All processes compute and log them, as they do the Trainer's own
    metrics; loggers write on the main process only.

    Args:
        trainer: the Trainer to log to.
        histories: (users, length) item ids of the users to measure, padded with 0.
    """

    def __init__(self, trainer: Trainer, histories: torch.Tensor):
        self.trainer, self.histories = trainer, histories

    def on_evaluate(self, args, state, control, model, **kwargs):
        usage = expert_usage(gates_of_histories(model, self.histories))
        self.trainer.log(
            {
                "expert_entropy_of_mean": usage.entropy_of_mean,
                "expert_mean_entropy": usage.mean_entropy,
                "expert_deviation": max(usage.deviation),
            }
            | {f"expert_{number}_gate": gate for number, gate in enumerate(usage.mean_gate)}
        )


__all__ = ["ExpertUsageCallback"]
