"""The configuration that all gradient-trained models share: catalogue, head, losses and teacher embeddings."""

import functools
import math
from collections.abc import Callable, Mapping

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

TASK = "sequential-recommendation"
PADDING_ITEM_ID = 0
IGNORED_LABEL = -100  # the label that cross-entropy ignores
# The fields about a language model's item embeddings, which are removed when the embeddings are folded in.
TEACHER_FIELDS = ("teacher_embedding_size", "ed_weight", "teacher_embedding_use")

_CHOICES = {
    "initialization": ("normal", "reference"),
    "loss_type": ("cross_entropy", "sampled_softmax", "gbce", "bce"),
    "negative_sharing": ("batch", "position"),
    "teacher_embedding_use": ("input", "input_and_head"),
}


class _RegisteredPipelines(dict):
    """The `custom_pipelines` of a configuration whose pipeline hf_ilora has registered.

    transformers infers the task of `pipeline(model=...)` from the only key. If it found the task among the keys, it
    would ask to trust the code in the model's folder, so `in` always answers False.
    """

    def __contains__(self, task: object) -> bool:
        return False


def strict_config(config_class: type) -> type:
    """Apply `@strict`, and raise wrong values as a ValueError with the message of the check instead of a wrapper error.

    Values that replace saved ones in `from_dict` and `from_pretrained` are checked like those of a new configuration.
    """
    config_class = strict(config_class)
    for name in ("__init__", "__setattr__", "validate"):
        setattr(config_class, name, _raising_value_errors(getattr(config_class, name)))

    is_of_model = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")  # code that a model brought along
    if not is_of_model:
        config_class.custom_pipelines = _RegisteredPipelines({TASK: {}})

    @functools.wraps(PreTrainedConfig.from_dict.__func__)
    def from_dict(cls, config_dict, **kwargs):
        if not is_of_model:
            config_dict = {name: value for name, value in config_dict.items() if name != "custom_pipelines"}
        made = super(config_class, cls).from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made  # a tuple with return_unused_kwargs
        config.validate()  # transformers sets the replaced values without checking them
        return made

    config_class.from_dict = classmethod(from_dict)
    return config_class


def _raising_value_errors(method: Callable) -> Callable:
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error
        except (AttributeError, TypeError) as error:  # from fields of transformers such as dtype or id2label
            raise ValueError(f"{type(self).__name__} was given a value of a wrong type: {error}") from error

    return checked


def check_config(config: PreTrainedConfig, config_class: type) -> None:
    """Raise a ValueError unless a model of `config_class` can be built from a configuration, even a modified one."""
    # Compares the model type, not the class: code that comes with a model defines its own class.
    if not isinstance(config, PreTrainedConfig) or config.model_type != config_class.model_type:
        raise ValueError(f"the configuration is a {type(config).__name__}: expected a {config_class.__name__}")
    config.validate()
    catalogue_size(config)


def catalogue_size(config: PreTrainedConfig) -> int:
    """Return `num_items` of a configuration; raise a ValueError if it is None, since a model needs it."""
    if config.num_items is None:
        raise ValueError(
            f"{type(config).__name__}.num_items is None: expected the size of the catalogue, as in SequenceDatasets"
        )
    return config.num_items


def check_finite(config: PreTrainedConfig) -> None:
    """Raise a ValueError for a field that is NaN or infinite: both pass comparisons that should refuse them."""
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}: expected a finite number")


