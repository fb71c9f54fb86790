"""Histories that Spark or Ray Data wrote: folders of parquet parts become a data set as they are."""

import re
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.table import MemoryMappedTable

from hf_ilora import SequenceDatasets, build_sequences
from tests.paths import PROJECT
from tests.synthetic import cyclic_sequences


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=40)


@pytest.fixture
def folder(sequences, tmp_path):
    """The data set as Spark writes it: 32-bit lists, nullable columns, parts in numbered files, marks of success."""
    for name, split in sequences.items():
        table = split.with_format("arrow")[:]
        table = table.select(["target", "history", *(c for c in ("candidates",) if c in table.column_names), "user_id"])
        write_parts(table.append_column("extra", pa.nulls(len(table), pa.string())), tmp_path / "histories" / name)
    items = sequences.catalogue.table.select(["raw_id", "title", "item_id"])
    write_parts(items, tmp_path / "histories" / "items")
    return tmp_path / "histories"


def write_parts(table, folder, parts=3):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_SUCCESS").touch()
    for part, rows in enumerate(np.array_split(np.arange(len(table)), parts)):
        pq.write_table(table.take(rows), folder / f"part-{part:05}-3f2a-c000.snappy.parquet")


def rewrite(folder, change):
    """Replace a folder of parts by what `change` makes of the whole table."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))
    shutil.rmtree(folder)
    write_parts(change(table), folder)


def with_column(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, values(table))


def read(folder):
    return SequenceDatasets.from_parquet(folder, cache_dir=folder.parent / "cache")


def test_the_rows_come_back_in_order_and_mapped_to_memory(sequences, folder):
    found = read(folder)
    for name, split in sequences.items():
        assert found[name].to_dict() == split.to_dict()
        assert isinstance(found[name].data, MemoryMappedTable)
    assert found.catalogue.titles([1, 2]) == sequences.catalogue.titles([1, 2])
    assert np.array_equal(found.catalogue.counts, sequences.catalogue.counts)
    assert found.protocol == {"name": "external", "num_candidates": 5}


def test_they_are_saved_and_loaded_like_prepared_data(folder, tmp_path):
    found = read(folder)
    found.save(tmp_path / "data")
    assert SequenceDatasets.load(tmp_path / "data").fingerprint == found.fingerprint


def test_ids_may_be_64_bits_wide_and_candidates_absent(sequences, folder):
    wide = with_column("history", lambda table: table["history"].cast(pa.list_(pa.int64())))
    for name in sequences:
        rewrite(folder / name, lambda table: wide(table).select(["user_id", "history", "target"]))
    found = read(folder)
    assert found["test"]["history"][:] == sequences["test"]["history"][:]
    assert found.protocol["num_candidates"] == 0


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("train", lambda table: table.drop_columns("target"), "train cannot be read as"),
        ("train", with_column("target", lambda table: pa.array(["x"] * len(table))), "train cannot be read as"),
        ("train", with_column("target", lambda table: pa.array([99] * len(table))), "values 99 to 99 in target"),
        ("train", with_column("target", lambda table: pa.nulls(len(table), pa.int32())), "null values in target"),
        ("test", with_column("history", lambda table: pa.array([[1]] * 39 + [[]])), "rows with an empty history"),
        ("test", with_column("candidates", lambda table: pa.array([[1]] * 39 + [[1, 2]])), r"\[1, 2\] candidates per"),
        ("test", with_column("candidates", lambda table: pa.array([[1]] * 40)), r"\[1, 5\] candidates per row"),
        ("items", lambda table: table.drop_columns("title"), "items: .*title"),
        ("items", with_column("item_id", lambda table: pa.array(np.arange(len(table)))), "items: item ids must be 1"),
    ],
)
def test_parts_that_do_not_fit_the_schema_are_refused(part, change, message, folder):
    rewrite(folder / part, change)
    with pytest.raises(ValueError, match=message):
        read(folder)


def test_a_missing_folder_is_named(folder):
    shutil.rmtree(folder / "validation")
    with pytest.raises(FileNotFoundError, match="validation is not a folder: expected one of parquet parts"):
        read(folder)


def test_the_example_for_ray_data_gives_what_build_sequences_gives(tmp_path):
    """Its function, applied per user with pandas instead of Ray."""
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    function = re.search(r"```python\n(def row_of_user.*?)\n\n", page, re.DOTALL)[1]
    exec(function, scope := {"pd": pd})
    generator = np.random.default_rng(0)
    plays = pd.DataFrame(
        {
            "user": np.repeat(np.arange(30), 9),
            "item_id": np.concatenate([generator.permutation(np.arange(1, 41))[:9] for _ in range(30)]),
            "when": generator.integers(0, 5, 270),
        }
    )
    ids = np.arange(1, 41)
    assert set(plays["item_id"]) == set(ids)
    for name, left_out in (("train", 2), ("validation", 1), ("test", 0)):
        rows = pd.concat([scope["row_of_user"](group, left_out) for _, group in plays.groupby("user")])
        write_parts(pa.Table.from_pandas(rows, preserve_index=False), tmp_path / "histories" / name)
    titles = [f"Title {item}" for item in ids]
    write_parts(pa.table({"item_id": ids, "raw_id": ids, "title": titles}), tmp_path / "histories" / "items")
    found = read(tmp_path / "histories")
    interactions = pa.table({"user_id": plays["user"], "item_id": plays["item_id"], "timestamp": plays["when"]})
    years, genres = pa.nulls(40, pa.int32()), pa.array([[]] * 40, pa.list_(pa.string()))
    items = pa.table({"item_id": ids, "title": titles, "year": years, "genres": genres})
    expected = build_sequences(Dataset(interactions), Dataset(items), num_candidates=0)
    for name, split in expected.items():
        assert found[name].to_dict() == split.to_dict()
