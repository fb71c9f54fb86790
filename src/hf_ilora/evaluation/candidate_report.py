"""One table of models that rank a user's candidates, with quality and cost side by side, and a plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ilora.evaluation.plots import GREY, data_name, new_figure, save_figure, short_names, style
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
from hf_ilora_cli.shown_text import code_in_markdown, in_figure, in_markdown

# Explains the columns of generated answers, by `CandidateContext.generate`.
_ABOUT_ANSWERS = {
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
        comparison: with the SASRec that the model uses, by HR@1 among the candidates, paired over users; None for a
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
    """Facts that all rows of the table share.

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
    write_results(folder, context, reports, [_flat(report) for report in reports], text)


def candidate_table(reports: Sequence[CandidateReport], context: CandidateContext) -> str:
    """The table in Markdown, with a paragraph on how it was measured, and without metrics that no row has."""
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
        *([_ABOUT_ANSWERS[context.generate]] if generated else []),
        *(["Only the first line of an answer counts."] if context.first_line_only else []),
        "",
        *markdown_rows(header + ["s / answer"] * generated, rows),
    ]
    lines += seed_rows(reports, titles)
    return "\n".join([*lines, ""])


def plot_candidate_hits(reports: Sequence[CandidateReport], context: CandidateContext, path: Path) -> None:
    """Plot HR@1 among the candidates: one line per name, with its seeds, or with the interval of its only run.

    Args:
        reports: in the order of the rows.
        context: of all reports.
        path: image file; the suffix determines the format.
    """
    runs: dict[str, list[Interval]] = {}
    for report in reports:
        runs.setdefault(report.name, []).append(report.quality["candidates/hit_ratio@1"])
    figure, (axes,) = new_figure(8, 1.5 + 0.4 * len(runs))
    colour, marker = style(0)
    for place, hits in enumerate(runs.values()):
        means = [each.mean for each in hits]
        axes.plot(statistics.mean(means), place, marker, color=colour, markersize=8)
        if len(hits) == 1:
            axes.hlines(place, hits[0].low, hits[0].high, color=colour, linewidth=1)
        else:
            axes.plot(means, [place] * len(means), "|", color=colour, markersize=12)
    chance = 1 / context.num_candidates
    axes.axvline(chance, color=GREY, linestyle="--", linewidth=1)
    axes.annotate("chance", (chance, 1.01), xycoords=axes.get_xaxis_transform(), color=GREY, fontsize=9, ha="center")
    axes.set_yticks(range(len(runs)), [in_figure(name) for name in short_names(list(runs))])
    axes.invert_yaxis()
    spreads = ["lines: 95% interval over users"] * any(len(hits) == 1 for hits in runs.values())
    spreads += ["dashes: seeds"] * any(len(hits) > 1 for hits in runs.values())
    axes.set_xlabel(
        f"share of users whose item is ranked first of {context.num_candidates} candidates\n{'; '.join(spreads)}"
    )
    axes.set_title(f"{in_figure(data_name(context.data))}, {context.split} split, {context.num_users:,} users", pad=18)
    axes.grid(False, axis="y")
    save_figure(figure, path)


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
