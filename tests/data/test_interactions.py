import datetime
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, List, Value

from hf_ilora.data.interactions import load_interactions

ROWS = {"user": [5, 3, 5, 3], "item": [20, 10, 10, 30], "time": [100, 90, 100, 80]}
TITLES = ["Night, The (1999)", "Day", "Day", "Dawn, A"]
EXPECTED = {"user_id": [5, 3, 5, 3], "item_id": [20, 10, 10, 30], "timestamp": [100, 90, 100, 80]}
NOON = 1717156800  # 2024-05-31 12:00:00 UTC


def write(path, columns: dict):
    """Write columns as the kind of file that the suffix names, without the library under test."""
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        quote = lambda value: f'"{value}"' if mark in str(value) else str(value)  # noqa: E731
        path.write_text("".join(mark.join(map(quote, row)) + "\n" for row in [names, *rows]), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        path.write_text(
            "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows), encoding="utf-8"
        )
    return path


@pytest.fixture(params=["csv", "tsv", "parquet", "jsonl", "frame", "dataset"])
def as_source(request, tmp_path):
    """Columns as each kind of source in turn."""

    def convert(columns, name="table"):
        if request.param == "frame":
            return pd.DataFrame(columns)
        if request.param == "dataset":
            return Dataset.from_dict(columns)
        return write(tmp_path / f"{name}.{request.param}", columns)

    convert.kind = request.param
    return convert


def load(source, **options):
    return load_interactions(source, "user", "item", "time", **options)


def times(values, **options):
    """Timestamps of a frame whose time column is `values`."""
    frame = pd.DataFrame({"user": range(len(values)), "item": range(len(values)), "time": values})
    return load(frame, **options)[0]


def test_every_kind_of_source_gives_the_same_tables(as_source):
    interactions, items = load(as_source(ROWS | {"title": TITLES, "other": list("abcd")}), title_column="title")
    assert interactions.to_dict() == EXPECTED
    assert interactions.features == {name: Value("int64") for name in EXPECTED}
    assert items.to_dict() == {
        "item_id": [20, 10, 30],
        "title": ["The Night", "Day", "A Dawn"],
        "year": [1999, None, None],
        "genres": [[], [], []],
    }
    assert items.features == {
        "item_id": Value("int64"),
        "title": Value("string"),
        "year": Value("int32"),
        "genres": List(Value("string")),
    }


def test_text_ids_stay_text(as_source):
    columns = {"user": ["u1", "u0", "u1"], "item": ["b", "a", "é"], "time": [3, 1, 2]}
    interactions, items = load(as_source(columns))
    assert interactions.to_dict() == {"user_id": ["u1", "u0", "u1"], "item_id": ["b", "a", "é"], "timestamp": [3, 1, 2]}
    assert interactions.features["user_id"] == Value("string")
    assert items["title"][:] == items["item_id"][:] == ["b", "a", "é"]


def test_titles_come_from_a_table_of_items_in_its_order(as_source):
    items_table = {"item": [30, 10, 99, 20], "name": ["Dawn, A", "Day", "Unseen", "Night, The (1999)"]}
    _, items = load(as_source(ROWS), items=as_source(items_table, "items"), items_title_column="name")
    assert items["item_id"][:] == [30, 10, 99, 20]
    assert items["title"][:] == ["A Dawn", "Day", "Unseen", "The Night"]
    assert items["year"][:] == [None, None, None, 1999]


def test_a_limit_loads_the_first_rows(as_source):
    source = as_source(ROWS | {"title": TITLES})
    interactions, items = load(source, title_column="title", limit_data_rows=2)
    assert interactions.to_dict() == {name: values[:2] for name, values in EXPECTED.items()}
    assert items["item_id"][:] == [20, 10]
    assert load(source, limit_data_rows=99)[0].num_rows == load(source, limit_data_rows=10**30)[0].num_rows == 4


def test_without_a_time_column_the_row_number_is_the_time(as_source):
    interactions, _ = load_interactions(as_source(ROWS), "user", "item", None)
    assert interactions["timestamp"][:] == [0, 1, 2, 3]
    assert interactions.features["timestamp"] == Value("int64")


def test_an_items_table_may_have_another_name_for_its_id_column(tmp_path):
    items = write(tmp_path / "items.csv", {"sku": [10, 20, 30], "name": ["Ten", "Twenty", "Thirty"]})
    _, loaded = load(pd.DataFrame(ROWS), items=str(items), items_item_column="sku", items_title_column="name")
    assert loaded["title"][:] == ["Ten", "Twenty", "Thirty"]


def test_titles_stay_unchanged_without_normalize_titles():
    _, items = load(pd.DataFrame(ROWS | {"title": TITLES}), title_column="title", normalize_titles=False)
    assert items["title"][:] == ["Night, The (1999)", "Day", "Dawn, A"]
    assert items["year"][:] == [None, None, None]


def test_rows_may_leave_a_title_empty_that_another_row_gives():
    _, items = load(pd.DataFrame(ROWS | {"title": ["N", None, "D", "A"]}), title_column="title")
    assert items.to_dict()["title"] == ["N", "D", "A"]


def test_a_title_may_be_in_a_row_beyond_the_limit(as_source):
    source = as_source({"user": [1, 1, 2, 2], "item": [7, 8, 7, 9], "time": [1, 2, 3, 4], "title": ["", "B", "A", ""]})
    assert load(source, title_column="title", limit_data_rows=2)[1]["title"][:] == ["A", "B"]
    with pytest.raises(ValueError, match=r"1 items have no title, first \[9\]"):
        load(source, title_column="title")


def test_a_selected_dataset_is_read_in_the_order_of_the_selection():
    interactions, _ = load(Dataset.from_dict(ROWS).select([3, 0]))
    assert interactions.to_dict() == {"user_id": [3, 5], "item_id": [30, 20], "timestamp": [80, 100]}


def test_ids_with_leading_zeros_stay_different_items(tmp_path):
    path = write(tmp_path / "t.csv", {"user": [1, 1], "item": ["007", "7"], "time": [1, 2]})
    interactions, _ = load(path)
    assert interactions["item_id"][:] == ["007", "7"]
    assert interactions["user_id"][:] == [1, 1]


def test_quoted_text_with_separators_and_line_ends_is_one_title(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeffuser,item,time,title\n1,2,3,"One, ""two""\nthree"\n4,5,6,Plain\n', encoding="utf-8")
    _, items = load(path, title_column="title")
    assert items["title"][:] == ['One, "two"\nthree', "Plain"]


def test_titles_that_look_like_dates_or_numbers_stay_text(tmp_path):
    columns = ROWS | {"title": ["2012-12-21", "300", "300", "1917"]}
    for suffix in (".jsonl", ".csv"):
        _, items = load(write(tmp_path / f"t{suffix}", columns), title_column="title")
        assert items["title"][:] == ["2012-12-21", "300", "1917"]


def test_ids_in_json_that_look_like_dates_stay_text(tmp_path):
    path = write(tmp_path / "t.jsonl", {"user": [1, 2], "item": ["2012-12-21", "2012-12-22"], "time": [1, 2]})
    assert load(path)[0]["item_id"][:] == ["2012-12-21", "2012-12-22"]


@pytest.mark.parametrize("kind", ["category", "Int32", "uint8", "string[pyarrow]"])
def test_ids_of_other_pandas_types_are_converted(kind):
    frame = pd.DataFrame(ROWS)
    frame["item"] = frame["item"].astype(str).astype(kind) if kind == "string[pyarrow]" else frame["item"].astype(kind)
    item_ids = load(frame)[0]["item_id"][:]
    assert item_ids == (["20", "10", "10", "30"] if kind == "string[pyarrow]" else [20, 10, 10, 30])


@pytest.mark.parametrize(
    "values",
    [
        [NOON, 0],
        [float(NOON), 0.0],
        [str(NOON), "0"],
        ["2024-05-31T12:00:00Z", "1970-01-01"],
        ["2024-05-31 12:00", "1970-01-01 00:00:00"],
        ["2024-05-31T14:00:00+02:00", "1970-01-01T00:00:00Z"],
        ["2024-05-31T14:00+0200", "1970-01-01 01:00:00.000+01"],
        ["2024-05-31 12:00:00 UTC", "1970-01-01 00:00:00.000 UTC"],
        ["2024-05-31 14:00:00 +0200", "1970-01-01 00:00 GMT"],
        ["2024-05-31 12:00:00 +0000 UTC", "1970-01-01 00:00:00UTC"],
        ["2024-05-31 12:00:00", "1970-01-01 UTC"],
        pd.to_datetime(["2024-05-31 12:00:00", "1970-01-01 00:00:00"]),
        pd.to_datetime(["2024-05-31 12:00:00", "1970-01-01 00:00:00"]).tz_localize("UTC").tz_convert("Asia/Tokyo"),
        np.array(["2024-05-31T12:00:00", "1970-01-01"], dtype="datetime64[s]"),
        [datetime.datetime(2024, 5, 31, 12), datetime.datetime(1970, 1, 1)],
    ],
)
def test_every_way_to_write_a_time_becomes_seconds_in_utc(values):
    interactions = times(values)
    assert interactions["timestamp"][:] == [NOON, 0]
    assert interactions.features["timestamp"] == Value("int64")


@pytest.mark.parametrize(
    "values",
    [
        [NOON + 0.5, 0.0],
        [f"{NOON}.5", "0"],
        ["2024-05-31T12:00:00.5Z", "1970-01-01"],
        ["2024-05-31T12:00:00.500000000", "1970-01-01"],
        pd.to_datetime(["2024-05-31 12:00:00.5", "1970-01-01 00:00:00.0"]),
    ],
)
def test_fractions_of_a_second_are_kept(values):
    interactions = times(values)
    assert interactions["timestamp"][:] == [NOON + 0.5, 0.0]
    assert interactions.features["timestamp"] == Value("float64")


def test_days_are_midnights_in_utc():
    assert times([datetime.date(2024, 5, 31), datetime.date(1970, 1, 2)])["timestamp"][:] == [NOON - 43200, 86400]


def test_iso_times_in_files_are_read(tmp_path):
    columns = {"user": [1, 2], "item": [1, 2], "time": ["2024-05-31T12:00:00Z", "1970-01-01T00:00:00Z"]}
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert load(write(tmp_path / f"t{suffix}", columns))[0]["timestamp"][:] == [NOON, 0]


def test_the_fingerprint_follows_the_content():
    first, again, other = load(pd.DataFrame(ROWS)), load(pd.DataFrame(ROWS)), load(pd.DataFrame(ROWS).iloc[::-1])
    assert first[0]._fingerprint == again[0]._fingerprint
    assert first[0]._fingerprint != other[0]._fingerprint


# Bad input


def test_a_missing_column_lists_the_columns_and_the_close_ones(as_source):
    source = as_source({"user_id": [1], "item": [2], "time": [3]})
    with pytest.raises(
        ValueError, match=r"no column 'user'; it has \['user_id', 'item', 'time'\]; did you mean 'user_id'"
    ):
        load(source)


def test_one_column_for_two_purposes_is_refused():
    with pytest.raises(ValueError, match="column 'user' is given for two purposes"):
        load_interactions(pd.DataFrame(ROWS), "user", "user", "time")


@pytest.mark.parametrize("names", [(None, "item"), ("user", None)])
def test_a_table_without_a_column_of_ids_is_refused(names):
    with pytest.raises(ValueError, match="expected the names of both columns"):
        load_interactions(pd.DataFrame(ROWS), *names, "time")


def test_duplicate_columns_are_refused(tmp_path):
    csv = tmp_path / "t.csv"
    csv.write_text("user,item,item,time\n1,2,3,4\n")
    frame = pd.DataFrame([[1, 2, 3, 4]], columns=["user", "item", "item", "time"])
    parquet = tmp_path / "t.parquet"
    pq.write_table(pa.table([[1], [2], [3], [4]], names=["user", "item", "item", "time"]), parquet)
    for source in (csv, frame, parquet):
        with pytest.raises(ValueError, match="2 columns named 'item'; expected one: rename or drop"):
            load(source)
    json_lines = tmp_path / "t.jsonl"
    json_lines.write_text('{"user": 1, "item": 2, "item": 3, "time": 4}\n')
    with pytest.raises(ValueError, match="specified twice"):
        load(json_lines)


@pytest.mark.parametrize("column", ["user", "item"])
@pytest.mark.parametrize("ids", [[1, None, 3], ["a", None, "c"], [1.0, float("nan"), 3.0], pd.array([1, pd.NA, 3])])
def test_a_missing_id_is_named_with_its_row(column, ids):
    frame = pd.DataFrame({"user": [1, 2, 3], "item": [1, 2, 3], "time": [1, 2, 3]} | {column: ids})
    with pytest.raises(ValueError, match=rf"column '{column}' of .* in row 1 .*; expected an id: drop these rows"):
        load(frame)


@pytest.mark.parametrize("word", ["", "NaN", "NULL", "None"])
def test_a_word_that_marks_missing_values_in_a_text_file_is_a_missing_id(tmp_path, word):
    path = write(tmp_path / "t.csv", {"user": [1, 2], "item": [1, word], "time": [1, 2]})
    with pytest.raises(ValueError, match=rf"column 'item' of .* has '{word}' in row 1 .*if such a word is a real id"):
        load(path)


def test_a_null_id_in_json_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", {"user": [1, None], "item": [1, 2], "time": [1, 2]})
    with pytest.raises(ValueError, match=r"column 'user' of .* has None in row 1"):
        load(path)


def test_an_empty_id_is_refused():
    with pytest.raises(ValueError, match="column 'item' of the pandas frame has '' in row 0"):
        load(pd.DataFrame({"user": [1, 2], "item": ["", "a"], "time": [1, 2]}))


@pytest.mark.parametrize("ids", [[1.0, 2.0], [True, False], [datetime.date(2000, 1, 1)] * 2])
def test_ids_that_are_neither_integers_nor_text_are_refused(ids):
    with pytest.raises(ValueError, match=r"column 'item' of .* has type .*; expected integers or strings: cast"):
        load(pd.DataFrame({"user": [1, 2], "item": ids, "time": [1, 2]}))


def test_ids_beyond_int64_are_refused():
    with pytest.raises(ValueError, match="expected ids that fit int64: cast the ids to strings"):
        load(pd.DataFrame({"user": [1], "item": np.array([2**63], dtype="uint64"), "time": [1]}))


@pytest.mark.parametrize("ids", [[1, "a"], ["a", 1]])
def test_ids_of_mixed_types_are_refused(tmp_path, ids):
    columns = {"user": [1, 2], "item": ids, "time": [1, 2]}
    with pytest.raises(ValueError, match=r"column 'item' of the pandas frame mixes types .*astype"):
        load(pd.DataFrame(columns))
    with pytest.raises(ValueError, match=r"Column\(/item\) changed from .*; expected .*one type per column"):
        load(write(tmp_path / "t.jsonl", columns))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, -5], r"has -5 in row 1 .*expected a time from 1970 on"),
        ([1.5, -5.0], r"has -5.0 in row 1"),
        ([1.0, float("nan")], r"in row 1 .*expected seconds since 1970 or an ISO 8601 time.*time_column=None"),
        ([1.0, float("inf")], r"has inf in row 1"),
        ([1, None], r"in row 1"),
        ([None, None], r"in row 0 .*2 such rows"),
        (["1", "nan"], r"has 'nan' in row 1"),
        (["1", ""], r"has '' in row 1"),
        (["1", "inf"], r"in row 1"),
        (["2024-05-31", "yesterday"], r"has 'yesterday' in row 1 .*ISO 8601"),
        (["2024-05-31", "31.05.2024"], r"has '31.05.2024' in row 1"),
        (["2024-05-31", "5"], r"has '5' in row 1"),
        (["2024-05-31", "2024-13-01"], r"2024-13-01.*expected valid dates"),
        (["2024-05-31", "1969-12-31"], r"row 1 .*expected a time from 1970 on"),
        (pd.to_datetime(["2024-05-31", None]), r"in row 1"),
        (pd.to_datetime(["2024-05-31", "1960-01-01"]), r"row 1 .*expected a time from 1970 on"),
        (["2024-05-31", "2024-05-31 12:00:00 +0200 UTC"], r"has '2024-05-31 12:00:00 \+0200 UTC' in row 1"),
        ([True, False], r"has type bool; expected numbers"),
        (pd.to_timedelta([1, 2]), r"has type duration.*; expected numbers"),
    ],
)
def test_a_bad_time_is_named_with_its_row(values, message):
    with pytest.raises(ValueError, match=f"column 'time' of the pandas frame.*{message}"):
        times(values)


