"""Sequence data sets: chronological histories, split by a named protocol, with the catalogue of their items."""

import itertools
import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, DatasetInfo, Features, List, NamedSplit, Value
from datasets.table import InMemoryTable

from hf_ilora.files import folder_written_whole
from hf_ilora.models.next_item.catalogue import Catalogue

from .candidates import sample_candidates
from .columns import training_counts
from .filters import Histories, build_histories, read_interactions, read_items, slice_indices
from .protocols import (
    PROTOCOLS,
    USER_ORDERS,
    Rows,
    draw_cold_items,
    leave_one_out,
    limit_histories,
    temporal_users,
    without_cold_items,
)
from .seeds import check_seed
from .storage import (
    CATALOGUE_FILE,
    DESCRIPTION_FILE,
    FILES,
    REMEDY,
    SPLITS,
    content_digest,
    json_digest,
    read_description,
    read_parquet,
    write_description,
    write_parquet,
)

logger = logging.getLogger(__name__)

# Bounds the memory for gathering histories, in addition to that of the result.
_ELEMENTS_PER_CHUNK = 1 << 22


class SequenceDatasets(DatasetDict):
    """The splits train, validation and test of one protocol, with the catalogue that explains their item ids.

    Every split has the columns `user_id` (raw), `history` (list of int32 item ids, oldest first) and `target` (int32);
    validation and test also have `candidates` (list of int32) unless they were switched off. Rows are in the order of
    the raw user ids, and in time within a user. Item ids run 1..num_items; 0 is padding and never occurs.

    Methods that `DatasetDict` brings, such as `map` and `filter`, return a plain `DatasetDict`.

    Args:
        splits: a Dataset for each of "train", "validation" and "test".
        catalogue: titles and raw ids of the items, with `year` (may be null) and `genres`. The data set has it with
            `count`, the occurrences of each item in the train split, 0 for items that training never sees.
        protocol: the settings that made the splits, JSON types only; `protocol["name"]` is the name.
    """

    def __init__(self, splits: dict[str, Dataset], catalogue: Catalogue, protocol: dict):
        if not isinstance(catalogue, Catalogue):
            raise TypeError(
                f"catalogue is a {type(catalogue).__name__}: expected a Catalogue, made of a pyarrow.Table of the items"
            )
        missing = [name for name in catalogue_features("int64") if name not in catalogue.table.column_names]
        if missing:
            raise ValueError(f"the catalogue has no {', '.join(missing)}: expected the column, empty where unknown")
        if set(splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(sorted(splits)) or 'none'}: expected {', '.join(SPLITS)}")
        super().__init__({name: splits[name] for name in SPLITS})
        self.catalogue = catalogue.with_counts(training_counts(splits["train"], len(catalogue)))
        self.protocol = protocol

    @property
    def num_items(self) -> int:
        """Items in the catalogue, which is the largest item id."""
        return len(self.catalogue)

    @property
    def raw_ids(self) -> np.ndarray:
        """(num_items,) raw ids in the order of item ids."""
        return self.catalogue.table["raw_id"].to_numpy()

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the protocol, the catalogue and all rows in order.

        It depends on values alone: every machine and every chunking gives the same. Each access reads the present
        content, about a second for 20 million interactions.
        """
        digests = {name: content_digest(dataset) for name, dataset in self.items()}
        catalogue_digest = content_digest(self._stored_items())
        return json_digest({"protocol": self.protocol, "catalogue": catalogue_digest, "splits": digests})

    def save(self, directory: str | os.PathLike) -> None:
        """Write train, validation, test and items as parquet, and sequences.json, to `directory`.

        The folder is written whole or not at all: if the save fails or is killed, an earlier output stays as it is.

        Raises:
            ValueError: when `directory` is a file or contains files that no earlier save wrote, because they would be
                deleted.
        """
        with folder_written_whole(directory, replaceable_files=FILES) as folder:
            for name, dataset in self.items():
                write_parquet(dataset, folder / f"{name}.parquet")
            table = self._stored_items()
            features = catalogue_features(_raw_id_type(table, "raw_id"))
            write_parquet(dataset_of(table, features, "catalogue"), folder / CATALOGUE_FILE)
            counts = {name: len(dataset) for name, dataset in self.items()}
            write_description(folder, self.protocol, self.num_items, counts, self.fingerprint)

    def _stored_items(self) -> pa.Table:
        """The catalogue without what the splits say."""
        return self.catalogue.table.drop_columns("count")

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "SequenceDatasets":
        """Read what `save` wrote, and check that it is complete.

        The tables are read into memory: ML-20M takes about 0.3 GB under leave_one_out and 1.1 GB under temporal_users.
        (Memory-mapping would need an Arrow copy of every parquet file in a cache folder that is never emptied.)

        Raises:
            FileNotFoundError: when `directory`, or a file in it, is missing.
            ValueError: for files that are damaged, of another version, or do not belong together.
        """
        directory = Path(directory)
        description = read_description(directory)
        protocol, num_items = description["protocol"], description["num_items"]

        path = directory / CATALOGUE_FILE
        table = read_parquet(path, num_items)
        features = catalogue_features(_raw_id_type(table, "raw_id"))
        _check_columns(table, features, path)
        if not np.array_equal(table["item_id"].to_numpy(), np.arange(1, num_items + 1)):
            raise ValueError(
                f"{path} has {len(table)} items: expected the item ids 1 to {num_items} in order, the num_items of "
                f"{DESCRIPTION_FILE}; {REMEDY}"
            )
        try:
            catalogue = Catalogue(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}") from error
        splits = {}
        for name in SPLITS:
            path, rows = directory / f"{name}.parquet", description["counts"][name]
            table = read_parquet(path, rows)
            with_candidates = name != "train" and protocol["num_candidates"] > 0
            features = split_features(_raw_id_type(table, "user_id"), with_candidates)
            _check_columns(table, features, path)
            _check_item_ids(table, num_items, path)
            splits[name] = dataset_of(table, features, name)
        loaded = cls(splits, catalogue, protocol)
        fingerprint = loaded.fingerprint
        if fingerprint != description["fingerprint"]:
            raise ValueError(
                f"the files in {directory} have the fingerprint {fingerprint}: expected {description['fingerprint']}, "
                f"as {DESCRIPTION_FILE} says; a file was changed or comes from another save: {REMEDY}"
            )
        return loaded


def build_sequences(
    interactions: Dataset,
    items: Dataset,
    protocol: str = "leave_one_out",
    *,
    min_user_interactions: int = 3,
    min_item_interactions: int = 1,
    max_history: int | None = None,
    min_history: int | None = None,
    num_candidates: int = 20,
    candidate_seed: int = 0,
    drop_repeats: bool = False,
    min_rating: float | None = None,
    order_users_by: str | None = None,
    cold_share: float | None = None,
    cold_seed: int | None = None,
) -> SequenceDatasets:
    """Sort interactions into histories, filter them, and split them by a protocol.

    Histories are chronological. Interactions of a user with the same timestamp stay in input order: the row that comes
    first in `interactions` is the older one. (44% of the users of ML-100K have validation and test items with the same
    timestamp, so the input order determines what is tested.) Nothing else depends on the order of the rows.

    Protocols:
        "leave_one_out": every user is in every split. The last item is the test target, with all items before it as
            history; the item before it is the validation target. The train row consists of the remaining items, with
            the last of them as its target; users with only one remaining item have no train row. Histories are whole
            unless `max_history` is given.
        "temporal_users": the first 80% of the users in time train, the next 10% validate and the last 10% test
            (boundaries rounded down). Validation and test have one row per user, with the last interaction as target;
            train has a row for every interaction. Histories are windows of the newest 10 items; rows with fewer than
            3 are dropped. The published MovieLens-100K splits come from `min_rating=3`.
        "cold_items": "leave_one_out" for items that training has never seen. A share of the items, drawn at random, is
            cold: training rows are those of leave_one_out without them, as if nobody had bought them, with the last
            remaining item as target; users with fewer than two remaining items have no train row. The catalogue and the
            validation and test rows stay those of leave_one_out, with cold items in histories and as targets. So no
            interaction with a cold item reaches training, but their titles do, and three things tell of them: the
            filters counted their interactions, histories close up where they were, and validation, by which settings
            are chosen, has the same cold items as test. They are drawn from all items, not from the newest ones, so
            similar items may be newer than they are. Items with `count` 0 in the catalogue never occur in training: the
            cold ones, and those that occur as targets of validation and test only.

    Args:
        interactions: one row per interaction: `user_id` and `item_id` (raw ids, integer or string), `timestamp`
            (seconds, not negative) and, for `min_rating`, `rating`; other columns are not read.
        items: columns `item_id` (raw, unique, every item of `interactions`), `title`, `year` (may be null), `genres`.
        protocol: "leave_one_out", "temporal_users" or "cold_items".
        min_user_interactions, min_item_interactions: users and items with fewer interactions are dropped, repeatedly,
            until none is left (k-core). Repeated interactions count.
        max_history: number of newest items to keep in a history; None: 10 for temporal_users, all for the others.
        min_history: rows with a shorter history are dropped; None: 3 for temporal_users, 1 for the others.
        num_candidates: items per row in `candidates` of validation and test, including the target; the others are items
            that the user never interacted with, in any split. 0 leaves the column out.
        candidate_seed: random seed of the candidates. Those of a row depend only on the seed, the split, the user, the
            items of that user and the size of the catalogue.
        drop_repeats: keep only the first interaction of a user with an item. By default repeats stay, and a target may
            also be in its history.
        min_rating: interactions with a lower `rating` are ignored, as if they were absent, for candidates too.
        order_users_by: temporal_users only: order users by their "first" or their "last" interaction; None: "first", as
            in LLaRA's MovieLens splits. With "first", a training user may still interact after test users have started;
            with "last", no training target is newer than a test target. Ties are ordered by raw user id.
        cold_share: cold_items only: share of the items to take out of training; None: 0.1.
        cold_seed: cold_items only: random seed of their draw; None: 0.

    Returns:
        SequenceDatasets. The catalogue contains the items of the filtered interactions, numbered from 1 in the order of
        their raw ids (numeric for integers, by code point for strings).

    Raises:
        TypeError: for arguments or columns of the wrong type.
        ValueError: for an unknown protocol, settings that contradict it, missing columns, empty tables, null or
            negative values, items that are repeated in or missing from `items`, filters that leave a split empty, and
            users with too few unseen items for `num_candidates`.

    Source: leave_one_out: SASRec (ICDM 2018), section IV. temporal_users: LLaRA (SIGIR 2024), its released data.
    """
    settings = checked_protocol(
        protocol,
        min_user_interactions=min_user_interactions,
        min_item_interactions=min_item_interactions,
        max_history=max_history,
        min_history=min_history,
        num_candidates=num_candidates,
        candidate_seed=candidate_seed,
        drop_repeats=drop_repeats,
        min_rating=min_rating,
        order_users_by=order_users_by,
        cold_share=cold_share,
        cold_seed=cold_seed,
    )
    for name, table in (("interactions", interactions), ("items", items)):
        if not isinstance(table, Dataset):
            raise TypeError(
                f"{name} is a {type(table).__name__}: expected a datasets.Dataset; load_interactions and "
                "load_movielens return both tables"
            )
    coded = read_interactions(interactions, min_rating)
    known_items = read_items(items, coded.item_ids)
    histories = build_histories(coded, min_user_interactions, min_item_interactions, drop_repeats)
    del coded
    histories_of = dict.fromkeys(SPLITS, histories)
    if protocol == "temporal_users":
        splits = temporal_users(histories, settings["order_users_by"])
    else:
        splits = leave_one_out(histories)
    if protocol == "cold_items":
        is_cold = draw_cold_items(len(histories.item_ids), settings["cold_share"], settings["cold_seed"])
        histories_of["train"] = warm = without_cold_items(histories, is_cold)
        splits["train"] = Rows(splits["train"].users, warm.boundaries[:-1], warm.boundaries[1:] - 1)
    splits = {
        name: limit_histories(rows, settings["max_history"], settings["min_history"]) for name, rows in splits.items()
    }
    logger.info(
        "%s: %d users, %d items; rows: %s",
        *(protocol, len(histories.user_ids), len(histories.item_ids)),
        ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()),
    )
    _check_splits(splits, len(histories.user_ids), settings)
    datasets = {}
    for name in SPLITS:
        rows, candidates = splits.pop(name), None
        if name != "train" and num_candidates > 0:
            candidates = sample_candidates(histories, rows, num_candidates, candidate_seed, name)
        datasets[name] = _split_dataset(histories_of[name], rows, candidates, name)
    return SequenceDatasets(datasets, _catalogue(known_items, histories.item_ids), settings)


def checked_protocol(protocol: str, **settings) -> dict:
    """The settings of `build_sequences` as they are saved: checked, with the protocol's defaults in place of None.

    Raises:
        TypeError, ValueError: as `build_sequences`, for settings that no data could meet.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    temporal = protocol == "temporal_users"
    if settings["max_history"] is None and temporal:
        settings["max_history"] = 10
    if settings["min_history"] is None:
        settings["min_history"] = 3 if temporal else 1
    _check_integers(settings)
    if settings["max_history"] is not None and settings["max_history"] < settings["min_history"]:
        raise ValueError(
            f"max_history={settings['max_history']} is below min_history={settings['min_history']}: expected a window "
            "that holds the shortest history"
        )
    if not isinstance(settings["drop_repeats"], bool):
        raise TypeError(f"drop_repeats is {settings['drop_repeats']!r}: expected True or False")
    rating = settings["min_rating"]
    if rating is not None:
        if isinstance(rating, bool) or not isinstance(rating, int | float) or rating != rating:
            raise TypeError(f"min_rating is {rating!r}: expected a number or None")
        settings["min_rating"] = float(rating)  # 3 and 3.0 are one setting, with one fingerprint
    if temporal:
        if settings["order_users_by"] is None:
            settings["order_users_by"] = "first"
        if settings["order_users_by"] not in USER_ORDERS:
            raise ValueError(
                f"order_users_by is {settings['order_users_by']!r}: expected one of {', '.join(USER_ORDERS)}"
            )
    elif settings["order_users_by"] is not None:
        raise ValueError(f"order_users_by applies to temporal_users only: leave it out for {protocol}")
    if not temporal and settings["min_user_interactions"] < 3:
        raise ValueError(
            f"min_user_interactions is {settings['min_user_interactions']}: {protocol} needs 3 or more, because "
            "every user has a test target, a validation target and at least one item before them"
        )
    _check_cold(protocol, settings)
    return {"name": protocol, **settings}


