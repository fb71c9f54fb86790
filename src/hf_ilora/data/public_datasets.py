"""Loads public data sets by name from the files that their authors publish."""

import ast
import html
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from datasets import Dataset

from .interactions import interactions_dataset, items_dataset
from .sources import with_source
from .table_files import open_bytes, open_text
from .tables import check_row_limit, clean_ids, clean_ratings, clean_seconds, clean_text, read_columns

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 16 << 20
_ROWS_PER_BATCH = 1 << 16
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".rar", ".7z")
_LASTFM_BEGAN = 1_009_843_200  # 2002, in seconds since 1970
_ASIN = re.compile(r"""['"]asin['"]: ?['"]([^'"]*)['"]""")


@dataclass(frozen=True)
class _Published:
    """The content of the files of a data set.

    Attributes:
        columns: user_id, item_id, time and, for rated data, rating, (rows,) in the order of the interactions.
        where: the file, for error messages.
        read_titles: returns the columns item_id and title for at least the given items, in any order, with repeats;
            None for data without titles.
    """

    columns: pa.Table
    where: str
    read_titles: Callable[[pa.Array], pa.Table] | None = None


def load_public_dataset(
    name: str,
    path: str | Path,
    limit_data_rows: int = -1,
    *,
    items: str | Path | None = None,
    missing_titles: str = "raise",
) -> tuple[Dataset, Dataset]:
    """Load a public data set from a folder with its published files, plain or compressed with gzip.

    Names:
        "amazon-2014": a category of Amazon Reviews 2014: `reviews_Beauty_5.json.gz` or `ratings_Beauty.csv`, with
            `meta_Beauty.json.gz`. Lines may be JSON or Python literals.
        "amazon-2023": a category of Amazon Reviews 2023: `All_Beauty.jsonl.gz`, or `All_Beauty.csv.gz` of its
            benchmark, with `meta_All_Beauty.jsonl.gz`. Items are identified by `parent_asin`.
        "steam": `steam_reviews.json.gz` and `steam_games.json.gz` of SASRec. Users are identified by name.
        "yelp": `yelp_academic_dataset_review.json` and `yelp_academic_dataset_business.json`.
        "gowalla": `loc-gowalla_totalCheckins.txt.gz` of SNAP. It has no titles, so the ids serve as titles.
        "lastfm-1k": `userid-timestamp-artid-artname-traid-traname.tsv`. Items are artists, identified by name, because
            many rows have no other id.
        "lastfm-1k-tracks": the same file. Items are tracks, identified by "artist - track".
        "lastfm-2k": `user_taggedartists-timestamps.dat` and `artists.dat` of HetRec 2011: who tagged which artist.
            (Its table of listening counts has no times.) Several tags of a user for an artist at the same time are one
            interaction. Times before 2002, when LastFM began, are dropped.

    Files that begin with the newest interaction are read backwards, so that interactions at the same time end up in
    chronological order. Rows without a user or an item are dropped, with a warning. Filter with the options of
    `build_sequences`: k-core, `min_rating` (Amazon and Yelp have ratings) and `drop_repeats`.

    Args:
        name: one of the above.
        path: the folder of the files, or the file of the interactions.
        limit_data_rows: number of rows to load, from the first; -1 for all.
        items: the file of the titles, if it is in another folder.
        missing_titles: what to do if items, or the whole file of titles, are missing: "raise", or "item_id" to use the
            ids as titles.

    Returns:
        interactions: user_id, item_id (int64 for Gowalla and LastFM-2K, else string), timestamp (seconds: int64, or
            float64 with fractions) and, for Amazon and Yelp, rating (float64).
        items: item_id, title (without HTML entities), year (null) and genres (empty lists), in order of appearance;
            only items with interactions.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the name is unknown, a file has another format, or items have no title.
    """
    check_row_limit(limit_data_rows)
    if name not in _READERS:
        raise ValueError(f"there is no public data set {name!r}; expected one of {', '.join(_READERS)}")
    if missing_titles not in ("raise", "item_id"):
        raise ValueError(f"missing_titles is {missing_titles!r}; expected 'raise' or 'item_id'")
    if items is not None and name in UNTITLED:
        raise ValueError(f"items is given for {name}, which has no titles but its ids: leave it out")
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"path {path} does not exist; expected the folder of the files of {name}")
    if path.is_file() and path.name.lower().endswith(_ARCHIVES):
        raise ValueError(f"{path} is an archive; expected the folder of its files: unpack it, and pass the folder")
    items = None if items is None else Path(items).expanduser()
    if items is not None and not items.is_file():
        raise FileNotFoundError(f"there is no file {items}: check items, the file of the titles")
    published = _READERS[name](path, limit_data_rows, items)
    interactions = _clean(published)
    item_ids = pc.unique(interactions["item_id"])
    titles = None
    if published.read_titles is not None:
        try:
            titles = _first_titles(item_ids, published.read_titles(item_ids))
        except FileNotFoundError as error:
            if missing_titles == "raise":
                raise FileNotFoundError(
                    f"{error}, or pass missing_titles='item_id' to use the ids as titles"
                ) from error
        if titles is not None and titles.null_count and missing_titles == "raise":
            untitled = item_ids.filter(pc.is_null(titles))
            raise ValueError(
                f"{len(untitled):,} of {len(item_ids):,} items of {name} have no title, first "
                f"{untitled[:5].to_pylist()}; expected one for each: pass missing_titles='item_id' to use the ids as "
                "titles"
            )
    return with_source(
        name, interactions_dataset(**interactions), items_dataset(item_ids, titles, normalize_titles=False)
    )


