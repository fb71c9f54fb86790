"""One table of models that rank a user's candidates, with quality and cost side by side, and a plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ilora.evaluation.results import (
    EvaluationContext,
    comparison_text,
    flat_comparison,
    flat_quality,
    interval_text,
    markdown_rows,
    short_number,
    write_results,
)
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.files import written_whole
from hf_ilora_cli.shown_text import code_in_markdown, in_figure, in_markdown

# Explains the columns of generated answers below a table.
GENERATED = {
    "free": "Answers are generated freely. An answer is valid if it names exactly one candidate.",
    "constrained": "Answers are generated under the constraint that they are titles of candidates, so each names one.",
}


@dataclass(frozen=True)
class CandidateReport:
    """The measurements of one row of the table.

    Args:
        name: name of the model; rows with the same name are runs of one model with different seeds.
        source: folder or Hub name of the weights.
        quality: an interval for each metric, named "ranking/metric": "candidates/..." for the candidates ranked by
            score, "answers/..." for generated answers, "masked/..." for the catalogue without seen items.
        comparison: with the SASRec that the model reads, by HR@1 among the candidates, paired over users; None for a
            SASRec.
        num_parameters: number of parameters.
        num_trained: number of parameters that were trained for this model.
        seconds_per_user: time to rank the candidates (for a SASRec or an item head, the catalogue) in batches.
        seconds_per_answer: time to generate an answer; None if none was generated.
    """

    name: str
    source: str
    quality: dict[str, Interval]
    comparison: RunComparison | None
    num_parameters: int
    num_trained: int
    seconds_per_user: float
    seconds_per_answer: float | None = None


@dataclass(frozen=True, kw_only=True)
class CandidateContext(EvaluationContext):
    """What all rows of a table have in common.

    Args:
        generate: how answers were generated: "free", "constrained" or "none".
        first_line_only: whether only the first line of a free answer counts.
    """

    generate: str
    first_line_only: bool = False


def metric_titles(context: CandidateContext) -> dict[str, str]:
    """The column title of each metric, in the order of the columns."""
    k, among = context.k, context.num_candidates
    return {
        "candidates/hit_ratio@1": f"HR@1 of {among}",
        f"candidates/ndcg@{k}": f"NDCG@{k} of {among}",
        "answers/valid_ratio": "ValidRatio",
        "answers/hit_ratio@1_of_valid": "HR@1, correct / valid",
        "answers/hit_ratio@1_of_all": "HR@1, correct / all",
        f"masked/hit_ratio@{k}": f"HR@{k} of all items",
        f"masked/ndcg@{k}": f"NDCG@{k} of all items",
    }


def seed_summary(reports: Sequence[CandidateReport]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over the runs of each name that has several runs.

    Returns:
        name -> metric -> {"runs", "mean", "standard_deviation"}, for the metrics that all runs of the name have.
    """
    summary = {}
    for name in dict.fromkeys(report.name for report in reports):
        runs = [report.quality for report in reports if report.name == name]
        if len(runs) > 1:
            shared = [metric for metric in runs[0] if all(metric in run for run in runs)]
            values = {metric: [run[metric].mean for run in runs] for metric in shared}
            summary[name] = {
                metric: {
                    "runs": len(runs),
                    "mean": statistics.mean(each),
                    "standard_deviation": statistics.stdev(each),
                }
                for metric, each in values.items()
            }
    return summary


def write_candidate_table(
    reports: Sequence[CandidateReport], context: CandidateContext, folder: Path, appendix: str = ""
) -> None:
    """Write results.md, results.csv and results.json, each whole or not at all.

    Args:
        reports: in the order of the rows.
        context: of all reports.
        folder: created if it is missing.
        appendix: Markdown to append to the table.

    Raises:
        ValueError: for no reports.
    """
    text = candidate_table(reports, context) + appendix
    write_results(folder, context, reports, [_flat(report) for report in reports], text, seeds=seed_summary(reports))


