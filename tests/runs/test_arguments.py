"""parse_arguments: the errors of wrong configurations, and the order of YAML and command line."""

import dataclasses
import sys
import types
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal

import pytest
from transformers import TrainingArguments

from hf_ilora.runs.arguments import parse_arguments, read_config
from hf_ilora.runs.help_text import recipe_help


class Colour(Enum):
    RED = "red"


@dataclass
class DataArguments:
    data_dir: str = field(metadata={"help": "folder of the sequences"})
    min_interactions: int = field(default=3, metadata={"help": "interactions a user must have"})
    power: float = field(default=0.5, metadata={"help": "exponent"})
    masked: bool = field(default=True, metadata={"help": "mask seen items"})
    protocol: Literal["leave_one_out", "temporal_users"] = field(default="leave_one_out", metadata={"help": "split"})
    steps: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "steps"})
    title: str | None = field(default=None, metadata={"help": "title"})
    colour: Colour = field(default="red", metadata={"help": "colour"})


@dataclass
class ModelArguments:
    hidden_size: int = field(default=64, metadata={"help": "size"})

    def __post_init__(self):
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size is {self.hidden_size}, expected at least 1")


@pytest.fixture
def write_config(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.yaml")

    return write


def test_yaml_fills_every_dataclass_and_defaults_fill_the_rest(write_config):
    config = write_config("data_dir: there\nhidden_size: 8\nsteps: [5]\ntitle: null\nprotocol: temporal_users\n")
    data, model = parse_arguments((DataArguments, ModelArguments), [config])
    assert data == DataArguments("there", steps=[5], protocol="temporal_users")
    assert model == ModelArguments(hidden_size=8)


def test_command_line_overrides_yaml(write_config):
    config = write_config("data_dir: there\nhidden_size: 8\nmasked: true\n")
    options = ["--hidden_size", "16", "--no_masked", "--steps", "7", "8"]
    data, model = parse_arguments((DataArguments, ModelArguments), ["--config", config, *options])
    assert (data.data_dir, data.masked, data.steps, model.hidden_size) == ("there", False, [7, 8], 16)


def test_config_option_may_be_joined_with_its_value(write_config):
    config = write_config("hidden_size: 8\n")
    assert parse_arguments((ModelArguments,), [f"--config={config}"]) == (ModelArguments(hidden_size=8),)


def test_recipe_runs_without_yaml():
    (data,) = parse_arguments((DataArguments,), ["--data_dir", "here"])
    assert data == DataArguments("here")


def test_argv_defaults_to_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--data_dir", "here"])
    assert parse_arguments((DataArguments,)) == (DataArguments("here"),)


def test_required_field_in_neither_place_is_named(write_config):
    with pytest.raises(ValueError, match="required: --data_dir"):
        parse_arguments((DataArguments, ModelArguments), [write_config("hidden_size: 8\n")])


def test_unknown_key_names_the_file_and_the_close_match(write_config):
    config = write_config("data_dir: a\nmin_interaction: 5\n")
    with pytest.raises(ValueError, match=r"config\.yaml: unknown key 'min_interaction': did you mean min_interactions"):
        parse_arguments((DataArguments,), [config])


def test_unknown_key_without_a_close_match_lists_the_fields(write_config):
    with pytest.raises(ValueError, match=r"unknown key 'qqq': expected one of hidden_size"):
        parse_arguments((ModelArguments,), [write_config("qqq: 5\n")])


def test_unknown_option_names_the_close_match():
    with pytest.raises(ValueError, match=r"unknown option --hidden_siz: did you mean --hidden_size\?"):
        parse_arguments((ModelArguments,), ["--hidden_siz", "5"])
    with pytest.raises(ValueError, match=r"unknown option --data_dri=x: did you mean --data_dir\?"):
        parse_arguments((DataArguments,), ["--data_dri=x"])  # and not that --data_dir is missing


def test_stray_words_and_values_of_a_wrong_type_on_the_command_line_are_refused():
    with pytest.raises(ValueError, match=r"expected `--field value` on the command line, found 'extra'"):
        parse_arguments((ModelArguments,), ["--hidden_size", "5", "extra"])
    with pytest.raises(ValueError, match=r"--hidden_size.*invalid int value: 'five'"):
        parse_arguments((ModelArguments,), ["--hidden_size", "five"])


def test_options_may_be_written_with_hyphens():
    assert parse_arguments((ModelArguments,), ["--hidden-size", "5"]) == (ModelArguments(5),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("min_interactions: three", r"min_interactions expects int, found 'three' \(str\)"),
        ("min_interactions: 3.0", r"min_interactions expects int, found 3.0 \(float\)"),
        ("min_interactions: true", r"min_interactions expects int, found True \(bool\)"),
        ("power: high", r"power expects float, found 'high' \(str\)"),
        ("power: null", r"power expects float, found None"),
        ("masked: 1", r"masked expects bool, found 1 \(int\)"),
        ("masked: 'true'", r"masked expects bool, found 'true' \(str\)"),
        ("protocol: random", r"protocol expects Literal\['leave_one_out', 'temporal_users'\], found 'random'"),
        ("steps: 5", r"steps expects list\[int\], found 5"),
        ("steps: [1, a]", r"steps expects list\[int\], found \[1, 'a'\]"),
        ("title: 7", r"title expects str \| None, found 7 \(int\).*put quotes"),
        ("title: no", r"title expects str \| None, found False \(bool\): YAML reads yes, no"),
        ("colour: blue", r"colour expects Colour, found 'blue'"),
    ],
)
def test_wrong_type_says_expected_and_actual(write_config, line, message):
    with pytest.raises(ValueError, match=r"config\.yaml: " + message):
        parse_arguments((DataArguments,), [write_config(f"data_dir: a\n{line}\n")])


