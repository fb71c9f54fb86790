"""Files as other programs write them: each is read as it was meant, or refused with its line or name."""

import gzip
import json

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from hf_ilora.data.building import build_sequences
from hf_ilora.data.interactions import load_interactions

STRAY = 'user\titem\ttime\ttitle\n1\ta\t1\t"Salem\'s\n1\tb\t2\tPlain\n2\tc\t3\t"Low\n2\td\t4\tLast\n'
ROWS = {"user": [1, 2], "item": [10, 20], "time": [3, 4]}


def load(source, **options):
    return load_interactions(source, "user", "item", "time", **options)


def titles(source, **options):
    return load(source, title_column="title", **options)[1]["title"][:]


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Quotes


def test_a_tsv_whose_quotes_enclose_nothing_is_read_verbatim(tmp_path, caplog):
    path = write(tmp_path / "t.tsv", STRAY)
    assert titles(path) == ["\"Salem's", "Plain", '"Low', "Last"]
    assert "line 2" in caplog.text
    assert load(path)[0].num_rows == 4  # the column of titles is not read
    assert titles(path, limit_data_rows=2) == ["\"Salem's", "Plain"]


@pytest.mark.parametrize("first", ['"One" live', 'He said "no"', '""', '"', '"One', '"One"'])
@pytest.mark.parametrize("last", ['Low"', '"Low', '"Low"er'])
def test_no_pair_of_stray_quotes_hides_a_row_of_a_tsv(first, last, tmp_path):
    rows = [f"1\t{item}\t{item}\t{title}\n" for item, title in enumerate([first, "Plain", last, "Last"])]
    loaded = titles(write(tmp_path / "t.tsv", "user\titem\ttime\ttitle\n" + "".join(rows)), missing_titles="item_id")
    assert loaded[1:] == ["Plain", last, "Last"]
    assert loaded[0] in (first, first.strip('"'), "0")  # quotes may enclose the first title


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (['1,a,1,"Salem', "1,b,2,Plain", '1,c,3,"Low'], 2),
        (['1,a,1,"Salem', "1,b,2,Plain", '1,c,3,Low"'], 2),
        (['1,a,1,"Salem', "", "1,b,2,Plain", '1,c,3,Low"'], 2),
        (['x,a,2024-05-31,"1984', 'y,b,2024-05-31,12"'], 2),
        (['x,a,1999,"A', "y,b,,B", 'z,c,,C"'], 2),  # a number may be missing in the swallowed rows
        (["1,a,1,Plain", '1,b,2,"One" live'], 3),
        (["1,a,1,Plain", '1,b,2,"never closed'], 3),
        (['1,a,1,"two\nlines"', '1,b,2,"One" live'], 4),
    ],
)
def test_a_csv_with_a_stray_quote_is_refused_with_the_line(rows, line, tmp_path):
    path = write(tmp_path / "t.csv", "user,item,time,title\n" + "\n".join(rows) + "\n")
    for options in ({}, {"title_column": "title"}):
        with pytest.raises(ValueError, match=rf"t.csv: .*\bline {line}\b.*fix the line"):
            load(path, **options)


def test_a_truncated_tsv_of_a_writer_that_quotes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"quotes in line 3 are not closed"):
        titles(write(tmp_path / "t.tsv", 'user\titem\ttime\ttitle\n1\ta\t1\t"Say ""Yes"""\n1\tb\t2\t"Cut'))


@pytest.mark.parametrize("separator", [",", "\t"])
def test_titles_that_pandas_writes_come_back_unchanged(separator, tmp_path):
    names = ["two\nlines", "in\nred, green, blue, white", "in\n\na\tb\tc\td", 'Say "Yes"', "a, b\tc", '"', '5" pipe']
    frame = pd.DataFrame({"user": 1, "item": range(7), "time": range(7), "title": names})
    path = tmp_path / ("t.csv" if separator == "," else "t.tsv")
    frame.to_csv(path, sep=separator, index=False)
    assert titles(path) == names


