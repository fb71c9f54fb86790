"""The benchmark of item tables trains in real processes, and reports what each of them had."""

import pytest

from benchmarks import item_tables


@pytest.mark.slow
def test_a_sharded_and_a_replicated_table_are_measured_and_reported(tmp_path):
    sizes = {"num_items": [30], "replicated_items": [30], "steps": 2, "batch_size": 2, "hidden_size": 8}
    arguments = item_tables.TableBenchmarkArguments(str(tmp_path), **sizes)
    results = {"setting": vars(arguments) | {"torch": "2"}} | item_tables.measure(arguments)
    rows = {row["item_table"]: row["processes"] for row in results["tables"]}
    assert [each["rows"] for each in rows["row_sharded"]] == [16, 15]
    assert [each["table_and_moments"] for each in rows["row_sharded"]] == [16 * 8 * 4 * 3, 15 * 8 * 4 * 3]
    assert [each["rows"] for each in rows["replicated"]] == [31, 31]
    for each in (*rows["replicated"], *rows["row_sharded"]):
        assert 0 < each["libraries"] <= each["peak"] <= each["peak_with_saving"] and each["step"] > 0 < each["save"]
    assert not list(tmp_path.iterdir())
    rows["replicated"][1] |= {"table_and_moments": 7.684e9, "peak": 8.2e9, "peak_with_saving": 9e9}
    rows["replicated"][0] |= {"step": 7.256, "step_cpu": 6.5, "save": 5.4}
    assert "| 30 | replicated | 7.68 | 8.20 | 9.00 | 7.26 s | 6.50 s | 5 s |" in item_tables.report(results)


@pytest.mark.parametrize(("setting", "message"), [({"processes": 1}, "at least 2"), ({"num_items": [0]}, "at least 1")])
def test_bad_sizes_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        item_tables.TableBenchmarkArguments("folder", **setting)