@pytest.mark.parametrize(("text", "value"), [("5e-5", 5e-5), ("5.0e-5", 5e-5), ("1e3", 1000.0), ("2", 2.0)])
def test_numbers_that_yaml_reads_as_text_become_floats(write_config, text, value):
    (data,) = parse_arguments((DataArguments,), [write_config(f"data_dir: a\npower: {text}\n")])
    assert data.power == value and isinstance(data.power, float)


def test_key_given_twice_is_an_error_with_its_name(write_config):
    with pytest.raises(ValueError, match=r"config\.yaml.*'hidden_size' is given twice"):
        parse_arguments((ModelArguments,), [write_config("hidden_size: 8\nhidden_size: 9\n")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("# only a comment\n", "found nothing"),
        ("- a\n- b\n", "found list"),
        ("hidden_size: [8\n", "not valid YAML"),
        ("? [8]\n: 1\n", "not valid YAML"),
        ("model:\n  hidden_size: 8\n", "unknown key 'model'"),
        ("on: 8\n", "unknown key True"),
    ],
)
def test_what_is_not_a_flat_mapping_of_fields_is_refused(write_config, text, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments((ModelArguments,), [write_config(text)])


def test_missing_file_is_refused(write_config):
    with pytest.raises(ValueError, match=r"configuration absent\.yaml not found: expected a file \(paths count from"):
        parse_arguments((ModelArguments,), ["absent.yaml"])
    with pytest.raises(ValueError, match="--config expects a YAML file"):
        parse_arguments((ModelArguments,), ["--config"])


@dataclass
class StudentArguments:
    hidden_size: int = field(default=64, metadata={"help": "size"})
    dropout: float = field(default=0.2, metadata={"help": "dropout"})


def test_later_configurations_override_earlier_ones_and_the_command_line_overrides_all(tmp_path):
    for name, text in (("a", "hidden_size: 8\ndropout: 0.5\n"), ("b", "hidden_size: 16\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    for words in ([a, b], [a, "--config", b], ["--config", a, f"--config={b}"]):
        (model,) = parse_arguments((StudentArguments,), words)
        assert (model.hidden_size, model.dropout) == (16, 0.5)
    (model,) = parse_arguments((StudentArguments,), [b, a, "--dropout", "0.1"])
    assert (model.hidden_size, model.dropout) == (8, 0.1)


def test_a_configuration_extends_others(tmp_path):
    for name, text in (
        ("base", "hidden_size: 8\ndropout: 0.5\n"),
        ("wide", f"extends: {tmp_path / 'base.yaml'}\nhidden_size: 16\n"),
        ("both", f"extends: ['{tmp_path / 'base.yaml'}', '{tmp_path / 'wide.yaml'}']\ndropout: 0.1\n"),
        ("first", f"extends: {tmp_path / 'second.yaml'}\n"),
        ("second", f"extends: {tmp_path / 'first.yaml'}\n"),
        ("number", "extends: 3\n"),
        ("mistake", f"extends: {tmp_path / 'wrong.yaml'}\n"),
        ("wrong", "hiden_size: 3\n"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    assert read_config(tmp_path / "wide.yaml", (StudentArguments,)) == {"hidden_size": 16, "dropout": 0.5}
    assert read_config(tmp_path / "both.yaml", (StudentArguments,)) == {"hidden_size": 16, "dropout": 0.1}
    for name, message in (
        ("first", r"first\.yaml extends .*second\.yaml extends .*first\.yaml: expected no cycle"),
        ("number", "extends expects names of configurations, found 3"),
        ("mistake", r"wrong\.yaml: unknown key 'hiden_size': did you mean hidden_size"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / f"{name}.yaml", (StudentArguments,))


@dataclass
class AssignmentArguments:
    ASSIGNMENTS: ClassVar[str] = "set"

    size: int = field(default=1, metadata={"help": "size"})
    set: list[str] | None = field(default=None, metadata={"help": "choices"})


def test_first_words_with_an_equals_sign_may_be_values_of_a_field(write_config):
    config = write_config("size: 3\n")
    for words in ([config, "a=b", "c.d=[1, 2]"], ["a=b", config, "c.d=[1, 2]"], [config, "--set", "a=b", "c.d=[1, 2]"]):
        (arguments,) = parse_arguments((AssignmentArguments,), words)
        assert (arguments.size, arguments.set) == (3, ["a=b", "c.d=[1, 2]"])
    with pytest.raises(ValueError, match="found a=b and --set: expected all of them in one place"):
        parse_arguments((AssignmentArguments,), [config, "a=b", "--set", "c=d"])
    with pytest.raises(ValueError, match="configuration a=b not found"):
        parse_arguments((ModelArguments,), ["a=b"])
    usage = recipe_help("show.py", "Shows.", (AssignmentArguments,), "show")
    assert usage.startswith("usage: show [CONFIG ...] [name=value ...] [--option")


def test_range_errors_of_a_dataclass_pass_through(write_config):
    with pytest.raises(ValueError, match="expected at least 1"):
        parse_arguments((ModelArguments,), [write_config("hidden_size: 0\n")])


def test_training_arguments_take_yaml_and_command_line(write_config, tmp_path):
    config = write_config(
        f"output_dir: {tmp_path}\nlearning_rate: 1e-3\neval_strategy: epoch\nseed: 5\nuse_cpu: true\n"
    )
    _, training = parse_arguments((ModelArguments, TrainingArguments), [config, "--seed", "6", "--report_to", "none"])
    assert (training.learning_rate, training.eval_strategy.value, training.seed) == (1e-3, "epoch", 6)
    with pytest.raises(ValueError, match=r"eval_strategy expects.*found False.*put quotes"):
        parse_arguments((TrainingArguments,), [write_config("eval_strategy: no\n")])


def test_read_config_does_not_need_the_required_fields(write_config):
    assert read_config(write_config("min_interactions: 4\n"), (DataArguments,)) == {"min_interactions": 4}


def test_fields_that_are_not_settable_are_unknown_keys(write_config):
    @dataclass
    class Derived:
        size: int = 1
        double: int = dataclasses.field(init=False, default=2)

    with pytest.raises(ValueError, match="unknown key 'double'"):
        parse_arguments((Derived,), [write_config("double: 4\n")])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (False, None)),
        ({"LOCAL_RANK": "0"}, (True, None)),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true"}, (False, "gloo")),
    ],
)
def test_launched_processes_without_an_accelerator_find_one_another(monkeypatch, environment, expected):
    from hf_ilora.runs import arguments

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    defaults = arguments._process_group_defaults((TrainingArguments,))
    assert (defaults.get("use_cpu", False), defaults.get("ddp_backend")) == expected
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert arguments._process_group_defaults((TrainingArguments,)) == {}


@dataclass
class ChoiceArguments:
    split: str = field(default="test", metadata={"help": "split", "choices": ("validation", "test")})
    order: str | None = field(default=None, metadata={"help": "order", "choices": ("first", "last")})
    splits: list[str] | None = field(default=None, metadata={"help": "splits", "choices": ("validation", "test")})


def test_choices_are_checked_on_the_command_line_and_in_the_yaml(write_config):
    (arguments,) = parse_arguments((ChoiceArguments,), [write_config("split: validation\norder: null\n")])
    assert (arguments.split, arguments.order) == ("validation", None)
    for option in ("--split", "--splits"):
        with pytest.raises(ValueError, match=rf"{option}: invalid choice: 'train' .*validation.*test"):
            parse_arguments((ChoiceArguments,), [option, "train"])
    for line in ("split: train", "splits: [test, train]"):
        with pytest.raises(ValueError, match=r"config\.yaml: splits? expects one of validation, test, found 'train'"):
            parse_arguments((ChoiceArguments,), [write_config(line + "\n")])


@dataclass
class PositionalArguments:
    POSITIONAL: ClassVar[str] = "models"

    models: list[str] = field(metadata={"help": "folders"})
    names: list[str] | None = field(default=None, metadata={"help": "names"})


def test_the_first_words_may_be_values_of_a_field(write_config):
    for words in (["a", "b"], ["--models", "a", "b"]):
        (arguments,) = parse_arguments((PositionalArguments,), [*words, "--names", "x", "y"])
        assert arguments.models == ["a", "b"] and arguments.names == ["x", "y"]
    (arguments,) = parse_arguments((PositionalArguments,), ["--config", write_config("models: [a]\n")])
    assert arguments.models == ["a"]
    with pytest.raises(ValueError, match="required: --models"):
        parse_arguments((PositionalArguments,), ["--names", "x"])
    assert recipe_help("show.py", "Shows.", (PositionalArguments,), "show").startswith(
        "usage: show MODEL ... [--option"
    )


def test_help_ends_the_program_with_success(monkeypatch, capsys):
    recipe = types.ModuleType("__main__", "Counts things.\n\n    python count.py --split test\n")
    recipe.__file__ = "count.py"
    monkeypatch.setitem(sys.modules, "__main__", recipe)
    monkeypatch.setattr(sys, "argv", ["/somewhere/count.py"])
    with pytest.raises(SystemExit) as end:
        parse_arguments((ChoiceArguments,), ["--split", "no", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "usage: count.py [CONFIG ...] [--option value ...]\n\nCounts things.\n\nExample:\n  python count"
    )
