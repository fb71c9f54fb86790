"""The catalogue: maps the item ids 1..num_items of a model to titles and raw ids, and back."""

import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

CATALOGUE_FILE = "items.parquet"

_REMEDY = "write the catalogue again with Catalogue.to_parquet"
_REQUIRED_COLUMNS = ("item_id", "raw_id", "title")
_OPTIONAL_COLUMNS = {"year": pa.int32(), "genres": pa.list_(pa.string()), "count": pa.int64()}
# Finding close matches compares the unknown raw id with every other one, which takes about 0.5 s per 100,000.
_MAX_RAW_IDS_TO_COMPARE = 100_000
# A value that many rows share takes almost no bytes, so a file of 1 MB can fill memory. Real tables stay far below this
# ratio; small tables may exceed it.
_MAX_BYTES_PER_BYTE = 100
_ALWAYS_ALLOWED_BYTES = 1 << 28


class Catalogue:
    """Titles and raw ids of the items 1..num_items, and further columns that recommendations show.

    Args:
        table: columns `item_id` (1..num_items, each once, in any order), `raw_id` (integer or string, unique), `title`
            (string) and optionally `year` (integer), `genres` (list of strings) and `count` (integer, the occurrences
            of the item in training, 0 for one that training has never seen). Further columns, such as price, url or
            image, are kept: numbers, text, times or lists of them, which may be null.

    Attributes:
        table: the same as a `pyarrow.Table` in the order of item_id, with the types int64, int64 or string, string,
            int32, list<string> and int64; further columns come last.

    Raises:
        ValueError: for a missing, repeated or mistyped column, gaps or repetitions in `item_id`, repeated or missing
            raw ids, missing titles, and counts that are missing or negative.
    """

    def __init__(self, table: pa.Table):
        self.table = _checked(table)

    def __len__(self) -> int:
        return self.table.num_rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Catalogue) and self.table.equals(other.table)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} items: {', '.join(self.table.column_names)})"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the content, in hex; equal catalogues have equal fingerprints."""
        digest = hashlib.sha256()
        for name in self.table.column_names:
            digest.update(json.dumps([name, self.table[name].to_pylist()], default=str).encode())
        return digest.hexdigest()

    @cached_property
    def counts(self) -> np.ndarray | None:
        """(num_items + 1,) int64, how often each item occurs in training, 0 for padding; None if this is unknown."""
        if "count" not in self.table.column_names:
            return None
        return np.concatenate([[0], self.table["count"].to_numpy()])

    @property
    def metadata_columns(self) -> list[str]:
        """The further columns, such as price, url or image."""
        return self.table.column_names[len(_known_columns(self.table)) :]

    def has_items_of(self, other: "Catalogue | None") -> bool:
        """Whether the other catalogue has the same items; counts and further columns may differ."""
        return other is not None and self._items().equals(other._items())

    def _items(self) -> pa.Table:
        return self.table.select([name for name in _known_columns(self.table) if name != "count"])

    def with_counts(self, counts: np.ndarray) -> "Catalogue":
        """The same catalogue with other training counts, (num_items + 1,), the first for padding."""
        others = self.table.select([name for name in self.table.column_names if name != "count"])
        return Catalogue(others.append_column("count", pa.array(counts[1:].astype(np.int64))))

    def with_columns(self, columns: Any) -> "Catalogue":
        """The same catalogue with further columns, such as price, url or image; they replace others of the same name.

        Args:
            columns: a dictionary of (num_items,) values for each column, in the order of the item ids; or a table (of
                pyarrow, pandas or polars). The rows of a table are matched to items by its column `raw_id` if it has
                one, and are otherwise in the order of the item ids. Items without a row get null, and rows without an
                item are ignored.

        Raises:
            ValueError: for columns of another length, of an unsupported type, or named like one of the catalogue's own,
                and for a table whose raw ids are repeated or all unknown.
        """
        try:
            table = pa.table(columns)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"the columns are not a table ({error}): expected {len(self)} values in each, one per item, or a table "
                "with raw_id"
            ) from error
        if "raw_id" in table.column_names:
            table = self._in_order(table)
        elif table.num_rows != len(self):
            raise ValueError(
                f"the columns {', '.join(table.column_names)} have {table.num_rows} values each: expected {len(self)}, "
                "one per item in the order of the item ids; or pass a table with the column raw_id"
            )
        own = [name for name in table.column_names if name in (*_REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS)]
        if own:
            raise ValueError(
                f"column {own[0]} is one of the catalogue's own: expected others, such as price; make a new "
                "Catalogue(table) to change it"
            )
        kept = self.table.select([name for name in self.table.column_names if name not in table.column_names])
        for name in table.column_names:
            kept = kept.append_column(name, table[name])
        return Catalogue(kept)

    def _in_order(self, table: pa.Table) -> pa.Table:
        """The columns of a table with raw ids, in the order of the item ids."""
        raw_ids, known = table["raw_id"], self.table["raw_id"]
        if pa.types.is_large_string(raw_ids.type) or pa.types.is_string_view(raw_ids.type):
            raw_ids = raw_ids.cast(pa.string())
        if pa.types.is_integer(raw_ids.type):
            raw_ids = raw_ids.cast(pa.int64())
        if raw_ids.type != known.type:
            raise ValueError(
                f"column raw_id of the table has type {raw_ids.type}: expected {known.type}, that of the catalogue; "
                "cast it"
            )
        counts = pc.value_counts(raw_ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            raise ValueError(
                f"raw id {repeated[0]['values'].as_py()!r} occurs more than once in the table: expected one row per "
                "item"
            )
        places = pc.index_in(known, value_set=raw_ids)
        if places.null_count == len(places):
            first = raw_ids[0].as_py() if len(raw_ids) else None
            raise ValueError(
                f"no raw id of the table is in the catalogue (the table's first is {first!r}, the catalogue's "
                f"{known[0].as_py()!r}): expected the raw ids of its items"
            )
        return table.drop_columns("raw_id").take(places)

    def grown_by(self, table: pa.Table) -> "Catalogue":
        """The catalogue with further items, which are not checked.

        Checking all items would take most of the time of adding one.

        Args:
            table: the further items, with this catalogue's columns and types, the next item ids, and new raw ids.
        """
        grown = object.__new__(Catalogue)
        grown.table = pa.concat_tables([self.table, table]).combine_chunks()
        return grown

    def titles(self, item_ids: ArrayLike) -> list[str]:
        """The titles of `item_ids`, a list, array or tensor of shape (items,).

        Raises:
            ValueError: for padding (0) and for ids outside 1..num_items.
        """
        return self._take("title", item_ids)

    def raw_ids(self, item_ids: ArrayLike) -> list[int] | list[str]:
        """The raw ids of `item_ids`, a list, array or tensor of shape (items,).

        Raises:
            ValueError: for padding (0) and for ids outside 1..num_items.
        """
        return self._take("raw_id", item_ids)

    def take(self, item_ids: ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """The catalogue's rows of some items.

        Args:
            item_ids: (items,) in a list, array or tensor.
            columns: names of columns; None takes all but `item_id` and `count`.

        Returns:
            A table with these columns and a row for each of `item_ids`, in their order.

        Raises:
            ValueError: for a column that the catalogue lacks, padding (0), and ids outside 1..num_items.
        """
        if columns is None:
            columns = [name for name in self.table.column_names if name not in ("item_id", "count")]
        self.check_columns(columns)
        return self.table.select(columns).take(pa.array(self._places(item_ids, "row"), pa.int64()))

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise a ValueError for a column that the catalogue lacks."""
        if isinstance(columns, str):
            raise ValueError(f"columns is the string {columns!r}: expected a list of names, such as [{columns!r}]")
        missing = [name for name in columns if name not in self.table.column_names]
        if missing:
            raise ValueError(
                f"the catalogue has no column {missing[0]!r}: expected one of {', '.join(self.table.column_names)}; "
                "add it with catalogue.with_columns"
            )

    def item_ids(self, raw_ids: Iterable[int] | Iterable[str]) -> list[int]:
        """The item ids, 1..num_items, of `raw_ids`.

        Raises:
            ValueError: for a raw id that is not in the catalogue; the message names the closest ones that are.
        """
        if isinstance(raw_ids, str):
            raise ValueError(f"raw_ids is the string {raw_ids!r}: expected a list of raw ids, such as [{raw_ids!r}]")
        if not isinstance(raw_ids, Iterable):
            raise ValueError(f"raw_ids is {raw_ids!r}: expected a list of raw ids, such as [{raw_ids!r}]")
        item_ids = []
        for raw_id in raw_ids:
            item_id = self.item_id_of.get(raw_id)
            if item_id is None:
                raise ValueError(self._unknown(raw_id))
            item_ids.append(item_id)
        return item_ids

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> "Catalogue":
        """Read a catalogue from a parquet file.

        Raises:
            FileNotFoundError: when there is no file at `path`.
            ValueError: when it is not a whole parquet file, or its content is not a catalogue.
        """
        try:
            with open_parquet(path, _REMEDY) as file:
                table = file.read()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no catalogue at {path}: expected a parquet file of items") from error
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} is not a whole parquet file ({error}): {_REMEDY}") from error
        try:
            return cls(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Write the catalogue as parquet. When writing fails, an earlier file at `path` is left untouched."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(self.table, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    # A catalogue may be the Trainer's processing class, which groups rows by the length of this column.
    model_input_names = ("input_ids",)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `items.parquet` to a folder, created if needed; the Trainer calls this at each checkpoint."""
        os.makedirs(save_directory, exist_ok=True)
        self.to_parquet(os.path.join(save_directory, CATALOGUE_FILE))

    @cached_property
    def item_id_of(self) -> dict[int | str, int]:
        """The item id of each raw id."""
        return {raw_id: row + 1 for row, raw_id in enumerate(self.table["raw_id"].to_pylist())}

    def _take(self, column: str, item_ids: ArrayLike) -> list:
        return self.table[column].take(pa.array(self._places(item_ids, column), pa.int64())).to_pylist()

    def _places(self, item_ids: ArrayLike, wanted: str) -> np.ndarray:
        """The table's row numbers of some items; messages say that padding has no `wanted`."""
        ids = np.asarray(item_ids)
        if ids.size == 0:
            return np.zeros(0, dtype=np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"item_ids have shape {ids.shape} and type {ids.dtype}: expected integers of shape (items,)"
            )
        if (ids == 0).any():
            raise ValueError(f"item id 0 is padding and has no {wanted}: leave padding out")
        if ids.min() < 0 or ids.max() > len(self):
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ValueError(
                f"item id {wrong} is outside the catalogue: expected 1 to {len(self)}; raw ids are mapped by item_ids()"
            )
        return ids.astype(np.int64) - 1

    def _unknown(self, raw_id: int | str) -> str:
        expected = str if pa.types.is_string(self.table.schema.field("raw_id").type) else int
        example = self.table["raw_id"][0].as_py()
        message = f"raw id {raw_id!r} is not among the {len(self)} items of the catalogue"
        if expected is str and not isinstance(raw_id, str):
            return f"{message}: expected strings such as {example!r}, found {type(raw_id).__name__}"
        if expected is int and isinstance(raw_id, str):
            return f"{message}: expected integers such as {example}, found a string"
        if isinstance(raw_id, str) and len(self) <= _MAX_RAW_IDS_TO_COMPARE:
            close = difflib.get_close_matches(raw_id, self.table["raw_id"].to_pylist())
            if close:
                return f"{message}: closest are {', '.join(map(repr, close))}"
        return f"{message}: leave it out, or use the catalogue of its data (raw ids such as {example!r})"


def open_parquet(path: str | os.PathLike, remedy: str) -> pq.ParquetFile:
    """Open a parquet file, reading only its footer.

    Args:
        path: the file.
        remedy: end of the error messages.

    Raises:
        FileNotFoundError: when there is nothing at `path`.
        ValueError: for a folder, a file that is not whole, and one that claims to contain much more than its size.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected a parquet file; {remedy}")
    if path.exists() and not path.is_file():  # reading a pipe would wait forever
        raise ValueError(f"{path} is a pipe or a device: expected a parquet file; {remedy}")
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): {remedy}") from error
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    chunks = [group.column(column) for group in groups for column in range(group.num_columns)]
    in_memory = sum(max(8 * chunk.num_values, chunk.total_uncompressed_size) for chunk in chunks)
    size = path.stat().st_size
    if in_memory > max(_ALWAYS_ALLOWED_BYTES, _MAX_BYTES_PER_BYTE * size):
        file.close()
        raise ValueError(
            f"{path} has {size:,} bytes and claims to contain {file.metadata.num_rows:,} rows, about {in_memory:,} "
            f"bytes in memory: expected at most {_MAX_BYTES_PER_BYTE} times its size; {remedy}"
        )
    return file


def _checked(table: pa.Table) -> pa.Table:
    found = table.column_names
    missing = [name for name in _REQUIRED_COLUMNS if name not in found]
    if missing or len(set(found)) < len(found):
        raise ValueError(
            f"a catalogue has the columns {', '.join(_REQUIRED_COLUMNS)}, optionally {', '.join(_OPTIONAL_COLUMNS)}, "
            f"and any others, once each: found {', '.join(found) or 'none'}; rename or drop columns"
        )
    if table.num_rows == 0:
        raise ValueError("the catalogue is empty: expected at least one item")
    raw_type, title_type = table.schema.field("raw_id").type, table.schema.field("title").type
    if not (pa.types.is_integer(raw_type) or _is_string(raw_type)):
        raise ValueError(f"column raw_id has type {raw_type}: expected int64 or string")
    if not _is_string(title_type):
        raise ValueError(f"column title has type {title_type}: expected string")
    if not pa.types.is_integer(table.schema.field("item_id").type):
        raise ValueError(f"column item_id has type {table.schema.field('item_id').type}: expected int64")
    for name in _REQUIRED_COLUMNS:
        if table[name].null_count:
            row = table[name].is_null().index(True).as_py()
            raise ValueError(f"column {name} has no value in row {row}: every item needs one")
    types = {
        "item_id": pa.int64(),
        "raw_id": pa.string() if _is_string(raw_type) else pa.int64(),
        "title": pa.string(),
        **{name: column_type for name, column_type in _OPTIONAL_COLUMNS.items() if name in found},
    }
    expected = ", ".join(f"{name} {column_type}" for name, column_type in types.items())
    types |= {name: _metadata_type(table.schema.field(name)) for name in found if name not in types}
    try:
        table = table.select(list(types)).cast(pa.schema(types.items())).replace_schema_metadata(None)
    except pa.ArrowException as error:
        raise ValueError(f"the columns do not fit {expected}: {error}") from error
    if "count" in types and (table["count"].null_count or pc.min(table["count"]).as_py() < 0):
        raise ValueError("column count has values that are missing or negative: expected occurrences in training")
    table = table.sort_by("item_id").combine_chunks()
    _check_item_ids(table["item_id"].to_numpy())
    counts = pc.value_counts(table["raw_id"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise ValueError(f"raw id {repeated[0]['values'].as_py()!r} occurs more than once: expected one row per item")
    return table


def _known_columns(table: pa.Table) -> list[str]:
    return [name for name in table.column_names if name in (*_REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS)]


def _metadata_type(field: pa.Field) -> pa.DataType:
    """The type in which a further column is stored.

    Raises:
        ValueError: for a type that JSON cannot express.
    """
    column_type = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    values = column_type.value_type if pa.types.is_list(column_type) else column_type
    if pa.types.is_timestamp(column_type):
        return pa.timestamp("us", column_type.tz)  # parquet has no seconds
    if pa.types.is_large_string(column_type) or pa.types.is_string_view(column_type):
        return pa.string()
    if pa.types.is_primitive(values) or pa.types.is_decimal(values) or pa.types.is_string(values):
        return column_type if values is column_type else pa.list_(values)
    raise ValueError(
        f"column {field.name} has type {field.type}: expected numbers, text, times or lists of them; store the "
        "addresses of pictures and files, not their content"
    )


def _check_item_ids(sorted_ids: np.ndarray) -> None:
    expected = np.arange(1, len(sorted_ids) + 1)
    if (sorted_ids == expected).all():
        return
    row = int((sorted_ids != expected).argmax())
    if row and sorted_ids[row] == sorted_ids[row - 1]:
        problem = f"{sorted_ids[row]} occurs more than once"
    elif sorted_ids[row] < expected[row]:
        problem = f"{sorted_ids[row]} is below 1 (0 is padding)"
    else:
        problem = f"{expected[row]} is missing"
    raise ValueError(f"item ids must be 1 to {len(sorted_ids)}, one per row: {problem}")


def _is_string(column_type: pa.DataType) -> bool:
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


__all__ = ["CATALOGUE_FILE", "Catalogue", "open_parquet"]
