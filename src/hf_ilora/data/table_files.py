"""Reads named columns of table files: delimited text, JSON lines and parquet, one file or a folder of parts."""

import codecs
import csv
import difflib
import io
import itertools
import json
import logging
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

logger = logging.getLogger(__name__)

# Delimited text, whose columns have no types, and its separators; the caller must pass one where it is "" here.
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t", ".dat": "", ".data": "", ".txt": ""}
_ATOMIC_FILES = (".inter", ".item")  # RecBole's, whose headers name a type after each column
_ATOMIC_TYPES = ("token", "token_seq", "float", "float_seq")
_JSON_LINES = [".jsonl", ".ndjson", ".json"]
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}  # text files only
_FIRST_BYTES = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd", "lz4": b"\x04\x22\x4d\x18"}
_SEPARATOR_GUESSES = ["::", ";", "\t", ",", "|"]
_UNIT_SEPARATOR = "\x1f"  # replaces separators of several characters, because Arrow splits only at single ones
_JSON_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_BLOCK_BYTES = 16 << 20  # a row must fit into a block
_ROWS_PER_BATCH = 1 << 16
_NUMBER_OR_TIME = re.compile(r"[\d.:+TZ -]*\d[\d.:+TZ -]*")
# Only a writer that quotes values doubles the quotes inside them.
_QUOTED_BY_A_WRITER = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


