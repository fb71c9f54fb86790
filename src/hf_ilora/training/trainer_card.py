"""The sections of the model card that follow from a trainer's run and its evaluations."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import datasets
from transformers import TrainerState, TrainingArguments

from hf_ilora.evaluation.card_metrics import ABOUT_NDCG, eval_results, quality_in_words
from hf_ilora.evaluation.results import short_number
from hf_ilora.models.next_item.hub_upload import RUN_FILE
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown, shareable, shareable_command

_RANKINGS = {"unmasked_": "unmasked", "candidates_": "candidates", "": "masked"}
_RANK_METRICS = ("ndcg@", "hit_ratio@", "mrr")
# Endings of the logged values of an evaluation that are no metrics.
_NO_METRICS = ("_runtime", "_per_second", "_preparation_time", "_alloc_delta", "_peaked_delta")
# Settings that say nothing about what was trained, or that name places of the machine.
_OTHER_SETTINGS = ("output_dir", "seed", "run_name", "disable_tqdm", "use_cpu", "project", "resume_from_checkpoint")
_OTHER_SETTINGS += ("greater_is_better",)  # follows from the metric
_OTHER_PREFIXES = ("do_", "hub_", "push_to_hub", "log", "report_", "dataloader_", "save_", "trackio_")


@dataclasses.dataclass
class Evaluation:
    """The result of an evaluation.

    Args:
        rows: the evaluated data set.
        metrics: by name, without the prefix of the evaluation.
    """

    rows: object
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def split(self) -> str:
        """Name of the split, for data sets that know it."""
        is_named = isinstance(self.rows, datasets.Dataset | datasets.IterableDataset) and self.rows.split is not None
        return str(self.rows.split) if is_named else "evaluation"

    @property
    def quality(self) -> dict[str, float]:
        """The ranking metrics as "ranking/metric"."""
        found = {}
        for name, value in self.metrics.items():
            prefix = next(prefix for prefix in _RANKINGS if name.startswith(prefix))
            if name.removeprefix(prefix).startswith(_RANK_METRICS):
                found[f"{_RANKINGS[prefix]}/{name.removeprefix(prefix)}"] = value
        return found

    def in_words(self, num_items: int) -> str:
        """The metrics, in Markdown."""
        rows = f", {len(self.rows):,} users" if isinstance(self.rows, datasets.Dataset) else ""
        lines = [quality_in_words(self.quality, num_items)] if self.quality else []
        for name, value in self.metrics.items():
            if not name.removeprefix("unmasked_").removeprefix("candidates_").startswith(_RANK_METRICS):
                lines.append(f"- {in_markdown(name)}: {short_number(value)}.")
        return "\n".join([f"{in_markdown(self.split).capitalize()} split{rows}:", "", *lines])


def metrics_of(logs: Mapping[str, object], prefix: str) -> dict[str, float]:
    """The metrics that an evaluation logs, without its prefix; the Hub refuses those that are not finite."""
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in logs.items()
        if name.startswith(f"{prefix}_")
        and not name.endswith(_NO_METRICS)
        and isinstance(value, int | float)
        and math.isfinite(value)
    }


def evaluations_in_training(state: TrainerState, eval_dataset: object, of_best: bool) -> list[Evaluation]:
    """The evaluations during the training that are of the present model.

    Args:
        state: state of the trainer.
        eval_dataset: the trainer's evaluation data set, or a dictionary of several.
        of_best: whether the present model is that of the best evaluation instead of the last one.
    """
    several = eval_dataset if isinstance(eval_dataset, dict) else {None: eval_dataset}
    found = []
    for name, rows in several.items():
        prefix = "eval" if name is None else f"eval_{name}"
        logged = [(logs["step"], metrics) for logs in state.log_history if (metrics := metrics_of(logs, prefix))]
        step = state.best_global_step if of_best else max((step for step, _ in logged), default=None)
        metrics = {key: value for logged_step, each in logged if logged_step == step for key, value in each.items()}
        if metrics:
            found.append(Evaluation(rows, metrics))
    return found


def card_sections(
    args: TrainingArguments,
    state: TrainerState,
    evaluations: Sequence[Evaluation],
    train_rows: object,
    num_items: int,
    dataset_name: str | None,
    protocol: str | None,
) -> dict[str, str | None]:
    """The sections `measurements`, `training` and `command` of the card.

    Args:
        args, state: of the trainer.
        evaluations: of the present model.
        train_rows: the data set that it was trained on.
        num_items: size of the catalogue.
        dataset_name: as people call the data; None leaves it out.
        protocol: that split the data; None leaves it out.
    """
    run = _record(Path(args.output_dir, RUN_FILE))
    measurements = ""
    if evaluations:
        of_protocol = "" if protocol is None else f"Protocol {in_markdown(protocol)}. "
        about = (
            f"{of_protocol}One training run, with seed {args.seed}, measured by the trainer without intervals: "
            f"`hf-ilora evaluate` measures with intervals over users. {ABOUT_NDCG}"
        )
        measurements = "\n\n".join([about, *(each.in_words(num_items) for each in evaluations)])
    facts = {
        "data": dataset_name and in_markdown(dataset_name),
        "protocol": protocol and in_markdown(protocol),
        "data fingerprint": run.get("data_fingerprint") and code_in_markdown(run["data_fingerprint"]),
        "training rows": f"{len(train_rows):,}" if isinstance(train_rows, datasets.Dataset) else None,
        "steps": f"{state.global_step:,}",
        "epochs": None if state.epoch is None else f"{state.epoch:g}",
        "seed": str(args.seed),
        "settings": code_in_markdown(_settings(args)),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("hf_ilora", "torch", "transformers")),
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items() if value]
    command = run.get("command")
    return {
        "measurements": measurements,
        "training": "\n".join(["| | |", "|---|---|", *lines]),
        "command": shareable_command(command) if command else None,
    }


def measured_metadata(
    evaluations: Sequence[Evaluation], model_name: str, dataset_name: str | None, dataset_ids: Sequence[str]
) -> dict[str, object]:
    """The entries `model_name` and `eval_results` of the card's metadata; none without a name of the data."""
    if dataset_name is None and not dataset_ids:
        return {}
    named = {"dataset_name": dataset_name or dataset_ids[0], "dataset_id": dataset_ids[0] if dataset_ids else None}
    results = [result for each in evaluations for result in eval_results(each.quality, split=each.split, **named)]
    return {"model_name": model_name, "eval_results": results} if results else {}


def _settings(args: TrainingArguments) -> str:
    """The settings that differ from their defaults, as Python."""
    changed = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        told = field.init and field.name not in _OTHER_SETTINGS and not field.name.startswith(_OTHER_PREFIXES)
        is_default = value == field.default or (field.default is None and value is False)
        if told and isinstance(value, bool | int | float | str) and not is_default:
            plain = value.value if isinstance(value, Enum) else value
            changed.append(f"{field.name}={(shareable(plain) if isinstance(plain, str) else plain)!r}")
    return f"{type(args).__name__}({', '.join(changed)})"


def _record(path: Path) -> dict:
    """The content of run.json, which recipes write; empty without one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
