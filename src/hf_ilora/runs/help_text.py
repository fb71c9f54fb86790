"""Renders what `--help` of a recipe prints.

The text depends on the recipe alone, not on the machine or the terminal, so that it can be rendered beforehand:
`hf_ilora_cli` ships it, and answers `--help` without importing torch.
"""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from transformers import TrainingArguments

from hf_ilora_cli.commands import COMMANDS
from hf_ilora_cli.recipe_start import docstring_example
from hf_ilora_cli.shipped import CONFIG, LAUNCH, shipped_folder, shipped_names

_WIDTH = 100
_HELP_COLUMN = 32
_TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON", bool: "[true|false]"}


def recipe_help(
    recipe_file: str | Path,
    docstring: str,
    dataclass_types: Sequence[type],
    program: str,
    everything: bool = False,
) -> str:
    """The help text of a recipe.

    Args:
        recipe_file: file of the recipe.
        docstring: docstring of the recipe. Its first paragraph is the summary; its first indented block is the example.
        dataclass_types: the dataclasses of the recipe's options. The first sentence of a docstring titles a group.
        program: the name of the program in the text. A command of `hf-ilora` has its own example.
        everything: whether to show all of `transformers.TrainingArguments`, not only the fields that ours declare.
    """
    name = Path(recipe_file).stem
    command = next((command for command in COMMANDS.values() if command.program == program), None)
    positional = positional_field(dataclass_types)
    first = "[CONFIG ...]" if positional is None else f"{positional.upper().removesuffix('S')} ..."
    if assignments_field(dataclass_types) is not None:
        first += " [name=value ...]"
    parts = [f"usage: {program} {first} [--option value ...]", _wrapped(docstring.partition("\n\n")[0], 0)]
    parts.append(f"Example:\n{docstring_example(docstring) if command is None else _wrapped_command(command.example)}")
    parts.append(_about_configurations(name, "CONFIG" if positional is None else "The value of --config"))
    parts += [_group(title, lines) for title, lines in _option_groups(dataclass_types, everything)]
    if command is not None and (command.launched or command.may_be_launched):
        parts.append(_group("How to launch", _launch_options()))
    parts.append(_group("General", _general_options(dataclass_types, everything)))
    return "\n\n".join(parts) + "\n"


def positional_field(dataclass_types: Sequence[type]) -> str | None:
    """The field whose values may be the first words of the command line, without `--field`; None if there is none."""
    return next((vars(each)["POSITIONAL"] for each in dataclass_types if "POSITIONAL" in vars(each)), None)


def assignments_field(dataclass_types: Sequence[type]) -> str | None:
    """The field that takes the first words with an equals sign, without `--field`; None if there is none."""
    return next((vars(each)["ASSIGNMENTS"] for each in dataclass_types if "ASSIGNMENTS" in vars(each)), None)