@dataclass(frozen=True)
class TableFiles:
    """The files of one table, all of one type.

    Attributes:
        path: the file, or the folder of the files.
        files: the files in the order of their rows.
        suffix: the file type, such as ".csv".
        separator: the characters between the columns of delimited text; "" for other types.
        column_names: names of all columns of delimited text without a header; None if there is one.
    """

    path: Path
    files: tuple[Path, ...]
    suffix: str
    separator: str
    column_names: tuple[str, ...] | None = None

    @classmethod
    def at(
        cls, path: str | Path, separator: str | None = None, column_names: Sequence[str] | None = None
    ) -> "TableFiles":
        """The table at a path.

        Args:
            path: a file, or a folder of part files as Spark and Dask write it. Parts are read in the order of their
                names (part-2 before part-10); files whose names begin with "_" or "." are ignored.
            separator: the characters between the columns, such as "::"; by default a comma for CSV and a tab for TSV
                and RecBole's atomic files.
            column_names: names of all columns, for delimited text without a header.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            ValueError: the file type is unknown, the folder has other content, or `separator` or `column_names` does
                not apply.
        """
        path = Path(path).expanduser()
        files = _parts(path) if path.is_dir() else (path,)
        suffixes = {file_type(file) or file_type(path) for file in files}
        if suffixes == {""}:
            known = ", ".join([*_SEPARATORS, ".parquet", *_JSON_LINES])
            raise ValueError(
                f"{files[0]} has the file type {files[0].suffix!r}; expected one of {known} (text also with "
                f"{', '.join(_COMPRESSED)}): convert it, or pass a frame"
            )
        if len(suffixes) > 1:
            raise ValueError(
                f"folder {path} has files of the types {sorted(suffixes)}; expected parts of one table: move the "
                "others out"
            )
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}: check the path")
        (suffix,) = suffixes
        if separator is not None:
            separator = "\t" if separator == "\\t" else separator  # shells pass backslash and t
            is_text = isinstance(separator, str) and separator.isascii() and separator != ""
            if suffix not in _SEPARATORS or not is_text or set(separator) & set('"\r\n\0'):
                raise ValueError(
                    f"separator is {separator!r} for {path}; expected ASCII characters, for CSV, TSV or the like"
                )
        elif _SEPARATORS.get(suffix) == "":
            raise ValueError(
                f"{path} has the file type {suffix!r}, which does not tell the separator of its columns; expected the "
                "characters between them: pass separator, such as '::' or '\\t'"
            )
        if column_names is not None:
            if suffix not in _SEPARATORS or len(set(column_names)) < len(column_names) or not column_names:
                raise ValueError(
                    f"column_names are {list(column_names)} for {path}; expected distinct names of all columns of a "
                    "CSV, TSV or similar file without a header"
                )
            column_names = tuple(column_names)
        return cls(path, files, suffix, separator or _SEPARATORS.get(suffix, ""), column_names)

    @property
    def is_delimited_text(self) -> bool:
        """Whether the files are CSV, TSV or the like, so that their columns have no types."""
        return self.suffix in _SEPARATORS

    def batches(self, columns: Mapping[str, Hashable]) -> Iterator[pa.Table]:
        """Read named columns piece by piece; those of delimited text are strings, unchanged.

        Args:
            columns: the name in the files of each column of the result.

        Raises:
            ValueError: a file is unreadable, or a column is missing or repeated.
        """
        names = list(columns.values())
        quoted = self._is_quoted(names) if self.is_delimited_text else False
        for file in self._files_with_rows():
            with self._errors_named(file):
                if self.is_delimited_text and len(self.separator) > 1:
                    pieces = self._read_with_long_separator(file, names)
                elif self.is_delimited_text:
                    pieces = self._read_delimited(file, quoted, names)
                elif self.suffix == ".parquet":
                    pieces = _read_parquet(file, names)
                else:
                    pieces = _read_json_lines(file, names)
                for piece in pieces:
                    yield pa.table(dict(zip(columns, piece.columns, strict=True)))

    def _files_with_rows(self) -> list[Path]:
        """The files without the empty parts, plain or compressed, that Spark writes."""
        return [file for file in self.files if self._has_content(file)] or [self.files[0]]

    def _has_content(self, file: Path) -> bool:
        if file.stat().st_size == 0 or self.suffix == ".parquet":
            return file.stat().st_size > 0
        with self._errors_named(file), open_bytes(file) as stream:
            return any(block.strip() for block in iter(lambda: stream.read(1 << 16), b""))

    @contextmanager
    def _errors_named(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"{file} cannot be read: {error}; expected a whole {self.suffix} file in UTF-8 (JSON: one object per "
                "line), one type per column: fix the file, or read it with pandas and pass the frame"
            ) from error

    def _is_quoted(self, names: Sequence[Hashable]) -> bool:
        """Whether quotes in CSV or TSV files enclose values, or are ordinary characters.

        If a value begins with a quote, Arrow reads on to the next quote, across any number of rows. So quotes enclose
        values only if a writer that quotes could have written all files. Otherwise, this refuses CSV, and reads TSV,
        which many programs write without quoting, verbatim unless a writer has clearly quoted a value in it.
        """
        problems = {}
        for file in self._files_with_rows():
            with self._errors_named(file):
                self._find_delimited(file, names)  # reports missing columns and wrong separators first
                if len(self.separator) > 1:  # programs that write such separators do not quote
                    continue
                has_quotes, plain = _quotes_of(file, self.separator)
                if has_quotes:
                    problems[file] = ""
                if not plain:
                    with open_text(file) as text:
                        problems[file] = quoting_problem(text, self.separator)
        found = [(file, problem) for file, problem in problems.items() if problem]
        if not found:
            return bool(problems)
        file, problem = found[0]
        if self.separator == "\t" and not any(_is_written_with_quotes(file, self.separator) for file in problems):
            logger.warning("%s: %s; so all quotes in %s are read as ordinary characters", file, problem, self.path)
            return False
        raise ValueError(
            f"{file}: {problem}; expected quotes only around whole values, and doubled inside them, as pandas' "
            'to_csv writes them ("Say ""Yes"""): fix the line, or read the file with pandas.read_csv(..., quoting=3) '
            "and pass the frame"
        )

    def _find_delimited(self, file: Path, names: Sequence[Hashable]) -> list[str]:
        """The columns called `names`, as the header or `column_names` spells them."""
        line = _first_line(file)
        if not line:
            raise ValueError(f"{file} is empty; expected a line of column names and at least one row")
        if len(self.separator) > 1:
            header = line.split(self.separator)
        else:
            with open_text(file) as text:
                header = next(names for names in csv.reader(text, delimiter=self.separator) if names)
        try:
            if self.column_names is not None:
                header = self._checked_column_names(file, header)
            if self.suffix in _ATOMIC_FILES:
                present, wanted = [_without_type(name) for name in header], [_without_type(name) for name in names]
                return [header[find_column(present, name, str(file))] for name in wanted]
            return [header[find_column(header, name, str(file))] for name in names]
        except ValueError as error:
            fields = line.count(self.separator) + 1
            others = [other for other in _SEPARATOR_GUESSES if line.count(other) >= fields and other != self.separator]
            if not others:
                raise
            raise ValueError(
                f"{error}; expected columns separated by {self.separator!r}, but they look separated by "
                f"{others[0]!r}: pass separator={others[0]!r} (--separator on the command line; for a table of items, "
                "items_separator)"
            ) from error

    def _checked_column_names(self, file: Path, first_row: list[str]) -> list[str]:
        """Check `column_names` against the first row, which must have as many values and be no header."""
        names = list(self.column_names)
        if len(first_row) != len(names):
            raise ValueError(
                f"column_names are {names}, but the first line of {file} has {len(first_row)} values: expected a name "
                "for each column"
            )
        if any(name.strip() == value.strip() for name, value in zip(names, first_row, strict=True)):
            raise ValueError(
                f"column_names are {names}, but the first line of {file} is {first_row}: expected a row, not names; "
                "leave column_names out"
            )
        return names

    def _csv_options(self, names: list[str], quoted: bool, separator: str) -> dict:
        """Arrow's options to read the columns `names`, spelled as in the file, as text."""
        return {
            "read_options": pa.csv.ReadOptions(
                block_size=_BLOCK_BYTES, column_names=None if self.column_names is None else list(self.column_names)
            ),
            "parse_options": pa.csv.ParseOptions(
                delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            "convert_options": pa.csv.ConvertOptions(
                include_columns=names, column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        }

    def _read_delimited(self, file: Path, quoted: bool, names: Sequence[Hashable]) -> Iterator[pa.RecordBatch]:
        found = self._find_delimited(file, names)
        yield from pa.csv.open_csv(open_bytes(file), **self._csv_options(found, quoted, self.separator))

    def _read_with_long_separator(self, file: Path, names: Sequence[Hashable]) -> Iterator[pa.Table]:
        found = self._find_delimited(file, names)
        options = self._csv_options(found, False, _UNIT_SEPARATOR)
        header = b"" if self.column_names is not None else _first_line(file).encode()
        with open_bytes(file) as stream:
            for number, block in enumerate(blocks_of_lines(stream)):
                if _UNIT_SEPARATOR.encode() in block:
                    raise pa.ArrowInvalid(f"it has the control character {_UNIT_SEPARATOR!r}")
                lines = block if number == 0 else header + b"\n" + block
                lines = lines.replace(self.separator.encode(), _UNIT_SEPARATOR.encode())
                if lines.strip():
                    yield pa.csv.read_csv(pa.BufferReader(lines), **options)


def find_column(present: Sequence[Hashable], wanted: Hashable, where: str) -> int:
    """The index of the column with exactly this name, or else of the one with this name up to white space around it.

    Numbers, with which pandas names unnamed columns, equal their digits.

    Raises:
        ValueError: there is no such column, or more than one.
    """
    places = [place for place, name in enumerate(present) if name == wanted]
    if not places:
        places = [place for place, name in enumerate(present) if str(name).strip() == str(wanted).strip()]
    if len(places) == 1:
        return places[0]
    if places:
        raise ValueError(f"{where} has {len(places)} columns named {wanted!r}; expected one: rename or drop the others")
    close = difflib.get_close_matches(str(wanted), [str(name) for name in present], n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(f"{where} has no column {wanted!r}; it has {list(present)}{hint}")


def _parts(folder: Path) -> tuple[Path, ...]:
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(("_", "."))]
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders or not entries:
        contains = f"contains folders, such as {min(folders)}" if folders else "contains no files"
        raise ValueError(
            f"{folder} is a folder that {contains}; expected a file, or a folder of part files such as "
            "part-0.parquet: pass such a folder, or read it with pandas and pass the frame"
        )
    return tuple(sorted(entries, key=lambda file: _numbers_as_numbers(file.name)))


def _numbers_as_numbers(name: str) -> list[str | int]:
    """A sort key that puts part-2 before part-10: alternating text and numbers."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def file_type(path: Path) -> str:
    """The suffix that names the type of a table file, in lower case; "" if it is unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return ".parquet"
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in [*_SEPARATORS, *_JSON_LINES] else ""


def open_bytes(file: Path) -> pa.NativeFile:
    """Open a file, decompressing it if its first bytes or its suffix say that it is compressed."""
    with file.open("rb") as stream:
        begin = stream.read(4)
    by_content = (codec for codec, first_bytes in _FIRST_BYTES.items() if begin.startswith(first_bytes))
    by_suffix = _COMPRESSED.get(file.suffix.lower()) if begin else None
    return pa.input_stream(file, compression=next(by_content, by_suffix))


def open_text(file: Path) -> io.TextIOWrapper:
    """Open a file as `open_bytes` does, as text in UTF-8 with unchanged line ends."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline="")


def _quotes_of(file: Path, separator: str) -> tuple[bool, bool]:
    """Whether a file has quotes, and whether all of them plainly enclose values, each within its line.

    This takes a hundredth of the time of `quoting_problem`, which examines the remaining files.
    """
    found, plain, rest = False, True, b""
    with open_bytes(file) as stream:
        while plain and (block := stream.read(_BLOCK_BYTES)):
            lines, newline, rest = (rest + block).rpartition(b"\n")
            found |= b'"' in lines
            plain = _plainly_quoted(lines + newline, separator)
    return found or b'"' in rest, plain and _plainly_quoted(rest, separator)


def _plainly_quoted(lines: bytes, separator: str) -> bool:
    """Whether quotes open and close in turn, at the borders of a value, with no line end (in TSV, no tab) between."""
    if b'"' not in lines:
        return True
    text = np.frombuffer(b"\n" + lines.removeprefix(codecs.BOM_UTF8) + b"\n", np.uint8)
    quotes = np.flatnonzero(text == ord('"'))
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    borders = np.frombuffer(f'{separator}\r\n"'.encode(), np.uint8)  # a quote beside a quote is a doubled one
    if not (np.isin(text[opening - 1], borders).all() and np.isin(text[closing + 1], borders).all()):
        return False
    breaks = (text == ord("\n")) | (text == ord("\r"))
    if separator == "\t":
        breaks |= text == ord("\t")
    places = np.flatnonzero(breaks)
    return np.array_equal(np.searchsorted(places, opening), np.searchsorted(places, closing))


def quoting_problem(text: TextIO, separator: str) -> str:
    """Why the quotes in a text cannot enclose values, with the line; "" if they can.

    Args:
        text: a whole CSV or TSV file, opened with `newline=""`.
        separator: the character between the columns.
    """
    columns = start = 0  # `start` is the number of the first line of the current row
    row: list[str] = []  # lines of the current row

    def lines_of_rows_with_quotes() -> Iterator[str]:
        nonlocal columns, start
        for number, line in enumerate(text, 1):
            if columns == 0 and line.strip():
                columns = len(next(csv.reader([line], delimiter=separator)))
            if row or '"' in line:
                start = start if row else number
                row.append(line)
                yield line

    limit = csv.field_size_limit(_BLOCK_BYTES)
    try:
        for values in csv.reader(lines_of_rows_with_quotes(), delimiter=separator, strict=True):
            if len(values) != columns:
                return f"if quotes enclose values, line {start} has {len(values)} values, not {columns}"
            if _looks_like_rows(row, separator, columns):
                return f"the quote in line {start} swallows the {len(row) - 1} rows after it"
            row.clear()
    except csv.Error as error:
        return f"the quotes in line {start} are not closed properly ({error})"
    finally:
        csv.field_size_limit(limit)
    return ""


def _looks_like_rows(lines: list[str], separator: str, columns: int) -> bool:
    """Whether the lines of a quoted value are rows that a stray quote has swallowed, not prose."""
    first, *rest = ([value.strip() for value in line.split(separator)] for line in lines if line.strip())
    numbers = [place for place, value in enumerate(first) if _NUMBER_OR_TIME.fullmatch(value)]
    return (
        len(rest) > 0
        and all(len(values) == columns for values in (first, *rest))
        and all(not numbers or any(_is_number_or_empty(values[place]) for place in numbers) for values in rest)
    )


def _is_number_or_empty(value: str) -> bool:
    return not value or _NUMBER_OR_TIME.fullmatch(value) is not None


def _is_written_with_quotes(file: Path, separator: str) -> bool:
    with open_text(file) as text:
        return '"' in text.readline() or any(
            _QUOTED_BY_A_WRITER.fullmatch(value)
            for line in text
            if '""' in line
            for value in line.rstrip("\r\n").split(separator)
        )


def _first_line(file: Path) -> str:
    """The first line that is not blank, or "" if there is none."""
    with open_text(file) as text:
        return next((line.rstrip("\r\n") for line in text if line.strip()), "")


def _without_type(name: str) -> str:
    """The name of a column of an atomic file: "user_id" for "user_id:token"."""
    name, _, column_type = str(name).strip().rpartition(":")
    return name if column_type in _ATOMIC_TYPES else f"{name}:{column_type}" if name else column_type


def blocks_of_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """The content of a file, without a byte-order mark, in blocks of whole lines.

    Pass each block to Arrow's reader for whole files. Its streaming reader reads ahead in a thread and must not read a
    Python file: if it is released early, the interpreter can crash at exit.
    """
    rest = stream.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while block := stream.read(_BLOCK_BYTES):
        lines, newline, tail = (rest + block).rpartition(b"\n")
        rest = tail
        if newline:
            yield lines + newline
    if rest:
        yield rest


def _read_parquet(path: Path, names: Sequence[Hashable]) -> Iterator[pa.RecordBatch]:
    with pa.parquet.ParquetFile(path) as file:
        present = file.schema_arrow.names
        found = [present[find_column(present, name, str(path))] for name in names]
        for batch in file.iter_batches(columns=found):
            yield batch.select(found)


def _read_json_lines(path: Path, names: Sequence[Hashable]) -> Iterator[pa.Table]:
    types = _json_types(path, names)
    try:
        table = pa.json.read_json(
            open_bytes(path),
            read_options=pa.json.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=pa.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore"),
        ).select(list(types))
    except pa.ArrowInvalid as error:
        try:
            table = _read_json_lines_slowly(path, list(types))
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise error from None
    yield table


def _read_json_lines_slowly(path: Path, keys: list[str]) -> pa.Table:
    """Read files that Arrow refuses: fractions after whole numbers, or half characters in columns not asked for."""

    def named(pairs: list[tuple[str, object]]) -> dict:
        row = dict(pairs)
        if sum(key in keys for key, _ in pairs) > sum(key in row for key in keys):
            raise ValueError("a key occurs twice")
        return row

    decoder = json.JSONDecoder(object_pairs_hook=named)
    tables = []
    with open_text(path) as text:
        lines = (line for line in text if line.strip())
        while rows := [decoder.decode(line) for line in itertools.islice(lines, _ROWS_PER_BATCH)]:
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("a line is no object")
            tables.append(pa.table({key: pa.array([row.get(key) for row in rows]) for key in keys}))
    return pa.concat_tables(tables, promote_options="permissive")


def _json_types(path: Path, names: Sequence[Hashable]) -> dict[str, pa.DataType]:
    """The keys of the named columns, in their order, each with the type of its first value that is not null.

    Without them, Arrow would infer the types of all columns, needed or not, and turn text that looks like a time into
    times.
    """
    types, pending = {}, {str(name).strip() for name in names}
    with open_text(path) as text:
        for number, line in enumerate(text, 1):
            if not pending:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise pa.ArrowInvalid(f"line {number} is not JSON that can be read ({error})") from error
            if not isinstance(row, dict):
                raise pa.ArrowInvalid(f"line {number} is a {type(row).__name__}")
            for key, value in row.items():
                if types.setdefault(key, pa.null()) == pa.null() and value is not None:
                    types[key] = _JSON_TYPES.get(type(value)) or pa.infer_type([value])
                    pending.discard(key.strip())
    if not types:
        raise pa.ArrowInvalid("it has no rows")
    present = list(types)
    found = [present[find_column(present, name, str(path))] for name in names]
    return {name: types[name] for name in found}
