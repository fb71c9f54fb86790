"""The teachers of a distillation, from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.distillation.ensemble import EnsembleTeacher
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.distillation.teachers import labels_of_teacher, model_fingerprint
from hf_ilora.models.loading import SavedRecommender

from .distillation_arguments import DistillationArguments
from .ensembles import (
    ENSEMBLE_FILE,
    TITLES,
    TunedEnsemble,
    check_member_weights,
    is_label_folder,
    load_members,
    load_online_teacher,
    member_origins,
    title_origin,
)
from .initial_items import WITH_TITLES, encoded_titles


@dataclass
class TeacherArguments:
    """The data and the teachers."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    teacher_labels: str | None = field(default=None, metadata={"help": "folder of a teacher's labels"})
    labels_teacher: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub name of the teacher that must have given the labels; by default any. Each process "
            "loads it once to check, with its language model"
        },
    )
    teacher: list[str] | None = field(
        default=None,
        metadata={
            "help": "teachers to ask in every training step: folders or Hub names of saved recommenders, the word "
            "titles (similarity of an item's title to those of the history), a folder of labels; several are an "
            "ensemble"
        },
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "weights of the scores of several teachers, one for each; by default 1 each"}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "divides the weighted sum of the scores of several teachers"}
    )
    title_decay: float = field(
        default=0.6, metadata={"help": "of the teacher titles: weight of an item relative to the next newer one"}
    )
    ensemble: str | None = field(
        default=None,
        metadata={
            "help": "folder that tune_ensemble.py wrote, which has teachers, weights, temperature and title_decay"
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model of the teacher"}
    )

    def __post_init__(self):
        given = [name for name in ("teacher_labels", "teacher", "ensemble") if getattr(self, name) is not None]
        if "teacher" in given and len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are given: expected either teacher_labels (a folder of labels), teacher "
                "(models to ask, among which may be a folder of labels) or ensemble (a tuned one)"
            )
        if self.labels_teacher is not None and self.teacher_labels is None:
            raise ValueError(
                f"labels_teacher is {self.labels_teacher} without teacher_labels, whose teacher it checks: leave it out"
            )
        if self.labels_teacher is not None and self.ensemble is not None:
            raise ValueError(
                f"labels_teacher is {self.labels_teacher} with an ensemble, which knows the teacher of its labels: "
                "leave it out"
            )
        if not 0 < self.teacher_temperature < float("inf"):
            raise ValueError(f"teacher_temperature is {self.teacher_temperature}: expected a finite number above 0")
        if not 0 <= self.title_decay <= 1:
            raise ValueError(f"title_decay is {self.title_decay}: expected a number from 0 to 1")
        if self.teacher is None:
            self._check_unused("teacher_weights", "teacher_temperature", "title_decay")
            return
        if not self.teacher:
            raise ValueError("teacher is empty: expected at least one")
        if len(set(self.teacher)) < len(self.teacher):
            raise ValueError(f"teacher is {self.teacher}: expected different teachers; one may have a larger weight")
        if self.teacher_weights is not None:
            check_member_weights(self.teacher, self.teacher_weights)
        if TITLES not in self.teacher:
            self._check_unused("title_decay")

    def _check_unused(self, *names: str) -> None:
        defaults = {each.name: each.default for each in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                of = "the teacher titles" if name == "title_decay" else "teacher"
                has_own = ", and the ensemble has its own" if self.ensemble is not None else ""
                raise ValueError(f"{name} is {getattr(self, name)} without {of}{has_own}: leave it out")


def check_has_teacher(teachers: TeacherArguments, training: DistillationArguments) -> None:
    """Raise a ValueError where there is nothing to distil."""
    has_teacher = teachers.teacher_labels or teachers.teacher or teachers.ensemble
    if not has_teacher and not training.title_neighbours:
        raise ValueError(
            "no teacher is given: expected teacher_labels (a folder of labels), teacher (models to ask), ensemble (a "
            "tuned one), or a positive title_neighbours, which needs no teacher"
        )


@dataclass(frozen=True)
class Teachers:
    """The teachers that a student learns from, loaded.

    Args:
        labels: stored labels, among the members of an ensemble or on their own; None without.
        teacher: asked in every step; None without.
        title_embeddings: (num_items + 1, size), where anything needs them.
        inputs: origin of each teacher, as `check_same_inputs` compares it.
    """

    labels: TeacherLabels | None
    teacher: EnsembleTeacher | SavedRecommender | None
    title_embeddings: torch.Tensor | None
    inputs: dict[str, dict[str, object]]

    @property
    def trainer_arguments(self) -> dict[str, object]:
        """Arguments of `DistillationTrainer`, which finds labels among the members by itself."""
        labels = self.labels if self.teacher is None else None
        return {"teacher_labels": labels, "teacher": self.teacher, "title_embeddings": self.title_embeddings}


def load_teachers(
    arguments: TeacherArguments, training: DistillationArguments, sequences: SequenceDatasets
) -> Teachers:
    """Load and check the teachers that the arguments name, and encode the titles if anything reads them.

    Raises:
        ValueError: for teachers of other data, and an ensemble whose members have changed or that was tuned on titles
            of another encoder.
        FileNotFoundError: for labels or an ensemble that do not exist.
    """
    encoded = []

    def title_embeddings() -> torch.Tensor:
        if not encoded:
            encoded.append(encoded_titles(sequences.catalogue, training, arguments.trust_remote_code))
        return encoded[0]

    def loaded(members: Sequence[str], weights: Sequence[float], temperature: float, decay: float) -> tuple:
        """The ensemble, and the origin of each member."""
        found = load_members(members, sequences, title_embeddings, decay, trust_remote_code=arguments.trust_remote_code)
        origins = member_origins(found, training.title_encoder, training.title_layer)
        return EnsembleTeacher(found, weights, temperature), origins

    labels, teacher, inputs = None, None, {}
    if arguments.ensemble is not None:
        tuned = TunedEnsemble.load(arguments.ensemble)
        names = _named_members(tuned, arguments, training)
        teacher, origins = loaded(names, tuned.weights, tuned.temperature, tuned.title_decay)
        _check_origins(arguments.ensemble, names, origins, tuned.origins)
        inputs = _by_name(names, origins)
        inputs["the ensemble"] = {"weights": tuned.weights, "temperature": tuned.temperature}
    elif arguments.teacher_labels is not None:
        labels = labels_of_teacher(
            arguments.teacher_labels, sequences, arguments.labels_teacher, arguments.trust_remote_code
        )
        inputs = {"teacher_labels": labels.origin()}
    elif arguments.teacher is not None:
        names = arguments.teacher
        if _is_asked_as_it_is(arguments):
            teacher = load_online_teacher(names[0], sequences, arguments.trust_remote_code)
            origins = [{"fingerprint": model_fingerprint(teacher)}]
        else:
            weights = arguments.teacher_weights or [1.0] * len(names)
            teacher, origins = loaded(names, weights, arguments.teacher_temperature, arguments.title_decay)
        inputs = _by_name(names, origins)
    if isinstance(teacher, EnsembleTeacher) and teacher.labels:
        labels = teacher.labels[0]
    if training.title_neighbours or training.initial_items in WITH_TITLES:
        title_embeddings()
        if f"teacher {TITLES}" not in inputs:
            inputs["the titles"] = title_origin(training.title_encoder, training.title_layer)
    return Teachers(labels, teacher, encoded[0] if encoded else None, inputs)


def _is_asked_as_it_is(arguments: TeacherArguments) -> bool:
    """Whether the only teacher is a recommender of any kind, also one that answers at last positions only."""
    (name, *others) = arguments.teacher
    is_member = others or name == TITLES or is_label_folder(name)
    return not is_member and arguments.teacher_weights is None and arguments.teacher_temperature == 1


def _by_name(names: Sequence[str], origins: Sequence[dict]) -> dict[str, dict]:
    return {f"teacher {name}": origin for name, origin in zip(names, origins, strict=True)}


def _named_members(tuned: TunedEnsemble, arguments: TeacherArguments, training: DistillationArguments) -> list[str]:
    """The members of a tuned ensemble, with the labels of the train split in place of those of the validation split."""
    path = f"{ENSEMBLE_FILE} of {arguments.ensemble}"
    expected, given = (tuned.title_encoder, tuned.title_layer), (training.title_encoder, training.title_layer)
    if TITLES in tuned.members and given != expected:
        layer = "" if tuned.title_layer is None else f" --title_layer {tuned.title_layer}"
        raise ValueError(
            f"title_encoder is {given[0]!r} and title_layer {given[1]}, and {path} was tuned with {expected[0]!r} and "
            f"{expected[1]}: expected the same; pass --title_encoder {expected[0]}{layer}, or tune again"
        )
    labels = [name for name, origin in zip(tuned.members, tuned.origins, strict=True) if _is_of_labels(origin)]
    if labels and arguments.teacher_labels is None:
        raise ValueError(
            f"{path} names {labels[0]}, which are labels of the validation split: expected the same teacher's labels "
            "of the train split too; pass --teacher_labels"
        )
    if not labels and arguments.teacher_labels is not None:
        raise ValueError(
            f"teacher_labels is {arguments.teacher_labels}, and {path} has no labels among its members: leave it out, "
            "or tune an ensemble with labels of the validation split (`hf-ilora label --split validation`)"
        )
    return [arguments.teacher_labels if name in labels else name for name in tuned.members]


def _check_origins(folder: str, names: Sequence[str], origins: Sequence[dict], tuned: Sequence[dict]) -> None:
    """Raise a ValueError for a member that is not what the ensemble was tuned with."""
    for name, now, then in zip(names, origins, tuned, strict=True):
        if _is_of_labels(then):  # of another split
            now, then = ({"teacher_fingerprint": each.get("teacher_fingerprint")} for each in (now, then))
        if now != then:
            changed = [f"{key} {then.get(key)}, and has {now.get(key)} now" for key in now if now[key] != then.get(key)]
            raise ValueError(
                f"{folder} was tuned with a teacher {name} that had the {'; the '.join(changed)}: expected the same; "
                "tune again with `hf-ilora tune-ensemble`, or restore the teacher"
            )


def _is_of_labels(origin: dict) -> bool:
    return "teacher_fingerprint" in origin


__all__ = ["TeacherArguments", "Teachers", "check_has_teacher", "load_teachers"]
