"""Launching: which accelerate configuration, and the exit code and messages of processes that fail."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command

from hf_ilora_cli import launching
from hf_ilora_cli.launching import launch_config, take_launch_options
from tests.paths import PROJECT


def test_the_options_of_the_launch_are_taken_out_of_the_command_line():
    words = ["ml-100k/sasrec", "--launch", "multi_cpu", "--seed", "1", "--num-processes=3", "--debug"]
    assert take_launch_options(words) == ("multi_cpu", 3, ["ml-100k/sasrec", "--seed", "1", "--debug"])
    assert take_launch_options(["--launch=cpu"]) == ("cpu", None, [])
    assert take_launch_options(["a", "--seed", "1"]) == (None, None, ["a", "--seed", "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--launch"], "--launch expects a value after it"),
        (["--num_processes", "two"], "--num_processes is two: expected a number of processes"),
        (["--num_processes", "0"], "--num_processes is 0"),
    ],
)
def test_bad_options_of_the_launch_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        take_launch_options(words)


@pytest.mark.parametrize(
    ("accelerator", "num_processes", "name"),
    [(False, None, "cpu"), (False, 1, "cpu"), (False, 2, "multi_cpu"), (True, None, "single_gpu"), (True, 4, "ddp")],
)
def test_the_default_fits_the_machine_and_the_number_of_processes(monkeypatch, accelerator, num_processes, name):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert launch_config(None, num_processes) == PROJECT / "accelerate_configs" / f"{name}.yaml"


def test_several_processes_with_a_configuration_of_one_are_refused():
    with pytest.raises(ValueError, match="--num_processes is 2 and --launch cpu starts one process"):
        launch_config("cpu", 2)
    assert launch_config("multi_cpu", 2) == PROJECT / "accelerate_configs" / "multi_cpu.yaml"


def test_an_unknown_configuration_is_refused():
    with pytest.raises(ValueError, match=r"accelerate configuration multi_gpu not found.*shipped multi_cpu, "):
        launch_config("multi_gpu", None)


@pytest.mark.parametrize(
    ("launch", "visible", "expected"),
    [("single_gpu", "2,3", "2"), ("single_gpu", None, "0"), ("cpu", "2", "-1"), ("ddp", "2,3", "all")],
)
def test_one_process_gets_the_first_gpu_that_the_user_leaves_visible(monkeypatch, launch, visible, expected):
    """Of several, the Trainer would wrap the model in DataParallel."""
    found = []
    monkeypatch.setattr(launching, "launch_command", lambda args: found.append(_validate_launch_command(args)[0]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    config_file = PROJECT / "accelerate_configs" / f"{launch}.yaml"
    assert launching.run_launched(Path("recipe.py"), ["--debug"], config_file, None, "program") == 0
    assert found[0].gpu_ids == expected


@pytest.fixture
def launched(tmp_path):
    """Launches a program whose main function has the given lines; `state` is the process's PartialState."""

    def run(lines: str, *options: str) -> subprocess.CompletedProcess:
        program = tmp_path / "program.py"
        program.write_text(
            "import os, sys\nfrom accelerate import PartialState\nfrom hf_ilora.runs import run_main\n\n\n"
            "def main():\n    state = PartialState(cpu=True)\n" + textwrap.indent(textwrap.dedent(lines), "    ")
            + "\n\nrun_main(main)\n"
        )  # fmt: skip
        command = [sys.executable, "-m", "hf_ilora_cli.launch_recipe", str(program), *options]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)

    return run


@pytest.mark.slow
def test_one_process_gets_its_words_and_gives_its_exit_code(launched):
    result = launched("print(*sys.argv[1:])", "--launch", "cpu", "a", "--b", "1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a --b 1\n", "")
    result = launched("sys.exit(7)", "--launch", "cpu")
    assert (result.returncode, result.stderr) == (7, "")
    result = launched("os.kill(os.getpid(), 9)", "--launch", "cpu")
    killed = "was ended by SIGKILL, as the system does when memory runs out"
    assert (result.returncode, result.stderr) == (137, f"program.py: error: the process {killed}\n")


@pytest.mark.slow
def test_several_processes_run_and_end_well(launched, tmp_path):
    lines = "open(f'process-{state.process_index}-of-{state.num_processes}', 'w').close()\nstate.wait_for_everyone()"
    result = launched(lines, "--launch", "multi_cpu", "--num_processes", "3")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(path.name for path in Path(tmp_path).glob("process-*")) == [f"process-{i}-of-3" for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu", "multi_cpu"])
def test_a_mistake_that_every_process_sees_is_reported_once(launched, launch):
    result = launched("raise ValueError('seed is -1: expected at least 0')", "--launch", launch)
    assert (result.returncode, result.stderr) == (2, "program.py: error: seed is -1: expected at least 0\n")


@pytest.mark.slow
def test_a_mistake_that_the_main_process_alone_sees_ends_the_others_quietly(launched):
    lines = "if state.is_main_process:\n    raise ValueError('the folder is full')\nstate.wait_for_everyone()"
    result = launched(lines, "--launch", "multi_cpu")
    assert (result.returncode, result.stderr) == (2, "program.py: error: the folder is full\n")


@pytest.mark.slow
def test_a_mistake_that_only_another_process_sees_is_reported_too(launched):
    lines = "if not state.is_main_process:\n    raise ValueError('half of it is missing')\nimport time; time.sleep(60)"
    result = launched(lines, "--launch", "multi_cpu")
    assert (result.returncode, result.stderr) == (2, "program.py: error: half of it is missing\n")


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(launched):
    lines = "if not state.is_main_process:\n    os.kill(os.getpid(), 9)\nimport time; time.sleep(60)"
    result = launched(lines, "--launch", "multi_cpu")
    killed = "process 1 was ended by SIGKILL, as the system does when memory runs out"
    assert (result.returncode, result.stderr) == (137, f"program.py: error: {killed}\n")


@pytest.mark.slow
def test_a_bug_in_another_process_shows_its_traceback(launched):
    lines = "if not state.is_main_process:\n    {}['absent']\nimport time; time.sleep(60)"
    result = launched(lines, "--launch", "multi_cpu")
    assert result.returncode == 1
    assert "process 1: Traceback" in result.stderr and "KeyError: 'absent'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_processes_that_do_not_share_the_disk_are_refused(launched, shared):
    lines = f"""
        from hf_ilora import files
        from hf_ilora.runs import sole_writer
        files.SECONDS_TO_SEE = 1
        with sole_writer("out" if {shared} else f"out-{{state.process_index}}"):
            print("runs")
        state.wait_for_everyone()
    """
    result = launched(lines, "--launch", "multi_cpu")
    if shared:
        assert (result.returncode, result.stdout, result.stderr) == (0, "runs\nruns\n", "")
    else:
        assert result.returncode == 2 and "runs" not in result.stdout
        seen = "out-0 of the first process is not seen by process 1 on "
        assert result.stderr.startswith(f"program.py: error: {seen}"), result.stderr
        assert "expected a disk that all machines of the launch share" in result.stderr
