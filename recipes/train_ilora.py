"""Trains iLoRA on a prepared data set: a frozen language model whose LoRA experts are gated by a frozen SASRec.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_sasrec.py \
        recipes/configs/ml-100k/sasrec.yaml --output_dir outputs/ml-100k/sasrec
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_ilora.py \
        recipes/configs/ml-100k/ilora.yaml --recommender outputs/ml-100k/sasrec --output_dir outputs/ml-100k/ilora

The output folder becomes the model: adapter, frozen SASRec, configuration, tokenizer and catalogue, with run.json and
run.log beside them. `--num_experts 1` is plain LoRA. A killed run goes on from its last whole checkpoint when the same
command is given again. Quality is measured by recipes/evaluate_ilora.py.

Other files of accelerate_configs launch several processes. At an equal global batch they learn what one process learns,
except with the conv router, each of whose copies normalises over its own process's users. DeepSpeed's checkpoints for
going on hold the language model too, and ZeRO-2 with bf16 saves the adapter in bfloat16; ZeRO-3 keeps it in float32.
"""

import dataclasses
import logging
from dataclasses import dataclass, field

import torch
from torch.utils.data import ConcatDataset
from transformers import (
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_model_param_count

from hf_ilora import Catalogue, ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.data.row_fractions import check_fraction, rows_in_fraction
from hf_ilora.models.ilora.candidate_order import PreferredOrder
from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.ilora.modeling_ilora import check_recommender
from hf_ilora.models.ilora.prompts import read_templates
from hf_ilora.runs import (
    LogMetricsCallback,
    RunRecord,
    config_arguments,
    leave_launch,
    parse_arguments,
    resumable_checkpoint,
    set_up_logging,
)
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.curriculum import CurriculumCallback
from hf_ilora.training.expert_usage_callback import ExpertUsageCallback
from hf_ilora.training.prompt_collator import PromptCollator, check_candidate_fraction
from hf_ilora.training.windows import WindowEpochCallback

logger = logging.getLogger(__name__)

USERS_LOOKED_AT = 1000  # to see how the router uses its experts
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "8bit", "4bit")
ILoraModelArguments = config_arguments(
    ILoraConfig,
    exclude=(
        "recommender_config", "text_config", "llm_name_or_path", "llm_revision", "llm_gguf_file", "prompt_templates",
        "tie_word_embeddings",
    ),
)  # fmt: skip


