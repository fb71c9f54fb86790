"""Reads the histories of many users, shard by shard, from tables with raw ids, data sets and rows of item ids."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from hf_ilora.data.columns import flatten_lists, read_column, slice_indices
from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.data.table_files import TableFiles
from hf_ilora.data.tables import TableSource, clean_ids, clean_seconds, describe, is_polars, read_columns
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

from .user_items import UserItems

UNKNOWN_ITEMS = ("raise", "skip")

_WHOLE_NUMBER = r"^-?\d{1,18}$"
_OTHER_LIST = r"^\[|\]$|,"


class HistoryTable:
    """Users with their histories, in the same order each time they are read.

    Args:
        pieces: returns an iterator over tables with the columns `user_id` and `history`, lists of ids.
        catalogue: maps raw ids to item ids; None if the lists contain item ids already.
        name: name of the table, for messages.
        unknown_items: "raise" for raw ids that the catalogue lacks, or "skip" to leave them out.
        has_raw_ids: whether filters for these users contain raw ids.
    """

    def __init__(
        self,
        pieces: Callable[[], Iterator[pa.Table]],
        catalogue: Catalogue | None,
        name: str,
        unknown_items: str,
        has_raw_ids: bool = True,
    ):
        self._pieces, self._catalogue = pieces, catalogue
        self.name, self._unknown_items, self.has_raw_ids = name, unknown_items, has_raw_ids

    def shards(self, num_users: int) -> Iterator[UserItems]:
        """The histories of `num_users` users at a time; the last shard may be smaller.

        Raises:
            ValueError: for columns of other types, missing user ids, and raw ids that the catalogue lacks.
        """
        for table in regrouped(self._pieces(), num_users):
            yield self._histories(table)

    def _histories(self, table: pa.Table) -> UserItems:
        users = clean_ids(table["user_id"], f"column user_id of {self.name}").combine_chunks()
        lists = table["history"].combine_chunks()
        written = None
        if pa.types.is_string(lists.type) or pa.types.is_large_string(lists.type):  # CSV has no lists
            written = lists
            text = pc.utf8_trim_whitespace(lists)
            lists = pc.ascii_split_whitespace(pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text))
        if pa.types.is_null(lists.type):
            lists = lists.cast(pa.list_(pa.int64()))
        is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
        if not is_list or pa.types.is_nested(lists.type.value_type):
            raise ValueError(
                f"column history of {self.name} has type {lists.type}: expected lists of ids, or text with blanks "
                "between them; for a table of interactions, pass item_column"
            )
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
        values = lists.flatten()
        if self._catalogue is None:
            items = values.to_numpy(zero_copy_only=False).astype(np.int32)
        else:
            items = item_ids_of(self._catalogue, values)
        unknown = items == 0
        if unknown.any():
            rows = np.repeat(np.arange(len(lengths)), lengths)
            if written is not None:
                self._check_blanks(written, values, unknown, rows, users)
            if self._unknown_items == "raise":
                place = int(unknown.argmax())
                raise_unknown(
                    self._catalogue, values[place].as_py(), f"user {users[int(rows[place])].as_py()!r} of {self.name}"
                )
            items = items[~unknown]
            lengths = lengths - np.bincount(rows[unknown], minlength=len(lengths))
        return UserItems(users, items, np.append(0, np.cumsum(lengths)))

    def _check_blanks(
        self, written: pa.Array, values: pa.Array, unknown: np.ndarray, rows: np.ndarray, users: pa.Array
    ) -> None:
        """Raise a ValueError for text such as [50, 172], of which `unknown_items="skip"` would leave nothing."""
        is_odd = pc.match_substring_regex(values, _OTHER_LIST).to_numpy(zero_copy_only=False)
        if (unknown & is_odd).any():
            row = int(rows[(unknown & is_odd).argmax()])
            raise ValueError(
                f"the history of user {users[row].as_py()!r} of {self.name} is {written[row].as_py()[:200]!r}: "
                "expected raw ids with blanks between them, such as '50 172'; parquet and JSON lines may have lists"
            )


def history_table(
    histories,
    catalogue: Catalogue | None,
    num_items: int,
    *,
    user_column: str = "user_id",
    history_column: str = "history",
    item_column: str | None = None,
    time_column: str | None = None,
    separator: str | None = None,
    unknown_items: str = "raise",
) -> HistoryTable:
    """Read the histories of a table, of all users of a data set, or of rows of item ids.

    Args:
        histories: a path to a table, a frame or a Dataset, with a row per user or, with `item_column`, per interaction;
            `SequenceDatasets`, whose histories contain all items of a user, targets included; or rows of item ids, as
            `recommend` takes them, whose row numbers become the user ids.
        catalogue: catalogue of the model; None if it has none.
        num_items: size of the model's catalogue.
        user_column, history_column: columns of a table with a row per user. Histories are lists of raw ids, oldest
            first; in CSV and TSV, text with blanks between the ids.
        item_column, time_column: columns of a table with a row per interaction; without a time column, the rows are
            taken to be in order.
        separator: separator of the columns in CSV or TSV.
        unknown_items: "raise" for raw ids that the catalogue lacks, or "skip" to leave them out.

    Raises:
        TypeError, ValueError, FileNotFoundError: for tables that cannot be read, and raw ids without a catalogue.
    """
    if unknown_items not in UNKNOWN_ITEMS:
        raise ValueError(f"unknown_items is {unknown_items!r}: expected one of {', '.join(UNKNOWN_ITEMS)}")
    if isinstance(histories, SequenceDatasets):
        table = every_user(histories)
        return HistoryTable(partial(iter, [table]), None, "the data set", unknown_items)
    if not is_table(histories):
        table = _rows_table(histories, num_items)
        return HistoryTable(partial(iter, [table]), None, "the histories", unknown_items, has_raw_ids=False)
    if catalogue is None:
        raise ValueError(
            f"{describe(histories)} has raw ids and the model has no catalogue, which maps them: assign "
            "model.catalogue, or pass rows of item ids"
        )
    if item_column is not None:
        table = _interactions(histories, user_column, item_column, time_column, separator, catalogue, unknown_items)
        return HistoryTable(partial(iter, [table]), None, describe(histories), unknown_items)
    if time_column is not None:
        raise ValueError(f"time_column is {time_column!r} without item_column: expected both, or a row per user")
    names = {"user_id": user_column, "history": history_column}
    if isinstance(histories, str | Path) and not TableFiles.at(histories, separator).is_delimited_text:
        pieces = partial(TableFiles.at(histories, separator).batches, names)
    else:
        table = _with_integer_users(*read_columns(histories, names, separator=separator))
        pieces = partial(iter, [table])
    return HistoryTable(pieces, catalogue, describe(histories), unknown_items)


def is_table(source) -> bool:
    """Whether histories or a filter are a table: a path to one, a frame or a Dataset."""
    return isinstance(source, str | Path | pd.DataFrame | Dataset) or is_polars(source)


def regrouped(pieces: Iterator[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Regroup the rows of some tables into tables of `num_rows` rows; the last one may be smaller."""
    held, missing = [], num_rows
    for piece in pieces:
        while piece.num_rows:
            part = piece.slice(0, missing)
            held.append(part)
            missing -= part.num_rows
            piece = piece.slice(part.num_rows)
            if not missing:
                yield pa.concat_tables(held, promote_options="permissive")
                held, missing = [], num_rows
    if held:
        yield pa.concat_tables(held, promote_options="permissive")


