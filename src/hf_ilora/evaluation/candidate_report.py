"""One table of models that choose among candidates: what each gets right, what it costs, and the plot of it."""

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_ilora.evaluation.report import REPORT_STEM, comparison_text, escaped, interval_text, short_number
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.files import written_whole

# What a table says of generated answers.
GENERATED = {
    "free": "Answers are generated freely, and valid when they name exactly one candidate.",
    "constrained": "Answers are generated, constrained to the titles of the candidates; each is one of them.",
}


@dataclass(frozen=True)
class CandidateReport:
    """All that was measured of one row of the table.

    Args:
        name: of the model; rows of one name are runs of one model with different seeds.
        source: folder or Hub name of the weights.
        quality: an interval for each metric, named "ranking/metric". "candidates/..." is the choice by score,
            "answers/..." that by generation, "masked/..." the ranking of the whole catalogue without seen items.
        comparison: of HR@1 among the candidates with the SASRec that the model reads, paired over users; None for a
            SASRec.
        num_parameters: numbers the model holds.
        num_trained: those of them that were trained for this model.
        seconds_per_user: of ranking the candidates (for a SASRec or an item head: the catalogue), in batches.
        seconds_per_answer: of generating; None where nothing was generated.
    """

    name: str
    source: str
    quality: dict[str, Interval]
    comparison: RunComparison | None
    num_parameters: int
    num_trained: int
    seconds_per_user: float
    seconds_per_answer: float | None = None


@dataclass(frozen=True)
class CandidateContext:
    """What all rows of a table have in common.

    Args:
        data: name or folder of the data set.
        data_fingerprint: content hash of the data set.
        split: evaluated split.
        num_users: its rows.
        num_items: size of the catalogue.
        num_candidates: size of the candidate sets.
        k: cut-off of NDCG and of the ranking of the catalogue.
        generate: how answers were generated: "free", "constrained" or "none".
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
    generate: str
    num_resamples: int
    seed: int


def metric_titles(context: CandidateContext) -> dict[str, str]:
    """Title of the column of each metric, in their order."""
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
    """Mean and standard deviation over the runs of each name that has several.

    Returns:
        name -> metric -> {"runs", "mean", "standard_deviation"}, for metrics that all runs of the name have.
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
        context: what they have in common.
        folder: made when it is missing.
        appendix: Markdown to stand behind the table.

    Raises:
        ValueError: for no reports.
    """
    if not reports:
        raise ValueError("there are no models to report on: expected at least one")
    with written_whole(folder / f"{REPORT_STEM}.json") as path:
        content = {
            "context": asdict(context),
            "models": [asdict(report) for report in reports],
            "seeds": seed_summary(reports),
        }
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with written_whole(folder / f"{REPORT_STEM}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        rows = [_flat(report) for report in reports]
        columns = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
    with written_whole(folder / f"{REPORT_STEM}.md") as path:
        path.write_text(candidate_table(reports, context) + appendix, encoding="utf-8")


def candidate_table(reports: Sequence[CandidateReport], context: CandidateContext) -> str:
    """The table as Markdown, with a paragraph that says how it was measured; metrics that no row has are left out."""
    titles = {
        metric: title
        for metric, title in metric_titles(context).items()
        if any(metric in report.quality for report in reports)
    }
    generated = context.generate != "none"
    header = ["model", *titles.values(), "difference to SASRec, p", "parameters", "trained", "s / user"]
    lines = [
        f"# {escaped(context.data)}, {context.split} split",
        "",
        f"{context.num_users:,} users, {context.num_items:,} items, {context.num_candidates} fixed candidates each;",
        f"data fingerprint `{context.data_fingerprint[:16]}`. One user is {1 / context.num_users:.2%} of HR@1.",
        "Candidates are ranked by the likelihood of their titles, pooled with the SASRec's where the model was trained",
        "so (those of a SASRec and an item head by score); ties count against the model. In brackets: 95% bootstrap",
        "interval over users",
        f"({context.num_resamples:,} resamples, seed {context.seed}), for generated answers Wilson's. Difference: HR@1",
        f"of {context.num_candidates} minus that of the SASRec that the model reads, paired over users, with its",
        "interval and two-sided sign-flip p-value.",
        *([GENERATED[context.generate]] if generated else []),
        "",
        "| " + " | ".join(header + ["s / answer"] * generated) + " |",
        "|---" + "|---:" * (len(header) - 1 + generated) + "|",
    ]
    for report in reports:
        cells = [escaped(report.name)]
        cells += [interval_text(report.quality[metric]) if metric in report.quality else "" for metric in titles]
        cells += [comparison_text(report.comparison), f"{report.num_parameters:,}", f"{report.num_trained:,}"]
        cells.append(f"{report.seconds_per_user:.4f}")
        if generated:
            cells.append("" if report.seconds_per_answer is None else f"{report.seconds_per_answer:.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    summary = seed_summary(reports)
    if summary:
        lines += ["", "Mean ± standard deviation over runs with different seeds:", ""]
        lines += ["| model | runs | " + " | ".join(titles.values()) + " |", "|---" + "|---:" * (len(titles) + 1) + "|"]
        for name, metrics in summary.items():
            cells = [escaped(name), str(sum(report.name == name for report in reports))]
            for metric in titles:
                value = metrics.get(metric)
                text = value and f"{short_number(value['mean'])} ± {short_number(value['standard_deviation'])}"
                cells.append(text or "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def plot_choices(reports: Sequence[CandidateReport], context: CandidateContext, path: Path) -> None:
    """Plot HR@1 among the candidates with its interval, one line per row of the table.

    Args:
        reports: in the order of the rows.
        context: what they have in common.
        path: image file; its suffix is the format.
    """
    # Loading matplotlib takes most of a second, and only this function needs it.
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
    axes.set_yticks(range(len(reports)), [report.name for report in reports])
    axes.invert_yaxis()
    axes.set_xlabel(f"HR@1 of {context.num_candidates} candidates, 95% interval over users")
    axes.set_title(f"{context.data}, {context.split} split, {context.num_users:,} users")
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    with written_whole(path) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _flat(report: CandidateReport) -> dict[str, str | int | float | None]:
    row: dict[str, str | int | float | None] = {"model": report.name, "source": report.source}
    for name, interval in report.quality.items():
        row |= {name: interval.mean, f"{name} low": interval.low, f"{name} high": interval.high}
    for name in ("num_parameters", "num_trained", "seconds_per_user", "seconds_per_answer"):
        row[name] = asdict(report)[name]
    if report.comparison is not None:
        difference = report.comparison.difference
        row |= {"difference": difference.mean, "difference low": difference.low, "difference high": difference.high}
        row["p_value"] = report.comparison.p_value
    return row
