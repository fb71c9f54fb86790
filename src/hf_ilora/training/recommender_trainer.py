"""The base class of the trainers: their checks, their batches, their model card and their pushes to the Hub."""

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import recursively_apply
from huggingface_hub import CommitInfo, HfApi, ModelCard
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from hf_ilora.files import write_errors_named
from hf_ilora.models.next_item.card import is_untouched, measured_weights, model_card, newest_card, with_metadata
from hf_ilora.models.next_item.hub_upload import (
    CARD_FILE,
    EVALUATE_AGAIN,
    RUN_FILE,
    UploadOfSaved,
    checked_tags,
    upload,
)
from hf_ilora.models.next_item.saved_model import weights_fingerprint
from hf_ilora_cli.shown_text import in_markdown, shareable_json

from .argument_checks import check_optimizer
from .even_batches import RowsWithFiller, WithoutFillers, fill_last_step, take_row_counts, without_fillers_labels
from .finite_losses import FiniteLosses, check_weights
from .trainer_card import Evaluation, card_sections, evaluations_in_training, measured_metadata, metrics_of

logger = logging.getLogger(__name__)

# Files of a checkpoint that only resuming reads.
_RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", TRAINER_STATE_NAME, TRAINING_ARGS_NAME, "latest")

_SECONDS_OF_A_SET_CLOCK = 1.0


