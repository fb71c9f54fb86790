"""Measures the mixtures of scores of the study on language, which tune_ensemble.py found on some validation users."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.study import Row, Study
from hf_ilora import EnsembleTeacher, SequenceDatasets, compare_runs
from hf_ilora.data.columns import read_column
from hf_ilora.data.row_fractions import sampled_rows
from hf_ilora.evaluation.results import comparison_text, markdown_rows, short_number
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks
from hf_ilora.evaluation.statistics import RunComparison
from hf_ilora.runs import read_record
from hf_ilora.titles.encoders import item_title_embeddings
from hf_ilora.training.ensemble_tuning import MixtureRanking
from hf_ilora.training.ensembles import TunedEnsemble, load_members

logger = logging.getLogger(__name__)

MIXING = "tune_ensemble"


@dataclass(frozen=True)
class MixtureReport:
    """The measurements of a mixture on the users that its weights were chosen on.

    Args:
        name, title: name and title of the row.
        weights: weights of the members, by name.
        alone: NDCG@10 of each member alone, by name.
        num_users: number of validation users.
        ndcg: NDCG@10, masked, at the chosen weights.
        hit_ratio: HR@10, masked.
        to_reference: comparison with the reference mixture; None for that one.
        to_twin: comparison with the row's control, if it has one.
    """

    name: str
    title: str
    weights: dict[str, float]
    alone: dict[str, float]
    num_users: int
    ndcg: float
    hit_ratio: float
    to_reference: RunComparison | None
    to_twin: RunComparison | None


def report_mixtures(
    study: Study, names: Sequence[str], reference: str, sequences: SequenceDatasets
) -> list[MixtureReport]:
    """Measure the mixtures whose runs are all finished, with the first seed.

    Args:
        study: the runs.
        names: names of the rows.
        reference: name of the mixture that all others are compared with.
        sequences: the data set of the study.
    """
    rows = [study.rows[name] for name in names]
    whole = [row for row in rows if study.is_whole(row)]
    if missing := [row.name for row in rows if row not in whole]:
        logger.warning("without the mixtures %s, whose runs are not all finished", ", ".join(missing))
    files = {row.name: mixture_ranks(study, row, sequences) for row in whole}
    reports = []
    for row in whole:
        record = read_record(study.folder_of(row, study.seeds[0]) / "run.json")
        members = [_short_name(member) for member in row.options["members"]]
        trials = record["metrics"]["search"]["trials"]  # the members alone come first
        found = record["metrics"]["validation"]
        others = [
            None if other not in files or other == row.name else compare_runs(files[other], files[row.name])
            for other in (reference, row.twin)
        ]
        reports.append(
            MixtureReport(
                name=row.name,
                title=row.title,
                weights=dict(zip(members, found["weights"], strict=True)),
                alone={member: trial["ndcg@10"] for member, trial in zip(members, trials, strict=False)},
                num_users=len(SavedRanks.load(files[row.name]).table),
                ndcg=found["ndcg@10"],
                hit_ratio=found["hit_ratio@10"],
                to_reference=others[0],
                to_twin=others[1],
            )
        )
    return reports


def mixture_ranks(study: Study, row: Row, sequences: SequenceDatasets) -> Path:
    """The saved ranks of a mixture at its chosen weights, in the folder of its run; made if they are missing."""
    folder = study.folder_of(row, study.seeds[0])
    file = folder / "ranks" / "validation.parquet"
    if file.exists():
        return file
    settings = read_record(folder / "run.json")["configuration"]["TuningArguments"]
    split = sequences["validation"]
    rows = sampled_rows("validation_users", settings["validation_users"], len(split), settings["seed"])
    tuned = TunedEnsemble.load(folder)
    members = load_members(
        tuned.members,
        sequences,
        lambda: item_title_embeddings(sequences.catalogue, tuned.title_encoder, layer=tuned.title_layer),
        tuned.title_decay,
        split="validation",
    )
    ensemble = EnsembleTeacher(members, tuned.weights)
    ranks = MixtureRanking(list(ensemble.members), split, rows).ranks(ensemble.weights)
    source = RanksSource(row.title, sequences.fingerprint, "validation")
    SavedRanks.from_ranks(read_column(split.select(rows), "user_id"), ranks, source).save(file)
    return file


def mixture_lines(reports: Sequence[MixtureReport], reference: str) -> list[str]:
    """The Markdown of a table of mixtures."""
    compared = [report for report in reports if report.to_reference or report.to_twin]
    title = next((report.title for report in reports if report.name == reference), "?")
    header = ["mixture of scores, validation", "users", "weights", "NDCG@10 masked", "HR@10 masked",
              "its last member alone"]  # fmt: skip
    if compared:
        header += [f"difference to {title}", "difference to its control"]
    rows = []
    for report in reports:
        row = [
            report.title,
            f"{report.num_users:,}",
            ", ".join(f"{member} {weight:g}" for member, weight in report.weights.items()),
            short_number(report.ndcg),
            short_number(report.hit_ratio),
            short_number(list(report.alone.values())[-1]),
        ]
        if compared:
            row += ["" if each is None else comparison_text(each) for each in (report.to_reference, report.to_twin)]
        rows.append(row)
    note = "The weights were chosen on these users" + (
        ", so that a further member can only gain; its control had the same choice." if compared else "."
    )
    return ["", *markdown_rows(header, rows), "", note]


def _short_name(member: str) -> str:
    """The name of the row that a member of a mixture belongs to, or the word titles."""
    found = re.search(r"\{(\w+)\}", member)
    return found[1] if found else member