@strict_config
class NextItemConfig(PreTrainedConfig):
    r"""Catalogue, scores, training loss and teacher embeddings of a next-item model.

    Args:
        num_items: size of the catalogue; item ids run 1..num_items and 0 is padding.
        hidden_size: width of the item embeddings and of the user embedding.
        max_length: number of newest items the model reads.
        hidden_dropout: dropout on the embeddings, and on the hidden states as each model says.
        initializer_range: standard deviation of the normal initialisation.
        initialization: "normal" (all tables and layers, unless the model says otherwise) or "reference" (as in the
            programs of LLaRA, iLoRA and DLLM2Rec: a normal item table, every other layer as PyTorch initialises it).
        tie_word_embeddings: score items with the input embedding table instead of a separate one.
        head_bias: add a learned bias per item to the scores.
        repeat_bias: learn one number that is added to the scores of the last `max_length` items, so that the hidden
            states need not learn whether users come back to an item. It needs "cross_entropy", or "sampled_softmax"
            with negatives that the batch shares; the seen items then compete with these negatives.
        score_temperature: `None` scores by dot product; a number scores by cosine similarity divided by it.
        loss_type: "cross_entropy" (the whole catalogue), "sampled_softmax", "gbce" or "bce".
        num_negatives: negatives drawn per training step ("batch") or per position ("position").
        negative_sharing: whether one draw of negatives serves the whole batch or each position has its own.
        popularity_power: negatives are drawn in proportion to item count ** power; 0 draws uniformly.
        logq_correction: subtract log(num_negatives x q) from the scores of the sampled softmax's negatives, where q is
            the probability of drawing them. Its gradient then approaches that of the full softmax as the number of
            negatives grows. Other losses ignore it.
        gbce_calibration: t of gBCE (gSASRec, RecSys 2023, eq. 15): 0 is plain BCE, 1 is fully calibrated.
        teacher_embedding_size: size of a language model's item embeddings, which are added to the item embeddings
            through a projection, until `fold_teacher_embeddings`; `None` adds nothing.
        ed_weight: weight of the projected teacher embeddings (DLLM2Rec, section 4.3).
        teacher_embedding_use: "input" adds them to the embeddings that the model reads (as in DLLM2Rec),
            "input_and_head" also to the tied table that scores.

    Source: the losses are in `next_item_losses.py`, the embeddings in `teacher_embeddings.py`.
    """

    keys_to_ignore_at_inference = ["last_hidden_state", "user_embedding", "loss_parts", "best_items"]

    num_items: int | None = None
    hidden_size: int = 64
    max_length: int = 50
    hidden_dropout: float | int = 0.2
    initializer_range: float = 0.02
    initialization: str = "normal"
    tie_word_embeddings: bool = True
    head_bias: bool = False
    repeat_bias: bool = False
    score_temperature: float | int | None = None
    loss_type: str = "cross_entropy"
    num_negatives: int = 256
    negative_sharing: str = "batch"
    popularity_power: float | int = 0.0
    logq_correction: bool = True
    gbce_calibration: float | int = 0.75
    teacher_embedding_size: int | None = None
    ed_weight: float | int = 0.2
    teacher_embedding_use: str = "input"
    pad_token_id: int | None = PADDING_ITEM_ID

    @property
    def user_embedding_size(self) -> int:
        """Size of the user embedding that the head scores items with."""
        return self.hidden_size

    def validate_architecture(self) -> None:
        """Check the ranges of all fields; `@strict_config` calls this after the type checks.

        Raises:
            ValueError: naming the field, its value and what it may be.
        """
        check_finite(self)
        if self.num_items is not None and self.num_items < 1:
            raise ValueError(f"num_items is {self.num_items}: expected the size of the catalogue, at least 1")
        self.check_at_least_one("hidden_size", "max_length", "num_negatives")
        self.check_probabilities("hidden_dropout")
        for name in ("initializer_range", "popularity_power", "ed_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 0")
        if not 0 <= self.gbce_calibration <= 1:
            raise ValueError(f"gbce_calibration is {self.gbce_calibration}: expected a number in [0, 1]")
        if self.score_temperature is not None and self.score_temperature <= 0:
            raise ValueError(f"score_temperature is {self.score_temperature}: expected a positive number or None")
        self.check_choices(_CHOICES)
        shares_softmax = self.loss_type == "sampled_softmax" and self.negative_sharing == "batch"
        if self.repeat_bias and self.loss_type != "cross_entropy" and not shares_softmax:
            raise ValueError(
                f"repeat_bias with loss_type {self.loss_type!r} and negative_sharing {self.negative_sharing!r}: "
                "expected cross_entropy, or sampled_softmax with negative_sharing 'batch', where the seen items "
                "compete; switch one of them off"
            )
        if self.teacher_embedding_size is not None:
            self.check_at_least_one("teacher_embedding_size")
            if self.teacher_embedding_use == "input_and_head" and not self.tie_word_embeddings:
                raise ValueError(
                    "teacher_embedding_use is 'input_and_head' with a head of its own (tie_word_embeddings False): "
                    "expected a tied head, or 'input'"
                )
        if self.pad_token_id != PADDING_ITEM_ID:
            raise ValueError(
                f"pad_token_id is {self.pad_token_id}: expected {PADDING_ITEM_ID}, since item ids start at 1"
            )

    def check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")

    def check_probabilities(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a probability in [0, 1)")

    def check_choices(self, choices_of: Mapping[str, tuple[str, ...]]) -> None:
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")


__all__ = [
    "IGNORED_LABEL",
    "PADDING_ITEM_ID",
    "TEACHER_FIELDS",
    "NextItemConfig",
    "check_config",
    "check_finite",
    "strict_config",
]
