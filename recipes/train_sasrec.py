"""Trains SASRec on a prepared data set, by default keeping the best epoch on validation, and evaluates it.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        recipes/train_sasrec.py ml-100k/sasrec --seed 1 --output_dir outputs/ml-100k/sasrec-1

If the data have titles, the items start from them and from what is bought together, unless --initial_items says
otherwise: a sentence encoder of 90 MB is then downloaded once.

The recipe writes the model (weights, configuration, catalogue), run.json and run.log to the output folder. To resume a
killed run from its last complete checkpoint, run the same command again.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import contextlib
import copy
import dataclasses
from dataclasses import dataclass, field

import torch
from transformers import set_seed

from hf_ilora import NextItemTrainer, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.data.row_fractions import check_fraction, rows_in_fraction
from hf_ilora.models.next_item.configuration_next_item import TEACHER_FIELDS
from hf_ilora.runs import (
    RunRecord,
    config_arguments,
    evaluate_splits,
    log_to_run,
    parse_arguments,
    resumable_checkpoint,
    run_main,
    set_up_logging,
    sole_writer,
)
from hf_ilora.training.new_items import NewItemArguments, fill_after_training
from hf_ilora.training.sasrec_arguments import SASRecTrainingArguments, decide_initial_items

# A teacher's item embeddings are for distill_sasrec.py.
SASRecArguments = config_arguments(SASRecConfig, exclude=("num_items", "pad_token_id", *TEACHER_FIELDS))


@dataclass
class DataArguments:
    """The training data."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    train_fraction: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={
            "help": "start and end of the part of the train split to learn from, as fractions of its rows; "
            "rounded to whole users"
        },
    )

    def __post_init__(self):
        check_fraction(self.train_fraction)


ARGUMENTS = (DataArguments, SASRecArguments, NewItemArguments, SASRecTrainingArguments)


def main() -> None:
    arguments = parse_arguments(ARGUMENTS)
    with sole_writer(arguments[-1].output_dir):
        train(arguments)


def train(arguments: tuple) -> None:
    """Train, save and evaluate the model in its output folder."""
    data, model_arguments, new_items, training = arguments
    set_up_logging(training.output_dir)
    sequences = SequenceDatasets.load(data.data_dir)
    fingerprint = sequences.fingerprint
    config = SASRecConfig(num_items=sequences.num_items, **dataclasses.asdict(model_arguments))
    as_given = (*arguments[:-1], copy.copy(training))  # a resumed run is compared by these, such as "auto"
    decide_initial_items(training, config, sequences)
    checkpoint = resumable_checkpoint(training.output_dir, as_given, fingerprint)
    rows = rows_in_fraction(sequences["train"], data.train_fraction)
    set_seed(training.seed)
    # The trainer draws the weights of a model on meta, whose whole table no process then makes.
    with torch.device("meta") if training.item_table == "row_sharded" else contextlib.nullcontext():
        model = SASRecForNextItem(config)
    trainer = NextItemTrainer(
        model,
        training,
        train_dataset=rows,
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
    )
    log_to_run(trainer)
    with RunRecord(training.output_dir, as_given, seed=training.seed) as record:
        record.add_data(fingerprint)
        record.add_metrics("start", {"initial_items": training.initial_items})
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        fill_after_training(trainer, rows, new_items)
        trainer.save_model()
        trainer.save_state()  # the log of the whole run, for learning curves: kept checkpoints may end earlier
        evaluate_splits(trainer, sequences, record)


if __name__ == "__main__":
    run_main(main)