def test_quotes_enclose_values_under_the_quick_and_the_thorough_check(tmp_path):
    rows = ['1,1,1,""""', '1,2,2,"a ""b"", c"', '"1","3","3",""', "1,4,4,d"]
    plain = titles(write(tmp_path / "t.csv", "user,item,time,title\n" + "\r\n".join(rows)), missing_titles="item_id")
    rows.append('1,5,5,"two\nlines"')  # needs the thorough check
    closer = titles(write(tmp_path / "u.csv", "user,item,time,title\n" + "\r\n".join(rows)), missing_titles="item_id")
    assert plain == closer[:4] == ['"', 'a "b", c', "3", "d"]
    path = tmp_path / "t.tsv"
    pd.DataFrame(ROWS | {"title": ["a\tb", '"']}).to_csv(path, sep="\t", index=False)
    assert titles(path) == ["a\tb", '"']


def test_quotes_inside_a_value_are_ordinary_characters(tmp_path):
    assert titles(write(tmp_path / "t.csv", 'user,item,time,title\n1,1,1,5" pipe\n1,2,2,"a, b"\n')) == [
        '5" pipe',
        "a, b",
    ]


# Ids and names of columns


def test_white_space_around_ids_and_column_names_is_ignored(tmp_path):
    columns = {" user": ["u ", "u", "\tv"], "item ": ["42", " 42", "\u00a043 "], "time": [1, 2, 3]}
    frame = pd.DataFrame(columns)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "t.csv", index=False)
    items = write(tmp_path / "items.csv", "item , name\n 42,A\n43 ,B\n")
    for source in (frame, tmp_path / "t.parquet", tmp_path / "t.jsonl", tmp_path / "t.csv"):
        interactions, named = load(source, items=items, items_title_column="name")
        assert interactions["user_id"][:] == ["u", "u", "v"]
        assert [str(item) for item in interactions["item_id"]] == ["42", "42", "43"]
        assert named["title"][:] == ["A", "B"]


def test_an_exact_column_name_takes_precedence_over_one_with_white_space(tmp_path):
    path = write(tmp_path / "t.csv", "user,item, item,time\n1,2,3,4\n")
    assert load(path)[0]["item_id"][:] == [2]
    with pytest.raises(ValueError, match="2 columns named 'item'"):
        load(write(tmp_path / "u.csv", "user,item , item,time\n1,2,3,4\n"))


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", " NA "])
def test_an_id_of_blanks_is_missing(blank, tmp_path):
    path = write(tmp_path / "t.csv", f"user,item,time\n{blank},2,3\n")
    with pytest.raises(ValueError, match=r"column 'user' of .* in row 0 .*expected an id"):
        load(path)
    if not blank.strip():
        with pytest.raises(ValueError, match=r"column 'user' of .* in row 0 .*expected an id"):
            load(pd.DataFrame({"user": [blank], "item": [2], "time": [3]}))


@pytest.mark.parametrize("odd", ["91X", "007", "1234567890123456789"])
def test_text_tables_decide_together_whether_item_ids_are_numbers(odd, tmp_path):
    short = write(tmp_path / "short.csv", "user,item,time\n1,12,1\n1,56,2\n")
    whole = write(tmp_path / "whole.csv", f"user,item,time\n1,12,1\n1,56,2\n1,{odd},3\n")
    items = write(tmp_path / "items.tsv", f"item\tname\n12\tA\n56\tB\n{odd}\tC\n")
    few = write(tmp_path / "few.csv", "item,name\n12,A\n56,B\n")
    for plays, table, rows in ((short, items, -1), (whole, items, 2), (whole, few, 2)):
        interactions, named = load(plays, items=table, items_title_column="name", limit_data_rows=rows)
        assert interactions["item_id"][:] == ["12", "56"]
        assert named["title"][:2] == ["A", "B"]
        assert interactions["user_id"][:] == [1, 1]
    assert load(whole, limit_data_rows=2)[0]["item_id"][:] == load(whole)[0]["item_id"][:2] == ["12", "56"]


def test_ids_of_a_text_table_take_the_type_of_the_other_table(tmp_path):
    plays = write(tmp_path / "t.csv", "user,item,time\n1,12,1\n1,56,2\n")
    items = write(tmp_path / "items.csv", "item,name\n12,A\n56,B\n9X,C\n")
    text = pd.DataFrame({"item": ["12", "56"], "name": ["A", "B"]})
    numbers = pd.DataFrame({"user": [1, 1], "item": [12, 56], "time": [1, 2]})
    few = write(tmp_path / "few.csv", "item,name\n12,A\n56,B\n")
    for source in (numbers, numbers.astype({"item": "category"}), numbers.astype({"item": "Int32"})):
        assert load(source, items=few, items_title_column="name")[0]["item_id"][:] == [12, 56]
    for source, table in ((plays, text), (numbers, items)):
        interactions, named = load(source, items=table, items_title_column="name")
        assert interactions["item_id"][:] == ["12", "56"]
        assert named["title"][:2] == ["A", "B"]