@pytest.mark.parametrize("as_source", ["csv", "tsv", "parquet", "frame", "dataset"], indirect=True)
def test_an_empty_table_is_refused(as_source):
    empty = {"user": pa.array([], pa.int64()), "item": pa.array([], pa.int64()), "time": pa.array([], pa.int64())}
    if as_source.kind in ("frame", "dataset"):
        empty = {name: column.to_pylist() for name, column in empty.items()}
    with pytest.raises(ValueError, match="has no rows; expected at least one"):
        load(as_source(empty))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_of_no_bytes_is_refused(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.touch()
    with pytest.raises(ValueError, match=rf"t{suffix} (is empty|cannot be read).*; expected"):
        load(path)


def test_an_unknown_file_type_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"file type '.xlsx'; expected one of .csv, .tsv, .inter, .* .parquet, .jsonl"):
        load(tmp_path / "t.xlsx")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*t\.csv: check the path"):
        load(tmp_path / "t.csv")


@pytest.mark.parametrize("source", [DatasetDict(train=Dataset.from_dict(ROWS)), ROWS, None])
def test_a_source_that_is_not_a_table_is_refused(source):
    with pytest.raises(TypeError, match=r"cannot read a table from .*; expected a path .*dataset\['train'\]"):
        load(source)


def test_a_damaged_file_is_refused_with_its_name(tmp_path):
    short = tmp_path / "t.csv"
    short.write_text("user,item,time\n1,2,3\n4,5\n")
    with pytest.raises(ValueError, match=r"t.csv cannot be read: .*Expected 3 columns, got 2.*fix the file"):
        load(short)
    latin = tmp_path / "l.csv"
    latin.write_bytes(b"user,item,time\n1,\xe9,3\n")
    with pytest.raises(ValueError, match=r"l.csv cannot be read: .*UTF-?8"):
        load(latin)
    cut = write(tmp_path / "t.parquet", ROWS)
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"t.parquet cannot be read"):
        load(cut)
    array = tmp_path / "t.json"
    array.write_text(json.dumps([{"user": 1, "item": 2, "time": 3}]))
    with pytest.raises(ValueError, match=r"t.json cannot be read: .*one object per line"):
        load(array)


