"""Loads a table of (user, item, time), with or without titles, for build_sequences."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from hf_ilora.data.columns import repeated_values
from hf_ilora.data.streaming import stream_interactions
from hf_ilora.data.tables import (
    TableSource,
    check_row_limit,
    clean_ids,
    clean_ratings,
    clean_seconds,
    clean_text,
    describe,
    read_columns,
    to_dataset,
)
from hf_ilora.data.title_rule import split_titles


def load_interactions(
    path_or_dataset: TableSource,
    user_column: str,
    item_column: str,
    time_column: str | None,
    *,
    title_column: str | None = None,
    rating_column: str | None = None,
    separator: str | None = None,
    column_names: Sequence[str] | None = None,
    items: TableSource | None = None,
    items_item_column: str | None = None,
    items_title_column: str | None = None,
    items_separator: str | None = None,
    items_column_names: Sequence[str] | None = None,
    metadata_columns: Sequence[str] | None = None,
    normalize_titles: bool = True,
    missing_titles: str = "raise",
    limit_data_rows: int = -1,
    work_dir: str | os.PathLike | None = None,
) -> tuple[Dataset, Dataset]:
    """Load interactions from your own table.

    Ids are whole numbers or text. White space around ids and column names is ignored. In CSV and TSV files, ids are
    numbers if every value of the column is a whole number of at most 18 digits without leading zeros, and text
    otherwise. Item ids that are text in one table become text in both. Titles come from `title_column` of the same
    table or from a table of items; without either, an item's title is its id.

    Args:
        path_or_dataset: path to CSV, TSV, parquet, JSON lines or RecBole's atomic files (.inter, .item; name their
            columns without types); a pandas or polars frame, lazy or not; or a `datasets.Dataset`. Text files may be
            compressed (such as plays.csv.gz). A folder of part files, as Spark and Dask write it, is read in the order
            of the file names. Other text (.dat, .data, .txt) needs a `separator`.
        user_column, item_column: columns of ids.
        time_column: numbers (seconds since 1970), timestamps, dates or ISO 8601 text (UTC unless it has a time zone);
            None if the rows are already in chronological order; the timestamp is then the index of the row.
        title_column: column of titles in the same table. It may be empty if another row of the item has a title.
        rating_column: numbers, for `min_rating` of `build_sequences`.
        separator: the characters between the columns of a text file, such as "::"; by default a comma or a tab. If
            there are several, quotes have no special meaning.
        column_names: names of all columns, for a text file without a header.
        items: table with one row per item, in any form that `path_or_dataset` may have.
        items_item_column: column of ids in `items`; by default the name in `item_column`.
        items_title_column: column of titles in `items`.
        items_separator, items_column_names: the same as `separator` and `column_names`, for `items`.
        metadata_columns: further columns of `items`, such as price and url, to keep in the catalogue of data sets and
            models. They keep their names and types; those of text files are text, and blank values become null.
        normalize_titles: move a year at the end, "(1995)", to the column `year`, and an English article to the front.
        missing_titles: what to do about items without a title: "raise", or "item_id" to use the id as the title.
        limit_data_rows: number of rows to load, from the first; -1 for all.
        work_dir: for parquet files that do not fit in memory: folder for a copy of the interactions (24 bytes each with
            integer ids), which the result maps to memory. Delete it afterwards. Titles must then come from `items`.

    Returns:
        interactions: user_id, item_id (int64 or string), timestamp (int64, or float64 if a time has a fraction) and,
            with `rating_column`, rating (float64), (rows,) in input order.
        items: item_id, title (string), year (int32 or null) and genres (empty lists), (num_items,) in order of first
            appearance, or in the order of `items`, including items without interactions.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: a source is not a table.
        ValueError: a table is not as described; the message names the first bad row or id.
    """
    check_row_limit(limit_data_rows)
    if missing_titles not in ("raise", "item_id"):
        raise ValueError(f"missing_titles is {missing_titles!r}; expected 'raise' or 'item_id'")
    if items is not None and (items_title_column is None or title_column is not None):
        raise ValueError(
            f"items is given with items_title_column={items_title_column!r} and title_column={title_column!r}; "
            "expected items_title_column to name the column of titles in items, and title_column to be None"
        )
    of_items = (items_item_column, items_title_column, items_separator, items_column_names, metadata_columns)
    if items is None and any(setting is not None for setting in of_items):
        raise ValueError(
            "items_item_column, items_title_column, items_separator, items_column_names or metadata_columns is given "
            "without items: pass the table of items"
        )
    own = {"item_id", "raw_id", "title", "year", "genres", "count"} & set(metadata_columns or ())
    if own:
        raise ValueError(
            f"metadata_columns has {min(own)!r}, which the catalogue has itself: expected other names; rename the "
            "column"
        )

    if user_column is None or item_column is None:
        raise ValueError(
            f"user_column is {user_column!r} and item_column is {item_column!r}; expected the names of both columns"
        )
    names = {
        "user_id": user_column,
        "item_id": item_column,
        "time": time_column,
        "title": title_column,
        "rating": rating_column,
    }
    known = None
    if items is not None:
        id_column = item_column if items_item_column is None else items_item_column
        known = _Columns.read(
            items,
            {"item_id": id_column, "title": items_title_column, **{name: name for name in metadata_columns or ()}},
            separator=items_separator,
            column_names=items_column_names,
        )
    if work_dir is not None:
        if title_column is not None:
            raise ValueError(
                f"title_column is {title_column!r} and work_dir is given: expected the titles in a table of items; "
                "write one row per item to a file and pass it as items"
            )
        given = {role: name for role, name in names.items() if name is not None}
        interactions, ids = stream_interactions(path_or_dataset, given, work_dir, limit_data_rows)
        known_ids = None if known is None else known.ids_of_type(ids.type)
        titles = None
    else:
        interactions, ids, known_ids, titles = _load_whole(
            path_or_dataset, names, limit_data_rows, separator, column_names, known
        )
    metadata = {}
    if known is not None and known_ids is not None:  # both or neither
        check_different_items(known_ids, known.where["item_id"])
        if missing_titles == "raise":
            check_known_items(ids, known_ids, describe(items))
        ids = pc.unique(pa.chunked_array([*known_ids.chunks, ids]))  # in the order of the table of items
        titles = _look_up(ids, known_ids, known.titles())
        metadata = {name: _look_up(ids, known_ids, known.metadata(name)) for name in metadata_columns or ()}
    if titles is not None and missing_titles != "item_id" and titles.null_count:
        untitled = ids.filter(pc.is_null(titles))
        raise ValueError(
            f"{len(untitled):,} items have no title, first {untitled[:5].to_pylist()}; expected one for each item: "
            "add titles, drop the items, or pass missing_titles='item_id' to use the ids as titles"
        )
    return interactions, items_dataset(ids, titles, normalize_titles=normalize_titles, metadata=metadata)


def _load_whole(
    source: TableSource,
    names: dict[str, str | None],
    limit: int,
    separator: str | None,
    column_names: Sequence[str] | None,
    known: "_Columns | None",
) -> tuple[Dataset, pa.Array, pa.ChunkedArray | None, pa.Array | None]:
    """The interactions, their distinct item ids, the ids of the table of items in the same type, and the titles in the
    table of interactions."""
    interactions = _Columns.read(source, names, limit, separator, column_names)
    user_ids, item_ids, known_ids = interactions.ids("user_id"), interactions.ids("item_id"), None
    if known is not None:
        item_ids, known_ids = _of_one_type(item_ids, known.ids("item_id"), interactions, known)
    elif interactions.are_numbers("item_id"):
        item_ids = item_ids.cast(pa.int64())
    if interactions.are_numbers("user_id"):
        user_ids = user_ids.cast(pa.int64())
    columns = {"user_id": user_ids, "item_id": item_ids}
    if names["time"] is None:
        columns["timestamp"] = pa.chunked_array([np.arange(len(item_ids))])
    else:
        columns["timestamp"] = clean_seconds(interactions.table["time"], interactions.where["time"])
    if names["rating"] is not None:
        columns["rating"] = clean_ratings(interactions.table["rating"], interactions.where["rating"])
    ids, titles = pc.unique(item_ids), None
    if names["title"] is not None:
        titles = _agreed_titles(ids, item_ids, interactions.titles())
        if limit != -1 and titles.null_count:  # a later row may have the title
            roles = {"item_id": names["item_id"], "title": names["title"]}
            whole = _Columns.read(source, roles, separator=separator, column_names=column_names)
            titles = _agreed_titles(ids, whole.ids("item_id").cast(item_ids.type), whole.titles())
    return interactions_dataset(**columns), ids, known_ids, titles


def interactions_dataset(**columns: pa.ChunkedArray) -> Dataset:
    """A Dataset of interactions from the clean columns user_id, item_id, timestamp and, optionally, rating."""
    features = Features({name: Value(str(column.type)) for name, column in columns.items()})
    return to_dataset(pa.table(columns), features)


def items_dataset(
    item_ids: pa.Array | pa.ChunkedArray,
    titles: pa.Array | pa.ChunkedArray | None,
    genres: pa.Array | pa.ChunkedArray | None = None,
    *,
    normalize_titles: bool = True,
    metadata: Mapping[str, pa.ChunkedArray] | None = None,
) -> Dataset:
    """A Dataset of items.

    Args:
        item_ids: (num_items,), distinct.
        titles: string, (num_items,); ids replace null titles, and all titles if this is None.
        genres: lists of strings, (num_items,); None for empty lists.
        normalize_titles: apply `split_titles`; otherwise titles stay unchanged and years are null.
        metadata: further columns, (num_items,).
    """
    years = pa.nulls(len(item_ids), pa.int32())
    if titles is None:
        titles = pa.nulls(len(item_ids), pa.string())
    if normalize_titles:
        titles, years = split_titles(titles)
    if genres is None:
        genres = pa.ListArray.from_arrays(np.zeros(len(item_ids) + 1, np.int32), pa.array([], pa.string()))
    columns = {
        "item_id": item_ids,
        "title": pc.coalesce(titles, item_ids.cast(pa.string())),
        "year": years,
        "genres": genres,
    }
    features = {
        "item_id": Value(str(item_ids.type)),
        "title": Value("string"),
        "year": Value("int32"),
        "genres": List(Value("string")),
    }
    further = pa.table(dict(metadata or {}))
    table = pa.table(columns | dict(zip(further.column_names, further.columns, strict=True)))
    return to_dataset(table, Features({**features, **Features.from_arrow_schema(further.schema)}))


def check_different_items(item_ids: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Raise ValueError if a table of items lists an item twice."""
    repeated = repeated_values(item_ids)
    if len(repeated):
        raise ValueError(
            f"{where} lists {len(repeated):,} items more than once, first {repeated[:5].to_pylist()}; "
            "expected one row per item: drop the duplicates"
        )


