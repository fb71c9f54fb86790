"""A Trainer of next-item models that takes splits of histories as they are."""

import logging
from collections.abc import Callable, Sized
from typing import Any, TypeAlias, cast

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PredictionOutput, TrainOutput

from hf_ilora.data.columns import ListColumn, read_column, repeat_share, training_sequences
from hf_ilora.evaluation.ranking import RankingMetrics, last_labels, ranks_from_logits
from hf_ilora.models.loading import check_catalogue
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.next_item_head import first_occurrences
from hf_ilora.models.next_item.next_item_output import NextItemOutput

from .argument_checks import check_best_metric
from .initial_items import (
    WITH_TITLES,
    check_initial_items,
    check_titles,
    checked_title_embeddings,
    encoded_titles,
    initial_item_embeddings,
)
from .lazy_adam import LazyAdamW, check_lazy_adam
from .next_item_arguments import NextItemTrainingArguments
from .recommender_trainer import RecommenderTrainer
from .row_sharded_table import TABLE_NAMES, RowShardedTable, check_row_sharded, saved_blocks
from .windows import (
    EpochCallback,
    EvaluationHistories,
    NextItemCollator,
    StreamedHistories,
    StreamedWindows,
    TrainingWindows,
    item_counts,
    rows_are_prefixes,
    with_label_indices,
)

logger = logging.getLogger(__name__)

METRICS_CUTOFF = 10  # of NDCG and hit ratio
METRICS = ("loss", *(f"{seen}{name}" for seen in ("", "unmasked_") for name in ("ndcg@10", "hit_ratio@10", "mrr")))

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


