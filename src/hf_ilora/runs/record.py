"""Writes `run.json`: the settings, data, software, durations and metrics of a run."""

import contextlib
import dataclasses
import json
import logging
import math
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from hf_ilora.devices import process_state
from hf_ilora.files import written_whole
from hf_ilora.runs.launch_settings import launch_settings
from hf_ilora.runs.processes import command_words

logger = logging.getLogger(__name__)

# Keys that every record has and that its readers rely on.
_RECORD_KEYS = ("status", "started", "configuration", "seed", "data_fingerprint", "git", "durations_seconds", "metrics")

_PACKAGES = (
    "hf_ilora",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
)


class RunRecord:
    """The `run.json` of one run, written at the start, after every stage and entry, and at the end.

    Every process of a launch creates one, and only the main process writes. Create it after `parse_arguments`, which
    initialises the state that the processes share. As a context manager it sets the status: "running", then "finished",
    or "failed" with the error. A run that was killed stays "running". The record of an earlier run in the same folder,
    which this run resumes, is kept under "earlier_runs" without its configuration.

    Args:
        output_dir: the folder of `run.json`, created if it does not exist.
        arguments: the dataclasses of the run. Fields whose names end in `_token` are left out.
        seed: the random seed of the run.
    """

    def __init__(self, output_dir: str | Path, arguments: Sequence[object], *, seed: int):
        state = process_state()
        self.is_main_process = state.is_main_process
        self.path = Path(output_dir) / "run.json"
        self.start = time.monotonic()
        self.content = {
            "status": "running",
            "started": _now(),
            "command": command_words(),
            "configuration": plain_configuration(arguments),
            "seed": seed,
            "data_fingerprint": None,
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
            "git": _git_state(Path(__file__).resolve().parents[3]),
            "world_size": state.num_processes,
            "device": str(state.device),
            "launch": launch_settings(arguments),
            "threads": torch.get_num_threads(),
            "durations_seconds": {},
            "processor_seconds": {},
            "metrics": {},
        }
        if self.is_main_process:
            earlier = _earlier_runs(self.path)
            if earlier:
                self.content["earlier_runs"] = earlier
        self._write()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the duration of a stage and its processor time; stages of the same name add up.

        The processor time sums all threads of the main process. Unlike the duration, it hardly depends on other
        programs on the machine.
        """
        starts = {"durations_seconds": time.monotonic(), "processor_seconds": time.process_time()}
        try:
            yield
        finally:
            ends = {"durations_seconds": time.monotonic(), "processor_seconds": time.process_time()}
            for clock, end in ends.items():
                stages = self.content[clock]
                stages[name] = round(stages.get(name, 0.0) + end - starts[clock], 3)
        self._write()  # after an error `__exit__` does

    def add_data(self, fingerprint: str) -> None:
        """Record the fingerprint of the run's data."""
        self.content["data_fingerprint"] = fingerprint
        self._write()

    def add_metrics(self, name: str, metrics: dict[str, object]) -> None:
        """Record metrics under a name, such as "test"."""
        self.content["metrics"].setdefault(name, {}).update(metrics)
        self._write()

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.content["status"] = "finished" if error is None else "failed"
        if error is not None:
            self.content["error"] = f"{kind.__name__}: {error}".removesuffix(": ")
        self.content["durations_seconds"]["total"] = round(time.monotonic() - self.start, 3)
        try:
            self._write()
        except OSError as failure:
            if error is None:
                raise
            logger.warning("%s still says that the run is running: %s", self.path, failure)  # raise `error`, not this

    def _write(self) -> None:
        if not self.is_main_process:
            return
        text = json.dumps(_plain(self.content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with written_whole(self.path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def read_record(path: str | Path) -> dict[str, object]:
    """The content of a `run.json`.

    Raises:
        ValueError: the file is not the record of a run.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return content | {name: content[name] for name in _RECORD_KEYS}  # raises for a missing key
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not the record of a run ({error!r}): move it away or choose another folder"
        ) from error


def is_finished(folder: Path) -> bool:
    """Whether a folder has the record of a finished run.

    Raises:
        ValueError: its `run.json` is not the record of a run.
    """
    record = folder / "run.json"
    return record.exists() and read_record(record)["status"] == "finished"


def plain_configuration(arguments: Sequence[object]) -> dict[str, dict[str, object]]:
    """The settings of a run by dataclass and field, in JSON types and without secrets."""
    return {type(part).__name__: _plain(_configuration(part)) for part in arguments}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _configuration(part: object) -> dict[str, object]:
    return {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(part)
        if field.init and not field.name.endswith("_token")
    }


def _plain(value: object) -> object:
    """The value in JSON types; NaN and infinity, which JSON lacks, become text."""
    if dataclasses.is_dataclass(value):
        return _plain(_configuration(value))
    if isinstance(value, dict):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state(project: Path) -> dict[str, object] | None:
    """The commit of the project and whether files differ from it; None if the package does not run from a checkout."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(project), *command], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != project:
            return None  # installed inside the checkout of another project
        return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain") != ""}
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, no repository, no commit
        return None


def _earlier_runs(path: Path) -> list[dict[str, object]]:
    """The records of earlier runs in the same folder, oldest first."""
    if not path.exists():
        return []
    last = read_record(path)
    kept = {name: last[name] for name in ("status", "started", "seed", "git", "durations_seconds", "metrics")}
    return [*last.get("earlier_runs", []), kept]
