"""Measures training and serving of SASRec against plain hand-written PyTorch, and training against RecTools.

    python -m benchmarks.sasrec --data_dir outputs/ml-100k/data --output_dir outputs/benchmarks/sasrec

Four measurements: training with `NextItemTrainer` against plain loops over batches that are ready in memory, ranking of
all users, `recommend` for one user against forward and top-k by hand, and the memory of training steps with a million
items. Compared programs take turns in one process; ratios are of CPU time. Where RecTools is installed
(`pip install "rectools[torch]"`), its SASRec trains in turn too, with the same size, loss, batches and epochs.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import set_seed

from benchmarks.measuring import Stopwatch, in_own_process, peak_bytes, run_benchmark, time_in_turn
from hf_ilora import NextItemTrainer, NextItemTrainingArguments, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.data.columns import training_sequences
from hf_ilora.evaluation.ranking import EvaluationRows, rank_split
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.training.windows import NextItemCollator, TrainingWindows

logger = logging.getLogger(__name__)


@dataclass
class SASRecBenchmarkArguments:
    """Settings of the benchmark."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=2, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=5, metadata={"help": "alternating runs per program; medians are reported"})
    epochs: int = field(default=4, metadata={"help": "epochs per training run"})
    batch_size: int = field(default=64, metadata={"help": "histories per step"})
    max_length: int = field(default=50, metadata={"help": "items per window"})
    million_items: int = field(
        default=1_000_000, metadata={"help": "items of the catalogue whose memory is measured; 0 skips it"}
    )

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "epochs", "batch_size", "max_length")


ARGUMENTS = (SASRecBenchmarkArguments,)
# By which the model of the recipe ml-100k/sasrec differs from the defaults.
RECIPE_SETTINGS = {"attention_decay": True, "repeat_bias": True}


class PlainSASRec(nn.Module):
    """The pre-norm SASRec of `SASRecConfig`'s defaults, written by hand for right-padded batches.

    With `attention_decay` its parameters are in another order than those of the package's model.
    """

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
        self.decays = None
        if config.attention_decay:
            self.decays = nn.ParameterList([torch.zeros(self.heads, 1, 1) for _ in self.blocks])
            places = torch.arange(config.max_length, dtype=torch.float32)
            distances = places.unsqueeze(1) - places
            self.register_buffer("distances", distances.masked_fill(distances < 0, 1e9))

    def forward(self, input_ids):
        batch, length = input_ids.shape
        lengths = (input_ids != 0).sum(1, keepdim=True)
        positions = torch.arange(length, device=input_ids.device) + self.max_length - lengths
        states = self.items(input_ids) + self.positions(positions.clamp(max=self.max_length - 1))
        states = F.dropout(states, self.dropout, self.training)
        for number, (norm, q, k, v, o, feed_forward_norm, feed_forward) in enumerate(self.blocks):
            normed = norm(states)
            query, key, value = (m(normed).view(batch, length, self.heads, -1).transpose(1, 2) for m in (q, k, v))
            dropout = self.attention_dropout if self.training else 0.0
            mask = None
            if self.decays is not None:
                mask = -self.decays[number].exp() * self.distances[:length, :length]
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None)
            attended = o(attended.transpose(1, 2).reshape(batch, length, -1))
            states = states + F.dropout(attended, self.dropout, self.training)
            states = states + F.dropout(feed_forward(feed_forward_norm(states)), self.dropout, self.training)
        return self.norm(states)

    def loss(self, input_ids, labels):
        labelled = labels != -100
        scores = F.linear(self(input_ids)[labelled], self.items.weight[1:])
        return F.cross_entropy(scores, labels[labelled] - 1)


