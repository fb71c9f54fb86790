"""Asks a teacher about prefixes of the train split and writes its answers shard by shard, so that a kill loses little.

What is asked, and in which order, is written down first (requests.parquet, with the settings). Shard n has the answers
to a fixed slice of it, and takes its name when it is whole. So the shards that are there say all about the progress: no
row can be lost or doubled, and a run may go on with another number of processes.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import save_file

from hf_ilora.data.columns import training_sequences
from hf_ilora.data.storage import content_digest, read_parquet
from hf_ilora.distillation.acquisition import acquire
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
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel

logger = logging.getLogger(__name__)

REQUESTS_FILE = "requests.parquet"
POSITIONS = ("last", "all")

_SETTINGS_KEY = b"settings"
_SECONDS_BETWEEN_REPORTS = 10


@dataclass(frozen=True)
class LabelRequests:
    """Prefixes of the training sequences, each with the question what comes next.

    Args:
        items: (total,) item ids, the sequences (history and target of a training row) one after the other.
        boundaries: (rows + 1,) where they begin.
        history_ids: (requests,) int64, rows of the train split.
        positions: (requests,) int32, number of items that the teacher sees; the next one is known and not shown.
    """

    items: np.ndarray
    boundaries: np.ndarray
    history_ids: np.ndarray
    positions: np.ndarray

    @classmethod
    def of_split(cls, split: Dataset, positions: str = "last") -> "LabelRequests":
        """The requests of a train split.

        Args:
            split: rows with `history` and `target`.
            positions: "last" asks for each row's target alone; "all" for every item of the sequence but the first.

        Raises:
            ValueError: for another `positions`, a split without rows, and an empty history.
        """
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}: expected one of {', '.join(POSITIONS)}")
        items, boundaries = training_sequences(split)
        lengths = np.diff(boundaries) - 1  # items before the target, (rows,)
        if not lengths.all():
            raise ValueError(
                f"the history of row {lengths.argmin()} is empty: drop users with fewer interactions "
                "(min_user_interactions)"
            )
        history_ids, last = np.arange(len(lengths)), lengths
        if positions == "all":
            history_ids = np.repeat(history_ids, lengths)
            last = np.arange(1, len(history_ids) + 1) - np.repeat(lengths.cumsum() - lengths, lengths)
        return cls(items, boundaries, history_ids, last.astype(np.int32))

    def __len__(self) -> int:
        return len(self.history_ids)

    def select(self, indices: np.ndarray | slice) -> "LabelRequests":
        """Some of the requests, in the order of `indices`."""
        return replace(self, history_ids=self.history_ids[indices], positions=self.positions[indices])

    def targets(self) -> np.ndarray:
        """(requests,) the item that comes next."""
        return self.items[self.boundaries[self.history_ids] + self.positions]

    def histories(self) -> torch.Tensor:
        """(requests, longest) int64 items, oldest first, padded with 0 on the right."""
        steps = np.arange(self.positions.max())  # (longest,)
        real = steps < self.positions[:, None]  # (requests, longest)
        places = np.where(real, self.boundaries[self.history_ids][:, None] + steps, 0)
        return torch.from_numpy(np.where(real, self.items[places], 0).astype(np.int64))

    def costs(self, teacher: Teacher) -> np.ndarray:
        """(requests,) tokens that the teacher reads for each; items, for teachers that read no text."""
        tokens = np.concatenate([[0], teacher.tokens_per_item[self.items].cumsum()])  # (total + 1,) before each item
        starts = self.boundaries[self.history_ids]
        ends = starts + self.positions
        if teacher.max_history is not None:
            starts = np.maximum(starts, ends - teacher.max_history)
        return tokens[ends] - tokens[starts] + teacher.tokens_per_history


def acquire_requests(
    requests: LabelRequests,
    policy: str,
    budget: int,
    recommender: NextItemPreTrainedModel | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> LabelRequests:
    """The `budget` requests that a policy of `acquire` picks by what a recommender makes of them.

    Args:
        requests: to pick from.
        policy: as in `acquire`.
        budget: number of requests.
        recommender: of this catalogue, whose scores and user embeddings the policy looks at; "random" needs none.
        seed: of the policy.
        batch_size: requests that the recommender scores at a time.

    Raises:
        ValueError: as `acquire`, and for a policy that needs a recommender, or user embeddings, where there are none.
    """
    if policy == "random":
        return requests.select(acquire(policy, budget, num_rows=len(requests), seed=seed))
    if recommender is None:
        raise ValueError(f"the policy {policy} looks at scores: expected a recommender; give one, or the policy random")
    if policy == "k_center":
        embeddings = [output.user_embedding for output in _outputs(recommender, requests, batch_size)]
        if embeddings[0] is None:
            raise ValueError(
                f"a {type(recommender).__name__} has no user embeddings: expected one that has for k_center"
            )
        return requests.select(acquire(policy, budget, user_embeddings=torch.cat(embeddings).cpu(), seed=seed))
    # Without the padding column, so that an item's column is its id - 1, as in the targets.
    scores = (output.logits[:, 1:] for output in _outputs(recommender, requests, batch_size))
    targets = requests.targets().astype(np.int64) - 1
    return requests.select(acquire(policy, budget, scores=scores, targets=targets, seed=seed))


def _outputs(recommender: NextItemPreTrainedModel, requests: LabelRequests, batch_size: int) -> Iterator:
    """The recommender's outputs, batch by batch in the order of the requests."""
    recommender.eval()
    with torch.inference_mode():
        for first in range(0, len(requests), batch_size):
            histories = requests.select(slice(first, first + batch_size)).histories().to(recommender.device)
            yield recommender(recommender.newest_items(histories))