def item_ids_of(catalogue: Catalogue, raw_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(ids,) int32 item ids, 0 for raw ids that the catalogue lacks; a number and its digits are the same raw id."""
    known = catalogue.table["raw_id"]
    if pa.types.is_dictionary(raw_ids.type):
        raw_ids = raw_ids.cast(raw_ids.type.value_type)
    is_text = not (pa.types.is_integer(raw_ids.type) or pa.types.is_null(raw_ids.type))
    if is_text:
        raw_ids = pc.utf8_trim_whitespace(raw_ids.cast(pa.string()))
    if is_text and pa.types.is_integer(known.type):
        is_number = pc.match_substring_regex(raw_ids, _WHOLE_NUMBER)
        raw_ids = pc.if_else(is_number, raw_ids, pa.scalar(None, pa.string()))
    places = pc.index_in(raw_ids.cast(known.type), value_set=known)
    return pc.add(pc.fill_null(places, -1), 1).to_numpy().astype(np.int32)


def raise_unknown(catalogue: Catalogue, raw_id, where: str) -> None:
    """Raise the ValueError of `Catalogue.item_ids`, and say where the raw id was found."""
    try:
        catalogue.item_ids([raw_id])
    except ValueError as error:
        raise ValueError(f"{where}: {error}; unknown_items='skip' leaves such items of histories out") from error


def _with_integer_users(table: pa.Table, whole_numbers: set[str] | None) -> pa.Table:
    """The table, with integer user ids if they were read from a text file and are all whole numbers."""
    if whole_numbers is None or "user_id" not in whole_numbers:
        return table
    users = clean_ids(table["user_id"], "user_id", untyped=True).cast(pa.int64())
    return table.set_column(table.column_names.index("user_id"), "user_id", users)


def _interactions(
    source: TableSource,
    user_column: str,
    item_column: str,
    time_column: str | None,
    separator: str | None,
    catalogue: Catalogue,
    unknown_items: str,
) -> pa.Table:
    """Group a table of interactions into a row per user, in the order of the users' first interactions."""
    names = {"user_id": user_column, "item_id": item_column, "time": time_column}
    names = {role: name for role, name in names.items() if name is not None}
    table, whole_numbers = read_columns(source, names, separator=separator)
    where = {role: f"column {name!r} of {describe(source)}" for role, name in names.items()}
    untyped = whole_numbers is not None
    users = clean_ids(_with_integer_users(table, whole_numbers)["user_id"], where["user_id"], untyped=untyped)
    raw_ids = clean_ids(table["item_id"], where["item_id"], untyped=untyped)
    items = item_ids_of(catalogue, raw_ids)
    unknown = items == 0
    if unknown.any() and unknown_items == "raise":
        row = int(unknown.argmax())
        raise_unknown(catalogue, raw_ids[row].as_py(), f"row {row} of {describe(source)} (counted from 0)")
    encoded = users.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    times = np.zeros(len(codes)) if time_column is None else clean_seconds(table["time"], where["time"]).to_numpy()
    order = np.lexsort((times, codes))  # stable: interactions at the same time stay in their order
    order = order[~unknown[order]]
    lengths = np.bincount(codes[order], minlength=len(encoded.dictionary))
    return _list_table(encoded.dictionary, items[order], lengths)


def every_user(sequences: SequenceDatasets) -> pa.Table:
    """All users of a data set, each with all items of the user's newest row in any split, targets included.

    Returns:
        A table with the columns user_id (raw ids) and history (lists of item ids, oldest first).
    """
    tables, taken = [], None
    for name in ("test", "validation", "train"):
        split = sequences[name]
        if not len(split):
            continue
        users = read_column(split, "user_id").combine_chunks()
        is_newest = np.append(pc.not_equal(users[1:], users[:-1]).to_numpy(zero_copy_only=False), True)
        if taken is not None:
            is_newest &= ~pc.is_in(users, value_set=taken).to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(is_newest)
        items, starts = flatten_lists(split, "history")
        if "relevant_items" in split.column_names:
            targets, target_starts = flatten_lists(split, "relevant_items")
        else:
            targets, target_starts = read_column(split, "target").to_numpy(), np.arange(len(split) + 1)
        both = np.concatenate([items, targets])
        # The history and the targets of each row, one after the other.
        begins = np.stack([starts[rows], len(items) + target_starts[rows]], 1).reshape(-1)
        ends = np.stack([starts[rows + 1], len(items) + target_starts[rows + 1]], 1).reshape(-1)
        lengths = (ends - begins).reshape(-1, 2).sum(1)
        users = users.take(pa.array(rows))
        tables.append(_list_table(users, both[slice_indices(begins, ends)], lengths))
        taken = users if taken is None else pa.concat_arrays([taken, users])
    return pa.concat_tables(tables)


def _rows_table(histories, num_items: int) -> pa.Table:
    """Rows of item ids as `recommend` takes them; padding is left out."""
    if isinstance(histories, torch.Tensor):
        histories = histories.cpu().numpy()
    try:
        rows = [np.asarray(row) for row in histories]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"histories are of type {type(histories).__name__} ({error}): expected a path, a frame, a Dataset, "
            "SequenceDatasets, or a row of item ids per user"
        ) from error
    if not rows:
        raise ValueError("there are no histories: expected at least one row of item ids")
    for number, row in enumerate(rows):
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise ValueError(
                f"history {number} has shape {row.shape} and type {row.dtype}: expected a row of item ids per user, "
                "such as [[3, 1, 2], [7, 4]]; for raw ids, pass a table with the columns user_id and history"
            )
        if len(row) and (row.min() < 0 or row.max() > num_items):
            raise ValueError(
                f"history {number} contains item {row.min() if row.min() < 0 else row.max()}: expected ids "
                f"1..{num_items} of this model's catalogue, and 0 for padding"
            )
    rows = [row[row != PADDING_ITEM_ID].astype(np.int32) if len(row) else np.zeros(0, np.int32) for row in rows]
    return _list_table(pa.array(np.arange(len(rows))), np.concatenate(rows), np.array([len(row) for row in rows]))


def _list_table(users: pa.Array, items: np.ndarray, lengths: np.ndarray) -> pa.Table:
    offsets = pa.array(np.append(0, np.cumsum(lengths)), pa.int64())
    lists = pa.LargeListArray.from_arrays(offsets, pa.array(items.astype(np.int32)))
    return pa.table({"user_id": users, "history": lists})


__all__ = [
    "UNKNOWN_ITEMS",
    "HistoryTable",
    "every_user",
    "history_table",
    "is_table",
    "item_ids_of",
    "raise_unknown",
    "regrouped",
]