# JSON lines


@pytest.mark.parametrize("half", [[], ["A\ud83d"]])  # Arrow refuses files with half characters
def test_only_the_named_columns_of_json_lines_matter(half, tmp_path):
    unread = [12, "12", None, {"a": 1}, {"a": ["b"]}, [1, {}], True, float("nan"), 2**80, *half]
    lines = [
        json.dumps(
            {"other": value, "user": 1, "item": f"i{row}", "time": row, "title": None if row < 2 else "2012-12-21"}
        )
        for row, value in enumerate(unread)
    ]
    path = write(tmp_path / "t.jsonl", "\ufeff" + "\n".join(lines) + "\n")
    assert titles(path, missing_titles="item_id") == ["i0", "i1"] + ["2012-12-21"] * (len(unread) - 2)


def test_times_in_json_may_mix_whole_numbers_and_fractions(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"user":1,"item":2,"time":1}\n\n{"user":1,"item":3,"time":2.5}\n')
    assert load(path)[0]["timestamp"][:] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user":1,"item":2,"time":', "line 1 is not JSON"),
        ('{"user":36893488147419103232,"item":2,"time":3}', "t.jsonl cannot be read: .*36893488147419103232"),
        ('{"user":1,"item":2,"item":2,"time":3}', "specified twice"),
        ('{"user":1,"item":2,"time":3}\n{"user":"x","item":2,"time":3}', "changed from number to string"),
        ('{"user":"A\\ud83d","item":2,"time":3}', "t.jsonl cannot be read: .*surrogate"),
        ('{"user":{"id":1},"item":2,"time":3}', "column 'user' .* has type struct"),
        ('{"user":1,"item":2,"time":3,"other":' + "[" * 100_000, "line 1 is not JSON"),
        ('{"user":1,"item":2,"time":3}\n[1,2,3]', "t.jsonl cannot be read: .*array in row 1"),
        ("", "cannot be read: it has no rows"),
    ],
)
def test_json_lines_that_cannot_be_read_are_refused(line, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "t.jsonl", f"{line}\n"))


# Frames


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([2**70, 1], "do not fit int64"),
        ([2**64 - 1, 1], "do not fit int64"),
        ([-(2**63) - 1, 1], "do not fit int64"),
        (["b", "A\ud83d"], r"in row 1 .*half a character"),
        ([1 + 2j, 2], "mixes types"),
    ],
)
@pytest.mark.parametrize("column", ["user", "item", "time", "title"])
def test_objects_that_fit_no_column_type_are_refused(column, values, message):
    frame = pd.DataFrame(ROWS | {"title": ["A", "B"]} | {column: pd.Series(values, dtype=object)})
    with pytest.raises(ValueError, match=f"column '{column}' of the pandas frame .*{message}"):
        titles(frame)


def test_columns_may_be_named_by_numbers(tmp_path):
    frame = pd.DataFrame([[1, 10, 3, "A"], [2, 20, 4, "B"]])
    items = pd.DataFrame([[20, "Y"], [10, "X"]])
    frame.to_csv(tmp_path / "t.csv", index=False)
    for source, names in ((frame, (0, 1, 2)), (frame, ("0", "1", "2")), (tmp_path / "t.csv", (0, 1, 2))):
        interactions, named = load_interactions(source, *names, title_column=3)
        assert interactions.to_dict() == {"user_id": [1, 2], "item_id": [10, 20], "timestamp": [3, 4]}
        assert named["title"][:] == ["A", "B"]
    _, named = load_interactions(frame, 0, 1, 2, items=items, items_item_column=0, items_title_column=1)
    assert named["title"][:] == ["Y", "X"]


