"""Reads the settings of a recipe from YAML files and the command line into its dataclasses.

A recipe runs as ``recipe.py [CONFIG ...] [--field value ...]``, or with ``--config CONFIG``. CONFIG is a YAML file or
the name of one that ships with hf_ilora, such as ``ml-100k/sasrec``. The YAML is flat; its keys are the fields of the
dataclasses, and ``extends``, which names configurations whose settings come first. Later configurations override
earlier ones, and the command line overrides them all. Other paths count from the working directory.

If a dataclass names a list field as ``POSITIONAL``, the first words are that field's values: ``recipe.py VALUE ...
[--field ...]``. If it names one as ``ASSIGNMENTS``, those of the first words that have an equals sign are its values.
"""

import dataclasses
import difflib
import math
import os
import sys
import types
import typing
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from hf_ilora.runs.compile_locks import check_compile_locks
from hf_ilora.runs.help_text import assignments_field, positional_field, recipe_help
from hf_ilora.runs.processes import program_name
from hf_ilora_cli.shipped import CONFIG, PROMPT, find_file


def parse_arguments(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple:
    """Fills the dataclasses of a recipe from its YAML file and the command line.

    `--help` prints the options and ends the program; `--help-all` prints those of `TrainingArguments` too.

    Args:
        dataclass_types: the dataclasses, `transformers.TrainingArguments` among them where the recipe trains. Each
            field name belongs to one of them only. `metadata={"choices": ...}` or a `Literal` restricts a field.
        argv: the command line without the program's name; None reads `sys.argv`.

    Returns:
        One instance per dataclass, in the order given.

    Raises:
        ValueError: a key or option is unknown, given twice or of the wrong type, a required field is missing, or the
            YAML cannot be read. Range errors come from the dataclasses themselves.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help-all"} & set(words):
        recipe = sys.modules["__main__"]
        everything = "--help-all" in words
        print(recipe_help(recipe.__file__, recipe.__doc__, dataclass_types, program_name(), everything), end="")
        raise SystemExit(0)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        check_compile_locks()  # before TrainingArguments, which let DeepSpeed compile
    positional = positional_field(dataclass_types)
    if positional is not None and words and not words[0].startswith("-"):
        words.insert(0, f"--{positional}")
    config_files, options = _take_config_files(words, assignments_field(dataclass_types))
    parser = _RecipeParser(dataclass_types, prog=program_name(), allow_abbrev=False, add_help=False)
    known = {name for action in parser._actions for name in action.option_strings}
    for word in options:  # before argparse, which would first complain that the option meant here is missing
        if word.startswith("--") and word.partition("=")[0] not in known:
            fields = [f"--{name}" for name in _fields(dataclass_types)]
            raise ValueError(f"unknown option {word}{_similar(word.partition('=')[0], fields)}")
    settings = read_configs(config_files, dataclass_types)
    parser.set_defaults(**(_process_group_defaults(dataclass_types) | settings))
    for action in parser._actions:  # argparse has no public way to say that a required option has its value
        action.required = action.required and action.dest not in settings
    *arguments, rest = parser.parse_args_into_dataclasses(
        options, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(
            f"expected `--field value` on the command line, found {' '.join(rest)!r}: see {parser.prog} --help"
        )
    return tuple(arguments)


def prompt_path(word: str) -> Path:
    """The path of a prompt file.

    Args:
        word: a setting `prompt_file`: a path, or the name of a shipped prompt file such as `movies`.

    Raises:
        ValueError: neither exists.
    """
    return find_file(PROMPT, word)


def read_config(config_file: str | Path, dataclass_types: Sequence[type]) -> dict[str, object]:
    """Reads a YAML file whose keys are fields of the dataclasses, and checks keys and types.

    Args:
        config_file: a flat YAML mapping, UTF-8: a path, or the name of a shipped one such as `ml-100k/sasrec`. Its key
            `extends` names one or several other such files, whose settings it overrides.
        dataclass_types: the dataclasses that its keys belong to.

    Returns:
        The values by field name. Numbers that YAML reads as text (`5e-5`) are floats where a float is expected.

    Raises:
        ValueError: a file is missing, not a flat mapping, extends itself, or contains an unknown key, a key twice or a
            wrong type.
    """
    settings = {}
    for file, own in config_contents(config_file):
        settings |= checked_settings(own, dataclass_types, str(file))
    return settings


def read_configs(config_files: Sequence[str | Path], dataclass_types: Sequence[type]) -> dict[str, object]:
    """The settings of several YAML files; later files override earlier ones. See `read_config`."""
    settings = {}
    for config_file in config_files:
        settings |= read_config(config_file, dataclass_types)
    return settings


def config_contents(config_file: str | Path, within: tuple[Path, ...] = ()) -> list[tuple[Path, dict]]:
    """The settings of a YAML file and of the files that it extends, file by file; later ones override earlier ones.

    Args:
        config_file: a path, or the name of a shipped one.
        within: the files that extend this one, the outermost first.

    Raises:
        ValueError: a file is missing, not a mapping, extends itself, or contains a key twice.
    """
    file = find_file(CONFIG, str(config_file))
    try:
        settings = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise ValueError(f"{file}: expected lines of `field: value`, found {found}")
    extended = settings.pop("extends", [])
    extended = [extended] if isinstance(extended, str) else extended
    if not isinstance(extended, list) or not all(isinstance(name, str) for name in extended):
        raise ValueError(f"{file}: extends expects names of configurations, found {extended!r}")
    chain = (*within, file)
    if file in within:
        raise ValueError(f"{' extends '.join(map(str, chain))}: expected no cycle; remove one `extends`")
    return [*(content for name in extended for content in config_contents(name, chain)), (file, settings)]


def checked_settings(settings: dict, dataclass_types: Sequence[type], source: str) -> dict[str, object]:
    """Checks the keys and values of settings, such as those of a YAML file.

    Args:
        settings: the values by field name.
        dataclass_types: the dataclasses that the fields belong to.
        source: where the settings come from, for error messages.

    Returns:
        The settings, with numbers that YAML reads as text (`5e-5`) as floats where a float is expected.

    Raises:
        ValueError: a key is unknown, or a value has a wrong type or is not among the field's choices.
    """
    fields, choices, checked = _fields(dataclass_types), _choices(dataclass_types), {}
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(f"{source}: unknown key {name!r}{_similar(str(name), list(fields))}")
        try:
            checked[name] = _checked(value, fields[name])
        except TypeError:
            raise ValueError(
                f"{source}: {name} expects {_type_name(fields[name])}, found {value!r} ({type(value).__name__})"
                f"{_remedy(value, fields[name])}"
            ) from None
        for each in value if isinstance(value, list) else [value]:
            if name in choices and each is not None and each not in choices[name]:
                raise ValueError(f"{source}: {name} expects one of {', '.join(choices[name])}, found {each!r}")
    return checked


class _RecipeParser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message}: see {self.prog} --help")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML lets the last of two equal keys win in silence; here the second is an error."""

    def construct_mapping(self, node, deep=False):
        mapping = super().construct_mapping(node, deep)  # raises on a key that cannot be one
        keys = [self.construct_object(key_node, deep=True) for key_node, _ in node.value]
        for key in mapping:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice: keep one", problem_mark=node.start_mark
                )
        return mapping


