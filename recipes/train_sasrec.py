"""Trains SASRec on a prepared data set, keeps the best epoch on validation unless told not to, and evaluates it once.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml \
        recipes/train_sasrec.py recipes/configs/ml-100k/sasrec.yaml --seed 1 --output_dir outputs/ml-100k/sasrec-1

The output folder becomes the model: weights, configuration and catalogue, with run.json and run.log beside them.
A killed run goes on from its last whole checkpoint when the same command is given again.
"""

import dataclasses
import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_ilora import Catalogue, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.data.columns import training_sequences
from hf_ilora.data.row_fractions import check_fraction, rows_in_fraction
from hf_ilora.evaluation.ranking import RankingMetrics, rank_split, ranks_from_logits
from hf_ilora.evaluation.statistics import summarize_ranks
from hf_ilora.runs import (
    LogMetricsCallback,
    RunRecord,
    config_arguments,
    leave_launch,
    parse_arguments,
    resumable_checkpoint,
    set_up_logging,
)
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings
from hf_ilora.training.windows import (
    EvaluationHistories,
    NextItemCollator,
    TrainingWindows,
    WindowEpochCallback,
    check_windows,
)

logger = logging.getLogger(__name__)

INITIAL_ITEMS = ("random", "cooccurrence", "plain_cooccurrence")
# What a teacher adds is for recipes/distill_sasrec.py.
TEACHER_FIELDS = ("teacher_embedding_size", "ed_weight", "teacher_embedding_use")
SASRecArguments = config_arguments(SASRecConfig, exclude=("num_items", "pad_token_id", *TEACHER_FIELDS))


@dataclass
class DataArguments:
    """What to train on."""

    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    train_fraction: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "rows to learn from, from and to, as shares of the train split; users are not cut in two"},
    )
    windows: str = field(default="random", metadata={"help": "windows per epoch and history: random, all or last"})
    targets: str | None = field(
        default=None,
        metadata={"help": "labelled positions per window: all or last; by default last where the rows are prefixes"},
    )
    skip_probability: float = field(
        default=0.0, metadata={"help": "share of the items left out of each training window, another one each epoch"}
    )
    shuffle_distance: float = field(
        default=0.0, metadata={"help": "how many places, at most, an item of a window may move in an epoch"}
    )
    initial_items: str = field(
        default="random",
        metadata={"help": "item embeddings to begin with: random, cooccurrence or plain_cooccurrence (no logarithm)"},
    )
    initial_mixing: float = field(
        default=0.3, metadata={"help": "weight of the older items in the untrained model that starts from cooccurrence"}
    )
    item_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "learning rate of the item embeddings, as a share of the others'"}
    )
    early_stopping_patience: int = field(
        default=20, metadata={"help": "evaluations without a better validation NDCG@10 before training stops; 0: never"}
    )

    def __post_init__(self):
        check_fraction(self.train_fraction)
        check_windows(self.windows, self.targets or "all", self.skip_probability, self.shuffle_distance)
        if self.initial_items not in INITIAL_ITEMS:
            raise ValueError(f"initial_items is {self.initial_items!r}: expected one of {', '.join(INITIAL_ITEMS)}")
        if self.item_learning_rate_factor < 0:
            raise ValueError(f"item_learning_rate_factor is {self.item_learning_rate_factor}: expected at least 0")


