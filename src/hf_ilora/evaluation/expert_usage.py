"""Measures how a router uses its experts: whether it uses all of them, and differently for different users."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel

from hf_ilora.evaluation.plots import GREY, label_points, new_figure, save_figure, style, without_sources
from hf_ilora.evaluation.statistics import LENGTH_GROUPS, rows_by_group
from hf_ilora.models.next_item.histories import check_batch_size
from hf_ilora.models.next_item.next_item_model import evaluation_mode
from hf_ilora_cli.shown_text import in_figure, in_markdown

# A router has collapsed if one expert's mean gate is above DOMINANT_GATE, or if no gate has a standard deviation
# between users of at least EQUAL_GATES.
DOMINANT_GATE = 0.9
EQUAL_GATES = 0.01


@dataclass(frozen=True)
class ExpertUsage:
    """Statistics over users of their expert gates.

    Args:
        num_users: number of users.
        mean_gate: (experts,) mean over users.
        deviation: (experts,) standard deviation between users.
        top_fraction: (experts,) fraction of users whose largest gate belongs to this expert; the first of equal gates
            counts.
        entropy_of_mean: entropy of the mean gate divided by its maximum, log(experts): 1 if all experts are used
            equally over all users, 0 if only one is used.
        mean_entropy: mean over users of the entropy of their gates, divided by its maximum: 1 if every user mixes all
            experts equally, 0 if every user has one expert.
    """

    num_users: int
    mean_gate: tuple[float, ...]
    deviation: tuple[float, ...]
    top_fraction: tuple[float, ...]
    entropy_of_mean: float
    mean_entropy: float

    @property
    def is_collapsed(self) -> bool:
        """Whether the experts are no better than one LoRA.

        Either the mean gate of one expert is above 0.9, so that the rank of the others is lost, or no gate has a
        standard deviation of 0.01 or more, so that all users get the same mixture. A single expert cannot collapse.
        """
        if len(self.mean_gate) == 1:
            return False
        return max(self.mean_gate) > DOMINANT_GATE or max(self.deviation) < EQUAL_GATES


def expert_usage(gates: torch.Tensor) -> ExpertUsage:
    """Summarise the gates of users.

    Args:
        gates: (users, experts), each row a distribution. With one expert both entropies are 1.

    Raises:
        ValueError: for another shape, no users, and rows that are not distributions.
    """
    if gates.dim() != 2 or not gates.numel():
        raise ValueError(f"gates have shape {tuple(gates.shape)}: expected (users, experts), at least one of each")
    gates = gates.detach().cpu().double()
    wrong = ~((gates >= 0).all(dim=1) & ((gates.sum(dim=1) - 1).abs() < 1e-3))  # (users,), also for NaN
    if wrong.any():
        user = int(wrong.nonzero()[0])
        raise ValueError(f"gates of user {user} are {gates[user].tolist()}: expected probabilities that sum to 1")
    num_users, num_experts = gates.shape
    mean_gate = gates.mean(dim=0)  # (experts,)
    top_fraction = torch.bincount(gates.argmax(dim=1), minlength=num_experts).double() / num_users
    return ExpertUsage(
        num_users=num_users,
        mean_gate=tuple(mean_gate.tolist()),
        deviation=tuple(gates.std(dim=0, correction=0).tolist()),
        top_fraction=tuple(top_fraction.tolist()),
        entropy_of_mean=float(_relative_entropy(mean_gate)),
        mean_entropy=float(_relative_entropy(gates).mean()),
    )


def _relative_entropy(gates: torch.Tensor) -> torch.Tensor:
    """Entropy over the last dimension, divided by its maximum."""
    if gates.shape[-1] == 1:
        return torch.ones(gates.shape[:-1])
    return -torch.xlogy(gates, gates).sum(dim=-1) / math.log(gates.shape[-1])


def gates_of_histories(model: torch.nn.Module, histories: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Compute the gates of many users in evaluation mode, without gradients: (users, experts).

    Args:
        model: `expert_gates(histories)` returns (batch, experts). It may be wrapped for distributed training.
        histories: (users, length) item ids, padded with 0.
        batch_size: users per step.

    Raises:
        ValueError: for a `batch_size` below 1.
    """
    check_batch_size(batch_size)
    model = extract_model_from_parallel(model)
    with evaluation_mode(model), torch.no_grad():
        gates = [model.expert_gates(batch.to(model.device)).float().cpu() for batch in histories.split(batch_size)]
    return torch.cat(gates)  # (users, experts)