def plain_loop(model: nn.Module, batches: list[dict], epochs: int, compute_loss: Callable) -> None:
    """A bare training loop over `batches`, which are ready in memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            compute_loss(model, batch).backward()
            optimizer.step()


def build_trainer(
    config: SASRecConfig, sequences: SequenceDatasets, arguments: SASRecBenchmarkArguments, folder: str
) -> NextItemTrainer:
    training = NextItemTrainingArguments(
        folder,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        early_stopping_patience=0,
        disable_tqdm=True,
        use_cpu=True,
    )
    model = SASRecForNextItem(config)
    return NextItemTrainer(model, training, train_dataset=sequences["train"], processing_class=sequences.catalogue)


def rectools_training(
    config: SASRecConfig, sequences: SequenceDatasets, arguments: SASRecBenchmarkArguments
) -> Callable[[], object]:
    """Training by RecTools: its SASRec of the size of `config` on the same sequences, preparation included."""
    import pandas as pd
    import pytorch_lightning as pl
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet

    items, boundaries = training_sequences(sequences["train"])
    users = np.repeat(np.arange(len(boundaries) - 1), np.diff(boundaries))
    times = pd.to_datetime(np.arange(len(items)), unit="s")
    table = pd.DataFrame({"user_id": users, "item_id": items, "weight": 1.0, "datetime": times})
    dataset = Dataset.construct(table)

    def lightning() -> pl.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return pl.Trainer(max_epochs=arguments.epochs, accelerator="cpu", enable_checkpointing=False, **quiet)

    model = SASRecModel(
        n_blocks=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_factors=config.hidden_size,
        dropout_rate=config.hidden_dropout,
        session_max_len=config.max_length,
        loss="softmax",
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=lightning,
    )
    return partial(model.fit, dataset)


def measure_training(config: SASRecConfig, sequences: SequenceDatasets, arguments: SASRecBenchmarkArguments) -> dict:
    """Labelled positions per second of the trainer, windows and logging included, and of two plain loops."""
    windows = TrainingWindows(sequences["train"], arguments.max_length)
    collate = NextItemCollator()
    order = torch.randperm(len(windows)).tolist()
    starts = range(0, len(order), arguments.batch_size)
    batches = [collate([windows[i] for i in order[start : start + arguments.batch_size]]) for start in starts]

    def loop_over(model: nn.Module, compute_loss: Callable) -> Callable[[], None]:
        return partial(plain_loop, model, batches, arguments.epochs, compute_loss)

    warm_up, stopwatch = Stopwatch(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "trainer": lambda: build_trainer(config, sequences, arguments, folder).train,
            "plain_model": lambda: loop_over(
                PlainSASRec(config), lambda model, batch: model.loss(batch["input_ids"], batch["labels"])
            ),
            "plain_loop": lambda: loop_over(SASRecForNextItem(config), lambda model, batch: model(**batch).loss),
        }
        if find_spec("rectools") is not None:
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|rectools")
            logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
            programs["rectools"] = lambda: rectools_training(config, sequences, arguments)
        for round_ in range(arguments.rounds + 1):  # the first round warms up
            for name, build in programs.items():
                set_seed(round_)
                (stopwatch if round_ > 0 else warm_up).time(name, build())
            logger.info("training, round %d of %d done", round_, arguments.rounds)
    positions = windows.num_targets * arguments.epochs
    return {
        "positions_per_second": {name: positions / seconds for name, seconds in stopwatch.cpu_medians().items()},
        # A ratio of speeds is the inverse ratio of times.
        "trainer_over": {name: stopwatch.cpu_ratio(name, "trainer") for name in programs if name != "trainer"},
    }


def ranks_by_hand(model: PlainSASRec, rows: EvaluationRows, batch_size: int = 64) -> torch.Tensor:
    """(rows,) the rank of every target among the items that its history does not contain."""
    ranks = torch.zeros(len(rows), dtype=torch.int64)
    for batch in np.array_split(rows.by_length(), -(-len(rows) // batch_size)):
        histories, target = rows.histories(batch), torch.from_numpy(rows.target[batch]).unsqueeze(1)  # (batch, 1)
        lengths = histories.ne(0).sum(1, keepdim=True)
        newest = min(model.max_length, histories.shape[1])
        input_ids = histories.gather(1, (lengths - newest).clamp(min=0) + torch.arange(newest))
        last = lengths.clamp(max=newest) - 1  # (batch, 1)
        states = model(input_ids)[torch.arange(len(batch)), last.squeeze(1)]  # (batch, hidden)
        scores = states @ model.items.weight.t()  # (batch, num_items + 1)
        target_scores = scores.gather(1, target)
        scores.scatter_(1, histories, float("-inf"))
        scores[:, 0] = float("-inf")
        ranks[torch.from_numpy(batch)] = 1 + (scores > target_scores).sum(1)
    return ranks


def measure_evaluation(config: SASRecConfig, test_split, arguments: SASRecBenchmarkArguments) -> dict:
    """Seconds for the ranks of all users of the test split, with and without seen items, against ranking by hand."""
    ours, plain = SASRecForNextItem(config).eval(), PlainSASRec(config).eval()
    split = test_split.select_columns(["history", "target"])

    @torch.inference_mode()
    def by_hand() -> torch.Tensor:
        return ranks_by_hand(plain, EvaluationRows(split, config.num_items))

    programs = {"rank_split": lambda: rank_split(ours, split), "plain": by_hand}
    stopwatch = time_in_turn(programs, arguments.rounds, warm_up_rounds=1)
    over_plain = stopwatch.cpu_ratio("rank_split", "plain")
    return {"users": len(split), "seconds": stopwatch.cpu_medians(), "rank_split_over_plain": over_plain}


def measure_latency(
    config: SASRecConfig, test_split, arguments: SASRecBenchmarkArguments, calls: int = 400, **settings
) -> dict:
    """Milliseconds for one user's top ten: `recommend` of a model with further `settings` against forward and top-k by
    hand, in turn."""
    config = SASRecConfig(**config.to_diff_dict() | settings)
    ours, plain, repeat_bias = SASRecForNextItem(config).eval(), PlainSASRec(config).eval(), torch.ones(1)
    histories = [
        torch.tensor([test_split[i]["history"][-arguments.max_length :]]) for i in range(min(100, len(test_split)))
    ]

    @torch.inference_mode()
    def by_hand(input_ids):
        scores = plain(input_ids)[:, -1] @ plain.items.weight.t()
        if config.repeat_bias:
            repeated = input_ids.unique().unsqueeze(0)
            scores.scatter_add_(1, repeated, repeat_bias.expand(repeated.shape))
        return scores.topk(10)

    warm_up, stopwatch = Stopwatch(), Stopwatch()
    for call in range(-50, calls):
        for name, program in (("recommend", ours.recommend), ("plain", by_hand)):
            (stopwatch if call >= 0 else warm_up).time(name, program, histories[call % len(histories)])
    medians = {name: 1000 * seconds for name, seconds in stopwatch.cpu_medians().items()}
    return {"p50_milliseconds": medians, "recommend_over_plain": medians["recommend"] / medians["plain"]}


def train_with_items(num_items: int, threads: int) -> dict:
    """Peak memory of this process over ten steps of batch 128 x 50 with 512 shared negatives, and seconds per step."""
    torch.set_num_threads(threads)
    config = SASRecConfig(num_items=num_items, loss_type="sampled_softmax", num_negatives=512)
    before = peak_bytes()
    model = SASRecForNextItem(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(items: torch.Tensor) -> None:
        loss = model(items[:, :-1], labels=items[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    stopwatch = Stopwatch()
    for _ in range(10):
        stopwatch.time("step", step, torch.randint(1, num_items + 1, (128, config.max_length + 1)))
    table = model.model.item_embedding.weight.numel() * 4
    return {
        "items": num_items,
        "peak_gib_above_import": (peak_bytes() - before) / 2**30,
        "table_and_optimizer_gib": 3 * table / 2**30,
        "overhead_gib": (peak_bytes() - before - 3 * table) / 2**30,
        "seconds_per_step": stopwatch.medians()["step"],
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, training, evaluation = (results[name] for name in ("setting", "training", "evaluation"))
    speeds = training["positions_per_second"]
    lines = [
        "# Training and serving SASRec",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}, batches of {setting['batch_size']} windows of "
        f"{setting['max_length']} items; medians of {setting['rounds']} alternating rounds, of CPU time.",
        "",
        "| | hf_ilora | compared with | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, what in (
        ("plain_model", "training, labelled positions per second, against a model and a loop by hand"),
        ("plain_loop", "the same, against a loop by hand over hf_ilora's model"),
        ("rectools", "the same, against RecTools"),
    ):
        if name in speeds:
            over = training["trainer_over"][name]
            lines.append(f"| {what} | {speeds['trainer']:,.0f} | {speeds[name]:,.0f} | {over:.2f} |")
    for name, what in (("latency", "defaults"), ("recipe_latency", "settings of `ml-100k/sasrec`")):
        p50, over = results[name]["p50_milliseconds"], results[name]["recommend_over_plain"]
        lines.append(
            f"| top ten of one user, {what}, milliseconds | {p50['recommend']:.2f} | {p50['plain']:.2f} | {over:.2f} |"
        )
    seconds = evaluation["seconds"]
    lines.append(
        f"| ranking of {evaluation['users']:,} users, seconds | {seconds['rank_split']:.2f} | {seconds['plain']:.2f} | "
        f"{evaluation['rank_split_over_plain']:.2f} |"
    )
    if "memory" in results:
        memory = results["memory"]
        lines.append(
            f"| training with {memory['items']:,} items: GiB besides the item table and its optimizer state "
            f"({memory['table_and_optimizer_gib']:.2f} GiB) | {memory['overhead_gib']:.2f} | | |"
        )
    return "\n".join(lines) + "\n"


def measure(sequences: SequenceDatasets, arguments: SASRecBenchmarkArguments) -> dict:
    config = SASRecConfig(num_items=sequences.num_items, max_length=arguments.max_length)
    results = {
        "training": measure_training(config, sequences, arguments),
        "evaluation": measure_evaluation(config, sequences["test"], arguments),
        "latency": measure_latency(config, sequences["test"], arguments),
        "recipe_latency": measure_latency(config, sequences["test"], arguments, **RECIPE_SETTINGS),
    }
    if arguments.million_items:
        results["memory"] = in_own_process(train_with_items, arguments.million_items, arguments.threads)
    return results


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    sequences = SequenceDatasets.load(arguments.data_dir)
    run_benchmark(arguments, lambda: measure(sequences, arguments), report, sequences.fingerprint)


if __name__ == "__main__":
    run_main(main)
