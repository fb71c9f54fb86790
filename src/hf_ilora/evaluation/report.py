"""One table of models with quality, latency and size side by side, and a plot of quality against latency."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.list_properties import NUM_DECILES
from hf_ilora.evaluation.plots import CostPoint, data_name, plot_quality_against_cost, short_names
from hf_ilora.evaluation.results import (
    EvaluationContext,
    comparison_text,
    flat_comparison,
    flat_quality,
    interval_text,
    markdown_rows,
    seed_rows,
    write_results,
)
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown

_ABOUT_SAMPLES = (
    "A model with fewer users ranked a random sample of them: its difference is between the two models on these users,",
    "and its other figures are not comparable with those of rows with more users.",
)
_ABOUT_SEVERAL = (
    'Users have several relevant items: "of all" judges by all of them, with the items of the history masked; the',
    "other columns are of the target, the first of them.",
)


@dataclass(frozen=True)
class ModelReport:
    """The measurements of one model.

    Args:
        name: name of the model in the table; rows with the same name are runs of one model with different seeds.
        model_type: model type of its configuration.
        quality: an interval for each metric, named "ranking/metric", such as "masked/ndcg@10".
        latency: time of one recommendation.
        size: size of the model.
        comparison: with the first model of the table, by the metric `compared`; None for the first model.
        by_count: for each group of targets by their training count, an interval for each metric; empty for a model that
            ranked a sample of the users.
        num_users: number of users that the model ranked; None for all.
        source: folder or Hub name of the model.
        kind: one of `plots.KINDS`, for the plot.
        lists: an interval for each metric of the recommended lists, such as "coverage@10"; empty if they were not
            measured.
        by_length: for each group of users by the length of their history, an interval for each metric of both kinds;
            empty for a model that ranked a sample of the users.
    """

    name: str
    model_type: str
    quality: dict[str, Interval]
    latency: Latency
    size: ModelSize
    comparison: RunComparison | None
    by_count: dict[str, dict[str, Interval]] = field(default_factory=dict)
    num_users: int | None = None
    source: str | None = None
    kind: str = "ids"
    lists: dict[str, Interval] = field(default_factory=dict)
    by_length: dict[str, dict[str, Interval]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ReportContext(EvaluationContext):
    """Facts that all models of the table share.

    Args:
        compared: metric of the paired comparison, such as "masked/ndcg@10".
        users_by_count: number of users in each group of targets by their training count.
        num_new_items: number of items that never occur in training.
        users_by_length: number of users in each group by the length of their history.
        title_encoder: the encoder whose vectors measure the diversity of lists; None if it was not measured.
    """

    compared: str
    users_by_count: dict[str, int] = field(default_factory=dict)
    num_new_items: int = 0
    users_by_length: dict[str, int] = field(default_factory=dict)
    title_encoder: str | None = None

    @property
    def main(self) -> str:
        """The ranking that judges users: "relevant" if they have several relevant items, else "masked"."""
        return self.compared.partition("/")[0]


def write_table(reports: Sequence[ModelReport], context: ReportContext, folder: Path) -> None:
    """Write results.md, results.csv and results.json, each whole or not at all.

    Args:
        reports: one per model, in the order of the rows.
        context: of all reports.
        folder: created if it is missing.

    Raises:
        ValueError: for no reports.
    """
    tables = (markdown_table, list_table, decile_table, length_table, count_table)
    text = "".join(table(reports, context) for table in tables) if reports else ""
    write_results(folder, context, reports, [_flat(report) for report in reports], text)


def markdown_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The table in Markdown, with a paragraph on how it was measured, and without metrics that no model has."""
    k, latency = context.k, reports[0].latency
    ranked = [report.num_users or context.num_users for report in reports]
    sampled = any(num_users != context.num_users for num_users in ranked)
    metrics = {
        f"NDCG@{k} of all": f"relevant/ndcg@{k}",
        f"recall@{k} of all": f"relevant/recall@{k}",
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
        f"masked and without; HR@{k} equals Recall@{k}, since each user has one target; ties count against the",
        f"model. In brackets: 95% bootstrap interval over users ({context.num_resamples:,} resamples, seed "
        f"{context.seed}).",
        *(_ABOUT_SEVERAL if context.main == "relevant" else ()),
        f"Difference: {in_markdown(context.compared)} minus that of {in_markdown(reports[0].name)}, paired over users, "
        "with its",
        "interval and two-sided sign-flip p-value. Time of one recommendation for one user:",
        f"{latency.num_calls} calls, {latency.threads} thread(s), {in_markdown(latency.device)}. MB: weight files.",
        *(_ABOUT_SAMPLES if sampled else ()),
        "",
        *markdown_rows(list(columns), list(zip(*columns.values(), strict=True))),
        *seed_rows(reports, {metric: title for title, metric in metrics.items() if title in columns}),
        "",
    ]
    return "\n".join(lines)


