"""Arguments of next-item training."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import TrainingArguments

from hf_ilora.devices import uses_accelerator
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER

from .argument_checks import check_run_arguments
from .initial_items import INITIAL_ITEMS
from .windows import LABELLED_POSITIONS, WINDOWS, check_windows

ITEM_OPTIMIZERS = ("same", "lazy_adam")
ITEM_TABLES = ("replicated", "row_sharded")


@dataclass
class NextItemTrainingArguments(TrainingArguments):
    r"""Training of a next-item model: `transformers.TrainingArguments` with the settings below and defaults to match.

    > Parameters that control the training windows

    Args:
        windows: the windows of a history that an epoch sees: "random" (one at a random place, a new one each epoch),
            "all" (every item is a target once) or "last" (the newest window only).
        labelled_positions: the positions of a window that have a label: "all" or "last". By default "last" where the
            model or the rows need it (Caser; rows of one user that are prefixes of each other), else "all".
        skip_probability: probability with which an epoch leaves out an item of a window.
        shuffle_distance: the number of places, at most, by which an item of a window moves in an epoch.

    > Parameters that control the item embeddings

    Args:
        initial_items: item embeddings of the untrained model: "random", "cooccurrence" (factorised logarithm of the
            co-occurrence counts of the training rows), "plain_cooccurrence" (without the logarithm), "titles"
            (whitened title vectors), "titles_and_cooccurrence" (`joint_item_embeddings`, without the logarithm) or
            "titles_and_log_cooccurrence". Counts without the logarithm are better where most items are rare.
        initial_mixing: weight of the older items of a history in the untrained model that starts from item embeddings.
        title_encoder: folder or name of the model that encodes titles, or "tf-idf", see `encode_titles`.
        title_layer: number of blocks of that model after which titles are read; `None` is all.
        title_prior: number of occurrences of an item with which its title counts as much as its co-occurrence.
        item_learning_rate_factor: learning rate of the item embeddings, as a multiple of `learning_rate`.
        item_optimizer: optimizer of the item embeddings: "same" (as `optim` says), or "lazy_adam" (`LazyAdamW`: a step
            updates the rows that it reads, so that its cost does not grow with the catalogue; for the sampled losses).
        item_table: "replicated" (every process has the item embeddings of all items) or "row_sharded" (`lazy_adam`
            under `DistributedDataParallel`: each process has a part of them and of their moments, and the model has no
            whole table until `save_model` writes it; a model that is built under `torch.device("meta")` never has one).

    > Parameters that control the end of training

    Args:
        early_stopping_patience: number of evaluations without a better `metric_for_best_model` after which training
            stops; 0 never stops early.

    Raises:
        ValueError: for settings out of range or that contradict each other.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the model, its checkpoints, run.json and run.log"}
    )

    initial_items_choices: ClassVar[tuple[str, ...]] = INITIAL_ITEMS

    windows: str = field(
        default="random",
        metadata={"choices": WINDOWS, "help": "windows of a history that an epoch sees: random, all or last"},
    )
    labelled_positions: str | None = field(
        default=None,
        metadata={
            "help": "positions of a window that have a label: all or last; by default last where the model or the rows "
            "need it (Caser; rows that are prefixes of each other), else all"
        },
    )
    skip_probability: float = field(
        default=0.0, metadata={"help": "probability with which an epoch leaves out an item of a window"}
    )
    shuffle_distance: float = field(
        default=0.0, metadata={"help": "number of places, at most, by which an item of a window moves in an epoch"}
    )
    initial_items: str = field(
        default="random",
        metadata={
            "help": "item embeddings of the untrained model: random, cooccurrence, plain_cooccurrence (no logarithm, "
            "for data in which most items are rare), titles, titles_and_cooccurrence (no logarithm) or "
            "titles_and_log_cooccurrence",
        },
    )
    initial_mixing: float = field(
        default=0.3,
        metadata={"help": "weight of the older items in the untrained model that starts from item embeddings"},
    )
    title_encoder: str = field(
        default=EMBEDDED_ENCODER,
        metadata={
            "help": "folder or Hub name of the sentence encoder, language model or iLoRA that encodes titles, or tf-idf"
        },
    )
    title_layer: int | None = field(
        default=None,
        metadata={"help": "blocks of title_encoder after which titles are read, such as 15 or -2; by default all"},
    )
    title_prior: float = field(
        default=30.0,
        metadata={"help": "occurrences of an item with which its title counts as much as its co-occurrence"},
    )
    item_learning_rate_factor: float = field(
        default=1.0, metadata={"help": "learning rate of the item embeddings, as a multiple of learning_rate"}
    )
    item_optimizer: str = field(
        default="same",
        metadata={
            "choices": ITEM_OPTIMIZERS,
            "help": "optimizer of the item embeddings: same (as optim says), or lazy_adam, which updates the rows that "
            "a step reads, so that steps cost the same for any number of items; for sampled losses",
        },
    )
    item_table: str = field(
        default="replicated",
        metadata={
            "choices": ITEM_TABLES,
            "help": "item embeddings of several processes: replicated (each has all), or row_sharded (each has a part, "
            "for catalogues that do not fit; with lazy_adam)",
        },
    )
    early_stopping_patience: int = field(
        default=20,
        metadata={"help": "evaluations without a better metric_for_best_model before training stops; 0: never"},
    )

    num_train_epochs: float = field(default=50.0, metadata={"help": "epochs; early stopping may end training sooner"})
    learning_rate: float = field(default=1.0e-3, metadata={"help": "learning rate"})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "schedule of the learning rate"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "norm to which gradients are clipped; 0: no clipping"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "windows per step and device"})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "histories per evaluation step and device"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to write a checkpoint: no, steps or epoch"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep"})
    logging_strategy: str = field(default="epoch", metadata={"help": "when to log the loss: no, steps or epoch"})
    # It would wait for the device in every step; training stops at such a loss anyway.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "leave losses that are not finite out of the log; training stops at them"}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "end with the checkpoint that has the best metric_for_best_model"}
    )
    metric_for_best_model: str | None = field(
        default="ndcg@10", metadata={"help": "validation metric that chooses the best checkpoint"}
    )
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "whether a larger metric is better; by default unless it is a loss"}
    )
    dataloader_pin_memory: bool = field(
        default_factory=uses_accelerator,
        metadata={"help": "pin memory for transfers to an accelerator; by default where there is one"},
    )
    # The metrics read the seen items of every user, and reduce scores to ranks batch by batch.
    remove_unused_columns: bool = field(default=False, metadata={"help": "drop columns that the model does not read"})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels", "seen_items"], metadata={"help": "batch keys that the metrics read"}
    )
    batch_eval_metrics: bool = field(default=True, metadata={"help": "reduce scores to ranks batch by batch"})
    # Everything that is trained takes part in every loss.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "let DistributedDataParallel look for parameters without a gradient"}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "a resumed run has the patience that was left"}
    )

    def __post_init__(self) -> None:
        check_run_arguments(self, "its new windows")
        check_windows(self.windows, self.labelled_positions or "all", self.skip_probability, self.shuffle_distance)
        if self.labelled_positions not in (None, *LABELLED_POSITIONS):
            raise ValueError(
                f"labelled_positions is {self.labelled_positions!r}: expected {' or '.join(LABELLED_POSITIONS)}"
            )
        if self.initial_items not in self.initial_items_choices:
            choices = ", ".join(self.initial_items_choices)
            raise ValueError(f"initial_items is {self.initial_items!r}: expected one of {choices}")
        if self.item_optimizer not in ITEM_OPTIMIZERS:
            raise ValueError(f"item_optimizer is {self.item_optimizer!r}: expected {' or '.join(ITEM_OPTIMIZERS)}")
        if self.item_table not in ITEM_TABLES:
            raise ValueError(f"item_table is {self.item_table!r}: expected {' or '.join(ITEM_TABLES)}")
        for name in ("item_learning_rate_factor", "initial_mixing"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 0, and finite")
        if not 0 < self.title_prior < float("inf"):
            raise ValueError(f"title_prior is {self.title_prior}: expected a finite number above 0")
        super().__post_init__()


__all__ = ["NextItemTrainingArguments"]
