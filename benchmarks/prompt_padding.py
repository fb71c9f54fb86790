"""Measures what sorting the prompts of an optimizer step by length saves in the training of iLoRA.

    python -m benchmarks.prompt_padding --data_dir outputs/ml-100k/data --output_dir outputs/benchmarks/prompt_padding

The prompts are those that `ILoraTrainer` makes of a data set. For each order: how much of an epoch is padding, and the
CPU time of gated LoRA's forward and backward on batches of these shapes, in a Llama with the shapes of SmolLM2-135M and
random weights. "One batch" is the same step without accumulation, the limit without sorting.
"""

from dataclasses import dataclass, field

import torch

from benchmarks.ilora import GATE_SIZE, ILoraBenchmarkArguments, build_program
from benchmarks.measuring import run_benchmark, time_in_turn
from hf_ilora import SequenceDatasets
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.ilora.prompts import PromptBuilder, read_templates
from hf_ilora.models.ilora.title_tokens import TitleTokens
from hf_ilora.runs import parse_arguments, prompt_path, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.prompt_collator import PromptCollator
from hf_ilora.training.sorted_steps import SortedSteps


@dataclass
class PaddingBenchmarkArguments:
    """Settings of the benchmark."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    llm: str | None = field(
        default=None, metadata={"help": "language model whose tokenizer is used; by default the embedded one"}
    )
    prompt_file: str = field(default="movies", metadata={"help": "prompts, as for train-ilora"})
    candidate_fraction: float = field(default=0.5, metadata={"help": "share of the prompts that show candidates"})
    num_candidates: int = field(default=20, metadata={"help": "candidates that these show"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=3, metadata={"help": "rounds of all programs in turn; medians are reported"})
    steps: int = field(default=2, metadata={"help": "optimizer steps per round"})
    num_layers: int = field(default=2, metadata={"help": "decoder layers of the steps that are timed"})
    rows_per_step: int = field(default=16, metadata={"help": "prompts per optimizer step"})
    batch_size: int = field(default=4, metadata={"help": "prompts per batch that a step accumulates"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "steps", "num_layers", "rows_per_step", "batch_size")


ARGUMENTS = (PaddingBenchmarkArguments,)


def prompt_shapes(arguments: PaddingBenchmarkArguments) -> dict[str, tuple[list[list[tuple[int, int]]], int]]:
    """For each program, the (prompts, longest prompt) of each batch of each step of an epoch, and their real tokens."""
    sequences = SequenceDatasets.load(arguments.data_dir)
    _, tokenizer, _ = load_language_model() if arguments.llm is None else load_language_model(arguments.llm)
    titles = sequences.catalogue.titles(range(1, sequences.num_items + 1))
    templates = read_templates(prompt_path(arguments.prompt_file))
    builder = PromptBuilder(tokenizer, TitleTokens(tokenizer, titles, "number"), templates)
    collator = PromptCollator(builder, arguments.candidate_fraction)
    rows = CandidateRows(
        sequences["train"], sequences.num_items, num_candidates=arguments.num_candidates, target_items="random"
    )
    lengths = {}
    for start in range(0, len(rows), 256):
        drawn = range(start, min(start + 256, len(rows)))
        measured = collator([rows[index] for index in drawn])["attention_mask"].sum(1).tolist()
        lengths.update(zip(drawn, measured, strict=True))
    orders = {name: SortedSteps(rows, collator, size, seed=0) for name, size in (("random", 1), ("sorted", None))}
    orders["sorted"].rows_per_step = arguments.rows_per_step
    order_of = {name: [lengths[index] for index in order] for name, order in orders.items()}
    programs = {
        "one batch": ("random", arguments.rows_per_step),
        "random order": ("random", arguments.batch_size),
        "sorted steps": ("sorted", arguments.batch_size),
    }
    found = {}
    for program, (name, size) in programs.items():
        steps = []
        for start in range(0, len(rows) - arguments.rows_per_step + 1, arguments.rows_per_step):
            step = order_of[name][start : start + arguments.rows_per_step]
            batches = [step[first : first + size] for first in range(0, len(step), size)]
            steps.append([(len(batch), max(batch)) for batch in batches])
        real = sum(order_of[name][: len(steps) * arguments.rows_per_step])
        found[program] = (steps, real)
    return found


def measure(arguments: PaddingBenchmarkArguments) -> dict:
    shapes = prompt_shapes(arguments)
    sizes = {"num_layers": arguments.num_layers, "title_tokens": 8, "rank": 8, "num_experts": 4}
    program = build_program("gated_lora", ILoraBenchmarkArguments("", **sizes))

    def run(steps: list[list[tuple[int, int]]]) -> None:
        for step in steps[: arguments.steps]:
            for rows, tokens in step:
                program(torch.randint(0, 49152, (rows, tokens)), torch.randn(rows, GATE_SIZE)).backward()
            program.zero_grad()

    stopwatch = time_in_turn({name: lambda steps=steps: run(steps) for name, (steps, _) in shapes.items()},
                             arguments.rounds, warm_up_rounds=1)  # fmt: skip
    measured = {}
    for name, (steps, real) in shapes.items():
        computed = sum(rows * tokens for step in steps for rows, tokens in step)
        measured[name] = {
            "padding": 1 - real / computed,
            "seconds_per_step": stopwatch.cpu_medians()[name] / min(arguments.steps, len(steps)),
            "speed": stopwatch.cpu_ratio("one batch", name),
        }
    return {"programs": measured}


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    lines = [
        "# What sorting prompts by length saves",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}; {setting['rows_per_step']} prompts per "
        f"optimizer step, of which {setting['candidate_fraction']:.0%} show candidates, in one batch or in batches of "
        f"{setting['batch_size']}. Forward and backward of {setting['num_layers']} decoder layers with the shapes of "
        f"SmolLM2-135M: CPU time, medians of {setting['rounds']} rounds in turn.",
        "",
        "| order | padding | seconds per step | speed |",
        "|---|---:|---:|---:|",
    ]
    for name, row in results["programs"].items():
        lines.append(f"| {name} | {row['padding']:.0%} | {row['seconds_per_step']:.2f} | {row['speed']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
