"""What every recipe does around its work: settings in, log and `run.json` out, checkpoints to go on from."""

from .arguments import parse_arguments, prompt_path, read_config
from .checkpoints import configuration_differences, resumable_checkpoint
from .config_arguments import config_arguments
from .logs import LogMetricsCallback, set_up_logging
from .processes import ProgramFailed, leave_launch, run_main
from .record import RunRecord, read_record

__all__ = [
    "LogMetricsCallback",
    "ProgramFailed",
    "RunRecord",
    "config_arguments",
    "configuration_differences",
    "leave_launch",
    "parse_arguments",
    "prompt_path",
    "read_config",
    "read_record",
    "resumable_checkpoint",
    "run_main",
    "set_up_logging",
]
