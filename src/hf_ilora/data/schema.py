"""The columns and types of splits and catalogues, and checks of tables that were read from files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value

from .storage import REMEDY

# The columns of splits, in their order; `map` may add others.
SPLIT_COLUMNS = ("user_id", "history", "target", "relevant_items", "candidates")


def split_features(user_id_type: str, with_candidates: bool, with_relevant_items: bool = False) -> Features:
    """The columns of a split and their types; `user_id_type` is "int64" or "string"."""
    columns = {"user_id": Value(user_id_type), "history": List(Value("int32")), "target": Value("int32")}
    if with_relevant_items:
        columns["relevant_items"] = List(Value("int32"))
    if with_candidates:
        columns["candidates"] = List(Value("int32"))
    return Features(columns)


def catalogue_features(raw_id_type: str) -> Features:
    """The columns of a stored catalogue and their types; `raw_id_type` is "int64" or "string"."""
    return Features(
        {
            "item_id": Value("int64"),
            "raw_id": Value(raw_id_type),
            "title": Value("string"),
            "year": Value("int32"),
            "genres": List(Value("string")),
        }
    )


def split_columns(dataset: Dataset) -> list[str]:
    """The columns of `dataset` that splits are made of, without further ones."""
    return [name for name in SPLIT_COLUMNS if name in dataset.column_names]


def raw_id_type(table: pa.Table, column: str) -> str:
    """The type of a column of raw ids: "string" or "int64"; "int64" if it is missing, which `check_columns` reports."""
    is_string = column in table.column_names and pa.types.is_string(table.schema.field(column).type)
    return "string" if is_string else "int64"


def check_columns(table: pa.Table, features: Features, path: Path) -> None:
    """Raise a ValueError unless names and types are those of `features` and only years are null."""
    schema = features.arrow_schema
    if table.schema.names != schema.names or table.schema.types != schema.types:
        found, expected = (
            ", ".join(f"{field.name}: {field.type}" for field in each) for each in (table.schema, schema)
        )
        raise ValueError(f"{path} has the columns {found}: expected {expected}; {REMEDY}")
    for name in table.column_names:
        chunks = table[name].chunks
        nulls = sum(chunk.null_count + (chunk.values.null_count if _is_list(chunk) else 0) for chunk in chunks)
        if nulls and name != "year":
            raise ValueError(f"{path} has {nulls} null values in {name}: expected none; {REMEDY}")


def check_item_ids(table: pa.Table, num_items: int, path: Path) -> None:
    """Raise a ValueError unless all columns of a split but `user_id`, the first, have item ids of the catalogue."""
    for name in table.column_names[1:]:
        for chunk in filter(len, table[name].chunks):
            bounds = pc.min_max(chunk.flatten() if _is_list(chunk) else chunk)
            lowest, highest = bounds["min"].as_py(), bounds["max"].as_py()
            if lowest is None or lowest < 1 or highest > num_items:
                raise ValueError(
                    f"{path} has the values {lowest} to {highest} in {name}: expected item ids of the catalogue, 1 to "
                    f"{num_items}; {REMEDY}"
                )


def _is_list(chunk: pa.Array) -> bool:
    return pa.types.is_list(chunk.type)


__all__ = ["SPLIT_COLUMNS", "catalogue_features", "check_columns", "check_item_ids", "raw_id_type", "split_columns"]
__all__ += ["split_features"]
