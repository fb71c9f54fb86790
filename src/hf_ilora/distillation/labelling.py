"""Asks a teacher about prefixes of the train split and writes its answers shard by shard, so a crash loses little work.

`requests.parquet` is written first. It lists the requests, in the order in which the teacher is asked, and the
settings. Shard n contains the answers to a fixed slice of it and is written whole or not at all. The existing shards
are therefore the whole state of the run: no row can be lost or duplicated, and the run can resume with another number
of processes.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import save_file

from hf_ilora.data.columns import training_sequences
from hf_ilora.data.storage import CARD_FILE, content_digest, read_parquet
from hf_ilora.distillation.acquisition import acquire
from hf_ilora.distillation.labels_card import labels_card
from hf_ilora.distillation.teacher_labels import (
    DESCRIPTION_FILE,
    EMBEDDINGS_FILE,
    EMBEDDINGS_KEY,
    FORMAT_VERSION,
    SCHEMA,
    embeddings_digest,
    in_key_order,
    keys,
    read_description,
    read_embeddings,
    read_shards,
    shard_name,
)
from hf_ilora.distillation.teachers import Teacher
from hf_ilora.files import remove_unfinished, written_whole
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.histories import check_batch_size
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel, evaluation_mode

logger = logging.getLogger(__name__)

REQUESTS_FILE = "requests.parquet"
LABELLED_POSITIONS = ("last", "all")

_SETTINGS_KEY = b"settings"
_SECONDS_BETWEEN_REPORTS = 10
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class LabelRequests:
    """Prefixes of the training sequences; the teacher is asked for the next item of each.

    Args:
        items: (total,) item ids: the sequences (history and target of each training row), concatenated.
        boundaries: (rows + 1,) index in `items` at which each sequence begins, and the total at the end.
        history_ids: (requests,) int64, rows of the train split.
        prefix_lengths: (requests,) int32, number of items that the teacher sees.
    """

    items: np.ndarray
    boundaries: np.ndarray
    history_ids: np.ndarray
    prefix_lengths: np.ndarray

    @classmethod
    def of_split(cls, split: Dataset, labelled_positions: str = "last") -> "LabelRequests":
        """The requests of a train split.

        Args:
            split: rows with `history` and `target`.
            labelled_positions: "last" asks for the target of each row only; "all" for every item of its sequence except
                the first.

        Raises:
            ValueError: for an unknown `labelled_positions`, a split without rows and an empty history.
        """
        if labelled_positions not in LABELLED_POSITIONS:
            raise ValueError(
                f"labelled_positions is {labelled_positions!r}: expected one of {', '.join(LABELLED_POSITIONS)}"
            )
        items, boundaries = training_sequences(split)
        lengths = np.diff(boundaries) - 1  # items before the target, (rows,)
        if not lengths.all():
            raise ValueError(
                f"the history of row {lengths.argmin()} is empty: drop users with fewer interactions "
                "(min_user_interactions)"
            )
        history_ids, last = np.arange(len(lengths)), lengths
        if labelled_positions == "all":
            history_ids = np.repeat(history_ids, lengths)
            last = np.arange(1, len(history_ids) + 1) - np.repeat(lengths.cumsum() - lengths, lengths)
        return cls(items, boundaries, history_ids, last.astype(np.int32))

    def __len__(self) -> int:
        return len(self.history_ids)

    def select(self, indices: np.ndarray | slice) -> "LabelRequests":
        """The requests at `indices`, in that order."""
        return replace(self, history_ids=self.history_ids[indices], prefix_lengths=self.prefix_lengths[indices])

    def targets(self) -> np.ndarray:
        """(requests,) the actual next items, which the teacher does not see."""
        return self.items[self.boundaries[self.history_ids] + self.prefix_lengths]

    def histories(self) -> torch.Tensor:
        """(requests, longest) int64 item ids, oldest first, padded with 0 on the right."""
        steps = np.arange(self.prefix_lengths.max())  # (longest,)
        real = steps < self.prefix_lengths[:, None]  # (requests, longest)
        places = np.where(real, self.boundaries[self.history_ids][:, None] + steps, 0)
        return torch.from_numpy(np.where(real, self.items[places], PADDING_ITEM_ID).astype(np.int64))

    def costs(self, teacher: Teacher) -> np.ndarray:
        """(requests,) tokens that the teacher reads for each request, or items if it does not read text."""
        tokens = np.concatenate([[0], teacher.tokens_per_item[self.items].cumsum()])  # (total + 1,) before each item
        starts = self.boundaries[self.history_ids]
        ends = starts + self.prefix_lengths
        if teacher.max_history is not None:
            starts = np.maximum(starts, ends - teacher.max_history)
        return tokens[ends] - tokens[starts] + teacher.tokens_per_history


def acquire_requests(
    requests: LabelRequests,
    policy_name: str,
    budget: int,
    recommender: NextItemPreTrainedModel | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> LabelRequests:
    """Select `budget` requests with a policy of `acquire`.

    Args:
        requests: the requests to select from.
        policy_name: as in `acquire`.
        budget: number of requests to select.
        recommender: a recommender with this catalogue; the policy reads its scores or user embeddings. "random" needs
            none.
        seed: random seed of the policy.
        batch_size: number of requests that the recommender scores at a time.

    Raises:
        ValueError: as `acquire`, when the policy needs a recommender or user embeddings and there are none, and for a
            `batch_size` below 1.
    """
    check_batch_size(batch_size)
    if policy_name == "random":
        return requests.select(acquire(policy_name, budget, num_rows=len(requests), seed=seed))
    if recommender is None:
        raise ValueError(
            f"policy {policy_name} reads a recommender's outputs: expected a recommender; pass one, or use random"
        )
    if policy_name == "k_center":
        embeddings = [output.user_embedding for output in _outputs(recommender, requests, batch_size)]
        if embeddings[0] is None:
            raise ValueError(
                f"{type(recommender).__name__} has no user embeddings, which k_center compares: expected a recommender "
                "that has, such as SASRec; or use another policy"
            )
        user_embeddings = torch.cat(embeddings).cpu()  # (requests, hidden)
        return requests.select(acquire(policy_name, budget, user_embeddings=user_embeddings, seed=seed))
    # Without the padding column, so that an item's column is its id - 1, as in the targets.
    scores = (output.logits[:, 1:] for output in _outputs(recommender, requests, batch_size))
    targets = requests.targets().astype(np.int64) - 1
    return requests.select(acquire(policy_name, budget, scores=scores, targets=targets, seed=seed))


def _outputs(recommender: NextItemPreTrainedModel, requests: LabelRequests, batch_size: int) -> Iterator:
    """The recommender's outputs, one per batch, in the order of the requests."""
    with evaluation_mode(recommender), torch.inference_mode():
        for first in range(0, len(requests), batch_size):
            histories = requests.select(slice(first, first + batch_size)).histories().to(recommender.device)
            yield recommender(recommender.newest_items(histories))


