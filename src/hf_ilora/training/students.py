"""Students: the models that learn from a teacher."""

import dataclasses
import json
import logging
from dataclasses import dataclass, field

from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.models.loading import load_recommender
from hf_ilora.models.next_item.configuration_caser import CaserConfig
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem

logger = logging.getLogger(__name__)

STUDENTS = {
    "sasrec": (SASRecConfig, SASRecForNextItem),
    "gru4rec": (GRU4RecConfig, GRU4RecForNextItem),
    "caser": (CaserConfig, CaserForNextItem),
}
EMBEDDING_USES = ("none", "input", "input_and_head")


@dataclass
class StudentArguments:
    """The student."""

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
        for name, choices in (("student_type", STUDENTS), ("embedding_use", EMBEDDING_USES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        if self.student_settings is not None and (self.student is not None or self.student_type == "sasrec"):
            raise ValueError("student_settings are for a gru4rec or caser from scratch: pass SASRec's as options")
        if self.embedding_use != "none" and self.student is not None:
            raise ValueError(
                f"embedding_use is {self.embedding_use!r} for the trained student {self.student}: expected a student "
                "from scratch, or 'none'"
            )
        if not 0 <= self.ed_weight < float("inf"):
            raise ValueError(f"ed_weight is {self.ed_weight}: expected a finite number, at least 0")
        self._check_settings()

    def _check_settings(self) -> None:
        """Raise a ValueError for `student_settings` that the student's configuration does not have."""
        if self.student_settings is None:
            return
        config_class, _ = STUDENTS[self.student_type]
        try:
            settings = json.loads(self.student_settings)
        except ValueError as error:
            raise ValueError(
                f"student_settings is {self.student_settings!r}: expected JSON such as "
                f"'{{\"hidden_size\": 64}}' ({error})"
            ) from error
        if not isinstance(settings, dict):
            raise ValueError(f"student_settings is {self.student_settings!r}: expected names with values in braces")
        unknown = settings.keys() - {known.name for known in dataclasses.fields(config_class)}
        if unknown:
            raise ValueError(
                f"student_settings name {', '.join(sorted(unknown))}: expected settings of {config_class.__name__}; "
                "leave the others out"
            )


def build_student(
    arguments: StudentArguments, sasrec_settings: dict, num_items: int, labels: TeacherLabels | None
) -> EncoderForNextItem:
    """The saved model to start from, or a fresh one.

    Args:
        arguments: names the saved model, or the architecture of a fresh one.
        sasrec_settings: fields of `SASRecConfig` for a SASRec from scratch.
        num_items: size of the catalogue.
        labels: the teacher's labels, whose item embeddings `embedding_use` adds.

    Raises:
        ValueError: for a saved model that gradients do not train, unknown settings, and an `embedding_use` without
            labels.
    """
    if arguments.student is not None or arguments.student_type != "sasrec":
        defaults = {name: getattr(SASRecConfig(), name) for name in sasrec_settings}
        unused = [name for name, value in sasrec_settings.items() if value != defaults[name]]
        if unused:
            logger.warning("%s shape a SASRec from scratch and are not used here", ", ".join(unused))
    if arguments.student is not None:
        return _trained_student(arguments.student)
    config_class, model_class = STUDENTS[arguments.student_type]
    settings = dict(sasrec_settings)
    if arguments.student_type != "sasrec":
        settings = json.loads(arguments.student_settings or "{}")
    if arguments.embedding_use != "none":
        if labels is None:
            raise ValueError(
                f"embedding_use is {arguments.embedding_use!r} without teacher_labels, which have the embeddings: "
                "expected labels, or 'none'"
            )
        settings |= {
            "teacher_embedding_size": labels.embedding_size,
            "teacher_embedding_use": arguments.embedding_use,
            "ed_weight": arguments.ed_weight,
        }
    return model_class(config_class(num_items=num_items, **settings))


def _trained_student(name_or_path: str) -> EncoderForNextItem:
    model = load_recommender(name_or_path)
    if not isinstance(model, EncoderForNextItem):
        raise ValueError(f"{name_or_path} is a {type(model).__name__}: expected a SASRec, GRU4Rec or Caser")
    return model.train()


__all__ = ["STUDENTS", "StudentArguments", "build_student"]
