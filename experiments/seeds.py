"""Trains a SASRec configuration with several seeds and tabulates the seeds, their mean and standard deviation.

    python -m experiments.seeds --config_file recipes/configs/ml-100k/sasrec.yaml --seeds 1 2 3 4 5 --parallel 2 \
        --output_dir outputs/ml-100k/seeds --table docs/results/ml-100k

Each seed is a run of recipes/train_sasrec.py in its own folder. The same command skips finished seeds and resumes
killed ones. Writes <table>.md and <table>.json.
"""

import json
import logging
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from experiments.recipe_runs import (
    described_origin,
    in_parallel,
    record_of_run,
    threads_per_run,
    write_table,
)
from hf_ilora.runs import parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora_cli.shown_text import shown_lines

logger = logging.getLogger(__name__)

TRAIN = "train_sasrec"
METRICS = {
    "masked/ndcg@10": "NDCG@10 masked",
    "masked/hit_ratio@10": "HR@10 masked",
    "unmasked/ndcg@10": "NDCG@10",
    "unmasked/hit_ratio@10": "HR@10",
    "candidates/hit_ratio@1": "HR@1 of 20",
}


@dataclass
class SeedsArguments:
    """Settings of the experiment."""

    config_file: str = field(metadata={"help": "YAML file of train_sasrec.py"})
    output_dir: str = field(metadata={"help": "folder of the runs, with one folder per seed"})
    table: str = field(metadata={"help": "path of the table, without .md and .json"})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "seeds to run"})
    parallel: int = field(default=1, metadata={"help": "runs at a time, which share the CPU threads"})

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: expected at least one, all different")
        if self.parallel < 1:
            raise ValueError(f"parallel is {self.parallel}: expected at least 1")


ARGUMENTS = (SeedsArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    with sole_writer(arguments.output_dir):
        set_up_logging(arguments.output_dir)
        records = in_parallel(lambda seed: run_seed(arguments, seed), arguments.seeds, arguments.parallel)
    text, summary = table_of_seeds(arguments, records)
    write_table(arguments.table, text, json.dumps(summary, indent=2))
    print(shown_lines(text))


def run_seed(arguments: SeedsArguments, seed: int) -> dict:
    """Train with a seed unless that run is finished, and return its record."""
    options = [arguments.config_file, "--seed", seed, "--disable_tqdm", "true"]
    folder = Path(arguments.output_dir) / f"seed-{seed}"
    content = record_of_run(TRAIN, options, folder, threads_per_run(arguments.parallel))
    logger.info("seed %d: test NDCG@10 %.4f", seed, content["metrics"]["test"]["masked/ndcg@10"]["mean"])
    return content


def table_of_seeds(arguments: SeedsArguments, records: list[dict]) -> tuple[str, dict]:
    """A row per seed, then mean and standard deviation, for validation and test: as Markdown and as values."""
    lines = [
        f"`python -m experiments.seeds --config_file {arguments.config_file} --seeds "
        f"{' '.join(map(str, arguments.seeds))} --parallel {arguments.parallel} --output_dir {arguments.output_dir} "
        f"--table {arguments.table}`",
        "",
        f"{described_origin(records)}.",
    ]
    summary = {"seeds": arguments.seeds}
    for split in ("validation", "test"):
        columns = {name: [record["metrics"][split][name]["mean"] for record in records] for name in METRICS}
        lines += ["", f"| {split} | {' | '.join(METRICS.values())} | minutes |", "|---|" + "---:|" * (len(METRICS) + 1)]
        for row, record in enumerate(records):
            values = " | ".join(f"{columns[name][row]:.4f}" for name in METRICS)
            lines.append(f"| seed {record['seed']} | {values} | {record['durations_seconds']['train'] / 60:.1f} |")
        means = {name: statistics.mean(values) for name, values in columns.items()}
        deviations = {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in columns.items()}
        cells = " | ".join(f"**{means[name]:.4f}** ± {deviations[name]:.4f}" for name in METRICS)
        lines.append(f"| mean ± standard deviation | {cells} | |")
        summary[split] = {"mean": means, "standard_deviation": deviations, "seeds": columns}
    return "\n".join(lines), summary


if __name__ == "__main__":
    run_main(main)
