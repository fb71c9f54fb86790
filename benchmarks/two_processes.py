"""Measures what a second process on the same machine gains in the training of SASRec, one CPU thread each.

    python -m benchmarks.two_processes --data_dir outputs/ml-100k/data --output_dir outputs/benchmarks/two_processes

One process (accelerate_configs/cpu.yaml) and two (multi_cpu.yaml) take turns with the same rows per optimizer step, so
that they compute the same gradients. Times are wall times of `trainer.train()`, so the machine must have two free
cores: the load average before the runs is reported. Processes exchange gradients once per optimizer step; with several
batches per step they exchange less often for the same rows, and the difference is what the exchange costs.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import median_ratio, run_benchmark
from hf_ilora.runs import parse_arguments, read_record, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora_cli.shipped import RECIPE, find_file

LAUNCHES = {1: "cpu", 2: "multi_cpu"}


@dataclass
class ProcessBenchmarkArguments:
    """Settings of the benchmark."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md, and of the runs"})
    config_file: str = field(default="ml-100k/sasrec", metadata={"help": "YAML file of train_sasrec.py"})
    rounds: int = field(default=3, metadata={"help": "runs of each program, in turn; medians are reported"})
    rows: int = field(default=64, metadata={"help": "rows per batch, of all processes together"})
    batches: int = field(default=120, metadata={"help": "batches of a run"})
    batches_per_step: list[int] = field(
        default_factory=lambda: [1, 4], metadata={"help": "batches that an optimizer step accumulates, for each row"}
    )

    def __post_init__(self):
        check_at_least_one(self, "rounds", "rows", "batches")
        if self.rows % 2:
            raise ValueError(f"rows is {self.rows}: expected an even number, for two processes")
        if not self.batches_per_step or any(size < 1 or self.batches % size for size in self.batches_per_step):
            raise ValueError(
                f"batches_per_step are {self.batches_per_step}: expected divisors of {self.batches} (batches)"
            )


ARGUMENTS = (ProcessBenchmarkArguments,)


def rows_per_second(arguments: ProcessBenchmarkArguments, processes: int, batches_per_step: int, folder: Path) -> float:
    """Train in processes of one thread, and return the rows that they read in a second."""
    settings = {
        "launch": LAUNCHES[processes],
        "data_dir": arguments.data_dir,
        "output_dir": folder,
        "per_device_train_batch_size": arguments.rows // processes,
        "gradient_accumulation_steps": batches_per_step,
        "max_steps": arguments.batches // batches_per_step,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": "false",
        "early_stopping_patience": 0,
        "disable_tqdm": "true",
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    recipe = str(find_file(RECIPE, "train_sasrec"))
    command = [sys.executable, "-m", "hf_ilora_cli.launch_recipe", recipe, arguments.config_file, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:].rstrip()}")
    record = read_record(folder / "run.json")
    return arguments.batches * arguments.rows / record["durations_seconds"]["train"]


def measure(arguments: ProcessBenchmarkArguments) -> dict:
    found, loads = {}, []
    for batches_per_step in arguments.batches_per_step:
        speeds: dict[int, list[float]] = {processes: [] for processes in LAUNCHES}
        for round_ in range(arguments.rounds):
            for processes, launch in LAUNCHES.items():
                loads.append(os.getloadavg()[0])
                folder = Path(arguments.output_dir) / f"{launch}-{batches_per_step}-{round_}"
                speeds[processes].append(rows_per_second(arguments, processes, batches_per_step, folder))
        found[str(batches_per_step)] = {
            "rows_per_second": {str(processes): statistics.median(each) for processes, each in speeds.items()},
            "ratio": median_ratio(speeds[2], speeds[1]),
        }
    return {"batches_per_step": found, "loads": loads, "cores": os.cpu_count()}


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, loads = results["setting"], results["loads"]
    lines = [
        "# What a second process gains",
        "",
        f"`{setting['config_file']}`, one CPU thread per process, torch {setting['torch']}, {setting['rows']} rows per "
        f"batch of all processes together, {setting['batches']} batches; wall time, medians of {setting['rounds']} "
        f"runs in turn. The machine has {results['cores']} cores; its load average before the runs was "
        f"{min(loads):.1f} to {max(loads):.1f}.",
        "",
        "| batches per optimizer step | one process, rows per second | two processes, rows per second | ratio |",
        "|---:|---:|---:|---:|",
    ]
    for size, row in results["batches_per_step"].items():
        one, two = (row["rows_per_second"][processes] for processes in ("1", "2"))
        lines.append(f"| {size} | {one:.1f} | {two:.1f} | {row['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
