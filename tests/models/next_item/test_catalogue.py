"""The catalogue that travels with a model: lookups, its file, and what it refuses."""

import subprocess
import sys
from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE, Catalogue


def table(**changes):
    columns = {
        "item_id": pa.array([1, 2, 3]),
        "raw_id": pa.array(["B07", "A11", "B09"]),
        "title": pa.array(["Toy Story", "Heat", "Casino"]),
        "year": pa.array([1995, None, 1995], pa.int32()),
        "genres": pa.array([["Animation"], [], None], pa.list_(pa.string())),
        **changes,
    }
    return pa.table({name: column for name, column in columns.items() if column is not None})


def integer_catalogue():
    return Catalogue(table(raw_id=pa.array([10, 30, 20])))


def test_titles_and_raw_ids_follow_the_order_asked_for():
    catalogue = Catalogue(table())
    assert len(catalogue) == 3
    assert catalogue.titles([3, 1, 3]) == ["Casino", "Toy Story", "Casino"]
    assert catalogue.raw_ids([2, 1]) == ["A11", "B07"]
    assert catalogue.titles([]) == []


@pytest.mark.parametrize("as_ids", [torch.tensor, np.array, tuple, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_lookups_take_tensors_and_arrays(as_ids):
    assert integer_catalogue().titles(as_ids([2, 1])) == ["Heat", "Toy Story"]


def test_item_ids_undo_raw_ids():
    for catalogue in (Catalogue(table()), integer_catalogue()):
        assert catalogue.item_ids(catalogue.raw_ids([3, 1, 2])) == [3, 1, 2]
    assert integer_catalogue().item_ids(np.array([20, 10])) == [3, 1]


@pytest.mark.parametrize("lookup", [Catalogue.titles, Catalogue.raw_ids])
def test_padding_has_no_title_and_no_raw_id(lookup):
    with pytest.raises(ValueError, match="item id 0 is padding"):
        lookup(Catalogue(table()), [1, 0])


@pytest.mark.parametrize("item_id", [4, -1])
def test_an_item_id_outside_the_catalogue_is_named(item_id):
    with pytest.raises(ValueError, match=f"item id {item_id} is outside the catalogue: expected 1 to 3"):
        Catalogue(table()).titles([1, item_id])


@pytest.mark.parametrize("item_ids", [[1.0], [[1, 2]], ["1"], [True]])
def test_item_ids_of_a_wrong_type_or_shape_are_refused(item_ids):
    with pytest.raises(ValueError, match=r"expected integers of shape \(items,\)"):
        Catalogue(table()).titles(item_ids)


def test_an_unknown_raw_id_is_answered_with_close_matches():
    with pytest.raises(ValueError, match=r"raw id 'B08' is not among the 3 items.*closest are 'B0"):
        Catalogue(table()).item_ids(["A11", "B08"])
    with pytest.raises(ValueError, match=r"raw id 'zzz' is not among the 3 items"):
        Catalogue(table()).item_ids(["zzz"])


def test_a_raw_id_of_the_wrong_type_is_told_apart_from_an_unknown_one():
    with pytest.raises(ValueError, match="expected integers such as 10, found a string"):
        integer_catalogue().item_ids(["10"])
    with pytest.raises(ValueError, match="expected strings such as 'B07', found int"):
        Catalogue(table()).item_ids([7])
    with pytest.raises(ValueError, match=r"expected a list of raw ids, such as \['A11'\]"):
        Catalogue(table()).item_ids("A11")
    with pytest.raises(ValueError, match=r"raw_ids is 10: expected a list of raw ids, such as \[10\]"):
        integer_catalogue().item_ids(10)
    with pytest.raises(ValueError, match="columns is the string 'title': expected a list of names, such as"):
        Catalogue(table()).take([1], "title")


def test_a_saved_catalogue_comes_back_equal(tmp_path):
    for catalogue in (Catalogue(table()), Catalogue(table(year=None, genres=None)), integer_catalogue()):
        catalogue.to_parquet(tmp_path / CATALOGUE_FILE)
        loaded = Catalogue.from_parquet(tmp_path / CATALOGUE_FILE)
        assert loaded == catalogue and loaded.fingerprint == catalogue.fingerprint
        assert [path.name for path in tmp_path.iterdir()] == [CATALOGUE_FILE]


def test_counts_of_training_are_an_optional_column(tmp_path):
    assert Catalogue(table()).counts is None
    counted = Catalogue(table()).with_counts(np.array([9, 2, 0, 5]))
    assert counted.counts.tolist() == [0, 2, 0, 5] and counted != Catalogue(table())
    assert counted.with_counts(np.array([0, 1, 1, 1])).counts.tolist() == [0, 1, 1, 1]
    counted.to_parquet(tmp_path / CATALOGUE_FILE)
    assert Catalogue.from_parquet(tmp_path / CATALOGUE_FILE) == counted
    for wrong in ([1, -1, 2], [1, None, 2]):
        with pytest.raises(ValueError, match="column count has values that are missing or negative"):
            Catalogue(table(count=pa.array(wrong)))


def test_a_catalogue_grows_by_rows_of_its_own_columns():
    catalogue, whole = Catalogue(table().slice(0, 2)), Catalogue(table())
    grown = catalogue.grown_by(whole.table.slice(2))
    assert grown == whole and grown.item_ids(["B09"]) == [3] and len(catalogue) == 2


def test_rows_in_another_order_or_another_arrow_type_are_the_same_catalogue():
    large = table(
        item_id=pa.array([1, 2, 3], pa.int32()), title=pa.array(["Toy Story", "Heat", "Casino"], pa.large_string())
    )
    shuffled = large.take([2, 0, 1])
    assert Catalogue(shuffled) == Catalogue(table())
    assert Catalogue(shuffled).fingerprint == Catalogue(table()).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"title": pa.array(["Toy Story", "Heat", "Casino "])},
        {"raw_id": pa.array(["B07", "A11", "B10"])},
        {"year": None},
        {"year": pa.array([1995, 1996, 1995], pa.int32())},
    ],
)
def test_another_content_is_another_catalogue(changes):
    assert Catalogue(table(**changes)) != Catalogue(table())
    assert Catalogue(table(**changes)).fingerprint != Catalogue(table()).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": None}, "found item_id, raw_id, year, genres; rename or drop"),
        ({"size": pa.array([{"w": 1}] * 3)}, "size has type struct.*: expected numbers, text, times or lists of them"),
        ({"image": pa.array([b"a", b"b", b"c"])}, "image has type binary: expected numbers"),
        ({"item_id": pa.array([1, 2, 4])}, "must be 1 to 3, one per row: 3 is missing"),
        ({"item_id": pa.array([1, 2, 2])}, "2 occurs more than once"),
        ({"item_id": pa.array([0, 1, 2])}, r"0 is below 1 \(0 is padding\)"),
        ({"item_id": pa.array([1.0, 2.0, 3.0])}, "item_id has type double: expected int64"),
        ({"item_id": pa.array([1, None, 3])}, "item_id has no value in row 1"),
        ({"raw_id": pa.array(["a", "b", "a"])}, "raw id 'a' occurs more than once"),
        ({"raw_id": pa.array([1.5, 2.5, 3.5])}, "raw_id has type double: expected int64 or string"),
        ({"raw_id": pa.array(["a", "b", None])}, "raw_id has no value in row 2"),
        ({"title": pa.array(["Toy Story", None, "Casino"])}, "title has no value in row 1"),
        ({"title": pa.array([1, 2, 3])}, "title has type int64: expected string"),
        ({"year": pa.array(["x", "y", "z"])}, "do not fit .*year int32"),
        ({"genres": pa.array(["x", "y", "z"])}, r"do not fit .*genres list<item: string>"),
    ],
)
def test_a_table_that_is_no_catalogue_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(table(**changes))


