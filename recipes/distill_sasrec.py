"""Distils a teacher into a SASRec, GRU4Rec or Caser, which is then served without the teacher, and evaluates it.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/distill_sasrec.py ml-100k/sasrec \
        --teacher_labels outputs/ml-100k/labels --distilled_positions all --output_dir outputs/ml-100k/distilled

The recipe writes the model (weights, configuration, catalogue), run.json and run.log to the output folder. To resume a
killed run from its last complete checkpoint, run the same command again.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field

from transformers import set_seed

from hf_ilora import DistillationArguments, DistillationTrainer, SASRecConfig, SequenceDatasets
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.distillation.teachers import labels_of_teacher
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
)
from hf_ilora.training.students import STUDENTS, trained_student, untrained_student

logger = logging.getLogger(__name__)

EMBEDDING_USES = ("none", "input", "input_and_head")
SASRecArguments = config_arguments(
    SASRecConfig,
    exclude=("num_items", "pad_token_id", "teacher_embedding_size", "ed_weight", "teacher_embedding_use"),
)


@dataclass
class DistilledArguments:
    """The data, the teacher and the student."""

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
    student: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a trained model to start from; by default from scratch"}
    )
    student_type: str = field(
        default="sasrec",
        metadata={
            "choices": tuple(STUDENTS),
            "help": "architecture of a student from scratch: sasrec, gru4rec or caser",
        },
    )
    student_settings: str | None = field(
        default=None, metadata={"help": "settings of a gru4rec or caser, as JSON; those of SASRec are options"}
    )
    embedding_use: str = field(
        default="none",
        metadata={
            "choices": EMBEDDING_USES,
            "help": "where the student adds the item embeddings of the labels: none, input (as in DLLM2Rec) or "
            "input_and_head",
        },
    )
    ed_weight: float = field(default=0.2, metadata={"help": "weight of the item embeddings that embedding_use adds"})

    def __post_init__(self):
        if (self.teacher_labels is None) == (self.teacher is None):
            raise ValueError("expected either teacher_labels (a folder of labels) or teacher (a model to ask)")
        if self.labels_teacher is not None and self.teacher_labels is None:
            raise ValueError(
                f"labels_teacher is {self.labels_teacher} without teacher_labels, whose teacher it checks: leave it out"
            )
        if self.student_settings is not None and (self.student is not None or self.student_type == "sasrec"):
            raise ValueError("student_settings are for a gru4rec or caser from scratch: pass SASRec's as options")
        if self.embedding_use != "none" and (self.teacher_labels is None or self.student is not None):
            raise ValueError(
                f"embedding_use is {self.embedding_use}: expected teacher_labels, which have the embeddings, and a "
                "student from scratch"
            )


ARGUMENTS = (DistilledArguments, SASRecArguments, DistillationArguments)


def build_student(distilled: DistilledArguments, sasrec_arguments, num_items: int, labels: TeacherLabels | None):
    """The saved model to start from, or a fresh one."""
    settings = dataclasses.asdict(sasrec_arguments)
    if distilled.student is not None or distilled.student_type != "sasrec":
        defaults = dataclasses.asdict(type(sasrec_arguments)())
        unused = [name for name, value in settings.items() if value != defaults[name]]
        if unused:
            logger.warning("%s shape a SASRec from scratch and are not used here", ", ".join(unused))
    if distilled.student is not None:
        return trained_student(distilled.student)
    if distilled.student_type != "sasrec":
        settings = json.loads(distilled.student_settings or "{}")
    if distilled.embedding_use != "none":
        settings |= {
            "teacher_embedding_size": labels.item_embeddings().shape[1],
            "teacher_embedding_use": distilled.embedding_use,
            "ed_weight": distilled.ed_weight,
        }
    return untrained_student(distilled.student_type, num_items, settings)


def main() -> None:
    distilled, sasrec_arguments, training = arguments = parse_arguments(ARGUMENTS)
    set_up_logging(training.output_dir)
    sequences = SequenceDatasets.load(distilled.data_dir)
    fingerprint = sequences.fingerprint
    checkpoint = resumable_checkpoint(training.output_dir, arguments, fingerprint)
    labels, inputs = None, {}
    if distilled.teacher_labels is not None:
        labels = labels_of_teacher(distilled.teacher_labels, sequences, distilled.labels_teacher)
        inputs = {"teacher_labels": labels.origin()}
        check_same_inputs(checkpoint, inputs)
    set_seed(training.seed)
    trainer = DistillationTrainer(
        build_student(distilled, sasrec_arguments, sequences.num_items, labels),
        training,
        teacher_labels=labels,
        teacher=distilled.teacher,
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
        trainer.save_model()
        evaluate_splits(trainer, sequences, record)


if __name__ == "__main__":
    run_main(main)