# Folders of parts


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".tsv"])
def test_the_parts_of_a_folder_are_read_in_the_order_of_their_numbers(suffix, tmp_path):
    folder = tmp_path / f"plays{suffix}"
    for name in ("_SUCCESS", ".part-0.crc", "_metadata/x"):
        write(folder / name, "no part")
    for number in (2, 10):
        path = folder / f"part-{number}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"time": [number], "user": [1], "item": [number]}), path)
        elif suffix == ".json":
            write(path, json.dumps({"user": 1, "item": number, "time": number}) + "\n")
        else:
            write(path, f"user,item,time\n1,{number},{number}\n".replace(",", "," if suffix == ".csv" else "\t"))
    if suffix != ".parquet":
        for number, nothing in enumerate(("", "\n \r\n")):
            write(folder / f"part-{11 + number}{suffix}", nothing)
        write(folder / f"part-13{suffix}.gz", gzip.compress(b""))
    assert load(folder)[0]["item_id"][:] == [2, 10]
    assert load(folder, limit_data_rows=1)[0]["item_id"][:] == [2]


def test_parts_without_a_suffix_take_that_of_the_folder(tmp_path):
    write(tmp_path / "plays.csv" / "0.part", "user,item,time\n1,2,3\n")
    assert load(tmp_path / "plays.csv")[0]["item_id"][:] == [2]


def test_parts_of_a_text_table_have_one_type_and_one_way_to_quote(tmp_path):
    folder = tmp_path / "plays"
    write(folder / "part-0.tsv", 'user\titem\ttime\ttitle\n1\t2\t3\t"A"\n')
    write(folder / "part-1.tsv", 'title\tuser\titem\ttime\n"B" live\t1\t2X\t3\n')
    interactions, items = load(folder, title_column="title")
    assert interactions["item_id"][:] == ["2", "2X"]
    assert items["title"][:] == ['"A"', '"B" live']


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is a folder that contains no files"),
        (["year=2020/a.csv"], "is a folder that contains folders, such as year=2020"),
        (["a.csv", "b.jsonl"], "files of the types"),
        (["a.xlsx"], "the file type '.xlsx'; expected one of"),
    ],
)
def test_a_folder_of_something_else_is_refused(names, message, tmp_path):
    folder = tmp_path / "plays"
    folder.mkdir()
    for name in names:
        write(folder / name, "user,item,time\n1,2,3\n")
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("column", "first", "second", "expected"),
    [
        ("item", pa.array(["a"]).dictionary_encode(), pa.array(["b"]), ["a", "b"]),
        ("item", pa.array(["a"], pa.large_string()), pa.array(["b"], pa.string_view()), ["a", "b"]),
        ("item", pa.array([1], pa.int32()).dictionary_encode(), pa.array([2]), [1, 2]),
        ("time", pa.array([1], pa.date32()), pa.array([2], pa.timestamp("s")), [86400, 2]),
        ("time", pa.array([1000], pa.timestamp("ms", "Asia/Tokyo")), pa.array([2], pa.timestamp("s", "UTC")), [1, 2]),
        ("time", pa.array([1], pa.timestamp("s")), pa.array([2], pa.timestamp("s", "America/New_York")), [1, 2]),
    ],
)
def test_parts_may_spell_one_type_in_several_ways(column, first, second, expected, tmp_path):
    for number, values in enumerate((first, second)):
        (tmp_path / "t").mkdir(exist_ok=True)
        table = pa.table({"user": [1], "item": [2], "time": [3]} | {column: values})
        pq.write_table(table, tmp_path / "t" / f"{number}.parquet")
    assert load(tmp_path / "t")[0]["item_id" if column == "item" else "timestamp"][:] == expected


def test_text_that_is_not_utf8_is_refused_with_its_column(tmp_path):
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    for column in ("user", "item", "time", "title"):
        table = pa.table({"user": [1], "item": [2], "time": [3], "title": ["A"]} | {column: broken})
        pq.write_table(table, tmp_path / "t.parquet")
        for source in (tmp_path / "t.parquet", Dataset(table)):
            with pytest.raises(ValueError, match=f"column '{column}' of .*expected text in UTF-8"):
                titles(source)


def test_parts_of_different_types_are_refused(tmp_path):
    for number, item in enumerate([1, "a"]):
        write(tmp_path / "t" / f"{number}.jsonl", json.dumps({"user": 1, "item": item, "time": 3}))
    with pytest.raises(ValueError, match=r"the parts of .* have columns of different types"):
        load(tmp_path / "t")


