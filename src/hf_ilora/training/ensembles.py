"""Ensembles of teachers by name, and the file in which their tuned weights are kept."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.distillation.ensemble import Member, as_member
from hf_ilora.distillation.ensemble_members import LabelScores, TitleSimilarity
from hf_ilora.distillation.labelling import REQUESTS_FILE
from hf_ilora.distillation.teacher_labels import DESCRIPTION_FILE
from hf_ilora.distillation.teachers import labels_of_teacher, model_fingerprint
from hf_ilora.files import written_whole
from hf_ilora.models.loading import SavedRecommender, check_catalogue, load_recommender
from hf_ilora.titles.encoder_source import locate_encoder
from hf_ilora.titles.encoders import TF_IDF
from hf_ilora.titles.pca import whitened

TITLES = "titles"  # the member that compares titles
ENSEMBLE_FILE = "ensemble.json"
FORMAT_VERSION = 1
_REMEDY = "tune again with `hf-ilora tune-ensemble`, or restore the file"


def load_members(
    names: Sequence[str],
    sequences: SequenceDatasets,
    title_embeddings: Callable[[], torch.Tensor],
    title_decay: float,
    split: str = "train",
    trust_remote_code: bool = False,
) -> list[Member]:
    """The members of an ensemble.

    Args:
        names: folders or Hub names of saved recommenders, folders of labels, or "titles".
        sequences: the data set that the teachers are asked about.
        title_embeddings: returns (num_items + 1, size); called for "titles" only, when the others are loaded.
        title_decay: decay of the member "titles", see `TitleSimilarity`.
        split: the split that stored labels are about.
        trust_remote_code: as in `load_recommender`.

    Raises:
        ValueError: for a name that is none of these, a member that has another catalogue or cannot answer at every
            position, and under ZeRO-3.
        FileNotFoundError: for labels that are not finished.
    """
    check_no_zero3()
    members = [None if name == TITLES else _loaded_member(name, sequences, split, trust_remote_code) for name in names]
    return [
        TitleSimilarity(whitened(title_embeddings()), title_decay) if member is None else member for member in members
    ]


def load_online_teacher(name: str, sequences: SequenceDatasets, trust_remote_code: bool = False) -> SavedRecommender:
    """A saved recommender that knows the items of the data set.

    Raises:
        ValueError: for anything else, and under ZeRO-3.
    """
    check_no_zero3()
    try:
        model = load_recommender(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the teacher {name!r} cannot be loaded: expected the folder or Hub name of a saved recommender, a folder "
            f"of labels, or the word {TITLES} ({error})"
        ) from error
    check_catalogue(model, name, sequences.num_items, sequences.raw_ids)
    return model


def check_no_zero3() -> None:
    """Raise a ValueError under ZeRO-3, where online teachers cannot be asked."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 spreads weights over processes, where online teachers cannot be asked: expected teacher_labels, or "
            "another accelerate configuration"
        )


def is_label_folder(name: str) -> bool:
    """Whether a folder has labels of `hf-ilora label`, finished or not."""
    return any((Path(name) / file).is_file() for file in (DESCRIPTION_FILE, REQUESTS_FILE))


def member_origins(members: Sequence[Member], title_encoder: str, title_layer: int | None) -> list[dict[str, object]]:
    """The origin of each member's scores, in JSON types: members with equal origins give equal scores.

    Args:
        members: members of an ensemble.
        title_encoder, title_layer: the encoder of the titles, and its layer.
    """
    return [_origin(member, title_encoder, title_layer) for member in members]


def _origin(member: Member, title_encoder: str, title_layer: int | None) -> dict[str, object]:
    if isinstance(member, TitleSimilarity):
        return title_origin(title_encoder, title_layer) | {"decay": member.decay}
    if isinstance(member, LabelScores):
        return member.labels.origin()
    return {"fingerprint": model_fingerprint(member.model)}


