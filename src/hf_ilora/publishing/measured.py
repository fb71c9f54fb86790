"""Reads the tables of an evaluation for a model card."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from hf_ilora.evaluation.candidate_report import CandidateContext, CandidateReport, candidate_table
from hf_ilora.evaluation.card_metrics import quality_in_words
from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.report import ModelReport, ReportContext, markdown_table
from hf_ilora.evaluation.results import RESULTS_STEM, short_number
from hf_ilora.evaluation.statistics import Interval, RunComparison
from hf_ilora_cli.shown_text import in_markdown, shareable


@dataclass(frozen=True)
class MeasuredTable:
    """One evaluation, as it appears on a card.

    Args:
        report: measurements of the published model.
        context: of all models of the table.
        table: the table of all models in Markdown, with the paragraph on how it was measured.
        picture: file of the plot beside the table; None if there is none.
    """

    report: ModelReport | CandidateReport
    context: ReportContext | CandidateContext
    table: str
    picture: Path | None

    @property
    def words(self) -> str:
        """The measurements of the published model in words, in Markdown."""
        context = self.context
        is_sample = isinstance(self.report, ModelReport) and self.report.num_users is not None
        num_users = self.report.num_users if is_sample else context.num_users
        words = quality_in_words(self.report.quality, context.num_items, context.num_candidates)
        return f"{in_markdown(context.data)}, {in_markdown(context.split)} split, {num_users:,} users:\n\n{words}"

    @property
    def popularity(self) -> str:
        """The model's bias towards popular items, in sentences; empty if it was not measured."""
        if not isinstance(self.report, ModelReport):
            return ""
        k, lists, by_count, sentences = self.context.k, self.report.lists, self.report.by_count, []
        if lists:
            sentences.append(
                f"In the evaluation above, the most popular tenth of the items makes up "
                f"{lists[f'decile_1@{k}'].mean:.1%} of the recommendations, and {lists[f'coverage@{k}'].mean:.1%} of "
                "the items are recommended to at least one user."
            )
        if len(by_count) > 1:
            metric = f"{self.context.main}/ndcg@{k}"
            values = [
                f"{short_number(quality[metric].mean)} ({'more often' if group == 'more' else group})"
                for group, quality in by_count.items()
            ]
            sentences.append(f"NDCG@{k} by how often training has the held-out item: {', '.join(values)}.")
        return " ".join(sentences)


def read_measured(path: Path, row: str | None, dataset_name: str) -> MeasuredTable:
    """Read the results.json of `hf-ilora evaluate` or `hf-ilora evaluate-ilora`.

    Args:
        path: the file, or its folder.
        row: name or source of the published model in the table; None if the table has only one row.
        dataset_name: name of the data set on the card.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a table of this package, and when `row` matches none or several of its rows.
    """
    reports, context = read_reports(path)
    number = _row_number(path, row, [report.name for report in reports], [report.source for report in reports])
    # By default, the names of models are their folders.
    reports = [replace(report, name=shareable(report.name)) for report in reports]
    context = replace(context, data=dataset_name)
    table = candidate_table if isinstance(context, CandidateContext) else markdown_table
    plot = (path / f"{RESULTS_STEM}.json" if path.is_dir() else path).with_suffix(".png")
    return MeasuredTable(reports[number], context, table(reports, context), plot if plot.is_file() else None)


def read_reports(path: Path) -> tuple[list[ModelReport] | list[CandidateReport], ReportContext | CandidateContext]:
    """Read the rows of a table that `hf-ilora evaluate` or `hf-ilora evaluate-ilora` wrote, and their context.

    Args:
        path: results.json, or its folder.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not a table of this package.
    """
    if path.is_dir():
        path = path / f"{RESULTS_STEM}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "compared" in content["context"]:
            reports = [_model_report(report) for report in content["models"]]
            return reports, ReportContext(**content["context"])
        return [_candidate_report(report) for report in content["models"]], CandidateContext(**content["context"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no results at {path}: expected the results.json of `hf-ilora evaluate` or `hf-ilora evaluate-ilora`"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of an evaluation ({error!r}): expected the results.json of "
            "`hf-ilora evaluate` or `hf-ilora evaluate-ilora`; evaluate again"
        ) from error


def _row_number(path: Path, row: str | None, names: list[str], sources: list[str | None]) -> int:
    found = [number for number in range(len(names)) if row is None or row in (names[number], sources[number])]
    if len(found) != 1:
        several = "several rows" if found else "no row"
        sources = [source for source in sources if source is not None]
        raise ValueError(
            f"{several} of {path} match {row!r}: expected the name of the published model, one of "
            f"{', '.join(map(repr, names))}" + (f", or its source, one of {', '.join(sources)}" if sources else "")
        )
    return found[0]


def _model_report(report: dict) -> ModelReport:
    parts = {"latency": Latency(**report["latency"]), "size": ModelSize(**report["size"])}
    for groups in ("by_count", "by_length"):
        parts[groups] = {group: _intervals(quality) for group, quality in report.get(groups, {}).items()}
    parts["lists"] = _intervals(report.get("lists", {}))
    if "kind" not in report:  # older results have no kinds
        kinds = {"popularity": "baseline", "transition_counts": "baseline", "ilora": "language model"}
        parts["kind"] = kinds.get(report["model_type"], "ids")
    return ModelReport(**report | parts | _measured_parts(report))


def _candidate_report(report: dict) -> CandidateReport:
    return CandidateReport(**report | _measured_parts(report))


def _measured_parts(report: dict) -> dict:
    comparison = report["comparison"]
    if comparison is not None:
        comparison = RunComparison(**comparison | {"difference": Interval(**comparison["difference"])})
    return {"quality": _intervals(report["quality"]), "comparison": comparison}


def _intervals(quality: dict) -> dict[str, Interval]:
    return {name: Interval(**interval) for name, interval in quality.items()}
