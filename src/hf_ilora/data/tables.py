"""Reads tables from files, frames and datasets into Arrow, and cleans columns of ids, text, times and ratings."""

import hashlib
import io
import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features

from hf_ilora.data.table_files import TableFiles, find_column

if TYPE_CHECKING:
    import polars

TableSource = Union[str, Path, pd.DataFrame, Dataset, "polars.DataFrame", "polars.LazyFrame"]

# Text files cannot tell these common marks of missing values from words.
_MISSING_WORDS = ["", "nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "NaT"]
_IDS = {"user_id", "item_id"}
_WHOLE_NUMBER = r"^(0|-?[1-9]\d{0,17})$"  # no leading zeros: "007" and "7" are two ids
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_ISO_TIME = (
    r"^\d{4}-\d\d-\d\d"
    r"( ?(UTC|GMT)|[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?( ?(Z|UTC|GMT|\+0000 UTC|[+-]\d\d(:?\d\d)?))?)?$"
)
_ISO_ZONE = r"(:\d\d|\.\d+)(Z|[+-]\d\d(:?\d\d)?)$"


def check_row_limit(limit_data_rows: int) -> None:
    """Raise ValueError unless `limit_data_rows` is -1 (all rows) or a positive number of rows."""
    if (
        isinstance(limit_data_rows, bool)
        or not isinstance(limit_data_rows, int)
        or not (limit_data_rows == -1 or limit_data_rows > 0)
    ):
        raise ValueError(f"limit_data_rows is {limit_data_rows!r}; expected -1 (all rows) or a positive integer")


def describe(source: TableSource) -> str:
    """The name of a table in error messages."""
    if isinstance(source, pd.DataFrame):
        return "the pandas frame"
    if isinstance(source, Dataset):
        return "the Dataset"
    if is_polars(source):
        return "the polars frame"
    return str(source)


def read_columns(
    source: TableSource,
    columns: Mapping[str, Hashable],
    limit_data_rows: int = -1,
    separator: str | None = None,
    column_names: Sequence[str] | None = None,
) -> tuple[pa.Table, set[str] | None]:
    """Read named columns of a table, in input order.

    Args:
        source: a path to CSV, TSV, RecBole's atomic files, parquet or JSON lines (by its suffix), plain or compressed,
            or to a folder of such parts; a pandas or polars frame, lazy or not, or a `datasets.Dataset`.
        columns: the name in `source` of each column of the result.
        limit_data_rows: number of rows to read, from the first; -1 for all.
        separator: the characters between the columns of delimited text; see `TableFiles.at`.
        column_names: names of all columns of delimited text without a header.

    Returns:
        table: Arrow table with these columns; those of delimited text (CSV, TSV) are strings, unchanged.
        whole_numbers: for delimited text, the columns of ids that are whole numbers in all rows, even beyond the limit,
            so that part of a table gets the types of the whole; None for sources with types.

    Raises:
        TypeError: `source` is not a table.
        FileNotFoundError: the file is missing.
        ValueError: the file type is unknown, the content is unreadable, a column is missing, repeated or of mixed
            types, or there are no rows.
    """
    names = [str(name).strip() for name in columns.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"column {twice[0]!r} is given for two purposes; expected different columns")
    for name, value in (("separator", separator), ("column_names", column_names)):
        if value is not None and not isinstance(source, str | Path):
            raise ValueError(f"{name} is given for {describe(source)}; expected it with a CSV or TSV file only")
    whole_numbers = None
    if isinstance(source, pd.DataFrame):
        table = _read_frame(source, columns, limit_data_rows)
    elif isinstance(source, Dataset):
        table = _read_dataset(source, columns, limit_data_rows)
    elif is_polars(source):
        table = _read_polars(source, columns, limit_data_rows)
    elif isinstance(source, str | Path):
        table, whole_numbers = _read_files(TableFiles.at(source, separator, column_names), columns, limit_data_rows)
    else:
        raise TypeError(
            f"cannot read a table from {type(source).__name__}; expected a path (.csv, .tsv, .parquet, .jsonl), a "
            "pandas or polars frame, or a datasets.Dataset (of a DatasetDict, pass one split: dataset['train'])"
        )
    if table.num_rows == 0:
        raise ValueError(f"{describe(source)} has no rows; expected at least one")
    return table.replace_schema_metadata(None), whole_numbers


def clean_ids(column: pa.ChunkedArray, where: str, *, untyped: bool = False) -> pa.ChunkedArray:
    """Ids as int64 or string, without white space around them.

    Args:
        column: (rows,) whole numbers or text.
        where: the column's name in error messages.
        untyped: the column comes from delimited text, so words like "NA" are missing ids. It stays text.

    Raises:
        ValueError: an id is missing, blank or too large for int64, or the column has another type; the message names
            the first bad row.
    """
    column = _readable(column, where)
    expected, remedy = "an id", "drop these rows or give them ids"
    if pa.types.is_integer(column.type):
        _raise_at(pc.is_null(column), column, where, expected, remedy)
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where}: {error}; expected ids that fit int64: cast the ids to strings") from error
    if pa.types.is_string(column.type):
        ids = pc.utf8_trim_whitespace(column)
        words = [""]
        if untyped:
            words = _MISSING_WORDS
            remedy += " (if such a word is a real id, pass a parquet file or a pandas frame)"
        missing = pc.or_(pc.is_null(ids), pc.is_in(ids, value_set=pa.array(words)))
        _raise_at(missing, column, where, expected, remedy)
        return ids
    _raise_at(pc.is_null(column, nan_is_null=True), column, where, expected, remedy)
    raise ValueError(
        f"{where} has type {column.type}; expected integers or strings: cast the ids to one of them (int64, or "
        "text for more digits)"
    )


