"""Builds sequence data sets: sorts interactions into histories, filters them, and splits them by a protocol."""

import itertools
import logging
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from hf_ilora.models.next_item.catalogue import Catalogue

from .candidates import sample_candidates
from .columns import list_array, slice_indices
from .histories import Histories, build_histories
from .input_tables import read_interactions, read_items
from .protocol_settings import IN_MEMORY, LEAKS, PROTOCOLS, Moment, checked_protocol
from .protocols import Rows, check_splits, limit_histories, split_histories
from .schema import split_features
from .sequences import SequenceDatasets
from .sources import DataSource
from .storage import SPLITS
from .workspace import Workspace

logger = logging.getLogger(__name__)

# Bounds the memory for gathering histories, beyond that of the result.
_ELEMENTS_PER_CHUNK = 1 << 22
# Peak memory per interaction, measured with 20 million of them by benchmarks/data.py.
_BYTES_IN_MEMORY = 100


def build_sequences(
    interactions: Dataset,
    items: Dataset,
    protocol: str = "leave_one_out",
    *,
    min_user_interactions: int | None = None,
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
    num_targets: int | None = None,
    test_share: float | None = None,
    validation_start: Moment | None = None,
    test_start: Moment | None = None,
    num_folds: int | None = None,
    fold: int | None = None,
    split_seed: int | None = None,
    work_dir: str | os.PathLike | None = None,
) -> SequenceDatasets:
    """Sort interactions into histories, filter them, and split them by a protocol.

    Histories are chronological. Interactions of a user with the same timestamp stay in input order: the row that comes
    first in `interactions` counts as older. (44% of the users of ML-100K have validation and test items with the same
    timestamp, so the input order decides which one is tested.) Nothing else depends on the order of the rows.

    Protocols:
        "leave_one_out": every user is in every split. The last item is the test target, with all items before it as
            history; the item before it is the validation target. The train row consists of the remaining items, with
            the last of them as its target; users with only one remaining item have no train row. Histories are whole
            unless `max_history` is given.
        "temporal_users": the first 80% of the users in time train, the next 10% validate and the last 10% test
            (boundaries rounded down). Validation and test have one row per user, with the last interaction as target;
            train has a row for every interaction. Histories are windows of the newest 10 items; rows with fewer than
            3 are dropped. `min_rating=3` gives the published MovieLens-100K splits.
        "cold_items": as "leave_one_out", for items that training never sees. A random share of the items is cold. Train
            rows are those of leave_one_out without cold items, with the last remaining item as target; users with
            fewer than two remaining items have no train row. The catalogue and the validation and test rows are those
            of leave_one_out, with cold items in histories and as targets. Training sees the titles of cold items, but
            no interaction with them. Some knowledge of them remains: the filters counted their interactions, histories
            close the gaps they leave, and validation, which chooses settings, has the same cold items as test. Cold
            items are drawn from all items, not from the newest, so similar items may be newer. Items with `count` 0 in
            the catalogue never occur in training: cold items, and items that are only targets of validation and test.
        "last_n": as "leave_one_out", with the last `num_targets` items of every user as `relevant_items` of test, and
            as many before them as those of validation.
        "global_time": two moments divide the interactions of all users. Interactions before `validation_start` train.
            The validation window begins at `validation_start`, the test window at `test_start`. A user with items
            before a window and in it has a row for it: the items in it are `relevant_items`, and all items before it
            are the history. Without moments, the newest `test_share` of the interactions is the test window, and as
            many before it are the validation window.
        "time_folds": k-fold in time. `num_folds` test windows of `test_share` of the interactions lie at the end of the
            data, and one more window before them. Fold f tests on the f-th test window, validates on the window before
            it and trains on what is older; newer interactions are left out. Each fold is a separate data set, and all
            folds have the same catalogue.
        "random": a random `test_share` of every user's items (at least one) are `relevant_items` of test, and as many
            others are those of validation. Histories are the remaining items in chronological order; those of test
            also contain the validation items. A target need not be the next item: the history may continue after it.

    `LEAKS` says for each protocol what training knows of the future or of other users; it is also logged. Under
    "leave_one_out" and "last_n", training has interactions of other users that are newer than a user's targets.
    "temporal_users" limits that, "global_time" and "time_folds" avoid it, and under "random" training even has later
    interactions of the same user. Under all protocols, filters count the interactions of all splits, and the catalogue
    includes items that occur only after training (with `count` 0).

    Args:
        interactions: one row per interaction, with the columns `user_id` and `item_id` (raw ids, integer or string),
            `timestamp` (seconds, not negative) and, for `min_rating`, `rating`; other columns are ignored.
        items: one row per item, with the columns `item_id` (raw, unique, every item of `interactions`), `title`, `year`
            (may be null) and `genres`; others, such as price and url, become further columns of the catalogue.
        protocol: one of the above.
        min_user_interactions, min_item_interactions: drop users and items with fewer interactions, repeatedly, until
            all that remain have enough (k-core). Repeated interactions count. None: 3 for users, or as many as last_n
            needs.
        max_history: number of newest items to keep in a history; None: 10 for temporal_users, all for the others.
        min_history: drop rows with a shorter history; None: 3 for temporal_users, 1 for the others.
        num_candidates: items per row in `candidates` of validation and test: the target, and items that the user never
            interacted with in any split. 0 leaves the column out.
        candidate_seed: random seed of the candidates. Those of a row depend only on the seed, the split, the user, the
            items of that user and the size of the catalogue.
        drop_repeats: keep only the first interaction of a user with an item. By default repeats stay, and the history
            may contain the target.
        min_rating: ignore interactions with a lower `rating`, even when drawing candidates.
        order_users_by: temporal_users only: order users by their "first" or their "last" interaction; None: "first", as
            in LLaRA's MovieLens splits. With "first", training users may still interact after test users have started;
            with "last", no training target is newer than a test target. Ties are ordered by raw user id.
        cold_share: cold_items only: share of the items to remove from training; None: 0.1.
        cold_seed: cold_items only: random seed of their draw; None: 0.
        num_targets: last_n only: items of a user in test, and in validation; None: 5.
        test_share: global_time, time_folds and random only: share of the interactions in test, and in validation; None:
            0.1. An interaction at the border of two windows belongs to the newer one.
        validation_start, test_start: global_time only, instead of `test_share`: seconds since 1970, an ISO 8601 text
            such as "2018-01-31" (UTC), or a datetime.
        num_folds: time_folds only; None: 3.
        fold: time_folds only, required: which fold, 1 (the oldest) to `num_folds`.
        split_seed: random only: random seed of the draw; None: 0.
        work_dir: folder for data that do not fit in memory. Columns and splits are then memory-mapped files in this
            folder; only the ids and counts of users and items, and a row per user, stay in memory. The result is the
            same. It reads these files, so save it before you delete the folder. None: keep everything in memory.

    Returns:
        SequenceDatasets. The catalogue contains the items of the filtered interactions, numbered from 1 in the order of
        their raw ids (numeric for integers, by code point for strings).

    Raises:
        TypeError: an argument or a column has the wrong type.
        ValueError: the protocol is unknown or contradicts other settings; a column is missing; a table is empty; values
            are null or negative; items are repeated in `items` or missing from it; the filters leave a split empty; a
            user has too few unseen items for `num_candidates`; or the protocol needs real times and these are positions
            in a history.

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
        num_targets=num_targets,
        test_share=test_share,
        validation_start=validation_start,
        test_start=test_start,
        num_folds=num_folds,
        fold=fold,
        split_seed=split_seed,
    )
    for name, table in (("interactions", interactions), ("items", items)):
        if not isinstance(table, Dataset):
            raise TypeError(
                f"{name} is a {type(table).__name__}: expected a datasets.Dataset; load_interactions and "
                "load_movielens return both tables"
            )
    if work_dir is not None and protocol in IN_MEMORY:
        raise ValueError(
            f"work_dir is given for the protocol {protocol}, which divides all interactions at once, in memory: "
            f"expected one of {', '.join(name for name in PROTOCOLS if name not in IN_MEMORY)}; or leave work_dir out, "
            f"with about {_BYTES_IN_MEMORY} bytes of memory for each of the {len(interactions):,} interactions"
        )
    workspace = Workspace(work_dir)
    coded = read_interactions(interactions, min_rating, workspace)
    known_items = read_items(items, coded.item_ids)
    histories, times = build_histories(
        coded, settings["min_user_interactions"], min_item_interactions, drop_repeats, workspace
    )
    del coded
    splits, histories_of = split_histories(histories, times, settings)
    del times
    splits = {
        name: limit_histories(rows, settings["max_history"], settings["min_history"]) for name, rows in splits.items()
    }
    logger.info(
        "%s: %d users, %d items; rows: %s",
        *(protocol, len(histories.user_ids), len(histories.item_ids)),
        ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()),
    )
    logger.info("leak of %s: %s", protocol, LEAKS[protocol])
    check_splits(splits, settings)
    datasets = {}
    for name in SPLITS:
        rows, candidates = splits.pop(name), None
        if name != "train" and num_candidates > 0:
            candidates = sample_candidates(histories_of[name], rows, num_candidates, candidate_seed, name)
        datasets[name] = _split_dataset(histories_of[name], rows, candidates, name, workspace)
    catalogue = _catalogue(known_items, histories.item_ids)
    return SequenceDatasets(datasets, catalogue, settings, DataSource.of(interactions, items))


def _split_dataset(
    histories: Histories, rows: Rows, candidates: np.ndarray | None, name: str, workspace: Workspace
) -> Dataset:
    features = split_features(str(histories.user_ids.type), candidates is not None, rows.relevant_ends is not None)
    return workspace.dataset(_split_batches(histories, rows, candidates, features), features, name)


def _split_batches(
    histories: Histories, rows: Rows, candidates: np.ndarray | None, features: Features
) -> Iterator[pa.RecordBatch]:
    elements = np.cumsum(rows.ends - rows.starts)
    cuts = np.searchsorted(elements, np.arange(_ELEMENTS_PER_CHUNK, elements[-1], _ELEMENTS_PER_CHUNK), side="right")
    for first, last in itertools.pairwise(np.unique([0, *cuts, len(rows)])):
        starts, ends = rows.starts[first:last], rows.ends[first:last]
        columns = [
            histories.user_ids.take(pa.array(rows.users[first:last])),
            list_array(histories.items[slice_indices(starts, ends)], ends - starts),
            pa.array(histories.items[ends]),
        ]
        if rows.relevant_ends is not None:
            columns.append(_different_items(histories.items, ends, rows.relevant_ends[first:last]))
        if candidates is not None:
            block = candidates[first:last]
            columns.append(list_array(block.ravel(), np.full(len(block), block.shape[1])))
        yield pa.record_batch(columns, schema=features.arrow_schema)


def _different_items(items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> pa.ListArray:
    """The distinct items of each slice, in order of first appearance."""
    relevant = items[slice_indices(starts, ends)]
    rows = np.repeat(np.arange(len(starts)), ends - starts)
    first = np.sort(np.unique(rows * (np.int64(relevant.max()) + 1) + relevant, return_index=True)[1])
    return list_array(relevant[first], np.bincount(rows[first], minlength=len(starts)))


def _catalogue(known_items: pa.Table, item_ids: pa.Array) -> Catalogue:
    rows = known_items.take(pc.index_in(item_ids, value_set=known_items["item_id"]))
    rows = rows.rename_columns({"item_id": "raw_id"})
    if "count" in rows.column_names or rows.column_names.count("raw_id") > 1:
        raise ValueError(
            f"items has the columns {', '.join(known_items.column_names)}: raw_id and count are columns of the "
            "catalogue itself; rename or drop them"
        )
    return Catalogue(rows.add_column(0, "item_id", pa.array(np.arange(1, len(rows) + 1))))


__all__ = ["build_sequences"]
