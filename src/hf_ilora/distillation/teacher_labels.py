"""Teacher labels as a data set: a folder of parquet shards with a description, checked when it is loaded."""

import hashlib
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from huggingface_hub import CommitInfo
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open

from hf_ilora.data.cards import card_to_publish
from hf_ilora.data.hub import read_folder_or_hub
from hf_ilora.data.storage import content_digest, is_count, read_parquet
from hf_ilora.distillation.labels_card import labels_card, named_teacher
from hf_ilora.models.next_item.catalogue import open_parquet
from hf_ilora.models.next_item.hub_upload import upload

DESCRIPTION_FILE = "teacher_labels.json"
EMBEDDINGS_FILE = "item_embeddings.safetensors"
EMBEDDINGS_KEY = "item_embeddings"
PUBLISHED_FILES = (DESCRIPTION_FILE, EMBEDDINGS_FILE, "labels-*.parquet")
FORMAT_VERSION = 2
REMEDY = "label again with `hf-ilora label`, or restore the file"
DESCRIPTION_REMEDY = (
    "restore it, or delete it and run the same `hf-ilora label` command again, which describes the files as they are "
    "without asking the teacher"
)

SCHEMA = pa.schema(
    {
        "history_id": pa.int64(),
        "prefix_length": pa.int32(),
        "teacher_items": pa.list_(pa.int32()),
        "teacher_distances": pa.list_(pa.float32()),
    }
)


# The keys that every teacher_labels.json has.
_COUNTS = ("top_k", "num_items", "num_rows", "num_shards")
_FINGERPRINTS = ("data_fingerprint", "teacher_fingerprint", "labels_fingerprint", "embeddings_fingerprint")
_NEEDED = {*_COUNTS, *_FINGERPRINTS, "teacher", "embedding_size"}


def shard_name(shard: int) -> str:
    return f"labels-{shard:06d}.parquet"


