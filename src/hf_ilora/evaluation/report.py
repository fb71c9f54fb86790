"""One table of models with quality, latency and size side by side, and a plot of quality against latency."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.results import (
    EvaluationContext,
    comparison_text,
    flat_comparison,
    flat_quality,
    interval_text,
    markdown_rows,
    write_results,
)
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.files import written_whole
from hf_ilora_cli.shown_text import code_in_markdown, in_figure, in_markdown

_ABOUT_SAMPLES = (
    "A model with fewer users ranked a random sample of them: its difference is between the two models on these users,",
    "and its other figures are not comparable with those of rows with more users.",
)


@dataclass(frozen=True)
class ModelReport:
    """The measurements of one model.

    Args:
        name: name of the model in the table.
        model_type: of its configuration.
        quality: an interval for each metric, named "ranking/metric", such as "masked/ndcg@10".
        latency: time of one recommendation.
        size: size of the model.
        comparison: with the first model of the table, by the metric `compared`; None for the first model.
        by_count: for each group of targets by their training count, an interval for each metric; empty for a model that
            ranked a sample of the users.
        num_users: that the model ranked; None for all.
    """

    name: str
    model_type: str
    quality: dict[str, Interval]
    latency: Latency
    size: ModelSize
    comparison: RunComparison | None
    by_count: dict[str, dict[str, Interval]] = field(default_factory=dict)
    num_users: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReportContext(EvaluationContext):
    """What all models of a table have in common.

    Args:
        compared: metric of the paired comparison, such as "masked/ndcg@10".
        users_by_count: number of users in each group of targets by their training count.
        num_new_items: number of items that never occur in training.
    """

    compared: str
    users_by_count: dict[str, int] = field(default_factory=dict)
    num_new_items: int = 0


def write_table(reports: Sequence[ModelReport], context: ReportContext, folder: Path) -> None:
    """Write results.md, results.csv and results.json, each whole or not at all.

    Args:
        reports: one per model, in the order of the rows.
        context: of all reports.
        folder: created if it is missing.

    Raises:
        ValueError: for no reports.
    """
    text = f"{markdown_table(reports, context)}{count_table(reports, context)}" if reports else ""
    write_results(folder, context, reports, [_flat(report) for report in reports], text)


def markdown_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The table in Markdown, with a paragraph on how it was measured; metrics that no model has are left out."""
    k, latency = context.k, reports[0].latency
    ranked = [report.num_users or context.num_users for report in reports]
    sampled = any(num_users != context.num_users for num_users in ranked)
    metrics = {
        f"NDCG@{k} masked": f"masked/ndcg@{k}",
        f"HR@{k} masked": f"masked/hit_ratio@{k}",
        "MRR masked": "masked/mrr",
        f"NDCG@{k}": f"unmasked/ndcg@{k}",
        f"HR@{k}": f"unmasked/hit_ratio@{k}",
        "MRR": "unmasked/mrr",
        f"HR@1 of {context.num_candidates}": "candidates/hit_ratio@1",
    }
    columns = {
        "model": [in_markdown(report.name) for report in reports],
        **({"users": [f"{num_users:,}" for num_users in ranked]} if sampled else {}),
        **{
            title: [interval_text(report.quality.get(metric)) for report in reports]
            for title, metric in metrics.items()
            if any(metric in report.quality for report in reports)
        },
        "difference, p": [comparison_text(report.comparison) for report in reports],
        "p50 / p95 ms": [f"{report.latency.p50_ms:.2f} / {report.latency.p95_ms:.2f}" for report in reports],
        "parameters": [f"{report.size.num_parameters:,}" for report in reports],
        "MB": [f"{report.size.num_bytes / 1e6:.2f}" for report in reports],
    }
    lines = [
        f"# {in_markdown(context.data)}, {in_markdown(context.split)} split",
        "",
        f"{context.num_users:,} users, {context.num_items:,} items, data fingerprint",
        f"{code_in_markdown(context.data_fingerprint[:16])}. Targets are ranked in the whole catalogue, with the items "
        "of the history",
        f"masked and without; HR@{k} equals Recall@{k}, since each user has one relevant item; ties count against the",
        f"model. In brackets: 95% bootstrap interval over users ({context.num_resamples:,} resamples, seed "
        f"{context.seed}).",
        f"Difference: {in_markdown(context.compared)} minus that of {in_markdown(reports[0].name)}, paired over users, "
        "with its",
        "interval and two-sided sign-flip p-value. Time of one recommendation for one user:",
        f"{latency.num_calls} calls, {latency.threads} thread(s), {in_markdown(latency.device)}. MB: weight files.",
        *(_ABOUT_SAMPLES if sampled else ()),
        "",
        *markdown_rows(list(columns), list(zip(*columns.values(), strict=True))),
        "",
    ]
    return "\n".join(lines)


def count_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The metrics by the training count of the target, in Markdown; nothing without groups."""
    if not context.users_by_count:
        return ""
    k = context.k
    metrics = {f"NDCG@{k}": f"masked/ndcg@{k}", f"HR@{k}": f"masked/hit_ratio@{k}"}
    note = ""
    if context.num_new_items and "0" in context.users_by_count:
        metrics |= {f"NDCG@{k} among new": f"new_items/ndcg@{k}", f"HR@{k} among new": f"new_items/hit_ratio@{k}"}
        note = f" Targets that training has never seen are also ranked among the {context.num_new_items:,} new items."
    rows = [
        (
            group,
            f"{num_users:,}",
            in_markdown(report.name),
            *(interval_text(report.by_count.get(group, {}).get(metric)) for metric in metrics.values()),
        )
        for group, num_users in context.users_by_count.items()
        for report in reports
        if report.num_users in (None, context.num_users)
    ]
    return "\n".join(
        [
            "",
            "## By the training count of the target",
            "",
            f"Items of the history masked; intervals as above.{note}",
            "",
            *markdown_rows(["count", "users", "model", *metrics], rows),
            "",
        ]
    )


def plot_quality(reports: Sequence[ModelReport], context: ReportContext, path: Path) -> None:
    """Plot quality with its interval against the median latency, one point per model.

    Args:
        reports: one per model.
        context: of all reports; `compared` is the metric to plot.
        path: image file; the suffix determines the format.
    """
    # Importing matplotlib takes most of a second, and only this function needs it.
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
            label=in_figure(report.name),
        )
    axes.set_xscale("log")
    axes.set_xlabel(
        f"median time of one recommendation (ms), {reports[0].latency.threads} thread(s), {reports[0].latency.device}"
    )
    axes.set_ylabel(f"{context.compared}, 95% interval over users")
    axes.set_title(f"{in_figure(context.data)}, {context.split} split, {context.num_users:,} users")
    axes.grid(alpha=0.3)
    axes.legend()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _flat(report: ModelReport) -> dict[str, str | int | float]:
    return {
        "model": report.name,
        "model_type": report.model_type,
        **flat_quality(report.quality),
        **{f"latency {name}": value for name, value in asdict(report.latency).items()},
        **asdict(report.size),
        **flat_comparison(report.comparison),
        **{
            f"count {group}: {name}": value
            for group, quality in report.by_count.items()
            for name, value in flat_quality(quality).items()
        },
    }
