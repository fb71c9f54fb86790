"""Checks of training arguments, made before anything is loaded, drawn or written."""

import math
import os
from collections.abc import Collection

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import launched_on_cpu

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_AT_LEAST_ZERO = (
    "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "dataloader_num_workers",
    "early_stopping_patience",
)  # fmt: skip
# Settings of `Trainer.get_optimizer_cls_and_kwargs` that only optimizers built around a whole model have.
_OF_WHOLE_MODELS = {"params", "model", "optimizer_dict"}


def check_run_arguments(arguments: TrainingArguments, per_epoch: str) -> None:
    """Raise a ValueError for settings with which no trainer of this package can work.

    Args:
        arguments: before `TrainingArguments.__post_init__`; they have `early_stopping_patience`. `use_cpu`, `bf16` and
            `fp16` are set to true where the launch demands it, so that run.json records the settings in use.
        per_epoch: the part of the training data that changes each epoch, for the message.
    """
    arguments.use_cpu = arguments.use_cpu or launched_on_cpu()
    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched_precision in ("bf16", "fp16") and not (arguments.bf16 or arguments.fp16):
        setattr(arguments, launched_precision, True)
    if arguments.output_dir is None:
        raise ValueError("output_dir is missing: expected the folder for the model; pass output_dir")
    if arguments.dataloader_persistent_workers:
        raise ValueError(
            "dataloader_persistent_workers is true: expected false, since workers that outlive an epoch never see "
            f"{per_epoch}"
        )
    if arguments.eval_strategy == "no" and (arguments.early_stopping_patience or arguments.load_best_model_at_end):
        raise ValueError(
            "eval_strategy is 'no', but early_stopping_patience and load_best_model_at_end need evaluations: pass "
            "early_stopping_patience=0 and load_best_model_at_end=False, or another eval_strategy"
        )
    for name in ("seed", "data_seed"):
        check_seed(name, getattr(arguments, name))
    for names, lowest in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
        for name in names:
            if not lowest <= getattr(arguments, name) < math.inf:
                raise ValueError(f"{name} is {getattr(arguments, name)}: expected at least {lowest}, and finite")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}: expected a number in [0, 1)")
    if arguments.max_steps != -1 and arguments.max_steps < 1:
        raise ValueError(f"max_steps is {arguments.max_steps}: expected at least 1, or -1 for num_train_epochs")
    if arguments.max_steps == -1 and not 0 < arguments.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs is {arguments.num_train_epochs}: expected a finite number above 0")
    for name in ("eval", "save", "logging"):
        strategy, steps = getattr(arguments, f"{name}_strategy"), getattr(arguments, f"{name}_steps")
        if strategy == "steps" and steps is not None and not 0 < steps < math.inf:
            raise ValueError(f"{name}_steps is {steps} with {name}_strategy 'steps': expected a number above 0")
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {arguments.label_smoothing_factor}: expected 0, since the models compute "
            "their own loss"
        )


def check_best_metric(args: TrainingArguments, metrics: Collection[str], eval_dataset: object) -> None:
    """Raise a ValueError if no evaluation during training gives `metric_for_best_model`.

    Args:
        args: of the trainer.
        metrics: names of the metrics of an evaluation, without the prefix `eval_`.
        eval_dataset: a data set, or a dictionary of them, whose names then precede those of the metrics.
    """
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        return
    if isinstance(eval_dataset, dict):
        metrics = [f"{name}_{metric}" for name in eval_dataset for metric in metrics]
    if args.metric_for_best_model.removeprefix("eval_") not in metrics:
        raise ValueError(
            f"metric_for_best_model is {args.metric_for_best_model!r}: expected one of {', '.join(metrics)}"
        )


def check_optimizer(args: TrainingArguments, model: nn.Module) -> None:
    """Raise a ValueError for settings that the optimizer or its schedule refuses: both are built for one number."""
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not _OF_WHOLE_MODELS & settings.keys():
            optimizer = optimizer_class([nn.Parameter(torch.zeros(1, device=args.device))], **settings)
            get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, dict(args.lr_scheduler_kwargs or {}))
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"optim {args.optim.value!r} with optim_args {args.optim_args!r}, or lr_scheduler_type "
            f"{args.lr_scheduler_type.value!r} with lr_scheduler_kwargs {args.lr_scheduler_kwargs!r}, cannot be used: "
            f"{error}"
        ) from error


__all__ = ["check_best_metric", "check_optimizer", "check_run_arguments"]
