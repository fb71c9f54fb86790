"""Saved ranks load unchanged, and damaged or foreign files are refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks
from tests.evaluation.small_ranks import OTHER_RANKS, saved


def test_saved_ranks_load_with_their_users_and_source(tmp_path):
    loaded = SavedRanks.load(saved(tmp_path / "new folder" / "m.parquet"))
    assert loaded.source == RanksSource("m", "f", "test")
    assert loaded.table["user_id"].to_pylist() == ["u", "v", "w"]
    assert loaded.ranks("masked").tolist() == [1, 2, 30]
    assert loaded.ranks("unmasked").tolist() == [2, 4, 40]
    assert loaded.ranks("candidates").tolist() == [1, 1, 5]
    with pytest.raises(ValueError, match="ranking is 'full'"):
        loaded.ranks("full")


def test_files_that_are_no_saved_ranks_are_refused(tmp_path):
    path = saved(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match="no saved ranks at"):
        SavedRanks.load(tmp_path / "missing.parquet")
    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole parquet file"):
        SavedRanks.load(truncated)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"rank": [1]}), foreign)
    with pytest.raises(ValueError, match="has the columns rank: expected saved ranks"):
        SavedRanks.load(foreign)


def test_a_write_that_fails_leaves_the_earlier_file_whole(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.parquet")

    def fail(table, where):
        where.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="no space left"):
        saved(path, OTHER_RANKS)
    assert SavedRanks.load(path).ranks("masked").tolist() == [1, 2, 30]
    assert [found.name for found in tmp_path.iterdir()] == ["a.parquet"]
