"""Styles and functions that all plots share, and the plot of quality against cost.

Models and lines differ by marker and by colour; the palette is that of Okabe and Ito, which is safe for colour-blind
readers. Names are written beside the points, numbers are plain, and all seeds of a model are drawn.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from hf_ilora.files import written_whole
from hf_ilora_cli.shown_text import in_figure

GREY = "#777777"
# A colour and a marker for each line or model of a plot, in this order.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "D"),
    ("#009E73", "^"),
    ("#CC79A7", "s"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
    (GREY, "<"),
)
# Kinds of models, each with its text in the legend, colour and marker.
KINDS = {
    "baseline": ("baselines that count", "#000000", "s"),
    "ids": ("small models, item ids only", "#0072B2", "o"),
    "student": ("small models that learnt from titles or teachers", "#D55E00", "D"),
    "control": ("controls", GREY, "v"),
    "language model": ("language models", "#009E73", "^"),
}


def style(number: int) -> tuple[str, str]:
    """Colour and marker of the line or model with this number; they repeat after eight."""
    return STYLES[number % len(STYLES)]


def new_figure(width: float, height: float, panels: int = 1):
    """A figure without a window and its panels, side by side; sizes in inches."""
    # Importing matplotlib takes most of a second, and only plots need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.ticklabel_format(useOffset=False, style="plain")
    return figure, panels


def save_figure(figure, path: Path) -> None:
    """Write the image, whole or not at all; the suffix determines the format."""
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def logarithmic(axis, low: float, high: float) -> None:
    """Make an x axis logarithmic, with plain numbers: 0.1, 1, 10, 1,000.

    Args:
        axis: `axes.xaxis`.
        low, high: the smallest and the largest value on it, above 0.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_xscale("log")
    few = high / low < 100
    axis.axes.set_xlim(low / (1.3 if few else 2), high * (1.3 if few else 2))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_points(axes, labels: Sequence[str], points: Sequence[tuple[float, float]], colours: Sequence[str]) -> None:
    """Write a label for each point to the right of the axes, in its colour, joined by a thin line.

    Args:
        axes: with their final limits, in which the points lie.
        labels: (points,) texts, drawn literally.
        points: (points,) pairs of x and y.
        colours: (points,) colours of the labels.
    """
    low, high = axes.get_ylim()
    height = axes.figure.get_size_inches()[1]  # a label of 9 points takes an eighth of an inch
    places = spread([y for _, y in points], 0.2 / height * (high - low))
    for label, point, place, colour in zip(labels, points, places, colours, strict=True):
        axes.annotate(
            in_figure(label),
            point,
            (1.03, place),
            textcoords=axes.get_yaxis_transform(),  # x in parts of the axes, y in data
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels near those of their points, at least `gap` apart."""
    order = np.argsort(heights, kind="stable")
    places = np.asarray(heights, dtype=float)[order]
    for _ in range(200):  # neighbours that are too close move apart by the same distance
        overlap = np.clip(gap - np.diff(places), 0, None)
        if overlap.max(initial=0.0) < 1e-3 * gap:
            break
        places[:-1] -= overlap / 2
        places[1:] += overlap / 2
    result = np.empty(len(places))
    result[order] = places
    return result.tolist()


def short_names(names: Sequence[str]) -> list[str]:
    """Shorten paths to as few of their last parts as tell all of them apart.

    Names that contain a blank are not paths and stay as they are.
    """
    parts_of = {name: PurePosixPath(name).parts if "/" in name and " " not in name else (name,) for name in names}
    for length in range(1, max(map(len, parts_of.values()), default=0) + 1):
        short = {name: "/".join(parts[-length:]) for name, parts in parts_of.items()}
        if len(set(short.values())) == len(short):
            return [short[name] for name in names]
    return list(names)


def without_sources(labels: Sequence[str]) -> list[str]:
    """The names in labels such as "iLoRA (outputs/ilora)"; runs with the same name are numbered."""
    names = [label.partition(" (")[0] for label in labels]
    return [
        name if names.count(name) == 1 else f"{name}, run {names[: place + 1].count(name)}"
        for place, name in enumerate(short_names(names))
    ]


def data_name(data: str) -> str:
    """The name of a data set from its folder: ml-100k for outputs/ml-100k/data."""
    parts = [part for part in PurePosixPath(data).parts if part not in ("/", "data")]
    return parts[-1] if parts else data


@dataclass(frozen=True)
class CostPoint:
    """A model in the plot of quality against cost.

    Args:
        name: name of the model.
        kind: one of `KINDS`.
        cost: value on the horizontal axis, above 0.
        values: quality of each seed.
        interval: ends of the interval over users; None if there are several seeds, whose values are drawn instead.
    """

    name: str
    kind: str
    cost: float
    values: Sequence[float]
    interval: tuple[float, float] | None = None


def plot_quality_against_cost(
    points: Sequence[CostPoint], path: Path, *, cost: str, quality: str, title: str = ""
) -> None:
    """Draw a point for each model, with its name beside it and the spread of its seeds.

    Args:
        points: at least one.
        path: image file; the suffix determines the format.
        cost: label of the horizontal axis, with its unit.
        quality: label of the vertical axis.
        title: title of the plot.

    Raises:
        ValueError: for no points, and a cost that is not above 0.
    """
    if not points:
        raise ValueError("there are no models to draw: expected at least one")
    wrong = [point for point in points if not (point.cost > 0 and math.isfinite(point.cost))]
    if wrong:
        raise ValueError(f"the cost of {wrong[0].name} is {wrong[0].cost}: expected a number above 0")
    figure, (axes,) = new_figure(9, max(5, 1.5 + 0.25 * len(points)))
    costs = [point.cost for point in points]
    logarithmic(axes.xaxis, min(costs), max(costs))
    for point in points:
        _, colour, marker = KINDS[point.kind]
        mean = statistics.mean(point.values)
        axes.plot(point.cost, mean, marker, color=colour, markersize=8)
        if point.interval is not None:
            axes.vlines(point.cost, *point.interval, color=colour, linewidth=1)
        if len(point.values) > 1:
            axes.vlines(point.cost, min(point.values), max(point.values), color=colour, linewidth=2.5, alpha=0.5)
            axes.plot(
                [point.cost] * len(point.values), point.values, "_", color=colour, markersize=10, markeredgewidth=1
            )
    axes.margins(y=0.08)
    axes.set_ylim(axes.get_ylim())
    label_points(
        axes,
        [point.name for point in points],
        [(point.cost, statistics.mean(point.values)) for point in points],
        [KINDS[point.kind][1] for point in points],
    )
    spreads = ["thin lines: 95% interval over users"] * any(point.interval for point in points)
    spreads += ["thick lines and dashes: seeds"] * any(len(point.values) > 1 for point in points)
    axes.set_xlabel(cost)
    axes.set_ylabel(quality + (f"\n{'; '.join(spreads)}" if spreads else ""))
    axes.set_title(in_figure(title))
    for kind in dict.fromkeys(point.kind for point in points):
        label, colour, marker = KINDS[kind]
        axes.plot([], [], marker, color=colour, label=label)
    figure.legend(loc="outside upper center", ncols=len(KINDS), fontsize=8, frameon=False)
    save_figure(figure, path)
