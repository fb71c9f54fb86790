"""Teachers: models, and files of answers that were computed elsewhere.

A teacher is any object with these attributes

    source              where it was loaded from
    fingerprint         sha256, in hex, of everything that determines its answers
    num_items           size of the catalogue
    max_history         number of newest items that it reads, None for all
    answers_prefixes    False if it has one answer per training row, for the row's target
    tokens_per_item     (num_items + 1,) int64, tokens it reads for each item
    tokens_per_history  int, tokens it reads for each history in addition

and these methods

    rank(history_ids, histories, top_k, exclude_seen) -> (item_ids (batch, top_k), distances (batch, top_k))
    item_embeddings() -> (num_items + 1, size) float32, or None

where `history_ids`, (batch,), are rows of the train split and `histories`, (batch, longest), their items, oldest first,
padded with 0 on the right. A model reads the history; a file is looked up by row. `RankItemsTeacher` wraps any object
that can rank items.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.data.storage import files_digest
from hf_ilora.distillation.teacher_labels import TeacherLabels, read_description
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import saved_config
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel
from hf_ilora.models.next_item.next_item_output import top_k_items
from hf_ilora.reference.dllm2rec_files import RANKS_FILE, DLLM2RecFilesTeacher

SCORES_KEY = "scores"

# Entries of a configuration that say where it was loaded from and with which software: they determine no answer.
_ORIGINS = {"_name_or_path", "name_or_path", "llm_name_or_path", "llm_revision", "llm_gguf_file"}
_ORIGINS |= {"_commit_hash", "transformers_version", "architectures", "auto_map"}


Recommender = ILoraForRecommendation | NextItemPreTrainedModel


class ModelTeacher:
    """A recommender of this package: an iLoRA model with an item head, SASRec, or a model that counts.

    Args:
        model: the model, on the device it is to run on.
        source: its folder or Hub name.

    Raises:
        ValueError: for an iLoRA model without an item head, which cannot rank the catalogue.
    """

    answers_prefixes = True

    def __init__(self, model: Recommender, source: str):
        self.model, self.source = model.eval(), source
        self.num_items = model.config.num_items
        self.fingerprint = model_fingerprint(model)
        if isinstance(model, ILoraForRecommendation):
            if model.item_head is None:
                raise ValueError(f"{source} has no item head, which ranks the catalogue: train one with item_head")
            self.max_history = model.config.max_history
            # A prompt consists of a template and, for each item, its title with a placeholder and a separator.
            title_lengths = model.title_tokens.lengths  # (num_items + 1,), 0 for padding
            one, two = (model.prompts.build([[1] * count]).input_ids.shape[1] for count in (1, 2))
            per_item = two - one
            self.tokens_per_item = title_lengths + np.where(title_lengths > 0, per_item - title_lengths[1], 0)
            self.tokens_per_history = one - per_item
        else:
            self.max_history = model.config.max_length
            self.tokens_per_item, self.tokens_per_history = _one_per_item(self.num_items), 0

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        return self.model.rank_items(histories, top_k=top_k, exclude_seen=exclude_seen)

    def item_embeddings(self) -> torch.Tensor | None:
        return self.model.encode_items() if isinstance(self.model, ILoraForRecommendation) else None


class RankItemsTeacher:
    """Any object that ranks items: a recommender of another library, a service, a rule.

    Args:
        ranker: has `rank_items(histories, top_k, exclude_seen) -> (item_ids, distances)`. The histories, (batch,
            longest), are an int64 tensor, oldest item first, padded with 0 on the right. Item ids, (batch, top_k), are
            integers in 1..num_items, best first; distances, (batch, top_k), are smaller for more confident answers.
            Both may be tensors, arrays or lists.
        num_items: size of the catalogue.
        fingerprint: identifies everything that determines the answers, such as the sha256 of a file of weights. Labels
            with another fingerprint are those of another teacher.
        source: name of the teacher in the description of its labels.
        max_history: number of newest items that `ranker` reads, None for all. It only serves to estimate costs:
            `ranker` receives whole histories.

    Raises:
        ValueError: from `rank`, for item ids that are not integers.
    """

    answers_prefixes = True
    tokens_per_history = 0

    def __init__(self, ranker, num_items: int, fingerprint: str, source: str, max_history: int | None = None):
        self.ranker, self.source = ranker, source
        self.num_items, self.fingerprint, self.max_history = num_items, fingerprint, max_history
        self.tokens_per_item = _one_per_item(num_items)

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        answer = self.ranker.rank_items(histories, top_k=top_k, exclude_seen=exclude_seen)
        item_ids, distances = map(torch.as_tensor, answer)  # (batch, top_k) both
        if item_ids.dtype.is_floating_point:
            raise ValueError(f"{self.source} returned item ids of type {item_ids.dtype}: expected integers")
        return item_ids.long(), distances

    def item_embeddings(self) -> None:
        return None


class ScoreTableTeacher:
    """Scores of every item for every training row, computed elsewhere.

    Args:
        path: safetensors file with `scores`, (rows, num_items + 1), in the order of the train split; column 0 is
            ignored. Distances are -log softmax of the scores, so log-probabilities only change sign.
        num_rows: rows of the train split.
        num_items: size of the catalogue.

    Raises:
        ValueError: when the file is truncated, or has another shape.
    """

    answers_prefixes = False
    max_history = None
    tokens_per_history = 0

    def __init__(self, path: str | os.PathLike, num_rows: int, num_items: int):
        self.source, self.num_items = str(path), num_items
        try:
            self.scores = load_file(path)[SCORES_KEY]  # mapped into memory, read where it is used
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is not a safetensors file with {SCORES_KEY} ({error!r}): write it again"
            ) from error
        if tuple(self.scores.shape) != (num_rows, num_items + 1) or not self.scores.is_floating_point():
            raise ValueError(
                f"{SCORES_KEY} of {path} have shape {tuple(self.scores.shape)} and type {self.scores.dtype}: expected "
                f"floating-point ({num_rows}, {num_items + 1}), a row per training row, and a column for padding and "
                "one per item"
            )
        self.fingerprint = files_digest([Path(path)])
        self.tokens_per_item = _one_per_item(num_items)

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        scores = self.scores[torch.from_numpy(history_ids)].float()  # (batch, num_items + 1)
        scores[:, PADDING_ITEM_ID] = float("-inf")
        item_ids, log_probabilities = top_k_items(scores.log_softmax(dim=1), histories, top_k, exclude_seen)
        return item_ids, -log_probabilities

    def item_embeddings(self) -> None:
        return None


Teacher = ModelTeacher | RankItemsTeacher | ScoreTableTeacher | DLLM2RecFilesTeacher


def load_teacher(
    source: str | os.PathLike | Recommender,
    num_rows: int,
    num_items: int,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """The teacher at `source`.

    Args:
        source: a model, the folder or Hub name of one, a .safetensors file of scores (`ScoreTableTeacher`), or a folder
            of DLLM2Rec's text files.
        num_rows: rows of the train split, which files of answers must cover.
        num_items: size of the catalogue.
        dtype: data type of the language model, such as "bfloat16"; only for iLoRA models that are loaded here.
        device: device of the model.
        trust_remote_code: run code that comes with the language model of an iLoRA.

    Raises:
        ValueError: when `source` is none of these, or does not fit the data set.
    """
    if isinstance(source, Recommender):
        if dtype is not None:
            raise ValueError(f"dtype is {dtype} and the teacher is loaded already: leave dtype out, or pass its folder")
        return ModelTeacher(source.to(device), source.config.name_or_path or type(source).__name__)
    source, path = str(source), Path(source)
    if path.suffix == ".safetensors" or (path / RANKS_FILE).is_file():
        if dtype is not None:
            raise ValueError(f"dtype is {dtype} and {source} contains finished answers: leave dtype out")
        kind = ScoreTableTeacher if path.suffix == ".safetensors" else DLLM2RecFilesTeacher
        return kind(path, num_rows, num_items)
    try:
        config = saved_config(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is not a teacher ({error}): expected a saved model, a .safetensors file of scores, or a folder "
            f"with {RANKS_FILE}"
        ) from error
    if isinstance(config, ILoraConfig):
        model = ILoraForRecommendation.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    else:
        if dtype is not None:
            raise ValueError(f"dtype is {dtype} and {source} has no language model: leave dtype out")
        model = AutoModel.from_pretrained(source, trust_remote_code=False)
        if not isinstance(model, NextItemPreTrainedModel):
            raise ValueError(f"{source} is a {type(model).__name__}: expected a recommender of hf_ilora")
    return ModelTeacher(model.to(device), source)


def labels_of_teacher(
    folder: str | os.PathLike,
    sequences: SequenceDatasets,
    teacher: str | None = None,
    trust_remote_code: bool = False,
) -> TeacherLabels:
    """Labels of a data set, from the teacher that is expected.

    Args:
        folder: written by `hf-ilora label`.
        sequences: the data set that the labels are about.
        teacher: as `load_teacher` takes it; it is loaded in the dtype in which it answered, and its fingerprint
            compared. None takes the labels of any teacher.
        trust_remote_code: as in `load_teacher`.

    Raises:
        FileNotFoundError, ValueError: as `TeacherLabels.load`; for a teacher that cannot be loaded; and under ZeRO-3,
            which would spread a teacher's weights over processes.
    """
    fingerprint = None
    if teacher is not None:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                f"labels_teacher is {teacher} and ZeRO-3 would spread its weights over processes: leave it out, or use "
                "another accelerate configuration"
            )
        dtype = read_description(Path(folder)).get("dtype")
        try:
            expected = load_teacher(
                teacher,
                len(sequences["train"]),
                sequences.num_items,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
            fingerprint = expected.fingerprint
        except ValueError as error:
            raise ValueError(
                f"labels_teacher is {teacher}: expected the teacher that {folder} was made with ({error})"
            ) from error
    return TeacherLabels.load(folder, sequences.fingerprint, fingerprint)


def model_fingerprint(model: Recommender) -> str:
    """sha256, in hex, of all weights in their dtype, the configuration and the catalogue; the same for every copy."""
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(_without_origins(model.config.to_dict()), sort_keys=True, default=str).encode())
    if model.catalogue is not None:
        digest.update(model.catalogue.fingerprint.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _without_origins(config: dict) -> dict:
    return {
        name: _without_origins(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _ORIGINS
    }


def _one_per_item(num_items: int) -> np.ndarray:
    return (np.arange(num_items + 1) != PADDING_ITEM_ID).astype(np.int64)


__all__ = ["ModelTeacher", "RankItemsTeacher", "ScoreTableTeacher", "Teacher", "labels_of_teacher", "load_teacher"]
__all__ += ["model_fingerprint"]
