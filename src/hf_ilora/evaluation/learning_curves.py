"""Learning curves from the logs of training runs: the training loss and the quality on validation, by epoch."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ilora.evaluation.plots import label_points, new_figure, save_figure, short_names, style

# Axis labels of the validation metrics by their names in the Trainer's log; the first one that a run has is drawn.
VALIDATION = {"eval_ndcg@10": "NDCG@10 on validation, without seen items", "eval_loss": "loss on validation"}
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class LearningCurve:
    """The log of one training run.

    Args:
        name: name of the model; curves with the same name are runs with different seeds.
        loss: (epoch, training loss) in order.
        validation: (epoch, value) in order, for each metric of `VALIDATION` that was logged.
    """

    name: str
    loss: list[tuple[float, float]]
    validation: dict[str, list[tuple[float, float]]]


def read_curve(folder: Path, name: str) -> LearningCurve:
    """Read the newest log of a run, from its folder or its checkpoints.

    Args:
        folder: folder of the run, or one of its checkpoints.
        name: name of the model.

    Raises:
        FileNotFoundError: when the folder has no log.
        ValueError: when its log cannot be read or is empty.
    """
    files = [folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")]
    files = [file for file in files if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"{folder} has no {STATE_FILE}, nor has any checkpoint-* in it: expected the folder of a training run"
        )
    logs = {}
    for file in files:
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            logs[state["global_step"]] = list(state["log_history"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not the state of a Trainer ({error!r}): delete the checkpoint") from error
    log = logs[max(logs)]
    curve = LearningCurve(
        name,
        [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry],
        {
            metric: [(entry["epoch"], entry[metric]) for entry in log if metric in entry]
            for metric in VALIDATION
            if any(metric in entry for entry in log)
        },
    )
    if not curve.loss and not curve.validation:
        raise ValueError(f"the log of {folder} is empty: train with --logging_strategy epoch and --eval_strategy epoch")
    return curve


def plot_learning_curves(curves: Sequence[LearningCurve], path: Path) -> None:
    """Plot the training loss and the quality on validation by epoch: a line per name, and a thin one for each seed.

    Losses are comparable between runs of one kind of model, and not between kinds.

    Args:
        curves: at least one.
        path: image file; the suffix determines the format.

    Raises:
        ValueError: for no curves.
    """
    if not curves:
        raise ValueError("there are no runs to draw: expected at least one")
    metric = next((name for name in VALIDATION if any(name in curve.validation for curve in curves)), None)
    panels = {"training loss": [curve.loss for curve in curves]}
    if metric is not None:
        panels[VALIDATION[metric]] = [curve.validation.get(metric, []) for curve in curves]
    panels = {title: lines for title, lines in panels.items() if any(lines)}
    names = short_names([curve.name for curve in curves])
    figure, all_axes = new_figure(2 + 5 * len(panels), 4.5, len(panels))
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        labels, ends, colours = [], [], []
        for number, name in enumerate(dict.fromkeys(names)):
            colour, marker = style(number)
            seeds = [dict(line) for line, other in zip(lines, names, strict=True) if other == name and line]
            if not seeds:
                continue
            for seed in seeds if len(seeds) > 1 else []:
                axes.plot(*zip(*seed.items(), strict=True), color=colour, linewidth=0.6, alpha=0.6)
            epochs = sorted(set.intersection(*map(set, seeds)))
            if not epochs:  # seeds that were logged at different epochs have no common mean
                epochs, seeds = sorted(seeds[0]), seeds[:1]
            means = [statistics.mean(seed[epoch] for seed in seeds) for epoch in epochs]
            axes.plot(epochs, means, marker=marker, markevery=max(1, len(epochs) // 10), color=colour)
            labels.append(name)
            ends.append((epochs[-1], means[-1]))
            colours.append(colour)
        axes.set_ylim(axes.get_ylim())
        label_points(axes, labels, ends, colours)
        axes.set_xlabel("epoch")
        axes.set_ylabel(title + ("\nthin lines: seeds" if len(set(names)) < len(names) else ""))
    save_figure(figure, path)
