"""Measures what SASRec costs here against plain hand-written PyTorch, alternating both in one run.

    python recipes/benchmark.py --data_dir outputs/ml-100k/data --output_dir outputs/benchmark

Four measurements, each with its target: training through the Trainer against a plain loop over batches that already lie
in memory, evaluation of all users under full ranking, batch-1 `recommend` against forward plus top-k, and the memory of
a training step with a million items. Writes benchmark.json and benchmark.md.
"""

import json
import logging
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from hf_ilora import SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.files import written_whole
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging
from hf_ilora.training.windows import NextItemCollator, TrainingWindows

logger = logging.getLogger(__name__)


@dataclass
class BenchmarkArguments:
    """What is measured."""

    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=2, metadata={"help": "CPU threads of both programs"})
    rounds: int = field(default=5, metadata={"help": "alternating runs per program; medians are reported"})
    epochs: int = field(default=4, metadata={"help": "epochs per training run"})
    batch_size: int = field(default=64, metadata={"help": "histories per step"})
    max_length: int = field(default=50, metadata={"help": "items per window"})
    million_items: int = field(default=1_000_000, metadata={"help": "catalogue of the memory measurement; 0 skips it"})

    def __post_init__(self):
        for name in ("threads", "rounds", "epochs", "batch_size", "max_length"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")


ARGUMENTS = (BenchmarkArguments,)


class PlainSASRec(nn.Module):
    """The pre-norm SASRec of `SASRecConfig`'s defaults, written by hand for right-padded batches."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        hidden = config.hidden_size
        self.heads, self.max_length, self.dropout = config.num_attention_heads, config.max_length, config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.items = nn.Embedding(config.num_items + 1, hidden, padding_idx=0)
        self.positions = nn.Embedding(config.max_length, hidden)
        nn.init.normal_(self.items.weight, std=config.initializer_range)
        nn.init.normal_(self.positions.weight, std=config.initializer_range)
        self.blocks = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            linears = [nn.Linear(hidden, hidden) for _ in range(4)]
            feed_forward = nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
            self.blocks.append(nn.ModuleList([nn.LayerNorm(hidden), *linears, nn.LayerNorm(hidden), feed_forward]))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, input_ids):
        batch, length = input_ids.shape
        lengths = (input_ids != 0).sum(1, keepdim=True)
        positions = torch.arange(length, device=input_ids.device) + self.max_length - lengths
        states = self.items(input_ids) + self.positions(positions.clamp(max=self.max_length - 1))
        states = F.dropout(states, self.dropout, self.training)
        for norm, q, k, v, o, feed_forward_norm, feed_forward in self.blocks:
            normed = norm(states)
            query, key, value = (m(normed).view(batch, length, self.heads, -1).transpose(1, 2) for m in (q, k, v))
            dropout = self.attention_dropout if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
            attended = o(attended.transpose(1, 2).reshape(batch, length, -1))
            states = states + F.dropout(attended, self.dropout, self.training)
            states = states + F.dropout(feed_forward(feed_forward_norm(states)), self.dropout, self.training)
        return self.norm(states)

    def loss(self, input_ids, labels):
        labelled = labels != -100
        scores = F.linear(self(input_ids)[labelled], self.items.weight[1:])
        return F.cross_entropy(scores, labels[labelled] - 1)


def plain_loop(model, batches, epochs, compute_loss) -> float:
    """Seconds that a bare training loop takes over `batches`, which lie in memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    model.train()
    begin = time.perf_counter()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            compute_loss(model, batch).backward()
            optimizer.step()
    return time.perf_counter() - begin


def trainer_run(model, windows, arguments: BenchmarkArguments) -> float:
    """Seconds of `Trainer.train` over the same windows, data loading and logging included."""
    with tempfile.TemporaryDirectory() as folder:
        training_arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=1.0e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="epoch",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, training_arguments, train_dataset=windows, data_collator=NextItemCollator())
        return trainer.train().metrics["train_runtime"]


def measure_training(config: SASRecConfig, train_split, arguments: BenchmarkArguments) -> dict:
    """Target positions per second of the Trainer path and of two plain loops, alternating."""
    windows = TrainingWindows(train_split, arguments.max_length, "random")
    collate = NextItemCollator()
    order = torch.randperm(len(windows)).tolist()
    starts = range(0, len(order), arguments.batch_size)
    batches = [collate([windows[i] for i in order[start : start + arguments.batch_size]]) for start in starts]
    programs = {
        "trainer": lambda: trainer_run(SASRecForNextItem(config), windows, arguments),
        "plain_model": lambda: plain_loop(
            PlainSASRec(config), batches, arguments.epochs, lambda m, b: m.loss(b["input_ids"], b["labels"])
        ),
        "plain_loop": lambda: plain_loop(
            SASRecForNextItem(config), batches, arguments.epochs, lambda m, b: m(**b).loss
        ),
    }
    speeds = {name: [] for name in programs}
    for round_ in range(arguments.rounds + 1):
        for name, program in programs.items():
            set_seed(round_)
            speed = windows.num_targets * arguments.epochs / program()
            if round_ > 0:  # the first round warms up
                speeds[name].append(speed)
        logger.info("training, round %d of %d done", round_, arguments.rounds)
    ratios = [t / p for t, p in zip(speeds["trainer"], speeds["plain_model"], strict=True)]
    return {
        "positions_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "trainer_over_plain_model": statistics.median(ratios),
        "trainer_over_plain_loop": statistics.median(
            t / p for t, p in zip(speeds["trainer"], speeds["plain_loop"], strict=True)
        ),
        "target": "trainer_over_plain_model >= 0.90",
    }


