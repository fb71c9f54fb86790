"""docs/losses.md names options, functions and inputs that exist, all losses, and relations that hold."""

import dataclasses
import importlib
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F

import hf_ilora
from hf_ilora import (
    CaserConfig,
    DistillationArguments,
    GRU4RecConfig,
    ILoraConfig,
    ILoraForRecommendation,
    SASRecConfig,
)
from hf_ilora.distillation.losses import BASE_LOSSES, distribution_loss
from hf_ilora.models.ilora.configuration_ilora import LOSS_WEIGHTS
from hf_ilora.models.ilora.losses import target_title_loss, title_loss
from hf_ilora.models.next_item.next_item_losses import gbce_loss, sampled_softmax_loss
from hf_ilora.runs import parse_arguments
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.commands import COMMANDS
from tests.models.ilora.ilora_fixtures import batch_of, fresh_model
from tests.paths import PROJECT, RECIPES

PAGE = (PROJECT / "docs" / "losses.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
# The classes whose options the tables name, and the modules that compute the losses.
OPTIONS_OF = {
    "Next item": (SASRecConfig, GRU4RecConfig, CaserConfig),
    "Distillation": (DistillationArguments,),
    "iLoRA": (ILoraConfig,),
}
MODULES = {part: importlib.import_module(re.search(r"`(hf_ilora\.[\w.]+)`", text)[1]) for part, text in PARTS.items()}
NAMES_A_LOSS = re.compile(r".*(loss|losses|Loss|softmax|entropy)")


def sections(part):
    return dict(re.findall(r"^### (.+?)\n(.*?)(?=^### |\Z)", PARTS[part], re.MULTILINE | re.DOTALL))


def rows(part):
    """Heading of a section -> cells of options, functions and sources in the table."""
    lines = [line for line in PARTS[part].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    linked = [re.fullmatch(r"\[(.+)\]\(#(.+)\)", row[0]) for row in cells]
    assert all(found[1].lower().replace(" ", "-") == found[2] for found in linked)
    return {found[1]: row[1:] for found, row in zip(linked, cells, strict=True)}


def code(text):
    return re.findall(r"`([^`]+)`", text)


def fields(classes):
    return [{field.name for field in dataclasses.fields(each)} for each in classes]


def function(name):
    (found,) = {vars(module)[name] for module in MODULES.values() if name in vars(module)}
    assert callable(found)
    return found


def parameters(name):
    found = function(name)
    return set(inspect.signature(found.forward if inspect.isclass(found) else found).parameters)


def bullets(text):
    """The text of each bullet, in one line."""
    return [" ".join(found.split()) for found in re.findall(r"^- (.*?)(?=^- |^\n|\Z)", text, re.MULTILINE | re.DOTALL)]


def assert_option(text, classes):
    """`name` or `name: value`, which all classes have and accept."""
    name, _, value = text.partition(": ")
    for each, names in zip(classes, fields(classes), strict=True):
        assert name in names, f"{each.__name__} has no {name}"
        if value:
            given = {name: type(getattr(default(each), name))(value)}
            if given == {"item_head": "none"}:
                continue
            assert getattr(default(each, **given), name) == given[name]


def default(config_class, **changes):
    return config_class("out", **changes) if config_class is DistillationArguments else config_class(**changes)


def test_the_page_has_these_parts():
    assert PARTS.keys() == OPTIONS_OF.keys()
    for part, classes in OPTIONS_OF.items():
        named = re.match(r"\s*Options of (.+?); functions in `[\w.]+`\.", PARTS[part])[1]
        assert code(named) == [each.__name__ for each in classes]


@pytest.mark.parametrize("part", OPTIONS_OF)
def test_every_option_and_function_of_the_tables_exists(part):
    found = rows(part)
    assert list(found) == list(sections(part)) and len(found) > 2
    for options, functions, published in found.values():
        assert code(options) and code(functions) and published
        for option in code(options):
            assert_option(option, OPTIONS_OF[part])
        for name in code(functions):
            assert name in vars(MODULES[part]) or "soft target" in functions
            function(name)


@pytest.mark.parametrize("part", OPTIONS_OF)
def test_every_name_in_the_text_exists(part):
    students = (SASRecConfig,) if part == "Distillation" else ()
    options = set().union(*fields((*OPTIONS_OF[part], *students)))
    for heading, text in sections(part).items():
        functions = code(rows(part)[heading][1])
        inputs = set().union(*map(parameters, functions))
        for bullet in bullets(text):
            for name in code(bullet):
                if re.fullmatch(r"\w+: [\w.]+", name):
                    assert_option(name, OPTIONS_OF[part])
                elif not re.fullmatch(r"\w+", name):
                    assert bullet.startswith("Formula: "), f"{heading}: {name}"
                elif bullet.startswith("Inputs: "):
                    assert name in inputs | set(functions) | {"propensity_scores"}, f"{heading}: {name}"
                else:
                    known = options | inputs | set(functions) | set(hf_ilora.__all__) | set(dir(ILoraForRecommendation))
                    assert name in known, f"{heading}: {name}"
    introduction = PARTS[part].partition("### ")[0]
    for name in code(re.sub(r"^\|.*$", "", introduction, flags=re.MULTILINE)):
        assert name in options | set(hf_ilora.__all__) | {MODULES[part].__name__}


def test_the_command_of_the_page_is_read():
    (command,) = [words.split() for words in code(PAGE.partition("\n## ")[0])]
    assert command[0] == "hf-ilora"
    recipe = load_recipe(RECIPES / f"{COMMANDS[command[1]].recipe}.py")
    assert parse_arguments(recipe.ARGUMENTS, command[2:])


def test_no_loss_is_left_out():
    named = set(code(PAGE))
    for module in MODULES.values():
        own = {name for name, value in vars(module).items() if callable(value) and value.__module__ == module.__name__}
        losses = {name for name in own if NAMES_A_LOSS.fullmatch(name) and not name.startswith("_")}
        assert len(losses) > 2 and losses <= named
    assert {f"loss_type: {name}" for name in ("cross_entropy", "sampled_softmax", "gbce", "bce")} <= named
    assert {f"base_loss: {name}" for name in (*BASE_LOSSES, "student")} <= named
    assert set(LOSS_WEIGHTS) | {"lam", "alpha", "kl_weight", "title_neighbours", "embedding_weight"} <= named


# --- relations that the page states ---


def scores_and_target(num_items=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, num_items, generator=generator), torch.tensor([2])


def test_sampled_softmax_over_every_other_item_is_cross_entropy():
    scores, target = scores_and_target()
    others = scores[:, [0, 1, 3, 4, 5]]
    loss = sampled_softmax_loss(scores[0, target], others, torch.zeros_like(others, dtype=torch.bool))
    torch.testing.assert_close(loss, F.cross_entropy(scores, target))
    fewer = sampled_softmax_loss(scores[0, target], others[:, 1:], torch.zeros(1, 4, dtype=torch.bool))
    assert not torch.allclose(fewer, loss)


def test_gbce_without_calibration_is_half_of_sasrecs_loss():
    positive, negative = torch.tensor([0.4]), torch.tensor([[-0.3]])
    loss = gbce_loss(positive, negative, torch.tensor([[False]]), num_items=9, calibration=0.0)
    published = -math.log(1 / (1 + math.exp(-0.4))) - math.log(1 - 1 / (1 + math.exp(0.3)))
    assert loss.item() == pytest.approx(published / 2)
    # the formula of the page: k = 1 of 8 other items, a = 1/8, c = 0.5
    beta = 1 / 8 * (0.5 * (1 - 8) + 8)
    calibrated = gbce_loss(positive, negative, torch.tensor([[False]]), num_items=9, calibration=0.5)
    expected = -beta * math.log(1 / (1 + math.exp(-0.4))) - math.log(1 - 1 / (1 + math.exp(0.3)))
    assert calibrated.item() == pytest.approx(expected / 2)


def test_cross_entropy_with_kl_is_cross_entropy_against_a_mixture_up_to_a_constant():
    teacher, target, weight = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, 0.0]]), torch.tensor([2]), 2.0
    mixture = (F.one_hot(target, 6) + weight * teacher.softmax(1)) / (1 + weight)
    differences = []
    for seed in (0, 1):
        scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed))
        loss = F.cross_entropy(scores, target) + weight * distribution_loss(scores, teacher).sum()
        differences.append(loss - (1 + weight) * F.cross_entropy(scores, mixture))
    torch.testing.assert_close(*differences)


def test_both_title_losses_are_the_same_number():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[4, 1, -100], [2, 5, 1]])
    log_p = logits.log_softmax(-1)
    titles = torch.stack([log_p[0, 0, 4] + log_p[0, 1, 1], log_p[1, 0, 2] + log_p[1, 1, 5] + log_p[1, 2, 1]])
    candidates = torch.stack([titles, torch.tensor([-3.0, -4.0])], dim=1)  # the target first
    expected = target_title_loss(candidates, torch.tensor([0, 0]), 2)
    torch.testing.assert_close(title_loss(logits, labels, 2), expected)
    assert not torch.allclose(expected, target_title_loss(candidates, torch.tensor([1, 0]), 2))


def test_a_new_item_head_starts_at_the_loss_of_the_frozen_sasrec():
    model = fresh_model(item_head="residual", item_loss_weight=1.0, language_loss_weight=0.0).eval()
    batch = batch_of(model, candidate_fraction=0.0)
    scores = model.recommender.next_item_scores(batch["histories"])
    torch.testing.assert_close(model(**batch).item_loss, F.cross_entropy(scores, batch["labels"]))
    assert not torch.allclose(model(**batch).item_loss, F.cross_entropy(scores, batch["labels"].roll(1)))
