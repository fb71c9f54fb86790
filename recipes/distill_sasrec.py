"""Distils a teacher into a small next-item model: DLLM2Rec's losses, or those beyond it, in a Trainer.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/label_with_teacher.py --labelled_positions all \
        --teacher outputs/ml-100k/ilora --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/labels
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/distill_sasrec.py \
        recipes/configs/ml-100k/sasrec.yaml --teacher_labels outputs/ml-100k/labels --distilled_positions all \
        --output_dir outputs/ml-100k/distilled

The student starts from scratch, or from a saved model with --student. Its labels come from a data set of
recipes/label_with_teacher.py, or with --teacher from a model that is asked in every step. The output folder becomes the
model, without anything of the teacher's size: what serving costs is what the student costs. A killed run goes on from
its last whole checkpoint when the same command is given again.
"""

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from train_sasrec import (
    DataArguments,
    SASRecArguments,
    SASRecTrainingArguments,
    labelled_positions,
    next_item_optimizer,
    record_quality,
    start_from_cooccurrence,
    training_windows,
)
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    SequenceDatasets,
)
from hf_ilora.distillation import teachers
from hf_ilora.distillation.policies import SAMPLE_POLICIES, sample_policy
from hf_ilora.distillation.teacher_labels import TeacherLabels, read_description
from hf_ilora.evaluation.ranking import RankingMetrics, ranks_from_logits
from hf_ilora.models.loading import check_catalogue, load_recommender, model_folder
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.runs import (
    LogMetricsCallback,
    RunRecord,
    leave_launch,
    parse_arguments,
    read_record,
    resumable_checkpoint,
    set_up_logging,
)
from hf_ilora.titles.pca import pca_embeddings
from hf_ilora.training.distillation_trainer import DistillationArguments, DistillationTrainer
from hf_ilora.training.label_collator import DistillationCollator
from hf_ilora.training.windows import EvaluationHistories, NextItemCollator, WindowEpochCallback

logger = logging.getLogger(__name__)

STUDENTS = {
    "sasrec": (SASRecConfig, SASRecForNextItem),
    "gru4rec": (GRU4RecConfig, GRU4RecForNextItem),
    "caser": (CaserConfig, CaserForNextItem),
}
LABELS = "teacher_labels"  # what the record calls them
ADDED = ("input", "input_and_head")
EMBEDDING_USES = ("none", *ADDED, "initial")


