"""Decides whether a run resumes an earlier run in its folder, and from which checkpoint."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ilora.devices import process_state
from hf_ilora.runs.launch_settings import launch_differences
from hf_ilora.runs.record import plain_configuration, read_record

logger = logging.getLogger(__name__)

# Fields that may differ between an interrupted run and the run that resumes it.
_FREE_FIELDS = {"output_dir", "disable_tqdm", "report_to", "log_level", "local_rank"}


def resumable_checkpoint(output_dir: str | Path, arguments: Sequence[object], data_fingerprint: str) -> str | None:
    """The checkpoint from which a run with these settings resumes in `output_dir`, or None to start from scratch.

    Deletes the incomplete checkpoints of a killed run: they would count as newer than those that this run writes, and
    the Trainer would keep them instead.

    Args:
        output_dir: the folder of the run.
        arguments: the dataclasses of the run, as passed to `RunRecord`.
        data_fingerprint: fingerprint of the run's data.

    Returns:
        The path of the last complete checkpoint of an interrupted run; None if there is none.

    Raises:
        ValueError: `resume_from_checkpoint` is set, or the folder contains a finished run, checkpoints of a run with
            other settings or data, or checkpoints of unknown origin. Only a run without a checkpoint is overwritten.
    """
    for settings in arguments:
        if isinstance(settings, TrainingArguments) and settings.resume_from_checkpoint is not None:
            raise ValueError(
                f"resume_from_checkpoint is {settings.resume_from_checkpoint!r}: leave it out; a run resumes from the "
                "last complete checkpoint in its output_dir, so pass the output_dir of the run to resume"
            )
    output_dir = Path(output_dir)
    record = output_dir / "run.json"
    if not record.exists():
        if _checkpoints(output_dir):
            raise ValueError(f"{output_dir} contains checkpoints but no run.json: choose another output_dir")
        return None
    earlier = read_record(record)
    if earlier["status"] == "finished":
        raise ValueError(f"{output_dir} contains a finished run: choose another output_dir, or delete the folder")
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is None:
        _delete_incomplete(output_dir)
        return None  # nothing is lost, whatever the settings were
    differences = configuration_differences(earlier, arguments) + launch_differences(earlier, arguments)
    if earlier["data_fingerprint"] not in (None, data_fingerprint):
        differences.append(f"the data's fingerprint was {earlier['data_fingerprint']} and is {data_fingerprint}")
    if differences:
        raise ValueError(
            f"{output_dir} contains an unfinished run that differs from this one: {'; '.join(differences)}; "
            "choose another output_dir, delete the folder, or resume with the same settings and launch"
        )
    _delete_incomplete(output_dir)
    logger.info("resuming from %s", checkpoint)
    return checkpoint


def check_same_inputs(checkpoint: str | None, inputs: Mapping[str, Mapping[str, object]]) -> None:
    """Check that a resumed run reads the same inputs as the interrupted run.

    Args:
        checkpoint: the result of `resumable_checkpoint`.
        inputs: the fingerprints of the inputs other than the data set, by input and kind of fingerprint, as recorded
            with `RunRecord.add_metrics`.

    Raises:
        ValueError: the run that wrote the checkpoint read other inputs.
    """
    if checkpoint is None:
        return
    recorded = read_record(Path(checkpoint).parent / "run.json")["metrics"]
    for name, origin in inputs.items():
        for key, value in origin.items():
            earlier = recorded.get(name, {}).get(key)
            if earlier != value:
                raise ValueError(
                    f"{checkpoint} was trained on {name} whose {key} was {earlier} and is {value} now: expected the "
                    "same; choose another output_dir, or delete it"
                )


def configuration_differences(record: dict, arguments: Sequence[object], ignored: Sequence[str] = ()) -> list[str]:
    """The settings in which `arguments` differ from an earlier run's record, one sentence each."""
    return [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for part, settings in plain_configuration(arguments).items()
        for before in [record["configuration"].get(part, {})]
        for name, value in settings.items()
        if name not in _FREE_FIELDS and name not in ignored and before.get(name) != value
    ]


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in `output_dir`, or None.

    The Trainer writes `trainer_state.json` after weights, optimizer and random state, so a checkpoint that a crash
    interrupted has none, or a truncated one. Such a checkpoint is skipped.
    """
    for checkpoint in reversed(_checkpoints(output_dir)):
        if _is_whole(checkpoint):
            return str(checkpoint)
        logger.warning("%s is incomplete (a run was interrupted while writing it): skipping it", checkpoint)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _delete_incomplete(output_dir: Path) -> None:
    if process_state().is_main_process:
        for checkpoint in _checkpoints(output_dir):
            if not _is_whole(checkpoint):
                shutil.rmtree(checkpoint)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))
