"""Trains one configuration with several seeds and writes the table of all seeds: every published number is such a mean.

    python recipes/run_seeds.py --config_file recipes/configs/ml-100k/sasrec.yaml --seeds 1 2 3 4 5 --parallel 2 \
        --output_dir outputs/ml-100k/seeds --table docs/results/ml-100k

Each seed is a run of recipes/train_sasrec.py in a folder of its own. Finished seeds are not run again and killed ones
go on, so the same command may be given until it is through. Writes <table>.md and <table>.json.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import train_sasrec

from hf_ilora.files import written_whole
from hf_ilora.runs import configuration_differences, parse_arguments, read_record, run_main, set_up_logging

logger = logging.getLogger(__name__)

METRICS = {
    "masked/ndcg@10": "NDCG@10 masked",
    "masked/hit_ratio@10": "HR@10 masked",
    "unmasked/ndcg@10": "NDCG@10",
    "unmasked/hit_ratio@10": "HR@10",
    "candidates/hit_ratio@1": "HR@1 of 20",
}


@dataclass
class SeedsArguments:
    """Which configuration, which seeds, and where to."""

    config_file: str = field(metadata={"help": "YAML of recipes/train_sasrec.py"})
    output_dir: str = field(metadata={"help": "folder of the runs, one folder per seed"})
    table: str = field(metadata={"help": "path of the table, without .md and .json"})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5], metadata={"help": "seeds to run"})
    parallel: int = field(default=1, metadata={"help": "runs at a time; the threads of the machine are divided"})

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}: expected at least one, all different")
        if self.parallel < 1:
            raise ValueError(f"parallel is {self.parallel}: expected at least 1")


ARGUMENTS = (SeedsArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    set_up_logging(arguments.output_dir)
    threads = max(1, (os.cpu_count() or 1) // arguments.parallel)
    with ThreadPoolExecutor(arguments.parallel) as pool:
        records = list(pool.map(lambda seed: run_seed(arguments, seed, threads), arguments.seeds))
    write_table(arguments, records)


def run_seed(arguments: SeedsArguments, seed: int, threads: int) -> dict:
    """The record of a seed's run, which is made first unless it is finished.

    Raises:
        ValueError: when the folder holds a finished run of another configuration.
    """
    folder = Path(arguments.output_dir) / f"seed-{seed}"
    record = folder / "run.json"
    options = [arguments.config_file, "--seed", str(seed), "--output_dir", str(folder), "--disable_tqdm", "true"]
    if not record.exists() or read_record(record)["status"] != "finished":
        logger.info("seed %d: training in %s, its log is run.log there", seed, folder)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, train_sasrec.__file__, *options]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"seed {seed} failed: {finished.stderr[-2000:]}")
    content = read_record(record)
    differences = configuration_differences(content, parse_arguments(train_sasrec.ARGUMENTS, options))
    if differences:
        raise ValueError(
            f"{folder} holds a finished run of another configuration than {arguments.config_file}: "
            f"{'; '.join(differences)}; choose another output_dir, or delete the folder"
        )
    logger.info("seed %d: test NDCG@10 %.4f", seed, content["metrics"]["test"]["masked/ndcg@10"]["mean"])
    return content


def described_origin(records: list[dict]) -> str:
    """Data, code and versions of the runs; every one of them when they differ."""
    commits = [
        "no checkout" if git is None else git["commit"][:10] + (" with uncommitted changes" if git["dirty"] else "")
        for git in (record["git"] for record in records)
    ]
    values = {
        "data fingerprint": [record["data_fingerprint"][:16] for record in records],
        "commit": commits,
        "torch": [record["versions"]["torch"] for record in records],
        "threads per run": [str(record["threads"]) for record in records],
    }
    return "; ".join(f"{name} {', '.join(dict.fromkeys(each))}" for name, each in values.items())


def write_table(arguments: SeedsArguments, records: list[dict]) -> None:
    """One row per seed, then mean and standard deviation, for validation and test."""
    lines = [
        f"`python recipes/run_seeds.py --config_file {arguments.config_file} --seeds "
        f"{' '.join(map(str, arguments.seeds))} --parallel {arguments.parallel} --output_dir {arguments.output_dir} "
        f"--table {arguments.table}`",
        "",
        f"{described_origin(records)}.",
    ]
    summary = {}
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
    table = Path(arguments.table)
    table.parent.mkdir(parents=True, exist_ok=True)
    texts = {".md": "\n".join(lines), ".json": json.dumps({"seeds": arguments.seeds, **summary}, indent=2)}
    for suffix, text in texts.items():
        with written_whole(table.with_name(table.name + suffix)) as path:
            path.write_text(text + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