@pytest.mark.parametrize("limit", [0, -2, True])
def test_an_invalid_limit_is_refused(limit):
    with pytest.raises(ValueError, match=r"expected -1 \(all rows\) or a positive integer"):
        load(pd.DataFrame(ROWS), limit_data_rows=limit)


def test_two_titles_for_one_item_are_refused():
    with pytest.raises(
        ValueError, match=r"1 items have more than one title: item 10 has \['Day', 'Noon'\]; expected one"
    ):
        load(pd.DataFrame(ROWS | {"title": ["Night", "Day", "Noon", "Dawn"]}), title_column="title")


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_items_without_a_title_are_refused_or_called_by_their_id(blank):
    frame = pd.DataFrame(ROWS | {"title": ["Night", blank, blank, "Dawn"]})
    with pytest.raises(ValueError, match=r"1 items have no title, first \[10\]; .*missing_titles='item_id'"):
        load(frame, title_column="title")
    _, items = load(frame, title_column="title", missing_titles="item_id")
    assert items["title"][:] == ["Night", "10", "Dawn"]


def test_a_column_of_titles_that_is_not_text_is_refused():
    with pytest.raises(ValueError, match="column 'title' of the pandas frame has type int64; expected text"):
        load(pd.DataFrame(ROWS | {"title": [1, 2, 2, 3]}), title_column="title")