def _check_cold(protocol: str, settings: dict) -> None:
    """Check the settings of cold items and fill in their defaults; other protocols do without them."""
    if protocol != "cold_items":
        for name in ("cold_share", "cold_seed"):
            if settings.pop(name) is not None:
                raise ValueError(f"{name} applies to cold_items only: leave it out for {protocol}")
        return
    if settings["cold_share"] is None:
        settings["cold_share"] = 0.1
    if settings["cold_seed"] is None:
        settings["cold_seed"] = 0
    share, seed = settings["cold_share"], settings["cold_seed"]
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"cold_share is {share!r}: expected a number")
    if not 0 < share < 1:
        raise ValueError(f"cold_share is {share}: expected a share of the items, above 0 and below 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"cold_seed is {seed!r}: expected an integer")
    check_seed("cold_seed", seed)


def _check_integers(settings: dict) -> None:
    least = {
        "min_user_interactions": 1,
        "min_item_interactions": 1,
        "min_history": 1,
        "num_candidates": 0,
        "candidate_seed": None,
    }
    if settings["max_history"] is not None:
        least["max_history"] = 1
    for name, lowest in least.items():
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}: expected an integer")
        if lowest is not None and value < lowest:
            raise ValueError(f"{name} is {value}: expected {lowest} or more")
    if settings["num_candidates"] == 1:
        raise ValueError("num_candidates is 1, the target alone: expected 2 or more, or 0 to leave candidates out")


