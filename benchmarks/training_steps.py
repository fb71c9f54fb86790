"""Measures how the cost of a training step grows: with the catalogue, the window, and with what is distilled.

    python -m benchmarks.training_steps --output_dir outputs/benchmarks/training_steps

All steps are forward, backward and AdamW of a SASRec with the defaults of `SASRecConfig` on random histories; compared
ones take turns in one process. Ratios of a catalogue are to the smallest one, of a window to the shortest one, of
distillation to the same step without a teacher: the limits that they would reach if nothing grew.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import set_seed

from benchmarks.measuring import PeakMemory, in_own_process, run_benchmark, time_in_turn
from hf_ilora import DistillationArguments, DistillationTrainer, SASRecConfig, SASRecForNextItem, TeacherLabels
from hf_ilora.evaluation.plots import logarithmic, new_figure, style
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.training.lazy_adam import LazyAdamW

OPTIMIZERS = ("adamw", "lazy_adam")


@dataclass
class StepBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=7, metadata={"help": "steps per program, in turn; medians are reported"})
    positions: int = field(default=6400, metadata={"help": "labelled positions per step"})
    num_items: list[int] = field(
        default_factory=lambda: [10_000, 100_000, 1_000_000], metadata={"help": "catalogues of the sampled loss"}
    )
    lengths: list[int] = field(default_factory=lambda: [50, 200, 1000], metadata={"help": "items per window"})
    distilled_items: list[int] = field(
        default_factory=lambda: [1682, 20_000], metadata={"help": "catalogues of the distillation"}
    )
    whole_items: int = field(
        default=1_000_000, metadata={"help": "catalogue whose cross-entropy is measured for its memory"}
    )

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "positions", "whole_items")
        for name in ("num_items", "lengths", "distilled_items"):
            if not vars(self)[name] or min(vars(self)[name]) < 1:
                raise ValueError(f"{name} are {vars(self)[name]}: expected at least one, each at least 1")


ARGUMENTS = (StepBenchmarkArguments,)


def random_batch(num_items: int, positions: int, length: int) -> dict[str, torch.Tensor]:
    """Histories (positions / length, length) whose every position has a label."""
    histories = torch.randint(1, num_items + 1, (max(1, positions // length), length + 1))
    return {"input_ids": histories[:, :-1], "labels": histories[:, 1:]}


class Step:
    """Forward, backward and optimizer of a model on a new batch each time."""

    def __init__(self, config: SASRecConfig, positions: int, optimizer: str = "adamw"):
        set_seed(0)
        self.model, self.positions = SASRecForNextItem(config).train(), positions
        self.model.get_input_embeddings().sparse = optimizer == "lazy_adam"
        optimizer_class = LazyAdamW if optimizer == "lazy_adam" else torch.optim.AdamW
        self.optimizer = optimizer_class(self.model.parameters(), lr=1e-3, fused=True)
        if config.popularity_power:
            self.model.set_item_counts(torch.randint(1, 1000, (config.num_items + 1,)))

    def loss(self) -> torch.Tensor:
        config = self.model.config
        return self.model(**random_batch(config.num_items, self.positions, config.max_length)).loss

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class DistilledStep(Step):
    """As `Step`, with a teacher's ten best items at every position, as `DistillationTrainer` learns from them."""

    def __init__(self, config: SASRecConfig, positions: int, folder: str, distilled: bool):
        super().__init__(config, positions)
        self.folder, self.distilled, top_k = folder, distilled, 10
        columns = {"history_id": [0], "prefix_length": [1], "teacher_items": [[1] * top_k]}
        table = pa.table(columns | {"teacher_distances": [[1.0] * top_k]})
        description = {"top_k": top_k, "num_items": config.num_items, "labelled_positions": "all"}
        arguments = DistillationArguments(
            folder,
            distilled_positions="all",
            top_k=top_k,
            use_cpu=True,
            eval_strategy="no",
            early_stopping_patience=0,
            load_best_model_at_end=False,
        )
        self.trainer = DistillationTrainer(
            self.model,
            arguments,
            train_dataset=Dataset.from_dict({"history": [[1, 1]], "target": [1]}),
            teacher_labels=TeacherLabels(table, description, Path(folder)),
        )
        self.complete = self.trainer.batch_completion()

    def loss(self) -> torch.Tensor:
        config = self.model.config
        batch = random_batch(config.num_items, self.positions, config.max_length)
        if not self.distilled:
            return self.model(**batch).loss
        shape = (*batch["labels"].shape, self.trainer.args.top_k)
        batch["teacher_items"] = torch.randint(1, config.num_items + 1, shape)
        batch["teacher_distances"] = torch.rand(shape)
        return self.trainer.compute_loss(self.model, self.complete(batch))


def measured(steps: dict[str, Callable[[], None]], positions: dict[str, int], rounds: int, against: str) -> dict:
    """Microseconds of CPU time per position of each step, and their ratios to the step `against`."""
    stopwatch = time_in_turn(steps, rounds)
    return {
        name: {
            "microseconds": 1e6 * seconds / positions[name],
            "ratio": stopwatch.cpu_ratio(name, against) * positions[against] / positions[name],
        }
        for name, seconds in stopwatch.cpu_medians().items()
    }