def test_an_empty_catalogue_and_a_repeated_column_are_refused():
    with pytest.raises(ValueError, match="the catalogue is empty"):
        Catalogue(table().slice(0, 0))
    with pytest.raises(ValueError, match="once each: found item_id, raw_id, title, title"):
        Catalogue(pa.Table.from_arrays([[1], ["a"], ["A"], ["B"]], names=["item_id", "raw_id", "title", "title"]))


def test_a_missing_foreign_or_truncated_file_is_refused_and_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no catalogue at"):
        Catalogue.from_parquet(tmp_path / "absent.parquet")
    path = tmp_path / CATALOGUE_FILE
    Catalogue(table()).to_parquet(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"item_id,raw_id,title\n1,1,Heat\n", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"items\.parquet is not a whole parquet file"):
            Catalogue.from_parquet(path)
    with pytest.raises(ValueError, match="is a folder: expected a parquet file"):
        Catalogue.from_parquet(tmp_path)
    pq.write_table(table(title=None), path)
    with pytest.raises(ValueError, match=r"items\.parquet: a catalogue has the columns"):
        Catalogue.from_parquet(path)


def test_a_failed_write_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    path = tmp_path / CATALOGUE_FILE
    Catalogue(table()).to_parquet(path)

    def write_half_a_file(_, unfinished):
        unfinished.write_bytes(b"PAR1")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", write_half_a_file)
    with pytest.raises(OSError, match="disk full"):
        integer_catalogue().to_parquet(path)
    assert Catalogue.from_parquet(path) == Catalogue(table())
    assert [file.name for file in tmp_path.iterdir()] == [CATALOGUE_FILE]


