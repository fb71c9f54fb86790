"""Recommends to many users into one parquet file, in bounded memory and by several processes; a killed run can resume.

The users are divided into shards. Process n % processes writes shard n, whole or not at all, as a part beside the
output. The parts are therefore the entire state of a run; when all exist, they are merged into the output.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.data.storage import content_digest
from hf_ilora.data.table_files import file_type
from hf_ilora.data.tables import TableSource
from hf_ilora.devices import process_state
from hf_ilora.files import remove_unfinished, written_whole
from hf_ilora.models.loading import check_same_items
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.histories import Histories
from hf_ilora.models.next_item.top_k import check_top_k
from hf_ilora.runs.processes import sole_writer

from .history_tables import HistoryTable, history_table
from .item_sets import GivenItems, ItemSets, item_sets
from .recommenders import AnyRecommender, AskedRecommender
from .user_items import UserItems

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
FORMAT_VERSION = 1

_SETTINGS_KEY = b"hf_ilora.recommend_all"
_BATCHES_PER_SHARD = 64
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_WITHOUT_A_PART = 7200
_SECONDS_BETWEEN_REPORTS = 10
ANSWER_COLUMNS = ["user_id", "rank", "item_id", "score"]


def recommend_all(
    model: AnyRecommender,
    histories: TableSource | SequenceDatasets | Histories,
    output: str | os.PathLike = "recommendations.parquet",
    top_k: int = 10,
    batch_size: int | None = None,
    exclude_seen: bool = True,
    allowed_items: GivenItems | None = None,
    excluded_items: GivenItems | None = None,
    *,
    columns: Sequence[str] = (),
    user_column: str = "user_id",
    history_column: str = "history",
    item_column: str | None = None,
    time_column: str | None = None,
    separator: str | None = None,
    unknown_items: str = "raise",
    shard_users: int | None = None,
) -> Path:
    """Recommend items to every user of a table or data set, and write them to a parquet file.

    Users with histories of similar lengths share a batch, and at most one shard of recommendations and one batch of
    scores are in memory. To resume a run that was killed, repeat the same call. `output` is replaced once all users are
    done; a finished output of the same model, users and settings is left as it is. Under `accelerate launch`, every
    process makes the same call and takes its share of the users.

    Args:
        model: a recommender, on the device on which it should run; an `ItemIndex` or `ExactItemIndex` of one, an
            `EnsembleTeacher`, or any object with the same `recommend`, see `Recommender`.
        histories: a path to a table (parquet, CSV, TSV, JSON lines), a frame or a `datasets.Dataset` with raw ids, with
            a row per user or, with `item_column`, per interaction; `SequenceDatasets`, whose histories contain all
            items of a user, targets included; or rows of item ids, as `recommend` takes them. A user without items
            gets the most popular ones, if the catalogue has counts.
        output: the parquet file to write.
        top_k: items per user.
        batch_size: users per call of the model; None means 256 on a CPU, 2048 on an accelerator, and 8 for an iLoRA.
        exclude_seen: leave out the items of the history.
        allowed_items: the only items to choose from, in raw ids if the histories have them: ids for all users; a row of
            ids per user, in the order of the users; or a table with the columns `user_column` and `item_column` (by
            default item_id) and a row for each pair of a user and an item. None allows all.
        excluded_items: items to leave out, in the same forms.
        columns: columns of the catalogue, such as title or price, to add to the recommendations.
        user_column, history_column: columns of a table with a row per user. Histories are lists of raw ids, oldest
            first; in CSV and TSV, text with blanks between the ids.
        item_column, time_column: columns of a table with a row per interaction; without a time column, the rows are
            taken to be in order.
        separator: separator of the columns in CSV or TSV.
        unknown_items: "raise" for raw ids in histories that the catalogue lacks, or "skip" to leave them out.
        shard_users: users per part, the most that a crash can lose per process; None means 64 batches.

    Returns:
        The path of the output. It has a row for each user and rank, in the order of the users, and the columns
        `user_id`, `rank` (1 for the best), `item_id` (the raw id, or the item id if the model has no catalogue),
        `score` (log p over the whole catalogue; for an index, the model's logits) and `columns`.

    Raises:
        TypeError: for an object that is not a recommender.
        ValueError: before anything is computed, for tables that cannot be read, unknown ids, users with fewer than
            `top_k` items to recommend, users without items if it is unknown which items are popular, and an output
            whose name is that of another type of table, that another process is writing, or that something else wrote.
        TimeoutError: when no process has written a part for two hours.
    """
    output = _parquet_path(output)
    asked = AskedRecommender.of(model)
    batch_size, shard_users = _sizes(asked, batch_size, shard_users)
    catalogue, num_items = asked.catalogue, asked.num_items
    if isinstance(histories, SequenceDatasets):
        check_same_items(num_items, catalogue, "the model", histories.num_items, histories.raw_ids)
        catalogue = histories.catalogue if catalogue is None else catalogue
    table = history_table(
        histories,
        catalogue,
        num_items,
        user_column=user_column,
        history_column=history_column,
        item_column=item_column,
        time_column=time_column,
        separator=separator,
        unknown_items=unknown_items,
    )
    names = {"user_column": user_column, "item_column": item_column or "item_id"}
    id_catalogue = catalogue if table.has_raw_ids else None
    if isinstance(columns, str):
        raise ValueError(f"columns is the string {columns!r}: expected a list of names, such as [{columns!r}]")
    request = Request(
        asked=asked,
        catalogue=catalogue,
        top_k=top_k,
        exclude_seen=exclude_seen,
        allowed_items=item_sets("allowed_items", allowed_items, id_catalogue, num_items, **names),
        excluded_items=item_sets("excluded_items", excluded_items, id_catalogue, num_items, **names),
        columns=tuple(columns),
    )
    digest, num_users = request.check(table, shard_users)
    settings = request.settings() | {"histories": digest, "users": num_users, "shard_users": shard_users}
    state = process_state()
    with sole_writer(_parts_folder(output)):
        job = _Job(output, settings, -(-num_users // shard_users))
        if job.start():
            logger.info("%s is finished: the same recommendations to %d users", output, num_users)
            return output
        state.wait_for_everyone()
        _write_parts(job, request, table, shard_users, batch_size, num_users)
        job.wait()
        # `finish` deletes the parts, which another process may still be waiting to see.
        state.wait_for_everyone()
        if state.is_main_process:
            job.finish()
        state.wait_for_everyone()
    return output


@dataclass(frozen=True)
class Request:
    """The settings that determine each user's recommendations.

    Args:
        asked: the recommender.
        catalogue: its catalogue; None if it has none.
        top_k: items per user.
        exclude_seen: leave out the items of the history.
        allowed_items, excluded_items: the filters, or None.
        columns: columns of the catalogue to add to the recommendations.
    """

    asked: AskedRecommender
    catalogue: Catalogue | None
    top_k: int
    exclude_seen: bool
    allowed_items: ItemSets | None = None
    excluded_items: ItemSets | None = None
    columns: tuple[str, ...] = ()

    def settings(self) -> dict:
        """Everything that determines the recommendations, except for the users, in JSON types."""
        filters = {"allowed_items": self.allowed_items, "excluded_items": self.excluded_items}
        return {
            "format_version": FORMAT_VERSION,
            "model": self.asked.fingerprint(),
            "catalogue": None if self.catalogue is None else self.catalogue.fingerprint,
            "top_k": self.top_k,
            "exclude_seen": self.exclude_seen,
            "columns": list(self.columns),
            **{name: None if sets is None else sets.fingerprint for name, sets in filters.items()},
        }

    def check(self, table: HistoryTable, shard_users: int) -> tuple[str, int]:
        """Read all histories once, to check them and to return their digest and the number of users.

        Raises:
            ValueError: for no users, repeated users, and everything that `answer` would fail on.
        """
        num_items = self.asked.num_items
        check_top_k(self.top_k, num_items)
        if self.columns:
            if self.catalogue is None:
                raise ValueError(
                    f"columns are {', '.join(self.columns)} and the model has no catalogue: assign model.catalogue"
                )
            check_columns(self.catalogue, self.columns)
        digest, num_users, users = hashlib.sha256(), 0, []
        for shard in table.shards(shard_users):
            self._check_shard(shard, num_users)
            content = pa.table({"user_id": shard.users, "starts": shard.starts[1:]})
            digest.update(content_digest(content).encode())
            digest.update(np.ascontiguousarray(shard.items, dtype="<i4").data)
            users.append(shard.users)
            num_users += len(shard)
        if not num_users:
            raise ValueError(f"{table.name} has no rows: expected at least one user")
        counts = pa.chunked_array(users).value_counts()
        if len(counts) < num_users:
            user = next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
            raise ValueError(
                f"user {user!r} has several rows in {table.name}: expected a row per user; for a table of "
                "interactions, pass item_column"
            )
        for sets in (self.allowed_items, self.excluded_items):
            if sets is not None:
                sets.check_users(num_users)
        return digest.hexdigest(), num_users

    def _check_shard(self, shard: UserItems, first: int) -> None:
        if not shard.lengths.all() and not self.asked.knows_popular_items:
            user = shard.users[int(shard.lengths.argmin())].as_py()
            raise ValueError(
                f"user {user!r} has no items, and it is unknown which items are popular: leave the user out, or use a "
                "model whose catalogue has the column count (model.catalogue.with_counts)"
            )
        num_items = self.asked.num_items
        allowed, excluded = (
            None if sets is None else sets.of(shard.users, first) for sets in (self.allowed_items, self.excluded_items)
        )
        left = np.full(len(shard), num_items if self.allowed_items is None else 0)
        if self.allowed_items is not None:
            left += len(self.allowed_items.shared) if allowed is None else allowed.lengths
        if self.exclude_seen:
            left -= shard.lengths
        if self.excluded_items is not None:
            left -= len(self.excluded_items.shared) if excluded is None else excluded.lengths
        # `left` may count an item as left out twice, so users who seem to have too few items are counted exactly.
        for row in np.flatnonzero(left < self.top_k).tolist():
            left_out = np.zeros(num_items + 1, dtype=bool)
            left_out[0] = True
            if self.allowed_items is not None:
                left_out[:] = True
                left_out[self.allowed_items.shared if allowed is None else allowed.row(row)] = False
            if self.exclude_seen:
                left_out[shard.row(row)] = True
            if self.excluded_items is not None:
                left_out[self.excluded_items.shared if excluded is None else excluded.row(row)] = True
            available = num_items + 1 - int(left_out.sum())
            if available < self.top_k:
                raise ValueError(
                    f"top_k is {self.top_k}, but user {shard.users[row].as_py()!r} has {available} of {num_items} "
                    "items left to recommend: ask for fewer items, pass exclude_seen=False, or loosen allowed_items "
                    "and excluded_items"
                )

    def answer(self, shard: UserItems, first: int, batch_size: int, progress: tqdm) -> pa.Table:
        """Recommend to the users of one shard, who are number `first`, `first + 1`, ... of all users."""
        item_ids = np.empty((len(shard), self.top_k), dtype=np.int64)
        scores = np.empty((len(shard), self.top_k), dtype=np.float32)
        sets = {"allowed_items": self.allowed_items, "excluded_items": self.excluded_items}
        rows_of = {name: None if each is None else each.of(shard.users, first) for name, each in sets.items()}
        # Longest first: users of similar lengths share a batch, and if memory is too small, the first batch fails.
        order = np.argsort(-shard.lengths, kind="stable")
        for rows in np.split(order, range(batch_size, len(order), batch_size)):
            filters = {name: _filter_of(each, rows_of[name], rows) for name, each in sets.items()}
            answer = self.asked.recommend(shard.padded(rows), self.top_k, self.exclude_seen, **filters)
            item_ids[rows], scores[rows] = answer
            progress.update(len(rows))
        return recommendations_table(self.catalogue, shard.users, item_ids, scores, self.columns)


def _filter_of(sets: ItemSets | None, of_shard: UserItems | None, rows: np.ndarray) -> np.ndarray | None:
    """The filter of some rows of a shard, as `recommend` takes it; `of_shard` is what `sets.of` returns."""
    if sets is None:
        return None
    return sets.shared if of_shard is None else of_shard.padded(rows)


def check_columns(catalogue: Catalogue, columns: Sequence[str]) -> None:
    """Raise a ValueError for columns that a table of recommendations cannot take from the catalogue."""
    catalogue.check_columns(columns)
    for place, name in enumerate(columns):
        if name in ANSWER_COLUMNS:
            raise ValueError(
                f"columns contain {name!r}, which every table of recommendations has: leave it out; if it is a column "
                "that you added to the catalogue, add it under another name"
            )
        if name in columns[:place]:
            raise ValueError(f"columns contain {name!r} twice: expected different names")


def recommendations_table(
    catalogue: Catalogue | None,
    users: pa.Array,
    item_ids: np.ndarray,
    scores: np.ndarray,
    columns: Sequence[str] = (),
) -> pa.Table:
    """Recommendations as a table with a row for each user and rank.

    Args:
        catalogue: maps item ids to raw ids; None keeps item ids.
        users: (users,) raw ids.
        item_ids, scores: (users, top_k).
        columns: columns of the catalogue to add.

    Returns:
        A table with the columns user_id, rank, item_id, score and `columns`.
    """
    num_users, top_k = item_ids.shape
    flat = item_ids.reshape(-1)
    table = pa.table(
        [
            users.take(pa.array(np.repeat(np.arange(num_users), top_k))),
            pa.array(np.tile(np.arange(1, top_k + 1, dtype=np.int32), num_users)),
            pa.array(flat) if catalogue is None else catalogue.take(flat, ["raw_id"])["raw_id"],
            pa.array(scores.reshape(-1)),
        ],
        names=ANSWER_COLUMNS,
    )
    if columns:
        assert catalogue is not None  # see `Request.check`
        added = catalogue.take(flat, list(columns))
        for name in added.column_names:
            table = table.append_column(name, added[name])
    return table


class _Job:
    """The output of a call and its parts.

    Args:
        output: the file.
        settings: everything that determines its content, in JSON types.
        num_parts: the number of parts.
    """

    def __init__(self, output: Path, settings: dict, num_parts: int):
        self.output, self.folder = output, _parts_folder(output)
        self.settings, self.num_parts = settings, num_parts

    def start(self) -> bool:
        """Prepare the folder of parts for this call, and return whether the output is finished already.

        All processes call it, and the main process does the work.

        Raises:
            ValueError: for an output that something else wrote.
        """
        found: bool | ValueError | OSError | None = None
        if process_state().is_main_process:
            try:
                found = self._start()
            except (ValueError, OSError) as error:
                found = error
        [verdict] = broadcast_object_list([found])
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def _start(self) -> bool:
        if self.output.exists() and written_settings(self.output) == self.settings:
            shutil.rmtree(self.folder)  # left over if a run was killed at its very end
            return True
        remove_unfinished(self.folder)
        remove_unfinished(self.output.parent, self.output.stem)
        path = self.folder / SETTINGS_FILE
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            if before == self.settings:
                return False
            changed = sorted(
                name for name in before.keys() | self.settings.keys() if before.get(name) != self.settings.get(name)
            )
            parts = list(self.folder.glob("part-*.parquet"))
            logger.warning(
                "%s has %d parts of a run that differs in %s: deleting them",
                self.folder,
                len(parts),
                ", ".join(changed),
            )
            for part in parts:
                part.unlink()
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        return False

    def part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def missing(self) -> list[int]:
        """The numbers of the parts that do not exist yet."""
        return [number for number in range(self.num_parts) if not self.part(number).exists()]

    def write(self, number: int, table: pa.Table) -> None:
        with written_whole(self.part(number)) as unfinished:
            pq.write_table(table, unfinished)

    def wait(self) -> None:
        """Wait until all processes have written their parts.

        Raises:
            TimeoutError: when no process has written a part for two hours.
        """
        found, since = self.num_parts, time.monotonic()
        while missing := self.missing():
            if len(missing) < found:
                found, since = len(missing), time.monotonic()
            elif time.monotonic() - since > _SECONDS_WITHOUT_A_PART:
                raise TimeoutError(
                    f"{len(missing)} parts are missing in {self.folder}, {self.part(missing[0]).name} first, and no "
                    "process has written one for two hours: a process has probably stopped; run the same command "
                    "again, which computes only the missing parts"
                )
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def finish(self) -> None:
        """Merge the parts into the output, one at a time, and delete them."""
        metadata = {_SETTINGS_KEY: json.dumps(self.settings)}
        with written_whole(self.output) as unfinished:
            schema = pq.read_schema(self.part(0)).with_metadata(metadata)
            with pq.ParquetWriter(unfinished, schema) as writer:
                for number in range(self.num_parts):
                    with pq.ParquetFile(self.part(number)) as file:
                        writer.write_table(file.read().cast(schema))
        shutil.rmtree(self.folder)


def written_settings(path: Path) -> dict:
    """The settings of an output of `recommend_all`.

    Raises:
        ValueError: for any other file.
    """
    metadata = None
    if path.is_file():
        try:
            metadata = pq.read_schema(path).metadata
        except (OSError, pa.ArrowException):
            metadata = None
    if not metadata or _SETTINGS_KEY not in metadata:
        raise ValueError(
            f"{path} exists and recommend_all did not write it: choose another output, or delete the file, which would "
            "be replaced"
        )
    return json.loads(metadata[_SETTINGS_KEY])


def _parquet_path(output: str | os.PathLike) -> Path:
    """The path of the output, after a check that it is neither a folder nor named as another type of table."""
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"output {path} is a folder: expected a file, such as {path / 'recommendations.parquet'}")
    if file_type(path) not in ("", ".parquet"):
        raise ValueError(
            f"output is {path}: expected a parquet file, such as {path.with_suffix('.parquet')}; "
            "pandas.read_parquet reads it"
        )
    return path


def _parts_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.parts")


def _write_parts(
    job: _Job, request: Request, table: HistoryTable, shard_users: int, batch_size: int, num_users: int
) -> None:
    """Write the missing parts of this process, and show the progress and the time left."""
    state = process_state()
    mine = {number for number in job.missing() if number % state.num_processes == state.process_index}
    if not mine:
        return
    total = sum(min(shard_users, num_users - number * shard_users) for number in mine)
    logger.info("%d of %d users are left for this process, in %d parts", total, num_users, len(mine))
    begin = time.monotonic()
    # Refresh a terminal every 0.1 s, but do not flood a log file.
    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_REPORTS
    bar = {"unit": " users", "mininterval": interval, "disable": not state.is_main_process}
    with tqdm(total=total, desc="recommending", **bar) as progress:
        for number, shard in enumerate(table.shards(shard_users)):
            if number in mine:
                job.write(number, request.answer(shard, number * shard_users, batch_size, progress))
    seconds = time.monotonic() - begin
    logger.info("recommended to %d users in %.1f s: %.4g users per second", total, seconds, total / seconds)


def _sizes(asked: AskedRecommender, batch_size: int | None, shard_users: int | None) -> tuple[int, int]:
    batch_size = asked.batch_size if batch_size is None else batch_size
    shard_users = _BATCHES_PER_SHARD * batch_size if shard_users is None else shard_users
    for name, value in (("batch_size", batch_size), ("shard_users", shard_users)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value}: expected at least 1")
    return batch_size, shard_users


__all__ = ["ANSWER_COLUMNS", "check_columns", "recommend_all", "recommendations_table"]