def clean_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Text without white space around it; null if nothing is left.

    Args:
        column: (rows,) text.
        where: the column's name in error messages.

    Raises:
        ValueError: the column has another type.
    """
    column = _readable(column, where)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        raise ValueError(f"{where} has type {column.type}; expected text: pass another column or cast it to strings")
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def clean_seconds(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Times as seconds since 1970 in UTC: int64, or float64 if one of them has a fraction.

    Numbers count as seconds. Dates and times without a time zone count as UTC.

    Args:
        column: (rows,) numbers, timestamps, dates, or text with numbers or ISO 8601.
        where: the column's name in error messages.

    Raises:
        ValueError: a time is missing, unreadable, infinite or before 1970, or the column has another type.
    """
    column = _in_utc(_readable(column, where))
    remedy = "drop these rows, or pass time_column=None if the rows are in chronological order"
    expected = "seconds since 1970 or an ISO 8601 time"
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        missing = pc.or_(pc.is_null(text), pc.is_in(text, value_set=pa.array(_MISSING_WORDS)))
        _raise_at(missing, column, where, expected, remedy)
        column = _parse_times(text, where)
    _raise_at(pc.is_null(column, nan_is_null=True), column, where, expected, remedy)
    seconds = _whole_or_fraction(column, where)
    bad = pc.or_(pc.less(seconds, 0), pc.is_inf(seconds))
    _raise_at(bad, column, where, "a time from 1970 on", remedy)
    return seconds


