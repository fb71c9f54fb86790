"""One log format for a run's console and its `run.log`."""

import logging
import sys
import time
import warnings
from pathlib import Path

import datasets
import transformers
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

logger = logging.getLogger(__name__)

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _ConsoleHandler(logging.Handler):
    """Writes above the progress bars instead of through them, and leaves what libraries only tell to the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.name == "__main__" or record.name.startswith("hf_ilora")
        return ours or record.levelno > logging.INFO

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:  # the contract of logging: a message that cannot be written must not end the run
            self.handleError(record)


class _RunFileHandler(logging.FileHandler):
    """Marks the handler of this module, so that a second call replaces it."""


def set_up_logging(output_dir: str | Path) -> None:
    """Sends what the recipe and hf_ilora report and all warnings to the console, and that and more to `run.log`.

    The file also has what transformers, datasets and other libraries report. The main process logs from INFO on, the
    others from WARNING on and to the console only. A second call replaces the first. Call it after `parse_arguments`,
    which starts what the processes share.

    Args:
        output_dir: the folder of `run.log`, made if it does not exist; an existing log is continued.
    """
    is_main_process = PartialState().is_main_process
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _ConsoleHandler | _RunFileHandler)]:
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        handlers.append(_RunFileHandler(Path(output_dir) / "run.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)
    level = logging.INFO if is_main_process else logging.WARNING
    root.setLevel(level)
    logging.captureWarnings(True)
    # DeepSpeed calls torch's older names, which would be told of several times per step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Both libraries print through a handler of their own; one line must come out once, and in one format.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity(level)
    logging.getLogger("datasets").handlers.clear()
    datasets.utils.logging.set_verbosity(level)


class LogMetricsCallback(TrainerCallback):
    """Writes what the Trainer reports, losses and metrics, to the run's log as one line each, with the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        steps_done = state.global_step - self.first_step
        seconds_left = (time.monotonic() - self.begin) / max(1, steps_done) * (state.max_steps - state.global_step)
        values = ", ".join(
            f"{name} {value:.4g}"
            for name, value in logs.items()
            if name != "epoch" and not name.endswith("_per_second")
        )
        logger.info(
            "epoch %.4g, step %d of %d, %.0f s left: %s",
            state.epoch, state.global_step, state.max_steps, seconds_left, values,
        )  # fmt: skip


class _SilentProgressCallback(ProgressCallback):
    """The progress bar alone: `LogMetricsCallback` reports what the Trainer logs."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def log_to_run(trainer: Trainer) -> None:
    """Report what a Trainer logs once, as lines of the run's log."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_SilentProgressCallback)
    trainer.add_callback(LogMetricsCallback)