def test_save_pretrained_writes_the_file_that_models_read(tmp_path):
    """The Trainer calls it on its `processing_class`."""
    Catalogue(table()).save_pretrained(tmp_path / "new" / "checkpoint-3")
    assert Catalogue.from_parquet(tmp_path / "new" / "checkpoint-3" / CATALOGUE_FILE) == Catalogue(table())


def test_the_catalogue_needs_neither_pandas_nor_datasets_nor_torch():
    """The file alone: importing it as a part of hf_ilora loads the models too."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print([name for name in ('pandas', 'datasets', 'torch', 'transformers') if name in sys.modules])"
    )
    file = sys.modules[Catalogue.__module__].__file__
    assert subprocess.check_output([sys.executable, "-c", code, file], text=True).strip() == "[]"


# --- further columns ---

PRICES = [9.5, None, 3.0]
URLS = ["a.example/1", "a.example/2", None]


def test_further_columns_travel_along(tmp_path):
    tags = pa.array([["old"], [], None], pa.list_(pa.string()))
    sold_since = pa.array([0, 86_400, None], pa.timestamp("s"))
    catalogue = Catalogue(table(price=pa.array(PRICES), tags=tags, since=sold_since))
    assert catalogue.metadata_columns == ["price", "tags", "since"] and Catalogue(table()).metadata_columns == []
    catalogue.to_parquet(tmp_path / CATALOGUE_FILE)
    loaded = Catalogue.from_parquet(tmp_path / CATALOGUE_FILE)
    assert loaded == catalogue and loaded.fingerprint == catalogue.fingerprint != Catalogue(table()).fingerprint
    counted = catalogue.with_counts(np.array([0, 2, 0, 5]))
    assert counted.metadata_columns == catalogue.metadata_columns and counted.counts.tolist() == [0, 2, 0, 5]
    assert catalogue.take([3, 1]).to_pylist() == [
        {"raw_id": "B09", "title": "Casino", "year": 1995, "genres": None, "price": 3.0, "tags": None, "since": None},
        {"raw_id": "B07", "title": "Toy Story", "year": 1995, "genres": ["Animation"], "price": 9.5, "tags": ["old"],
         "since": datetime(1970, 1, 1)},
    ]  # fmt: skip
    assert counted.take(torch.tensor([2, 2]), ["count", "title"]).to_pydict() == {
        "count": [0, 0],
        "title": ["Heat"] * 2,
    }
    with pytest.raises(ValueError, match="the catalogue has no column 'prize': expected one of item_id, raw_id"):
        catalogue.take([1], ["prize"])


@pytest.mark.parametrize(
    "columns",
    [
        {"price": PRICES, "url": URLS},
        pd.DataFrame({"price": PRICES, "url": URLS}),
        pa.table({"raw_id": ["B09", "other", "B07"], "price": [3.0, 1.0, 9.5], "url": [None, "x", "a.example/1"]}),
    ],
    ids=["dictionary", "frame", "table with raw ids"],
)
def test_columns_are_added_in_order_or_by_raw_id(columns):
    catalogue = Catalogue(table(price=pa.array([1, 1, 1]))).with_columns(columns)
    assert catalogue.metadata_columns == ["price", "url"]
    assert catalogue.table["price"].to_pylist() == PRICES
    by_id = isinstance(columns, pa.Table)
    assert catalogue.table["url"].to_pylist() == (["a.example/1", None, None] if by_id else URLS)


def test_another_price_does_not_make_other_items():
    plain, priced = Catalogue(table()), Catalogue(table()).with_columns({"price": [1, 2, 3]})
    assert plain.has_items_of(priced) and priced.has_items_of(priced.with_columns({"price": [1, 2, 4]}))
    assert not priced.has_items_of(Catalogue(table(title=pa.array(["Toy Story", "Heat", "Casino 2"]))))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"price": [1, 2]},
            "the columns price have 2 values each: expected 3, one per item in the order of the item ids",
        ),
        ({"price": [1, 2, 3], "url": ["a"]}, "the columns are not a table .*: expected 3 values in each"),
        ({"title": ["a", "b", "c"]}, "column title is one of the catalogue's own: expected others"),
        ({"raw_id": ["B07", "B07"], "price": [1, 2]}, "raw id 'B07' occurs more than once in the table"),
        ({"raw_id": [1, 2], "price": [1, 2]}, "column raw_id of the table has type int64: expected string"),
        (
            {"raw_id": ["x"], "price": [1]},
            "no raw id of the table is in the catalogue .the table's first is 'x', the catalogue's 'B07'.",
        ),
        ({"image": [b"a", b"b", b"c"]}, "column image has type binary"),
        ("price", "the columns are not a table"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        Catalogue(table()).with_columns(columns)
