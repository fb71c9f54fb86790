"""Reads filters for many users: one set of items for all users, or a row for each, in raw ids or item ids."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral
from typing import TypeAlias, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch

from hf_ilora.data.tables import TableSource, clean_ids, describe, read_columns
from hf_ilora.models.next_item.catalogue import Catalogue

from .history_tables import is_table, item_ids_of
from .user_items import UserItems

# Ids for all users or a row of them per user, raw ones or item ids; or a table.
GivenItems: TypeAlias = (
    Iterable[int | str] | Iterable[Iterable[int | str]] | np.ndarray | torch.Tensor | pd.Series | TableSource
)


@dataclass(frozen=True)
class ItemSets:
    """A set of item ids that all users share, or one for each user.

    Args:
        name: name of the filter, for messages.
        shared: (items,) int64, the set of all users; empty if each user has a row.
        rows: a row for each user; None if all users share a set.
        by_user: whether rows are matched to users by `rows.users`; else the rows are in the order of the users.
    """

    name: str
    shared: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rows: UserItems | None = None
    by_user: bool = False

    def of(self, users: pa.Array, first: int) -> UserItems | None:
        """The rows of some users, who are number `first`, `first + 1`, ... of all users; None if all share a set."""
        if self.rows is None:
            return None
        if not self.by_user:
            if first + len(users) > len(self.rows):
                self.check_users(first + len(users))
            return self.rows.take(np.arange(first, first + len(users)))
        known = self.rows.users
        if users.type != known.type:
            users, known = users.cast(pa.string()), known.cast(pa.string())
        return self.rows.take(pc.fill_null(pc.index_in(users, value_set=known), -1).to_numpy().astype(np.int64))

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the content."""
        digest = hashlib.sha256()
        parts = [self.shared] if self.rows is None else [self.rows.items, self.rows.starts]
        for part in parts:
            digest.update(np.ascontiguousarray(part, dtype="<i8").data)
        if self.rows is not None and self.by_user:
            digest.update(repr(self.rows.users.to_pylist()).encode())
        return digest.hexdigest()

    def check_users(self, num_users: int) -> None:
        """Raise a ValueError if rows are in the order of the users and their number is not that of the users."""
        if self.rows is not None and not self.by_user and len(self.rows) != num_users:
            raise ValueError(
                f"{self.name} have {len(self.rows)} rows for {num_users} users: expected a row per user in their "
                "order, ids for all of them, or a table with the columns user_id and item_id"
            )


def item_sets(
    name: str,
    given: GivenItems | None,
    catalogue: Catalogue | None,
    num_items: int,
    *,
    user_column: str = "user_id",
    item_column: str = "item_id",
) -> ItemSets | None:
    """Turn a filter into sets of item ids.

    Args:
        name: name of the argument, for messages.
        given: ids for all users; a row of ids per user, in the order of the users; or a table (a path, a frame or a
            Dataset) with a row for each pair of a user and an item. None means no filter.
        catalogue: maps raw ids to item ids; None if `given` contains item ids.
        num_items: size of the catalogue.
        user_column, item_column: columns of the table.

    Raises:
        ValueError: for anything else, and for unknown ids.
    """
    if given is None:
        return None
    if is_table(given):
        if catalogue is None:
            raise ValueError(f"{name} are a table, and the histories rows of item ids: expected ids, or a row per user")
        return _of_table(name, given, catalogue, user_column, item_column)
    try:
        rows = (
            given.tolist() if isinstance(given, np.ndarray | pd.Series | torch.Tensor) else list(cast(Iterable, given))
        )
    except TypeError as error:
        raise ValueError(
            f"{name} are of type {type(given).__name__}: expected ids, or a row of them per user"
        ) from error
    if all(isinstance(row, Integral | str) for row in rows):
        return ItemSets(name, shared=np.unique(_item_ids(name, rows, catalogue, num_items)))
    parts = []
    for number, row in enumerate(rows):
        if isinstance(row, str) or not isinstance(row, Iterable):
            raise ValueError(
                f"row {number} of {name} is {row!r}: expected a row of ids per user, or ids for all of them"
            )
        row = row.tolist() if isinstance(row, np.ndarray | torch.Tensor) else list(row)
        parts.append(np.unique(_item_ids(f"row {number} of {name}", row, catalogue, num_items)))
    starts = np.append(0, np.cumsum([len(part) for part in parts]))
    users = pa.nulls(len(parts), pa.int64())  # rows are matched by their order
    return ItemSets(name, rows=UserItems(users, np.concatenate(parts), starts))


def _item_ids(where: str, ids: list, catalogue: Catalogue | None, num_items: int) -> np.ndarray:
    """(items,) int64 item ids without padding, from raw ids if there is a catalogue."""
    if catalogue is not None:
        try:
            return np.array(catalogue.item_ids(ids), dtype=np.int64)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    wrong = next((each for each in ids if not isinstance(each, Integral) or not 0 <= int(each) <= num_items), None)
    if wrong is not None:
        raise ValueError(f"{where} contains {wrong!r}: expected ids 1..{num_items} of this model's catalogue")
    return np.array([each for each in ids if each], dtype=np.int64)  # without padding


def _of_table(name: str, source: TableSource, catalogue: Catalogue, user_column: str, item_column: str) -> ItemSets:
    names = {"user_id": user_column, "item_id": item_column}
    table, whole_numbers = read_columns(source, names)
    where = {role: f"column {column!r} of {describe(source)}" for role, column in names.items()}
    users = clean_ids(table["user_id"], where["user_id"], untyped=whole_numbers is not None)
    raw_ids = clean_ids(table["item_id"], where["item_id"], untyped=whole_numbers is not None)
    items = item_ids_of(catalogue, raw_ids).astype(np.int64)
    if not items.all():
        row = int((items == 0).argmax())
        _item_ids(f"{name}: row {row} of {describe(source)} (counted from 0)", [raw_ids[row].as_py()], catalogue, 0)
    encoded = users.combine_chunks().dictionary_encode()
    base = int(items.max()) + 1
    pairs = np.unique(encoded.indices.to_numpy().astype(np.int64) * base + items)
    starts = np.searchsorted(pairs, np.arange(len(encoded.dictionary) + 1) * base)
    return ItemSets(name, rows=UserItems(encoded.dictionary, pairs % base, starts), by_user=True)


__all__ = ["ItemSets", "item_sets"]
