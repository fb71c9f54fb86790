"""A teacher that answers from the text files of DLLM2Rec's published program."""

import io
import os
from pathlib import Path

import numpy as np
import torch

from hf_ilora.data.storage import files_digest
from hf_ilora.reference.pickle_reader import read_tensor

RANKS_FILE, CONFIDENCE_FILE, EMBEDDINGS_FILE = "myrank_train.txt", "confidence_train.txt", "all_embeddings.pt"


class DLLM2RecFilesTeacher:
    """A teacher that answers from the text files that DLLM2Rec's program reads.

    It answers for rows of the train split; see `hf_ilora.distillation.teachers`. It cannot exclude items that a history
    already contains, because the lists have no further items to replace them.

    Args:
        folder: contains `myrank_train.txt` and `confidence_train.txt`, the teacher's items and their distances, with a
            line per training row and numbers separated by white space or commas. Item ids start at 0; ours are one
            higher. It may also contain `all_embeddings.pt`, (num_items, size).
        num_rows: number of rows of the train split.
        num_items: size of the catalogue.

    Raises:
        ValueError: the files do not fit the data set or each other.

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
                f"line {row + 1} of {ranks_path} contains {ranks[row, column]:g}: expected item ids 0 to "
                f"{num_items - 1}; use the data set that the ranking was made for"
            )
        self.item_ids = ranks.astype(np.int64) + 1
        paths = [ranks_path, confidence_path]
        self.embeddings_path = folder / EMBEDDINGS_FILE
        if self.embeddings_path.is_file():
            paths.append(self.embeddings_path)
        self.fingerprint = files_digest(paths)
        self.tokens_per_item = (np.arange(num_items + 1) > 0).astype(np.int64)

    def rank(self, history_ids: np.ndarray, histories: torch.Tensor, top_k: int, exclude_seen: bool):
        if exclude_seen:
            raise ValueError(
                f"{self.source} contains finished lists, from which seen items cannot be excluded: pass exclude_seen "
                "false"
            )
        if top_k > self.item_ids.shape[1]:
            raise ValueError(f"top_k is {top_k}: expected at most {self.item_ids.shape[1]}, the length of the lists")
        columns = (self.item_ids, self.distances)
        item_ids, distances = (torch.from_numpy(column[history_ids, :top_k]) for column in columns)
        return item_ids, distances

    def item_embeddings(self) -> torch.Tensor | None:
        if not self.embeddings_path.is_file():
            return None
        embeddings = read_tensor(self.embeddings_path).float()
        if embeddings.dim() != 2 or len(embeddings) != self.num_items:
            raise ValueError(
                f"{self.embeddings_path} has shape {tuple(embeddings.shape)}: expected ({self.num_items}, size), a row "
                "per item and none for padding"
            )
        return torch.nn.functional.pad(embeddings, (0, 0, 1, 0))  # (num_items + 1, size)


def _read_numbers(path: Path, num_rows: int) -> np.ndarray:
    """Read a text file of numbers as (rows, columns) float64."""
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
        line = np.argwhere(~np.isfinite(numbers))[0][0] + 1
        raise ValueError(f"line {line} of {path} contains NaN or infinity: expected finite numbers; download it again")
    return numbers


__all__ = ["RANKS_FILE", "DLLM2RecFilesTeacher"]