# Compression and separators


def test_compressed_text_is_read(tmp_path):
    for name, text in (("t.csv.gz", "\ufeffuser,item,time\n1,2,3\n"), ("t.jsonl.gz", '{"user":1,"item":2,"time":3}')):
        assert load(write(tmp_path / name, gzip.compress(text.encode())))[0]["item_id"][:] == [2]
    pd.DataFrame(ROWS).to_csv(tmp_path / "t.tsv.bz2", sep="\t", index=False)
    assert load(tmp_path / "t.tsv.bz2")[0]["item_id"][:] == [10, 20]


@pytest.mark.parametrize("name", ["t.csv", "T.CSV.GZ", "t.csv.bz2", "t.jsonl"])
def test_compressed_text_is_recognised_by_its_content(name, tmp_path):
    text = '{"user":1,"item":2,"time":3}' if "json" in name else 'user,item,time\n1,"2",3\n'
    assert load(write(tmp_path / name, gzip.compress(text.encode())))[0]["item_id"][:] == [2]


def test_a_compressed_file_that_is_truncated_or_not_compressed_is_refused(tmp_path):
    whole = gzip.compress(b"user,item,time\n" + b"".join(b"%d,%d,3\n" % (row, row * 7919) for row in range(9999)))
    for content in (whole[:-500], b"user,item,time\n1,2,3\n"):
        with pytest.raises(ValueError, match=r"t.csv.gz cannot be read"):
            load(write(tmp_path / "t.csv.gz", content))


@pytest.mark.parametrize("header", ["user;item;time", '"user";"item";"time"', "user|item|time", "user\titem\ttime"])
def test_the_error_names_another_separator_which_can_then_be_passed(header, tmp_path):
    separator = header[-5] if '"' not in header else ";"
    path = write(tmp_path / "t.csv", f"{header}\n1{separator}10{separator}3\n")
    with pytest.raises(ValueError, match=r"look separated by .*: pass separator="):
        load(path)
    items = write(tmp_path / "items.csv", f"item{separator}name\n10{separator}A, B\n")
    _, named = load(path, separator=separator, items=items, items_title_column="name", items_separator=separator)
    assert named["title"][:] == ["A, B"]


@pytest.mark.parametrize("separator", ["", '"', "\n", "·", "\0", b",", 5])
def test_a_separator_that_cannot_separate_is_refused(separator, tmp_path):
    with pytest.raises(ValueError, match="expected ASCII characters, for CSV, TSV or the like"):
        load(write(tmp_path / "t.csv", "user,item,time\n1,2,3\n"), separator=separator)


def test_a_separator_is_for_text_files_only(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "t.parquet")
    for source in (pd.DataFrame(ROWS), tmp_path / "t.parquet"):
        with pytest.raises(ValueError, match="separator"):
            load(source, separator=";")


