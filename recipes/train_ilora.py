"""Trains iLoRA on a prepared data set: a frozen language model whose LoRA experts are gated by a frozen SASRec.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/train_ilora.py ml-100k/ilora \
        --recommender outputs/ml-100k/sasrec --output_dir outputs/ml-100k/ilora

The recipe writes the model (adapter, frozen SASRec, configuration, tokenizer, catalogue), run.json and run.log to the
output folder. `--num_experts 1` trains plain LoRA. To resume a killed run from its last complete checkpoint, run the
same command again. evaluate_ilora.py measures the quality of the model.

Other files in accelerate_configs launch several processes. With the same global batch, several processes learn what one
process learns, except with the conv router, which normalises over the users of its own process. Checkpoints of
DeepSpeed include the language model. ZeRO-2 with bf16 saves the adapter in bfloat16, ZeRO-3 in float32.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import dataclasses
import logging
from dataclasses import dataclass, field

from transformers import set_seed
from transformers.trainer_pt_utils import get_model_param_count

from hf_ilora import ILoraConfig, ILoraForRecommendation, ILoraTrainer, ILoraTrainingArguments, SequenceDatasets
from hf_ilora.data.row_fractions import check_fraction, rows_in_fraction, sampled_rows
from hf_ilora.models.ilora.prompts import read_templates
from hf_ilora.runs import (
    RunRecord,
    config_arguments,
    log_to_run,
    parse_arguments,
    prompt_path,
    resumable_checkpoint,
    run_main,
    set_up_logging,
    sole_writer,
)
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.training.ilora_parts import ILoraPartArguments, load_ilora_parts
from hf_ilora.training.ilora_trainer import checked_candidate_fraction

logger = logging.getLogger(__name__)

ILoraModelArguments = config_arguments(
    ILoraConfig,
    exclude=(
        "recommender_config", "text_config", "llm_name_or_path", "llm_revision", "llm_gguf_file", "prompt_templates",
        "tie_word_embeddings",
    ),
)  # fmt: skip


@dataclass
class DataArguments:
    """The training data and the prompts."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    train_fraction: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={
            "help": "start and end of the part of the train split to learn from, as fractions of its rows; choose "
            "users that the recommender has not seen, such as 0.8 1 for a recommender trained on 0 0.8"
        },
    )
    validation_users: int | None = field(
        default=None,
        metadata={"help": "number of validation users to evaluate on, drawn at random (seed); by default all"},
    )
    prompt_file: str | None = field(
        default=None,
        metadata={
            "help": "file of prompt templates, separated by lines of ---, or a shipped one: movies, artists, products; "
            "by default templates that fit any items"
        },
    )

    def __post_init__(self):
        check_fraction(self.train_fraction)
        if self.validation_users is not None:
            check_at_least_one(self, "validation_users")


ARGUMENTS = (DataArguments, ILoraPartArguments, ILoraModelArguments, ILoraTrainingArguments)


def main() -> None:
    arguments = parse_arguments(ARGUMENTS)
    with sole_writer(arguments[-1].output_dir):
        train(arguments)


def train(arguments: tuple) -> None:
    """Train, save and evaluate the model in its output folder."""
    data, parts, model_arguments, training = arguments
    settings = dataclasses.asdict(model_arguments)
    if data.prompt_file is not None:
        settings["prompt_templates"] = read_templates(prompt_path(data.prompt_file))
    config = ILoraConfig(**settings)
    checked_candidate_fraction(config, training.candidate_fraction)
    set_up_logging(training.output_dir)
    sequences = SequenceDatasets.load(data.data_dir)
    fingerprint = sequences.fingerprint
    validation = sequences["validation"]
    rows = sampled_rows("validation_users", data.validation_users, len(validation), training.seed)
    checkpoint = resumable_checkpoint(training.output_dir, arguments, fingerprint)
    set_seed(training.seed)
    llm, tokenizer, source, recommender = load_ilora_parts(parts, sequences.catalogue)
    config.llm_name_or_path, config.llm_revision, config.llm_gguf_file = dataclasses.astuple(source)
    set_seed(training.seed)  # the adapter's start does not depend on the numbers that loading drew
    model = ILoraForRecommendation.from_base(
        llm, recommender, tokenizer, sequences.catalogue, config, untrained_recommender=parts.untrained_recommender
    )
    trainer = ILoraTrainer(
        model,
        training,
        train_dataset=rows_in_fraction(sequences["train"], data.train_fraction),
        eval_dataset=validation if len(rows) == len(validation) else validation.select(rows),
    )
    log_to_run(trainer)
    trained, total = (get_model_param_count(model, trainable_only=trainable) for trainable in (True, False))
    logger.info("%s: %s parameters, of which %s are trained", source.name_or_path, f"{total:,}", f"{trained:,}")
    with RunRecord(training.output_dir, arguments, seed=training.seed) as record:
        record.add_data(fingerprint)
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()  # the log of the whole run, for learning curves: kept checkpoints may end earlier
        with record.stage("evaluate_validation"):
            record.add_metrics("validation", trainer.evaluate())


if __name__ == "__main__":
    run_main(main)
