"""Who is asked for labels: models, and answers that lie in files.

A teacher is any object with the attributes

    source              where it was loaded from
    fingerprint         sha256 of all that decides its answers, in hex
    num_items           size of the catalogue
    max_history         newest items that it reads, None for all
    answers_prefixes    False when it knows one answer per training row, about the row's target
    tokens_per_item     (num_items + 1,) int64, what an item costs to read
    tokens_per_history  int, what a history costs besides

and the methods

    rank(history_ids, histories, top_k, exclude_seen) -> (item_ids (batch, top_k), distances (batch, top_k))
    item_embeddings() -> (num_items + 1, size) float32, or None

where `history_ids` (batch,) are rows of the train split and `histories` (batch, longest) their items, oldest first,
padded with 0 on the right. A model answers by history, a file by row. `RankItemsTeacher` makes one of any object that
can rank items.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel
from hf_ilora.models.next_item.next_item_output import top_k_items
from hf_ilora.reference.convert_sasrec import load_reference_tensor

SCORES_KEY = "scores"
RANKS_FILE, CONFIDENCE_FILE, PUBLISHED_EMBEDDINGS_FILE = "myrank_train.txt", "confidence_train.txt", "all_embeddings.pt"

# Where a configuration was loaded from, and with what, decides no answer.
_ORIGINS = {"_name_or_path", "name_or_path", "llm_name_or_path", "llm_revision", "llm_gguf_file"}
_ORIGINS |= {"_commit_hash", "transformers_version", "architectures", "auto_map"}


class ModelTeacher:
    """A recommender that is asked by history: an iLoRA model with an item head, SASRec, or one that counts.

    Args:
        model: loaded, on its device.
        source: folder or Hub name.

    Raises:
        ValueError: for an iLoRA model without an item head, which cannot rank a catalogue.
    """

    answers_prefixes = True

    def __init__(self, model: ILoraForRecommendation | NextItemPreTrainedModel, source: str):
        self.model, self.source = model.eval(), source
        self.num_items = model.config.num_items
        self.fingerprint = model_fingerprint(model)
        if isinstance(model, ILoraForRecommendation):
            if model.item_head is None:
                raise ValueError(f"{source} has no item head, which ranks the catalogue: train one with item_head")
            self.max_history = model.config.max_history
            # A prompt is a template, and for each item its title with a placeholder and a separator.
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
    """Any object that ranks items, asked by history: a recommender of another library, a service, a rule.

    Args:
        ranker: with `rank_items(histories, top_k, exclude_seen) -> (item_ids, distances)`. Histories (batch, longest)
            are int64, oldest item first, padded with 0 on the right; item ids (batch, top_k) are integers in
            1..num_items, best first, and distances (batch, top_k) are smaller for more confident answers, both tensors,
            arrays or lists.
        num_items: size of the catalogue.
        fingerprint: of all that decides the answers, such as the sha256 of a file of weights; labels of another
            fingerprint are of another teacher.
        source: name of the teacher in the description of its labels.
        max_history: newest items that `ranker` reads, None for all. Only costs are counted by it: `ranker` is given
            whole histories.

    Raises:
        ValueError: from `rank`, for item ids that are no integers.
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
            raise ValueError(f"{self.source} gave item ids of type {item_ids.dtype}: expected integers")
        return item_ids.long(), distances

    def item_embeddings(self) -> None:
        return None


class ScoreTableTeacher:
    """Scores of every item for every training row, computed elsewhere.

    Args:
        path: safetensors file with `scores`, (rows, num_items + 1) in the order of the train split; column 0 is not
            read. Distances are -log of their softmax, so that log-probabilities stay what they are.
        num_rows: of the train split.
        num_items: of the catalogue.

    Raises:
        ValueError: when the file is not whole, or has another shape.
    """

    answers_prefixes = False
    max_history = None
    tokens_per_history = 0

    def __init__(self, path: str | os.PathLike, num_rows: int, num_items: int):
        self.source, self.num_items = str(path), num_items
        try:
            self.scores = load_file(path)[SCORES_KEY]  # mapped into memory, read where it is used
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is no safetensors file that holds {SCORES_KEY} ({error!r})") from error
        if tuple(self.scores.shape) != (num_rows, num_items + 1) or not self.scores.is_floating_point():
            raise ValueError(
                f"{SCORES_KEY} of {path} have shape {tuple(self.scores.shape)} and type {self.scores.dtype}: expected "
                f"floating-point ({num_rows}, {num_items + 1}), a row per training row and a column per item and one "
                "for padding"
            )
        self.fingerprint = _files_fingerprint([Path(path)])
        self.tokens_per_item = _one_per_item(num_items)

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        scores = self.scores[torch.from_numpy(history_ids)].float()  # (batch, num_items + 1)
        scores[:, 0] = float("-inf")
        item_ids, log_probabilities = top_k_items(scores.log_softmax(dim=1), histories, top_k, exclude_seen)
        return item_ids, -log_probabilities

    def item_embeddings(self) -> None:
        return None


