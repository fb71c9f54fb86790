"""Writes and reads the folder of a sequence data set: parquet files and a description that checks them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features

from hf_ilora.files import previous_folder
from hf_ilora.models.next_item.catalogue import open_parquet

from .sources import DataSource

SPLITS = ("train", "validation", "test")
CATALOGUE_FILE = "items.parquet"
DESCRIPTION_FILE = "sequences.json"
FORMAT_VERSION = 1
REMEDY = "prepare the data again, or restore the file"

CARD_FILE = "README.md"
DATA_FILES = {*(f"{split}.parquet" for split in SPLITS), CATALOGUE_FILE, DESCRIPTION_FILE}
# All files that a save writes. Earlier versions wrote no card.
FILES = {*DATA_FILES, CARD_FILE}
# Rows per parquet row group, and rows hashed at a time.
_ROWS_PER_BATCH = 1 << 17


def content_digest(dataset: Dataset | pa.Table) -> str:
    """sha256, in hex, of the column names and values, whatever the machine and the chunking."""
    if isinstance(dataset, Dataset):
        batches = dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH)
    else:
        batches = dataset.to_batches(max_chunksize=_ROWS_PER_BATCH)
    hashers = {}
    for batch in batches:
        for name in batch.schema.names:
            column = batch[name]
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                for part, values in _number_streams(name, chunk):
                    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
                    hashers.setdefault(part, hashlib.sha256()).update(np.ascontiguousarray(little_endian))
    return json_digest({part: hasher.hexdigest() for part, hasher in hashers.items()})


def json_digest(value: dict) -> str:
    """sha256, in hex, of a dictionary of JSON types; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """sha256, in hex, of the sha256 of each file, in the order of `paths`."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def write_parquet(dataset: Dataset, path: Path, features: Features) -> None:
    """Write `dataset` batch by batch, with the columns of `features`; list columns that it lacks become empty lists."""
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
            for field in schema:
                if field.name not in batch.column_names:
                    values = pa.array([], field.type.value_type)
                    offsets = np.zeros(len(batch) + 1, np.int32)
                    batch = batch.append_column(field, pa.ListArray.from_arrays(offsets, values))
            writer.write_table(batch.select(schema.names).cast(schema))


def read_parquet(path: Path, rows: int | None = None) -> pa.Table:
    """Read a whole file into memory.

    Args:
        path: the file.
        rows: number of rows that the file must have, checked before reading them; None accepts any.

    Raises:
        ValueError: it is not a complete parquet file, or has another number of rows.
    """
    try:
        # pq.read_table would add columns for folder names such as "seed=3", and reading all row groups at once would
        # need twice the memory of the table.
        with open_parquet(path, REMEDY) as file:
            if rows not in (None, file.metadata.num_rows):
                raise ValueError(
                    f"{path} has {file.metadata.num_rows} rows: expected {rows}, as {DESCRIPTION_FILE} says; {REMEDY}"
                )
            groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
            return pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}): {REMEDY}") from error


def write_description(folder: Path, description: dict) -> None:
    """Write sequences.json.

    Args:
        folder: folder of the data set.
        description: `protocol`, `num_items`, `counts`, `fingerprint` and, if known, `source`.
    """
    description = {"format_version": FORMAT_VERSION, **description}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_description(directory: Path) -> dict:
    """Read what `write_description` wrote to `directory`, and check that no file is missing.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: the description is damaged or of another version.
    """
    if not directory.is_dir():
        previous = previous_folder(directory.resolve())
        remedy = f"a save was interrupted: rename {previous} to it" if previous.exists() else "prepare the data first"
        raise FileNotFoundError(f"{directory} is not a folder: expected one that SequenceDatasets.save wrote; {remedy}")
    found = {path.name for path in directory.iterdir()}
    if not found >= DATA_FILES:
        raise FileNotFoundError(
            f"{directory} has no {', '.join(sorted(DATA_FILES - found))}: expected {', '.join(sorted(DATA_FILES))}, as "
            "SequenceDatasets.save writes them; prepare the data again, or pass another folder"
        )
    path = directory / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): {REMEDY}") from error
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}: expected {FORMAT_VERSION}; prepare the data again")
    for key, expected in {"protocol": dict, "counts": dict, "fingerprint": str}.items():
        if not isinstance(description.get(key), expected):
            raise ValueError(f"{path} has {key}={description.get(key)!r}: expected a {expected.__name__}; {REMEDY}")
    counts, protocol = description["counts"], description["protocol"]
    if set(counts) != set(SPLITS):
        raise ValueError(f"{path} has counts={counts}: expected those of {', '.join(SPLITS)}; {REMEDY}")
    if not is_count(description.get("num_items"), 1):
        raise ValueError(f"{path} has num_items={description.get('num_items')!r}: expected an int, 1 or more; {REMEDY}")
    if not all(is_count(count, 0) for count in counts.values()):
        raise ValueError(f"{path} has counts={counts}: expected an int, 0 or more, for each split; {REMEDY}")
    if not is_count(protocol.get("num_candidates"), 0):
        raise ValueError(f"{path} has a protocol without num_candidates: expected an integer; {REMEDY}")
    if not isinstance(protocol.get("name"), str):
        raise ValueError(f"{path} has a protocol without name: expected a string; {REMEDY}")
    if "source" in description:
        try:
            DataSource.from_json(description["source"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}") from error
    return description


def is_count(value: object, least: int) -> bool:
    """Whether a value read from JSON is an integer of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number_streams(part: str, array: pa.Array) -> Iterator[tuple[str, np.ndarray]]:
    """The values of `array` as named streams of numbers; concatenated arrays give concatenated streams."""
    if pa.types.is_list(array.type):
        yield f"{part}.lengths", array.value_lengths().to_numpy()
        yield from _number_streams(f"{part}.values", array.flatten())
    elif pa.types.is_string(array.type):
        yield f"{part}.lengths", pc.binary_length(array).to_numpy()
        joined = pc.binary_join(pa.ListArray.from_arrays([0, len(array)], array), "")[0]
        yield f"{part}.bytes", np.frombuffer(joined.as_buffer(), dtype=np.uint8)
    else:
        if part == "year":  # the only column that may be null
            yield f"{part}.is_null", array.is_null().to_numpy(zero_copy_only=False).view(np.uint8)
            array = array.fill_null(0)
        yield part, array.to_numpy()


__all__ = ["CARD_FILE", "CATALOGUE_FILE", "DATA_FILES", "DESCRIPTION_FILE", "FILES", "REMEDY", "SPLITS"]
__all__ += ["content_digest", "files_digest", "is_count", "json_digest", "read_description", "read_parquet"]
__all__ += ["write_description", "write_parquet"]
