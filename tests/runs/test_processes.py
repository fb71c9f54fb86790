"""run_main: which errors are a user's, what is printed about them, and the exit code."""

import json
import logging
import sys

import pytest

from hf_ilora import SASRecConfig
from hf_ilora.downloads import DownloadError
from hf_ilora.runs import ProgramFailed, run_main


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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("top_k is 0: expected at least 1"), "top_k is 0: expected at least 1"),
        (ValueError("bad YAML:\n  line 3\n\n  column 1"), "bad YAML: line 3 column 1"),
        (FileNotFoundError(2, "No such file or directory", "items.csv"), "No such file or directory: items.csv"),
        (FileExistsError("outputs is there already"), "outputs is there already"),
        (PermissionError(13, "Permission denied", "/outputs"), "Permission denied: /outputs"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (DownloadError("the server does not answer"), "the server does not answer"),
        (ValueError("the title \x1b[31m\u202e is long"), r"the title \x1b[31m\u202e is long"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(ended, error, message):
    assert ended(raising(error)) == (2, f"recipe.py: error: {message}\n")


def test_what_a_library_raises_points_to_debug(ended):
    code, printed = ended(lambda: json.loads("{"))
    assert code == 2
    assert printed.splitlines()[0].startswith("recipe.py: error: Expecting property name")
    assert printed.splitlines()[1:] == ["--debug shows the traceback"]


def test_the_check_of_a_configuration_speaks_for_itself(ended):
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


def test_the_name_of_the_command_is_told_where_there_is_one(ended, monkeypatch):
    monkeypatch.setenv("HF_ILORA_PROGRAM", "hf-ilora prepare")
    assert ended(raising(ValueError("no"))) == (2, "hf-ilora prepare: error: no\n")
