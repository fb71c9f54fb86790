"""The parts that every recipe shares: settings, the log, `run.json`, and resuming from checkpoints."""

from .arguments import parse_arguments, prompt_path, read_config
from .checkpoints import check_same_inputs, configuration_differences, resumable_checkpoint
from .config_arguments import config_arguments
from .logs import LogMetricsCallback, log_to_run, set_up_logging
from .processes import ProgramFailed, leave_launch, run_main, sole_writer
from .record import RunRecord, is_finished, read_record
from .split_evaluation import evaluate_splits

__all__ = [
    "LogMetricsCallback",
    "ProgramFailed",
    "RunRecord",
    "check_same_inputs",
    "config_arguments",
    "configuration_differences",
    "evaluate_splits",
    "is_finished",
    "leave_launch",
    "log_to_run",
    "parse_arguments",
    "prompt_path",
    "read_config",
    "read_record",
    "resumable_checkpoint",
    "run_main",
    "set_up_logging",
    "sole_writer",
]