@dataclass
class SASRecTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of next-item training; everything can be set as usual."""

    learning_rate: float = 1.0e-3
    lr_scheduler_type: str = "constant"
    max_grad_norm: float = 0.0
    per_device_train_batch_size: int = 64
    per_device_eval_batch_size: int = 512
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    logging_strategy: str = "epoch"
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "ndcg@10"
    greater_is_better: bool = True
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    # The three that the metrics need: they see every user's seen items, and are reduced to ranks batch by batch.
    remove_unused_columns: bool = False
    label_names: list[str] = field(default_factory=lambda: ["labels", "seen_items"])
    batch_eval_metrics: bool = True
    restore_callback_states_from_checkpoint: bool = True  # a resumed run has the patience that was left

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("output_dir is missing: expected a folder for the model, --output_dir or in the YAML")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers is true: expected false, since workers that outlive an epoch never see "
                "its new windows"
            )
        super().__post_init__()


ARGUMENTS = (DataArguments, SASRecArguments, SASRecTrainingArguments)


def next_item_optimizer(
    model: SASRecForNextItem, arguments: TrainingArguments, item_factor: float
) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
    """The optimizer that `arguments` name, with a learning rate of its own for the item embeddings.

    As in the Trainer, biases and layer normalisations do not decay.

    Returns:
        What `Trainer(optimizer_cls_and_kwargs=...)` takes: under DeepSpeed a finished optimizer would be dropped.
    """
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    items = model.model.item_embedding.weight
    others = [parameter for parameter in model.parameters() if parameter is not items]
    decayed = [parameter for parameter in others if parameter.dim() > 1]
    undecayed = [parameter for parameter in others if parameter.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": arguments.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": [items], "weight_decay": arguments.weight_decay, "lr": settings["lr"] * item_factor},
    ]
    return optimizer_class, {"params": groups, **settings}


def labelled_positions(data_arguments: DataArguments, protocol: str) -> str:
    """ "all" or "last" as asked for, or as the protocol's rows need it.

    Raises:
        ValueError: for "all" on rows that are prefixes of each other: each target would count many times.
    """
    if data_arguments.targets is None:
        targets = "last" if protocol == "temporal_users" else "all"
    else:
        targets = data_arguments.targets
    if targets == "all" and protocol == "temporal_users":
        raise ValueError("targets is all on data of protocol temporal_users: expected last, its rows are prefixes")
    check_windows(data_arguments.windows, targets, data_arguments.skip_probability, data_arguments.shuffle_distance)
    return targets


def training_windows(
    data_arguments: DataArguments, train: Dataset, max_length: int, targets: str, seed: int, with_origins: bool = False
) -> TrainingWindows:
    """The windows that the arguments describe; see `TrainingWindows`."""
    return TrainingWindows(
        train,
        max_length,
        data_arguments.windows,
        targets,
        data_arguments.skip_probability,
        data_arguments.shuffle_distance,
        seed,
        with_origins,
    )


def start_from_cooccurrence(
    model: SASRecForNextItem, data_arguments: DataArguments, train: Dataset, item_counts: torch.Tensor, targets: str
) -> None:
    """Give an untrained model the item embeddings that `initial_items` names."""
    logger.info("factorising the co-occurrence of %d items", model.config.num_items)
    embeddings = cooccurrence_embeddings(
        np.split(*training_sequences(train))[1:-1],
        model.config.num_items,
        model.config.hidden_size,
        take_logarithm=data_arguments.initial_items == "cooccurrence",
        # A cosine reads directions only; the scale of dot products is that of the scores.
        mean_norm=None if model.config.score_temperature is None else 1.0,
        targets_only=targets == "last",
    )
    model.start_from_item_embeddings(embeddings, data_arguments.initial_mixing, item_counts)


def record_quality(
    trainer: Trainer, sequences: SequenceDatasets, record: RunRecord, recipe_logger: logging.Logger
) -> None:
    """Rank both evaluation splits with the trained model, and put their metrics on record and in the recipe's log."""
    for split in ("validation", "test"):
        with record.stage(f"evaluate_{split}"):
            metrics = summarize_ranks(rank_split(trainer.model_wrapped, sequences[split]))
        record.add_metrics(split, metrics)
        for name, value in metrics.items():
            recipe_logger.info("%s %s %.4f [%.4f, %.4f]", split, name, value.mean, value.low, value.high)


def main() -> None:
    data_arguments, model_arguments, training_arguments = parse_arguments(ARGUMENTS)
    if data_arguments.early_stopping_patience and training_arguments.eval_strategy == "no":
        raise ValueError("eval_strategy is no: expected evaluations to stop by, or --early_stopping_patience 0")
    set_up_logging(training_arguments.output_dir)
    sequences = SequenceDatasets.load(data_arguments.data_dir)
    targets = labelled_positions(data_arguments, sequences.protocol["name"])
    config = SASRecConfig(num_items=sequences.num_items, **dataclasses.asdict(model_arguments))
    fingerprint = sequences.fingerprint
    arguments = (data_arguments, model_arguments, training_arguments)
    checkpoint = resumable_checkpoint(training_arguments.output_dir, arguments, fingerprint)
    with RunRecord(training_arguments.output_dir, arguments, seed=training_arguments.seed) as record:
        record.add_data(fingerprint)
        set_seed(training_arguments.seed)
        model = SASRecForNextItem(config)
        model.catalogue = Catalogue(sequences.catalogue.with_format("arrow")[:])
        train = rows_in_fraction(sequences["train"], data_arguments.train_fraction)
        windows = training_windows(data_arguments, train, config.max_length, targets, training_arguments.seed)
        item_counts = torch.from_numpy(windows.item_counts(config.num_items))
        if config.popularity_power:
            model.set_item_counts(item_counts)
        if data_arguments.initial_items != "random" and checkpoint is None:
            start_from_cooccurrence(model, data_arguments, train, item_counts, targets)
        callbacks = [WindowEpochCallback(windows), LogMetricsCallback()]
        if data_arguments.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(data_arguments.early_stopping_patience))
        trainer = Trainer(
            model,
            training_arguments,
            train_dataset=windows,
            eval_dataset=EvaluationHistories(sequences["validation"], config.max_length),
            data_collator=NextItemCollator(),
            compute_metrics=RankingMetrics(k=10),
            preprocess_logits_for_metrics=ranks_from_logits,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=next_item_optimizer(
                model, training_arguments, data_arguments.item_learning_rate_factor
            ),
        )
        trainer.remove_callback(PrinterCallback)  # LogMetricsCallback says the same, to the file too
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        record_quality(trainer, sequences, record, logger)
    leave_launch()


if __name__ == "__main__":
    main()
