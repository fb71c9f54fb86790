"""Writes results to files and numbers as text, for the tables of `report` and `candidate_report`."""

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora.files import written_whole
from hf_ilora_cli.shown_text import in_markdown, shown

RESULTS_STEM = "results"


@dataclass(frozen=True)
class EvaluationContext:
    """Facts that all rows of a table share.

    Args:
        data: name or folder of the data set.
        data_fingerprint: content hash of the data set.
        split: evaluated split.
        num_users: number of rows of the split.
        num_items: size of the catalogue.
        num_candidates: size of the candidate sets; 0 without candidates.
        k: cut-off of the metrics.
        num_resamples: resamples of intervals and p-values.
        seed: random seed of intervals and p-values.
    """

    data: str
    data_fingerprint: str
    split: str
    num_users: int
    num_items: int
    num_candidates: int
    k: int
    num_resamples: int
    seed: int

    @property
    def bootstrap(self) -> dict[str, int]:
        """The settings of every interval and comparison, as keyword arguments."""
        return {"num_resamples": self.num_resamples, "seed": self.seed}


def write_results(folder: Path, context: EvaluationContext, reports: Sequence, rows: Sequence[dict], text: str) -> None:
    """Write results.md, results.csv and results.json, each whole or not at all.

    Args:
        folder: created if it is missing.
        context: of all reports.
        reports: dataclasses, one per row of the table.
        rows: the same, flat, for the CSV; the columns are those of all rows, in order of appearance.
        text: content of results.md.

    Raises:
        ValueError: for no reports.
    """
    if not reports:
        raise ValueError("there are no models to report on: expected at least one")
    content = {
        "context": asdict(context),
        "models": [asdict(report) for report in reports],
        "seeds": seed_summary(reports),
    }
    with written_whole(folder / f"{RESULTS_STEM}.json") as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with written_whole(folder / f"{RESULTS_STEM}.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(
            {name: shown(cell) if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows
        )
    with written_whole(folder / f"{RESULTS_STEM}.md") as path:
        path.write_text(text, encoding="utf-8")


def seed_summary(reports: Sequence) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over the runs of each name that has several runs.

    Args:
        reports: each has a `name` and, in `quality`, an interval for each metric.

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


def seed_rows(reports: Sequence, titles: Mapping[str, str]) -> list[str]:
    """The lines below a table that summarise runs with the same name; none if all names differ.

    Args:
        reports: as in `seed_summary`.
        titles: titles of the columns, by metric.
    """
    summary = seed_summary(reports)
    if not summary:
        return []
    rows = []
    for name, metrics in summary.items():
        cells = [in_markdown(name), str(sum(report.name == name for report in reports))]
        for metric in titles:
            value = metrics.get(metric)
            text = value and f"{short_number(value['mean'])} ± {short_number(value['standard_deviation'])}"
            cells.append(text or "")
        rows.append(cells)
    about = ["", "Mean ± standard deviation over runs with different seeds:", ""]
    return about + markdown_rows(["model", "runs", *titles.values()], rows)


def flat_quality(quality: Mapping[str, Interval]) -> dict[str, float]:
    """The CSV cells of the intervals of one row."""
    row = {}
    for name, interval in quality.items():
        row |= {name: interval.mean, f"{name} low": interval.low, f"{name} high": interval.high}
    return row


def flat_comparison(comparison: RunComparison | None) -> dict[str, float]:
    """The CSV cells of the comparison of one row; none without a comparison."""
    if comparison is None:
        return {}
    difference = comparison.difference
    row = {"difference": difference.mean, "difference low": difference.low, "difference high": difference.high}
    return row | {"p_value": comparison.p_value}


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose first column is text and whose other columns are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def interval_text(interval: Interval | None) -> str:
    """A mean with its interval in brackets; empty for None."""
    if interval is None:
        return ""
    return f"{short_number(interval.mean)} [{short_number(interval.low)}, {short_number(interval.high)}]"


def comparison_text(comparison: RunComparison | None) -> str:
    """A difference with its interval and p-value; empty for None."""
    if comparison is None:
        return ""
    difference = comparison.difference
    interval = f"[{signed_number(difference.low)}, {signed_number(difference.high)}]"
    return f"{signed_number(difference.mean)} {interval}, p={comparison.p_value:.4f}"


def short_number(value: float) -> str:
    """0.0421 as .0421, the notation of papers."""
    return f"{value:.4f}".removeprefix("0")


def signed_number(value: float) -> str:
    """0.0421 as +.0421."""
    return ("-" if value < 0 else "+") + short_number(abs(value))
