"""Does language pay? Trains SASRecs with and without titles, with controls, and tabulates them.

    hf-ilora prepare beauty/data
    python -m experiments.language --data beauty --table main --seeds 1 2 3 4 5 --parallel 2 \
        --output_dir outputs/beauty/language

experiments/language_rows.py lists the rows of each table. Every row and its teachers are trained anew with each of its
seeds. Settings are chosen on validation with the first seeds; `--test true` adds the quality of the claimed rows on the
test split. The same command skips finished runs and resumes killed ones; `--run false` tabulates the runs that are
finished, also while another process trains. Writes <report>.md, <report>.json and <report>.png.

`--table llm` asks whether a fine-tuned language model adds to title vectors: by default a few layers of SmolLM2, which
a CPU can train. On a GPU, name a configuration with a larger one:

    python -m experiments.language --data beauty --table llm --seeds 1 --ilora_config beauty/ilora_gpu \
        --llm_users 22363 --output_dir outputs/beauty/language_gpu
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from experiments.language_mixtures import MIXING, report_mixtures
from experiments.language_report import report_rows, write_report
from experiments.language_rows import MIXTURE_REFERENCE, REFERENCE, SETTINGS, TABLES, language_rows
from experiments.recipe_runs import threads_per_run
from experiments.study import Study
from hf_ilora import SequenceDatasets
from hf_ilora.runs import ProgramFailed, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora_cli.shown_text import shown_lines

ALL = "all"


@dataclass
class LanguageArguments:
    """Settings of the study."""

    data: str = field(metadata={"choices": tuple(SETTINGS), "help": "data set whose rows to train"})
    output_dir: str = field(metadata={"help": "folder of the runs"})
    table: str = field(
        default="main",
        metadata={"choices": (*TABLES, ALL), "help": "rows to train and tabulate: main, parts, controls, llm or all"},
    )
    rows: list[str] | None = field(
        default=None, metadata={"help": "names of rows to train and tabulate instead of a table's, beside ids_tuned"}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "random seeds"})
    parallel: int = field(default=1, metadata={"help": "runs at a time, which share the CPU threads"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of the prepared data set; by default outputs/<data>/data"}
    )
    report: str | None = field(
        default=None,
        metadata={"help": "path of the table, without .md, .json and .png; by default <output_dir>/<table>"},
    )
    test: bool = field(
        default=False, metadata={"help": "show the claimed rows on the test split too, once all is chosen"}
    )
    tune: bool = field(
        default=True, metadata={"help": "choose settings among the trials; false takes the first trial of each row"}
    )
    run: bool = field(default=True, metadata={"help": "train what is missing; false tabulates what is finished"})
    ilora_config: str | None = field(
        default=None, metadata={"help": "YAML file of train_ilora.py, or a shipped one; by default that of the data"}
    )
    llm_users: int | None = field(
        default=None,
        metadata={"help": "validation users whom language models are asked about; by default 2,000 of Beauty"},
    )
    latency_calls: int = field(default=300, metadata={"help": "recommendations timed per row, one user at a time"})

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: expected at least one, all different")
        check_at_least_one(self, "parallel", "latency_calls", *(["llm_users"] if self.llm_users is not None else []))
        if find_spec("matplotlib") is None:
            raise ValueError("the plot needs matplotlib: install hf_ilora[plot]")
        known = [row.name for row in language_rows(SETTINGS[self.data])]
        if unknown := sorted(set(self.rows or ()) - set(known)):
            raise ValueError(f"rows contains {', '.join(unknown)}: expected some of {', '.join(known)}")
        self.data_dir = self.data_dir or f"outputs/{self.data}/data"
        self.report = self.report or str(Path(self.output_dir) / ("rows" if self.rows else self.table))


ARGUMENTS = (LanguageArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    with sole_writer(arguments.output_dir) if arguments.run else nullcontext():
        if arguments.run:
            set_up_logging(arguments.output_dir)
        make_tables(arguments)


def make_tables(arguments: LanguageArguments) -> None:
    """Train what is missing and write the report; rows with a run that failed are left out of it.

    Raises:
        ProgramFailed: after the report, when runs failed.
    """
    given = {"ilora": arguments.ilora_config, "llm_users": arguments.llm_users}
    settings = replace(SETTINGS[arguments.data], **{name: value for name, value in given.items() if value is not None})
    study = Study(
        language_rows(settings),
        Path(arguments.output_dir),
        arguments.data_dir,
        arguments.seeds,
        trial_seeds=settings.trial_seeds,
        tune=arguments.tune,
        threads=threads_per_run(arguments.parallel),
    )
    if arguments.rows:
        tables = {"rows": (REFERENCE, *(name for name in arguments.rows if name != REFERENCE))}
    else:
        tables = TABLES if arguments.table == ALL else {arguments.table: TABLES[arguments.table]}
    names = list(dict.fromkeys([REFERENCE, *(name for names in tables.values() for name in names)]))
    failure = None
    if arguments.run:
        try:
            study.run(names, arguments.parallel)
        except ProgramFailed as error:
            failure = error
    torch.set_num_threads(1)
    sequences = SequenceDatasets.load(arguments.data_dir)
    mixtures = [name for name in names if study.rows[name].recipe == MIXING]
    reports = report_rows(
        study,
        [name for name in names if name not in mixtures],
        REFERENCE,
        sequences,
        splits=("validation", "test") if arguments.test else ("validation",),
        parallel=arguments.parallel,
        latency_calls=arguments.latency_calls,
    )
    of_mixtures = report_mixtures(study, mixtures, MIXTURE_REFERENCE, sequences)
    text = write_report(arguments.report, reports, of_mixtures, tables, REFERENCE, command(arguments), study)
    print(shown_lines(text))
    if failure is not None:
        raise failure


def command(arguments: LanguageArguments) -> str:
    """The command that makes the report."""
    chosen = f"--rows {' '.join(arguments.rows)}" if arguments.rows else f"--table {arguments.table}"
    words = ["python -m experiments.language", f"--data {arguments.data} {chosen}"]
    words += [f"--seeds {' '.join(map(str, arguments.seeds))} --parallel {arguments.parallel}"]
    words += [f"--{name} {str(getattr(arguments, name)).lower()}" for name in ("test", "tune")]
    optional = {name: getattr(arguments, name) for name in ("ilora_config", "llm_users")}
    words += [f"--{name} {value}" for name, value in optional.items() if value is not None]
    return " ".join([*words, f"--output_dir {arguments.output_dir} --report {arguments.report}"])


if __name__ == "__main__":
    run_main(main)