def check_known_items(item_ids: pa.Array | pa.ChunkedArray, known_ids: pa.ChunkedArray, where: str) -> None:
    """Raise ValueError if interactions contain items that are missing from the table of items, called `where`."""
    seen = pc.unique(item_ids)
    unknown = seen.filter(pc.invert(pc.is_in(seen, value_set=known_ids)))
    if len(unknown):
        raise ValueError(
            f"{len(unknown):,} items of the interactions are not in {where}, first {unknown[:5].to_pylist()}; expected "
            "a row for each: add them, drop their interactions, or pass missing_titles='item_id' (load_interactions)"
        )


@dataclass(frozen=True)
class _Columns:
    """The columns of one table, named by their role.

    Attributes:
        table: those of the columns user_id, item_id, time, title and rating that were asked for, and metadata columns.
        whole_numbers: as in `read_columns`.
        where: the name of each column in error messages.
    """

    table: pa.Table
    whole_numbers: set[str] | None
    where: dict[str, str]

    @classmethod
    def read(
        cls,
        source: TableSource,
        names: dict[str, str | None],
        limit: int = -1,
        separator: str | None = None,
        column_names: Sequence[str] | None = None,
    ) -> "_Columns":
        names = {role: name for role, name in names.items() if name is not None}
        where = {role: f"column {name!r} of {describe(source)}" for role, name in names.items()}
        return cls(*read_columns(source, names, limit, separator, column_names), where)

    def ids(self, role: str) -> pa.ChunkedArray:
        return clean_ids(self.table[role], self.where[role], untyped=self.whole_numbers is not None)

    def are_numbers(self, role: str) -> bool:
        """Whether the ids come from a text file and are all numbers."""
        return self.whole_numbers is not None and role in self.whole_numbers

    def ids_of_type(self, id_type: pa.DataType) -> pa.ChunkedArray:
        """The ids of items, in the type that the interactions use.

        Raises:
            ValueError: they have another type.
        """
        ids = self.ids("item_id")
        if self.whole_numbers is not None and (pa.types.is_string(id_type) or self.are_numbers("item_id")):
            return ids.cast(id_type)
        if ids.type != id_type:
            raise ValueError(
                f"{self.where['item_id']} has ids of type {ids.type}, the interactions have item ids of type "
                f"{id_type}; expected the same: cast one of them"
            )
        return ids

    def titles(self) -> pa.ChunkedArray:
        return clean_text(self.table["title"], self.where["title"])

    def metadata(self, name: str) -> pa.ChunkedArray:
        return self.table[name] if self.whole_numbers is None else clean_text(self.table[name], self.where[name])


