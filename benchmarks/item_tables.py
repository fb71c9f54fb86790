"""Measures the training of large catalogues whose item table is spread over the processes of a launch.

    python -m benchmarks.item_tables --output_dir outputs/benchmarks/item_tables

Each catalogue is trained on random histories by `NextItemTrainer`, in processes of this machine that gloo connects,
with `item_table: row_sharded`; smaller ones also with a table in every process. The peak of a process includes its
libraries.
"""

import json
import os
import shutil
import socket
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import torch.multiprocessing
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from benchmarks.measuring import peak_bytes, run_benchmark
from hf_ilora import NextItemTrainer, NextItemTrainingArguments, SASRecConfig, SASRecForNextItem
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one

LENGTH = 50  # items per window
WARM_UP_STEPS = 2


@dataclass
class TableBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json, benchmark.md and, for a while, the models"})
    num_items: list[int] = field(
        default_factory=lambda: [1_000_000, 10_000_000], metadata={"help": "catalogues with a sharded table"}
    )
    replicated_items: list[int] = field(
        default_factory=lambda: [1_000_000], metadata={"help": "catalogues with a table in every process"}
    )
    processes: int = field(default=2, metadata={"help": "processes of the launch, two or more"})
    threads: int = field(default=1, metadata={"help": "CPU threads of each process"})
    steps: int = field(default=10, metadata={"help": "measured steps; their median is reported"})
    batch_size: int = field(default=64, metadata={"help": f"windows of {LENGTH} items per step and process"})
    hidden_size: int = field(default=64, metadata={"help": "width of the item embeddings"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "steps", "batch_size", "hidden_size")
        if self.processes < 2:
            raise ValueError(f"processes is {self.processes}: expected at least 2")
        for items in (*self.num_items, *self.replicated_items):
            if items < 1:
                raise ValueError(f"a catalogue has {items} items: expected at least 1")


ARGUMENTS = (TableBenchmarkArguments,)


class StepSeconds(TrainerCallback):
    """Wall seconds of each step, and the processor's."""

    def __init__(self):
        self.seconds: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))


def train_in_process(rank: int, arguments: TableBenchmarkArguments, num_items: int, item_table: str, port: int) -> None:
    """Train and save as one process of a launch, and write what was measured to `<output_dir>/process-<rank>.json`."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(arguments.processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(arguments.threads)
    folder, steps = Path(arguments.output_dir), WARM_UP_STEPS + arguments.steps
    libraries = psutil.Process().memory_info().rss
    settings = NextItemTrainingArguments(
        str(folder / "model"), use_cpu=True, max_steps=steps, per_device_train_batch_size=arguments.batch_size,
        eval_strategy="no", save_strategy="no", early_stopping_patience=0, load_best_model_at_end=False,
        item_optimizer="lazy_adam", item_table=item_table, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    set_seed(0)
    sampled = {"loss_type": "sampled_softmax", "num_negatives": 512}
    with torch.device("meta" if item_table == "row_sharded" else "cpu"):
        model = SASRecForNextItem(
            SASRecConfig(num_items=num_items, hidden_size=arguments.hidden_size, max_length=LENGTH, **sampled)
        )
    rows = torch.randint(1, num_items + 1, (steps * arguments.batch_size * arguments.processes, LENGTH + 1))
    data = Dataset.from_dict({"history": rows[:, :-1].tolist(), "target": rows[:, -1].tolist()})
    stopwatch = StepSeconds()
    trainer = NextItemTrainer(model, settings, train_dataset=data, callbacks=[stopwatch])
    trainer.train()
    table = model.get_input_embeddings().weight
    moments = trainer.optimizer.state[table]
    found = {
        "rows": len(table),
        "table_and_moments": sum(each.nbytes for each in (table, moments["exp_avg"], moments["exp_avg_sq"])),
        "libraries": libraries,
        "peak": peak_bytes(),
    }
    for name, seconds in zip(("step", "step_cpu"), zip(*stopwatch.seconds[WARM_UP_STEPS:], strict=True), strict=True):
        found[name] = statistics.median(seconds)
    begin = time.perf_counter()
    trainer.save_model()
    found |= {"save": time.perf_counter() - begin, "peak_with_saving": peak_bytes()}
    (folder / f"process-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure_table(arguments: TableBenchmarkArguments, num_items: int, item_table: str) -> list[dict]:
    """What each process measured, in the order of their ranks."""
    folder = Path(arguments.output_dir)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        torch.multiprocessing.spawn(train_in_process, (arguments, num_items, item_table, port), arguments.processes)
        files = [folder / f"process-{rank}.json" for rank in range(arguments.processes)]
        found = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        return found
    finally:
        shutil.rmtree(folder / "model", ignore_errors=True)


def measure(arguments: TableBenchmarkArguments) -> dict:
    tables = [(items, "replicated") for items in arguments.replicated_items]
    tables += [(items, "row_sharded") for items in arguments.num_items]
    return {
        "tables": [
            {"num_items": items, "item_table": name, "processes": measure_table(arguments, items, name)}
            for items, name in sorted(tables)
        ]
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    positions = setting["processes"] * setting["batch_size"] * LENGTH
    libraries = max(each["libraries"] for row in results["tables"] for each in row["processes"])
    lines = [
        "# What training a large catalogue takes",
        "",
        f"{setting['processes']} processes with {setting['threads']} CPU thread(s) each, torch {setting['torch']}; "
        f"{setting['hidden_size']} wide, {positions:,} labelled positions per step, 512 negatives, lazy Adam; medians "
        f"of {setting['steps']} steps. GB per process, the largest of all; a process without a model has "
        f"{libraries / 1e9:.1f} GB.",
        "",
        "| items | item_table | table and moments | peak of training | peak with saving | step | CPU time | saving |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["tables"]:
        table, peak, with_saving = (
            f"{max(each[name] for each in row['processes']) / 1e9:.2f}"
            for name in ("table_and_moments", "peak", "peak_with_saving")
        )
        step, cpu, save = (max(each[name] for each in row["processes"]) for name in ("step", "step_cpu", "save"))
        lines.append(
            f"| {row['num_items']:,} | {row['item_table']} | {table} | {peak} | {with_saving} "
            f"| {step:.2f} s | {cpu:.2f} s | {save:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