def list_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """MAP, precision and the metrics of the recommended lists, in Markdown; empty without lists."""
    if not any(report.lists for report in reports):
        return ""
    k, main = context.k, context.main
    of_lists = {
        "coverage": f"coverage@{k}",
        "Gini": f"gini@{k}",
        "novelty, bits": f"novelty@{k}",
        "most popular tenth": f"decile_1@{k}",
        "diversity": f"diversity@{k}",
        "serendipity": f"serendipity@{k}",
    }
    of_lists = {
        title: metric for title, metric in of_lists.items() if any(metric in report.lists for report in reports)
    }
    rows = [
        (
            in_markdown(report.name),
            f"{report.num_users or context.num_users:,}",
            *(interval_text(report.quality.get(f"{main}/{name}@{k}")) for name in ("map", "precision")),
            *(interval_text(report.lists.get(metric)) for metric in of_lists.values()),
        )
        for report in reports
    ]
    lines = [
        f"The first {k} items outside the history. Coverage: share of the catalogue recommended to at least one user;",
        "Gini: 0 if all items are recommended equally often, 1 if one is always; novelty: mean of -log2 of the share",
        "of the training users who have the item; most popular tenth: share of the recommendations that it has;",
        "serendipity: how much higher than by popularity hits are ranked. Definitions are those of RecTools, where it",
        "has them. Coverage and Gini depend on the number of users.",
    ]
    if f"diversity@{k}" in of_lists.values():
        lines[-1] += " Diversity: mean 1 - cosine between the titles in a list, as vectors of"
        lines.append(f"{in_markdown(context.title_encoder)}.")
    header = ["model", "users", f"MAP@{k}", f"precision@{k}", *of_lists]
    return "\n".join(["", "## Beyond accuracy", "", *lines, "", *markdown_rows(header, rows), ""])


def decile_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The share of recommendations that each tenth of the items has, in Markdown; empty without lists."""
    listed = [report for report in reports if report.lists]
    if not listed:
        return ""
    rows = [
        (
            f"{decile}{' (most popular)' if decile == 1 else ''}",
            *(interval_text(report.lists[f"decile_{decile}@{context.k}"]) for report in listed),
        )
        for decile in range(1, NUM_DECILES + 1)
    ]
    return "\n".join(
        [
            "",
            "## Share of the recommendations by popularity",
            "",
            "Tenths of the catalogue by training count; random lists would have .1 in each.",
            "",
            *markdown_rows(["tenth of the items", *(in_markdown(report.name) for report in listed)], rows),
            "",
        ]
    )


def length_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The metrics by the length of the history, in Markdown; empty without groups."""
    if not context.users_by_length:
        return ""
    k = context.k
    metrics = _accuracy_titles(context) | {
        "novelty, bits": f"novelty@{k}",
        "most popular tenth": f"decile_1@{k}",
        "diversity": f"diversity@{k}",
    }
    groups = [(report.name, report.by_length) for report in reports if report.num_users in (None, context.num_users)]
    lines = ["", "## By the length of the history", "", "Items of the history masked; intervals as above.", ""]
    return "\n".join([*lines, *_group_rows("items", context.users_by_length, metrics, groups), ""])