class TeacherLabels:
    """A teacher's answers about the train split of one data set, or about another split.

    Attributes:
        table: one row per answer, ordered by history_id and prefix_length. `history_id` (int64) is the row of the train
            split, `prefix_length` (int32) the number of items of [history + target] that the teacher saw.
            `teacher_items` (list<int32>, best first) and `teacher_distances` (list<float32>, smaller is more confident)
            are its `top_k` candidates for the next item.
        description: content of teacher_labels.json: fingerprints of data, teacher, labels and item embeddings, and the
            settings.
        top_k: items per answer.
        num_items: size of the catalogue.
    """

    def __init__(self, table: pa.Table, description: dict, folder: Path):
        table = in_key_order(table)
        self.table, self.description, self.folder = table, description, folder
        self.top_k, self.num_items = description["top_k"], description["num_items"]
        self._keys = keys(table["history_id"].to_numpy(), table["prefix_length"].to_numpy())  # (rows,), ascending
        self._items, self._distances = (
            table[name].combine_chunks().flatten().to_numpy().reshape(-1, self.top_k)  # (rows, top_k)
            for name in ("teacher_items", "teacher_distances")
        )
        self._item_embeddings: torch.Tensor | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike,
        data_fingerprint: str,
        teacher_fingerprint: str | None = None,
        split: str = "train",
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "TeacherLabels":
        """Read a folder that `hf-ilora label` finished, or labels on the Hub, and check that they are complete.

        Args:
            source: folder with teacher_labels.json and its shards, or the name of labels on the Hub, "user/name".
            data_fingerprint: `SequenceDatasets.fingerprint` of the data set to use the labels with.
            teacher_fingerprint: fingerprint that the teacher must have; None accepts any teacher.
            split: the split that the labels must be about.
            revision: branch, tag or commit on the Hub; None means main.
            token: token for the Hub; None uses HF_TOKEN or the token of `hf auth login`.
            cache_dir: folder for files from the Hub; None uses the Hub's cache.
            local_files_only: read that cache without asking the Hub, as with HF_HUB_OFFLINE=1.

        Raises:
            FileNotFoundError: when the folder is missing or its labels are not finished, and when the Hub has no such
                labels.
            PermissionError: when the Hub does not accept the token.
            ValueError: for labels of other data, another split or another teacher, and for files that are damaged or
                changed.
            OSError: when the Hub cannot be reached.
        """
        return read_folder_or_hub(
            source,
            PUBLISHED_FILES,
            partial(cls._read, data_fingerprint, teacher_fingerprint, split),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    @classmethod
    def _read(cls, data_fingerprint: str, teacher_fingerprint: str | None, split: str, folder: Path) -> "TeacherLabels":
        description = read_description(folder)
        labelled = description.get("split", "train")
        if labelled != split:
            raise ValueError(
                f"the labels in {folder} are about the {labelled} split: expected labels of the {split} split; ask the "
                f"teacher about it with `hf-ilora label --split {split}`"
            )
        for name, expected in (("data", data_fingerprint), ("teacher", teacher_fingerprint)):
            found = description[f"{name}_fingerprint"]
            if expected is not None and found != expected:
                raise ValueError(
                    f"the {name} of the labels in {folder} has the fingerprint {found}: expected {expected}; label "
                    f"again with `hf-ilora label`, or use the {name} of these labels"
                )
        table = read_shards(folder, description["num_shards"], description["num_rows"])
        _check_answers(table, description, folder)
        labels = cls(table, description, folder)
        fingerprint = content_digest(labels.table)
        if len(table) != description["num_rows"] or fingerprint != description["labels_fingerprint"]:
            raise ValueError(
                f"the shards in {folder} have {len(table)} rows with the fingerprint {fingerprint}: expected "
                f"{description['num_rows']} with {description['labels_fingerprint']}, as {DESCRIPTION_FILE} says; "
                f"{REMEDY}"
            )
        return labels

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        dataset: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> CommitInfo:
        """Publish labels and item embeddings as a data set on the Hub, in one commit; it is safe to repeat.

        Labels contain row numbers and item ids, but no histories, users or titles. A teacher that was loaded from a
        folder is named by the last part of its path. A card that was edited on the Hub stays.

        Args:
            repo_id: "user/name", or "name" of the token's user; made when it does not exist.
            license: the Hub's name of the labels' licence, such as "cc-by-4.0"; None states none.
            dataset: name on the Hub of the data set that the labels are about, for the card.
            commit_message, commit_description, private, token, revision, create_pr, parent_commit: as in
                `SequenceDatasets.push_to_hub`.

        Returns:
            The commit, or the latest one when nothing has changed.

        Raises:
            PermissionError: when the token is missing, wrong, or may not write there.
            ValueError: for damaged item embeddings; when a private repository was requested and a public one exists;
                and when another commit is pushed during the upload.
            OSError: when the Hub cannot be reached.
        """
        description = self.description | {"teacher": named_teacher(self.description["teacher"]), "num_shards": 1}
        files: dict[str, Path | bytes] = {DESCRIPTION_FILE: (json.dumps(description, indent=2) + "\n").encode()}
        if description["embedding_size"] is not None:
            self.item_embeddings()  # raises for a damaged file
            files[EMBEDDINGS_FILE] = self.folder / EMBEDDINGS_FILE
        with tempfile.TemporaryDirectory() as folder:
            files[shard_name(0)] = Path(folder) / shard_name(0)
            pq.write_table(self.table, files[shard_name(0)])
            return upload(
                files,
                repo_id,
                repo_type="dataset",
                card=lambda name, existing: card_to_publish(labels_card(name, description, license, dataset), existing),
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent_commit,
            )

    def __len__(self) -> int:
        return len(self.table)

    def lookup(self, history_ids: ArrayLike, prefix_lengths: ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up labels; where there is none, all items and distances are zero.

        Args:
            history_ids: rows of the train split: a tensor, array or list of any shape, such as (batch,).
            prefix_lengths: the number of items of each row that the teacher saw, in the same shape.

        Returns:
            teacher_items, (..., top_k) int64 in 1..num_items, or 0 where there is no label, and teacher_distances,
            (..., top_k) float32.

        Raises:
            ValueError: for shapes that differ.
        """
        history_ids, prefix_lengths = np.asarray(history_ids), np.asarray(prefix_lengths)
        if history_ids.shape != prefix_lengths.shape:
            raise ValueError(
                f"history_ids have shape {history_ids.shape} and prefix_lengths {prefix_lengths.shape}: expected the "
                "same shape"
            )
        asked = keys(history_ids, prefix_lengths)  # (...)
        rows = np.searchsorted(self._keys, asked).clip(max=len(self._keys) - 1)  # (...)
        found = torch.from_numpy(np.asarray(self._keys[rows] == asked)).unsqueeze(-1)  # (..., 1)
        items = torch.from_numpy(self._items[rows].astype(np.int64)) * found  # (..., top_k)
        distances = torch.from_numpy(self._distances[rows]) * found  # (..., top_k)
        return items, distances

    def origin(self) -> dict[str, str | None]:
        """The fingerprints of labels, item embeddings and teacher, and where the teacher was loaded from."""
        names = {
            "fingerprint": "labels_fingerprint",
            "embeddings_fingerprint": "embeddings_fingerprint",
            "teacher": "teacher",
            "teacher_fingerprint": "teacher_fingerprint",
        }
        return {name: self.description[key] for name, key in names.items()}

    @property
    def embedding_size(self) -> int:
        """Size of the teacher's item embeddings.

        Raises:
            ValueError: when the teacher has no item embeddings.
        """
        if self.description["embedding_size"] is None:
            raise ValueError(
                f"the teacher of {self.folder} ({self.description['teacher']}) has no item embeddings: expected an "
                "iLoRA model, or a folder of DLLM2Rec's text files with all_embeddings.pt"
            )
        return self.description["embedding_size"]

    def item_embeddings(self) -> torch.Tensor:
        """The teacher's item embeddings, (num_items + 1, teacher size) float32, zero for padding.

        The first call reads and checks them; every call returns the same tensor.

        Raises:
            ValueError: when the teacher has none, or the file is damaged or changed.
        """
        if self._item_embeddings is None:
            self._item_embeddings = self._read_embeddings()
        return self._item_embeddings

    def _read_embeddings(self) -> torch.Tensor:
        embeddings = read_embeddings(self.folder, self.num_items, self.embedding_size)
        found, expected = embeddings_digest(self.folder), self.description["embeddings_fingerprint"]
        if found != expected:
            raise ValueError(
                f"{self.folder / EMBEDDINGS_FILE} has the fingerprint {found}: expected {expected}, as "
                f"{DESCRIPTION_FILE} says; {REMEDY}"
            )
        return embeddings


def keys(history_ids: np.ndarray, prefix_lengths: np.ndarray) -> np.ndarray:
    """One int64 per pair, which sorts by history id and then by prefix length."""
    return (history_ids.astype(np.int64) << 32) | prefix_lengths.astype(np.int64)


def in_key_order(table: pa.Table) -> pa.Table:
    """The rows, ordered by history_id and prefix_length."""
    order = np.argsort(keys(table["history_id"].to_numpy(), table["prefix_length"].to_numpy()))
    return table.take(order).combine_chunks()


def read_shards(folder: Path, num_shards: int, num_rows: int | None = None) -> pa.Table:
    """All shards, concatenated.

    Args:
        folder: the folder of labels.
        num_shards: number of shards.
        num_rows: total number of rows, checked before the shards are read; None accepts any.

    Raises:
        ValueError: when a shard is missing or damaged, or does not contain labels.
    """
    paths, rows = [], 0
    for shard in range(num_shards):
        path = folder / shard_name(shard)
        if not path.is_file():
            raise ValueError(f"{path} is missing: expected {num_shards} shards; {REMEDY}")
        with open_parquet(path, REMEDY) as file:
            rows += file.metadata.num_rows
        paths.append(path)
    if num_rows not in (None, rows):
        raise ValueError(
            f"the shards in {folder} have {rows} rows: expected {num_rows}, as {DESCRIPTION_FILE} says; {REMEDY}"
        )
    tables = []
    for path in paths:
        table = read_parquet(path)
        if not table.schema.equals(SCHEMA):
            raise ValueError(f"{path} has the columns {table.schema.names}: expected those of labels; {REMEDY}")
        tables.append(table)
    return pa.concat_tables(tables)


def _check_answers(table: pa.Table, description: dict, folder: Path) -> None:
    """Raise a ValueError unless every answer consists of `top_k` items of the catalogue and finite distances."""
    top_k, num_items = description["top_k"], description["num_items"]
    items, distances = (table[name].combine_chunks() for name in ("teacher_items", "teacher_distances"))
    nulls = sum(table[name].null_count for name in table.column_names)
    lengths = [pc.min_max(pc.list_value_length(each)).as_py() for each in (items, distances)]
    if nulls or any(each != {"min": top_k, "max": top_k} for each in lengths):
        raise ValueError(f"the answers in {folder} do not all have {top_k} items and distances, the top_k; {REMEDY}")
    ids, numbers = items.flatten(), distances.flatten()
    bounds = pc.min_max(ids).as_py()
    whole = not ids.null_count and not numbers.null_count and bounds["min"] >= 1 and bounds["max"] <= num_items
    if not whole or not pc.all(pc.is_finite(numbers)).as_py():
        raise ValueError(
            f"the answers in {folder} contain items {bounds['min']} to {bounds['max']}, or distances that are not "
            f"finite: expected items 1 to {num_items} and finite distances; {REMEDY}"
        )


def read_embeddings(folder: Path, num_items: int, size: int | None = None) -> torch.Tensor:
    """(num_items + 1, size) float32; None accepts any size."""
    path = folder / EMBEDDINGS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            table = file.get_tensor(EMBEDDINGS_KEY)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path} does not contain {EMBEDDINGS_KEY} ({error!r}): {REMEDY}") from error
    if table.dim() != 2 or len(table) != num_items + 1 or size not in (None, table.shape[1]):
        expected = f"({num_items + 1}, {'any' if size is None else size})"
        raise ValueError(f"{path} has shape {tuple(table.shape)}: expected {expected}; {REMEDY}")
    return table


def embeddings_digest(folder: Path) -> str:
    """sha256, in hex, of the file of item embeddings."""
    with (folder / EMBEDDINGS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_description(folder: Path) -> dict:
    """The content of teacher_labels.json.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged or of another version.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {DESCRIPTION_FILE}: expected finished labels; run `hf-ilora label` with "
            "this output_dir, which resumes where it was interrupted"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {DESCRIPTION_REMEDY}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}: expected {FORMAT_VERSION}; {DESCRIPTION_REMEDY}")
    missing = sorted(_NEEDED - description.keys())
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: {DESCRIPTION_REMEDY}")
    numbers = {name: description[name] for name in _COUNTS}
    if description["embedding_size"] is not None:
        numbers["embedding_size"] = description["embedding_size"]
    for name, number in numbers.items():
        if not is_count(number, 1):
            raise ValueError(f"{path} has {name}={number!r}: expected an integer of at least 1; {DESCRIPTION_REMEDY}")
    if description["top_k"] > description["num_items"]:
        raise ValueError(
            f"{path} has top_k={description['top_k']} and num_items={description['num_items']}: expected top_k of at "
            f"most num_items; {DESCRIPTION_REMEDY}"
        )
    return description


__all__ = ["DESCRIPTION_FILE", "EMBEDDINGS_FILE", "EMBEDDINGS_KEY", "FORMAT_VERSION", "SCHEMA", "TeacherLabels"]
__all__ += ["embeddings_digest", "in_key_order", "keys", "read_description", "read_embeddings", "read_shards"]
__all__ += ["shard_name"]
