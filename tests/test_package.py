"""The package as a whole: the cost of importing it, the direction of its imports, and the agreement of its files."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hf_ilora
from hf_ilora.runs import parse_arguments, read_config
from hf_ilora.runs.pipeline import read_stages
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.commands import COMMANDS
from hf_ilora_cli.launching import take_launch_options
from tests.paths import PROJECT, RECIPES

PACKAGE = PROJECT / "src" / "hf_ilora"
PROGRAMS = sorted(path for room in ("recipes", "benchmarks", "experiments") for path in PROJECT.glob(f"{room}/*.py"))
DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
COMMUNITY = [PROJECT / "CHANGELOG.md", *sorted((PROJECT / ".github").rglob("*.*"))]
RECIPE_CONFIGS = sorted((PROJECT / "recipes" / "configs").rglob("*.yaml"))
# Folders of parts of a configuration: they leave out folders and other settings that a recipe needs.
PARTS = ("data", "student", "teacher", "active", "distill")
ACCELERATE_CONFIGS = sorted((PROJECT / "accelerate_configs").glob("*.yaml"))

CATALOGUE = "models.next_item.catalogue"
CARD = "models.next_item.card"
HUB_UPLOAD = "models.next_item.hub_upload"
SHOWN_TEXT = "hf_ilora_cli.shown_text"  # imports nothing of ours

# Which rooms and modules of ours a room may import besides itself; recipes may import all of them. The command is a
# package beside hf_ilora.
ALLOWED_IMPORTS = {
    "data": {"downloads", "files", CATALOGUE, CARD, HUB_UPLOAD, SHOWN_TEXT},
    "models": {"downloads", "files"},
    "titles": {"data", "models", "devices", "downloads", "files"},
    "reference": {"data", "models"},
    "runs": {"data", "evaluation", "devices", "downloads", "files", "hf_ilora_cli"},
    "evaluation": {"data", "models", "devices", "downloads", "files", SHOWN_TEXT},
    "distillation": {"data", "models", "reference", "files", SHOWN_TEXT},
    "training": {
        *("data", "models", "titles", "evaluation", "distillation", "devices", "downloads", "files"),
        SHOWN_TEXT,
    },
    "serving": {"data", "models", "titles", "distillation", "evaluation", "runs", "devices", "files", SHOWN_TEXT},
    "publishing": {"data", "models", "evaluation", "files", SHOWN_TEXT},
    "demo": {"models", "titles", "publishing", "devices", "downloads", "files", SHOWN_TEXT},
}


def relative(path: Path) -> str:
    return str(path.relative_to(PROJECT))


# --- importing ---


def test_importing_costs_little_and_loads_nothing_heavy():
    """Little beside importing PreTrainedModel, in processor time; the modules that it loads do not count."""
    code = (
        "import sys, time\n"
        "from transformers import PreTrainedModel\n"
        "theirs, before = set(sys.modules), time.process_time()\n"
        "import hf_ilora\n"
        "print(time.process_time() - before)\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - theirs})"
    )
    for _ in range(3):  # until one is not disturbed
        printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        cost, loaded = printed.splitlines()
        heavy = {"datasets", "evaluate", "deepspeed", "matplotlib", "pandas", "scipy", "sklearn", "peft"}
        assert not heavy & set(loaded.split())
        if float(cost) < 0.5:
            return
    pytest.fail(f"importing hf_ilora took {cost} s of processor time: expected less than 0.5")


def test_every_public_name_can_be_imported():
    for name in hf_ilora.__all__:
        assert name in dir(hf_ilora)
        assert getattr(hf_ilora, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'SASRek'; public names: .*SASRecConfig"):
        _ = hf_ilora.SASRek


# --- the direction of imports ---


def our_imports(source: str, package: str) -> set[str]:
    """The names that a file imports from hf_ilora and its command, anywhere in it; `package` is the file's package."""
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
        found |= {name for name in names if name.split(".")[0] in ("hf_ilora", "hf_ilora_cli")}
    return found


def test_the_walk_finds_imports_of_every_form():
    source = "import hf_ilora.data.x\nfrom ..runs.z import w\nfrom .v import u\nfrom hf_ilora_cli import main\n"
    source += "def f():\n    from hf_ilora.models import y\n"
    expected = {"hf_ilora.data.x", "hf_ilora.models.y", "hf_ilora.runs.z.w", "hf_ilora.evaluation.v.u"}
    assert our_imports(source, "hf_ilora.evaluation") == expected | {"hf_ilora_cli.main"}


