"""Reads tables from files, pandas and datasets into Arrow, and cleans columns of ids, text and times without loops."""

import csv
import difflib
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from datasets import Dataset, DatasetInfo, Features

Source = str | Path | pd.DataFrame | Dataset

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = [".jsonl", ".ndjson", ".json"]
# Common marks of missing values in text files, which cannot distinguish them from words.
_MISSING_WORDS = ["", "nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NA", "N/A", "n/a", "NaT"]
_WHOLE_NUMBER = r"^(0|-?[1-9]\d{0,17})$"  # no leading zeros: "007" and "7" are two ids
_ISO_TIME = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d(:?\d\d)?)?)?$"
_ISO_ZONE = r"(:\d\d|\.\d+)(Z|[+-]\d\d(:?\d\d)?)$"


def check_row_limit(limit_data_rows: int) -> None:
    """Raise ValueError unless it is -1 (all rows) or a positive number of rows."""
    if (
        isinstance(limit_data_rows, bool)
        or not isinstance(limit_data_rows, int)
        or not (limit_data_rows == -1 or limit_data_rows > 0)
    ):
        raise ValueError(f"limit_data_rows is {limit_data_rows!r}; expected -1 (all rows) or a positive integer")


def describe(source: Source) -> str:
    """The name of a source in error messages."""
    if isinstance(source, pd.DataFrame):
        return "the pandas frame"
    if isinstance(source, Dataset):
        return "the Dataset"
    return str(source)


def is_delimited_text(source: Source) -> bool:
    """Whether the source is a CSV or TSV file, whose columns have no types."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() in _DELIMITERS


def read_columns(source: Source, columns: Sequence[str], limit_data_rows: int = -1) -> pa.Table:
    """Read named columns of a table, in input order.

    Args:
        source: a path to CSV, TSV, parquet or JSON lines (by its suffix), a pandas frame or a `datasets.Dataset`.
        columns: the columns to read.
        limit_data_rows: number of rows to read, from the first; -1 for all.

    Returns:
        Arrow table with exactly these columns. CSV and TSV columns are strings, unchanged.

    Raises:
        TypeError: for another source.
        FileNotFoundError: the file is missing.
        ValueError: for an unknown file type, unreadable content, missing, repeated or mixed columns, and no rows.
    """
    twice = sorted({name for name in columns if list(columns).count(name) > 1})
    if twice:
        raise ValueError(f"column {twice[0]!r} is given for two purposes; expected different columns")
    if isinstance(source, pd.DataFrame):
        table = _read_frame(source, columns, limit_data_rows)
    elif isinstance(source, Dataset):
        _check_columns(source.column_names, columns, describe(source))
        rows = len(source) if limit_data_rows == -1 else min(limit_data_rows, len(source))
        table = source.select_columns(list(columns)).with_format("arrow")[:rows]
    elif isinstance(source, str | Path):
        table = _read_file(Path(source).expanduser(), columns, limit_data_rows)
    else:
        raise TypeError(
            f"cannot read a table from {type(source).__name__}; expected a path (.csv, .tsv, .parquet, .jsonl), a "
            "pandas DataFrame or a datasets.Dataset (of a DatasetDict, pass one split: dataset['train'])"
        )
    if table.num_rows == 0:
        raise ValueError(f"{describe(source)} has no rows; expected at least one")
    return table.replace_schema_metadata(None)


def clean_ids(column: pa.ChunkedArray, where: str, *, untyped: bool = False) -> pa.ChunkedArray:
    """Ids as int64 or string.

    Args:
        column: (rows,) whole numbers or text.
        where: the column's name in error messages.
        untyped: the column is from a text file: it becomes int64 if every value is a whole number without leading
            zeros.

    Raises:
        ValueError: for missing or empty ids, another type, and ids too large for int64; it names the first bad row.
    """
    column = _plain(column)
    remedy = "drop these rows or give them ids"
    if untyped:
        remedy += " (if such a word is a real id, pass a parquet file or a pandas frame)"
        _raise_at(pc.is_in(column, value_set=pa.array(_MISSING_WORDS)), column, where, "an id", remedy)
        if pc.all(pc.match_substring_regex(column, _WHOLE_NUMBER)).as_py():
            return column.cast(pa.int64())
        return column
    _raise_at(pc.is_null(column, nan_is_null=True), column, where, "an id", remedy)
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where}: {error}; expected ids that fit int64: cast the ids to strings") from error
    if pa.types.is_string(column.type):
        _raise_at(pc.equal(column, ""), column, where, "an id", remedy)
        return column
    raise ValueError(f"{where} has type {column.type}; expected integers or strings: cast the ids to one of them")


def clean_text(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Text stripped of white space; null if nothing is left.

    Args:
        column: (rows,) text.
        where: the column's name in error messages.

    Raises:
        ValueError: for another type.
    """
    column = _plain(column)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        raise ValueError(f"{where} has type {column.type}; expected text: pass another column or cast it to strings")
    text = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def clean_seconds(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Times as seconds since 1970 in UTC: int64, or float64 if one of them has a fraction.

    Numbers are seconds already. Dates and times without a time zone are UTC.

    Args:
        column: (rows,) numbers, timestamps, dates, or text with numbers or ISO 8601.
        where: the column's name in error messages.

    Raises:
        ValueError: for missing, unreadable, infinite or negative times (before 1970), and another type.
    """
    column = _plain(column)
    remedy = "drop these rows, or pass time_column=None if the rows are in chronological order"
    expected = "seconds since 1970 or an ISO 8601 time"
    if pa.types.is_string(column.type):
        missing = pc.or_kleene(pc.is_null(column), pc.is_in(column, value_set=pa.array(_MISSING_WORDS)))
        _raise_at(missing, column, where, expected, remedy)
        column = _parse_times(pc.utf8_trim_whitespace(column), where)
    _raise_at(pc.is_null(column, nan_is_null=True), column, where, expected, remedy)
    seconds = _whole_or_fraction(column, where)
    bad = pc.or_(pc.less(seconds, 0), pc.is_inf(seconds))
    _raise_at(bad, column, where, "a time from 1970 on", remedy)
    return seconds


def to_dataset(table: pa.Table, features: Features) -> Dataset:
    """A `Dataset` over an Arrow table in memory, without a copy.

    Its fingerprint is a digest of the content: to compute one itself, `datasets` would pickle the table, which takes
    three times the memory of the table.
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


def _read_frame(frame: pd.DataFrame, columns: Sequence[str], limit: int) -> pa.Table:
    _check_columns(list(frame.columns), columns, describe(frame))
    frame = frame if limit == -1 else frame.head(limit)
    arrays = []
    for name in columns:
        try:
            arrays.append(pa.chunked_array([pa.array(frame[name], from_pandas=True)]))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"column {name!r} of {describe(frame)} mixes types ({error}); expected one type: "
                f"use frame[{name!r}].astype(str)"
            ) from error
    return pa.table(arrays, names=list(columns))


