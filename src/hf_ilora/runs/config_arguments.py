"""Turns the fields of a model's configuration into a dataclass that recipes can parse, so they are declared once."""

import dataclasses
import re
import types
import typing

from transformers import PreTrainedConfig


def config_arguments(config_class: type[PreTrainedConfig], exclude: tuple[str, ...] = ()) -> type:
    """A dataclass with the fields that `config_class` and its bases below `PreTrainedConfig` declare.

    Args:
        config_class: a configuration. Its docstring and those of its bases have an `Args:` section of `name: text`
            entries, which become the help texts.
        exclude: fields that the recipe fills from the data, such as `num_items`.

    Returns:
        A dataclass; `config_class(**dataclasses.asdict(instance), ...)` builds the configuration.
    """
    classes = [part for part in reversed(config_class.__mro__) if part not in PreTrainedConfig.__mro__]
    help_texts = {name: text for part in classes for name, text in _argument_texts(part.__doc__ or "").items()}
    annotations = {name: annotation for part in classes for name, annotation in part.__annotations__.items()}
    fields = []
    for name, annotation in annotations.items():
        if name in exclude or typing.get_origin(annotation) is typing.ClassVar:
            continue
        declared = config_class.__dataclass_fields__[name]
        defaults = {"default": declared.default, "default_factory": declared.default_factory}
        defaults = {kind: value for kind, value in defaults.items() if value is not dataclasses.MISSING}
        field = dataclasses.field(**defaults, metadata={"help": help_texts.get(name, "")})
        fields.append((name, _parsable(annotation), field))
    return dataclasses.make_dataclass(
        config_class.__name__.replace("Config", "Arguments"),
        fields,
        namespace={"__doc__": f"The model ({config_class.__name__})."},
    )


def _parsable(annotation):
    """The annotation with `float | int` as `float`: a strict configuration needs the former to accept 0."""
    if isinstance(annotation, types.UnionType):
        kinds = set(typing.get_args(annotation))
        if {float, int} <= kinds:
            return float | None if types.NoneType in kinds else float
    return annotation


def _argument_texts(docstring: str) -> dict[str, str]:
    arguments = docstring.partition("Args:")[2].partition("\n\n")[0]
    entries = re.split(r"\n        (?=\w+:)", arguments)  # entries are indented by eight spaces, their text by more
    pairs = (entry.partition(":")[::2] for entry in entries if ":" in entry)
    return {name.strip(): " ".join(text.split()).replace("%", "%%") for name, text in pairs}