@pytest.mark.parametrize("part", ALLOWED_IMPORTS)
def test_imports_go_one_way(part):
    for path in sorted((PACKAGE / part).rglob("*.py")):
        package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
        for name in our_imports(path.read_text(encoding="utf-8"), package):
            # `from hf_ilora import X` would reach every part through the lazy public names
            imported = name.removeprefix("hf_ilora.")
            allowed = ALLOWED_IMPORTS[part] | {part}
            assert any(f"{imported}.".startswith(f"{each}.") for each in allowed), f"{relative(path)} imports {name}"


def test_every_part_of_the_package_has_a_rule_and_no_two_may_import_each_other():
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts == set(ALLOWED_IMPORTS)
    list(TopologicalSorter(ALLOWED_IMPORTS).static_order())  # raises on a cycle


def test_the_command_starts_without_importing_the_package():
    """Except the program that renders its help, which the project runs beforehand."""
    for path in sorted((PROJECT / "src" / "hf_ilora_cli").glob("*.py")):
        imported = our_imports(path.read_text(encoding="utf-8"), "hf_ilora_cli")
        assert path.name == "write_help.py" or not any(name.startswith("hf_ilora.") for name in imported), path.name


def test_no_recipe_imports_another():
    recipes = {path.stem for path in RECIPES.glob("*.py")}
    for path in RECIPES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not recipes & {name.split(".")[0] for name in imported}, f"{relative(path)}, line {node.lineno}"