DOUBLE_COLONS = '1::10::3::"Star" Wars: a film\n1::20::4::Plain\n2::10::5::"Star" Wars: a film\n'
NAMES = ["user", "item", "time", "title"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_separator_may_have_several_characters(mark, line_end, tmp_path):
    rows = DOUBLE_COLONS.replace("\n", line_end)
    headless = write(tmp_path / "ratings.dat", mark + rows)
    with_header = write(tmp_path / "ratings.txt", f"{mark} user::item ::time::title{line_end}{rows}")
    for path, options in ((headless, {"column_names": NAMES}), (with_header, {})):
        interactions, items = load(path, title_column="title", separator="::", **options)
        assert interactions.to_dict() == {"user_id": [1, 1, 2], "item_id": [10, 20, 10], "timestamp": [3, 4, 5]}
        assert items["title"][:] == ['"Star" Wars: a film', "Plain"]


def test_a_long_separator_is_read_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ilora.data.table_files._BLOCK_BYTES", 16)
    expected = {"user_id": list(range(9)), "item_id": [7] * 9, "timestamp": [3] * 9}
    rows = "".join(f"{user}::7::3\n" for user in range(9))
    headless = write(tmp_path / "t.dat", rows)
    assert load(headless, separator="::", column_names=NAMES[:3])[0].to_dict() == expected
    assert load(write(tmp_path / "t.csv", "user::item::time\n" + rows), separator="::")[0].to_dict() == expected


def test_rows_without_a_header_are_named(tmp_path):
    for mark in ("", "\ufeff"):
        path = write(tmp_path / "t.tsv", f"{mark}1\t007\t3\n2\t8\t4\n")
        interactions, _ = load(path, column_names=["user", "item", "time"])
        assert interactions.to_dict() == {"user_id": [1, 2], "item_id": ["007", "8"], "timestamp": [3, 4]}


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("1,2,3\n", {"column_names": ["user", "item"]}, "has 3 values: expected a name for each column"),
        ("user,item,time\n1,2,3\n", {"column_names": NAMES[:3]}, "expected a row, not names; leave column_names out"),
        ("1,2,3\n", {"column_names": ["user", "user", "item"]}, "expected distinct names of all columns"),
        ("user::item::time\n1::2::3\n", {}, "look separated by '::': pass separator='::'"),
        ("1::2::3\n1::2\n", {"separator": "::", "column_names": NAMES[:3]}, "t.csv cannot be read: .*3 columns, got 2"),
        ("1::2::\x1f\n", {"separator": "::", "column_names": NAMES[:3]}, "it has the control character"),
    ],
)
def test_wrong_names_and_separators_are_errors(content, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "t.csv", content), **options)


def test_a_text_file_without_a_default_separator_needs_one(tmp_path):
    with pytest.raises(ValueError, match=r"t.dat has the file type '.dat', .* pass separator, such as '::'"):
        load(write(tmp_path / "t.dat", "1::2::3\n"))


# RecBole's atomic files

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_atomic_files_are_read_by_the_names_without_types(compressed, tmp_path):
    inter = INTER + "u1\t007\t4.0\t874965758.0\nu1\t 8\t2\t874965759\n"
    item = 'item_id:token\tname:token_seq\tcategories:token_seq\n007\tBlue "Note" (1999)\tJazz Club\n8\tBar\t\n'
    paths = []
    for name, text in (("a.inter", inter), ("a.item", item)):
        content = gzip.compress(text.encode()) if compressed else text
        paths.append(write(tmp_path / (name + (".gz" if compressed else "")), content))
    columns = {"items_title_column": "name", "rating_column": "rating"}
    interactions, items = load_interactions(
        paths[0], "user_id", "item_id", "timestamp", items=paths[1], normalize_titles=False, **columns
    )
    assert interactions.to_dict() == {
        "user_id": ["u1", "u1"],
        "item_id": ["007", "8"],
        "timestamp": [874965758, 874965759],
        "rating": [4.0, 2.0],
    }
    assert items["title"][:] == ['Blue "Note" (1999)', "Bar"]
    typed, _ = load_interactions(paths[0], "user_id:token", "item_id:token", "timestamp:float")
    assert typed["timestamp"][:] == [874965758, 874965759]


def test_a_missing_column_of_an_atomic_file_is_named_among_those_it_has(tmp_path):
    path = write(tmp_path / "a.train.inter", "user_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n")
    with pytest.raises(ValueError, match=r"no column 'timestamp'; it has \['user_id', 'item_id_list', 'item_id'\]"):
        load_interactions(path, "user_id", "item_id", "timestamp")


# Frames of polars


@pytest.fixture(params=["eager", "lazy"])
def polars_frame(request):
    """Columns as a frame of polars."""
    return lambda columns: pl.DataFrame(columns).lazy() if request.param == "lazy" else pl.DataFrame(columns)


def test_frames_of_polars_are_read_like_those_of_pandas(polars_frame):
    columns = {"user": [" u1", "u0 ", "u1"], "item": [7, 8, 7], "time": pd.to_datetime([5, 4, 3], unit="s").tolist()}
    columns |= {"title": ["A", None, "A"], "stars": [1.0, 2.5, 3.0], " extra ": [[1], [2], [3]]}
    options = {"title_column": "title", "missing_titles": "item_id", "rating_column": "stars"}
    for limit in (-1, 2):
        found, expected = (
            load(frame, limit_data_rows=limit, **options) for frame in (polars_frame(columns), pd.DataFrame(columns))
        )
        assert [table.to_dict() for table in found] == [table.to_dict() for table in expected]
        assert [table.features for table in found] == [table.features for table in expected]
    assert found[0]["user_id"][:] == ["u1", "u0"]