def title_origin(encoder: str, layer: int | None) -> dict[str, object]:
    """The origin of title vectors beside the titles: the identity of the encoder, and its layer."""
    return {"encoder": TF_IDF if encoder == TF_IDF else locate_encoder(encoder).identity, "layer": layer}


def _loaded_member(name: str, sequences: SequenceDatasets, split: str, trust_remote_code: bool) -> Member:
    if is_label_folder(name):
        return as_member(labels_of_teacher(name, sequences, split=split))
    model = load_online_teacher(name, sequences, trust_remote_code)
    try:
        return as_member(model)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@dataclass(frozen=True)
class TunedEnsemble:
    """An ensemble that `hf-ilora tune-ensemble` tuned: the entries of ensemble.json that a distillation reads.

    Args:
        members: names, as `load_members` takes them; paths count from the working directory.
        origins: origin of each member, see `member_origins`.
        weights: weight of each member, 0 for those that do not help.
        temperature: divides the weighted sum.
        title_decay, title_encoder, title_layer: settings of the member "titles".
    """

    members: list[str]
    origins: list[dict]
    weights: list[float]
    temperature: float
    title_decay: float
    title_encoder: str
    title_layer: int | None

    def save(self, folder: str | os.PathLike, evidence: dict[str, object]) -> None:
        """Write ensemble.json.

        Args:
            folder: existing folder.
            evidence: further entries, in JSON types: the data, and the mixtures that were tried with their quality.
        """
        content = {"format_version": FORMAT_VERSION} | asdict(self) | evidence
        with written_whole(Path(folder) / ENSEMBLE_FILE) as unfinished:
            unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "TunedEnsemble":
        """Read the ensemble.json of a folder; members of weight 0 are left out.

        Raises:
            FileNotFoundError: for a folder without ensemble.json.
            ValueError: for a file that `save` did not write, or that was edited into something invalid.
        """
        path = Path(folder) / ENSEMBLE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected a folder that `hf-ilora tune-ensemble` wrote")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content.pop("format_version")
            ensemble = cls(**{name: content[name] for name in cls.__dataclass_fields__})
            ensemble._check()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tuned ensemble ({error!r}): {_REMEDY}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format_version {version!r}: expected {FORMAT_VERSION}; {_REMEDY}")
        kept = [place for place, weight in enumerate(ensemble.weights) if weight]
        lists = {name: [getattr(ensemble, name)[place] for place in kept] for name in ("members", "origins", "weights")}
        return cls(**asdict(ensemble) | lists)

    def _check(self) -> None:
        """Raise a ValueError or TypeError unless every value is of its type and in its range."""
        checks = {
            "members": all(isinstance(name, str) for name in self.members),
            "origins": len(self.origins) == len(self.members) and all(isinstance(each, dict) for each in self.origins),
            "temperature": 0 < self.temperature < math.inf,
            "title_decay": 0 <= self.title_decay <= 1,
            "title_encoder": isinstance(self.title_encoder, str),
            "title_layer": self.title_layer is None or isinstance(self.title_layer, int),
        }
        for name, is_right in checks.items():
            if not is_right:
                raise ValueError(f"{name} is {getattr(self, name)!r}")
        check_member_weights(self.members, self.weights)


def check_member_weights(members: Sequence[str], weights: Sequence[float]) -> None:
    """Raise a ValueError unless every member has a weight of at least 0, and one of them a positive one."""
    if len(members) != len(weights):
        raise ValueError(
            f"there are {len(weights)} weights ({', '.join(map(str, weights))}) for the {len(members)} teachers "
            f"{', '.join(members)}: expected one for each"
        )
    for name, weight in zip(members, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} is {weight}: expected a finite number of at least 0")
    if not any(weights):
        raise ValueError("all weights are 0: expected at least one positive")


__all__ = [
    "ENSEMBLE_FILE",
    "TITLES",
    "TunedEnsemble",
    "check_member_weights",
    "check_no_zero3",
    "is_label_folder",
    "load_members",
    "load_online_teacher",
    "member_origins",
    "title_origin",
]
