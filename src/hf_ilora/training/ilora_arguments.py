"""Arguments of iLoRA's training."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_ilora.devices import uses_accelerator, uses_cuda

from .argument_checks import check_run_arguments
from .candidate_rows import TARGET_ITEMS


@dataclass
class ILoraTrainingArguments(TrainingArguments):
    r"""Training of iLoRA: `transformers.TrainingArguments` with the settings below and defaults to match.

    > Parameters that control the prompts

    Args:
        num_candidates: candidates that are drawn for a training prompt, the target included.
        candidate_fraction: fraction of the prompts that show candidates. By default 1 for the losses on titles, 0 for
            the item loss, and 0.5 for both, since prompts with candidates do not train the item head.
        target_items: the item of a history that a prompt asks for: "last", or "random" (another one each epoch, with
            the items before it as history). By default "last" for rows that are prefixes of each other, else "random".
        curriculum_steps: optimizer steps over which more and more prompts carry item embeddings; 0 begins with all.

    > Parameters that control the optimizer and the end of training

    Args:
        lora_learning_rate_factor: learning rate of the LoRA, as a multiple of `learning_rate`; 0 freezes it. A fresh
            LoRA that is frozen leaves the language model as it is. With one expert and without item placeholders,
            nothing but the item head is then trained, and no gradient passes through the language model.
        router_learning_rate_factor: learning rate of the router, as a multiple of `learning_rate`.
        early_stopping_patience: number of evaluations without a smaller validation loss after which training stops; 0
            never stops early.
        eval_ranking: let `evaluate` rank the targets too, outside of training; otherwise it reports the loss alone.

    Raises:
        ValueError: for settings out of range or that contradict each other.

    Source: the defaults of the optimizer are those of iLoRA's program.
    """

    output_dir: str | None = field(
        default=None, metadata={"help": "folder for the model, its checkpoints, run.json and run.log"}
    )
    num_candidates: int = field(
        default=20, metadata={"help": "candidates drawn for a training prompt, the target included"}
    )
    candidate_fraction: float | None = field(
        default=None,
        metadata={
            "help": "fraction of the prompts that show candidates; by default 1 for the losses on titles, 0 for the "
            "item loss, and 0.5 for both, since prompts with candidates do not train the item head"
        },
    )
    target_items: str | None = field(
        default=None,
        metadata={
            "help": "item of a history that a prompt asks for: last, or random (another one each epoch); by default "
            "last for rows that are prefixes of each other, else random"
        },
    )
    curriculum_steps: int = field(
        default=0,
        metadata={"help": "steps over which more and more prompts carry item embeddings; 0 begins with all"},
    )
    lora_learning_rate_factor: float = field(
        default=1.0,
        metadata={
            "help": "learning rate of the LoRA, as a multiple of learning_rate; 0 leaves the language model as it is"
        },
    )
    router_learning_rate_factor: float = field(
        default=0.3, metadata={"help": "learning rate of the router, as a multiple of learning_rate"}
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "evaluations without a smaller validation loss before training stops; 0: never"}
    )
    eval_ranking: bool = field(
        default=True, metadata={"help": "let the evaluation after training rank the targets too, not the loss alone"}
    )

    learning_rate: float = field(default=8.0e-4, metadata={"help": "learning rate"})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "schedule of the learning rate"})
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.01}, metadata={"help": "settings of that schedule, as JSON"}
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "steps of warm-up; below 1: as a fraction of all steps"}
    )
    weight_decay: float = field(default=1.0e-5, metadata={"help": "weight decay of all that is trained but the LoRA"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "prompts per step and device"})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "prompts per evaluation step and device"})
    gradient_accumulation_steps: int = field(default=16, metadata={"help": "batches per optimizer step"})
    num_train_epochs: float = field(default=5.0, metadata={"help": "epochs; early stopping may end training sooner"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when to evaluate: no, steps or epoch"})
    save_strategy: str = field(default="epoch", metadata={"help": "when to write a checkpoint: no, steps or epoch"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep"})
    logging_steps: float = field(default=10, metadata={"help": "optimizer steps between two lines of the log"})
    # It would wait for the device in every step; training stops at such a loss anyway.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "leave losses that are not finite out of the log; training stops at them"}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "end with the checkpoint that has the best metric_for_best_model"}
    )
    metric_for_best_model: str | None = field(
        default="eval_loss", metadata={"help": "validation metric that chooses the best checkpoint"}
    )
    greater_is_better: bool | None = field(default=False, metadata={"help": "whether a larger metric is better"})
    bf16: bool = field(
        default_factory=uses_cuda,
        metadata={"help": "mixed precision in bfloat16; by default on CUDA devices"},
    )
    dataloader_pin_memory: bool = field(
        default_factory=uses_accelerator,
        metadata={"help": "pin memory for transfers to an accelerator; by default where there is one"},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "drop columns that the model does not read"})
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "batch keys that are labels"}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "evaluate the loss, without keeping logits"})
    # Everything that is trained takes part in every loss.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "let DistributedDataParallel look for parameters without a gradient"}
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "a resumed run has the patience that was left"}
    )

    def __post_init__(self) -> None:
        check_run_arguments(self, "its new candidates")
        if self.candidate_fraction is not None and not 0 <= self.candidate_fraction <= 1:
            raise ValueError(f"candidate_fraction is {self.candidate_fraction}: expected a fraction in [0, 1]")
        if self.target_items not in (None, *TARGET_ITEMS):
            raise ValueError(f"target_items is {self.target_items!r}: expected one of {', '.join(TARGET_ITEMS)}")
        lowest_values = {"num_candidates": 2, "curriculum_steps": 0}
        lowest_values |= {"lora_learning_rate_factor": 0, "router_learning_rate_factor": 0}
        for name, lowest in lowest_values.items():
            if not lowest <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least {lowest}, and finite")
        super().__post_init__()


__all__ = ["ILoraTrainingArguments"]