def _check_splits(splits: dict[str, Rows], num_users: int, settings: dict) -> None:
    if settings["name"] == "temporal_users" and num_users < 10:
        raise ValueError(
            f"temporal_users divides {num_users} users: expected at least 10, for 80%, 10% and 10% of them; use more "
            "data or loosen the filters"
        )
    for name, rows in splits.items():
        if len(rows) == 0:
            # The history is followed by the target and, in leave_one_out, by the targets of the later splits.
            needed = settings["min_history"] + 1
            if settings["name"] != "temporal_users":
                needed += {"train": 2, "validation": 1, "test": 0}[name]
            raise ValueError(
                f"the {name} split is empty: with min_history={settings['min_history']}, {settings['name']} expects "
                f"users with at least {needed} interactions there, and none of its users has; use more data, loosen "
                "the filters or lower min_history"
            )


def _split_dataset(histories: Histories, rows: Rows, candidates: np.ndarray | None, name: str) -> Dataset:
    features = split_features(str(histories.user_ids.type), candidates is not None)
    elements = np.cumsum(rows.ends - rows.starts)
    cuts = np.searchsorted(elements, np.arange(_ELEMENTS_PER_CHUNK, elements[-1], _ELEMENTS_PER_CHUNK), side="right")
    batches = []
    for first, last in itertools.pairwise(np.unique([0, *cuts, len(rows)])):
        starts, ends = rows.starts[first:last], rows.ends[first:last]
        columns = [
            histories.user_ids.take(pa.array(rows.users[first:last])),
            _list_array(histories.items[slice_indices(starts, ends)], ends - starts),
            pa.array(histories.items[ends]),
        ]
        if candidates is not None:
            block = candidates[first:last]
            columns.append(_list_array(block.ravel(), np.full(len(block), block.shape[1])))
        batches.append(pa.record_batch(columns, schema=features.arrow_schema))
    return dataset_of(pa.Table.from_batches(batches), features, name)


