"""Fits two baselines that need no training: popularity, and transition counts tuned on the validation split.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    python recipes/fit_counts.py --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/counts

Both count the training rows only. The settings of the transition counts are searched one at a time, keeping the value
with the best validation NDCG@10 (seen items masked), until a whole round brings no improvement. The recipe writes the
two models to the folders `popularity` and `transition_counts` of the output folder, and every trial to its run.json. It
does not read the test split.

To count pairs of up to five steps in chronological order only, pass
`--max_gap 5 --max_length 5 --backward_weight 0 --source_power 0`.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from hf_ilora import (
    PopularityConfig,
    PopularityForNextItem,
    SequenceDatasets,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)
from hf_ilora.data.columns import training_sequences
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.statistics import summarize_ranks
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import check_at_least_one

logger = logging.getLogger(__name__)


@dataclass
class FitArguments:
    """The data to fit on and the folder to write to."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder to write the two models and run.json to"})
    batch_size: int = field(default=256, metadata={"help": "validation users scored per step"})
    max_rounds: int = field(default=3, metadata={"help": "largest number of rounds through the settings"})

    def __post_init__(self):
        check_at_least_one(self, "batch_size", "max_rounds")


@dataclass
class SearchedValues:
    """Values to try for each setting of the transition counts; the search starts with the first ones."""

    max_gap: list[int] = field(default_factory=lambda: [20, 5, 10, 40], metadata={"help": "largest distance of a pair"})
    gap_decay: list[float] = field(
        default_factory=lambda: [0.95, 0.5, 0.7, 0.85], metadata={"help": "decay of a pair with its distance"}
    )
    backward_weight: list[float] = field(
        default_factory=lambda: [0.6, 0.0, 0.3, 1.0], metadata={"help": "weight of a pair in reverse order"}
    )
    source_power: list[float] = field(
        default_factory=lambda: [0.75, 0.0, 0.5, 1.0], metadata={"help": "normalisation by the earlier item"}
    )
    target_power: list[float] = field(
        default_factory=lambda: [0.25, 0.0, 0.4, 0.55], metadata={"help": "normalisation by the later item"}
    )
    max_length: list[int] = field(
        default_factory=lambda: [10, 3, 5, 20], metadata={"help": "number of newest items of a history to read"}
    )
    history_decay: list[float] = field(
        default_factory=lambda: [0.7, 0.5, 0.8, 0.9], metadata={"help": "decay of an item's weight with its age"}
    )

    def __post_init__(self):
        for name, values in vars(self).items():
            if not values:
                raise ValueError(f"{name} is empty: expected at least one value to try")
            for value in values:
                TransitionCountsConfig(**{name: value})  # raises for a value out of range


ARGUMENTS = (FitArguments, SearchedValues)


def main() -> None:
    arguments, searched = parse_arguments(ARGUMENTS)
    with sole_writer(arguments.output_dir):
        fit(arguments, searched)


def fit(arguments: FitArguments, searched: SearchedValues) -> None:
    """Fit, measure and save both models."""
    set_up_logging(arguments.output_dir)
    sequences = SequenceDatasets.load(arguments.data_dir)
    folder = Path(arguments.output_dir)
    with RunRecord(folder, [arguments, searched], seed=0) as record:
        record.add_data(sequences.fingerprint)
        # If the rows are all prefixes of a history, a pair occurs in many rows, so only pairs with targets are counted.
        targets_only = sequences.protocol["name"] == "temporal_users"
        rows = np.split(*training_sequences(sequences["train"]))[1:-1]
        validation = sequences["validation"]
        with record.stage("search"):
            config, trials = search(rows, sequences.num_items, validation, searched, arguments, targets_only)
        record.add_metrics("search", {"trials": trials})
        for name, model in (
            (
                "popularity",
                PopularityForNextItem.fit(
                    rows, PopularityConfig(num_items=sequences.num_items), targets_only=targets_only
                ),
            ),
            ("transition_counts", TransitionCountsForNextItem.fit(rows, config, targets_only=targets_only)),
        ):
            model.catalogue = sequences.catalogue
            model.save_pretrained(folder / name)
            metrics = summarize_ranks(rank_split(model, validation, batch_size=arguments.batch_size))
            record.add_metrics(f"validation_{name}", metrics)
            logger.info("%s: validation NDCG@10 %.4f (seen items masked)", name, metrics["masked/ndcg@10"].mean)


def search(rows, num_items: int, validation, searched: SearchedValues, arguments: FitArguments, targets_only: bool):
    """The best configuration, and all trials as settings with their validation NDCG@10."""
    choices = asdict(searched)
    best = {name: values[0] for name, values in choices.items()}
    tried: dict[tuple, float] = {}

    def quality(settings: dict) -> float:
        key = tuple(settings.values())
        if key not in tried:
            config = TransitionCountsConfig(num_items=num_items, **settings)
            model = TransitionCountsForNextItem.fit(rows, config, targets_only=targets_only)
            ranks = rank_split(model, validation, batch_size=arguments.batch_size).masked
            tried[key] = ndcg_at(torch.from_numpy(ranks), 10).mean().item()
            logger.info("%.4f %s", tried[key], settings)
        return tried[key]

    for _ in range(arguments.max_rounds):
        before = dict(best)
        for name, values in choices.items():
            best[name] = max(values, key=lambda value: quality(best | {name: value}))
        if best == before:
            break
    trials = [dict(zip(choices, key, strict=True)) | {"ndcg@10": value} for key, value in tried.items()]
    return TransitionCountsConfig(num_items=num_items, **best), trials


if __name__ == "__main__":
    run_main(main)
