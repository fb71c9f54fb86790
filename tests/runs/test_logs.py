"""Messages appear once on the console and once in run.log, also those of a Trainer."""

import logging
import re
import sys
import warnings

import datasets
import pytest
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerState, TrainingArguments

from hf_ilora.runs import logs as logs_module
from hf_ilora.runs.logs import WaitingStepsCallback, log_to_run, set_up_logging


@pytest.fixture(autouse=True)
def logging_as_it_was():
    loggers = [logging.getLogger(name) for name in ("", "transformers", "datasets")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(level)
        logger.propagate = propagate
        for handler in handlers:
            logger.addHandler(handler)


def log_everything():
    logging.getLogger("hf_ilora.data").info("from ours")
    transformers.utils.logging.get_logger("transformers.trainer").info("from transformers")
    transformers.utils.logging.get_logger("transformers.trainer").warning("a warning from transformers")
    datasets.utils.logging.get_logger("datasets.arrow").info("from datasets")
    warnings.warn("from warnings", stacklevel=1)


def test_every_message_is_once_in_the_file_with_its_time(tmp_path):
    set_up_logging(tmp_path / "run")
    log_everything()
    file = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    messages = ["from ours", "from transformers", "from datasets", "a warning from transformers"]
    assert [file.count(f": {message}\n") for message in messages] == [1, 1, 1, 1]
    assert "WARNING py.warnings:" in file and "UserWarning: from warnings" in file
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO hf_ilora.data: from ours$", file, re.MULTILINE)


def test_no_text_in_a_message_controls_the_terminal_or_looks_like_a_message(tmp_path, capsys):
    set_up_logging(tmp_path)
    title = "\x1b[2J\u202e\n2026-01-01 00:00:00,000 INFO hf_ilora: forged"
    logging.getLogger("hf_ilora.data").info("a title is %s", title)
    try:
        raise ValueError(title)
    except ValueError:
        logging.getLogger("hf_ilora.data").exception("failed")
    for text in ((tmp_path / "run.log").read_text(encoding="utf-8"), capsys.readouterr().err):
        assert r"a title is \x1b[2J\u202e" in text
        assert not set(text) & set("\x1b\u202e")
        assert not re.search(r"^2026-01-01 .* forged", text, re.MULTILINE)


def test_a_log_on_a_full_disk_is_reported_once_and_the_run_continues(tmp_path, capsys):
    (tmp_path / "run.log").symlink_to("/dev/full")
    set_up_logging(tmp_path)
    for _ in range(3):
        log_everything()
    console = capsys.readouterr().err
    assert console.count("cannot be written ([Errno 28] No space left on device): lines are missing") == 1
    assert "Traceback" not in console and console.count("from ours") == 3


def test_console_shows_our_reports_and_all_warnings_once(tmp_path, capsys):
    set_up_logging(tmp_path / "run")
    log_everything()
    logging.getLogger("experiments.study").info("from an experiment")
    console = capsys.readouterr().err
    assert console.count(" INFO hf_ilora.data: from ours") == 1
    assert console.count(" INFO experiments.study: from an experiment") == 1
    assert console.count("a warning from transformers") == 1
    assert "UserWarning: from warnings" in console
    assert ": from transformers" not in console and "from datasets" not in console


def test_a_second_call_replaces_the_first(tmp_path, capsys):
    set_up_logging(tmp_path / "one")
    set_up_logging(tmp_path / "two")
    set_up_logging(tmp_path / "two")
    logging.getLogger("hf_ilora").info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "two" / "run.log").read_text().count("once") == 1
    assert (tmp_path / "one" / "run.log").read_text() == ""


def test_an_existing_log_is_continued(tmp_path):
    (tmp_path / "run.log").write_text("earlier\n")
    set_up_logging(tmp_path)
    logging.getLogger("hf_ilora").info("later")
    assert (tmp_path / "run.log").read_text().startswith("earlier\n")
    assert "later" in (tmp_path / "run.log").read_text()


