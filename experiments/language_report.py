"""Measures the finished runs of the study on language: quality, differences and cost, as tables and a plot."""

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.language_mixtures import MixtureReport, mixture_lines
from experiments.language_rows import MIXTURE_REFERENCE
from experiments.recipe_runs import described_origin, in_parallel, write_table
from experiments.study import Row, Study
from hf_ilora import ILoraForRecommendation, SequenceDatasets, compare_runs
from hf_ilora.data.columns import read_column
from hf_ilora.evaluation.latency import Latency, ModelSize, measure_latency, model_size
from hf_ilora.evaluation.plots import CostPoint, plot_quality_against_cost
from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.results import comparison_text, markdown_rows, short_number
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks
from hf_ilora.evaluation.statistics import COUNT_GROUPS, RunComparison, rows_by_group
from hf_ilora.files import written_whole
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import read_record
from hf_ilora.titles.encoders import TF_IDF, encode_titles
from hf_ilora.training.windows import item_counts

logger = logging.getLogger(__name__)

# The columns of a table: their names by ranking and metric.
METRICS = {
    ("masked", "ndcg@10"): "NDCG@10 masked",
    ("masked", "hit_ratio@10"): "HR@10 masked",
    ("unmasked", "ndcg@10"): "NDCG@10",
    ("unmasked", "hit_ratio@10"): "HR@10",
}
COMPARED = ("masked", "ndcg@10")
# Titles whose encoding is timed.
TITLES_OF_A_SAMPLE = 2000


@dataclass(frozen=True)
class MeasuredSplit:
    """The quality of a row's runs on a split.

    Args:
        metrics: for each "ranking/metric", its value for each seed.
        groups: for each group of users by the target's training count, their number and mean NDCG@10, masked.
        to_reference: comparison with the reference row; None for that row.
        to_twin: comparison with the row's twin, if it has one.
    """

    metrics: dict[str, list[float]]
    groups: dict[str, tuple[int, float]]
    to_reference: RunComparison | None
    to_twin: RunComparison | None


@dataclass(frozen=True)
class RowReport:
    """The measurements of a row.

    Args:
        name, title, kind: name, title and kind of the row.
        seeds: seeds of its runs.
        settings: the chosen settings, by option.
        trials: settings and their metric on validation, if they were chosen among several.
        splits: quality by split; without "test" if the row is not claimed or the study does not read it yet.
        training_minutes: processor time of the run, its teachers and their titles' encoding, averaged over seeds; None
            if a run was resumed, since the time before is not recorded.
        latency: latency of the first seed's model.
        size: size of that model.
    """

    name: str
    title: str
    kind: str
    seeds: list[int]
    settings: dict
    trials: list[tuple[dict, float]]
    splits: dict[str, MeasuredSplit]
    training_minutes: float | None
    latency: Latency
    size: ModelSize


def report_rows(
    study: Study,
    names: Sequence[str],
    reference: str,
    sequences: SequenceDatasets,
    *,
    splits: Sequence[str],
    parallel: int,
    latency_calls: int,
) -> list[RowReport]:
    """Measure the rows whose runs are all finished.

    Args:
        study: the runs.
        names: names of the rows; the reference is among them.
        reference: name of the row that all others are compared with.
        sequences: the data set of the study.
        splits: the splits to read; "test" is read for claimed rows only.
        parallel: models that rank at a time.
        latency_calls: recommendations to time for each row.
    """
    rows = [study.rows[name] for name in names]
    whole = [row for row in rows if study.is_whole(row)]
    if missing := [row.name for row in rows if row not in whole]:
        logger.warning("without %s, whose runs are not all finished", ", ".join(missing))
    jobs = [
        (row, seed, split)
        for row in whole
        for seed in study.seeds_of(row)
        for split in splits
        if split != "test" or row.claimed
    ]
    files = in_parallel(lambda job: ranks_file(study, *job, sequences), jobs, parallel)
    ranks: dict[tuple[str, str], list[Path]] = {}
    for (row, _, split), file in zip(jobs, files, strict=True):
        ranks.setdefault((row.name, split), []).append(file)
    counts = item_counts(sequences["train"], sequences.num_items).numpy()
    histories = [np.asarray(each) for each in _sample(sequences["validation"], latency_calls)["history"]]
    reports = []
    for row in whole:
        folder = study.model_of(row, study.seeds[0])
        model = load_recommender(folder)
        reports.append(
            RowReport(
                name=row.name,
                title=row.title,
                kind=row.kind,
                seeds=study.seeds_of(row),
                settings=dict(row.options) | study.settings(row),
                trials=study.trials(row) if study.is_tuned(row) else [],
                splits={
                    split: measured_split(
                        ranks[row.name, split],
                        None if row.name == reference else ranks.get((reference, split)),
                        ranks.get((row.twin, split)),
                        counts[read_column(sequences[split], "target").to_numpy()],
                    )
                    for split in splits
                    if (row.name, split) in ranks
                },
                training_minutes=training_minutes(study, row, sequences),
                latency=measure_latency(model, histories),
                size=model_size(model, folder),
            )
        )
    return reports