def count_table(reports: Sequence[ModelReport], context: ReportContext) -> str:
    """The metrics by the training count of the target, in Markdown; empty without groups."""
    if not context.users_by_count:
        return ""
    k = context.k
    metrics = _accuracy_titles(context)
    note = ""
    if context.main == "relevant":
        note = " Users are judged by those of their relevant items that have the count."
    elif context.num_new_items and "0" in context.users_by_count:
        metrics |= {f"NDCG@{k} among new": f"new_items/ndcg@{k}", f"HR@{k} among new": f"new_items/hit_ratio@{k}"}
        note = f" Targets that training has never seen are also ranked among the {context.num_new_items:,} new items."
    groups = [(report.name, report.by_count) for report in reports if report.num_users in (None, context.num_users)]
    lines = [
        "",
        "## By the training count of the target",
        "",
        f"Items of the history masked; intervals as above.{note}",
    ]
    return "\n".join([*lines, "", *_group_rows("count", context.users_by_count, metrics, groups), ""])


def _accuracy_titles(context: ReportContext) -> dict[str, str]:
    """The metrics of a group of users, by the title of their column."""
    k, main = context.k, context.main
    titles = {f"NDCG@{k}": f"{main}/ndcg@{k}", f"HR@{k}": f"{main}/hit_ratio@{k}"}
    return titles | ({f"recall@{k}": f"{main}/recall@{k}"} if main == "relevant" else {})


def _group_rows(
    first: str,
    num_users: Mapping[str, int],
    metrics: Mapping[str, str],
    groups: Sequence[tuple[str, Mapping[str, Mapping[str, Interval]]]],
) -> list[str]:
    """The lines of a table of groups of users.

    Args:
        first: title of the first column.
        num_users: number of users in each group.
        metrics: metrics by the title of their column; those that no run has are left out.
        groups: for each run, its name and, by group, an interval for each metric.
    """
    known = {metric for _, of_model in groups for quality in of_model.values() for metric in quality}
    metrics = {title: metric for title, metric in metrics.items() if metric in known}
    rows = [
        (
            group,
            f"{number:,}",
            in_markdown(name),
            *(interval_text(of_model.get(group, {}).get(metric)) for metric in metrics.values()),
        )
        for group, number in num_users.items()
        for name, of_model in groups
    ]
    return markdown_rows([first, "users", "model", *metrics], rows)


def plot_quality(reports: Sequence[ModelReport], context: ReportContext, path: Path) -> None:
    """Plot quality against median latency: a point for each name, with its seeds, or with the interval of its only run.

    Args:
        reports: one per run.
        context: of all reports; `compared` is the metric to plot.
        path: image file; the suffix determines the format.
    """
    runs: dict[str, list[ModelReport]] = {}
    for report in reports:
        runs.setdefault(report.name, []).append(report)
    points = []
    for of_model, name in zip(runs.values(), short_names(list(runs)), strict=True):
        first, interval = of_model[0], of_model[0].quality[context.compared]
        sampled = first.num_users not in (None, context.num_users)
        points.append(
            CostPoint(
                name=f"{name} ({first.num_users:,} users)" if sampled else name,
                kind=first.kind,
                cost=statistics.median(report.latency.p50_ms for report in of_model),
                values=[report.quality[context.compared].mean for report in of_model],
                interval=(interval.low, interval.high) if len(of_model) == 1 else None,
            )
        )
    latency = reports[0].latency
    among = {"masked": "without seen items", "relevant": "of all relevant items, without seen items"}
    plot_quality_against_cost(
        points,
        path,
        cost=f"median time of one recommendation (ms), {latency.threads} thread(s), {latency.device}",
        quality=f"NDCG@{context.k} {among[context.main]}",
        title=f"{data_name(context.data)}, {context.split} split, {context.num_users:,} users",
    )


def _flat(report: ModelReport) -> dict[str, str | int | float]:
    return {
        "model": report.name,
        "model_type": report.model_type,
        "source": report.source or "",
        **flat_quality(report.quality),
        **{f"latency {name}": value for name, value in asdict(report.latency).items()},
        **asdict(report.size),
        **flat_comparison(report.comparison),
        **flat_quality(report.lists),
        **{
            f"{kind} {group}: {name}": value
            for kind, groups in (("count", report.by_count), ("length", report.by_length))
            for group, quality in groups.items()
            for name, value in flat_quality(quality).items()
        },
    }
