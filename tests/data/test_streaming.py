"""Tables larger than memory: work_dir changes where columns are kept, but not the data set."""

import gc

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import MemoryMappedTable

from hf_ilora import SequenceDatasets, build_sequences, load_interactions, load_movielens
from hf_ilora.data import histories, input_tables, streaming
from hf_ilora.data.protocol_settings import IN_MEMORY, PROTOCOLS

STREAMED = [protocol for protocol in PROTOCOLS if protocol not in IN_MEMORY]
COLUMNS = ("user", "song", "when")


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of so few rows that a small table has many."""
    monkeypatch.setattr(input_tables, "_ROWS_PER_BATCH", 100)
    monkeypatch.setattr(histories, "_ROWS_PER_BLOCK", 100)
    monkeypatch.setattr(streaming, "_IDS_PER_MERGE", 10)


def write_folder(folder, seed=0, **columns):
    """Three parts of 2,000 plays in all, with ties in time, and a table of songs with some that nobody plays."""
    generator = np.random.default_rng(seed)
    names = np.array([f"song-{song}" for song in range(70)])
    table = {
        "user": generator.integers(0, 90, 2_000),
        "song": names[np.minimum(generator.geometric(0.05, 2_000), 60)],
        "when": generator.integers(1_000, 1_400, 2_000),
        "stars": generator.integers(1, 6, 2_000),
    }
    table = pa.table(table | columns)
    (folder / "plays").mkdir(parents=True)
    for number, (first, last) in enumerate(((0, 700), (700, 1_500), (1_500, 2_000))):
        pq.write_table(table.slice(first, last - first), folder / "plays" / f"part-{number}.parquet")
    pq.write_table(pa.table({"song": names, "name": [f"The {name}" for name in names]}), folder / "songs.parquet")
    return folder


def load(folder, **options):
    titles = {"items": folder / "songs.parquet", "items_item_column": "song", "items_title_column": "name"}
    return load_interactions(folder / "plays", *COLUMNS, **(titles | options))


@pytest.mark.parametrize("protocol", STREAMED)
@pytest.mark.parametrize("filtered", [False, True])
def test_a_folder_of_parts_gives_the_same_data_set_out_of_core(protocol, filtered, tmp_path, small_pieces):
    folder, work_dir = write_folder(tmp_path / "tables"), tmp_path / "work"
    options = {"fold": 2} if protocol == "time_folds" else {}
    if filtered:
        options |= {"min_item_interactions": 8, "min_user_interactions": 12, "drop_repeats": True, "min_rating": 2}
    expected = build_sequences(*load(folder, rating_column="stars"), protocol, **options)
    streamed = load(folder, rating_column="stars", work_dir=work_dir)
    found = build_sequences(*streamed, protocol, work_dir=work_dir, **options)
    assert found.fingerprint == expected.fingerprint
    assert found.catalogue.table.equals(expected.catalogue.table)
    assert all(isinstance(split.data, MemoryMappedTable) for split in (streamed[0], *found.values()))
    found.save(tmp_path / "data")
    assert SequenceDatasets.load(tmp_path / "data").fingerprint == expected.fingerprint


@pytest.mark.parametrize("protocol", STREAMED)
def test_movielens_gives_the_same_data_set_out_of_core(protocol, tmp_path):
    tables, options = load_movielens("ml-100k"), {"fold": 1} if protocol == "time_folds" else {}
    options |= {"min_item_interactions": 5, "min_rating": 3}
    expected = build_sequences(*tables, protocol, **options)
    found = build_sequences(*tables, protocol, work_dir=tmp_path, **options)
    assert found.fingerprint == expected.fingerprint


def test_the_work_folder_keeps_only_what_the_data_set_reads(tmp_path):
    sequences = build_sequences(*load(write_folder(tmp_path / "tables")), work_dir=tmp_path / "work")
    gc.collect()
    read = {file["filename"] for split in sequences.values() for file in split.cache_files}
    assert {str(path) for path in (tmp_path / "work").iterdir()} == read and len(read) == 3


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (pa.array(np.arange(2_000) // 2), "int64"),
        (pa.array(np.arange(2_000) // 4 * 1_000).cast(pa.timestamp("ms")), "int64"),
        (pa.array([*range(1_999), 1_999.5]), "float64"),  # a fraction in the last part only
    ],
)
def test_times_have_one_type_in_all_parts(when, expected, tmp_path):
    folder = write_folder(tmp_path / "tables", when=when)
    streamed, whole = load(folder, work_dir=tmp_path / "work")[0], load(folder)[0]
    assert streamed.features == whole.features and streamed.features["timestamp"].dtype == expected
    assert streamed.to_dict() == whole.to_dict()


@pytest.mark.parametrize("limit", [1, 700, 701, 1_999, 5_000])
def test_a_limit_counts_rows_over_all_parts(limit, tmp_path):
    folder = write_folder(tmp_path / "tables")
    streamed, whole = (load(folder, limit_data_rows=limit, **where) for where in ({"work_dir": tmp_path / "work"}, {}))
    assert streamed[0].to_dict() == whole[0].to_dict() and streamed[1].to_dict() == whole[1].to_dict()


def test_rows_without_times_keep_their_order_over_all_parts(tmp_path):
    folder = write_folder(tmp_path / "tables")
    interactions, items = load_interactions(folder / "plays", "user", "song", None, work_dir=tmp_path / "work")
    assert interactions["timestamp"][:] == list(range(2_000))
    assert items.to_dict() == load_interactions(folder / "plays", "user", "song", None)[1].to_dict()


def test_bad_rows_are_found_with_their_part(tmp_path):
    folder = write_folder(tmp_path / "tables", user=pa.array([*range(1_600), None, *range(399)]))
    with pytest.raises(ValueError, match=r"plays, from row 1,500 on, has None in row 100 .*expected an id"):
        load(folder, work_dir=tmp_path / "work")


def test_parts_with_ids_of_two_types_are_refused(tmp_path):
    folder = write_folder(tmp_path / "tables")
    table = pq.read_table(folder / "plays" / "part-2.parquet")
    users = table["user"].cast(pa.string())
    pq.write_table(table.set_column(0, "user", users), folder / "plays" / "part-2.parquet")
    with pytest.raises(ValueError, match="expected one type per column"):
        load(folder, work_dir=tmp_path / "work")


@pytest.mark.parametrize("protocol", IN_MEMORY)
def test_protocols_that_divide_all_interactions_at_once_say_what_they_need(protocol, tmp_path):
    tables = load(write_folder(tmp_path / "tables"))
    with pytest.raises(ValueError, match=f"for the protocol {protocol}.*expected one of leave_one_out.*leave work_dir"):
        build_sequences(*tables, protocol, work_dir=tmp_path / "work")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("plays.csv", {}, "expected parquet, a file or a folder of parts"),
        (pd.DataFrame({"user": [1], "song": [1], "when": [1]}), {}, "expected parquet"),
        ("plays.parquet", {"title_column": "song"}, "expected the titles in a table of items"),
    ],
)
def test_tables_that_cannot_be_streamed_are_refused(source, options, message, tmp_path):
    if isinstance(source, str):
        (tmp_path / source).touch()
        source = tmp_path / source
    with pytest.raises(ValueError, match=message):
        load_interactions(source, *COLUMNS, work_dir=tmp_path / "work", **options)
