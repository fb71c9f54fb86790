"""Teachers: models, and files of answers that were computed elsewhere.

A teacher is any object with these attributes

    source              where it was loaded from
    fingerprint         sha256, in hex, of everything that determines its answers
    num_items           size of the catalogue
    max_history         number of newest items that it reads, None for all
    answers_prefixes    False if it only has answers about the targets of the training rows
    tokens_per_item     (num_items + 1,) int64, number of tokens that it reads per item
    tokens_per_history  int, number of tokens that it reads per history in addition

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

from hf_ilora.data.hub import read_folder_or_hub
from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.data.storage import files_digest
from hf_ilora.distillation.teacher_labels import DESCRIPTION_FILE, TeacherLabels, keys, read_description
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import SavedRecommender, saved_config
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel
from hf_ilora.models.next_item.next_item_output import top_k_items
from hf_ilora.reference.dllm2rec_files import RANKS_FILE, DLLM2RecFilesTeacher

SCORES_KEY = "scores"
POSITION_KEYS = ("history_ids", "prefix_lengths")  # of tables whose answers are about positions, not rows

# Entries of a configuration that record where it was loaded from and with which software. They affect no answer.
_ORIGINS = {"_name_or_path", "name_or_path", "llm_name_or_path", "llm_revision", "llm_gguf_file"}
_ORIGINS |= {"_commit_hash", "transformers_version", "architectures", "auto_map", "custom_pipelines"}


class ModelTeacher:
    """A recommender of this package: an iLoRA model with an item head, SASRec, or a model that counts.

    Args:
        model: the model, on the device that it shall run on.
        source: its folder or Hub name.

    Raises:
        ValueError: for an iLoRA model without an item head, which cannot rank the catalogue.
    """

    answers_prefixes = True

    def __init__(self, model: SavedRecommender, source: str):
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
        fingerprint: identifies everything that determines the answers, such as the sha256 of a weights file. Labels
            with another fingerprint count as those of another teacher.
        source: name of the teacher in the description of its labels.
        max_history: number of newest items that `ranker` reads, None for all. It is only used to estimate costs:
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
    """Scores of every item for every training row, or for every position of them, computed elsewhere.

    Args:
        path: safetensors file with `scores`, floating-point (answers, num_items + 1); column 0 is ignored. Distances
            are -log softmax of the scores, so log-probabilities only change sign. If the file has no other tensors, the
            answers are about the targets of the training rows, in their order. If it also has the integers
            `history_ids` and `prefix_lengths`, (answers,) each, an answer is about the item that follows the first
            `prefix_lengths` items of [history + target] in row `history_ids` (0 is the first row).
        num_rows: rows of the train split.
        num_items: size of the catalogue.

    Raises:
        ValueError: when the file is truncated or has other shapes, and for a row or prefix that does not exist or has
            two answers; from `check_requests`, for requests without an answer and answers about more items than a row
            has.
    """

    max_history = None
    tokens_per_history = 0

    def __init__(self, path: str | os.PathLike, num_rows: int, num_items: int):
        self.source, self.num_items = str(path), num_items
        try:
            tensors = load_file(path)  # mapped into memory, read where it is used
            self.scores = tensors[SCORES_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is not a safetensors file with {SCORES_KEY} ({error!r}): write it again"
            ) from error
        positions = [tensors.get(name) for name in POSITION_KEYS]
        self.answers_prefixes = any(values is not None for values in positions)
        num_answers = len(self.scores) if self.answers_prefixes and self.scores.dim() else num_rows
        is_table = num_answers > 0 and tuple(self.scores.shape) == (num_answers, num_items + 1)
        if not is_table or not self.scores.is_floating_point():
            raise ValueError(
                f"{SCORES_KEY} of {path} have shape {tuple(self.scores.shape)} and type {self.scores.dtype}: expected "
                f"floating-point ({'answers' if self.answers_prefixes else num_rows}, {num_items + 1}), a row per "
                f"{'answer' if self.answers_prefixes else 'training row'}, and a column for padding and one per item"
            )
        self._keys, self._order = None, None
        if self.answers_prefixes:
            self._keys, self._order = _positions_of_answers(path, positions, num_answers, num_rows)
        self.fingerprint = files_digest([Path(path)])
        self.tokens_per_item = _one_per_item(num_items)

    def check_requests(self, requests) -> None:
        """Raise a ValueError unless every request has an answer and every answer is about items of its row."""
        if self._keys is None:
            return
        history_ids, prefix_lengths = self._keys >> 32, self._keys & 0xFFFFFFFF  # (answers,) each
        lengths = np.diff(requests.boundaries) - 1  # (rows,), items before the target
        too_long = prefix_lengths > lengths[history_ids]
        if too_long.any():
            row = history_ids[too_long.argmax()]
            raise ValueError(
                f"{self.source} has an answer about row {row} after {prefix_lengths[too_long.argmax()]} of its items: "
                f"expected 1 to {lengths[row]}, the items before its target"
            )
        self._answers(requests.history_ids, requests.prefix_lengths)

    def _answers(self, history_ids: np.ndarray, prefix_lengths: np.ndarray) -> np.ndarray:
        """(requests,) rows of `scores` that answer the requests."""
        asked = keys(history_ids, prefix_lengths)
        places = np.searchsorted(self._keys, asked).clip(max=len(self._keys) - 1)
        missing = self._keys[places] != asked
        if missing.any():
            first = int(missing.argmax())
            raise ValueError(
                f"{self.source} lacks {int(missing.sum())} of {len(missing)} answers, such as the one about row "
                f"{history_ids[first]} after {prefix_lengths[first]} of its items: expected one for each requested "
                "label; add them, or request fewer (labelled_positions last)"
            )
        return self._order[places]

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        answers = history_ids
        if self._keys is not None:
            answers = self._answers(history_ids, histories.ne(PADDING_ITEM_ID).sum(1).cpu().numpy())
        scores = self.scores[torch.from_numpy(answers)].float()  # (batch, num_items + 1)
        scores[:, PADDING_ITEM_ID] = float("-inf")
        item_ids, log_probabilities = top_k_items(scores.log_softmax(dim=1), histories, top_k, exclude_seen)
        return item_ids, -log_probabilities

    def item_embeddings(self) -> None:
        return None


Teacher = ModelTeacher | RankItemsTeacher | ScoreTableTeacher | DLLM2RecFilesTeacher


def load_teacher(
    source: str | os.PathLike | SavedRecommender,
    num_rows: int,
    num_items: int,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """Load the teacher at `source`.

    Args:
        source: a model, the folder or Hub name of one, a .safetensors file of scores (`ScoreTableTeacher`), or a folder
            of DLLM2Rec's text files.
        num_rows: number of rows of the train split, which files of answers must cover.
        num_items: size of the catalogue.
        dtype: data type of the language model, such as "bfloat16"; only for iLoRA models that are loaded here.
        device: device of the model.
        trust_remote_code: run code that comes with the language model of an iLoRA.

    Raises:
        ValueError: when `source` is none of these, or does not fit the data set.
    """
    if isinstance(source, SavedRecommender):
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
    split: str = "train",
) -> TeacherLabels:
    """Load labels of a data set and check that the expected teacher made them.

    Args:
        folder: folder that `hf-ilora label` wrote, or the name of labels on the Hub.
        sequences: the data set that the labels are about.
        teacher: the expected teacher, as `load_teacher` takes it. It is loaded in the dtype in which it answered, to
            compare its fingerprint. None accepts any teacher.
        trust_remote_code: as in `load_teacher`.
        split: the split that the labels must be about.

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
        dtype = read_folder_or_hub(folder, (DESCRIPTION_FILE,), read_description).get("dtype")
        try:
            expected = load_teacher(
                teacher,
                len(sequences[split]),
                sequences.num_items,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
            fingerprint = expected.fingerprint
        except ValueError as error:
            raise ValueError(
                f"labels_teacher is {teacher}: expected the teacher that {folder} was made with ({error})"
            ) from error
    return TeacherLabels.load(folder, sequences.fingerprint, fingerprint, split)


def model_fingerprint(model: SavedRecommender) -> str:
    """sha256, in hex, of all weights in their dtype, the configuration and the catalogue; the same for every copy."""
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(_without_origins(model.config.to_dict()), sort_keys=True, default=str).encode())
    if model.catalogue is not None:
        digest.update(model.catalogue.fingerprint.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _positions_of_answers(path, positions: list, num_answers: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the answers of a table, ascending, and the row of the table that each belongs to: (answers,) each."""
    for name, values in zip(POSITION_KEYS, positions, strict=True):
        if values is None or tuple(values.shape) != (num_answers,) or values.is_floating_point():
            found = "missing" if values is None else f"of shape {tuple(values.shape)} and type {values.dtype}"
            raise ValueError(
                f"{name} of {path} are {found}: expected integers ({num_answers},), one for each row of {SCORES_KEY}; "
                f"write both {' and '.join(POSITION_KEYS)}, or neither if the answers are about the training rows"
            )
    history_ids, prefix_lengths = (values.long().numpy() for values in positions)  # (answers,) each
    outside = (history_ids < 0) | (history_ids >= num_rows) | (prefix_lengths < 1) | (prefix_lengths >= 1 << 31)
    if outside.any():
        answer = int(outside.argmax())
        raise ValueError(
            f"answer {answer} of {path} has history_ids {history_ids[answer]} and prefix_lengths "
            f"{prefix_lengths[answer]}: expected rows 0..{num_rows - 1} of the train split, and at least 1 item"
        )
    answered = keys(history_ids, prefix_lengths)
    order = np.argsort(answered, kind="stable")
    answered = answered[order]
    twice = np.flatnonzero(answered[1:] == answered[:-1])
    if len(twice):
        answer = int(order[twice[0]])
        raise ValueError(
            f"{path} has two answers about row {history_ids[answer]} after {prefix_lengths[answer]} of its items: "
            "expected one"
        )
    return answered, order


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
