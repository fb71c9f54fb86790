"""The benchmark of two processes launches one and two in turn, with the same rows per step, and divides speeds."""

import json
from pathlib import Path

import pytest

from benchmarks import two_processes
from tests.synthetic import cyclic_sequences


@pytest.fixture
def arguments(tmp_path):
    sizes = {"rounds": 3, "rows": 8, "batches": 4, "batches_per_step": [1, 2]}
    return two_processes.ProcessBenchmarkArguments("data", str(tmp_path), **sizes)


def test_one_and_two_processes_take_turns_with_the_same_rows(arguments, monkeypatch):
    seconds = iter([4.0, 2.0, 8.0, 5.0, 4.0, 1.0] * 2)  # of one process and two, in each of three rounds
    commands = []

    def run(command, env, **settings):
        words = dict(zip(command[5::2], command[6::2], strict=True))
        commands.append(words | {"threads": env["OMP_NUM_THREADS"]})
        folder = Path(words["--output_dir"])
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"durations_seconds": {"train": next(seconds)}}))
        return two_processes.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(two_processes.subprocess, "run", run)
    monkeypatch.setattr(two_processes, "read_record", lambda path: json.loads(path.read_text()))
    results = two_processes.measure(arguments)
    assert [words["--launch"] for words in commands] == ["cpu", "multi_cpu"] * 6
    assert {words["threads"] for words in commands} == {"1"}
    for words in commands:
        processes = 1 if words["--launch"] == "cpu" else 2
        sizes = [words["--per_device_train_batch_size"], words["--gradient_accumulation_steps"], words["--max_steps"]]
        batch, accumulated, steps = map(int, sizes)
        assert processes * batch == 8 and accumulated * steps == 4
    # 32 rows in 4, 8 and 4 seconds, and in 2, 5 and 1; the rounds' ratios are 2, 1.6 and 4.
    expected = {"rows_per_second": {"1": 8.0, "2": 16.0}, "ratio": 2.0}
    assert results["batches_per_step"] == {"1": expected, "2": expected} and len(results["loads"]) == 12
    report = two_processes.report(results | {"setting": vars(arguments) | {"torch": "2"}})
    assert "| 2 | 8.0 | 16.0 | 2.00 |" in report


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="rows is 3: expected an even number"):
        two_processes.ProcessBenchmarkArguments("data", "folder", rows=3)
    with pytest.raises(ValueError, match="batches_per_step are \\[7\\]: expected divisors of 120"):
        two_processes.ProcessBenchmarkArguments("data", "folder", batches_per_step=[7])


@pytest.mark.slow
def test_processes_are_launched(tmp_path):
    cyclic_sequences(num_users=32).save(tmp_path / "data")
    (tmp_path / "small.yaml").write_text("hidden_size: 16\nmax_length: 8\ninitial_items: random\n")
    sizes = {"rounds": 1, "rows": 8, "batches": 2, "batches_per_step": [1]}
    sizes["config_file"] = str(tmp_path / "small.yaml")
    arguments = two_processes.ProcessBenchmarkArguments(str(tmp_path / "data"), str(tmp_path), **sizes)
    [found] = two_processes.measure(arguments)["batches_per_step"].values()
    assert min(found["rows_per_second"].values()) > 0
    records = [json.loads((tmp_path / f"{launch}-1-0" / "run.json").read_text()) for launch in ("cpu", "multi_cpu")]
    assert [record["world_size"] for record in records] == [1, 2]