def measure_evaluation(config: SASRecConfig, test_split, arguments: BenchmarkArguments) -> dict:
    """Seconds to rank all users of the test split under all protocols."""
    model = SASRecForNextItem(config).eval()
    seconds = []
    for _ in range(arguments.rounds + 1):
        begin = time.perf_counter()
        rank_split(model, test_split)
        seconds.append(time.perf_counter() - begin)
    return {"users": len(test_split), "seconds": statistics.median(seconds[1:]), "target": "seconds < 1"}


def measure_latency(config: SASRecConfig, test_split, arguments: BenchmarkArguments, calls: int = 400) -> dict:
    """Milliseconds of one user's top ten: `recommend` against forward plus top-k by hand, call by call in turn."""
    ours, plain = SASRecForNextItem(config).eval(), PlainSASRec(config).eval()
    histories = [
        torch.tensor([test_split[i]["history"][-arguments.max_length :]]) for i in range(min(100, len(test_split)))
    ]

    @torch.inference_mode()
    def by_hand(input_ids):
        scores = plain(input_ids)[:, -1] @ plain.items.weight.t()
        return scores.topk(10)

    times = {"recommend": [], "plain": []}
    for call in range(-50, calls):
        history = histories[call % len(histories)]
        for name, program in (("recommend", ours.recommend), ("plain", by_hand)):
            begin = time.perf_counter()
            program(history)
            if call >= 0:
                times[name].append(1000 * (time.perf_counter() - begin))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["recommend"] / medians["plain"]
    return {"p50_milliseconds": medians, "recommend_over_plain": ratio, "target": "recommend_over_plain <= 1.3"}


def measure_million_items(num_items: int, threads: int) -> dict:
    """Peak memory of training steps with a sampled loss, in a process of its own, above table and optimizer."""
    command = [sys.executable, __file__, "--memory-of", str(num_items), str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def train_with_items(num_items: int, threads: int) -> dict:
    """Ten steps of batch 128 x 50 with 512 shared negatives over a catalogue of `num_items`."""
    torch.set_num_threads(threads)
    config = SASRecConfig(num_items=num_items, loss_type="sampled_softmax", num_negatives=512)
    before = peak_bytes()
    model = SASRecForNextItem(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    seconds = []
    for _ in range(10):
        items = torch.randint(1, num_items + 1, (128, config.max_length + 1))
        begin = time.perf_counter()
        loss = model(items[:, :-1], labels=items[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    table = model.model.item_embedding.weight.numel() * 4
    return {
        "items": num_items,
        "peak_gib_above_import": (peak_bytes() - before) / 2**30,
        "table_and_optimizer_gib": 3 * table / 2**30,
        "overhead_gib": (peak_bytes() - before - 3 * table) / 2**30,
        "seconds_per_step": statistics.median(seconds),
        "target": "overhead_gib < 2",
    }


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: its rusage would begin with the peak of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def write_report(results: dict, folder: Path) -> None:
    """benchmark.json, and benchmark.md with one row per measurement."""
    lines = ["| measurement | value | target |", "|---|---|---|"]
    for name, result in results.items():
        flat = {}
        for key, value in result.items():
            flat |= value if isinstance(value, dict) else {key: value}
        target = flat.pop("target", "")
        values = [
            f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in flat.items()
        ]
        lines.append(f"| {name} | {', '.join(values)} | {target} |")
    for name, text in (("benchmark.json", json.dumps(results, indent=2)), ("benchmark.md", "\n".join(lines))):
        with written_whole(folder / name) as path:
            path.write_text(text + "\n")
    print("\n".join(lines))


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    set_up_logging(arguments.output_dir)
    torch.set_num_threads(arguments.threads)
    with RunRecord(arguments.output_dir, [arguments], seed=0) as record:
        sequences = SequenceDatasets.load(arguments.data_dir)
        record.add_data(sequences.fingerprint)
        config = SASRecConfig(num_items=sequences.num_items, max_length=arguments.max_length)
        setting = {"threads": arguments.threads, "rounds": arguments.rounds, "torch": torch.__version__}
        results = {
            "setting": setting | {"batch_size": arguments.batch_size, "max_length": arguments.max_length},
            "training": measure_training(config, sequences["train"], arguments),
            "evaluation": measure_evaluation(config, sequences["test"], arguments),
            "latency": measure_latency(config, sequences["test"], arguments),
        }
        if arguments.million_items:
            results["memory"] = measure_million_items(arguments.million_items, arguments.threads)
        record.add_metrics("benchmark", results)
    write_report(results, Path(arguments.output_dir))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-of"]:
        print(json.dumps(train_with_items(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        run_main(main)