class PublishedTeacher:
    """The text files that DLLM2Rec reads: a ranking and its distances for every training row.

    Args:
        folder: with myrank_train.txt and confidence_train.txt (a line per training row, numbers apart by white space or
            commas; item ids from 0, which become ours by adding 1), and all_embeddings.pt, (num_items, size), unless
            there are no embeddings.
        num_rows: of the train split.
        num_items: of the catalogue.

    The lists are taken as they are: what a history already holds cannot be replaced by items behind the end of a list.

    Raises:
        ValueError: for files that do not fit the data set or each other.

    Source: DLLM2Rec (RecSys 2024), its published program.
    """

    answers_prefixes = False
    max_history = None
    tokens_per_history = 0

    def __init__(self, folder: str | os.PathLike, num_rows: int, num_items: int):
        folder = Path(folder)
        self.source, self.num_items = str(folder), num_items
        ranks_path, confidence_path = folder / RANKS_FILE, folder / CONFIDENCE_FILE
        ranks = _read_numbers(ranks_path, num_rows)  # (rows, K)
        self.distances = _read_numbers(confidence_path, num_rows)  # (rows, K)
        if ranks.shape != self.distances.shape:
            raise ValueError(
                f"{ranks_path} has shape {ranks.shape} and {confidence_path} {self.distances.shape}: expected the same"
            )
        wrong = (ranks != np.floor(ranks)) | (ranks < 0) | (ranks >= num_items)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"line {row + 1} of {ranks_path} holds {ranks[row, column]:g}: expected item ids 0 to {num_items - 1}; "
                "use the data set that the ranking was made for"
            )
        self.item_ids = ranks.astype(np.int64) + 1
        paths = [ranks_path, confidence_path]
        self.embeddings_path = folder / PUBLISHED_EMBEDDINGS_FILE
        if self.embeddings_path.is_file():
            paths.append(self.embeddings_path)
        self.fingerprint = _files_fingerprint(paths)
        self.tokens_per_item = _one_per_item(num_items)

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        if exclude_seen:
            raise ValueError(f"{self.source} holds finished lists, with or without seen items: give exclude_seen false")
        if top_k > self.item_ids.shape[1]:
            raise ValueError(f"top_k is {top_k}: expected at most {self.item_ids.shape[1]}, the length of the lists")
        columns = (self.item_ids, self.distances)
        item_ids, distances = (torch.from_numpy(column[history_ids, :top_k]) for column in columns)
        return item_ids, distances

    def item_embeddings(self) -> torch.Tensor | None:
        if not self.embeddings_path.is_file():
            return None
        embeddings = load_reference_tensor(self.embeddings_path).float()
        if embeddings.dim() != 2 or len(embeddings) != self.num_items:
            raise ValueError(
                f"{self.embeddings_path} has shape {tuple(embeddings.shape)}: expected ({self.num_items}, size), a row "
                "per item and none for padding"
            )
        return torch.nn.functional.pad(embeddings, (0, 0, 1, 0))  # (num_items + 1, size)


Teacher = ModelTeacher | RankItemsTeacher | ScoreTableTeacher | PublishedTeacher


def load_teacher(
    source: str, num_rows: int, num_items: int, dtype: str | None = None, device: torch.device | str = "cpu"
) -> Teacher:
    """The teacher that lies at `source`.

    Args:
        source: a .safetensors file of scores, a folder of published text files, or a folder or Hub name of a model.
        num_rows: of the train split, which the answers in files are about.
        num_items: of the catalogue.
        dtype: of the language model, such as "bfloat16"; of iLoRA models only.
        device: where a model computes.

    Raises:
        ValueError: for what is none of these, or does not fit the data set.
    """
    path = Path(source)
    if path.suffix == ".safetensors" or (path / RANKS_FILE).is_file():
        if dtype is not None:
            raise ValueError(f"dtype is {dtype} and {source} holds finished answers: leave dtype out")
        kind = ScoreTableTeacher if path.suffix == ".safetensors" else PublishedTeacher
        return kind(path, num_rows, num_items)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is no teacher ({error}): expected a saved model, scores in a .safetensors file, or a folder "
            f"with {RANKS_FILE}"
        ) from error
    if isinstance(config, ILoraConfig):
        model = ILoraForRecommendation.from_pretrained(source, dtype=dtype)
    else:
        if dtype is not None:
            raise ValueError(f"dtype is {dtype} and {source} has no language model: leave dtype out")
        model = AutoModel.from_pretrained(source)
        if not isinstance(model, NextItemPreTrainedModel):
            raise ValueError(f"{source} holds a {type(model).__name__}: expected a recommender of hf_ilora")
    return ModelTeacher(model.to(device), source)


def model_fingerprint(model: ILoraForRecommendation | NextItemPreTrainedModel) -> str:
    """sha256, in hex, of all weights in their dtype, the configuration and the catalogue, wherever they came from."""
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


def _files_fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _one_per_item(num_items: int) -> np.ndarray:
    return (np.arange(num_items + 1) > 0).astype(np.int64)


def _read_numbers(path: Path, num_rows: int) -> np.ndarray:
    """A text file of numbers as (rows, columns) float64."""
    try:
        text = path.read_text(encoding="ascii").replace(",", " ")
        numbers = np.loadtxt(io.StringIO(text), ndmin=2) if text.strip() else np.zeros((0, 0))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a table of numbers ({error}): expected a line per training row") from error
    if len(numbers) != num_rows:
        raise ValueError(
            f"{path} has {len(numbers)} lines: expected {num_rows}, one per row of the train split; use the data set "
            "that the ranking was made for"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"line {np.argwhere(~np.isfinite(numbers))[0][0] + 1} of {path} holds NaN or infinity")
    return numbers


__all__ = ["ModelTeacher", "PublishedTeacher", "RankItemsTeacher", "ScoreTableTeacher", "Teacher", "load_teacher"]
__all__ += ["model_fingerprint"]
