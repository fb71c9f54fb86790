"""The command hf-ilora: which recipe it starts, what it prints, and how it ends."""

import importlib.metadata
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hf_ilora.runs.help_text import recipe_help
from hf_ilora.runs.recipe_files import load_recipe
from hf_ilora_cli.commands import COMMANDS
from hf_ilora_cli.main import help_file, main
from hf_ilora_cli.recipe_start import help_of_recipe
from hf_ilora_cli.write_help import rendered_help
from tests.paths import PROJECT, RECIPES


@pytest.fixture
def hf_ilora(tmp_path):
    """Runs `python -m hf_ilora` from an empty folder."""

    def run(*words, **options):
        command = [sys.executable, "-m", "hf_ilora", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, **options)

    return run


def test_every_recipe_has_a_command():
    recipes = {path.stem for path in RECIPES.glob("*.py")}
    assert {command.recipe for command in COMMANDS.values()} == recipes


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["-h"], ["--version"], ["train-sasrec", "--help"], ["distill", "x", "-h"], ["no-such"]]
)
def test_help_and_mistakes_import_neither_torch_nor_hf_ilora(words):
    code = f"""
import sys
from hf_ilora_cli.main import main
main({words!r})
loaded = {{"torch", "transformers", "accelerate", "hf_ilora"}} & set(sys.modules)
sys.exit(f"imported {{loaded}}" if loaded else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda recipe: recipe.stem)
def test_help_of_a_recipe_that_is_run_as_a_file_imports_nothing_slow(recipe):
    code = f"""
import runpy, sys
sys.argv = [{str(recipe)!r}, "--help"]
try:
    runpy.run_path({str(recipe)!r}, run_name="__main__")
finally:
    print({{"numpy", "torch", "transformers", "hf_ilora"}} & set(sys.modules), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "set()\n")
    assert result.stdout == help_of_recipe(recipe, load_recipe(recipe).__doc__)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda recipe: recipe.stem)
def test_help_of_a_recipe_is_what_its_options_render(recipe):
    module = load_recipe(recipe)
    assert help_of_recipe(recipe, module.__doc__) == recipe_help(recipe, module.__doc__, module.ARGUMENTS, recipe.name)


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_overview_has_a_line_for_every_command(capsys, words):
    assert main(words) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "hf-ilora pipeline quickstart" in lines
    for command in COMMANDS.values():
        assert f"{command.name} {command.summary}" in lines


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-ilora {importlib.metadata.version('hf_ilora')}\n"


def test_an_unknown_command_names_the_closest_in_one_line(capsys):
    assert main(["train-sasrek", "ml-100k/sasrec"]) == 2
    assert capsys.readouterr().err == (
        "hf-ilora: error: unknown command train-sasrek: did you mean train-sasrec? See hf-ilora --help\n"
    )


def test_an_unknown_command_cannot_drive_the_terminal(capsys):
    assert main(["pre\x1b[31mpare"]) == 2
    assert "unknown command pre\\x1b[31mpare: did you mean prepare?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_shipped_help_is_what_the_recipe_renders_now(command):
    shipped = help_file(command).read_text(encoding="utf-8")
    assert shipped == rendered_help(command), "the options have changed: run `make help-texts` and commit the texts"
    assert all(len(line) <= 100 for line in shipped.splitlines())


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_the_example_of_a_command_starts_it(command):
    assert command.example.startswith(f"{command.program} ")


MISTAKE = ("recommend", "--model", "nowhere", "--user", "1")


def test_a_mistake_ends_in_one_line_and_code_2(hf_ilora):
    result = hf_ilora(*MISTAKE)
    assert result.returncode == 2
    assert result.stderr == (
        "hf-ilora recommend: error: --user is given without --data_dir: expected the prepared data set with the user\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--debug", *MISTAKE], [*MISTAKE, "--debug"]])
def test_debug_adds_the_traceback_and_keeps_the_exit_code(hf_ilora, words):
    result = hf_ilora(*words)
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("hf-ilora recommend: error: --user is given")


@pytest.mark.slow
def test_a_recipe_runs_from_any_folder_with_a_shipped_configuration(hf_ilora, tmp_path):
    (tmp_path / "ratings.csv").write_text("u,i\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(5)))
    own = ["--interactions", "ratings.csv", "--user_column", "u", "--item_column", "i", "--num_candidates", 0]
    result = hf_ilora("prepare", *own, "--missing_titles", "item_id", "--output_dir", "data")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "sequences.json").is_file()
    unknown = hf_ilora("prepare", "ml-100k/date")
    assert unknown.returncode == 2
    assert "configuration ml-100k/date not found" in unknown.stderr and "shipped ml-100k/data, " in unknown.stderr


@pytest.mark.slow
def test_help_all_shows_what_help_folds_away(hf_ilora):
    everything = hf_ilora("train-sasrec", "--help-all")
    assert everything.returncode == 0, everything.stderr
    folded = help_file(COMMANDS["train-sasrec"]).read_text(encoding="utf-8")
    assert "--ddp_timeout" in everything.stdout and "--ddp_timeout" not in folded
    assert everything.stdout.startswith("usage: hf-ilora train-sasrec ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "number"),
    [
        (None, signal.SIGINT),
        ("cpu", signal.SIGINT),
        ("multi_cpu", signal.SIGINT),
        ("cpu", signal.SIGTERM),
        ("multi_cpu", signal.SIGTERM),
        ("accelerate", signal.SIGTERM),
        ("multi_cpu", signal.SIGKILL),
    ],
)
def test_a_signal_ends_a_launch_quietly_with_all_that_it_started(tmp_path, launch, number):
    program = tmp_path / "sleeps.py"
    program.write_text(
        "import sys, time\n"
        "from hf_ilora.runs import run_main\n"
        "def main():\n"
        "    open('started-' + str(__import__('os').getpid()), 'w').close()\n"
        "    time.sleep(300)\n"
        "run_main(main)\n"
    )
    start = {
        None: ["hf_ilora_cli.recipe_process", program],
        "accelerate": ["accelerate.commands.launch", "--config_file", PROJECT / "accelerate_configs/cpu.yaml", program],
    }.get(launch, ["hf_ilora_cli.launch_recipe", program, "--launch", launch])
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, start)],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    expected = 2 if launch == "multi_cpu" else 1
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("started-*"))) < expected:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    if number == signal.SIGKILL or launch == "accelerate":
        assert process.returncode == -number
    else:
        assert (process.returncode, printed) == (128 + number, "")


MAIN = ["-c", "import sys; from hf_ilora_cli.main import main; sys.exit(main())"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        [*MAIN, "--help"],
        [*MAIN, "train-sasrec", "--help"],
        [RECIPES / "train_sasrec.py", "--help"],
        pytest.param([*MAIN, "train-sasrec", "--help-all"], marks=pytest.mark.slow),
    ],
    ids=["overview", "command", "recipe", "all options"],
)
def test_a_reader_that_leaves_ends_the_command_quietly(words, unbuffered):
    """As `head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command, environment = [sys.executable, *map(str, words)], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, env=environment)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")
