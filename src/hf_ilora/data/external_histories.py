"""Reads histories that another program, such as Spark or Ray Data, has written as folders of parquet parts."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError

from hf_ilora.models.next_item.catalogue import Catalogue

from .columns import is_string, read_column
from .schema import catalogue_features, check_columns, check_item_ids, split_features
from .storage import SPLITS, read_parquet
from .table_files import TableFiles

_ROWS_PER_CHECK = 1 << 17


def read_external_histories(
    folder: Path, cache_dir: str | os.PathLike | None
) -> tuple[dict[str, Dataset], Catalogue, dict]:
    """The splits, the catalogue and the protocol of `SequenceDatasets.from_parquet`, which describes the folder."""
    items = [read_parquet(file) for file in _parquet_parts(folder / "items")]
    try:
        table = pa.concat_tables(items, promote_options="permissive")
        for name, feature in catalogue_features("int64").items():
            if name not in table.column_names and name in ("year", "genres"):
                nulls: list = [None if name == "year" else []] * len(table)
                table = table.append_column(name, pa.array(nulls, Features({name: feature}).arrow_schema[0].type))
        catalogue = Catalogue(table.drop_columns([name for name in ("count",) if name in table.column_names]))
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{folder / 'items'}: {error}") from error
    splits = {name: _external_split(folder / name, name, len(catalogue), cache_dir) for name in SPLITS}
    sizes = {_num_candidates(splits[name], folder / name) for name in ("validation", "test")}
    if len(sizes) > 1:
        raise ValueError(f"{folder} has {sorted(sizes)} candidates per row: expected as many in every row")
    return splits, catalogue, {"name": "external", "num_candidates": sizes.pop()}


def _parquet_parts(folder: Path) -> list[Path]:
    """The part files of a folder, in the order of their rows."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder: expected one of parquet parts; docs/data.md shows which folders and columns"
        )
    files = TableFiles.at(folder)
    if files.suffix != ".parquet":
        raise ValueError(f"{folder} has files of the type {files.suffix}: expected parquet parts")
    return list(files.files)


def _external_split(folder: Path, name: str, num_items: int, cache_dir: str | os.PathLike | None) -> Dataset:
    """A split that another program wrote, memory-mapped and checked."""
    files = _parquet_parts(folder)
    schema = pq.read_schema(files[0])
    if schema.names.count("user_id") != 1:
        raise ValueError(f"{files[0]} has the columns {', '.join(schema.names)}: expected user_id, history and target")
    id_type = "string" if is_string(schema.field("user_id").type) else "int64"
    features = split_features(id_type, name != "train" and "candidates" in schema.names)
    try:
        split = Dataset.from_parquet(
            [str(file) for file in files], features=features, columns=list(features), cache_dir=cache_dir, split=name
        )
    except (DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(
            f"{folder} cannot be read as {features} ({error.__cause__ or error}): write these columns with these types"
        ) from error
    for table in split.with_format("arrow").iter(batch_size=_ROWS_PER_CHECK):
        check_columns(table, features, folder)
        check_item_ids(table, num_items, folder)
        if pc.min(pc.list_value_length(table["history"])).as_py() == 0:
            raise ValueError(f"{folder} has rows with an empty history: expected at least one item; drop them")
    return split


def _num_candidates(split: Dataset, folder: Path) -> int:
    if "candidates" not in split.column_names:
        return 0
    lengths = pc.unique(pc.list_value_length(read_column(split, "candidates"))).to_pylist()
    if len(lengths) != 1:
        raise ValueError(f"{folder} has {sorted(lengths)} candidates per row: expected as many in every row")
    return lengths[0]


__all__ = ["read_external_histories"]