class LabelFolder:
    """A folder of labels, finished or in progress.

    Args:
        folder: created if it does not exist.
        settings: everything that determines the labels, in JSON types, among it "top_k", "num_items", "shard_rows",
            "data_fingerprint" and "teacher_fingerprint".
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]):
        self.path, self.settings = Path(folder), settings
        self.top_k, self.num_items = settings["top_k"], settings["num_items"]
        self.shard_rows = settings["shard_rows"]

    def start(self, choose: Callable[[], LabelRequests]) -> None:
        """Write the requests, unless an earlier run did, and delete unfinished files of a crashed run.

        Call it in one process only, before any process labels.

        Args:
            choose: function that returns the requests in the order in which to ask them.

        Raises:
            ValueError: when the folder contains labels of a run with other settings, or labels without requests.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.path)
        path = self.path / REQUESTS_FILE
        if path.exists():
            before = self._requests_table().schema.metadata
            before = json.loads(before[_SETTINGS_KEY]) if before and _SETTINGS_KEY in before else {}
            differences = [
                f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}"
                for name in sorted(before.keys() | self.settings.keys())
                if before.get(name) != self.settings.get(name)
            ]
            if differences and any(self.path.glob("labels-*.parquet")):
                raise ValueError(
                    f"{self.path} contains labels of a run that differs from this one: {'; '.join(differences)}; "
                    "choose another output_dir, or delete the folder"
                )
            if not differences:
                return
            path.unlink()  # no answer is lost
        foreign = [path.name for path in self.path.glob("labels-*.parquet")]
        foreign += [name for name in (DESCRIPTION_FILE, EMBEDDINGS_FILE) if (self.path / name).exists()]
        if foreign:
            raise ValueError(
                f"{self.path} contains {foreign[0]} but no {REQUESTS_FILE}: choose another output_dir, or delete the "
                "folder"
            )
        requests = choose()
        table = pa.table({"history_id": requests.history_ids, "prefix_length": requests.prefix_lengths})
        table = table.replace_schema_metadata({_SETTINGS_KEY: json.dumps(self.settings)})
        with written_whole(path) as unfinished:
            pq.write_table(table, unfinished)

    def requests(self, all_requests: LabelRequests) -> LabelRequests:
        """The requests that `start` wrote, in their order."""
        table = self._requests_table()
        history_ids, prefix_lengths = (table[name].to_numpy().copy() for name in ("history_id", "prefix_length"))
        return replace(all_requests, history_ids=history_ids, prefix_lengths=prefix_lengths)

    def _requests_table(self) -> pa.Table:
        return read_parquet(self.path / REQUESTS_FILE)

    def num_shards(self, requests: LabelRequests) -> int:
        return -(-len(requests) // self.shard_rows)

    def missing_shards(self, requests: LabelRequests, process: int, num_processes: int) -> list[int]:
        """The shards that one process still has to write.

        Raises:
            ValueError: when an existing shard is damaged or answers other requests.
        """
        missing = []
        for shard in range(process, self.num_shards(requests), num_processes):
            path = self.path / shard_name(shard)
            if not path.exists():
                missing.append(shard)
                continue
            asked, found = self.shard(requests, shard), read_parquet(path)
            if not found.schema.equals(SCHEMA) or not np.array_equal(
                keys(found["history_id"].to_numpy(), found["prefix_length"].to_numpy()),
                keys(asked.history_ids, asked.prefix_lengths),
            ):
                raise ValueError(f"{path} does not answer the requests of {REQUESTS_FILE}: delete it to ask them again")
        return missing

    def shard(self, requests: LabelRequests, shard: int) -> LabelRequests:
        """The requests that one shard answers."""
        return requests.select(self.rows_of(shard))

    def rows_of(self, shard: int) -> slice:
        """The range of requests that one shard answers."""
        return slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)

    def write(self, shard: int, asked: LabelRequests, item_ids: np.ndarray, distances: np.ndarray) -> None:
        """Write the answers, (rows, top_k), to the requests of one shard.

        Raises:
            ValueError: for answers of another shape, items outside the catalogue and distances that are not finite.
        """
        expected = (len(asked), self.top_k)
        if item_ids.shape != expected or distances.shape != expected:
            raise ValueError(
                f"the teacher returned items {item_ids.shape} and distances {distances.shape}: expected {expected} for "
                "both"
            )
        wrong = ((item_ids < 1) | (item_ids > self.num_items) | ~np.isfinite(distances)).any(axis=1)  # (rows,)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"the teacher answered history {asked.history_ids[row]} with items {item_ids[row].tolist()} and "
                f"distances {distances[row].tolist()}: expected ids 1..{self.num_items} and finite distances"
            )
        columns = [asked.history_ids, asked.prefix_lengths, self._lists(item_ids), self._lists(distances)]
        with written_whole(self.path / shard_name(shard)) as unfinished:
            pq.write_table(pa.table([pa.array(column) for column in columns], schema=SCHEMA), unfinished)

    def _lists(self, values: np.ndarray) -> pa.ListArray:
        """(rows, top_k) -> a list for each row."""
        dtype = np.int32 if values.dtype.kind == "i" else np.float32
        offsets = np.arange(len(values) + 1, dtype=np.int32) * self.top_k
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype).reshape(-1)))

    def finish(self, requests: LabelRequests, teacher: Teacher) -> dict:
        """Write the item embeddings, the card unless there is one, and then the description.

        Call it in one process only, once all shards exist. If the folder already has a description, the files are
        checked against it and nothing is written.

        Returns:
            The description.

        Raises:
            ValueError: when a shard is missing or damaged, or the files do not match an existing description.
        """
        table = in_key_order(read_shards(self.path, self.num_shards(requests)))
        description = {
            "format_version": FORMAT_VERSION,
            **self.settings,
            "teacher": teacher.source,
            "num_rows": len(table),
            "num_shards": self.num_shards(requests),
            "labels_fingerprint": content_digest(table),
            **self._write_embeddings(teacher),
        }
        if (self.path / DESCRIPTION_FILE).exists():
            return self._check_described(description)
        if not (self.path / CARD_FILE).exists():
            with written_whole(self.path / CARD_FILE) as unfinished:
                unfinished.write_text(labels_card(self.path.resolve().name, description), encoding="utf-8")
        with written_whole(self.path / DESCRIPTION_FILE) as unfinished:
            unfinished.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        return description

    def _check_described(self, found: dict) -> dict:
        """The existing description, if it describes the same files as `found`."""
        description = read_description(self.path)
        for name in ("labels_fingerprint", "embeddings_fingerprint"):
            if found[name] != description[name]:
                raise ValueError(
                    f"the files in {self.path} have the {name} {found[name]}: expected {description[name]}, as "
                    f"{DESCRIPTION_FILE} says; restore the files, or delete {DESCRIPTION_FILE} and run the same "
                    "command again, which describes them as they are"
                )
        return description

    def _write_embeddings(self, teacher: Teacher) -> dict:
        """Write the teacher's item embeddings unless they exist; return their part of the description.

        Students learn from labels of the train split only, so other splits get no embeddings.
        """
        path = self.path / EMBEDDINGS_FILE
        if not path.exists():
            is_for_training = self.settings.get("split", "train") == "train"
            embeddings = teacher.item_embeddings() if is_for_training else None
            if embeddings is None:
                return {"embedding_size": None, "embeddings_fingerprint": None}
            with written_whole(path) as unfinished:
                save_file({EMBEDDINGS_KEY: embeddings.float().contiguous()}, unfinished)
        size = read_embeddings(self.path, self.num_items).shape[1]
        return {"embedding_size": size, "embeddings_fingerprint": embeddings_digest(self.path)}