def measure_catalogues(arguments: StepBenchmarkArguments) -> dict:
    """The sampled softmax with 512 shared negatives, for each number of items: plain, by cosine, by popularity."""
    sampled = {"loss_type": "sampled_softmax", "num_negatives": 512}
    found = {}
    for name, optimizer, changes in (
        ("AdamW", "adamw", {}),
        ("AdamW, scores by cosine", "adamw", {"score_temperature": 0.07}),
        ("AdamW, popular negatives", "adamw", {"popularity_power": 0.5}),
        ("lazy Adam", "lazy_adam", {}),
        ("lazy Adam, popular negatives", "lazy_adam", {"popularity_power": 0.5}),
    ):
        steps = {
            str(items): Step(SASRecConfig(num_items=items, **sampled, **changes), arguments.positions, optimizer)
            for items in arguments.num_items
        }
        positions = dict.fromkeys(steps, arguments.positions)
        found[name] = measured(steps, positions, arguments.rounds, str(arguments.num_items[0]))
    return found


def measure_lengths(arguments: StepBenchmarkArguments) -> dict:
    """Windows of several lengths, with and without dropout on the attention probabilities."""
    found = {}
    for name, dropout in (("attention_dropout 0.2", 0.2), ("attention_dropout 0", 0.0)):
        settings = {"num_items": 10_000, "loss_type": "sampled_softmax", "attention_dropout": dropout}
        steps, positions = {}, {}
        for length in arguments.lengths:
            positions[str(length)] = max(1, arguments.positions // length) * length
            steps[str(length)] = Step(SASRecConfig(max_length=length, **settings), arguments.positions)
        found[name] = measured(steps, positions, arguments.rounds, str(arguments.lengths[0]))
    return found


def measure_distillation(arguments: StepBenchmarkArguments) -> dict:
    """A teacher's ranking at every position, against the cross-entropy alone, for each number of items."""
    found = {}
    for items in arguments.distilled_items:
        with tempfile.TemporaryDirectory() as folder:
            config = SASRecConfig(num_items=items)
            positions = arguments.positions // 2
            steps = {
                name: DistilledStep(config, positions, folder, name == "distilled") for name in ("base", "distilled")
            }
            found[str(items)] = measured(steps, dict.fromkeys(steps, positions), arguments.rounds, "base")
    return found


def logits_megabytes(num_items: int, threads: int) -> float:
    """Peak memory in MB that the cross-entropy of 100 positions needs beside table and gradient."""
    torch.set_num_threads(threads)
    step = Step(SASRecConfig(num_items=num_items, max_length=50), 100)
    peak = PeakMemory()
    loss = step.loss()
    table = step.model.get_input_embeddings().weight
    added = peak.added_bytes() - table.numel() * table.element_size()
    del loss
    return added / 1e6


def measure(arguments: StepBenchmarkArguments) -> dict:
    return {
        "catalogues": measure_catalogues(arguments),
        "lengths": measure_lengths(arguments),
        "distillation": measure_distillation(arguments),
        "logits_megabytes": in_own_process(logits_megabytes, arguments.whole_items, arguments.threads),
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    lines = [
        "# What a training step of SASRec costs",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}, about {setting['positions']:,} labelled "
        f"positions per step; medians of {setting['rounds']} rounds in which compared steps take turns, of CPU time.",
        "",
        "| step | | microseconds per position | ratio |",
        "|---|---:|---:|---:|",
    ]
    for kind, title, unit in (
        ("catalogues", "sampled softmax, 512 negatives", "items"),
        ("lengths", "windows, 10,000 items", "items per window"),
    ):
        for name, rows in results[kind].items():
            for size, row in rows.items():
                lines.append(
                    f"| {title}, {name} | {int(size):,} {unit} | {row['microseconds']:.1f} | {row['ratio']:.2f} |"
                )
    for items, rows in results["distillation"].items():
        for name, row in rows.items():
            title = "cross-entropy" if name == "base" else "with a teacher's ranking at every position"
            lines.append(f"| {title} | {int(items):,} items | {row['microseconds']:.1f} | {row['ratio']:.2f} |")
    lines += [
        "",
        f"The cross-entropy over {setting['whole_items']:,} items needs {results['logits_megabytes']:.0f} MB beside the"
        " item table and its gradient.",
    ]
    return "\n".join(lines) + "\n"


def draw(results: dict):
    """Cost per position against the number of items, and against the length of a window."""
    figure, panels = new_figure(11, 4, panels=2)
    for axes, kind, title, unit in (
        (panels[0], "catalogues", "sampled softmax, 512 negatives", "items of the catalogue"),
        (panels[1], "lengths", "windows, 10,000 items", "items per window"),
    ):
        sizes, highest = [], 0.0
        for number, (name, rows) in enumerate(results[kind].items()):
            sizes, (colour, marker) = [int(size) for size in rows], style(number)
            costs = [row["microseconds"] for row in rows.values()]
            axes.plot(sizes, costs, marker=marker, color=colour, label=name)
            highest = max(highest, *costs)
        logarithmic(axes.xaxis, min(sizes), max(sizes))
        axes.set_ylim(0, 1.1 * highest)
        axes.set(title=title, xlabel=unit, ylabel="microseconds of CPU time per position")
        axes.legend(fontsize=8)
    return figure


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report, draw=draw)


if __name__ == "__main__":
    run_main(main)
