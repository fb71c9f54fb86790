"""Compares policies that choose the histories a teacher labels: the student's NDCG@10 against the number of labels.

    python -m experiments.acquisition --config_file recipes/configs/ml-100k/quickstart.yaml \
        --data_dir outputs/ml-100k/data --teacher outputs/ml-100k/counts/transition_counts \
        --recommender outputs/ml-100k/seeds/seed-1 --budgets 1000 8000 --policies random entropy k_center \
        --seeds 1 2 3 --parallel 2 --output_dir outputs/ml-100k/acquisition --table docs/results/ml-100k-acquisition

Each (policy, budget, seed) is a run of recipes/label_with_teacher.py and one of recipes/distill_sasrec.py; budget 0 is
the student without a teacher. The policy "random" is always included, as the control. The same command skips finished
runs. Writes <table>.md, <table>.json and <table>.png.
"""

import json
import logging
import statistics
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from experiments.recipe_runs import (
    described_origin,
    in_parallel,
    record_of_run,
    run_recipe,
    threads_per_run,
    write_table,
)
from hf_ilora import SequenceDatasets
from hf_ilora.distillation.acquisition import ACQUISITION_POLICIES
from hf_ilora.distillation.teachers import load_teacher, model_fingerprint
from hf_ilora.evaluation.plots import GREY, label_points, logarithmic, new_figure, save_figure, style
from hf_ilora.files import written_whole
from hf_ilora.models.loading import load_recommender
from hf_ilora.runs import is_finished, parse_arguments, run_main, set_up_logging, sole_writer

logger = logging.getLogger(__name__)

CONTROL, METRIC = "random", "masked/ndcg@10"
SPLITS = ("validation", "test")


@dataclass
class AcquisitionArguments:
    """Settings of the experiment."""

    config_file: str = field(metadata={"help": "YAML file of distill_sasrec.py, which describes the student"})
    data_dir: str = field(metadata={"help": "folder of a leave-one-out data set"})
    teacher: str = field(metadata={"help": "folder or Hub name of the model that labels"})
    recommender: str = field(metadata={"help": "folder or Hub name of the model whose scores the policies read"})
    output_dir: str = field(metadata={"help": "folder of the labels and the runs"})
    table: str = field(metadata={"help": "path of the table, without .md, .json and .png"})
    budgets: list[int] = field(default_factory=lambda: [1000, 8000], metadata={"help": "numbers of labelled histories"})
    policies: list[str] = field(
        default_factory=lambda: list(ACQUISITION_POLICIES), metadata={"help": "policies to compare"}
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "random seeds, of the choice and the student"}
    )
    lam: float = field(default=0.8, metadata={"help": "weight of the ranking distillation loss"})
    parallel: int = field(default=1, metadata={"help": "runs at a time, which share the CPU threads"})

    def __post_init__(self):
        unknown = [policy for policy in self.policies if policy not in ACQUISITION_POLICIES]
        if unknown or not self.policies or len(set(self.policies)) < len(self.policies):
            raise ValueError(
                f"policies are {self.policies}: expected some of {', '.join(ACQUISITION_POLICIES)}, each once"
            )
        if CONTROL not in self.policies:
            self.policies = [CONTROL, *self.policies]
        for name in ("budgets", "seeds"):
            values = vars(self)[name]
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {values}: expected at least one, all different")
        if min(self.budgets) < 1 or self.parallel < 1:
            raise ValueError(f"budgets are {self.budgets}, parallel {self.parallel}: expected numbers of at least 1")
        if find_spec("matplotlib") is None:
            raise ValueError("the plot needs matplotlib: install hf_ilora[plot]")


ARGUMENTS = (AcquisitionArguments,)


@dataclass(frozen=True)
class Run:
    """A run of the student; `policy` is None without a teacher."""

    policy: str | None
    budget: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.policy or 'alone'}-{self.budget}-seed-{self.seed}"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output_dir)
    with sole_writer(output):
        compare(arguments, output)


def compare(arguments: AcquisitionArguments, output: Path) -> None:
    """Train the missing students, and write the table."""
    check_settings(arguments, output)
    set_up_logging(output)
    runs = [Run(None, 0, seed) for seed in arguments.seeds]
    runs += [Run(*settings) for settings in product(arguments.policies, arguments.budgets, arguments.seeds)]
    found = in_parallel(lambda run: record_of(run, arguments, output), runs, arguments.parallel)
    records = dict(zip(runs, found, strict=True))
    text = table_text(arguments, records)
    content = [vars(run) | {split: value_of(record, split) for split in SPLITS} for run, record in records.items()]
    write_table(arguments.table, text, json.dumps(content, indent=2))
    plot(arguments, records, Path(arguments.table + ".png"))
    logger.info("wrote %s.md\n%s", arguments.table, text)