class NextItemTrainer(RecommenderTrainer):
    """Trains SASRec, GRU4Rec or Caser on histories.

    Training windows, their collator, the ranking metrics, the optimizer's parameter groups and the initial item
    embeddings follow from the arguments. `evaluate` reports `eval_ndcg@10`, `eval_hit_ratio@10` and `eval_mrr` over the
    whole catalogue without the items of the history, the same with the prefix `unmasked_` for the whole catalogue, and
    `eval_loss`. Everything else is as in `transformers.Trainer`.

    Args:
        model: the model to train; or pass `model_init`.
        args: `NextItemTrainingArguments`.
        data_collator: None pads rows on the right.
        train_dataset: rows with `history` (item ids, oldest first) and `target`, such as `sequences["train"]`: a
            `datasets.Dataset`, or a `datasets.IterableDataset` with `max_steps`. Another torch data set is taken as it
            is: its rows have `input_ids` and `labels`.
        eval_dataset: likewise, such as `sequences["validation"]`, or a dictionary of them.
        processing_class: the catalogue of the items, `sequences.catalogue`: it is saved with the model, which maps ids
            to titles by it. None keeps the model's.
        model_init: returns an untrained model, for `hyperparameter_search`.
        compute_metrics, preprocess_logits_for_metrics: None computes the ranking metrics.
        title_embeddings: (num_items + 1, any), row 0 for padding, for an `initial_items` with titles; None encodes the
            titles of the catalogue with `title_encoder`.
        callbacks, optimizers, kwargs: as in `Trainer`.

    Raises:
        TypeError: for a model, arguments, a data set or a catalogue of another kind.
        ValueError: for settings and data that do not fit together.
    """

    arguments_class = NextItemTrainingArguments

    def __init__(
        self,
        model: EncoderForNextItem | None = None,
        args: NextItemTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | TorchDataset | None = None,
        eval_dataset: Rows | TorchDataset | dict | None = None,
        processing_class: Catalogue | None = None,
        model_init: Callable[..., EncoderForNextItem] | None = None,
        compute_metrics: Callable | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        title_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ):
        args = self.checked_arguments(args)
        if processing_class is not None and not isinstance(processing_class, Catalogue):
            raise TypeError(
                f"processing_class is a {type(processing_class).__name__}: expected a Catalogue, sequences.catalogue"
            )
        self._own_metrics = bool(compute_metrics or preprocess_logits_for_metrics)
        self._table: RowShardedTable | None = None  # with item_table "row_sharded"
        if compute_metrics is None:
            compute_metrics, preprocess_logits_for_metrics = RankingMetrics(k=METRICS_CUTOFF), ranks_from_logits
            check_best_metric(args, METRICS, eval_dataset)
        self.catalogue, self._title_embeddings = processing_class, title_embeddings
        self._train_rows = train_dataset if isinstance(train_dataset, datasets.Dataset) else None
        if self._train_rows is not None:
            _check_columns(self._train_rows, "train_dataset")
        self._has_prefixes = self._train_rows is not None and rows_are_prefixes(self._train_rows)
        self._evaluation_rows: dict[int, tuple[Rows, TorchDataset]] = {}
        self._is_started = self.is_in_train = False
        if model is not None:
            self._prepare_model(model, args)
        elif args.item_table == "row_sharded":
            raise ValueError("item_table is 'row_sharded' with model_init: expected a model, or 'replicated'")
        if self._table is not None:
            preprocess_logits_for_metrics = None  # `compute_loss` returns ranks
        if args.item_optimizer == "lazy_adam" and kwargs.keys() & {"optimizers", "optimizer_cls_and_kwargs"}:
            raise ValueError("item_optimizer is 'lazy_adam' beside another optimizer: expected one of them")
        super().__init__(
            model,
            args,
            data_collator=data_collator or self._default_collator(args),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **kwargs,
        )
        self.train_dataset = self._training_windows(train_dataset)
        if isinstance(self.train_dataset, TrainingWindows | StreamedWindows):
            self._add_first(EpochCallback(self.train_dataset))
        if args.labelled_positions == "all" and self._has_prefixes:
            logger.warning(
                "labelled_positions is 'all' on rows that are prefixes of each other: most targets count many times"
            )
        if self.model.catalogue is None and train_dataset is not None:
            logger.warning(
                "the model has no catalogue and will be saved without titles: pass processing_class=sequences.catalogue"
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As `Trainer.train`; an untrained model first gets the item embeddings that `initial_items` names."""
        if self.model_init is None and not resume_from_checkpoint and not self._is_started:
            self._start_items(self.model)
        self._is_started = True
        try:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            _give_sparse_gradients(self.model, False)

    def item_title_embeddings(self) -> torch.Tensor:
        """The title of each item as a vector: those that were given, or the encoded titles of the catalogue.

        They are encoded once, by the main process first.

        Returns:
            (num_items + 1, size) float32, zeros for padding.

        Raises:
            ValueError: without a catalogue or with titles that say nothing about the items, and as `encode_titles`.
        """
        if self._title_embeddings is None:
            self._title_embeddings = encoded_titles(self.model.catalogue, self.args)
        return self._title_embeddings

    def predict(
        self, test_dataset: Rows | TorchDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Rank the target of every row in the whole catalogue.

        Args:
            test_dataset: rows with `history` and `target`, such as `sequences["test"]`.
            ignore_keys, metric_key_prefix: as in `Trainer.predict`.

        Returns:
            predictions: (rows, 2) int64, the rank of each row's target without the items of its history, and with them;
                1 is the best.
            label_ids: labels (rows, length) and seen items (rows, items).
            metrics: those of `evaluate`.
        """
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Rows | TorchDataset | str | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return super().get_eval_dataloader(None if rows is None else self._evaluation_histories(rows))

    def get_test_dataloader(self, test_dataset: Rows | TorchDataset) -> DataLoader:
        return super().get_test_dataloader(self._evaluation_histories(test_dataset))

    def _get_eval_sampler(self, eval_dataset: TorchDataset) -> Sampler | None:
        # In the order of the rows, also where training groups them by length: `predict` answers row by row.
        if self.args.train_sampling_strategy == "group_by_length":
            return SequentialSampler(cast(Sized, eval_dataset)) if self.args.world_size <= 1 else None
        return super()._get_eval_sampler(eval_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, NextItemOutput]:
        """As in `Trainer`; with a sharded table, outputs have the ranks of the last targets in place of the logits."""
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._table is None or not return_outputs:
            return computed
        loss, outputs = computed
        seen, repeated = inputs["seen_items"], first_occurrences(inputs["input_ids"])
        targets = last_labels(inputs["labels"])
        outputs.logits = self._table.ranks(self.model.head, outputs.user_embedding, targets, seen, repeated)
        return loss, outputs

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; call it in all processes: a sharded table comes together in the main process, which needs
        the memory of the whole one beside its part. A checkpoint has the parts instead."""
        if self._table is None:
            return super().save_model(output_dir, _internal_call)
        others = {name: value for name, value in self.model.state_dict().items() if name not in TABLE_NAMES}
        if _internal_call and output_dir is not None:  # a checkpoint
            self._save(output_dir, others)
            moments = {} if self.args.save_only_model else self.optimizer.state.get(self._table.block, {})
            self._table.save(output_dir, moments)
            return
        table = self._table.whole()
        if table is not None:
            name, *ignored = TABLE_NAMES
            self.model._keys_to_ignore_on_save, kept = ignored, self.model._keys_to_ignore_on_save
            try:
                self._save(output_dir, others | {name: table})
            finally:
                self.model._keys_to_ignore_on_save = kept
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._table is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        moments = self.optimizer.state.pop(self._table.block, None)  # each process has saved its own
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            if moments is not None:
                self.optimizer.state[self._table.block] = moments

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._table is not None and checkpoint is not None and (moments := self._table.load(checkpoint)):
            self.optimizer.state[self._table.block] = moments

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._table is not None:
            self._table.load(resume_from_checkpoint)
        elif blocks := saved_blocks(resume_from_checkpoint):
            raise ValueError(
                f"{resume_from_checkpoint} has its item table in {len(blocks)} files, such as {blocks[0].name}: "
                "expected item_table 'row_sharded' and as many processes to resume from it"
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._table is not None:
            self._table.load(self.state.best_model_checkpoint)

    def optimizer_of(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
        _give_sparse_gradients(cast(EncoderForNextItem, model), self.args.item_optimizer == "lazy_adam")
        return next_item_optimizer(model, self.args)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._prepare_model(model, self.args)
        if self.is_in_train:
            self._start_items(model)
        return model

    # --- from arguments and rows to what the Trainer reads ---

    def batch_completion(self) -> Callable[[dict], dict]:
        return with_label_indices

    def _default_collator(self, args: NextItemTrainingArguments) -> Callable:
        return NextItemCollator()

    def _prepare_model(self, model: EncoderForNextItem, args: NextItemTrainingArguments) -> None:
        """Check the model, and give it its catalogue and the counts that its negatives are drawn by."""
        if not isinstance(model, EncoderForNextItem):
            raise TypeError(
                f"model is a {type(model).__name__}: expected a SASRecForNextItem, GRU4RecForNextItem or "
                "CaserForNextItem"
            )
        if self.catalogue is not None:
            raw_ids = self.catalogue.table["raw_id"].to_numpy()
            check_catalogue(model, model.name_or_path or "the model", len(self.catalogue), raw_ids)
            model.catalogue = self.catalogue
        if args.item_table == "row_sharded":
            check_row_sharded(model, args, self._own_metrics)
        elif model.get_input_embeddings().weight.is_meta:
            raise ValueError("the model is on the device meta with item_table 'replicated': expected one with weights")
        if args.item_optimizer == "lazy_adam":
            check_lazy_adam(model, args)
        model.check_table_is_whole()
        if args.item_table == "row_sharded":
            self._table = RowShardedTable(model, args.seed)
        labelled_positions, num_items = self._labelled_positions(model, args), catalogue_size(model.config)
        if self._train_rows is not None:
            _check_item_ids(self._train_rows, num_items)
            if model.config.popularity_power:
                model.set_item_counts(item_counts(self._train_rows, num_items, labelled_positions))
        elif model.config.popularity_power and not model.item_counts.any():
            raise ValueError(
                "popularity_power needs the item counts of the training rows, which a stream does not have: pass a "
                "datasets.Dataset, or call model.set_item_counts"
            )
        if args.initial_items != "random":
            check_initial_items(model, args.initial_items)
            if self._train_rows is None:
                raise ValueError(
                    f"initial_items is {args.initial_items!r}: expected a datasets.Dataset as train_dataset, whose "
                    "co-occurrences are counted before training"
                )
        if self._title_embeddings is not None:
            self._title_embeddings = checked_title_embeddings(self._title_embeddings, num_items)
        elif args.initial_items in WITH_TITLES:
            check_titles(model.catalogue, args.title_encoder)

    def _labelled_positions(self, model: EncoderForNextItem, args: NextItemTrainingArguments) -> str:
        chosen = args.labelled_positions
        if isinstance(model, CaserForNextItem):
            if chosen == "all" or args.skip_probability or args.shuffle_distance:
                raise ValueError(
                    "Caser predicts the item after the newest one only: expected labelled_positions='last', "
                    "skip_probability=0 and shuffle_distance=0"
                )
            return "last"
        if chosen is None:
            return "last" if self._has_prefixes else "all"
        return chosen

    def _training_windows(self, rows: Rows | TorchDataset | None) -> TorchDataset | None:
        if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            return rows
        kind = TrainingWindows if isinstance(rows, datasets.Dataset) else StreamedWindows
        return kind(rows, **self._window_settings())

    def _window_settings(self) -> dict:
        return {
            "max_length": self.model.config.max_length,
            "windows": self.args.windows,
            "labelled_positions": self._labelled_positions(self.model, self.args),
            "skip_probability": self.args.skip_probability,
            "shuffle_distance": self.args.shuffle_distance,
            "seed": self.args.seed,
        }

    def _evaluation_histories(self, rows: Rows | TorchDataset) -> TorchDataset:
        """The evaluation data set of some rows; made once, since a training run evaluates the same rows many times."""
        if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
            return rows
        if id(rows) not in self._evaluation_rows:
            max_length = self.model.config.max_length
            made: TorchDataset
            if isinstance(rows, datasets.Dataset):
                _check_columns(rows, "eval_dataset")
                made = EvaluationHistories(rows, max_length)
            else:
                made = StreamedHistories(rows, max_length)
            self._evaluation_rows[id(rows)] = rows, made  # the rows are kept, so that their id stays theirs
        return self._evaluation_rows[id(rows)][1]

    def _add_first(self, callback: TrainerCallback) -> None:
        """Add a callback before the user's, which may read the state that it changes."""
        self.callback_handler.callbacks.insert(0, callback)

    def _start_items(self, model: SASRecForNextItem) -> None:
        """Give an untrained model the item embeddings that `initial_items` names."""
        if self.args.initial_items == "random":
            return
        labelled_positions = self._labelled_positions(model, self.args)
        counts = item_counts(self._train_rows, catalogue_size(model.config), labelled_positions)
        embeddings = initial_item_embeddings(
            self.args.initial_items,
            self._train_rows,
            model.config,
            counts,
            self.item_title_embeddings() if self.args.initial_items in WITH_TITLES else None,
            self.args.title_prior,
            targets_only=labelled_positions == "last",
        )
        share = repeat_share(*training_sequences(self._train_rows))
        model.start_from_item_embeddings(embeddings, self.args.initial_mixing, counts, share)


def next_item_optimizer(
    model: nn.Module, arguments: NextItemTrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
    """The optimizer that `arguments` name, as `Trainer(optimizer_cls_and_kwargs=...)` takes it, in three groups.

    Weights decay, biases and layer normalisations do not, and the item embeddings have a learning rate of their own.
    """
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if arguments.item_optimizer == "lazy_adam":
        optimizer_class = LazyAdamW
    items: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (items if name.endswith("item_embedding.weight") else others).append(parameter)
    groups = [
        {"params": [value for value in others if value.dim() > 1], "weight_decay": arguments.weight_decay},
        {"params": [value for value in others if value.dim() <= 1], "weight_decay": 0.0},
        {
            "params": items,
            "weight_decay": arguments.weight_decay,
            "lr": settings["lr"] * arguments.item_learning_rate_factor,
        },
    ]
    return optimizer_class, {"params": groups, **settings}


def _give_sparse_gradients(model: EncoderForNextItem, sparse: bool) -> None:
    """Give the tables of a model gradients of the rows that a step reads (sparse), or of all rows."""
    model.get_input_embeddings().sparse = model.head.sparse = sparse


def _check_columns(rows: datasets.Dataset, name: str) -> None:
    missing = [column for column in ("history", "target") if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{name} has no column {' and '.join(missing)} (found: {', '.join(rows.column_names)}): expected rows of "
            "history (item ids, oldest first) and target, such as a split of build_sequences"
        )


def _check_item_ids(rows: datasets.Dataset, num_items: int) -> None:
    targets = read_column(rows, "target").to_numpy()
    for column, pieces in (("history", ListColumn(rows, "history").pieces()), ("target", [targets])):
        for items in pieces:
            if len(items) and (items.min() < 1 or items.max() > num_items):
                wrong = items.min() if items.min() < 1 else items.max()
                raise ValueError(
                    f"train_dataset holds item {wrong} in {column}: expected ids 1 to {num_items}, the model's "
                    "num_items; build the model with num_items=sequences.num_items"
                )


__all__ = ["NextItemTrainer", "next_item_optimizer"]
