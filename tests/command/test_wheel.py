"""The wheel: it holds what the command needs, and no more than the project has."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.paths import PROJECT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the project's files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "recipes", "accelerate_configs"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", str(folder), "--no-deps", "--no-build-isolation", "-w", folder]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_recipes_and_their_files_inside_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("recipes", "accelerate_configs"):
        files = [path for path in (PROJECT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {f"hf_ilora/{path.relative_to(PROJECT)}" for path in files} == {
            name for name in names if name.startswith(f"hf_ilora/{folder}/")
        }
    helps = {f"hf_ilora_cli/help/{path.name}" for path in (PROJECT / "src" / "hf_ilora_cli" / "help").glob("*.txt")}
    assert helps and helps <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "recipes/"))]


def test_the_wheel_installs_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(name).decode())
    assert dict(scripts["console_scripts"]) == {"hf-ilora": "hf_ilora_cli.main:main"}


def test_the_command_runs_from_the_unpacked_wheel_in_any_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    work = tmp_path / "work"
    work.mkdir()

    def run(*words):
        command = [sys.executable, "-P", "-c", "import sys; from hf_ilora_cli.main import main; sys.exit(main())"]
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(
            [*command, *words], cwd=work, env=environment, capture_output=True, text=True, check=False
        )

    result = run("pipeline", "quickstart", "--set", "sasrek.seed=1")
    assert result.returncode == 2
    assert "there is no stage sasrek: expected one of data, " in result.stderr and " ilora, " in result.stderr
    result = run("label", "--launch", "cpus")
    assert result.returncode == 2 and "one of the shipped cpu, " in result.stderr
    assert not list(work.iterdir())