def _of_one_type(
    item_ids: pa.ChunkedArray, known_ids: pa.ChunkedArray, interactions: _Columns, known: _Columns
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The clean item ids of both tables: int64 if all of them are numbers, text otherwise.

    Raises:
        ValueError: one table has numbers and the other text, and neither is a text file, whose ids have no type.
    """
    if interactions.whole_numbers is None and known.whole_numbers is None and item_ids.type != known_ids.type:
        raise ValueError(
            f"{known.where['item_id']} has ids of type {known_ids.type}, the interactions have item ids of type "
            f"{item_ids.type}; expected the same: cast one of them, or convert one table to CSV, whose ids take the "
            "type of the other's"
        )
    tables = ((interactions, item_ids), (known, known_ids))
    are_numbers = all(pa.types.is_integer(ids.type) or table.are_numbers("item_id") for table, ids in tables)
    id_type = pa.int64() if are_numbers else pa.string()
    return item_ids.cast(id_type), known_ids.cast(id_type)


def _agreed_titles(ids: pa.Array, item_ids: pa.ChunkedArray, titles: pa.ChunkedArray) -> pa.Array:
    """The title that the rows of each item agree on; null if no row has one."""
    titled = pc.and_(pc.is_valid(titles), pc.is_in(item_ids, value_set=ids))
    rows = pa.table({"item_id": item_ids, "title": titles}).filter(titled)
    pairs = rows.group_by(["item_id", "title"], use_threads=False).aggregate([])  # distinct, in order of appearance
    ambiguous = repeated_values(pairs["item_id"])
    if len(ambiguous):
        several = pairs["title"].filter(pc.equal(pairs["item_id"], ambiguous[0])).to_pylist()
        raise ValueError(
            f"{len(ambiguous):,} items have more than one title: item {ambiguous[0].as_py()!r} has {several[:5]}; "
            "expected one title per item: correct the rows, or pass the titles in a table of items"
        )
    return _look_up(ids, pairs["item_id"], pairs["title"])


def _look_up(ids: pa.Array, known_ids: pa.ChunkedArray, titles: pa.ChunkedArray) -> pa.ChunkedArray:
    """The title of each id; null if it is not among `known_ids`."""
    return titles.take(pc.index_in(ids, value_set=known_ids))
