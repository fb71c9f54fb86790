"""Distils a teacher into a SASRec, GRU4Rec or Caser, which is then served without the teacher, and evaluates it.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/distill_sasrec.py ml-100k/sasrec \
        --teacher_labels outputs/ml-100k/labels --distilled_positions all --output_dir outputs/ml-100k/distilled

The recipe writes the model (weights, configuration, catalogue), run.json and run.log to the output folder. To resume a
killed run from its last complete checkpoint, run the same command again.
"""

import hf_ilora_cli.openmp  # isort: skip  # noqa: F401 - before torch
import dataclasses
from dataclasses import dataclass, field

from transformers import set_seed

from hf_ilora import DistillationArguments, DistillationTrainer, SASRecConfig, SequenceDatasets
from hf_ilora.distillation.teachers import labels_of_teacher
from hf_ilora.models.next_item.configuration_next_item import TEACHER_FIELDS
from hf_ilora.runs import (
    RunRecord,
    check_same_inputs,
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
from hf_ilora.training.students import StudentArguments, build_student

SASRecArguments = config_arguments(SASRecConfig, exclude=("num_items", "pad_token_id", *TEACHER_FIELDS))


@dataclass
class TeacherArguments:
    """The data and the teacher."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    teacher_labels: str | None = field(default=None, metadata={"help": "folder of a teacher's labels"})
    labels_teacher: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of the teacher that must have given the labels; by default any. Each process "
            "loads it once to check, with its language model"
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "folder or Hub name of a model to ask in every training step, instead of labels"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model of the teacher"}
    )

    def __post_init__(self):
        if (self.teacher_labels is None) == (self.teacher is None):
            raise ValueError("expected either teacher_labels (a folder of labels) or teacher (a model to ask)")
        if self.labels_teacher is not None and self.teacher_labels is None:
            raise ValueError(
                f"labels_teacher is {self.labels_teacher} without teacher_labels, whose teacher it checks: leave it out"
            )


ARGUMENTS = (TeacherArguments, StudentArguments, SASRecArguments, NewItemArguments, DistillationArguments)


def main() -> None:
    arguments = parse_arguments(ARGUMENTS)
    with sole_writer(arguments[-1].output_dir):
        distill(arguments)


def distill(arguments: tuple) -> None:
    """Train, save and evaluate the student in its output folder."""
    teacher, student, sasrec_arguments, new_items, training = arguments
    set_up_logging(training.output_dir)
    sequences = SequenceDatasets.load(teacher.data_dir)
    fingerprint = sequences.fingerprint
    checkpoint = resumable_checkpoint(training.output_dir, arguments, fingerprint)
    labels, inputs = None, {}
    if teacher.teacher_labels is not None:
        labels = labels_of_teacher(teacher.teacher_labels, sequences, teacher.labels_teacher, teacher.trust_remote_code)
        inputs = {"teacher_labels": labels.origin()}
        check_same_inputs(checkpoint, inputs)
    set_seed(training.seed)
    trainer = DistillationTrainer(
        build_student(student, dataclasses.asdict(sasrec_arguments), sequences.num_items, labels),
        training,
        teacher_labels=labels,
        teacher=teacher.teacher,
        trust_remote_code=teacher.trust_remote_code,
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
    )
    log_to_run(trainer)
    with RunRecord(training.output_dir, arguments, seed=training.seed) as record:
        record.add_data(fingerprint)
        for name, origin in inputs.items():
            record.add_metrics(name, origin)
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        fill_after_training(trainer, sequences["train"], new_items)
        trainer.save_model()
        evaluate_splits(trainer, sequences, record)


if __name__ == "__main__":
    run_main(main)