def candidate_table(reports: Sequence[CandidateReport], context: CandidateContext) -> str:
    """The table in Markdown, with a paragraph on how it was measured; metrics that no row has are left out."""
    titles = {
        metric: title
        for metric, title in metric_titles(context).items()
        if any(metric in report.quality for report in reports)
    }
    generated = context.generate != "none"
    header = ["model", *titles.values(), "difference to SASRec, p", "parameters", "trained", "s / user"]
    rows = []
    for report in reports:
        cells = [in_markdown(report.name), *(interval_text(report.quality.get(metric)) for metric in titles)]
        cells += [comparison_text(report.comparison), f"{report.num_parameters:,}", f"{report.num_trained:,}"]
        cells.append(f"{report.seconds_per_user:.4f}")
        if generated:
            cells.append("" if report.seconds_per_answer is None else f"{report.seconds_per_answer:.4f}")
        rows.append(cells)
    lines = [
        f"# {in_markdown(context.data)}, {in_markdown(context.split)} split",
        "",
        f"{context.num_users:,} users, {context.num_items:,} items, {context.num_candidates} fixed candidates per",
        f"user; data fingerprint {code_in_markdown(context.data_fingerprint[:16])}. One user is "
        f"{1 / context.num_users:.2%} of HR@1.",
        "Candidates are ranked by the likelihood of their titles, pooled with the scores of the SASRec if the model",
        "was trained that way (SASRec and item head: by score); ties count against the model. In brackets: 95%",
        f"bootstrap interval over users ({context.num_resamples:,} resamples, seed {context.seed}); for generated",
        f"answers, Wilson's interval. Difference: HR@1 of {context.num_candidates} minus that of the SASRec that the",
        "model reads, paired over users, with its interval and two-sided sign-flip p-value.",
        *([GENERATED[context.generate]] if generated else []),
        *(["Only the first line of an answer counts."] if context.first_line_only else []),
        "",
        *markdown_rows(header + ["s / answer"] * generated, rows),
    ]
    summary = seed_summary(reports)
    if summary:
        rows = []
        for name, metrics in summary.items():
            cells = [in_markdown(name), str(sum(report.name == name for report in reports))]
            for metric in titles:
                value = metrics.get(metric)
                text = value and f"{short_number(value['mean'])} ± {short_number(value['standard_deviation'])}"
                cells.append(text or "")
            rows.append(cells)
        lines += ["", "Mean ± standard deviation over runs with different seeds:", ""]
        lines += markdown_rows(["model", "runs", *titles.values()], rows)
    return "\n".join([*lines, ""])


def plot_candidate_hits(reports: Sequence[CandidateReport], context: CandidateContext, path: Path) -> None:
    """Plot HR@1 among the candidates with its interval, one line per row of the table.

    Args:
        reports: in the order of the rows.
        context: of all reports.
        path: image file; the suffix determines the format.
    """
    # Importing matplotlib takes most of a second, and only this function needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(reports)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, report in enumerate(reports):
        hits = report.quality["candidates/hit_ratio@1"]
        whiskers = [[hits.mean - hits.low], [hits.high - hits.mean]]
        axes.errorbar(hits.mean, place, xerr=whiskers, fmt="o", capsize=3, color="C0")
    axes.axvline(1 / context.num_candidates, color="grey", linestyle="--", linewidth=1, label="chance")
    axes.set_yticks(range(len(reports)), [in_figure(report.name) for report in reports])
    axes.invert_yaxis()
    axes.set_xlabel(f"HR@1 of {context.num_candidates} candidates, 95% interval over users")
    axes.set_title(f"{in_figure(context.data)}, {context.split} split, {context.num_users:,} users")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _flat(report: CandidateReport) -> dict[str, str | int | float | None]:
    return {
        "model": report.name,
        "source": report.source,
        **flat_quality(report.quality),
        "num_parameters": report.num_parameters,
        "num_trained": report.num_trained,
        "seconds_per_user": report.seconds_per_user,
        "seconds_per_answer": report.seconds_per_answer,
        **flat_comparison(report.comparison),
    }