def test_polars_types_are_converted_without_loss(polars_frame):
    columns = {
        "user": pl.Series(["b", "a", "b"], dtype=pl.Categorical),
        "item": pl.Series([3, 2**63 - 1, 3], dtype=pl.UInt64),
        "time": pl.Series(["2024-05-31 12:00", "1970-01-01 00:00", "2024-05-31 12:00"]).str.to_datetime(
            time_zone="UTC"
        ),
    }
    interactions, _ = load(polars_frame(columns))
    assert interactions.to_dict() == {
        "user_id": ["b", "a", "b"],
        "item_id": [3, 2**63 - 1, 3],
        "timestamp": [1717156800, 0, 1717156800],
    }
    known = polars_frame({" item": [3, 2**63 - 1], "name": ["Cup", "Pan"]})
    assert load(polars_frame(columns), items=known, items_title_column="name")[1]["title"][:] == ["Cup", "Pan"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pl.Series("item", [2**63, 1], dtype=pl.UInt64),
            "column 'item' of the polars frame: .*; expected ids that fit",
        ),
        (pl.Series("item", ["a", " "]), "column 'item' of the polars frame has ' ' in row 1"),
        (pl.Series("item", [1.5, 2.0]), "has type double; expected integers or strings"),
        (pl.Series("item", [object(), object()], dtype=pl.Object), "has Python objects; expected numbers, text"),
        (pl.Series("itm", [1, 2]), r"the polars frame has no column 'item'; .* did you mean 'itm'\?"),
    ],
)
def test_errors_name_the_column_of_polars(polars_frame, column, message):
    with pytest.raises(ValueError, match=message):
        load(polars_frame([pl.Series("user", [1, 2]), column, pl.Series("time", [3, 4])]))


# Ratings


def test_min_rating_filters_by_the_rating_column(tmp_path):
    rows = "".join(f"{user},{item},{item},{3.3 if item % 4 else 2}\n" for user in range(3) for item in range(12))
    path = write(tmp_path / "t.csv", "user,item,time,stars\n" + rows)
    interactions, items = load(path, rating_column="stars")
    kept = build_sequences(interactions, items, min_rating=3.3, num_candidates=0)
    assert kept.raw_ids.tolist() == [item for item in range(12) if item % 4]


@pytest.mark.parametrize(
    ("rating", "message"),
    [("", "has '' in row 1"), ("good", "has 'good' in row 1"), ("nan", "has 'nan' in row 1"), ("1e999", "row 1")],
)
def test_a_rating_that_is_not_a_number_is_an_error(rating, message, tmp_path):
    path = write(tmp_path / "t.csv", f"user,item,time,stars\n1,2,3,4\n1,2,3,{rating}\n")
    with pytest.raises(ValueError, match=f"column 'stars' of .*t.csv .*{message}.* expected a number"):
        load(path, rating_column="stars")


# Metadata


def test_further_columns_of_the_items_are_kept(polars_frame, tmp_path):
    plays = pd.DataFrame({"user": [1, 1], "item": [8, 7], "time": [3, 4]})
    known = {"item": [7, 8, 9], "name": ["Cup", "Pan", "Lid"], "price": [1.5, None, 2.0], "url": ["u", "v", " "]}
    settings = {"items_title_column": "name", "metadata_columns": ["url", "price"]}
    _, items = load(plays, items=polars_frame(known), **settings)
    assert items.column_names == ["item_id", "title", "year", "genres", "url", "price"]
    assert items["price"][:] == known["price"] and items["url"][:] == known["url"]
    pd.DataFrame(known).to_csv(tmp_path / "items.csv", index=False)
    _, items = load(plays, items=tmp_path / "items.csv", **settings)
    assert items["price"][:] == ["1.5", None, "2.0"] and items["url"][:] == ["u", "v", None]
    with pytest.raises(ValueError, match="metadata_columns has 'title', which the catalogue has itself"):
        load(plays, items=polars_frame(known), items_title_column="name", metadata_columns=["title"])
    with pytest.raises(ValueError, match="metadata_columns is given without items"):
        load(plays, metadata_columns=["price"])
