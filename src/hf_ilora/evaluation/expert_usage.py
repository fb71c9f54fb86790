"""How a router uses its experts: whether all of them, and whether differently for different users."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import Trainer, TrainerCallback

from hf_ilora.files import written_whole

# A router has collapsed when one expert has more than this of the mean gate ...
DOMINANT_GATE = 0.9
# ... or when no gate differs more than this (standard deviation) between users.
EQUAL_GATES = 0.01


@dataclass(frozen=True)
class ExpertUsage:
    """Gates of many users in numbers.

    Args:
        num_users: users measured.
        mean_gate: (experts,) mean over users.
        deviation: (experts,) standard deviation between users.
        top_share: (experts,) share of users whose largest gate is this expert's; of equal gates the first counts.
        entropy_of_mean: entropy of the mean gate as a share of the highest possible, log(experts): 1 when all experts
            are used alike over all users, 0 when one has everything.
        mean_entropy: mean over users of the entropy of their gates, likewise: 1 when every user mixes all experts
            alike, 0 when every user has one expert.
    """

    num_users: int
    mean_gate: tuple[float, ...]
    deviation: tuple[float, ...]
    top_share: tuple[float, ...]
    entropy_of_mean: float
    mean_entropy: float

    @property
    def is_collapsed(self) -> bool:
        """Whether the experts are no better than one LoRA.

        Either one expert has more than 0.9 of the mean gate, so that the rank of the others is lost; or no gate has a
        standard deviation above 0.01, so that all users get the same mixture. One expert alone cannot collapse.
        """
        if len(self.mean_gate) == 1:
            return False
        return max(self.mean_gate) > DOMINANT_GATE or max(self.deviation) < EQUAL_GATES


def expert_usage(gates: torch.Tensor) -> ExpertUsage:
    """Sum up the gates of users.

    Args:
        gates: (users, experts), each row a distribution. With one expert both entropies are 1.

    Raises:
        ValueError: for another shape, no users, and rows that are no distributions.
    """
    if gates.dim() != 2 or not gates.numel():
        raise ValueError(f"gates have shape {tuple(gates.shape)}: expected (users, experts), at least one of each")
    gates = gates.detach().double().cpu()
    wrong = ~((gates >= 0).all(dim=1) & ((gates.sum(dim=1) - 1).abs() < 1e-3))  # (users,), also for NaN
    if wrong.any():
        user = int(wrong.nonzero()[0])
        raise ValueError(f"gates of user {user} are {gates[user].tolist()}: expected shares that sum to 1")
    num_users, num_experts = gates.shape
    mean_gate = gates.mean(dim=0)  # (experts,)
    top_share = torch.bincount(gates.argmax(dim=1), minlength=num_experts).double() / num_users
    return ExpertUsage(
        num_users=num_users,
        mean_gate=tuple(mean_gate.tolist()),
        deviation=tuple(gates.std(dim=0, correction=0).tolist()),
        top_share=tuple(top_share.tolist()),
        entropy_of_mean=float(_entropy_share(mean_gate)),
        mean_entropy=float(_entropy_share(gates).mean()),
    )


def _entropy_share(gates: torch.Tensor) -> torch.Tensor:
    """Entropy over the last dimension, divided by its maximum."""
    if gates.shape[-1] == 1:
        return torch.ones(gates.shape[:-1])
    return -torch.xlogy(gates, gates).sum(dim=-1) / math.log(gates.shape[-1])


def gates_of_histories(model: torch.nn.Module, histories: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """The gates of many users, without gradients and without what training adds to a router: (users, experts).

    Args:
        model: has `expert_gates(histories)` -> (batch, experts); it may be wrapped for distributed training.
        histories: (users, length) item ids, padded with 0.
        batch_size: users at a time.
    """
    model = extract_model_from_parallel(model)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        gates = [model.expert_gates(batch.to(model.device)).float().cpu() for batch in histories.split(batch_size)]
    model.train(was_training)
    return torch.cat(gates)  # (users, experts)


class ExpertUsageCallback(TrainerCallback):
    """Logs how the experts are used, at each evaluation, through the Trainer: `trainer.add_callback` takes it.

    Logged are expert_entropy_of_mean, expert_mean_entropy, expert_deviation (the largest between users), and
    expert_<number>_gate, the mean gate of each expert. All processes compute and log, as the Trainer's own metrics
    are; what reports them writes on the main process only.

    Args:
        trainer: whose `log` is used.
        histories: (users, length) item ids, padded with 0: the users to look at.
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


def usage_table(usages: Mapping[str, ExpertUsage]) -> str:
    """The usage of each model as a Markdown table, one row per model.

    Raises:
        ValueError: for no models.
    """
    if not usages:
        raise ValueError("there is no usage to show: expected at least one model")
    lines = [
        "| model | users | mean gate ± deviation between users | users by top expert | entropy of the mean gate "
        "| mean entropy | collapsed |",
        "|---|---:|---|---|---:|---:|---|",
    ]
    for name, usage in usages.items():
        gates = ", ".join(
            f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(usage.mean_gate, usage.deviation, strict=True)
        )
        top = ", ".join(f"{share:.0%}" for share in usage.top_share)
        escaped = name.replace("|", "\\|")
        lines.append(
            f"| {escaped} | {usage.num_users:,} | {gates} | {top} | {usage.entropy_of_mean:.3f} "
            f"| {usage.mean_entropy:.3f} | {'yes' if usage.is_collapsed else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def plot_expert_usage(usages: Mapping[str, ExpertUsage], path: Path) -> None:
    """Plot the mean gate of each expert with its deviation between users, one group of bars per model.

    Args:
        usages: by name of the model.
        path: image file; its suffix is the format.

    Raises:
        ValueError: for no models.
    """
    if not usages:
        raise ValueError("there is no usage to plot: expected at least one model")
    # Loading matplotlib takes most of a second, and only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(usages)
    for number, (name, usage) in enumerate(usages.items()):
        places = [expert + (number - (len(usages) - 1) / 2) * width for expert in range(len(usage.mean_gate))]
        label = f"{name} (collapsed)" if usage.is_collapsed else name
        axes.bar(places, usage.mean_gate, width, yerr=usage.deviation, capsize=3, color=f"C{number}", label=label)
    most = max(len(usage.mean_gate) for usage in usages.values())
    axes.axhline(1 / most, color="grey", linestyle="--", linewidth=1, label=f"even: 1/{most}")
    axes.set_xticks(range(most), [f"expert {expert}" for expert in range(most)])
    axes.set_ylabel("mean gate, standard deviation between users")
    axes.set_ylim(bottom=0)
    axes.legend()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)
