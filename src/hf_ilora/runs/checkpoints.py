"""Whether a run goes on from an earlier one in its folder, and from which checkpoint."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_ilora.runs.record import plain_configuration, read_record

logger = logging.getLogger(__name__)

# What may differ between a killed run and the one that goes on with it.
_FREE_FIELDS = {"output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "log_level", "local_rank"}


def resumable_checkpoint(output_dir: str | Path, arguments: Sequence[object], data_fingerprint: str) -> str | None:
    """The checkpoint from which a run with these settings goes on in `output_dir`, or None to begin anew.

    Args:
        output_dir: the folder of the run.
        arguments: the dataclasses of the run, as given to `RunRecord`.
        data_fingerprint: of the data the run reads.

    Returns:
        Path of the last whole checkpoint of a run that was killed or failed; None where there is none.

    Raises:
        ValueError: when the folder holds a finished run, one with other settings or on other data, or checkpoints of
            unknown origin: nothing of an earlier run is ever overwritten.
    """
    output_dir = Path(output_dir)
    record = output_dir / "run.json"
    if not record.exists():
        if _checkpoints(output_dir):
            raise ValueError(f"{output_dir} holds checkpoints but no run.json: choose another output_dir")
        return None
    earlier = read_record(record)
    if earlier["status"] == "finished":
        raise ValueError(f"{output_dir} holds a finished run: choose another output_dir, or delete the folder")
    differences = configuration_differences(earlier, arguments)
    if earlier["data_fingerprint"] not in (None, data_fingerprint):
        differences.append(f"the data's fingerprint was {earlier['data_fingerprint']} and is {data_fingerprint}")
    if differences:
        raise ValueError(
            f"{output_dir} holds an unfinished run that differs from this one: {'; '.join(differences)}; "
            "choose another output_dir, or delete the folder"
        )
    checkpoint = last_whole_checkpoint(output_dir)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    return checkpoint


def check_same_inputs(checkpoint: str | None, inputs: Mapping[str, Mapping[str, object]]) -> None:
    """Make sure that a resumed run reads what the run before it read.

    Args:
        checkpoint: what `resumable_checkpoint` returned.
        inputs: what the run reads beside its data set, with the fingerprints that tell it apart; as recorded with
            `RunRecord.add_metrics`.

    Raises:
        ValueError: when the run that the checkpoint belongs to read something else.
    """
    if checkpoint is None:
        return
    recorded = read_record(Path(checkpoint).parent / "run.json")["metrics"]
    for name, origin in inputs.items():
        for key, value in origin.items():
            earlier = recorded.get(name, {}).get(key)
            if earlier != value:
                raise ValueError(
                    f"{checkpoint} was trained on {name} with the {key} {earlier}, and they have {value} now: expected "
                    "the same; choose another output_dir, or delete it"
                )


def configuration_differences(record: dict, arguments: Sequence[object], ignored: Sequence[str] = ()) -> list[str]:
    """Settings in which `arguments` differ from those of an earlier run's record, a sentence each."""
    return [
        f"{name} was {before.get(name)!r} and is {value!r}"
        for part, settings in plain_configuration(arguments).items()
        for before in [record["configuration"].get(part, {})]
        for name, value in settings.items()
        if name not in _FREE_FIELDS and name not in ignored and before.get(name) != value
    ]


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None.

    The Trainer writes `trainer_state.json` after weights, optimizer and random state, so a checkpoint that a kill cut
    short has none, or half of one; it is passed over for the one before it.
    """
    for checkpoint in reversed(_checkpoints(output_dir)):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            logger.warning("%s is not whole (a run was killed while writing it): passing it over", checkpoint)
            continue
        return str(checkpoint)
    return None


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in Path(output_dir).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))
