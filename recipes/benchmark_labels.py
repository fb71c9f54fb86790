"""Measures how fast a teacher is asked for labels, against its language model's own forward on the same tokens.

    python recipes/benchmark_labels.py --data_dir outputs/ml-100k/data --teacher outputs/ml-100k/ilora \
        --output_dir outputs/benchmark_labels --threads 1

In every round, labels of some training rows are made as recipes/label_with_teacher.py makes them, from history to
shard, and then the decoder of the plain language model, without adapter and output layer, reads the same prompts in
the same batches. Writes benchmark.json and benchmark.md.
"""

import logging
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmark_ilora import median_ratio, table_of_targets, write_results

from hf_ilora import ILoraForRecommendation, SequenceDatasets
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import ModelTeacher, load_teacher
from hf_ilora.models.ilora.language_models import load_language_model, truncate_layers
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class LabelBenchmarkArguments:
    """What is measured."""

    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    teacher: str = field(metadata={"help": "folder of an iLoRA model with an item head"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    rounds: int = field(default=5, metadata={"help": "labelling and reading, in turn; medians are reported"})
    rows: int = field(default=64, metadata={"help": "training rows per round"})
    batch_size: int = field(default=16, metadata={"help": "histories at a time"})
    top_k: int = field(default=10, metadata={"help": "items per label"})
    dtype: str | None = field(default=None, metadata={"help": "of the language model, such as bfloat16"})

    def __post_init__(self):
        for name in ("threads", "rounds", "rows", "batch_size", "top_k"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")


ARGUMENTS = (LabelBenchmarkArguments,)


def benchmark_requests(split, teacher: ModelTeacher, rows: int) -> LabelRequests:
    """Training rows from all over the split, longest first."""
    requests = LabelRequests.of_split(split)
    requests = requests.select(np.linspace(0, len(requests) - 1, min(rows, len(requests))).astype(np.int64))
    return requests.select(np.argsort(-requests.costs(teacher), kind="stable"))


def make_labels(requests: LabelRequests, teacher: ModelTeacher, arguments: LabelBenchmarkArguments) -> None:
    """What the recipe does for one shard of these requests."""
    settings = {"top_k": arguments.top_k, "num_items": teacher.num_items, "shard_rows": len(requests)}
    with tempfile.TemporaryDirectory() as path:
        label_shards(LabelFolder(path, settings), requests, teacher, batch_size=arguments.batch_size)


def read_prompts(prompts: list, decoder: torch.nn.Module) -> None:
    """The decoder's forward on prompts that were built before."""
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
    wall, cpu = {name: [] for name in programs}, {name: [] for name in programs}
    for round_ in range(-1, arguments.rounds):  # one round warms up
        for name, program in programs.items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            program()
            if round_ >= 0:
                wall[name].append(time.perf_counter() - begin)
                cpu[name].append(time.process_time() - begin_cpu)
        logger.info("round %d of %d done", round_ + 1, arguments.rounds)
    return {
        "tokens": tokens,
        "padding_share": 1 - tokens / sum(prompt.attention_mask.numel() for prompt in prompts),
        "tokens_per_second": {name: tokens / statistics.median(seconds) for name, seconds in wall.items()},
        "rows_per_second": len(requests) / statistics.median(wall["labels"]),
        # Throughputs are to each other as the times the other way round.
        "labels_over_forward": median_ratio(wall["forward"], wall["labels"]),
        "labels_over_forward_cpu": median_ratio(cpu["forward"], cpu["labels"]),
    }


def report(results: dict) -> str:
    """The measurements as Markdown that explains itself."""
    setting, found = results["setting"], results["labels"]
    target = ("labels per second, over the language model's own forward", found["labels_over_forward"], ">=", 0.8)
    speeds = found["tokens_per_second"]
    lines = ["# How fast a teacher is asked", "", *table_of_targets([target])]
    lines += [
        "",
        f"{setting['rows']} rows of {setting['data_dir']} and {found['tokens']} tokens per round, "
        f"{found['padding_share']:.1%} padding, batches of {setting['batch_size']}, {setting['threads']} CPU threads, "
        f"torch {setting['torch']}; medians of {setting['rounds']} rounds in turn.",
        "",
        f"- labels: {speeds['labels']:.0f} tokens per second ({found['rows_per_second']:.2f} rows per second)",
        f"- the decoder alone: {speeds['forward']:.0f} tokens per second",
        f"- the ratio in CPU time: {found['labels_over_forward_cpu']:.3f}",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    torch.set_num_threads(arguments.threads)
    sequences = SequenceDatasets.load(arguments.data_dir)
    teacher = load_teacher(arguments.teacher, len(sequences["train"]), sequences.num_items, dtype=arguments.dtype)
    if not isinstance(teacher, ModelTeacher) or not isinstance(teacher.model, ILoraForRecommendation):
        raise ValueError(f"{arguments.teacher} is no iLoRA model: expected one, to compare it with its language model")
    set_up_logging(arguments.output_dir)
    with RunRecord(arguments.output_dir, [arguments], seed=0) as record:
        record.add_data(sequences.fingerprint)
        requests = benchmark_requests(sequences["train"], teacher, arguments.rows)
        settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
        results = {
            "setting": settings | {"rows": len(requests), "torch": torch.__version__},
            "labels": measure(requests, teacher, arguments),
        }
        record.add_metrics("benchmark", results)
    write_results(results, report(results), Path(arguments.output_dir))


if __name__ == "__main__":
    run_main(main)
