"""What holds for the package as a whole: what importing it costs, who imports whom, and that its files agree."""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_ilora
from hf_ilora.runs import parse_arguments
from hf_ilora.runs.pipeline import read_stages
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.commands import COMMANDS
from hf_ilora_cli.launching import take_launch_options
from tests.paths import PROJECT

PACKAGE = PROJECT / "src" / "hf_ilora"
RECIPES = sorted((PROJECT / "recipes").glob("*.py"))
RECIPE_CONFIGS = sorted((PROJECT / "recipes" / "configs").rglob("*.yaml"))
ACCELERATE_CONFIGS = sorted((PROJECT / "accelerate_configs").glob("*.yaml"))

CATALOGUE = "models.next_item.catalogue"

# Which packages and modules of ours a package may import besides itself; recipes may import all of them.
ALLOWED_IMPORTS = {
    "data": {"downloads", "files", CATALOGUE},
    "models": {"downloads", "files"},
    "titles": {"models"},
    "reference": {"data", "models"},
    "runs": {"downloads", "files"},
    "evaluation": {"data", "models", "files"},
    "distillation": {"data", "models", "reference", "files"},
    "training": {"data", "models", "titles", "evaluation", "distillation"},
    "publishing": {"data", "models", "evaluation", "files"},
}


def relative(path: Path) -> str:
    return str(path.relative_to(PROJECT))


# --- importing ---


def test_importing_costs_little_and_loads_nothing_heavy():
    """Little beside importing PreTrainedModel, in processor time; what that loads is no business of ours."""
    code = (
        "import sys, time\n"
        "from transformers import PreTrainedModel\n"
        "theirs, before = set(sys.modules), time.process_time()\n"
        "import hf_ilora\n"
        "print(time.process_time() - before)\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - theirs})"
    )
    seconds = []
    for _ in range(3):
        printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        cost, loaded = printed.splitlines()
        seconds.append(float(cost))
        heavy = {"datasets", "evaluate", "deepspeed", "matplotlib", "pandas", "scipy", "sklearn", "peft"}
        assert not heavy & set(loaded.split())
    assert min(seconds) < 0.5  # the least disturbed one


