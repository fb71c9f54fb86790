"""The frame of every recipe: it reads settings, writes a log and `run.json`, and finds checkpoints to resume from."""

from .arguments import parse_arguments, read_config
from .checkpoints import configuration_differences, resumable_checkpoint
from .config_arguments import config_arguments
from .logs import LogMetricsCallback, log_to_run, set_up_logging
from .processes import leave_launch
from .record import RunRecord, read_record

__all__ = [
    "LogMetricsCallback",
    "RunRecord",
    "config_arguments",
    "configuration_differences",
    "leave_launch",
    "log_to_run",
    "parse_arguments",
    "read_config",
    "read_record",
    "resumable_checkpoint",
    "set_up_logging",
]
