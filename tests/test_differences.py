"""docs/differences.md names options that exist, and defaults as they are."""

import dataclasses
import inspect
import re

import pytest
import yaml

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    DistillationArguments,
    GRU4RecConfig,
    GRU4RecForNextItem,
    ILoraConfig,
    ILoraTrainingArguments,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
    build_sequences,
)
from hf_ilora.runs.recipe_files import load_recipe
from tests.paths import PROJECT, RECIPES

PAGE = (PROJECT / "docs" / "differences.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
NEXT_ITEM = (SASRecConfig, NextItemTrainingArguments)
# The classes, functions and recipes whose options the last column of a table names.
OPTIONS_OF = {
    "SASRec": NEXT_ITEM,
    "GRU4Rec and Caser": (GRU4RecConfig, CaserConfig),
    "iLoRA": (ILoraConfig, ILoraTrainingArguments, "train_ilora"),
    "DLLM2Rec": (*NEXT_ITEM, DistillationArguments, "label_with_teacher", "distill_sasrec"),
    "Data": (*NEXT_ITEM, build_sequences),
    "Evaluation": (*NEXT_ITEM, ILoraTrainingArguments, "evaluate_ilora"),
}
OPTION = re.compile(r"`(\w+)(?:(?:=|: )([^`]+))?`")
NO_OPTION = re.compile(r"of `\w+`|`(?:convert|load)_\w+`")  # "`learning_rate` of `ILoraTrainingArguments`"; functions


def rows(section):
    """The cells of each row of the section's table, without its head."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def restoring(section):
    """(row, option, value as text or "") for every option in the last column."""
    return [
        (cells[0], name, value)
        for cells in rows(section)
        for name, value in OPTION.findall(NO_OPTION.sub("", cells[-1]))
    ]


def option_names(source):
    if isinstance(source, str):
        classes = load_recipe(RECIPES / f"{source}.py").ARGUMENTS
        return {field.name for each in classes for field in dataclasses.fields(each)}
    if inspect.isclass(source):
        return {field.name for field in dataclasses.fields(source)}
    return set(inspect.signature(source).parameters)


@pytest.mark.parametrize("section", OPTIONS_OF)
def test_every_option_that_restores_something_exists(section):
    found = restoring(section)
    assert len(found) > 3  # the page has such options
    assert all(len(cells) == 5 and all(cells) for cells in rows(section))
    assert {name for _, name, _ in found} <= set().union(*map(option_names, OPTIONS_OF[section]))


@pytest.fixture(scope="module")
def published():
    """The names that the code at the end of the page defines, for 40 items."""
    settings = {}

    def sequences_of(*_, **given):
        settings.update(given)
        return type("Sequences", (), {"num_items": 40})

    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    code = code.replace(" = build_sequences(", " = sequences_of(")
    scope = {"interactions": None, "items": None, "sequences_of": sequences_of}
    exec(code, scope)
    assert settings and settings.keys() <= option_names(build_sequences)
    return scope


def test_the_code_builds_the_published_models(published):
    sasrec = SASRecForNextItem(published["config"])
    assert {"model.layers.0.output_norm.weight", "head.bias"} <= sasrec.state_dict().keys()
    gru4rec = GRU4RecForNextItem(published["gru4rec"])
    assert gru4rec.head.weight.shape == (41, 64) and gru4rec.model.dropout.p == 0
    caser = CaserForNextItem(published["caser"])
    assert [filters.weight.shape for filters in caser.model.horizontal_filters] == [(16, 64, n) for n in (2, 3, 4)]
    assert caser.model.vertical_filters.weight.shape == (1, 10) and caser.head.weight.shape == (41, 64 + 48)


@pytest.mark.parametrize(
    ("section", "row_prefix", "names"),
    [
        ("SASRec", "", ("config", "arguments")),
        ("GRU4Rec and Caser", "GRU4Rec", ("gru4rec",)),
        ("GRU4Rec and Caser", "Caser", ("caser",)),
    ],
)
def test_the_code_has_the_values_of_the_tables(published, section, row_prefix, names):
    stated = {}
    for row, name, value in restoring(section):
        if value and row.startswith(row_prefix):
            stated.setdefault(name, []).append(yaml.safe_load(value))
    assert len(stated) > 2
    for name, values in stated.items():
        (owner,) = (published[each] for each in names if hasattr(published[each], name))
        assert getattr(owner, name) in values, name


def test_defaults_are_those_that_the_page_names():
    sasrec, caser, ilora = SASRecConfig(), CaserConfig(), ILoraConfig()
    assert (sasrec.num_hidden_layers, sasrec.num_attention_heads, sasrec.max_length) == (2, 2, 50)
    assert (sasrec.hidden_dropout, sasrec.initializer_range, sasrec.loss_type) == (0.2, 0.02, "cross_entropy")
    assert (caser.max_length, caser.vertical_filters, [*caser.horizontal_heights]) == (5, 4, [1, 2, 3, 4, 5])
    assert (ilora.router_type, ilora.item_head) == ("conv", "none")
    next_item, training = NextItemTrainingArguments("out"), ILoraTrainingArguments("out")
    assert (next_item.metric_for_best_model, next_item.early_stopping_patience) == ("ndcg@10", 20)
    assert next_item.per_device_train_batch_size == 64
    assert (training.metric_for_best_model, training.early_stopping_patience) == ("eval_loss", 3)
    assert not training.greater_is_better and training.curriculum_steps == 0
    assert (training.learning_rate, training.max_grad_norm) == (8e-4, 1)
    (evaluation,) = load_recipe(RECIPES / "evaluate_ilora.py").ARGUMENTS
    defaults = {field.name: field.default for field in dataclasses.fields(evaluation)}
    assert (defaults["max_new_tokens"], defaults["first_line_only"]) == (40, False)
    assert "beta2" not in option_names(DistillationArguments)
