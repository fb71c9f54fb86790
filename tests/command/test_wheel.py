"""The wheel contains the project's files and no others, and works where it is installed, without the clone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.paths import PROJECT

pytestmark = pytest.mark.slow
SHIPPED = ("recipes", "accelerate_configs")
# Two steps of a small model.
FEW_STEPS = {"max_steps": 2, "hidden_size": 16, "early_stopping_patience": 0, "load_best_model_at_end": "false"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the project's files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", *SHIPPED):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", str(folder), "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run_installed(wheel, tmp_path_factory):
    """Runs a program of an environment that has the wheel, in an empty folder, and returns the finished process.

    The environment borrows the dependencies of this one, which take minutes to install, by a path: paths are not
    followed to the clone's own installation. `test_package.py` checks that they are declared.
    """
    folder = tmp_path_factory.mktemp("installed")
    python, work = folder / "bin" / "python", folder / "work"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True, text=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}

    def run(program, *words):
        command = [str(python.parent / program), *map(str, words)]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="module")
def quickstart(run_installed):
    """Runs the quickstart's data, counts and SASRec with few steps, and a student of the counts."""
    few = [f"sasrec.{name}={value}" for name, value in FEW_STEPS.items()]
    options = [word for name, value in FEW_STEPS.items() for word in (f"--{name}", value)]
    out = "outputs/quickstart"
    for command in (
        ["pipeline", "quickstart", *few, "--only", "counts", "sasrec"],
        ["distill", "ml-100k/quickstart", "--data_dir", f"{out}/data", "--teacher", f"{out}/counts/transition_counts",
         "--distilled_positions", "all", "--kl_weight", 1, "--lam", 0, "--output_dir", f"{out}/distilled",
         "--initial_items", "random", *options],
    ):  # fmt: skip
        result = run_installed("hf-ilora", *command)
        assert result.returncode == 0, result.stderr


def test_the_wheel_contains_the_files_of_the_project_and_no_others(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = set()
    for root, prefix in ((PROJECT / "src", ""), *((PROJECT / folder, f"hf_ilora/{folder}/") for folder in SHIPPED)):
        files = [path for path in root.rglob("*") if path.is_file()]
        expected |= {f"{prefix}{path.relative_to(root)}" for path in files if "__pycache__" not in path.parts}
    assert names == {name for name in expected if ".egg-info/" not in name}
    assert {"hf_ilora/py.typed", "hf_ilora/recipes/train_sasrec.py", "hf_ilora_cli/help/export.txt"} <= names


def test_an_index_would_accept_the_wheel(wheel):
    result = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel], capture_output=True, text=True)
    assert result.returncode == 0 and "PASSED" in result.stdout, result.stdout + result.stderr


def test_the_installed_command_finds_shipped_files_in_any_folder(run_installed):
    result = run_installed("hf-ilora", "pipeline", "quickstart", "--set", "sasrek.seed=1")
    assert result.returncode == 2
    assert "there is no stage sasrek: expected one of data, " in result.stderr and " ilora, " in result.stderr
    result = run_installed("hf-ilora", "label", "--launch", "cpus")
    assert result.returncode == 2 and "one of the shipped cpu, " in result.stderr


def test_the_first_lines_of_the_readme_work_after_a_quickstart(quickstart, run_installed):
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    model, pipeline = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[:2]
    result = run_installed("python", "-c", f"{model}{pipeline}print(hf_ilora.__file__)")
    assert result.returncode == 0, result.stderr
    titles, installed = result.stdout.splitlines()
    assert len(ast.literal_eval(titles)) == 10 and str(PROJECT) not in installed
    recommended = run_installed(
        "hf-ilora", "recommend", "--data_dir", "outputs/quickstart/data", "--model", "outputs/quickstart/distilled",
        "--user", 1, "--format", "json",
    )  # fmt: skip
    assert recommended.returncode == 0, recommended.stderr
    assert len(json.loads(recommended.stdout)["recommendations"]) == 10
