"""The benchmark of data measures a table of the size that was asked for, and large tables stay within bounds."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks import data
from tests.paths import PROJECT


def test_tables_have_the_rows_and_kinds_of_ids_that_were_asked_for(tmp_path):
    arguments = data.DataBenchmarkArguments("unused", rows=100_000, string_ids=True)
    data.write_tables(tmp_path, arguments)
    interactions = pq.read_table(tmp_path / "interactions.parquet")
    items = pq.read_table(tmp_path / "items.parquet")
    assert interactions.num_rows == 100_000
    assert str(interactions.schema.field("user_id").type) == str(items.schema.field("item_id").type) == "string"
    assert set(interactions["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())


@pytest.mark.parametrize("out_of_core", [False, True])
def test_every_stage_is_measured_and_reported(out_of_core, tmp_path):
    arguments = data.DataBenchmarkArguments("unused", rows=100_000, out_of_core=out_of_core)
    data.write_tables(tmp_path, arguments)
    found = data.prepare(tmp_path, "leave_one_out", out_of_core, None)
    assert list(found["seconds"]) == ["read parquet", "build_sequences", "save", "load"]
    assert found["total_cpu_seconds"] == pytest.approx(sum(found["cpu_seconds"].values()))
    assert found["rows_per_split"]["test"] == found["test_users"] > 600
    found |= {"total_seconds": 2.04, "total_cpu_seconds": 1.06}
    lines = data.report({"setting": vars(arguments), "preparation": found}).splitlines()
    assert lines[-1] == "| total | 2.0 | 1.1 |" and len(lines) == 4 + 2 + 5


def test_a_table_too_small_for_histories_is_refused():
    with pytest.raises(ValueError, match="rows is 1000: expected at least 100000"):
        data.DataBenchmarkArguments("out", rows=1000)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["leave_one_out", "temporal_users"])
def test_two_million_rows_stay_within_a_tenth_of_the_bounds(protocol, tmp_path):
    """20 million rows may take 3.5 GB above the imported libraries, 0.2 of them in fixed buffers, and 180 s of a free
    core."""
    command = [sys.executable, "-m", "benchmarks.data", "--rows", "2000000", "--protocol", protocol]
    command += ["--work_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, cwd=PROJECT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())["preparation"]
    assert found["added_gigabytes"] < 0.2 + 3.3 / 10
    assert found["total_cpu_seconds"] < 18