def _wrapped(text: str, indent: int) -> str:
    margin = " " * indent
    return textwrap.fill(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=margin,
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped_command(command: str) -> str:
    lines = textwrap.wrap(command, _WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(("  " if number == 0 else "      ") + line for number, line in enumerate(lines))


def _about_configurations(recipe_name: str, subject: str) -> str:
    """Explains `subject`, such as CONFIG, and lists the shipped configurations whose first line names the recipe."""
    text = (
        f"{subject} is a YAML file of options, or the name of one that ships with hf_ilora. Of several, later ones "
        "override earlier ones, and options on the command line override them all. All other paths in it count from "
        "the working directory."
    )
    folder = shipped_folder(CONFIG)
    shipped = [
        name
        for name in shipped_names(CONFIG)
        if (folder / f"{name}{CONFIG.suffix}").read_text(encoding="utf-8").startswith(f"# recipes/{recipe_name}.py")
    ]
    return _wrapped(text, 0) + ("\n" + _wrapped(f"Shipped: {', '.join(shipped)}.", 0) if shipped else "")


def _option_groups(dataclass_types: Sequence[type], everything: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """Titles of the groups, each with the options and their help."""
    required, groups, rest = [], [], []
    for dataclass_type in dataclass_types:
        shown, folded = _declared_fields(dataclass_type)
        options = []
        for fields, place in ((shown, options), (folded, rest)):
            for field in fields:
                (required if _is_required(dataclass_type, field) else place).append(_option(dataclass_type, field))
        groups.append((_title(dataclass_type), options))
    if everything:
        groups.append(("The rest of transformers.TrainingArguments", rest))
    return [(title, options) for title, options in [("What you must give", required), *groups] if options]


def _declared_fields(dataclass_type: type) -> tuple[list[dataclasses.Field], list[dataclasses.Field]]:
    """The fields that our classes declare (new ones before overrides), and those of `TrainingArguments` alone."""
    fields = [field for field in dataclasses.fields(dataclass_type) if field.init]
    if not issubclass(dataclass_type, TrainingArguments):
        return fields, []
    ours = {name for part in dataclass_type.__mro__ for name in _annotations_of(part)}
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    declared = [field for field in fields if field.name in ours]
    declared.sort(key=lambda field: field.name in inherited)  # stable: each half keeps its order
    return declared, [field for field in fields if field.name not in ours]


def _annotations_of(part: type) -> dict:
    """The annotations of a class that extends TrainingArguments; none for the classes below it."""
    return inspect.get_annotations(part) if part not in TrainingArguments.__mro__ else {}


def _is_required(dataclass_type: type, field: dataclasses.Field) -> bool:
    if issubclass(dataclass_type, TrainingArguments) and field.name == "output_dir":
        return True  # optional to transformers, not to a recipe
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _title(dataclass_type: type) -> str:
    """The first sentence of the docstring, without its period."""
    return re.split(r"[.;:](?:\s|$)", " ".join(dataclass_type.__doc__.split()), maxsplit=1)[0]


def _option(dataclass_type: type, field: dataclasses.Field) -> tuple[str, str]:
    """The spelling of an option, and its help text with the default."""
    kind = typing.get_type_hints(dataclass_type)[field.name]
    option = f"--{field.name} {_metavar(kind, field)}"
    if field.default is True and kind is bool:
        option += f", --no_{field.name}"
    help_text = field.metadata.get("help")
    if help_text is None and issubclass(dataclass_type, TrainingArguments):  # an override has no help of its own
        help_text = TrainingArguments.__dataclass_fields__[field.name].metadata.get("help")
    help_text = " ".join((help_text or "").replace("%%", "%").split()).removesuffix(".")
    default = None if _is_required(dataclass_type, field) else _default(field)
    if default is None or (default == "none" and "default" in help_text):
        return option, help_text
    return option, f"{help_text} (default: {default})".strip()


def _metavar(kind: object, field: dataclasses.Field) -> str:
    """The values of an option: its choices or its type."""
    members = [member for member in typing.get_args(kind) if member is not types.NoneType]
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        others = [member for member in members if member is not str]
        return _metavar(others[0] if others else str, field)  # as HfArgumentParser reads a union with text
    if origin is list or kind is list:
        value = _metavar(members[0], field)
        return f"{value} [{value} ...]"
    if "choices" in field.metadata:
        return _braced(field.metadata["choices"])
    if origin is typing.Literal:
        return _braced(members)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _braced(member.value for member in kind)
    kind = origin or kind
    return _TYPE_NAMES.get(kind, kind.__name__)


def _braced(choices) -> str:
    return "{" + ",".join(map(str, choices)) + "}"


def _default(field: dataclasses.Field) -> str | None:
    """The default in words, the same on every machine; None for a field without one."""
    if field.default is not dataclasses.MISSING:
        return _in_words(field.default)
    if field.default_factory is dataclasses.MISSING:
        return None
    factory = field.default_factory
    if factory in (list, dict) or factory.__name__ == "<lambda>":
        return _in_words(factory())
    return f"{factory.__module__}.{factory.__name__}()"  # such as uses_cuda, which depends on the machine


def _in_words(value: object) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join(map(_in_words, value)) or "none"
    if value is None or value == "":
        return "none"
    return str(value)


def _launch_options() -> list[tuple[str, str]]:
    return [
        (
            "--launch NAME",
            f"accelerate configuration: a YAML file, or one of the shipped {', '.join(shipped_names(LAUNCH))} "
            "(default: single_gpu where torch sees an accelerator, else cpu; with --num_processes ddp or multi_cpu)",
        ),
        ("--num_processes INT", "number of processes (default: that of the configuration)"),
    ]


def _general_options(dataclass_types: Sequence[type], everything: bool) -> list[tuple[str, str]]:
    options = [
        ("--config CONFIG", "the configuration, where it is not the first word"),
        ("--debug", "show the traceback of an error"),
        ("--help", "show this text"),
    ]
    if not everything and any(issubclass(each, TrainingArguments) for each in dataclass_types):
        options.append(
            (
                "--help-all",
                "show the rest of transformers.TrainingArguments too, such as --num_train_epochs, --max_steps, --seed, "
                "--gradient_accumulation_steps and --bf16",
            )
        )
    return options


def _group(title: str, options: list[tuple[str, str]]) -> str:
    lines = [f"{title}:"]
    for option, help_text in options:
        wrapped = _wrapped(help_text, _HELP_COLUMN)
        if len(option) + 4 > _HELP_COLUMN:
            spellings = [f"  {option}"] if len(option) < _WIDTH - 1 else [f"  {one}" for one in option.split(", ")]
            lines += [*spellings, *([wrapped] if wrapped else [])]
        else:
            lines.append(f"  {option}".ljust(_HELP_COLUMN) + wrapped[_HELP_COLUMN:])
    return "\n".join(line.rstrip() for line in lines)