@dataclass(frozen=True)
class LabelSpeed:
    """The work of one process and the time that it took.

    Args:
        rows: number of rows labelled.
        tokens: number of tokens that the teacher read for them, as `LabelRequests.costs` counts them.
        seconds: time taken.
    """

    rows: int
    tokens: int
    seconds: float


def label_shards(
    folder: LabelFolder,
    requests: LabelRequests,
    teacher: Teacher,
    *,
    exclude_seen: bool = True,
    batch_size: int = 16,
    process: int = 0,
    num_processes: int = 1,
) -> LabelSpeed:
    """Write the shards that one process still has to write, and log the progress and the time left.

    Args:
        folder: the folder of labels, after `start`.
        requests: all requests of the folder, as `folder.requests` returns them.
        teacher: the teacher to ask.
        exclude_seen: exclude the items of the history from the answers.
        batch_size: number of histories per call of the teacher.
        process: index of this process. Shard n belongs to process n % num_processes.
        num_processes: number of processes.

    Raises:
        ValueError: for a `batch_size` below 1.
    """
    check_batch_size(batch_size)
    shards = folder.missing_shards(requests, process, num_processes)
    costs = requests.costs(teacher)  # (requests,) tokens
    parts = [folder.shard(requests, shard) for shard in shards]
    total_rows = sum(map(len, parts))
    total_tokens = sum(int(costs[folder.rows_of(shard)].sum()) for shard in shards)
    logger.info(
        "%d rows in %d of %d shards are left for this process", total_rows, len(shards), folder.num_shards(requests)
    )
    rows = tokens = 0
    begin = reported = time.monotonic()
    for shard, part in zip(shards, parts, strict=True):
        part_costs, answers = costs[folder.rows_of(shard)], []
        for first in range(0, len(part), batch_size):
            batch = part.select(slice(first, first + batch_size))
            with torch.inference_mode():
                item_ids, distances = teacher.rank(batch.history_ids, batch.histories(), folder.top_k, exclude_seen)
            answers.append((item_ids.cpu().numpy(), distances.float().cpu().numpy()))
            rows, tokens = rows + len(batch), tokens + int(part_costs[first : first + batch_size].sum())
            now = time.monotonic()
            if now - reported > _SECONDS_BETWEEN_REPORTS:
                reported = now
                logger.info(
                    "%d of %d rows, %.3g tokens per second, %.0f s left",
                    *(rows, total_rows, tokens / (now - begin), (total_tokens - tokens) / tokens * (now - begin)),
                )
        item_ids, distances = (np.concatenate(values) for values in zip(*answers, strict=True))
        folder.write(shard, part, item_ids, distances)
    return LabelSpeed(rows, tokens, time.monotonic() - begin)