def _clean(published: _Published) -> dict[str, pa.ChunkedArray]:
    """The clean columns user_id, item_id, timestamp and, if there is one, rating, of rows with a user and an item."""
    table, where = published.columns, published.where
    complete = None
    for name in ("user_id", "item_id"):
        if pa.types.is_string(table.schema.field(name).type):
            ids = pc.utf8_trim_whitespace(table[name])
            complete_ids = pc.not_equal(pc.coalesce(ids, ""), "")
            complete = complete_ids if complete is None else pc.and_(complete, complete_ids)
    if complete is not None and not pc.all(complete).as_py():
        kept = table.filter(complete)
        logger.warning("%s: dropped %d rows without a user or an item", where, len(table) - len(kept))
        table = kept
    if len(table) == 0:
        raise ValueError(f"{where} has no row with a user and an item; expected at least one: download the file again")
    columns = {name: clean_ids(table[name], f"{name} of {where}") for name in ("user_id", "item_id")}
    columns["timestamp"] = clean_seconds(table["time"], f"time of {where}")
    if "rating" in table.column_names:
        columns["rating"] = clean_ratings(table["rating"], f"rating of {where}")
    return columns


def _first_titles(item_ids: pa.Array, known: pa.Table) -> pa.ChunkedArray:
    """The first non-blank title of each item, without HTML entities; null if there is none."""
    known_ids, titles = known["item_id"], clean_text(known["title"], "title")
    if pa.types.is_string(known_ids.type):
        known_ids = pc.utf8_trim_whitespace(known_ids)
    known_ids, titles = known_ids.filter(pc.is_valid(titles)), titles.drop_null()
    found = titles.take(pc.index_in(item_ids, value_set=known_ids))  # the first title of repeated ids
    if pc.any(pc.match_substring(found, "&")).as_py():
        found = pa.chunked_array([[title and html.unescape(title) for title in found.to_pylist()]], pa.string())
    return found


# --- finding files ---


def _interactions_file(path: Path, patterns: Sequence[str], name: str, folders: Sequence[str] = ()) -> Path:
    """The file of the interactions: `path` itself, or the only file in it or in `folders` that fits a pattern."""
    if path.is_file():
        return path
    places = [path, *(path / folder for folder in folders)]
    found = sorted({file for place in places for pattern in patterns for file in place.glob(pattern)})
    found = [file for file in found if not file.name.startswith("meta_")]
    if len(found) > 1:
        raise ValueError(
            f"{path} has {len(found)} files of {name}: {', '.join(file.name for file in found[:10])}; expected one: "
            "pass the file itself as path"
        )
    if not found:
        present = sorted(entry.name for entry in path.iterdir())[:10]
        raise FileNotFoundError(
            f"{path} contains {present}; expected {' or '.join(patterns)}, the file of {name}: pass the folder that "
            "has it"
        )
    return found[0]