def test_only_declared_dependencies_are_imported():
    """Otherwise an installation works only as long as another package depends on the missing one."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [*project["optional-dependencies"].items()]
    declared = [*project["dependencies"], *chain(*(each for name, each in extras if name != "dev"))]
    declared = {canonicalize_name(Requirement(each).name) for each in declared}
    distributions = importlib.metadata.packages_distributions()
    own = {"hf_ilora", "hf_ilora_cli", *sys.stdlib_module_names}
    own.add("polars")  # whose frames are read where a program has imported it
    for path in [*(PROJECT / "src").rglob("*.py"), *RECIPES.glob("*.py")]:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
        for name in imported - own:
            providers = {canonicalize_name(each) for each in distributions.get(name, [name])}
            assert providers & declared, f"{relative(path)} imports {name}"


# --- configurations ---


@pytest.mark.parametrize("config", RECIPE_CONFIGS, ids=relative)
def test_recipe_config_is_read_by_the_recipe_it_names(config):
    first_line = config.read_text(encoding="utf-8").splitlines()[0]
    named = re.match(r"# (recipes/\w+\.py)\b", first_line)
    assert named, (
        f"expected the first line to name the recipe, such as `# recipes/train_sasrec.py`, found {first_line!r}"
    )
    argument_types = load_recipe(PROJECT / named[1]).ARGUMENTS
    assert read_config(config, argument_types)
    if config.parent.name not in PARTS:
        parse_arguments(argument_types, [str(config)])


def started(words: list[str]) -> tuple[ModuleType, list[str]] | None:
    """The program of ours that a command line starts, and the options that it gets; None for another command."""
    for place, word in enumerate(words):
        if word.startswith("recipes/") and word.endswith(".py"):  # python ..., accelerate launch ...
            return load_recipe(PROJECT / word), words[place + 1 :]
        if word == "-m" and words[place + 1].split(".")[0] in ("benchmarks", "experiments"):
            return importlib.import_module(words[place + 1]), words[place + 2 :]
    if words[:3] == ["python", "-m", "hf_ilora"]:
        words = ["hf-ilora", *words[3:]]
    if words[:1] != ["hf-ilora"] or len(words) == 1 or {"--help", "--help-all", "--version"} & set(words):
        return None
    command = COMMANDS[words[1]]
    options = take_launch_options(words[2:])[2] if command.launched or command.may_be_launched else words[2:]
    return load_recipe(RECIPES / f"{command.recipe}.py"), options


def printed_commands(text: str) -> list[list[str]]:
    """The words of the commands in the bash blocks of a document, except those that end in `...`."""
    commands = []
    for block in re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[-1] != "...":
                commands.append(words)
    return commands


def test_commands_of_every_form_are_found():
    text = "```bash\npython recipes/train_sasrec.py ml-100k/sasrec \\\n    --seed 1  # once\n```\n"
    text += "```sh\naccelerate launch --config_file x.yaml recipes/train_sasrec.py --seed 2\npip install .\n"
    text += "hf-ilora train-sasrec --launch multi_cpu --seed 3\npython -m hf_ilora train-sasrec --seed 4\n"
    text += "hf-ilora train-sasrec --help\npython -m benchmarks.data --rows 5\nhf-ilora train-sasrec ...\n```"
    found = [program for program in map(started, printed_commands(text)) if program is not None]
    names = [module.__name__ for module, _ in found]
    assert names == ["hf_ilora_recipe_train_sasrec"] * 4 + ["benchmarks.data"]
    options = [["ml-100k/sasrec", "--seed", "1"], *(["--seed", seed] for seed in "234"), ["--rows", "5"]]
    assert [words for _, words in found] == options


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_printed_commands_are_read_by_what_they_start(document, monkeypatch):
    monkeypatch.chdir(PROJECT)  # where the commands are given
    for words in printed_commands(document.read_text(encoding="utf-8")):
        program = started(words)
        if program is not None:
            module, options = program
            parse_arguments(module.ARGUMENTS, options)


def test_readme_prints_commands():
    """So the test above checks something."""
    assert sum(started(words) is not None for words in printed_commands(DOCUMENTS[0].read_text(encoding="utf-8"))) > 3


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_printed_programs_use_names_and_arguments_that_exist(document):
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)):
        tree = ast.parse(block)
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "hf_ilora"]
        names = {alias.name for node in imported for alias in node.names}
        assert names <= set(hf_ilora.__all__), f"{relative(document)}, program {number + 1}"
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
                given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                if not any(isinstance(argument, ast.Starred) for argument in call.args):
                    inspect.signature(getattr(hf_ilora, call.func.id)).bind_partial(*call.args, **given)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_example_of_a_command_is_read_by_its_recipe(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # commands are given from any folder
    words = shlex.split(command.example)[2:]
    (tmp_path / "items.parquet").touch()
    parse_arguments(load_recipe(RECIPES / f"{command.recipe}.py").ARGUMENTS, words)


PIPELINES = [config for config in RECIPE_CONFIGS if "recipes/run_pipeline.py" in config.read_text().splitlines()[0]]


@pytest.mark.parametrize("config", PIPELINES, ids=relative)
def test_the_recipes_of_a_pipeline_read_its_settings(config, tmp_path, monkeypatch):
    (arguments,) = parse_arguments(load_recipe(RECIPES / "run_pipeline.py").ARGUMENTS, [str(config)])
    monkeypatch.chdir(tmp_path)  # a pipeline names shipped files by name, so that it runs from any folder
    for stage in read_stages(arguments.stages, groups=arguments.groups):
        recipe = load_recipe(RECIPES / stage.recipe)
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
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *chain(*extras.values())]):
        if requirement.name == project["name"]:  # dev has all other extras
            assert requirement.extras == set(extras) - {"dev"}
        else:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("hf_ilora") == hf_ilora.__version__


def test_only_make_targets_that_exist_are_named():
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"setup", "test", "test-slow", "quickstart", "lint", "format", "help", "clean"} <= targets
    for path in (*DOCUMENTS, PROJECT / ".ci" / "run", PROJECT / ".pre-commit-config.yaml", *COMMUNITY):
        named = set(re.findall(r"(?:^|`|: )make ([a-z-]+)\b", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert named <= targets, f"{relative(path)} names {named - targets}"


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run", "make test-oldest"]


def test_links_to_files_of_the_project_lead_somewhere():
    for path in (*DOCUMENTS, *COMMUNITY):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{relative(path)} links to {target}"


def test_files_that_commands_name_exist():
    """Commands in README, docs, Makefile and programs can be copied and run."""
    for path in [*DOCUMENTS, PROJECT / "Makefile", *PROGRAMS]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"\b(?:recipes|benchmarks|experiments|accelerate_configs)/[\w./-]+\.(?:py|yaml)\b", text)
        for name in set(named):
            assert (PROJECT / name).is_file(), f"{relative(path)} names {name}"
