"""One table of models with quality, latency and size side by side, and a plot of quality against latency."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.files import written_whole

REPORT_STEM = "results"


@dataclass(frozen=True)
class ModelReport:
    """All that was measured of one model.

    Args:
        name: how the table calls the model.
        model_type: of its configuration.
        quality: an interval for each metric, named "ranking/metric", such as "masked/ndcg@10".
        latency: of one recommendation.
        size: of the model.
        comparison: with the first model of the table, on `compared`; None for that model itself.
    """

    name: str
    model_type: str
    quality: dict[str, Interval]
    latency: Latency
    size: ModelSize
    comparison: RunComparison | None


@dataclass(frozen=True)
class ReportContext:
    """What all models of a table have in common.

    Args:
        data: name or folder of the data set.
        data_fingerprint: content hash of the data set.
        split: evaluated split.
        num_users: its rows.
        num_items: size of the catalogue.
        num_candidates: size of the candidate sets.
        k: cut-off of the metrics.
        compared: metric of the paired comparison, such as "masked/ndcg@10".
        num_resamples: of intervals and p-values.
        seed: of intervals and p-values.
    """

    data: str
    data_fingerprint: str
    split: str
    num_users: int
    num_items: int
    num_candidates: int
    k: int
    compared: str
    num_resamples: int
    seed: int


def write_table(reports: Sequence[ModelReport], context: ReportContext, folder: Path) -> None:
    """Write results.md, results.csv and results.json, each whole or not at all.

    Args:
        reports: one per model, in the order of the rows.
        context: what they have in common.
        folder: made when it is missing.

    Raises:
        ValueError: for no reports.
    """
    if not reports:
        raise ValueError("there are no models to report on: expected at least one")
    with written_whole(folder / f"{REPORT_STEM}.json") as path:
        content = {"context": asdict(context), "models": [asdict(report) for report in reports]}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with written_whole(folder / f"{REPORT_STEM}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = [_flat(report) for report in reports]
        # The first model has no comparison: the longest row names all columns.
        writer = csv.DictWriter(file, fieldnames=max(rows, key=len), restval="")
        writer.writeheader()
        writer.writerows(rows)
    with written_whole(folder / f"{REPORT_STEM}.md") as path:
        path.write_text(markdown_table(reports, context), encoding="utf-8")


def markdown_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The table as Markdown, with a paragraph that says how it was measured."""
    k, latency = context.k, reports[0].latency
    titles = {
        "model": [escaped(report.name) for report in reports],
        f"NDCG@{k} masked": _column(reports, f"masked/ndcg@{k}"),
        f"HR@{k} masked": _column(reports, f"masked/hit_ratio@{k}"),
        "MRR masked": _column(reports, "masked/mrr"),
        f"NDCG@{k}": _column(reports, f"unmasked/ndcg@{k}"),
        f"HR@{k}": _column(reports, f"unmasked/hit_ratio@{k}"),
        "MRR": _column(reports, "unmasked/mrr"),
        f"HR@1 of {context.num_candidates}": _column(reports, "candidates/hit_ratio@1"),
        "difference, p": [comparison_text(report.comparison) for report in reports],
        "p50 / p95 ms": [f"{report.latency.p50_ms:.2f} / {report.latency.p95_ms:.2f}" for report in reports],
        "parameters": [f"{report.size.num_parameters:,}" for report in reports],
        "MB": [f"{report.size.num_bytes / 1e6:.2f}" for report in reports],
    }
    lines = [
        f"# {escaped(context.data)}, {context.split} split",
        "",
        f"{context.num_users:,} users, {context.num_items:,} items, data fingerprint",
        f"`{context.data_fingerprint[:16]}`. Full ranking over the catalogue, with the items of the history masked and",
        f"without; HR@{k} is also Recall@{k}, since each user has one relevant item; ties count against the model.",
        f"In brackets: 95% bootstrap interval over users ({context.num_resamples:,} resamples, seed {context.seed}).",
        f"Difference: {context.compared} minus that of {escaped(reports[0].name)}, paired over users, with its",
        "interval and two-sided sign-flip p-value. Time of one recommendation for one user:",
        f"{latency.num_calls} calls, {latency.threads} thread(s), {latency.device}. MB: weight files.",
        "",
        "| " + " | ".join(titles) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
        *("| " + " | ".join(cells) + " |" for cells in zip(*titles.values(), strict=True)),
        "",
    ]
    return "\n".join(lines)


def plot_quality(reports: Sequence[ModelReport], context: ReportContext, path: Path) -> None:
    """Plot quality with its interval against the median latency, one point per model.

    Args:
        reports: one per model.
        context: names the metric, `compared`.
        path: image file; its suffix is the format.
    """
    # Loading matplotlib takes most of a second, and only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, report in enumerate(reports):
        quality = report.quality[context.compared]
        whiskers = [[quality.mean - quality.low], [quality.high - quality.mean]]
        axes.errorbar(
            report.latency.p50_ms,
            quality.mean,
            yerr=whiskers,
            fmt="o",
            capsize=3,
            color=f"C{number}",
            label=report.name,
        )
    axes.set_xscale("log")
    axes.set_xlabel(
        f"median time of one recommendation (ms), {reports[0].latency.threads} thread(s), {reports[0].latency.device}"
    )
    axes.set_ylabel(f"{context.compared}, 95% interval over users")
    axes.set_title(f"{context.data}, {context.split} split, {context.num_users:,} users")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _flat(report: ModelReport) -> dict[str, str | int | float]:
    row: dict[str, str | int | float] = {"model": report.name, "model_type": report.model_type}
    for name, interval in report.quality.items():
        row |= {name: interval.mean, f"{name} low": interval.low, f"{name} high": interval.high}
    row |= {f"latency {name}": value for name, value in asdict(report.latency).items()} | asdict(report.size)
    if report.comparison is not None:
        difference = report.comparison.difference
        row |= {"difference": difference.mean, "difference low": difference.low, "difference high": difference.high}
        row["p_value"] = report.comparison.p_value
    return row


def _column(reports: Sequence[ModelReport], name: str) -> list[str]:
    return [interval_text(report.quality[name]) for report in reports]


def interval_text(interval: Interval) -> str:
    """A mean with its interval in brackets."""
    return f"{short_number(interval.mean)} [{short_number(interval.low)}, {short_number(interval.high)}]"


def comparison_text(comparison: RunComparison | None) -> str:
    """A difference with its interval and p-value; nothing for the model that others are compared with."""
    if comparison is None:
        return ""
    difference = comparison.difference
    interval = f"[{signed_number(difference.low)}, {signed_number(difference.high)}]"
    return f"{signed_number(difference.mean)} {interval}, p={comparison.p_value:.4f}"


def short_number(value: float) -> str:
    """0.0421 as .0421, as papers print it."""
    return f"{value:.4f}".removeprefix("0")


def signed_number(value: float) -> str:
    """0.0421 as +.0421."""
    return ("-" if value < 0 else "+") + short_number(abs(value))


def escaped(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    return text.replace("|", "\\|")