def _titles_file(items: Path | None, reviews: Path, names: Sequence[str], folder: str = ".") -> Path:
    """The file of the titles: `items`, or one of `names` beside the interactions or in `folder` relative to them."""
    if items is not None:
        return items
    places = [place / name for place in (reviews.parent, reviews.parent / folder) for name in names]
    found = next((file for file in places if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"there is no {names[0]} beside {reviews}; expected it for the titles: download it there, or pass items="
        )
    return found


def _plain_or_gz(*names: str) -> list[str]:
    return [f"{name}{suffix}" for name in names for suffix in ("", ".gz")]


# --- reading files ---


def _read(path: Path, columns: dict[str, str], limit: int = -1, **text_options: Any) -> pa.Table:
    table, _ = read_columns(path, columns, limit, **text_options)
    return table


def _read_tabs(path: Path, names: Sequence[str], columns: dict[str, str], limit: int = -1, skip: int = 0) -> pa.Table:
    """Read named columns of unquoted text with tabs, as text; lines with another number of values are skipped.

    Args:
        path: the file.
        names: names of all columns in the file.
        columns: the name in the file of each column of the result.
        limit: number of rows; -1 for all.
        skip: lines before the first row.
    """
    wrong = []

    def note(row: pa.csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    pieces, rows = [], 0
    try:
        with pa.csv.open_csv(
            open_bytes(path),
            read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=list(names), skip_rows=skip),
            parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=note),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(columns.values()),
                column_types=dict.fromkeys(columns.values(), pa.string()),
                strings_can_be_null=False,
            ),
        ) as reader:
            for piece in reader:
                pieces.append(piece)
                rows += piece.num_rows
                if limit != -1 and rows >= limit:
                    break
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; expected lines in UTF-8 with {', '.join(names)} and tabs between them: "
            "download the file again"
        ) from error
    if wrong:
        logger.warning(
            "%s: skipped %d lines that have not %d values, first %r", path, len(wrong), len(names), wrong[0].text[:200]
        )
    table = pa.Table.from_batches(pieces) if pieces else pa.table({name: [] for name in columns.values()})
    if len(table) == 0:
        raise ValueError(
            f"{path} has no line of {', '.join(names)} with tabs between them; expected at least one: download the "
            "file again"
        )
    return table.rename_columns(list(columns)).slice(0, None if limit == -1 else limit)


def _read_literals(
    path: Path,
    columns: dict[str, str],
    limit: int = -1,
    wanted: set[str] | None = None,
    numbers: Sequence[str] = (),
) -> pa.Table:
    """Read named columns of lines that are JSON or Python literals, such as {u'asin': u'B01'}, without running them.

    Args:
        path: the file.
        columns: the key in the lines of each column of the result; values other than text become null.
        limit: number of rows; -1 for all.
        wanted: read only lines whose first value of `asin` is one of these, which saves most of the time.
        numbers: columns of the result that are float64; values other than numbers become null.
    """

    def parsed(number: int, line: str) -> dict:
        try:
            row = json.loads(line) if line.startswith('{"') else ast.literal_eval(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"line {number} of {path} is {line[:100]!r}: expected an object of JSON or of Python's literals "
                f"({error}); download the file again"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f"line {number} of {path} is a {type(row).__name__}: expected an object with keys; download the file "
                "again"
            )
        return row

    def rows() -> Iterator[dict]:
        for number, line in enumerate(text, 1):
            if wanted is not None and (asin := _ASIN.search(line)) is not None and asin[1] not in wanted:
                continue
            if line.strip():
                yield parsed(number, line.strip())

    pieces = []
    try:
        with open_text(path) as text:
            remaining = itertools.islice(rows(), None if limit == -1 else limit)
            while batch := list(itertools.islice(remaining, _ROWS_PER_BATCH)):
                values = {name: [row.get(key) for row in batch] for name, key in columns.items()}
                pieces.append(
                    pa.table({name: (_numbers if name in numbers else _texts)(values[name]) for name in columns})
                )
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected text in UTF-8: download the file again") from error
    return pa.concat_tables(pieces) if pieces else pa.table({name: pa.array([], pa.string()) for name in columns})


def _begins_with_literal(path: Path) -> bool:
    """Whether the first line is a Python dictionary, not JSON."""
    with open_text(path) as text:
        return text.readline().lstrip().startswith(("{'", "{u'"))