def test_other_processes_only_warn_and_write_no_file(tmp_path, capsys, monkeypatch):
    class SecondProcess:
        is_main_process, num_processes, device = False, 2, torch.device("cpu")

    monkeypatch.setattr(logs_module, "process_state", SecondProcess)
    set_up_logging(tmp_path / "run")
    log_everything()
    logging.getLogger("hf_ilora").warning("a warning")
    console = capsys.readouterr().err
    assert "from ours" not in console and ": from transformers" not in console and "from datasets" not in console
    assert "a warning" in console
    assert not (tmp_path / "run").exists()


def test_a_message_does_not_tear_a_progress_bar(tmp_path, capsys):
    set_up_logging(tmp_path)
    with tqdm(total=2, file=sys.stderr, ascii=True) as bar:
        logging.getLogger("hf_ilora").info("in between")
        bar.update(2)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    message = next(line for line in lines if "in between" in line)
    assert "it/s" not in message and "%" not in message
    assert any("2/2" in line for line in lines)


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, row):
        return {"loss": (self.weight[row] ** 2).sum()}


@pytest.mark.parametrize("disable_tqdm", [False, True], ids=["bars", "no bars"])
def test_a_trainer_reports_every_loss_and_evaluation_once(tmp_path, capfd, disable_tqdm):
    rows = [{"row": row} for row in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        use_cpu=True,
        disable_tqdm=disable_tqdm,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        eval_strategy="epoch",
        logging_strategy="epoch",
        label_names=["row"],
        save_strategy="no",
        prediction_loss_only=True,
    )
    trainer = Trainer(Squares(), arguments, train_dataset=rows, eval_dataset=rows)
    log_to_run(trainer)
    set_up_logging(tmp_path)
    trainer.evaluate()  # before training there is no step and no time left
    trainer.train()
    trainer.evaluate()
    file = (tmp_path / "run.log").read_text(encoding="utf-8")
    lines = [line for line in file.splitlines() if "hf_ilora.runs.logs" in line]
    assert re.search(rf": training on cpu, with {torch.get_num_threads()} CPU thread\(s\)$", lines.pop(1))
    assert [line.count("eval_loss") for line in lines] == [1, 0, 1, 0, 1, 1]
    assert re.search(r"INFO hf_ilora\.runs\.logs: eval_loss 4, ", lines[0])
    assert re.search(r": epoch 1, step 2 of 4, \d+ s left: loss [\d.]+, grad_norm", lines[1])
    assert re.search(r": epoch 2, step 4 of 4, 0 s left: eval_loss", lines[4])
    assert "step" not in lines[5]
    output, console = capfd.readouterr()
    assert "eval_loss" not in output  # where transformers prints its dictionaries
    assert console.count("eval_loss") == 4 and console.count("grad_norm") == 2
    assert ("4/4" in console) != disable_tqdm


def run_steps(callback: WaitingStepsCallback, clock: dict, steps: int, wall: float, processor: float) -> None:
    state = TrainerState(is_world_process_zero=True)
    for _ in range(steps):
        callback.on_step_begin(None, state, None)
        clock["wall"] += wall
        clock["processor"] += processor
        callback.on_step_end(None, state, None)


def test_steps_that_wait_for_the_machine_are_reported_once(monkeypatch, caplog):
    clock = {"wall": 100.0, "processor": 10.0}
    monkeypatch.setattr(logs_module.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(logs_module.time, "process_time", lambda: clock["processor"])
    callback = WaitingStepsCallback()
    callback.on_train_begin(None, None, None)
    run_steps(callback, clock, steps=20, wall=0.4, processor=0.1)
    run_steps(callback, clock, steps=1, wall=3.0, processor=0.1)  # one step alone says nothing
    run_steps(callback, clock, steps=19, wall=0.2, processor=0.1)
    assert not caplog.records
    run_steps(callback, clock, steps=60, wall=0.6, processor=0.1)
    assert [record.message for record in caplog.records] == [
        "20 steps took 12 s, in which this process had a core for 2 s: the machine is short of cores or memory; stop "
        "other programs, or set OMP_NUM_THREADS to the cores that are free"
    ]
