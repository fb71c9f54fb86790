"""run_main: which errors are a user's, what it prints about them, and its exit code."""

import json
import logging
import os
import signal
import sys
import time

import pytest
from safetensors import SafetensorError

from hf_ilora import SASRecConfig
from hf_ilora.downloads import DownloadError
from hf_ilora.runs import ProgramFailed, RunRecord, read_record, run_main


@pytest.fixture
def ended(monkeypatch, capsys):
    """Runs a main function under run_main; gives the exit code and what was printed on standard error."""

    def run(main, *words):
        monkeypatch.setattr(sys, "argv", ["/somewhere/recipe.py", *words])
        try:
            run_main(main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


def raising(error):
    """The main function of a recipe that raises the error."""
    recipe = {"__name__": "__main__", "error": error}
    exec("def main():\n    raise error\n", recipe)
    return recipe["main"]


def test_success_returns(ended):
    assert ended(lambda: None) == (0, "")


PERMISSION = "change its owner or permissions, or choose another one"
PART = "a part of the path is a file; choose another path"
SPACE = "free some space or choose a folder on another disk, and run the same command again"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("top_k is 0: expected at least 1"), "top_k is 0: expected at least 1"),
        (ValueError("bad YAML:\n  line 3\n\n  column 1"), "bad YAML: line 3 column 1"),
        (
            FileNotFoundError(2, "No such file or directory", "a.csv"),
            "No such file or directory: a.csv: check the path",
        ),
        (FileExistsError("outputs is there already"), "outputs is there already"),
        (PermissionError(13, "Permission denied", "/outputs"), f"Permission denied: /outputs: {PERMISSION}"),
        (NotADirectoryError(20, "Not a directory", "a/b"), f"Not a directory: a/b: {PART}"),
        (OSError(30, "Read-only", "/outputs"), "Read-only: /outputs: choose a folder that can be written"),
        (OSError(28, "No space left on device"), f"No space left on device: {SPACE}"),
        (OSError(28, "No space left on device", "run.json"), f"No space left on device: run.json: {SPACE}"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), f"No space left on device: {SPACE}"),
        (OSError("gpt9 is not a folder"), "gpt9 is not a folder"),
        (DownloadError("the server does not answer"), "the server does not answer"),
        (ValueError("the title \x1b[31m\u202e is long"), r"the title \x1b[31m\u202e is long"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(ended, error, message):
    assert ended(raising(error)) == (2, f"recipe.py: error: {message}\n")


def test_an_error_of_a_library_points_to_debug(ended):
    code, printed = ended(lambda: json.loads("{"))
    assert code == 2
    assert printed.splitlines()[0].startswith("recipe.py: error: Expecting property name")
    assert printed.splitlines()[1:] == ["--debug shows the traceback"]


def test_the_error_of_a_configuration_is_one_line_without_a_pointer_to_debug(ended):
    code, printed = ended(lambda: SASRecConfig(num_items=3, hidden_dropout=2))
    assert code == 2
    (line,) = printed.splitlines()
    assert line.startswith("recipe.py: error: hidden_dropout is 2")


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), TypeError("x"), RuntimeError("x")])
def test_a_bug_shows_its_traceback_and_ends_with_1(ended, error):
    code, printed = ended(raising(error))
    assert code == 1 and printed.startswith("Traceback") and type(error).__name__ in printed


@pytest.mark.parametrize("words", [["--debug"], ["config.yaml", "--debug", "--seed", "1"], ["--seed", "1", "--debug"]])
def test_debug_shows_the_traceback_and_is_taken_from_the_command_line(ended, words):
    seen = []

    def main():
        seen.extend(sys.argv[1:])
        raise ValueError("seed is 1")

    code, printed = ended(main, *words)
    assert code == 2 and printed.startswith("Traceback")
    assert printed.splitlines()[-1] == "recipe.py: error: seed is 1"
    assert seen == [word for word in words if word != "--debug"]


def test_the_trainers_own_debug_option_stays(ended):
    seen = []
    assert ended(lambda: seen.extend(sys.argv[1:]), "--debug", "underflow_overflow") == (0, "")
    assert seen == ["--debug", "underflow_overflow"]


def test_ctrl_c_ends_with_130_in_silence(ended):
    assert ended(raising(KeyboardInterrupt())) == (130, "")


def test_a_cache_that_cannot_be_written_is_moved_by_its_variable(ended, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path))
    _, printed = ended(raising(PermissionError(13, "Permission denied", str(tmp_path / "movielens"))))
    assert printed.endswith(f"or choose another one, or set HF_ILORA_CACHE to another folder than {tmp_path}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_the_run_clean_up_and_is_named_in_the_log(ended, tmp_path, caplog, number, code):
    def main():
        with RunRecord(tmp_path, [], seed=0):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as a group and a parent send it
            time.sleep(60)

    with caplog.at_level(logging.INFO):
        assert ended(main) == (code, "")
    name = signal.Signals(number).name
    record = read_record(tmp_path / "run.json")
    assert (record["status"], record["error"]) == ("failed", f"Terminated: ended by {name}")
    assert f"ended by {name}" in caplog.text
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so(ended, monkeypatch):
    """As nohup starts a program."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ended(lambda: os.kill(os.getpid(), signal.SIGHUP)) == (0, "")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failed_program_passes_its_exit_code_on(ended):
    assert ended(raising(ProgramFailed("stage 2 failed", 7))) == (7, "recipe.py: error: stage 2 failed\n")


def test_the_exit_code_of_sys_exit_is_kept(ended):
    assert ended(lambda: sys.exit(5)) == (5, "")


@pytest.mark.parametrize("error", [ValueError("seed is 1"), KeyError("bug")])
def test_the_log_file_of_the_run_has_the_traceback(ended, tmp_path, error):
    handler = logging.FileHandler(tmp_path / "run.log")
    logging.getLogger().addHandler(handler)
    try:
        ended(raising(error))
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    text = (tmp_path / "run.log").read_text()
    assert "Traceback" in text and f"{type(error).__name__}: {error}" in text


def test_another_process_leaves_its_error_to_the_launcher(ended, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert ended(raising(ValueError("seed is 1"))) == (2, "")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "ValueError: seed is 1"


def test_messages_name_the_command_if_there_is_one(ended, monkeypatch):
    monkeypatch.setenv("HF_ILORA_PROGRAM", "hf-ilora prepare")
    assert ended(raising(ValueError("no"))) == (2, "hf-ilora prepare: error: no\n")
