"""Measures how fast an iLoRA teacher labels histories, against its language model's forward on the same tokens.

    python -m benchmarks.labels --data_dir outputs/ml-100k/data --teacher outputs/ml-100k/ilora \
        --output_dir outputs/benchmarks/labels --threads 1

In every round the teacher labels some training rows as label_with_teacher.py does, from histories to the written shard.
In turn, the decoder of the plain language model, without adapter and output layer, reads the same prompts in the same
batches.
"""

import tempfile
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.measuring import run_benchmark, time_in_turn
from hf_ilora import ILoraForRecommendation, SequenceDatasets
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import ModelTeacher, load_teacher
from hf_ilora.models.ilora.language_models import load_language_model, truncate_layers
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one


@dataclass
class LabelBenchmarkArguments:
    """Settings of the benchmark."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    teacher: str = field(metadata={"help": "folder of an iLoRA model with an item head"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    rounds: int = field(default=5, metadata={"help": "measured rounds; medians are reported"})
    rows: int = field(default=64, metadata={"help": "training rows per round"})
    batch_size: int = field(default=16, metadata={"help": "histories per batch"})
    top_k: int = field(default=10, metadata={"help": "items per label"})
    dtype: str | None = field(default=None, metadata={"help": "dtype of the language model, such as bfloat16"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "rows", "batch_size", "top_k")


ARGUMENTS = (LabelBenchmarkArguments,)


def benchmark_requests(split, teacher: ModelTeacher, rows: int) -> LabelRequests:
    """Training rows spread evenly over the split, longest first."""
    requests = LabelRequests.of_split(split)
    requests = requests.select(np.linspace(0, len(requests) - 1, min(rows, len(requests))).astype(np.int64))
    return requests.select(np.argsort(-requests.costs(teacher), kind="stable"))


def make_labels(requests: LabelRequests, teacher: ModelTeacher, arguments: LabelBenchmarkArguments) -> None:
    """Label the requests and write them as one shard, as the recipe does."""
    settings = {"top_k": arguments.top_k, "num_items": teacher.num_items, "shard_rows": len(requests)}
    with tempfile.TemporaryDirectory() as path:
        label_shards(LabelFolder(path, settings), requests, teacher, batch_size=arguments.batch_size)


def read_prompts(prompts: list, decoder: torch.nn.Module) -> None:
    """Run the decoder's forward on prompts that are already built."""
    with torch.inference_mode():
        for prompt in prompts:
            # Placeholders have no tokens; any token costs the same.
            decoder(input_ids=prompt.input_ids.clamp(min=0), attention_mask=prompt.attention_mask, use_cache=False)


def plain_decoder(model: ILoraForRecommendation, dtype: str | None) -> torch.nn.Module:
    """The decoder of the language model that `model` was trained on, without its adapter."""
    config = model.config
    llm, _, _ = load_language_model(
        config.llm_name_or_path, revision=config.llm_revision, gguf_file=config.llm_gguf_file, dtype=dtype
    )
    if config.num_llm_layers is not None:
        truncate_layers(llm, config.num_llm_layers)
    return llm.get_decoder().eval()


def measure(requests: LabelRequests, teacher: ModelTeacher, arguments: LabelBenchmarkArguments) -> dict:
    """Tokens per second of labelling and of reading, and their ratio, of wall time and of CPU time."""
    decoder = plain_decoder(teacher.model, arguments.dtype)
    batches = [
        requests.select(slice(first, first + arguments.batch_size))
        for first in range(0, len(requests), arguments.batch_size)
    ]
    prompts = [teacher.model.build_prompts(batch.histories()) for batch in batches]
    tokens = sum(int(prompt.attention_mask.sum()) for prompt in prompts)
    programs = {
        "labels": lambda: make_labels(requests, teacher, arguments),
        "forward": lambda: read_prompts(prompts, decoder),
    }
    stopwatch = time_in_turn(programs, arguments.rounds, warm_up_rounds=1)
    medians = stopwatch.medians()
    return {
        "rows": len(requests),
        "tokens": tokens,
        "padding_fraction": 1 - tokens / sum(prompt.attention_mask.numel() for prompt in prompts),
        "tokens_per_second": {name: tokens / seconds for name, seconds in medians.items()},
        "rows_per_second": len(requests) / medians["labels"],
        # A ratio of speeds is the inverse ratio of times.
        "labels_over_forward": stopwatch.ratio("forward", "labels"),
        "labels_over_forward_cpu": stopwatch.cpu_ratio("forward", "labels"),
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, found = results["setting"], results["labels"]
    speeds = found["tokens_per_second"]
    lines = [
        "# How fast a teacher labels",
        "",
        f"{found['rows']} rows of {setting['data_dir']} with {found['tokens']} tokens per round, "
        f"{found['padding_fraction']:.1%} padding, batches of {setting['batch_size']}, {setting['threads']} CPU "
        f"thread(s), torch {setting['torch']}; medians of {setting['rounds']} alternating rounds.",
        "",
        "| | tokens per second | rows per second |",
        "|---|---:|---:|",
        f"| labels | {speeds['labels']:.0f} | {found['rows_per_second']:.2f} |",
        f"| the decoder alone | {speeds['forward']:.0f} | |",
        f"| labels over the decoder | {found['labels_over_forward']:.3f} (in CPU time "
        f"{found['labels_over_forward_cpu']:.3f}) | |",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    sequences = SequenceDatasets.load(arguments.data_dir)
    teacher = load_teacher(arguments.teacher, len(sequences["train"]), sequences.num_items, dtype=arguments.dtype)
    if not isinstance(teacher, ModelTeacher) or not isinstance(teacher.model, ILoraForRecommendation):
        raise ValueError(f"{arguments.teacher} is no iLoRA: expected one, to compare it with its language model")
    requests = benchmark_requests(sequences["train"], teacher, arguments.rows)
    run_benchmark(arguments, lambda: {"labels": measure(requests, teacher, arguments)}, report, sequences.fingerprint)


if __name__ == "__main__":
    run_main(main)
