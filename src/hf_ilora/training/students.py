"""Students: the models that learn from a teacher."""

from hf_ilora.models.loading import load_recommender
from hf_ilora.models.next_item.configuration_caser import CaserConfig
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem

STUDENTS = {
    "sasrec": (SASRecConfig, SASRecForNextItem),
    "gru4rec": (GRU4RecConfig, GRU4RecForNextItem),
    "caser": (CaserConfig, CaserForNextItem),
}


def untrained_student(student_type: str, num_items: int, settings: dict) -> EncoderForNextItem:
    """A fresh model of a type of `STUDENTS`, with the settings of its configuration.

    Raises:
        ValueError: for an unknown type or setting.
    """
    if student_type not in STUDENTS:
        raise ValueError(f"student_type is {student_type!r}: expected one of {', '.join(STUDENTS)}")
    config_class, model_class = STUDENTS[student_type]
    unknown = settings.keys() - config_class.__dataclass_fields__.keys()
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: expected settings of {config_class.__name__}")
    return model_class(config_class(num_items=num_items, **settings))


def trained_student(name_or_path: str) -> EncoderForNextItem:
    """A saved model to train further.

    Raises:
        ValueError: for a model that gradients do not train, and as `load_recommender`.
    """
    model = load_recommender(name_or_path)
    if not isinstance(model, EncoderForNextItem):
        raise ValueError(f"{name_or_path} is a {type(model).__name__}: expected a SASRec, GRU4Rec or Caser")
    return model.train()


__all__ = ["STUDENTS", "trained_student", "untrained_student"]