def _list_array(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _catalogue(known_items: pa.Table, item_ids: pa.Array) -> Catalogue:
    rows = known_items.take(pc.index_in(item_ids, value_set=known_items["item_id"]))
    rows = rows.rename_columns(["raw_id", "title", "year", "genres"])
    return Catalogue(rows.add_column(0, "item_id", pa.array(np.arange(1, len(rows) + 1))))


def split_features(user_id_type: str, with_candidates: bool) -> Features:
    columns = {"user_id": Value(user_id_type), "history": List(Value("int32")), "target": Value("int32")}
    if with_candidates:
        columns["candidates"] = List(Value("int32"))
    return Features(columns)


def catalogue_features(raw_id_type: str) -> Features:
    return Features(
        {
            "item_id": Value("int64"),
            "raw_id": Value(raw_id_type),
            "title": Value("string"),
            "year": Value("int32"),
            "genres": List(Value("string")),
        }
    )


def dataset_of(table: pa.Table, features: Features, name: str) -> Dataset:
    # Without a fingerprint of its own, Dataset would pickle and hash the whole table.
    return Dataset(
        InMemoryTable(table),
        info=DatasetInfo(features=features),
        split=NamedSplit(name),
        fingerprint=content_digest(table)[:16],
    )


def _raw_id_type(table: pa.Table, column: str) -> str:
    """The type of a raw id column that was read; int64 when there is none, for the comparison of columns to report."""
    is_string = column in table.column_names and pa.types.is_string(table.schema.field(column).type)
    return "string" if is_string else "int64"


def _check_columns(table: pa.Table, features: Features, path: Path) -> None:
    """Names, types, and that only years are null."""
    schema = features.arrow_schema
    if table.schema.names != schema.names or table.schema.types != schema.types:
        found, expected = (
            ", ".join(f"{field.name}: {field.type}" for field in each) for each in (table.schema, schema)
        )
        raise ValueError(f"{path} has the columns {found}: expected {expected}; {REMEDY}")
    for name in table.column_names:
        chunks = table[name].chunks
        nulls = sum(chunk.null_count + (chunk.values.null_count if _is_list(chunk) else 0) for chunk in chunks)
        if nulls and name != "year":
            raise ValueError(f"{path} has {nulls} null values in {name}: expected none; {REMEDY}")


def _check_item_ids(table: pa.Table, num_items: int, path: Path) -> None:
    for name in table.column_names[1:]:  # behind user_id
        for chunk in filter(len, table[name].chunks):
            bounds = pc.min_max(chunk.flatten() if _is_list(chunk) else chunk)
            lowest, highest = bounds["min"].as_py(), bounds["max"].as_py()
            if lowest is None or lowest < 1 or highest > num_items:
                raise ValueError(
                    f"{path} has the values {lowest} to {highest} in {name}: expected item ids of the catalogue, 1 to "
                    f"{num_items}; {REMEDY}"
                )


def _is_list(chunk: pa.Array) -> bool:
    return pa.types.is_list(chunk.type)


__all__ = ["SequenceDatasets", "build_sequences", "checked_protocol"]