def _texts(values: list) -> pa.Array:
    texts = [value if isinstance(value, str) else None for value in values]
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        # Some builds of Python 2 print characters such as emojis as two surrogates, u'\ud83d\ude0a'.
        whole = [text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        return pa.array(whole, pa.string())


def _numbers(values: list) -> pa.Array:
    return pa.array([value if isinstance(value, int | float) else None for value in values], pa.float64())


# --- the data sets ---


def _amazon_2014(path: Path, limit: int, items: Path | None) -> _Published:
    patterns = [*_plain_or_gz("reviews_*.json"), *_plain_or_gz("ratings_*.csv")]
    file = _interactions_file(path, patterns, "amazon-2014")
    columns = {"user_id": "reviewerID", "item_id": "asin", "time": "unixReviewTime", "rating": "overall"}
    if ".csv" in file.suffixes:
        table = _read(file, columns, limit, column_names=["reviewerID", "asin", "overall", "unixReviewTime"])
    elif _begins_with_literal(file):
        table = _read_literals(file, columns, limit, numbers=("time", "rating"))
    else:
        table = _read(file, columns, limit)
    category = re.sub(r"^(reviews|ratings)_|(_\d+)?(\.json|\.csv)(\.gz)?$", "", file.name)  # _5 marks the 5-core

    def read_titles(item_ids: pa.Array) -> pa.Table:
        metadata = _titles_file(items, file, _plain_or_gz(f"meta_{category}.json"))
        return _read_literals(metadata, {"item_id": "asin", "title": "title"}, wanted=set(item_ids.to_pylist()))

    return _Published(table, str(file), read_titles)


def _amazon_2023(path: Path, limit: int, items: Path | None) -> _Published:
    patterns = [*_plain_or_gz("*.jsonl"), *_plain_or_gz("*.csv")]
    file = _interactions_file(path, patterns, "amazon-2023", ["review_categories"])
    columns = {"user_id": "user_id", "item_id": "parent_asin", "time": "timestamp", "rating": "rating"}
    table = _read(file, columns, limit)
    category = re.sub(r"(\.train|\.valid|\.test)?(\.jsonl|\.csv)(\.gz)?$", "", file.name)

    def read_titles(_: pa.Array) -> pa.Table:
        metadata = _titles_file(items, file, _plain_or_gz(f"meta_{category}.jsonl"), "../meta_categories")
        return _read(metadata, {"item_id": "parent_asin", "title": "title"})

    return _Published(_with_seconds(table, file), str(file), read_titles)


def _steam(path: Path, limit: int, items: Path | None) -> _Published:
    file = _interactions_file(path, _plain_or_gz("steam_reviews.json", "steam_new.json"), "steam")
    columns = {"user_id": "username", "item_id": "product_id", "time": "date"}
    logger.info("reading %s line by line: about a minute of processor time per million lines", file)

    def read_titles(_: pa.Array) -> pa.Table:
        metadata = _titles_file(items, file, _plain_or_gz("steam_games.json"))
        games = _read_literals(metadata, {"item_id": "id", "title": "app_name", "other_title": "title"})
        return games.set_column(1, "title", pc.coalesce(games["title"], games["other_title"]))

    return _Published(_read_literals(file, columns, limit), str(file), read_titles)


def _yelp(path: Path, limit: int, items: Path | None) -> _Published:
    file = _interactions_file(path, _plain_or_gz("yelp_academic_dataset_review.json"), "yelp")
    columns = {"user_id": "user_id", "item_id": "business_id", "time": "date", "rating": "stars"}

    def read_titles(_: pa.Array) -> pa.Table:
        metadata = _titles_file(items, file, _plain_or_gz("yelp_academic_dataset_business.json"))
        return _read(metadata, {"item_id": "business_id", "title": "name"})

    return _Published(_read(file, columns, limit), str(file), read_titles)


def _gowalla(path: Path, limit: int, items: Path | None) -> _Published:
    file = _interactions_file(path, _plain_or_gz("loc-gowalla_totalCheckins.txt"), "gowalla")
    names = ["user", "check-in time", "latitude", "longitude", "location id"]
    columns = {"user_id": "user", "item_id": "location id", "time": "check-in time"}
    return _Published(_backwards(_with_integer_ids(_read_tabs(file, names, columns, limit), file)), str(file))


def _lastfm_1k(path: Path, limit: int, items: Path | None, *, tracks: bool = False) -> _Published:
    names = ["userid", "timestamp", "artid", "artname", "traid", "traname"]
    file = _interactions_file(path, _plain_or_gz(f"{'-'.join(names)}.tsv"), "lastfm-1k", ["lastfm-dataset-1K"])
    columns = {"user_id": "userid", "item_id": "artname", "time": "timestamp", "track": "traname"}
    table = _read_tabs(file, names, columns, limit)
    if tracks:
        artists, titles = (pc.utf8_trim_whitespace(table[name]) for name in ("item_id", "track"))
        has_both = pc.and_(pc.not_equal(artists, ""), pc.not_equal(titles, ""))
        item_ids = pc.if_else(has_both, pc.binary_join_element_wise(artists, titles, " - "), "")
        table = table.set_column(1, "item_id", item_ids)
    return _Published(_backwards(table.drop_columns("track")), str(file))


def _lastfm_1k_tracks(path: Path, limit: int, items: Path | None) -> _Published:
    return _lastfm_1k(path, limit, items, tracks=True)


def _lastfm_2k(path: Path, limit: int, items: Path | None) -> _Published:
    patterns, folders = ["user_taggedartists-timestamps.dat"], ["hetrec2011-lastfm-2k"]
    file = _interactions_file(path, patterns, "lastfm-2k", folders)
    names = _header_of_tabs(file, ["userID", "artistID", "tagID", "timestamp"])
    columns = {"user_id": "userID", "item_id": "artistID", "time": "timestamp"}
    table = _with_seconds(_with_integer_ids(_read_tabs(file, names, columns, limit, skip=1), file), file)
    table = table.group_by(table.column_names, use_threads=False).aggregate([])  # each tag of an artist is a row
    real = table.filter(pc.greater_equal(table["time"], _LASTFM_BEGAN))
    if len(real) < len(table):
        logger.warning("%s: dropped %d rows with times before 2002", file, len(table) - len(real))

    def read_titles(_: pa.Array) -> pa.Table:
        metadata = _titles_file(items, file, ["artists.dat"])
        header = _header_of_tabs(metadata, ["id", "name", "url", "pictureURL"])
        artists = _read_tabs(metadata, header, {"item_id": "id", "title": "name"}, skip=1)
        return artists.set_column(0, "item_id", _integers(artists["item_id"], f"id of {metadata}"))

    return _Published(real, str(file), read_titles)


def _header_of_tabs(path: Path, expected: list[str]) -> list[str]:
    """Check that the first line has the `expected` names, and return them."""
    with open_text(path) as text:
        line = text.readline()
    if line.strip().split("\t") != expected:
        raise ValueError(f"{path} begins with {line[:200]!r}; expected the names {expected}: download the file again")
    return expected


def _with_seconds(table: pa.Table, file: Path) -> pa.Table:
    """The table with its column time converted from milliseconds to seconds."""
    milliseconds = clean_ratings(table["time"], f"timestamp of {file}")  # float64 represents them exactly
    return table.set_column(table.column_names.index("time"), "time", pc.divide(milliseconds, 1000.0))


def _with_integer_ids(table: pa.Table, file: Path) -> pa.Table:
    for place, name in enumerate(("user_id", "item_id")):
        table = table.set_column(place, name, _integers(table[name], f"{name} of {file}"))
    return table


def _integers(text: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    try:
        return clean_ids(text, where).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(f"{where}: {error}; expected whole numbers: download the file again") from error


def _backwards(table: pa.Table) -> pa.Table:
    """The rows in reverse order, for files that begin with the newest."""
    return table.take(np.arange(len(table))[::-1].copy())


_READERS = {
    "amazon-2014": _amazon_2014,
    "amazon-2023": _amazon_2023,
    "steam": _steam,
    "yelp": _yelp,
    "gowalla": _gowalla,
    "lastfm-1k": _lastfm_1k,
    "lastfm-1k-tracks": _lastfm_1k_tracks,
    "lastfm-2k": _lastfm_2k,
}
PUBLIC_DATASETS = tuple(_READERS)
RATED = ("amazon-2014", "amazon-2023", "yelp")
UNTITLED = ("gowalla", "lastfm-1k", "lastfm-1k-tracks")

__all__ = ["PUBLIC_DATASETS", "RATED", "load_public_dataset"]