def ranks_file(study: Study, row: Row, seed: int, split: str, sequences: SequenceDatasets) -> Path:
    """The saved ranks of a run, beside its model; made if they are missing."""
    folder = study.model_of(row, seed)
    file = folder / "ranks" / f"{split}.parquet"
    source = RanksSource(f"{row.title}, seed {seed}", sequences.fingerprint, split)
    if not file.exists() or SavedRanks.load(file).source.data_fingerprint != source.data_fingerprint:
        model = load_recommender(folder)
        check_catalogue(model, str(folder), sequences.num_items, sequences.raw_ids)
        scorer = model.item_scores if isinstance(model, ILoraForRecommendation) else None
        ranks = rank_split(model, sequences[split], scorer=scorer)
        SavedRanks.from_ranks(read_column(sequences[split], "user_id"), ranks, source).save(file)
    return file


def measured_split(
    files: Sequence[Path],
    reference: Sequence[Path] | None,
    twin: Sequence[Path] | None,
    target_counts: np.ndarray,
) -> MeasuredSplit:
    """The metrics of a row's runs, and their comparisons with those of other rows.

    Args:
        files: saved ranks of each seed.
        reference: saved ranks of the reference row; None for that row.
        twin: saved ranks of the row's twin, if it has one.
        target_counts: (users,) how often the target of each user occurs in training.
    """
    runs = [SavedRanks.load(file) for file in files]
    users = {
        f"{ranking}/{metric}": np.stack(
            [metric_per_user(metric, torch.tensor(run.ranks(ranking))).numpy() for run in runs]
        )  # (seeds, users)
        for ranking, metric in METRICS
    }
    ranking, metric = COMPARED
    others = [
        None if other is None else compare_runs(list(other), list(files), metric=metric, ranking=ranking)
        for other in (reference, twin)
    ]
    return MeasuredSplit(
        metrics={name: values.mean(axis=1).tolist() for name, values in users.items()},
        groups={
            group: (int(rows.sum()), float(users["/".join(COMPARED)][:, rows].mean()))
            for group, rows in rows_by_group(target_counts, COUNT_GROUPS).items()
        },
        to_reference=others[0],
        to_twin=others[1],
    )


def training_minutes(study: Study, row: Row, sequences: SequenceDatasets) -> float | None:
    """Processor time of training, teachers and the encoding of titles included, averaged over seeds."""
    minutes = []
    for seed in study.seeds_of(row):
        records = [read_record(folder / "run.json") for folder in study.runs_behind(row, seed)]
        if any(record.get("earlier_runs") for record in records):
            continue
        seconds = sum(
            record["processor_seconds"].get(stage, 0.0) for record in records for stage in ("train", "search")
        )
        encoders = {encoder for record in records for encoder in [title_encoder(record)] if encoder is not None}
        minutes.append(seconds + sum(encoding_seconds(study, encoder, sequences) for encoder in sorted(encoders)))
    return statistics.mean(minutes) / 60 if minutes else None


def title_encoder(record: dict) -> str | None:
    """The encoder whose title vectors a run read."""
    settings = {name: value for part in record["configuration"].values() for name, value in part.items()}
    reads_titles = (
        str(settings.get("initial_items")).startswith("titles")
        or "titles" in [*(settings.get("teacher") or []), *(settings.get("members") or [])]
        or settings.get("title_neighbours", 0.0) > 0
    )
    return settings["title_encoder"] if reads_titles else None


def encoding_seconds(study: Study, encoder: str, sequences: SequenceDatasets) -> float:
    """Processor time of encoding the catalogue's titles, measured once for a study.

    A model's time for a title depends on that title alone, so it is extrapolated from a sample.
    """
    file = study.folder / "encoding_seconds.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    key = f"{encoder} {sequences.catalogue.fingerprint[:16]}"
    if key not in known:
        titles = sequences.catalogue.table["title"].to_pylist()
        sample = titles
        if encoder != TF_IDF:
            sample = np.random.default_rng(0).permutation(titles)[:TITLES_OF_A_SAMPLE].tolist()
        with tempfile.TemporaryDirectory() as cache:
            begun = time.process_time()
            encode_titles(sample, encoder, cache_dir=cache)
            known[key] = (time.process_time() - begun) * len(titles) / len(sample)
        with written_whole(file) as path:
            path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return known[key]


# --- the tables ---


