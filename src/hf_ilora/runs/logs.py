"""One log format for a run's console and its `run.log`."""

import contextlib
import logging
import sys
import time
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from hf_ilora.devices import process_state
from hf_ilora_cli.shown_text import shown_lines

logger = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# The beginnings of the names of our loggers: programs, the package, and the modules that our programs share.
_OUR_LOGGERS = ("__main__", "hf_ilora", "benchmarks.", "experiments.")


class _Formatter(logging.Formatter):
    """Escapes control characters and indents all lines but the first, so that no text can pass for another message."""

    def format(self, record: logging.LogRecord) -> str:
        return shown_lines(super().format(record)).replace("\n", "\n  ")


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bars instead of through them, and omits the libraries' messages below WARNING."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name.startswith(_OUR_LOGGERS) or record.levelno > logging.INFO

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # as logging requires: a message that cannot be written must not end the run
            self.handleError(record)


class _RunFileHandler(logging.FileHandler):
    """Writes `run.log`. It is a class of its own so that a second `set_up_logging` recognises and replaces it."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report once on the console that the log cannot be written, for example to a full disk; the run continues."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            reason = f"{self.baseFilename} cannot be written ({sys.exc_info()[1]})"
            tqdm.write(shown_lines(f"{reason}: lines are missing"), sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing tries again to write the lines that failed before
            super().close()


def set_up_logging(output_dir: str | Path) -> None:
    """Log to the console and to `run.log`.

    The console shows the messages of the program and of hf_ilora, and all warnings; the file also has the messages of
    transformers, datasets and other libraries. The main process logs messages from INFO on; the others log warnings, to
    the console only. A second call replaces the first. Call it after `parse_arguments`, which initialises the state
    that the processes share.

    Args:
        output_dir: the folder of `run.log`, created if it does not exist. Messages are appended to an existing log.
    """
    is_main_process = process_state().is_main_process
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _ConsoleHandler | _RunFileHandler)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(_RunFileHandler(Path(output_dir) / "run.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Formatter(_FORMAT))
        root.addHandler(handler)
    level = logging.INFO if is_main_process else logging.WARNING
    root.setLevel(level)
    logging.captureWarnings(True)
    # DeepSpeed calls torch's older names, which would give several warnings per step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Both libraries print through handlers of their own: every message must appear once, in one format.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity(level)
    logging.getLogger("datasets").handlers.clear()
    datasets.utils.logging.set_verbosity(level)


def log_to_run(trainer) -> None:
    """Make a Trainer log its losses and metrics, one line each, instead of printing them as dictionaries.

    The progress bars stay.

    Args:
        trainer: a `transformers.Trainer`, before training.
    """
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_ProgressBarsCallback)
    trainer.add_callback(LogMetricsCallback)
    if trainer.args.device.type == "cpu":  # elsewhere the processor may wait for the device all the time
        trainer.add_callback(WaitingStepsCallback)


class _ProgressBarsCallback(ProgressCallback):
    """The progress bars of transformers, without the printed metrics."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class LogMetricsCallback(TrainerCallback):
    """Logs the losses and metrics of a Trainer as one line each; during training with the step and the time left."""

    def __init__(self):
        self.begin: float | None = None  # None outside of training

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin, self.first_step = time.monotonic(), state.global_step
        logger.info("training on %s, with %d CPU thread(s)", args.device, torch.get_num_threads())

    def on_train_end(self, args, state, control, **kwargs):
        self.begin = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        values = ", ".join(
            f"{name} {value:.4g}"
            for name, value in logs.items()
            if name != "epoch" and not name.endswith("_per_second")
        )
        if self.begin is None:
            logger.info("%s", values)
            return
        steps_done = state.global_step - self.first_step
        seconds_left = (time.monotonic() - self.begin) / max(1, steps_done) * (state.max_steps - state.global_step)
        logger.info(
            "epoch %.4g, step %d of %d, %.0f s left: %s",
            state.epoch, state.global_step, state.max_steps, seconds_left, values,
        )  # fmt: skip


class WaitingStepsCallback(TrainerCallback):
    """Warns once when training steps wait for the machine: they take far longer than their processor time.

    It compares sums over `STEPS` steps, since a single short step may lose its core for a moment.
    """

    STEPS, MANY_TIMES = 20, 5

    def __init__(self):
        self.warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps, self.wall, self.processor = 0, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.wall += time.perf_counter() - self.begin[0]
        self.processor += time.process_time() - self.begin[1]
        if self.steps < self.STEPS:
            return
        if state.is_world_process_zero and not self.warned and self.wall > self.MANY_TIMES * self.processor:
            self.warned = True
            logger.warning(
                "%d steps took %.3g s, in which this process had a core for %.3g s: the machine is short of cores or "
                "memory; stop other programs, or set OMP_NUM_THREADS to the cores that are free",
                self.STEPS, self.wall, self.processor,
            )  # fmt: skip
        self.on_train_begin(args, state, control)