class LabelFolder:
    """An unfinished or finished folder of labels.

    Args:
        folder: made if it does not exist.
        settings: all that decides the labels, JSON types only; "top_k", "num_items", "shard_rows" and the fingerprints
            "data_fingerprint" and "teacher_fingerprint" are among them.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, object]):
        self.folder, self.settings = Path(folder), settings
        self.top_k, self.num_items = settings["top_k"], settings["num_items"]
        self.shard_rows = settings["shard_rows"]

    def start(self, choose: Callable[[], LabelRequests]) -> None:
        """Write down what is asked, unless an earlier run has, and drop what a killed one left half written.

        One process calls it, before all others go on.

        Args:
            choose: gives the requests in the order in which they are to be asked.

        Raises:
            ValueError: when the folder holds labels of another run, with other settings or of unknown origin.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        path = self.folder / REQUESTS_FILE
        if path.exists():
            before = self._requests_table().schema.metadata
            before = json.loads(before[_SETTINGS_KEY]) if before and _SETTINGS_KEY in before else {}
            differences = [
                f"{name} was {before.get(name)!r} and is {self.settings.get(name)!r}"
                for name in sorted(before.keys() | self.settings.keys())
                if before.get(name) != self.settings.get(name)
            ]
            if differences:
                raise ValueError(
                    f"{self.folder} holds labels of a run that differs from this one: {'; '.join(differences)}; "
                    "choose another output_dir, or delete the folder"
                )
            return
        foreign = [path.name for path in self.folder.glob("labels-*.parquet")]
        foreign += [name for name in (DESCRIPTION_FILE, EMBEDDINGS_FILE) if (self.folder / name).exists()]
        if foreign:
            raise ValueError(
                f"{self.folder} holds {foreign[0]} but no {REQUESTS_FILE}: choose another output_dir, or delete the "
                "folder"
            )
        requests = choose()
        table = pa.table({"history_id": requests.history_ids, "position": requests.positions})
        table = table.replace_schema_metadata({_SETTINGS_KEY: json.dumps(self.settings)})
        with written_whole(path) as unfinished:
            pq.write_table(table, unfinished)

    def requests(self, all_requests: LabelRequests) -> LabelRequests:
        """What is asked, in its order, as `start` wrote it down."""
        table = self._requests_table()
        history_ids, positions = (table[name].to_numpy().copy() for name in ("history_id", "position"))
        return replace(all_requests, history_ids=history_ids, positions=positions)

    def _requests_table(self) -> pa.Table:
        return read_parquet(self.folder / REQUESTS_FILE)

    def num_shards(self, requests: LabelRequests) -> int:
        return -(-len(requests) // self.shard_rows)

    def open_shards(self, requests: LabelRequests, process: int, num_processes: int) -> list[int]:
        """The shards of one process that are not there yet.

        Raises:
            ValueError: when a shard is there and damaged, or answers other requests.
        """
        missing = []
        for shard in range(process, self.num_shards(requests), num_processes):
            path = self.folder / shard_name(shard)
            if not path.exists():
                missing.append(shard)
                continue
            asked, found = self.shard(requests, shard), read_parquet(path)
            if not found.schema.equals(SCHEMA) or not np.array_equal(
                keys(found["history_id"].to_numpy(), found["position"].to_numpy()),
                keys(asked.history_ids, asked.positions),
            ):
                raise ValueError(f"{path} does not answer what {REQUESTS_FILE} asks: delete it, and it is made anew")
        return missing

    def shard(self, requests: LabelRequests, shard: int) -> LabelRequests:
        """The requests that one shard answers."""
        return requests.select(self.rows_of(shard))

    def rows_of(self, shard: int) -> slice:
        """Which of the requests one shard answers."""
        return slice(shard * self.shard_rows, (shard + 1) * self.shard_rows)

    def write(self, shard: int, asked: LabelRequests, item_ids: np.ndarray, distances: np.ndarray) -> None:
        """Write the answers (rows, top_k) to the requests of one shard.

        Raises:
            ValueError: for answers of another shape, items outside the catalogue, and distances that are not finite.
        """
        expected = (len(asked), self.top_k)
        if item_ids.shape != expected or distances.shape != expected:
            raise ValueError(
                f"the teacher gave items {item_ids.shape} and distances {distances.shape}: expected {expected} of both"
            )
        wrong = ((item_ids < 1) | (item_ids > self.num_items) | ~np.isfinite(distances)).any(axis=1)  # (rows,)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"the teacher answered history {asked.history_ids[row]} with items {item_ids[row].tolist()} and "
                f"distances {distances[row].tolist()}: expected ids 1..{self.num_items} and finite distances"
            )
        columns = [asked.history_ids, asked.positions, self._lists(item_ids), self._lists(distances)]
        with written_whole(self.folder / shard_name(shard)) as unfinished:
            pq.write_table(pa.table([pa.array(column) for column in columns], schema=SCHEMA), unfinished)

    def _lists(self, values: np.ndarray) -> pa.ListArray:
        """(rows, top_k) -> a list per row."""
        dtype = np.int32 if values.dtype.kind == "i" else np.float32
        offsets = np.arange(len(values) + 1, dtype=np.int32) * self.top_k
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype).reshape(-1)))

    def finish(self, requests: LabelRequests, teacher: Teacher) -> dict:
        """Write the item embeddings and, last, the description. One process calls it when all shards are there.

        A folder that has a description is compared with it and stays as it is.

        Returns:
            The description.

        Raises:
            ValueError: when a shard is missing or damaged, or the files are not those that the description is about.
        """
        table = in_key_order(read_shards(self.folder, self.num_shards(requests)))
        description = {
            "format_version": FORMAT_VERSION,
            **self.settings,
            "teacher": teacher.source,
            "num_rows": len(table),
            "num_shards": self.num_shards(requests),
            "labels_fingerprint": content_digest(table),
            **self._write_embeddings(teacher),
        }
        if (self.folder / DESCRIPTION_FILE).exists():
            return self._check_described(description)
        with written_whole(self.folder / DESCRIPTION_FILE) as unfinished:
            unfinished.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        return description

    def _check_described(self, found: dict) -> dict:
        """The description that is there, when it is about the same files as `found`."""
        description = read_description(self.folder)
        for name in ("labels_fingerprint", "embeddings_fingerprint"):
            if found[name] != description[name]:
                raise ValueError(
                    f"the files in {self.folder} have the {name} {found[name]}: expected {description[name]}, as "
                    f"{DESCRIPTION_FILE} says; restore the files, or delete {DESCRIPTION_FILE} and give the same "
                    "command again, which describes them as they are"
                )
        return description

    def _write_embeddings(self, teacher: Teacher) -> dict:
        """What the description says about the teacher's item embeddings, which are written unless they are there."""
        path = self.folder / EMBEDDINGS_FILE
        if not path.exists():
            embeddings = teacher.item_embeddings()
            if embeddings is None:
                return {"embedding_size": None, "embeddings_fingerprint": None}
            with written_whole(path) as unfinished:
                save_file({EMBEDDINGS_KEY: embeddings.float().contiguous()}, unfinished)
        size = read_embeddings(self.folder, self.num_items).shape[1]
        return {"embedding_size": size, "embeddings_fingerprint": embeddings_digest(self.folder)}


@dataclass(frozen=True)
class LabelSpeed:
    """What one process did.

    Args:
        rows: labelled.
        tokens: read, as `LabelRequests.costs` counts them.
        seconds: that it took.
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
    """Answer the shards of one process that are not there yet, and report the progress and the time left.

    Args:
        folder: started.
        requests: what it asks.
        teacher: who answers.
        exclude_seen: leave out the items that the teacher saw.
        batch_size: histories at a time.
        process, num_processes: this one among all; shards are dealt out in turn.
    """
    shards = folder.open_shards(requests, process, num_processes)
    costs = requests.costs(teacher)  # (requests,) tokens
    parts = [folder.shard(requests, shard) for shard in shards]
    total_rows = sum(map(len, parts))
    total_tokens = sum(int(costs[folder.rows_of(shard)].sum()) for shard in shards)
    logger.info(
        "%d rows in %d of %d shards are left to this process", total_rows, len(shards), folder.num_shards(requests)
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


__all__ = ["POSITIONS", "REQUESTS_FILE", "LabelFolder", "LabelRequests", "LabelSpeed", "acquire_requests"]
__all__ += ["label_shards"]