def write_report(
    path: str,
    reports: Sequence[RowReport],
    mixtures: Sequence[MixtureReport],
    tables: Mapping[str, Sequence[str]],
    reference: str,
    command: str,
    study: Study,
) -> str:
    """Write <path>.md and <path>.json with all tables, and <path>.png with the first; returns the text.

    Args:
        path: path of the report, without suffix.
        reports: reports of the measured rows.
        mixtures: reports of the measured mixtures.
        tables: the names of the rows of each table.
        reference: name of the row that all are compared with.
        command: the command that makes the report.
        study: the runs, for their origin.
    """
    by_name = {report.name: report for report in reports}
    records = [
        read_record(folder / "run.json")
        for report in reports
        for seed in report.seeds
        for folder in sorted(study.runs_behind(study.rows[report.name], seed))
    ]
    lines = [f"`{command}`", ""]
    if records:
        lines.append(
            f"{described_origin(records)}. Values are means over seeds ± their standard deviation. Differences are of "
            "NDCG@10, masked, averaged over the seeds of each user first, with 95% bootstrap interval over users and "
            "two-sided sign-flip p-value."
        )
    for table, names in tables.items():
        shown = [by_name[name] for name in names if name in by_name]
        mixed = [report for report in mixtures if report.name in names]
        if shown:
            lines += table_lines(table, shown, by_name.get(reference))
        if mixed:
            lines += mixture_lines(mixed, MIXTURE_REFERENCE)
    content = {
        "command": command,
        "reference": reference,
        "tables": {table: list(names) for table, names in tables.items()},
        "rows": {report.name: asdict(report) for report in reports},
        "mixtures": {report.name: asdict(report) for report in mixtures},
    }
    text = "\n".join(lines)
    write_table(path, text, json.dumps(content, indent=2))
    first = [by_name[name] for name in next(iter(tables.values())) if name in by_name]
    if first:
        plot(first, Path(f"{path}.png"))
    return text


def table_lines(table: str, reports: Sequence[RowReport], reference: RowReport | None) -> list[str]:
    """The Markdown of one table: quality on each split, by count, cost and settings."""
    lines = [f"\n# {table}"]
    for split in ("validation", "test"):
        measured = [(report, report.splits[split]) for report in reports if split in report.splits]
        if not measured:
            continue
        title = "?" if reference is None else reference.title
        columns = [*METRICS.values(), f"difference to {title}", "difference to its control"]
        rows = [
            [
                report.title,
                str(len(report.seeds)),
                *(mean_text(values.metrics["/".join(metric)]) for metric in METRICS),
                difference_text(values.to_reference),
                difference_text(values.to_twin),
            ]
            for report, values in measured
        ]
        lines += ["", *markdown_rows([split, "seeds", *columns], rows)]
        groups = list(dict.fromkeys(group for _, values in measured for group in values.groups))
        rows = [
            [report.title, *(short_number(values.groups[group][1]) for group in groups)] for report, values in measured
        ]
        users = [f"{group} ({measured[0][1].groups[group][0]:,} users)" for group in groups]
        title = f"{split}, NDCG@10 masked by the target's occurrences in training"
        lines += ["", *markdown_rows([title, *users], rows)]
    rows = [
        [
            report.title,
            "" if report.training_minutes is None else f"{report.training_minutes:.1f}",
            f"{report.latency.p50_ms:.2f} / {report.latency.p95_ms:.2f}",
            f"{report.size.num_parameters:,}",
            f"{report.size.num_bytes / 1e6:.2f}",
        ]
        for report in reports
    ]
    header = ["cost", "processor minutes from titles to model", "p50 / p95 ms", "parameters", "MB"]
    lines += ["", *markdown_rows(header, rows)]
    chosen = [
        [report.title, settings_text(trial), short_number(value)]
        for report in reports
        for trial, value in report.trials
    ]
    if chosen:
        lines += ["", *markdown_rows(["trials", "settings", "validation NDCG@10 masked"], chosen)]
    return lines


def mean_text(values: Sequence[float]) -> str:
    """The mean over seeds, with the standard deviation where there are several."""
    text = short_number(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {short_number(statistics.stdev(values))}"


def difference_text(comparison: RunComparison | None) -> str:
    """The difference with interval and p-value, and relative to the other row's mean."""
    if comparison is None:
        return ""
    part = f" ({comparison.difference.mean / comparison.mean_a:+.1%})" if comparison.mean_a else ""
    return comparison_text(comparison) + part


def settings_text(settings: Mapping[str, object]) -> str:
    """Settings as options of a command."""
    words = [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in settings.items()
    ]
    return f"`{' '.join(words)}`" if words else "as configured"


# --- the plot ---


def plot(reports: Sequence[RowReport], path: Path) -> None:
    """Plot quality against the time of one recommendation, with the name of each row beside its point.

    It shows the test split if every row has it, else validation.
    """
    split = "test" if all("test" in report.splits for report in reports) else "validation"
    first = reports[0].latency
    plot_quality_against_cost(
        [
            CostPoint(
                report.title, report.kind, report.latency.p50_ms, report.splits[split].metrics["/".join(COMPARED)]
            )
            for report in reports
        ],
        path,
        cost=f"median time of one recommendation (ms), {first.threads} thread(s), {first.device}",
        quality=f"NDCG@10 without seen items, {split}",
    )


def _sample(split, num_users: int):
    """Random rows, the same for all models."""
    return split.select(np.random.default_rng(0).permutation(len(split))[:num_users])