@dataclass
class PartArguments:
    """The frozen parts, and what to train on."""

    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    recommender: str | None = field(
        default=None, metadata={"help": "folder or Hub name of the trained SASRec that gates the experts"}
    )
    untrained_recommender: bool = field(
        default=False, metadata={"help": "go without a trained SASRec: random gates, for tests of speed only"}
    )
    llm: str = field(default=EMBEDDED_LLM, metadata={"help": "folder or Hub name of the language model"})
    llm_revision: str | None = field(default=None, metadata={"help": "commit, branch or tag of the language model"})
    llm_gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in the language model's repository"})
    llm_dtype: str = field(default="float32", metadata={"help": "of the frozen weights: float32, bfloat16 or float16"})
    llm_quantization: str = field(
        default="none", metadata={"help": "of the frozen weights: none, 8bit or 4bit (needs bitsandbytes and a GPU)"}
    )
    llm_device_map: str | None = field(
        default=None, metadata={"help": "where its layers go, such as auto; by default all to the process's device"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager or flash_attention_2"})
    prompt_file: str | None = field(
        default=None, metadata={"help": "templates separated by lines of ---; by default one that fits any items"}
    )
    train_fraction: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={
            "help": "rows to learn from, from and to, as shares of the train split; best users whom the recommender "
            "has not seen, such as 0.8 1 after a recommender trained on 0 0.8"
        },
    )
    num_candidates: int = field(default=20, metadata={"help": "candidates in a training prompt, the target included"})
    candidate_fraction: float | None = field(
        default=None,
        metadata={
            "help": "share of the prompts that show candidates; by default 1 for the losses on titles, 0 for the item "
            "loss and 0.5 for both, since prompts with candidates do not train the item head"
        },
    )
    curriculum_steps: int = field(
        default=0,
        metadata={"help": "steps over which more and more prompts carry item embeddings; 0: all from the start"},
    )
    router_learning_rate_factor: float = field(
        default=0.3, metadata={"help": "learning rate of the router, as a share of the others'"}
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "evaluations without a smaller validation loss before training stops; 0: never"}
    )

    def __post_init__(self):
        if self.recommender is None and not self.untrained_recommender:
            raise ValueError(
                "recommender is missing: expected the folder or Hub name of a SASRec trained on this data "
                "(recipes/train_sasrec.py), or --untrained_recommender true for random gates"
            )
        if self.recommender is not None and self.untrained_recommender:
            raise ValueError("recommender and untrained_recommender are both given: expected one of them")
        for name, choices in (("llm_dtype", DTYPES), ("llm_quantization", QUANTIZATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        check_fraction(self.train_fraction)
        if self.candidate_fraction is not None and not 0 <= self.candidate_fraction <= 1:
            raise ValueError(f"candidate_fraction is {self.candidate_fraction}: expected a share in [0, 1]")
        if self.num_candidates < 2 or self.curriculum_steps < 0 or self.router_learning_rate_factor < 0:
            raise ValueError(
                f"num_candidates is {self.num_candidates}, curriculum_steps {self.curriculum_steps}, "
                f"router_learning_rate_factor {self.router_learning_rate_factor}: expected at least 2, 0 and 0"
            )


@dataclass
class ILoraTrainingArguments(TrainingArguments):
    """TrainingArguments with the defaults of iLoRA; everything can be set as usual."""

    learning_rate: float = 8.0e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr_rate": 0.01})
    warmup_steps: float = 0.05
    weight_decay: float = 1.0e-5
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 16
    num_train_epochs: float = 5.0
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int = 1
    logging_steps: float = 10
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = False
    bf16: bool = field(default_factory=torch.cuda.is_available)
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    remove_unused_columns: bool = False
    label_names: list[str] = field(default_factory=lambda: ["labels"])
    prediction_loss_only: bool = True
    ddp_find_unused_parameters: bool | None = False  # all that is trained takes part in every loss
    restore_callback_states_from_checkpoint: bool = True  # a resumed run has the patience that was left

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("output_dir is missing: expected a folder for the model, --output_dir or in the YAML")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers is true: expected false, since workers that outlive an epoch never see "
                "its new candidates"
            )
        super().__post_init__()


ARGUMENTS = (PartArguments, ILoraModelArguments, ILoraTrainingArguments)


def build_config(parts: PartArguments, model_arguments) -> tuple[ILoraConfig, float]:
    """The configuration, still without the source of the language model, and the share of prompts with candidates.

    Raises:
        ValueError: for an item head that no loss trains, and templates that lack what the share asks for.
    """
    settings = dataclasses.asdict(model_arguments)
    if parts.prompt_file is not None:
        settings["prompt_templates"] = read_templates(parts.prompt_file)
    config = ILoraConfig(**settings)
    if config.item_head != "none" and not config.item_loss_weight:
        raise ValueError(
            f"item_head is {config.item_head} and item_loss_weight 0: expected a weight above 0, since no other loss "
            "trains the item head, or --item_head none"
        )
    share = default_candidate_fraction(config) if parts.candidate_fraction is None else parts.candidate_fraction
    with_candidates = [template for template in config.prompt_templates if "{candidates}" in template]
    check_candidate_fraction(share, len(with_candidates), len(config.prompt_templates) - len(with_candidates))
    return config, share


def load_parts(parts: PartArguments, catalogue: Catalogue):
    """The language model, its tokenizer, where it came from, and the recommender."""
    quantization_config = None
    if parts.llm_quantization != "none":
        quantization_config = BitsAndBytesConfig(
            load_in_8bit=parts.llm_quantization == "8bit",
            load_in_4bit=parts.llm_quantization == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if parts.untrained_recommender:
        logger.warning("the recommender is untrained: its gates are noise")
        recommender = SASRecForNextItem(SASRecConfig(num_items=len(catalogue)))
    else:
        recommender = SASRecForNextItem.from_pretrained(parts.recommender)
    check_recommender(recommender, catalogue)  # before the language model, which may take minutes
    llm, tokenizer, source = load_language_model(
        parts.llm,
        revision=parts.llm_revision,
        gguf_file=parts.llm_gguf_file,
        dtype=parts.llm_dtype,
        device_map=parts.llm_device_map,
        quantization_config=quantization_config,
        attn_implementation=parts.attn_implementation,
    )
    return llm, tokenizer, source, recommender


def default_candidate_fraction(config: ILoraConfig) -> float:
    """The share of prompts with candidates that serves the losses of this configuration."""
    if not config.item_loss_weight:
        return 1.0
    return 0.5 if config.language_loss_weight or config.candidate_loss_weight else 0.0


def ilora_optimizer(
    model: ILoraForRecommendation, arguments: TrainingArguments, router_factor: float
) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
    """The optimizer that `arguments` name, as `Trainer(optimizer_cls_and_kwargs=...)` takes it, in three groups.

    The router learns more slowly, and the LoRA does not decay. A finished optimizer, `Trainer(optimizers=...)`, would
    be dropped under DeepSpeed without a word.

    Source: the published settings of iLoRA (weight decay on projector and router, 0.3 x the learning rate for the
    router).
    """
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    router = [parameter for parameter in model.router.parameters() if parameter.requires_grad]
    lora, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("router."):
            (lora if name.startswith("llm.") else others).append(parameter)
    groups = [
        {"params": lora, "weight_decay": 0.0},
        {"params": others, "weight_decay": arguments.weight_decay},
        {"params": router, "weight_decay": arguments.weight_decay, "lr": settings["lr"] * router_factor},
    ]
    return optimizer_class, {"params": [group for group in groups if group["params"]], **settings}


def main() -> None:
    parts, model_arguments, training_arguments = parse_arguments(ARGUMENTS)
    if parts.early_stopping_patience and training_arguments.eval_strategy == "no":
        raise ValueError("eval_strategy is no: expected evaluations to stop by, or --early_stopping_patience 0")
    config, share = build_config(parts, model_arguments)
    set_up_logging(training_arguments.output_dir)
    sequences = SequenceDatasets.load(parts.data_dir)
    catalogue = Catalogue(sequences.catalogue.with_format("arrow")[:])
    fingerprint = sequences.fingerprint
    arguments = (parts, model_arguments, training_arguments)
    checkpoint = resumable_checkpoint(training_arguments.output_dir, arguments, fingerprint)
    # Whatever does not fit together is found before the run is on record, and the folder stays free for the next try.
    set_seed(training_arguments.seed)
    llm, tokenizer, source, recommender = load_parts(parts, catalogue)
    config.llm_name_or_path, config.llm_revision, config.llm_gguf_file = dataclasses.astuple(source)
    set_seed(training_arguments.seed)  # the adapter starts alike whatever loading the parts drew
    model = ILoraForRecommendation.from_base(
        llm, recommender, tokenizer, catalogue, config, untrained_recommender=parts.untrained_recommender
    )
    # As in answers, the recommender reads more of a history than the prompt shows.
    longest = max(config.max_history, recommender.config.max_length)
    rows = CandidateRows(
        rows_in_fraction(sequences["train"], parts.train_fraction),
        sequences.num_items,
        longest,
        parts.num_candidates,
        seed=training_arguments.seed,
        targets="last" if sequences.protocol["name"] == "temporal_users" else "random",
    )
    kinds = [(0.0, 0.0)] * (share > 0) + [(0.0, 1.0)] * (share < 1)  # prompts with candidates, and without
    validation = [CandidateRows(sequences["validation"], sequences.num_items, longest, draws=draws) for draws in kinds]
    order = PreferredOrder(model.recommender) if config.candidate_order == "recommender" else None
    with RunRecord(training_arguments.output_dir, arguments, seed=training_arguments.seed) as record:
        record.add_data(fingerprint)
        trained, total = (get_model_param_count(model, trainable_only=trainable) for trainable in (True, False))
        logger.info("%s: %s parameters, of which %s are trained", source.name_or_path, f"{total:,}", f"{trained:,}")
        callbacks = [WindowEpochCallback(rows), LogMetricsCallback()]
        if parts.curriculum_steps:
            callbacks.append(CurriculumCallback(parts.curriculum_steps))
        if parts.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(parts.early_stopping_patience))
        trainer = Trainer(
            model,
            training_arguments,
            train_dataset=rows,
            eval_dataset=ConcatDataset(validation),
            data_collator=PromptCollator(model.prompts, share, order, config.candidate_loss_weight > 0),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=ilora_optimizer(model, training_arguments, parts.router_learning_rate_factor),
        )
        if config.num_experts > 1:
            looked_at = [validation[0][row] for row in range(min(len(validation[0]), USERS_LOOKED_AT))]
            trainer.add_callback(ExpertUsageCallback(trainer, trainer.data_collator(looked_at)["histories"]))
        trainer.remove_callback(PrinterCallback)  # LogMetricsCallback says the same, to the file too
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        with record.stage("evaluate_validation"):
            record.add_metrics("validation", trainer.evaluate())
    leave_launch()


if __name__ == "__main__":
    main()