def test_every_public_name_can_be_imported():
    for name in hf_ilora.__all__:
        assert name in dir(hf_ilora)
        assert getattr(hf_ilora, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'SASRek'; public names: .*SASRecConfig"):
        _ = hf_ilora.SASRek


# --- who imports whom ---


def our_imports(source: str, package: str) -> set[str]:
    """The parts of hf_ilora that a file imports, wherever in it; `package` is the package that the file lies in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.split(".")[0] == "hf_ilora"}
    return found


def test_the_walk_finds_imports_of_every_form():
    source = "import hf_ilora.data.x\nfrom ..runs.z import w\nfrom .v import u\n"
    source += "def f():\n    from hf_ilora.models import y\n"
    expected = {"hf_ilora.data.x", "hf_ilora.models.y", "hf_ilora.runs.z.w", "hf_ilora.evaluation.v.u"}
    assert our_imports(source, "hf_ilora.evaluation") == expected


@pytest.mark.parametrize("part", ALLOWED_IMPORTS)
def test_imports_go_one_way(part):
    for path in sorted((PACKAGE / part).rglob("*.py")):
        for name in our_imports(path.read_text(encoding="utf-8"), f"hf_ilora.{part}"):
            # `from hf_ilora import X` would reach every part through the lazy public names
            imported = name.removeprefix("hf_ilora.")
            allowed = ALLOWED_IMPORTS[part] | {part}
            assert any(f"{imported}.".startswith(f"{each}.") for each in allowed), f"{relative(path)} imports {name}"


def test_every_part_of_the_package_has_a_rule():
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts == set(ALLOWED_IMPORTS)


# --- configurations ---


@pytest.mark.parametrize("config", RECIPE_CONFIGS, ids=relative)
def test_recipe_config_is_read_by_the_recipe_it_names(config):
    first_line = config.read_text(encoding="utf-8").splitlines()[0]
    named = re.match(r"# (recipes/\w+\.py)\b", first_line)
    assert named, (
        f"expected the first line to name the recipe, such as `# recipes/train_sasrec.py`, found {first_line!r}"
    )
    parse_arguments(load_recipe(PROJECT / named[1]).ARGUMENTS, [str(config)])


def printed_commands() -> list[list[str]]:
    """The program and its options, of each command in README and docs that starts a recipe, benchmark or experiment."""
    commands = []
    for path in (PROJECT / "README.md", PROJECT / "docs" / "results.md"):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                recipe = next((place for place, word in enumerate(words) if word.startswith("recipes/")), None)
                if words[:2] == ["python", "-m"]:
                    commands.append([f"{words[2].replace('.', '/')}.py", *words[3:]])
                elif recipe is not None:
                    commands.append(words[recipe:])
                elif words[:1] == ["hf-ilora"] and words[1] in COMMANDS:
                    _, _, options = take_launch_options(words[2:])
                    commands.append([f"recipes/{COMMANDS[words[1]].recipe}.py", *options])
    return commands


def test_printed_commands_are_read_by_the_programs_they_start(monkeypatch):
    monkeypatch.chdir(PROJECT)  # where the commands are given
    commands = printed_commands()
    assert len(commands) > 30
    for program, *options in commands:
        parse_arguments(load_recipe(PROJECT / program).ARGUMENTS, options)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_example_of_a_command_is_read_by_its_recipe(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # commands are given from any folder
    words = shlex.split(command.example)[2:]
    (tmp_path / "items.parquet").touch()
    parse_arguments(load_recipe(PROJECT / "recipes" / f"{command.recipe}.py").ARGUMENTS, words)


PIPELINES = [config for config in RECIPE_CONFIGS if "recipes/run_pipeline.py" in config.read_text().splitlines()[0]]


@pytest.mark.parametrize("config", PIPELINES, ids=relative)
def test_the_recipes_of_a_pipeline_read_its_settings(config, tmp_path, monkeypatch):
    (arguments,) = parse_arguments(load_recipe(PROJECT / "recipes" / "run_pipeline.py").ARGUMENTS, [str(config)])
    monkeypatch.chdir(tmp_path)  # a pipeline names shipped files by name, so that it runs from any folder
    for stage in read_stages(arguments.stages):
        recipe = load_recipe(PROJECT / "recipes" / stage.recipe)
        parse_arguments(recipe.ARGUMENTS, stage.recipe_options(Path("outputs")))


@pytest.mark.parametrize("config", ACCELERATE_CONFIGS, ids=relative)
def test_accelerate_config_is_known_to_accelerate(config):
    loaded = load_config_from_file(str(config))  # raises on unknown keys
    assert loaded.use_cpu == ("cpu" in config.name)
    assert loaded.mixed_precision == ("no" if loaded.use_cpu else "bf16")


# --- lock file, Makefile, README ---


def test_lock_pins_everything_exactly_and_fits_the_ranges():
    lines = (PROJECT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "only name==version, no URL, no local version"
    versions = {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}
    for text in importlib.metadata.requires("hf_ilora"):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("hf_ilora") == hf_ilora.__version__


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)`?", (PROJECT / "README.md").read_text(encoding="utf-8")))
    assert {"setup", "test", "test-slow", "quickstart", "lint", "format", "help", "clean"} <= targets
    assert named <= targets


def test_files_that_commands_name_exist():
    """Commands in README, Makefile and recipes can be copied and run."""
    for path in [PROJECT / "README.md", PROJECT / "Makefile", *RECIPES]:
        text = path.read_text(encoding="utf-8")
        for name in set(re.findall(r"\b(?:recipes|accelerate_configs)/[\w./-]+\.(?:py|yaml)\b", text)):
            assert (PROJECT / name).is_file(), f"{relative(path)} names {name}"