def _take_config_files(argv: list[str], assignments: str | None) -> tuple[list[str], list[str]]:
    """Splits the command line into the configuration files and the options.

    Args:
        argv: the command line.
        assignments: the field of `ASSIGNMENTS`, if there is one.
    """
    files, options, values = [], [], []
    while argv and not argv[0].startswith("-"):
        word = argv.pop(0)
        (values if assignments is not None and "=" in word else files).append(word)
    if values:
        options += [f"--{assignments}", *values]
        if any(word.partition("=")[0] == f"--{assignments}" for word in argv):
            raise ValueError(f"found {values[0]} and --{assignments}: expected all of them in one place")
    while argv:
        word = argv.pop(0)
        if word == "--config":
            if not argv:
                raise ValueError("--config expects a YAML file after it, found the end of the command line")
            files.append(argv.pop(0))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            options.append(word)
    return files, options


def _process_group_defaults(dataclass_types: Sequence[type]) -> dict[str, object]:
    """The defaults of TrainingArguments with which the processes of a launch find one another without an accelerator.

    `accelerate launch` tells the processes it starts to use DeepSpeed, but not to use the CPU. Without these defaults,
    each process would take itself for the only one (world size 1) and read all of the data.
    """
    if "LOCAL_RANK" not in os.environ:
        return {}  # one process, and no need to import torch
    from transformers import TrainingArguments

    from hf_ilora.devices import uses_accelerator

    trains = any(issubclass(dataclass_type, TrainingArguments) for dataclass_type in dataclass_types)
    if not trains or uses_accelerator():
        return {}
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return {"ddp_backend": "gloo"}  # DeepSpeed is not used at all where use_cpu is set
    return {"use_cpu": True}


def _fields(dataclass_types: Sequence[type]) -> dict[str, object]:
    """The type of every field that can be set, by field name."""
    fields = {}
    for dataclass_type in dataclass_types:
        hints = typing.get_type_hints(dataclass_type)
        fields.update({field.name: hints[field.name] for field in dataclasses.fields(dataclass_type) if field.init})
    return fields


def _choices(dataclass_types: Sequence[type]) -> dict[str, Sequence[str]]:
    """The choices that fields give in their metadata, by field name."""
    fields = [field for dataclass_type in dataclass_types for field in dataclasses.fields(dataclass_type)]
    return {field.name: field.metadata["choices"] for field in fields if "choices" in field.metadata}


def _checked(value: object, expected: object) -> object:
    """The value as the expected type; TypeError if it does not fit."""
    origin, members = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        for member in members:
            try:
                return _checked(value, member)
            except TypeError:
                continue
    elif origin is typing.Literal:
        if any(value == member and type(value) is type(member) for member in members):
            return value
    elif origin is list and isinstance(value, list):
        return [_checked(element, members[0]) for element in value]
    elif expected is float:
        return _as_float(value)
    elif isinstance(expected, type) and issubclass(expected, Enum):
        if value in [member.value for member in expected]:
            return value
    elif expected in (bool, int, str, dict, types.NoneType) or origin is dict:
        kind = origin or expected
        if type(value) is kind:  # not isinstance: to Python True is an int, to a user it is not
            return value
    raise TypeError


def _as_float(value: object) -> float:
    if type(value) in (int, float):
        return float(value)
    if type(value) is str:  # YAML 1.1 reads 5e-5 and 1e3 as text: they lack the point
        try:
            number = float(value)
        except ValueError:
            raise TypeError from None
        if math.isfinite(number):
            return number
    raise TypeError


def _type_name(expected: object) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def _remedy(value: object, expected: object) -> str:
    if "list[" in str(expected) and not isinstance(value, list):
        return f": put brackets around it, as in [{value}]"
    if isinstance(value, bool):
        return ": YAML reads yes, no, on and off as true and false, so put quotes around a word"
    if isinstance(value, int | float):
        return ": put quotes around it if text is meant"
    return ""


def _similar(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f": did you mean {' or '.join(close)}?" if close else f": expected one of {', '.join(sorted(names))}"