@dataclass
class StudentArguments:
    """The student, and what it learns from."""

    teacher_labels: str | None = field(
        default=None, metadata={"help": "folder written by recipes/label_with_teacher.py"}
    )
    labels_teacher: str | None = field(
        default=None,
        metadata={
            "help": "teacher that the labels must come from, as label_with_teacher.py took it; by default not checked. "
            "A model is loaded once in each process, with its language model"
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a model to ask in every step, instead of labels"}
    )
    student: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a trained model to start from; by default from scratch"}
    )
    student_type: str = field(default="sasrec", metadata={"help": "of a student from scratch: sasrec, gru4rec, caser"})
    student_settings: str | None = field(
        default=None, metadata={"help": "architecture of gru4rec or caser, as JSON; SASRec has options of its own"}
    )
    embedding_use: str = field(
        default="none",
        metadata={
            "help": "the labels' item embeddings: none; input (added to the item table, as published); input_and_head; "
            "or initial (their principal components are the table that a SASRec begins with)"
        },
    )
    ed_weight: float = field(default=0.2, metadata={"help": "weight of the item embeddings that are added"})
    policy: str = field(default="all", metadata={"help": "labels that count: all, ground_truth_error or kl_divergence"})
    policy_threshold: float = field(default=0.0, metadata={"help": "of the policy, see its class"})

    def __post_init__(self):
        if (self.teacher_labels is None) == (self.teacher is None):
            raise ValueError("expected either teacher_labels (a folder of labels) or teacher (a model to ask)")
        if self.labels_teacher is not None and self.teacher_labels is None:
            raise ValueError(
                f"labels_teacher is {self.labels_teacher} without teacher_labels, whose teacher it checks: leave it out"
            )
        for name, choices in (
            ("student_type", STUDENTS), ("policy", SAMPLE_POLICIES), ("embedding_use", EMBEDDING_USES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.student_settings is not None and (self.student is not None or self.student_type == "sasrec"):
            raise ValueError("student_settings are for a gru4rec or caser from scratch: give SASRec's as options")
        if self.embedding_use != "none" and self.teacher_labels is None:
            raise ValueError(f"embedding_use is {self.embedding_use} without teacher_labels, which hold the embeddings")
        if self.embedding_use != "none" and self.student is not None:
            raise ValueError(f"embedding_use is {self.embedding_use} for a trained student: expected one from scratch")
        if self.embedding_use == "initial" and self.student_type != "sasrec":
            raise ValueError(f"embedding_use is initial for a {self.student_type}: expected a sasrec, or input")


@dataclass
class DistillationTrainingArguments(SASRecTrainingArguments, DistillationArguments):
    """DistillationArguments with the defaults of next-item training."""


ARGUMENTS = (StudentArguments, DataArguments, SASRecArguments, DistillationTrainingArguments)


def build_student(
    student: StudentArguments, sasrec_arguments, num_items: int, embeddings: torch.Tensor | None
) -> torch.nn.Module:
    """The saved model to start from, or a fresh one with the teacher's embeddings (num_items + 1, teacher size)."""
    if student.student is not None or student.student_type != "sasrec":
        defaults = dataclasses.asdict(type(sasrec_arguments)())
        unused = [name for name, value in dataclasses.asdict(sasrec_arguments).items() if value != defaults[name]]
        if unused:
            logger.warning("%s shape a SASRec from scratch and are not used here", ", ".join(unused))
    if student.student is not None:
        model = load_recommender(model_folder(student.student))
        if not isinstance(model, EncoderForNextItem):
            raise ValueError(f"{student.student} is a {type(model).__name__}: expected a SASRec, GRU4Rec or Caser")
        return model.train()
    settings = dataclasses.asdict(sasrec_arguments)
    if student.student_type != "sasrec":
        settings = json.loads(student.student_settings or "{}")
    if student.embedding_use in ADDED:
        settings |= {"teacher_embedding_size": embeddings.shape[1], "teacher_embedding_use": student.embedding_use}
        settings |= {"ed_weight": student.ed_weight}
    config_class, model_class = STUDENTS[student.student_type]
    model = model_class(config_class(num_items=num_items, **settings))
    if student.embedding_use in ADDED:
        model.set_teacher_embeddings(embeddings)
    elif student.embedding_use == "initial":
        model.start_from_item_embeddings(pca_embeddings(embeddings, model.config.hidden_size))
    return model


def load_teacher(student: StudentArguments, sequences: SequenceDatasets) -> tuple[TeacherLabels | None, object]:
    """The labels, from labels_teacher if it is given, or the model to ask: one of the two is None."""
    if student.teacher is None:
        fingerprint = None if student.labels_teacher is None else labels_teacher_fingerprint(student, sequences)
        return TeacherLabels.load(student.teacher_labels, sequences.fingerprint, fingerprint), None
    teacher = load_recommender(model_folder(student.teacher))
    check_catalogue(teacher, student.teacher, sequences.num_items, sequences.raw_ids)
    return None, teacher


def labels_teacher_fingerprint(student: StudentArguments, sequences: SequenceDatasets) -> str:
    """As label_with_teacher.py computes it: of weights in the dtype in which they answered."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"labels_teacher is {student.labels_teacher} and ZeRO-3 would spread its weights over processes: leave it "
            "out, or give another file of accelerate_configs"
        )
    dtype = read_description(Path(student.teacher_labels)).get("dtype")
    try:
        teacher = teachers.load_teacher(
            student.labels_teacher, len(sequences["train"]), sequences.num_items, dtype=dtype
        )
    except ValueError as error:
        raise ValueError(
            f"labels_teacher is {student.labels_teacher}: expected the teacher that {student.teacher_labels} was made "
            f"with ({error})"
        ) from error
    return teacher.fingerprint


def check_same_labels(checkpoint: str, labels: TeacherLabels) -> None:
    """Raise a ValueError when the run that a checkpoint belongs to learnt from other labels or item embeddings."""
    earlier = read_record(Path(checkpoint).parent / "run.json")["metrics"].get(LABELS, {})
    for name, key in (("fingerprint", "labels_fingerprint"), ("embeddings_fingerprint", "embeddings_fingerprint")):
        if earlier.get(name) != labels.description[key]:
            raise ValueError(
                f"{checkpoint} was trained on labels with the {name} {earlier.get(name)}, and {labels.folder} holds "
                f"{labels.description[key]}: expected the same; choose another output_dir, or delete it"
            )


def main() -> None:
    student, data_arguments, sasrec_arguments, training_arguments = parse_arguments(ARGUMENTS)
    if data_arguments.early_stopping_patience and training_arguments.eval_strategy == "no":
        raise ValueError("eval_strategy is no: expected evaluations to stop by, or --early_stopping_patience 0")
    starts_anew = student.student is None and student.student_type == "sasrec" and student.embedding_use != "initial"
    if data_arguments.initial_items != "random" and not starts_anew:
        raise ValueError(
            f"initial_items is {data_arguments.initial_items}: expected random for a student that is trained already, "
            "begins with the teacher's embeddings, or is no SASRec"
        )
    if is_deepspeed_zero3_enabled() and (student.teacher is not None or student.embedding_use in ADDED):
        raise ValueError(
            "ZeRO-3 spreads weights over processes, where an online teacher cannot be asked and item embeddings cannot "
            "be folded: expected labels and embedding_use none or initial, or another file of accelerate_configs"
        )
    if data_arguments.train_fraction != [0, 1]:
        raise ValueError(
            f"train_fraction is {data_arguments.train_fraction}: expected 0 1, labels go by rows of the split"
        )
    set_up_logging(training_arguments.output_dir)
    sequences = SequenceDatasets.load(data_arguments.data_dir)
    targets = labelled_positions(data_arguments, sequences.protocol["name"])
    fingerprint = sequences.fingerprint
    arguments = (student, data_arguments, sasrec_arguments, training_arguments)
    checkpoint = resumable_checkpoint(training_arguments.output_dir, arguments, fingerprint)
    labels, teacher = load_teacher(student, sequences)  # before the run is on record
    if labels is not None and labels.description["labelled_positions"] == "last" and data_arguments.windows == "random":
        raise ValueError(
            f"{student.teacher_labels} holds labels of last positions, which random windows hardly ever meet: expected "
            "--windows last, or labels made with --labelled_positions all"
        )
    if labels is not None and checkpoint is not None:
        check_same_labels(checkpoint, labels)
    embeddings = None
    if student.embedding_use != "none" or (training_arguments.embedding_weight and labels is not None):
        embeddings = labels.item_embeddings()
    with RunRecord(training_arguments.output_dir, arguments, seed=training_arguments.seed) as record:
        record.add_data(fingerprint)
        if labels is not None:
            names = {
                "fingerprint": "labels_fingerprint",
                "embeddings_fingerprint": "embeddings_fingerprint",
                "teacher": "teacher",
                "teacher_fingerprint": "teacher_fingerprint",
            }
            record.add_metrics(LABELS, {name: labels.description[key] for name, key in names.items()})
        set_seed(training_arguments.seed)
        model = build_student(student, sasrec_arguments, sequences.num_items, embeddings)
        if student.student is not None:
            check_catalogue(model, student.student, sequences.num_items, sequences.raw_ids)
        model.catalogue = Catalogue(sequences.catalogue.with_format("arrow")[:])
        train = sequences["train"]
        windows = training_windows(
            data_arguments,
            train,
            model.config.max_length,
            targets,
            training_arguments.seed,
            with_origins=teacher is None,
        )
        item_counts = torch.from_numpy(windows.item_counts(sequences.num_items))
        if model.config.popularity_power:
            model.set_item_counts(item_counts)
        if data_arguments.initial_items != "random" and checkpoint is None:
            start_from_cooccurrence(model, data_arguments, train, item_counts, targets)
        output_embeddings = None
        if training_arguments.embedding_weight and embeddings is not None:
            output_embeddings = pca_embeddings(embeddings, model.config.hidden_size)
        collator = NextItemCollator()
        if labels is not None:
            collator = DistillationCollator(labels, training_arguments.distilled_positions)
        callbacks = [WindowEpochCallback(windows), LogMetricsCallback()]
        if data_arguments.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(data_arguments.early_stopping_patience))
        trainer = DistillationTrainer(
            model,
            training_arguments,
            teacher=None if teacher is None else teacher.to(training_arguments.device),
            item_counts=item_counts,
            policy=sample_policy(student.policy, student.policy_threshold),
            teacher_embeddings=output_embeddings,
            train_dataset=windows,
            eval_dataset=EvaluationHistories(sequences["validation"], model.config.max_length),
            data_collator=collator,
            compute_metrics=RankingMetrics(k=10),
            preprocess_logits_for_metrics=ranks_from_logits,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=next_item_optimizer(
                model, training_arguments, data_arguments.item_learning_rate_factor
            ),
        )
        trainer.remove_callback(PrinterCallback)  # LogMetricsCallback says the same, to the file too
        with record.stage("train"):
            trainer.train(resume_from_checkpoint=checkpoint)
        if student.embedding_use in ADDED:
            model.fold_teacher_embeddings()
        trainer.save_model()
        record_quality(trainer, sequences, record, logger)
    leave_launch()


if __name__ == "__main__":
    main()