def clean_ratings(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Ratings as float64.

    Args:
        column: (rows,) numbers, or text with numbers.
        where: the column's name in error messages.

    Raises:
        ValueError: a rating is missing, unreadable or infinite, or the column has another type.
    """
    column = _readable(column, where)
    expected, remedy = "a number", "drop these rows or rate them"
    if pa.types.is_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        is_number = pc.match_substring_regex(column, _NUMBER)
        _raise_at(pc.invert(pc.coalesce(is_number, False)), column, where, expected, remedy)
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise ValueError(f"{where} has type {column.type}; expected numbers: pass another column or cast it")
    ratings = column.cast(pa.float64(), safe=False)
    _raise_at(pc.invert(pc.coalesce(pc.is_finite(ratings), False)), column, where, expected, remedy)
    return ratings


def to_dataset(table: pa.Table, features: Features) -> Dataset:
    """A `Dataset` over an Arrow table in memory, without a copy.

    The fingerprint is a digest of the content. Without one, `datasets` would pickle the table, which takes three times
    the memory of the table.
    """
    table = table.cast(features.arrow_schema)
    sink = _DigestSink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        writer.write_table(table)
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=sink.digest.hexdigest())


class _DigestSink(io.RawIOBase):
    def __init__(self):
        self.digest = hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.digest.update(data)
        return len(data)


def _read_frame(frame: pd.DataFrame, columns: Mapping[str, Hashable], limit: int) -> pa.Table:
    places = [find_column(list(frame.columns), name, describe(frame)) for name in columns.values()]
    frame = frame if limit == -1 else frame.head(limit)
    arrays = []
    for place, name in zip(places, columns.values(), strict=True):
        series = frame.iloc[:, place]
        try:
            arrays.append(pa.chunked_array([pa.array(series, from_pandas=True)]))
        except UnicodeEncodeError as error:
            row = next((row for row, value in enumerate(series) if not _is_unicode(str(value))), None)
            raise ValueError(
                f"column {name!r} of {describe(frame)} has {error.object!r} in row {row} (counted from 0), which has "
                f"half a character ({error.reason}); expected whole ones: repair the text, for example with "
                'value.encode("utf-8", "replace").decode()'
            ) from error
        except OverflowError as error:
            raise ValueError(
                f"column {name!r} of {describe(frame)} has whole numbers that do not fit int64 ({error}); expected "
                f"numbers below 2**63, or text: use frame[{name!r}].astype(str)"
            ) from error
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ValueError(
                f"column {name!r} of {describe(frame)} mixes types ({error}); expected one type: "
                f"use frame[{name!r}].astype(str)"
            ) from error
    return pa.table(arrays, names=list(columns))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_polars(source: object) -> bool:
    """Whether `source` is a polars frame. Does not import polars: whoever has such a frame has imported it."""
    polars = sys.modules.get("polars")
    return polars is not None and isinstance(source, polars.DataFrame | polars.LazyFrame)


def _read_polars(frame: "polars.DataFrame | polars.LazyFrame", columns: Mapping[str, Hashable], limit: int) -> pa.Table:
    schema = frame.collect_schema()  # reads no rows, even of a lazy frame
    present = schema.names()
    found = [present[find_column(present, name, describe(frame))] for name in columns.values()]
    for name in found:
        if schema[name] == sys.modules["polars"].Object:
            raise ValueError(
                f"column {name!r} of {describe(frame)} has Python objects; expected numbers, text or times: cast it"
            )
    frame = frame.select(found)
    frame = (frame if limit == -1 else frame.head(limit)).lazy().collect()
    return frame.to_arrow().rename_columns(list(columns))


def _read_dataset(dataset: Dataset, columns: Mapping[str, Hashable], limit: int) -> pa.Table:
    present = dataset.column_names
    found = [present[find_column(present, name, describe(dataset))] for name in columns.values()]
    rows = len(dataset) if limit == -1 else min(limit, len(dataset))
    table = dataset.select_columns(found).with_format("arrow")[:rows]
    return table.select(found).rename_columns(list(columns))


def _read_files(files: TableFiles, columns: Mapping[str, Hashable], limit: int) -> tuple[pa.Table, set[str] | None]:
    pieces, rows = [pa.table({name: pa.array([], pa.null()) for name in columns})], 0
    whole_numbers = _IDS & set(columns) if files.is_delimited_text else set()
    for piece in files.batches(columns):
        if limit == -1 or rows < limit:
            plain = {name: _plain(piece[name]) for name in columns}
            pieces.append(pa.table({name: _in_utc(plain[name]) if name == "time" else plain[name] for name in plain}))
            rows += piece.num_rows
        whole_numbers = {name for name in whole_numbers if _are_whole_numbers(piece[name])}
        if limit != -1 and rows >= limit and not whole_numbers:
            break
    try:
        table = pa.concat_tables(pieces, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"the parts of {files.path} have columns of different types ({error}); expected one type per column: read "
            "them with pandas and pass the frame"
        ) from error
    table = table if limit == -1 else table.slice(0, min(limit, table.num_rows))
    return table, whole_numbers if files.is_delimited_text else None


def _are_whole_numbers(column: pa.ChunkedArray) -> bool:
    """Whether all values are whole numbers in their usual spelling; missing values are ignored."""
    text = pc.utf8_trim_whitespace(column)
    missing = pc.is_in(text, value_set=pa.array(_MISSING_WORDS))
    return pc.all(pc.or_(missing, pc.match_substring_regex(text, _WHOLE_NUMBER)), min_count=0).as_py()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert categories to their values, and all types of text to string."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def _in_utc(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert dates and times of any zone to UTC, so that parts of a table with different zones fit together."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    return column.cast(pa.timestamp(column.type.unit, "UTC")) if pa.types.is_timestamp(column.type) else column


def _readable(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """The column as `_plain` returns it, after checking that its text is valid UTF-8, which no reader has done."""
    column = _plain(column)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}; expected text in UTF-8: write the table again from whole text") from error
    return column


def _raise_at(bad: pa.ChunkedArray, column: pa.ChunkedArray, where: str, expected: str, remedy: str) -> None:
    row = pc.index(bad, True).as_py()
    if row != -1:
        count = pc.sum(bad).as_py()
        raise ValueError(
            f"{where} has {column[row].as_py()!r} in row {row} (counted from 0; {count:,} such rows); "
            f"expected {expected}: {remedy}"
        )


def _parse_times(text: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    for number in (pa.int64(), pa.float64()):
        try:
            return text.cast(number)
        except pa.ArrowInvalid:
            continue
    remedy = "convert the column before loading it"
    unreadable = pc.invert(pc.match_substring_regex(text, _ISO_TIME))
    _raise_at(unreadable, text, where, "seconds since 1970 or ISO 8601 like 2024-05-31T12:00:00Z", remedy)
    whole = pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d) ?(UTC|GMT)$", r"\1")
    whole = pc.replace_substring_regex(whole, r" ?(\+0000 UTC|UTC|GMT)$", "Z")  # Go writes both
    whole = pc.replace_substring_regex(whole, r" ([Z+-][\d:]*)$", r"\1")
    whole = pc.replace_substring_regex(whole, r"^(\d{4}-\d\d-\d\d)$", r"\1T00:00:00")
    whole = pc.replace_substring_regex(whole, r"([T ]\d\d:\d\d)(Z|[+-].*|)$", r"\1:00\2")
    whole = pc.replace_substring_regex(whole, r"(\.\d{6})\d+", r"\1")  # microseconds are precise enough
    zoned = pc.if_else(pc.match_substring_regex(whole, _ISO_ZONE), whole, pc.binary_join_element_wise(whole, "Z", ""))
    try:
        return zoned.cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}; expected valid dates: {remedy}") from error


def _whole_or_fraction(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        ticks = column.cast(pa.int64())
        seconds = pc.divide(ticks, per_second)
        rest = pc.subtract(ticks, pc.multiply(seconds, per_second))
        if not pc.any(pc.not_equal(rest, 0)).as_py():
            return seconds
        return pc.add(seconds.cast(pa.float64()), pc.divide(rest.cast(pa.float64()), float(per_second)))
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where}: {error}; expected seconds since 1970: convert the column") from error
    if pa.types.is_floating(column.type):
        seconds = column.cast(pa.float64())
        exact = pc.and_(pc.equal(pc.floor(seconds), seconds), pc.less(pc.abs(seconds), 2.0**53))
        return seconds.cast(pa.int64()) if pc.all(exact).as_py() else seconds
    raise ValueError(
        f"{where} has type {column.type}; expected numbers (seconds), timestamps, dates or ISO 8601 text: convert it"
    )