def wait_for_shards(folder: LabelFolder, requests: LabelRequests, timeout_seconds: float) -> None:
    """Wait until all processes have written their shards, as long as any of them makes progress.

    Args:
        folder: the folder of labels, shared by all processes.
        requests: all requests of the folder.
        timeout_seconds: time without a new shard after which a process counts as hanging.

    Raises:
        TimeoutError: when no process has written a shard for that long.
    """
    found, since = -1, time.monotonic()
    while True:
        missing = [n for n in range(folder.num_shards(requests)) if not (folder.path / shard_name(n)).exists()]
        written = folder.num_shards(requests) - len(missing)
        if not missing:
            return
        if written > found:
            found, since = written, time.monotonic()
        elif time.monotonic() - since > timeout_seconds:
            raise TimeoutError(
                f"{len(missing)} shards are missing in {folder.path}, {shard_name(missing[0])} first, and no process "
                f"has written one for {timeout_seconds / 60:.3g} minutes: a process hangs; run the same command again, "
                "which asks for the missing ones only, with a larger timeout_minutes if a shard takes longer"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


__all__ = ["LABELLED_POSITIONS", "REQUESTS_FILE", "LabelFolder", "LabelRequests", "LabelSpeed", "acquire_requests"]
__all__ += ["label_shards", "wait_for_shards"]