def _read_file(path: Path, columns: Sequence[str], limit: int) -> pa.Table:
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        read = _read_delimited
    elif suffix in _JSON_LINES:
        read = _read_json_lines
    elif suffix == ".parquet":
        read = _read_parquet
    else:
        known = ", ".join([*_DELIMITERS, ".parquet", *_JSON_LINES])
        raise ValueError(f"{path} has the file type {suffix!r}; expected one of {known}: convert it, or pass a frame")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path")
    try:
        return read(path, columns, limit)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; expected a whole {suffix} file in UTF-8 (JSON: one object per line), one "
            "type per column: fix the file, or read it with pandas and pass the frame"
        ) from error


def _read_delimited(path: Path, columns: Sequence[str], limit: int) -> pa.Table:
    delimiter = _DELIMITERS[path.suffix.lower()]
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    if not header:
        raise ValueError(f"{path} is empty; expected a line of column names and at least one row")
    _check_columns(header, columns, str(path))
    reader = pa.csv.open_csv(
        path,
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
        ),
    )
    return _first_rows(reader, reader.schema, limit)


def _read_json_lines(path: Path, columns: Sequence[str], limit: int) -> pa.Table:
    read_options = pa.json.ReadOptions(block_size=16 << 20)  # a row must fit into a block
    table = pa.json.read_json(path, read_options=read_options)
    _check_columns(table.column_names, columns, str(path))
    # Arrow turns text that looks like a time into a time; an id or a title must stay text.
    dates = [field for field in table.select(list(columns)).schema if pa.types.is_temporal(field.type)]
    if dates:
        text = pa.schema([(field.name, pa.string()) for field in dates])
        parse_options = pa.json.ParseOptions(explicit_schema=text)
        table = pa.json.read_json(path, read_options=read_options, parse_options=parse_options)
    return table.select(list(columns)).slice(0, None if limit == -1 else limit)


def _read_parquet(path: Path, columns: Sequence[str], limit: int) -> pa.Table:
    with pa.parquet.ParquetFile(path) as file:
        _check_columns(file.schema_arrow.names, columns, str(path))
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        return _first_rows(file.iter_batches(columns=list(columns)), schema, limit).select(list(columns))


def _first_rows(batches, schema: pa.Schema, limit: int) -> pa.Table:
    kept, rows = [], 0
    for batch in batches:
        kept.append(batch)
        rows += batch.num_rows
        if limit != -1 and rows >= limit:
            break
    table = pa.Table.from_batches(kept, schema=kept[0].schema if kept else schema)
    return table.slice(0, None if limit == -1 else limit)


def _check_columns(present: Sequence, wanted: Sequence[str], where: str) -> None:
    for name in wanted:
        if name not in present:
            close = difflib.get_close_matches(str(name), [str(label) for label in present], n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"{where} has no column {name!r}; it has {list(present)}{hint}")
        times = list(present).count(name)
        if times > 1:
            raise ValueError(f"{where} has {times} columns named {name!r}; expected one: rename or drop the others")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Categories as their values, and all types of text as string."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
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
    whole = pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d)$", r"\1T00:00:00")
    whole = pc.replace_substring_regex(whole, r"([T ]\d\d:\d\d)(Z|[+-].*|)$", r"\1:00\2")
    whole = pc.replace_substring_regex(whole, r"(\.\d{6})\d+", r"\1")  # microseconds are precise enough
    zoned = pc.if_else(pc.match_substring_regex(whole, _ISO_ZONE), whole, pc.binary_join_element_wise(whole, "Z", ""))
    try:
        return zoned.cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}; expected valid dates: {remedy}") from error


def _whole_or_fraction(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if pa.types.is_timestamp(column.type):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        ticks = column.cast(pa.int64())
        seconds = pc.divide(ticks, per_second)
        rest = pc.subtract(ticks, pc.multiply(seconds, per_second))
        if not pc.any(pc.not_equal(rest, 0)).as_py():
            return seconds
        return pc.add(seconds.cast(pa.float64()), pc.divide(rest.cast(pa.float64()), float(per_second)))
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        seconds = column.cast(pa.float64())
        exact = pc.and_(pc.equal(pc.floor(seconds), seconds), pc.less(pc.abs(seconds), 2.0**53))
        return seconds.cast(pa.int64()) if pc.all(exact).as_py() else seconds
    raise ValueError(
        f"{where} has type {column.type}; expected numbers (seconds), timestamps, dates or ISO 8601 text: convert it"
    )