def test_an_items_table_with_an_item_twice_is_refused():
    items = pd.DataFrame({"item": [10, 20, 10, 30], "name": ["a", "b", "a", "c"]})
    with pytest.raises(ValueError, match=r"lists 1 items more than once, first \[10\]; expected one row per item"):
        load(pd.DataFrame(ROWS), items=items, items_title_column="name")


def test_items_missing_from_the_items_table_are_refused_or_called_by_their_id():
    items = pd.DataFrame({"item": [10, 40], "name": ["Ten", "Forty"]})
    with pytest.raises(
        ValueError, match=r"2 items of the interactions are not in .*, first \[20, 30\]; .*missing_titles"
    ):
        load(pd.DataFrame(ROWS), items=items, items_title_column="name")
    _, loaded = load(pd.DataFrame(ROWS), items=items, items_title_column="name", missing_titles="item_id")
    assert loaded.to_dict()["item_id"] == [10, 40, 20, 30]
    assert loaded.to_dict()["title"] == ["Ten", "Forty", "20", "30"]


def test_ids_of_two_types_in_the_two_tables_are_refused():
    items = pd.DataFrame({"item": ["10", "20", "30"], "name": ["a", "b", "c"]})
    with pytest.raises(
        ValueError, match="has ids of type string, the interactions have item ids of type int64; expected the"
    ):
        load(pd.DataFrame(ROWS), items=items, items_title_column="name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": pd.DataFrame()}, "items is given with items_title_column=None"),
        ({"items": pd.DataFrame(), "items_title_column": "a", "title_column": "b"}, "title_column to be None"),
        ({"items_title_column": "a"}, "is given without items: pass the table of items"),
        ({"items_item_column": "a"}, "is given without items: pass the table of items"),
        ({"missing_titles": "guess"}, "missing_titles is 'guess'; expected 'raise' or 'item_id'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load(pd.DataFrame(ROWS), **options)
