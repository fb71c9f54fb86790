"""A Trainer of iLoRA that takes splits of histories as they are."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from hf_ilora.evaluation.candidate_ranking import rank_candidates
from hf_ilora.evaluation.rank_metrics import hit_at, ndcg_at, reciprocal_rank
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.ilora.candidate_order import PreferredOrder
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.catalogue import Catalogue

from .argument_checks import check_best_metric
from .candidate_rows import CandidateRows
from .curriculum import CurriculumCallback
from .expert_usage_callback import ExpertUsageCallback
from .ilora_arguments import ILoraTrainingArguments
from .prompt_collator import PromptCollator, check_candidate_fraction, left_padded
from .prompt_lengths import check_prompt_lengths
from .recommender_trainer import CompletedBatches, RecommenderTrainer
from .sorted_steps import SortedSteps
from .windows import EpochCallback, rows_are_prefixes

LORA_NAMES = (".lora_A", ".lora_B")
# Users whose gates the log averages, to show how the router uses its experts.
USERS_OF_USAGE = 1000


class ILoraTrainer(RecommenderTrainer):
    """Trains the adapter, router, projector and item head of an iLoRA model.

    Prompts, candidates, the curriculum, the optimizer's parameter groups and a log of how the experts are used follow
    from the arguments. `evaluate` reports `eval_loss` and, outside of training, how the targets rank: `eval_ndcg@10`,
    `eval_hit_ratio@10` and `eval_mrr` over the whole catalogue for a model with an item head, and
    `eval_candidates_hit_ratio@1` among the rows' candidates for one that is trained on titles. Everything else is as in
    `transformers.Trainer`.

    Args:
        model: built with `ILoraForRecommendation.from_base` or `from_pretrained`; or pass `model_init`.
        args: `ILoraTrainingArguments`.
        data_collator: None makes prompts by the model's templates.
        train_dataset: `datasets.Dataset` with `history` (item ids, oldest first) and `target`, such as
            `sequences["train"]`; or a torch data set of rows as `CandidateRows` gives them.
        eval_dataset: likewise, such as `sequences["validation"]`, whose `candidates` are shown.
        processing_class: the model's catalogue, or None: the model saves catalogue and tokenizer itself.
        kwargs: as in `Trainer`.

    Raises:
        TypeError: for a model, arguments or a catalogue of another kind.
        ValueError: for an item head that no loss trains, a `candidate_fraction` without templates for it, and data that
            do not fit the model.
    """

    arguments_class = ILoraTrainingArguments

    def __init__(
        self,
        model: ILoraForRecommendation | None = None,
        args: ILoraTrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: datasets.Dataset | TorchDataset | None = None,
        eval_dataset: datasets.Dataset | TorchDataset | dict | None = None,
        processing_class: Catalogue | None = None,
        **kwargs: Any,
    ):
        args = self.checked_arguments(args)
        if model is not None:
            _check_model(model)
        if kwargs.get("compute_metrics") is None:
            check_best_metric(args, ("loss",), eval_dataset)  # the ranking metrics are computed after training
        super().__init__(
            model, args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs
        )
        self._freeze_lora(self.model)
        config = self.model.config
        is_catalogue = isinstance(processing_class, Catalogue)
        if processing_class is not None and not (is_catalogue and processing_class.has_items_of(self.model.catalogue)):
            raise TypeError(
                f"processing_class is a {type(processing_class).__name__} other than the model's catalogue: expected "
                "None, since the model saves its catalogue and tokenizer"
            )
        self.candidate_fraction = checked_candidate_fraction(config, args.candidate_fraction)
        # As in answers, the recommender reads more of a history than the prompt shows.
        self._longest_history = max(config.max_history, self.model.recommender.config.max_length)
        if data_collator is None:
            order = PreferredOrder(self.model.recommender) if config.candidate_order == "recommender" else None
            self.data_collator = PromptCollator(
                self.model.prompts, self.candidate_fraction, order, config.candidate_loss_weight > 0
            )
        self._rows_of_evaluation: dict[tuple[int, bool], tuple[datasets.Dataset, CandidateRows]] = {}
        self.train_dataset = self._training_rows(train_dataset)
        if isinstance(self.train_dataset, CandidateRows):
            self.add_callback(EpochCallback(self.train_dataset))
        self._check_prompt_lengths(eval_dataset)
        if args.curriculum_steps:
            self.add_callback(CurriculumCallback(args.curriculum_steps))
        if config.num_experts > 1 and isinstance(eval_dataset, datasets.Dataset):
            rows = self._evaluation_rows(eval_dataset)
            histories = left_padded([rows[row]["history"] for row in range(min(len(eval_dataset), USERS_OF_USAGE))])
            self.add_callback(ExpertUsageCallback(self, torch.from_numpy(histories)))

    def evaluate(
        self,
        eval_dataset: datasets.Dataset | TorchDataset | dict | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; outside of training, with `eval_ranking`, the targets are ranked too.

        Args:
            eval_dataset: rows as in the constructor; None takes those given there.
            ignore_keys, metric_key_prefix: as in `Trainer.evaluate`.

        Returns:
            Metrics by name.
        """
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            rows = self.eval_dataset[rows]
        if self.args.eval_ranking and not self.is_in_train and isinstance(rows, datasets.Dataset):
            ranking = {f"{metric_key_prefix}_{name}": value for name, value in self._ranks(rows)[1].items()}
            self.log(dict(ranking))
            metrics |= ranking
        return metrics

    def predict(
        self, test_dataset: datasets.Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Rank the target of every row.

        Args:
            test_dataset: rows with `history`, `target` and `candidates`, such as `sequences["test"]`.
            ignore_keys: not read.
            metric_key_prefix: prefix of the names of the metrics.

        Returns:
            predictions: by an item head (rows, 2) int64, the rank of each row's target in the whole catalogue without
                the items of its history, and with them; otherwise (rows,), its rank among the row's candidates. 1 is
                the best.
            label_ids: (rows,) the targets.
            metrics: the ranking metrics of `evaluate`.
        """
        ranks, metrics = self._ranks(test_dataset)
        if ranks is None:
            raise ValueError(
                "test_dataset has no column candidates, among which a model without an item head ranks: expected data "
                "prepared with num_candidates of 2 or more, or a model with an item head"
            )
        targets = np.asarray(test_dataset["target"])
        return PredictionOutput(
            ranks, targets, {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        )

    def _ranks(self, rows: datasets.Dataset) -> tuple[np.ndarray | None, dict[str, float]]:
        """Ranks of the targets as `predict` returns them, None where there is nothing to rank, and their metrics."""
        model, config = self.model, self.model.config
        batch_size = self.args.per_device_eval_batch_size
        metrics, ranks = {}, None
        is_of_titles = bool(config.language_loss_weight or config.candidate_loss_weight)
        if is_of_titles and "candidates" in rows.column_names:
            ranks = rank_candidates(model, rows, batch_size=batch_size)
            metrics["candidates_hit_ratio@1"] = float((ranks == 1).mean())
        if config.item_head != "none":
            of_catalogue = rank_split(self.model_wrapped, rows, batch_size=batch_size, scorer=model.item_scores)
            ranks = np.stack([of_catalogue.masked, of_catalogue.unmasked], axis=1)
            for column, prefix in enumerate(("", "unmasked_")):
                values = torch.from_numpy(ranks[:, column])
                metrics[f"{prefix}ndcg@10"] = float(ndcg_at(values, 10).mean())
                metrics[f"{prefix}hit_ratio@10"] = float(hit_at(values, 10).mean())
                metrics[f"{prefix}mrr"] = float(reciprocal_rank(values).mean())
        return ranks, metrics

    def get_eval_dataloader(self, eval_dataset: datasets.Dataset | TorchDataset | str | None = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, datasets.Dataset):
            rows = ConcatDataset(self._evaluation_prompts(rows))
        return super().get_eval_dataloader(rows)

    def _get_train_sampler(self, train_dataset: TorchDataset | None = None) -> Sampler | None:
        """As in `Trainer`; the prompts of an optimizer step of several batches are sorted by length."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        args, collator = self.args, self.data_collator
        if isinstance(collator, CompletedBatches):
            collator = collator.collator
        sorts = args.gradient_accumulation_steps > 1 and args.train_sampling_strategy == "random"
        if not (sorts and isinstance(rows, CandidateRows) and isinstance(collator, PromptCollator)):
            return super()._get_train_sampler(train_dataset)
        rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        return SortedSteps(rows, collator, rows_per_step, seed)

    def batch_completion(self) -> Callable[[dict], dict]:
        return _with_candidates_on_cpu

    def optimizer_of(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
        return ilora_optimizer(model, self.args)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        _check_model(model)
        self._freeze_lora(model)
        return model

    def _freeze_lora(self, model: ILoraForRecommendation) -> None:
        """Without a learning rate the LoRA needs no gradients, which would cost as much time as if it learnt."""
        if self.args.lora_learning_rate_factor:
            return
        for name, parameter in model.named_parameters():
            if name.endswith(LORA_NAMES):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "lora_learning_rate_factor is 0 for a model that has nothing but a LoRA to train: expected an item "
                "head with an item_loss_weight, or a factor above 0"
            )

    def _check_prompt_lengths(self, eval_dataset: object) -> None:
        """Raise a ValueError for a prompt of training or of its evaluations that is longer than the context."""
        if not isinstance(self.data_collator, PromptCollator):
            return
        catalogue = self.model.catalogue
        if isinstance(self.train_dataset, CandidateRows):
            epochs = range(self._num_epochs(self.train_dataset))
            check_prompt_lengths(self.data_collator, self.train_dataset, epochs, catalogue, "train_dataset")
        if isinstance(eval_dataset, datasets.Dataset) and self.args.eval_strategy != "no":
            for rows in self._evaluation_prompts(eval_dataset):
                check_prompt_lengths(self.data_collator, rows, range(1), catalogue, "eval_dataset")

    def _num_epochs(self, rows: CandidateRows) -> int:
        """The number of epochs that training begins, early stopping aside."""
        if self.args.max_steps < 1:
            return math.ceil(self.args.num_train_epochs)
        rows_per_step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return math.ceil(self.args.max_steps / max(1, len(rows) // rows_per_step))

    def _training_rows(self, rows: datasets.Dataset | TorchDataset | None) -> TorchDataset | None:
        if not isinstance(rows, datasets.Dataset):
            return rows
        target_items = self.args.target_items or ("last" if rows_are_prefixes(rows) else "random")
        return CandidateRows(
            rows,
            self.model.config.num_items,
            self._longest_history,
            self.args.num_candidates,
            seed=self.args.seed,
            target_items=target_items,
        )

    def _evaluation_rows(self, rows: datasets.Dataset, shows_candidates: bool = True) -> CandidateRows:
        """Every row with the first of the templates that show candidates, or of those that do not; made once, since a
        training run evaluates the same rows many times."""
        key = id(rows), shows_candidates
        if key not in self._rows_of_evaluation:
            made = CandidateRows(
                rows,
                self.model.config.num_items,
                self._longest_history,
                self.args.num_candidates,
                seed=self.args.seed,
                uniforms=(0.0, 0.0 if shows_candidates else 1.0),
            )
            self._rows_of_evaluation[key] = rows, made  # the rows are kept, so that their id stays theirs
        return self._rows_of_evaluation[key][1]

    def _evaluation_prompts(self, rows: datasets.Dataset) -> list[CandidateRows]:
        """The rows as prompts of the kinds that training shows: with candidates, then without."""
        kinds = [True] * (self.candidate_fraction > 0) + [False] * (self.candidate_fraction < 1)
        return [self._evaluation_rows(rows, shows_candidates) for shows_candidates in kinds]


def _with_candidates_on_cpu(batch: dict) -> dict:
    """A batch with a copy of its candidates that does not move to the device: the CPU lays out their titles."""
    if "candidates" not in batch:
        return batch
    return batch | {"candidates_on_cpu": batch["candidates"].numpy()}


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, ILoraForRecommendation):
        raise TypeError(
            f"model is a {type(model).__name__}: expected an ILoraForRecommendation, built with from_base(llm, "
            "recommender, tokenizer, catalogue, config)"
        )


def checked_candidate_fraction(config: ILoraConfig, candidate_fraction: float | None) -> float:
    """The fraction of prompts that show candidates, by default the one that serves the losses of the configuration.

    Raises:
        ValueError: for an item head that no loss trains, and a fraction without templates for it.
    """
    if config.item_head != "none" and not config.item_loss_weight:
        raise ValueError(
            f"item_head is {config.item_head!r} and item_loss_weight 0: expected a weight above 0, since no other loss "
            "trains the item head, or item_head='none'"
        )
    if candidate_fraction is None:
        on_titles = config.language_loss_weight or config.candidate_loss_weight
        candidate_fraction = (0.5 if on_titles else 0.0) if config.item_loss_weight else 1.0
    with_candidates = sum("{candidates}" in template for template in config.prompt_templates)
    check_candidate_fraction(candidate_fraction, with_candidates, len(config.prompt_templates) - with_candidates)
    return candidate_fraction


def ilora_optimizer(
    model: nn.Module, arguments: ILoraTrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
    """The optimizer that `arguments` name, as `Trainer(optimizer_cls_and_kwargs=...)` takes it, in three groups.

    The router learns more slowly, and the LoRA does not decay. DeepSpeed would silently drop a finished optimizer,
    `Trainer(optimizers=...)`.

    Source: the published settings of iLoRA (weight decay on projector and router, 0.3 x the learning rate for the
    router).
    """
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    lora: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    router: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = router if "router." in name else lora if name.endswith(LORA_NAMES) else others
        part.append(parameter)
    groups = [
        {"params": lora, "weight_decay": 0.0, "lr": settings["lr"] * arguments.lora_learning_rate_factor},
        {"params": others, "weight_decay": arguments.weight_decay},
        {
            "params": router,
            "weight_decay": arguments.weight_decay,
            "lr": settings["lr"] * arguments.router_learning_rate_factor,
        },
    ]
    return optimizer_class, {"params": [group for group in groups if group["params"]], **settings}


__all__ = ["ILoraTrainer", "checked_candidate_fraction", "ilora_optimizer"]