ALL_USERS = "all users"


def usage_by_length(gates: torch.Tensor, lengths: np.ndarray) -> dict[str, ExpertUsage]:
    """Summarise the gates of all users, and of each group of users with histories of a similar length.

    Args:
        gates: (users, experts), each row a distribution.
        lengths: (users,) items in each history.

    Returns:
        "all users" first, then each of `LENGTH_GROUPS` that has users.

    Raises:
        ValueError: as `expert_usage`.
    """
    groups = rows_by_group(lengths, LENGTH_GROUPS)
    return {ALL_USERS: expert_usage(gates)} | {
        f"{group} items": expert_usage(gates[torch.from_numpy(rows)]) for group, rows in groups.items()
    }


def usage_table(usages: Mapping[str, Mapping[str, ExpertUsage]]) -> str:
    """A Markdown table with the expert usage of each model, one row per model and group of users.

    Args:
        usages: by model and group.

    Raises:
        ValueError: for no models.
    """
    if not usages:
        raise ValueError("there is no usage to show: expected at least one model")
    lines = [
        "| model | history | users | mean gate ± deviation between users | users by top expert "
        "| entropy of the mean gate | mean entropy | collapsed |",
        "|---|---|---:|---|---|---:|---:|---|",
    ]
    for name, groups in usages.items():
        for group, usage in groups.items():
            gates = ", ".join(
                f"{mean:.3f} ± {deviation:.3f}"
                for mean, deviation in zip(usage.mean_gate, usage.deviation, strict=True)
            )
            top = ", ".join(f"{fraction:.0%}" for fraction in usage.top_fraction)
            lines.append(
                f"| {in_markdown(name)} | {group} | {usage.num_users:,} | {gates} | {top} "
                f"| {usage.entropy_of_mean:.3f} | {usage.mean_entropy:.3f} | {'yes' if usage.is_collapsed else 'no'} |"
            )
    return "\n".join(lines) + "\n"


def plot_expert_usage(usages: Mapping[str, Mapping[str, ExpertUsage]], path: Path) -> None:
    """Plot the mean gate of each expert by group of users, with its deviation between users; a panel for each model.

    Args:
        usages: by model and group; a model is labelled "name" or "name (source)", and the plot omits the source.
        path: image file; the suffix determines the format.

    Raises:
        ValueError: for no models.
    """
    if not usages:
        raise ValueError("there is no usage to plot: expected at least one model")
    figure, panels = new_figure(2.5 + 5.5 * len(usages), 4.5, len(usages))
    highest = max(
        mean + deviation
        for groups in usages.values()
        for usage in groups.values()
        for mean, deviation in zip(usage.mean_gate, usage.deviation, strict=True)
    )
    for axes, groups, name in zip(panels, usages.values(), without_sources(list(usages)), strict=True):
        first, *_ = groups.values()
        num_experts = len(first.mean_gate)
        axes.set_ylim(0, 1.05 * highest)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        labels, points, colours = [], [], []
        for expert in range(num_experts):
            colour, marker = style(expert)
            shift = 0.4 * ((expert + 0.5) / num_experts - 0.5)  # so that deviations do not hide each other
            places = [place + shift for place in range(len(groups))]
            means = [usage.mean_gate[expert] for usage in groups.values()]
            deviations = [usage.deviation[expert] for usage in groups.values()]
            axes.errorbar(places, means, yerr=deviations, fmt=marker, color=colour, markersize=6, capsize=2)
            axes.plot(places[1:], means[1:], color=colour, linewidth=0.8, alpha=0.6)
            labels.append(f"expert {expert + 1}")
            points.append((places[-1], means[-1]))
            colours.append(colour)
        even = 1 / num_experts
        axes.axhline(even, color=GREY, linestyle="--", linewidth=1)
        label_points(axes, [*labels, "even"], [*points, (len(groups) - 0.5, even)], [*colours, GREY])
        ticks = [f"{group.removesuffix(' items')}\n{usage.num_users:,} users" for group, usage in groups.items()]
        axes.set_xticks(range(len(groups)), ticks)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(False, axis="x")
        axes.set_xlabel("items in the history")
        axes.set_title(in_figure(f"{name} (collapsed)" if groups[ALL_USERS].is_collapsed else name))
    panels[0].set_ylabel("mean gate of each expert\nlines: standard deviation between users")
    save_figure(figure, path)