def check_settings(arguments: AcquisitionArguments, output: Path) -> None:
    """Check that the finished runs in `output`, which are not repeated, have these settings.

    It compares the content of the data and the models too, which may have been replaced under the same name.

    Raises:
        ValueError: `output` contains runs with other settings.
    """
    names = ("config_file", "data_dir", "teacher", "recommender", "lam")
    settings = {name: vars(arguments)[name] for name in names}
    settings["config"] = Path(arguments.config_file).read_text(encoding="utf-8")
    sequences = SequenceDatasets.load(arguments.data_dir)
    teacher = load_teacher(arguments.teacher, len(sequences["train"]), sequences.num_items)
    recommender = load_recommender(arguments.recommender)
    settings["content of data_dir"] = sequences.fingerprint
    settings["content of teacher"] = teacher.fingerprint
    settings["content of recommender"] = model_fingerprint(recommender)
    file = output / "settings.json"
    if not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as path:
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    earlier = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name in settings if earlier.get(name) != settings[name]]
    if different:
        raise ValueError(
            f"{output} contains runs with other settings ({', '.join(different)}): expected those of {file}; choose "
            "another output_dir, or delete the folder"
        )


def record_of(run: Run, arguments: AcquisitionArguments, output: Path) -> dict:
    """Train a student, with its labels, unless its run is finished, and return its record."""
    labels, student = output / f"{run.name}-labels", output / run.name
    recipe, threads = "train_sasrec", threads_per_run(arguments.parallel)
    options = [arguments.config_file, "--data_dir", arguments.data_dir, "--seed", run.seed, "--disable_tqdm", "true"]
    if run.policy is not None:
        recipe = "distill_sasrec"
        options += ["--teacher_labels", labels, "--distilled_positions", "all", "--lam", arguments.lam]
        if not is_finished(student):
            asked = ["--data_dir", arguments.data_dir, "--teacher", arguments.teacher, "--output_dir", labels]
            asked += ["--labelled_positions", "all", "--budget", run.budget]
            asked += ["--acquire", run.policy, "--seed", run.seed]
            asked += ["--exclude_seen", "false", "--batch_size", "256", "--shard_rows", "4096"]
            if run.policy != CONTROL:
                asked += ["--recommender", arguments.recommender]
            run_recipe("label_with_teacher", asked, threads)
    content = record_of_run(recipe, options, student, threads)
    logger.info("%s: validation NDCG@10 %.4f", run.name, value_of(content, "validation"))
    return content


def value_of(record: dict, split: str) -> float:
    return record["metrics"][split][METRIC]["mean"]


def values(records: dict[Run, dict], split: str, policy: str | None, budget: int) -> list[float]:
    """The metric of each seed."""
    return [value_of(record, split) for run, record in records.items() if (run.policy, run.budget) == (policy, budget)]


def table_text(arguments: AcquisitionArguments, records: dict[Run, dict]) -> str:
    """Mean ± standard deviation over seeds by policy (rows) and budget (columns), with the difference to random."""
    lines = [
        f"NDCG@10 of the student of `{arguments.config_file}`, seen items masked; teacher {arguments.teacher}; mean ± "
        f"standard deviation over seeds {', '.join(map(str, arguments.seeds))}. In brackets: mean difference to random "
        "with the same budget.",
        "",
        f"{described_origin(list(records.values()))}.",
    ]
    for split in SPLITS:
        lines += ["", f"| {split} | {' | '.join(f'{budget:,} labels' for budget in arguments.budgets)} |"]
        lines.append("|---|" + "---:|" * len(arguments.budgets))
        alone = summary(values(records, split, None, 0))
        lines.append(f"| no teacher | {' | '.join([alone] * len(arguments.budgets))} |")
        for policy in arguments.policies:
            cells = []
            for budget in arguments.budgets:
                own, control = (values(records, split, name, budget) for name in (policy, CONTROL))
                difference = "" if policy == CONTROL else f" ({statistics.mean(own) - statistics.mean(control):+.4f})"
                cells.append(summary(own) + difference)
            lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(numbers: list[float]) -> str:
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.4f} ± {deviation:.4f}"


def plot(arguments: AcquisitionArguments, records: dict[Run, dict], path: Path) -> None:
    """Plot validation NDCG@10 against the budget, a line per policy with all its seeds."""
    figure, (axes,) = new_figure(8, 4.5)
    budgets = sorted(arguments.budgets)
    logarithmic(axes.xaxis, budgets[0], budgets[-1])
    labels, points, colours = [], [], []
    for number, policy in enumerate(arguments.policies):
        colour, marker = style(number)
        seeds = [values(records, "validation", policy, budget) for budget in budgets]
        means = [statistics.mean(each) for each in seeds]
        axes.plot(budgets, means, marker=marker, color=colour)
        for budget, each in zip(budgets, seeds, strict=True):
            axes.plot([budget] * len(each), each, "_", color=colour, alpha=0.6)
        labels.append(policy)
        points.append((budgets[-1], means[-1]))
        colours.append(colour)
    alone = values(records, "validation", None, 0)
    axes.axhline(statistics.mean(alone), linestyle="--", color=GREY)
    axes.axhspan(min(alone), max(alone), color=GREY, alpha=0.15, linewidth=0)
    axes.set_ylim(axes.get_ylim())
    label_points(
        axes,
        [*labels, "no teacher"],
        [*points, (axes.get_xlim()[1], statistics.mean(alone))],
        [*colours, GREY],
    )
    axes.set_xlabel("histories that the teacher labels")
    axes.set_ylabel("NDCG@10 of the student, validation\ndashes and grey band: seeds")
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
