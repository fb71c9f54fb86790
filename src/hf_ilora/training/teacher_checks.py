"""Checks that teachers fit the settings, the rows and the catalogue of a student, before it learns from them."""

import os

from datasets import IterableDataset
from torch import nn

from hf_ilora.distillation.ensemble import EnsembleTeacher
from hf_ilora.distillation.ensemble_members import LogCounts, RecommenderScores
from hf_ilora.distillation.policies import KLDivergencePolicy
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.loading import check_catalogue
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem

from .distillation_arguments import DistillationArguments
from .ensembles import check_no_zero3
from .initial_items import INITIAL_ITEMS


def given_labels(
    teacher: object | str | os.PathLike | None,
    teacher_labels: TeacherLabels | None,
    args: DistillationArguments,
    train_dataset: object,
) -> TeacherLabels | None:
    """The stored labels that a student learns from: `teacher_labels`, or the labels that are a member of the ensemble.

    Raises:
        TypeError: for the path of labels.
        ValueError: for no teacher or two, and for labels with a stream of rows.
    """
    if isinstance(teacher, EnsembleTeacher) and teacher.labels and teacher_labels is None:
        if len(teacher.labels) > 1:
            raise ValueError(f"{len(teacher.labels)} members of the ensemble are stored labels: expected at most one")
        teacher_labels = teacher.labels[0]
    elif (teacher_labels is None) == (teacher is None) and not (args.title_neighbours and teacher is None):
        given = "neither is given" if teacher is None else "both are given"
        raise ValueError(
            f"expected either teacher_labels=TeacherLabels.load(folder, sequences.fingerprint) or teacher=model "
            f"(or its folder or Hub name): {given}"
        )
    if isinstance(teacher_labels, str | os.PathLike):
        raise TypeError(
            f"teacher_labels is the path {teacher_labels}: expected labels, TeacherLabels.load("
            "folder, data_fingerprint=sequences.fingerprint), which checks that they are about this data"
        )
    if teacher_labels is not None and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "train_dataset is a stream with teacher_labels, which go by the rows of a split: expected the "
            "datasets.Dataset that was labelled, or an online teacher (teacher=model)"
        )
    return teacher_labels


def check_teacher(teacher: object | None, labels: TeacherLabels | None, policy, args: DistillationArguments) -> None:
    """Raise a ValueError for settings that the kind of teacher does not serve.

    Args:
        teacher: the teacher to ask in every step, or None.
        labels: stored labels, or None; with both, the labels are a member of the teacher.
        policy: chooses the labels that count.
        args: arguments of the training.
    """
    if labels is not None and isinstance(policy, KLDivergencePolicy):
        raise ValueError(
            "policy kl_divergence compares whole distributions, and teacher_labels have the teacher's best items "
            "only: expected an online teacher (teacher=model), or another policy"
        )
    if teacher is None and labels is None:
        needing = {name: getattr(args, name) for name in ("alpha", "embedding_weight", "kl_weight")}
        if any(needing.values()):
            found = ", ".join(f"{name} {value}" for name, value in needing.items())
            raise ValueError(f"weights are {found} without a teacher: expected 0 for all of them, or teacher_labels")
    if teacher is None:
        return
    check_no_zero3()
    if labels is not None:
        if args.distilled_positions != "all" or not args.kl_weight:
            raise ValueError(
                f"distilled_positions is {args.distilled_positions!r} and kl_weight {args.kl_weight} with an "
                "ensemble of online teachers and labels: expected 'all' and a positive weight"
            )
        return
    if args.num_scored_items is not None:
        raise ValueError(
            f"num_scored_items is {args.num_scored_items} with an online teacher, which ranks the whole catalogue: "
            "expected None, or teacher_labels"
        )
    if args.distilled_positions == "all" and (args.lam or args.alpha or not args.kl_weight):
        raise ValueError(
            f"distilled_positions is 'all' with an online teacher, lam {args.lam}, alpha {args.alpha} and "
            f"kl_weight {args.kl_weight}: expected lam=0, alpha=0 and a positive kl_weight; rankings are distilled "
            "from teacher_labels, or at distilled_positions 'last'"
        )
    for name, allowed in (("embedding_weight", (0.0,)), ("initial_items", INITIAL_ITEMS)):
        if getattr(args, name) in allowed:
            continue
        raise ValueError(
            f"{name} is {getattr(args, name)} with an online teacher: expected teacher_labels, which have the "
            "teacher's item embeddings"
        )


def check_labels_of_rows(labels: TeacherLabels, num_rows: int, num_items: int, args: DistillationArguments) -> None:
    """Raise a ValueError for labels that the windows of `num_rows` training rows will not meet."""
    if labels.num_items != num_items:
        raise ValueError(
            f"the labels are about {labels.num_items} items and the model has {num_items}: expected labels of this data"
        )
    items_per_label = labels.description.get("top_k", args.top_k)
    if args.lam and args.top_k > items_per_label:
        raise ValueError(
            f"top_k is {args.top_k} and the labels in {labels.folder} have {items_per_label} items each: expected "
            f"at most {items_per_label}; lower top_k, or label again with more"
        )
    if args.initial_items == "teacher":
        labels.item_embeddings()  # raises a ValueError if the teacher has none
    last_row = int(labels.table["history_id"].to_numpy().max(initial=-1))
    if last_row >= num_rows:
        raise ValueError(
            f"the labels are about row {last_row} and train_dataset has {num_rows} rows: expected the "
            "whole train split that was labelled, since labels go by rows"
        )
    if labels.description.get("labelled_positions") == "last" and args.windows == "random":
        raise ValueError(
            f"the labels in {labels.folder} are about last positions, which random windows hardly ever meet: "
            "expected windows='last', or labels of all positions (`hf-ilora label --labelled_positions all`)"
        )


def check_teachers_catalogue(teacher: nn.Module, student: EncoderForNextItem, at_all_positions: bool) -> None:
    """Raise a ValueError for a teacher that has another catalogue than the student, or reads shorter histories.

    Args:
        teacher: a recommender or an ensemble.
        student: the student, whose raw ids are compared if it has a catalogue.
        at_all_positions: whether an ensemble is asked about every position of the student's batches.
    """
    num_items, length = student.config.num_items, student.config.max_length
    models = [teacher]
    if isinstance(teacher, EnsembleTeacher):
        models = [member.model for member in teacher.members if isinstance(member, RecommenderScores | LogCounts)]
        if teacher.num_items != num_items:
            raise ValueError(
                f"the ensemble is about {teacher.num_items} items and the student about {num_items}: expected the "
                "same catalogue"
            )
        if at_all_positions and teacher.max_length is not None and teacher.max_length < length:
            raise ValueError(
                f"a member of the ensemble reads {teacher.max_length} items (max_length) and the student {length}: "
                "expected at least as many, since it is asked about every position"
            )
    if student.catalogue is not None:
        raw_ids = student.catalogue.table["raw_id"].to_numpy()
        for model in models:
            check_catalogue(model, "the teacher", num_items, raw_ids)


__all__ = ["check_labels_of_rows", "check_teacher", "check_teachers_catalogue", "given_labels"]
