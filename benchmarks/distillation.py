"""Measures a training step of DLLM2Rec against the base loss alone and against the published form of the losses.

    python -m benchmarks.distillation --output_dir outputs/benchmarks/distillation --threads 1

A SASRec of the size of MovieLens-100K is trained on random histories with one labelled position each. The base loss is
BCE with one negative, or the softmax over the catalogue. The baseline computes it as `SASRecForNextItem` does: for BCE
it scores two items of the catalogue. The distilled programs score all items. All programs take turns in one process.
"""

import logging
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import set_seed

from benchmarks.measuring import run_benchmark, time_in_turn
from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.distillation.losses import DLLM2RecLoss, base_losses, propensity_scores, ranking_distillation_weights
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one

logger = logging.getLogger(__name__)

BASE_LOSSES = ("bce", "cross_entropy")
ALPHA, BETA, LAM, GAMMAS = 1.0, 1.0, 0.8, (0.3, 0.5, 0.1)  # defaults of the published program


@dataclass
class DistillationBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=21, metadata={"help": "steps per program, in turn; medians are reported"})
    num_items: int = field(default=1682, metadata={"help": "items of the catalogue; MovieLens-100K has 1682"})
    batch_size: int = field(default=256, metadata={"help": "histories per step"})
    lengths: list[int] = field(default_factory=lambda: [10, 50], metadata={"help": "items per history"})
    top_k: int = field(default=10, metadata={"help": "teacher items per history"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "batch_size", "top_k")
        if self.num_items <= self.top_k:
            raise ValueError(f"num_items is {self.num_items}: expected more than top_k, {self.top_k}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths are {self.lengths}: expected at least one, each at least 1")


ARGUMENTS = (DistillationBenchmarkArguments,)


@dataclass
class Batch:
    """Random histories and labels; target, negative and teacher_items are columns of the scores: item ids minus 1."""

    input_ids: torch.Tensor  # (batch, length)
    labels: torch.Tensor  # (batch, length), the target at the last position
    target: torch.Tensor  # (batch,)
    negative: torch.Tensor  # (batch,)
    teacher_items: torch.Tensor  # (batch, k)
    teacher_distances: torch.Tensor  # (batch, k)
    propensity: torch.Tensor  # (items,)


def random_batch(arguments: DistillationBenchmarkArguments, length: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows, items = arguments.batch_size, arguments.num_items
    target, negative = torch.randint(0, items, (2, rows), generator=generator)
    labels = torch.full((rows, length), -100)
    labels[:, -1] = target + 1
    return Batch(
        input_ids=torch.randint(1, items + 1, (rows, length), generator=generator),
        labels=labels,
        target=target,
        negative=negative,
        teacher_items=torch.rand(rows, items, generator=generator).argsort(1)[:, : arguments.top_k],
        teacher_distances=3 * torch.rand(rows, arguments.top_k, generator=generator),
        propensity=propensity_scores(torch.randint(0, 500, (items,), generator=generator)),
    )


def published_loss(scores: torch.Tensor, batch: Batch, base_loss: str) -> torch.Tensor:
    """The published arithmetic of DLLM2Rec: a loop over the teacher's items, each with a sum over the catalogue.

    The exponentials overflow for scores above about 12. The weights come from this package, which computes them fast.
    """

    def dro(target: torch.Tensor) -> torch.Tensor:
        exponentials = torch.exp(batch.propensity * scores.square() / BETA)  # (batch, items)
        score = scores.gather(1, target.unsqueeze(1)).squeeze(1)  # (batch,)
        own = batch.propensity[target]  # (batch,)
        without_target = exponentials.sum(1) - torch.exp(own * score.square() / BETA)
        return torch.log(without_target + torch.exp(own * (score - 1).square() / BETA) + 1e-24).mean()

    weights = ranking_distillation_weights(scores, batch.teacher_items, batch.teacher_distances, *GAMMAS)
    against = F.logsigmoid(1 - scores.gather(1, batch.negative.unsqueeze(1)).squeeze(1))  # (batch,)
    ranking = 0.0
    for place, label in enumerate(batch.teacher_items.unbind(1)):
        weight = weights[:, place]  # (batch,)
        score = scores.gather(1, label.unsqueeze(1)).squeeze(1)  # (batch,)
        ranking = ranking - (weight * (F.logsigmoid(score) + against)).mean()
        ranking = ranking + ALPHA * weight.mean() * dro(label)
    base = base_losses(scores, batch.target, batch.negative, base_loss).mean()
    return base + ALPHA * dro(batch.target) + LAM * ranking


class TrainingStep:
    """Forward, backward and AdamW of one program: "baseline", "distilled" or "published"."""

    def __init__(self, name: str, base_loss: str, length: int, arguments: DistillationBenchmarkArguments):
        set_seed(0)
        self.name, self.base_loss = name, base_loss
        self.batch = random_batch(arguments, length)
        config = SASRecConfig(
            num_items=arguments.num_items,
            max_length=length,
            loss_type=base_loss,
            num_negatives=1,
            negative_sharing="position",
        )
        self.model = SASRecForNextItem(config).train()
        self.distillation = DLLM2RecLoss(
            ALPHA, BETA, LAM, *GAMMAS, arguments.top_k, propensity=self.batch.propensity, base_loss=base_loss
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def loss(self) -> torch.Tensor:
        batch = self.batch
        if self.name == "baseline":
            return self.model(batch.input_ids, labels=batch.labels).loss
        scores = self.model(batch.input_ids).logits[:, 1:]  # (batch, items)
        if self.name == "published":
            return published_loss(scores, batch, self.base_loss)
        labels = batch.teacher_items, batch.teacher_distances
        return self.distillation(scores, batch.target, batch.negative, *labels).loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


PROGRAMS = {"baseline": "base loss alone", "distilled": "DLLM2Rec", "published": "DLLM2Rec, published form"}


def measure_steps(length: int, base_loss: str, arguments: DistillationBenchmarkArguments) -> dict:
    """Milliseconds of a step of each program, and their ratios."""
    steps = {name: TrainingStep(name, base_loss, length, arguments) for name in PROGRAMS}
    stopwatch = time_in_turn(steps, arguments.rounds)
    measured = {
        "milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.medians().items()},
        "milliseconds_cpu": {name: 1000 * seconds for name, seconds in stopwatch.cpu_medians().items()},
    }
    for numerator, denominator in (("distilled", "baseline"), ("published", "distilled")):
        measured[f"{numerator}_over_{denominator}"] = stopwatch.ratio(numerator, denominator)
        measured[f"{numerator}_over_{denominator}_cpu"] = stopwatch.cpu_ratio(numerator, denominator)
    return measured


def measure(arguments: DistillationBenchmarkArguments) -> dict:
    """One measurement for each length and base loss."""
    measurements = []
    for length in arguments.lengths:
        for base_loss in BASE_LOSSES:
            measured = measure_steps(length, base_loss, arguments)
            measurements.append({"length": length, "base_loss": base_loss} | measured)
            logger.info("length %d, %s: %.2f of the baseline", length, base_loss, measured["distilled_over_baseline"])
    return {"measurements": measurements}


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    lines = [
        "# What a training step of distillation costs",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}. Medians of {setting['rounds']} rounds in which "
        "all programs take turns; ratios are medians of the rounds' ratios, in brackets of CPU time.",
        "",
        "A step is forward, backward and AdamW of a SASRec with random float32 weights, hidden size 64, 2 blocks and "
        f"{setting['num_items']} items, on {setting['batch_size']} histories with one label and {setting['top_k']} "
        "teacher items each.",
        "",
        f"| length | base loss | {' | '.join(f'{title}, ms' for title in PROGRAMS.values())} | DLLM2Rec over base loss"
        " | published over DLLM2Rec |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["measurements"]:
        times = (f"{row['milliseconds'][name]:.0f}" for name in PROGRAMS)
        ratios = (
            f"{row[ratio]:.2f} ({row[ratio + '_cpu']:.2f})"
            for ratio in ("distilled_over_baseline", "published_over_distilled")
        )
        lines.append(f"| {row['length']} | {row['base_loss']} | {' | '.join(times)} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