class RecommenderTrainer(Trainer):
    """A `Trainer` that checks its settings before the first step, stops early or at a loss that is not finite, and
    publishes our model card.

    The model writes everything that it needs to be loaded again (catalogue, tokenizer, code), and pushes send it. No
    pickled `training_args.bin` is written beside the model.

    Args:
        model, args, kwargs: as in `Trainer`; `args` is of the class that `arguments_class` names.

    Raises:
        TypeError: for arguments of another class.
        ValueError: when evaluations are asked for without a data set for them, when one process sees several GPUs, and
            for settings that the optimizer or the schedule refuses.
    """

    arguments_class: type[TrainingArguments]
    data_collator: Callable[[list], dict]

    def __init__(self, model: nn.Module | None, args: TrainingArguments | None, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"this process sees {args.n_gpu} GPUs: expected one per process; start with `accelerate launch`, or "
                "set CUDA_VISIBLE_DEVICES to one"
            )
        if args.eval_strategy != "no" and kwargs.get("eval_dataset") is None:
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value!r} without an eval_dataset: pass "
                'eval_dataset=sequences["validation"], or eval_strategy="no" with early_stopping_patience=0 and '
                "load_best_model_at_end=False"
            )
        self._hub = HfApi()  # sends one push after the other
        self._begun: dict[str, float] = {}  # when training and the evaluation of each prefix began, monotonic
        # By prefix, of the present model: the evaluations since the training, for the model card.
        self._evaluations: dict[str, Evaluation] = {}
        self._train_rows_of_card = kwargs.get("train_dataset")
        super().__init__(model, args, **kwargs)
        if self.optimizer is None:
            check_optimizer(args, self.model)
        self._losses, self._checked_step, self._is_predicting = FiniteLosses(self.accelerator), -1, False
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    @classmethod
    def checked_arguments(cls, args: TrainingArguments | None) -> TrainingArguments:
        """`args`, or defaults for None.

        Raises:
            TypeError: for arguments of another class.
        """
        if args is None:
            return cls.arguments_class(output_dir="tmp_trainer")
        if not isinstance(args, cls.arguments_class):
            raise TypeError(
                f"args is a {type(args).__name__}: expected {cls.arguments_class.__name__}(output_dir, ...), which has "
                f"every setting of TrainingArguments and those of {cls.__name__}"
            )
        return args

    def optimizer_of(self, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
        """The optimizer that the arguments name, with the parameter groups of the model, as
        `Trainer(optimizer_cls_and_kwargs=...)` takes it: under DeepSpeed a finished optimizer would be dropped."""
        raise NotImplementedError

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with the parameter groups of `optimizer_of`; an optimizer that was passed is kept."""
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        self.optimizer_cls_and_kwargs = self.optimizer_of(self.model if model is None else model)
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None  # the next model, of a search, has parameters of its own

    def batch_completion(self) -> Callable[[dict], dict]:
        """Return a function that adds values to training batches on the CPU, so that no step waits for the device."""
        raise NotImplementedError

    def get_train_dataloader(self):
        """As in `Trainer`; batches are completed, unless the main process cuts them up for the others."""
        collator = self.data_collator
        if not (isinstance(self.train_dataset, IterableDataset) or self.args.accelerator_config.dispatch_batches):
            self.data_collator = CompletedBatches(collator, self.batch_completion())
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn, *args, **kwargs):
        """As in `Trainer`, but several processes repeat no row in the last step."""
        is_dispatched = isinstance(dataset, IterableDataset) or self.args.accelerator_config.dispatch_batches
        if self.args.world_size == 1 or is_dispatched:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **kwargs)
        sampler, collator = sampler_fn(dataset), self.data_collator
        self.data_collator = WithoutFillers(collator)
        try:
            rows = RowsWithFiller(dataset)
            dataloader = super()._get_dataloader(rows, description, batch_size, lambda _: sampler, *args, **kwargs)
        finally:
            self.data_collator = collator
        fill_last_step(dataloader)
        return dataloader

    def train(self, *args, **kwargs):
        """As in `Trainer`.

        Raises:
            ValueError: at the first loss that is not finite, before anything of that step is logged or saved.
        """
        self._losses, self._checked_step = FiniteLosses(self.accelerator), -1
        self._evaluations = {}
        self._begun["train"] = time.monotonic()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        real_rows, _ = take_row_counts(inputs) or (1, 1)
        if not real_rows:
            num_items_in_batch = math.inf  # by which the loss is divided: neither loss nor gradient is left
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.add(loss)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict, *args, **kwargs):
        """As in `Trainer`, which gathers the same number of rows from each process, and drops those past the last."""
        counts, self._is_predicting = take_row_counts(inputs), True
        try:
            loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            self._is_predicting = False
        if counts is not None:
            logits, labels = (recursively_apply(_with_rows, of_rows, counts[1]) for of_rows in (logits, labels))
        return loss, logits, labels

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | int | None:
        if self._is_predicting:  # the Trainer averages over rows, of which processes have different numbers
            return None
        return super()._get_num_items_in_batch([without_fillers_labels(batch) for batch in batch_samples], device)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        """As in `Trainer`; without clipping, no pass over all gradients measures a norm that nothing needs."""
        if grad_norm is None and not self.is_deepspeed_enabled:
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _maybe_log_save_evaluate(self, *args, learning_rate: float | None = None, **kwargs) -> None:
        """The Trainer calls this after every optimizer step, and once more at the end of an epoch."""
        control, step = self.control, self.state.global_step
        ends_epoch, self._checked_step = step == self._checked_step, step
        if learning_rate is not None:  # None in an epoch without a step
            wait = ends_epoch or control.should_log or control.should_evaluate or control.should_save
            self._losses.end_step(step, learning_rate, wait)
            if ends_epoch or control.should_save:
                check_weights(self.model, step, learning_rate, self.accelerator)
        super()._maybe_log_save_evaluate(*args, learning_rate=learning_rate, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"):
        self._begun[metric_key_prefix] = time.monotonic()
        if not self.is_in_train:
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
            if not isinstance(rows, dict):  # whose data sets come here one by one
                self._evaluations[metric_key_prefix] = Evaluation(rows)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, whose durations go by the time of day: they are corrected if that clock was set meanwhile.

        Args:
            logs, start_time: as in `Trainer`.
        """
        for prefix, begun in self._begun.items():
            runtime, seconds = logs.get(f"{prefix}_runtime"), round(time.monotonic() - begun, 4)
            if runtime is None or abs(runtime - seconds) < _SECONDS_OF_A_SET_CLOCK:
                continue
            for name in logs:
                if name.startswith(f"{prefix}_") and name.endswith("_per_second"):
                    logs[name] = round(logs[name] * runtime / seconds, 3)
            logs[f"{prefix}_runtime"] = seconds
        for prefix in sorted(self._evaluations, key=len, reverse=True):  # "eval_films" before "eval"
            found = metrics_of(logs, prefix)
            if found:
                self._evaluations[prefix].metrics |= found
                break
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into `output_dir`: the card of `hf_ilora.publishing`, with what the trainer has measured.

        A README.md that was written or edited by hand keeps its text, and gets the given metadata. So does a card of
        `write_card` whose results are of the weights in `output_dir`.

        Args:
            language, license, tags, model_name: metadata of the card.
            dataset_tags: names of the data sets on the Hub.
            dataset: name of the data on the card, such as "MovieLens-100K".
            dataset_args: protocol that split the data, such as "leave_one_out".
            finetuned_from, tasks: as in `Trainer`, for its callers; not used.
        """
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir) / CARD_FILE
        metadata = {"language": language, "license": license, "datasets": _listed(dataset_tags) or None, "tags": tags}
        weights = weights_fingerprint(path.parent)
        if path.is_file() and measured_weights(path.read_text(encoding="utf-8")) not in (None, weights):
            logger.warning("%s has the results of other weights, and is replaced: %s", path, EVALUATE_AGAIN)
        card = self._card(weights, metadata, model_name, _listed(dataset), _listed(dataset_args))
        path.write_text(card, encoding="utf-8")

    def _card(
        self,
        weights: str | None,
        metadata: dict[str, object] | None = None,
        model_name: str | None = None,
        names: Sequence[str] = (),
        protocols: Sequence[str] = (),
    ) -> str:
        """The card of `create_model_card`, for a model with these weights."""
        path = Path(self.args.output_dir) / CARD_FILE
        model = self.accelerator.unwrap_model(self.model)
        model.config.architectures = [type(model).__name__]  # as saving does
        metadata = dict(metadata or {})
        tags = [*(model.model_tags or []), *checked_tags(metadata.pop("tags", None))]
        if path.is_file():
            existing = path.read_text(encoding="utf-8")
            if not is_untouched(existing) or measured_weights(existing) == weights is not None:
                return with_metadata(existing, tags=tags, model_name=model_name, **metadata)
            of_existing = ModelCard(existing).data
            tags = [*(of_existing.tags or []), *tags]
            kept = {name: of_existing.get(name) for name in ("language", "license", "datasets")}
            metadata = kept | {name: value for name, value in metadata.items() if value is not None}
        repo_id = self.hub_model_id or model_name or Path(self.args.output_dir).resolve().name
        dataset_ids = _listed(metadata.get("datasets"))
        dataset_name = ", ".join(names or dataset_ids) or None
        evaluations = self._evaluations_of_model()
        title = model_name or repo_id.rpartition("/")[2]
        card = model_card(
            model.config,
            model.catalogue,
            repo_id,
            self.args.hub_revision,
            title=in_markdown(title),
            dataset_name=dataset_name and in_markdown(dataset_name),
            metadata=metadata | {"tags": tags} | measured_metadata(evaluations, title, dataset_name, dataset_ids),
            licence=metadata.get("license") and f"Weights: {in_markdown(metadata['license'])}.",
            **card_sections(
                self.args,
                self.state,
                evaluations,
                self._train_rows_of_card,
                model.config.num_items,
                dataset_name,
                ", ".join(protocols) or None,
            ),
        )
        return str(card)

    def _evaluations_of_model(self) -> list[Evaluation]:
        """The evaluations of the present model: those since training, or else those during it."""
        found = [evaluation for evaluation in self._evaluations.values() if evaluation.metrics]
        of_best = self.args.load_best_model_at_end and not self.is_in_train
        return found or evaluations_in_training(
            self.state, self.eval_dataset, of_best and self.state.best_global_step is not None
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | None:
        """Save the model, write its card, and send both to the Hub in one commit.

        Args:
            commit_message: of the commit.
            blocking: False is not supported: the commit is checked before this returns.
            token: None takes `hub_token`, then HF_TOKEN or that of `hf auth login`.
            revision: branch; None takes `hub_revision`.
            private: make a new repository private; None takes `hub_private_repo`.
            kwargs: of `create_model_card`.

        Returns:
            The commit, in the main process.

        Raises:
            ValueError: for `blocking=False`, and as `PreTrainedModel.push_to_hub` of the model.
        """
        if not blocking:
            raise ValueError(
                "blocking is False: expected True; `hub_strategy` pushes in the background during training"
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        upload = None
        if self.is_world_process_zero():
            settings = {"repo_id": self.hub_model_id, "token": token, "commit_message": commit_message}
            settings["revision"] = revision or self.args.hub_revision
            upload = UploadOfSaved(self.args.output_dir, settings)
        self.save_model(_internal_call=True)
        if upload is None:
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        run = Path(self.args.output_dir) / RUN_FILE
        further_files = {RUN_FILE: shareable_json(run)} if run.is_file() else {}
        return upload.send(self.accelerator.unwrap_model(self.model), further_files)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Send the model of a checkpoint in the background; with a hub_strategy of checkpoints, these too."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        # A copy, since a later checkpoint may replace this one before it is sent.
        folder = Path(tempfile.mkdtemp())
        for path in checkpoint.iterdir():
            if path.is_file() and path.name not in _RESUME_FILES and not path.name.startswith("rng_state"):
                shutil.copy(path, folder)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            shutil.copytree(checkpoint, folder / name)
            state = folder / name / TRAINER_STATE_NAME
            state.write_bytes(shareable_json(state))
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        settings = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        settings["commit_message"] = f"Training in progress, {progress}"
        weights = weights_fingerprint(folder)
        card = self._card(weights)
        settings["card"] = lambda _, existing: newest_card(card, existing, weights)
        jobs = [self._hub.run_as_future(_upload_and_remove, folder, self.hub_model_id, **settings)]
        if pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self.hub_model_id is not None and self.push_in_progress is not None:
            for job in self.push_in_progress.jobs:
                if job.exception() is not None:  # what was trained is worth more than a push
                    logger.error("a push during training failed: %s", job.exception())

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with write_errors_named(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            # By their steps: the Trainer goes by their times, and deletes the newest where the clock was set back.
            rotate_checkpoints(self._get_output_dir(trial), limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink()


class CompletedBatches:
    """A collator whose batches a function completes, in worker processes too.

    Args:
        collator: makes a batch of rows.
        complete: adds to the batch.
    """

    def __init__(self, collator: Callable[[list], dict], complete: Callable[[dict], dict]):
        self.collator, self.complete = collator, complete

    def __call__(self, rows: list) -> dict:
        return self.complete(self.collator(rows))


def _with_rows(of_rows: torch.Tensor, count: int) -> torch.Tensor:
    """(rows, ...) -> (count, ...): repeats the last row."""
    return of_rows[torch.arange(count, device=of_rows.device).clamp(max=len(of_rows) - 1)]


def _listed(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _upload_and_remove(folder: Path, repo_id: str, **settings) -> CommitInfo:
    try:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return upload(files, repo_id, **settings)
    finally:
        shutil.rmtree(folder)


__all__ = ["RecommenderTrainer"]
