"""The tools of the benchmarks: stopwatch, turns, memory of a process, and result files."""

import json
import time
from dataclasses import dataclass
from multiprocessing import current_process

import numpy as np
import pytest
import torch

from benchmarks import measuring
from benchmarks.measuring import (
    Stopwatch,
    in_own_process,
    median_ratio,
    peak_bytes,
    run_benchmark,
    time_in_turn,
)
from hf_ilora.runs.checks import check_at_least_one

MEBIBYTE = 2**20


@dataclass
class Settings:
    output_dir: str
    rounds: int = 3
    threads: int = 1


def work(seconds: float) -> str:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return "worked"


def test_a_stopwatch_tells_waiting_from_computing():
    stopwatch = Stopwatch()
    assert stopwatch.time("computes", work, 0.05) == "worked"
    stopwatch.time("waits", time.sleep, 0.05)
    assert stopwatch.wall["waits"][0] >= 0.05 and stopwatch.cpu["waits"][0] < 0.02
    assert stopwatch.cpu["computes"][0] >= 0.05
    assert stopwatch.cpu_ratio("computes", "waits") > 2


def test_medians_and_ratios_are_taken_over_the_rounds():
    stopwatch = Stopwatch()
    stopwatch.wall |= {"a": [1.0, 6.0, 2.0], "b": [2.0, 2.0, 1.0]}
    stopwatch.cpu |= {"a": [1.0, 1.0, 4.0], "b": [2.0, 4.0, 2.0]}
    assert stopwatch.medians() == {"a": 2.0, "b": 2.0} and stopwatch.cpu_medians() == {"a": 1.0, "b": 2.0}
    assert stopwatch.ratio("a", "b") == 2.0  # of 1/2, 3 and 2
    assert stopwatch.cpu_ratio("a", "b") == 0.5  # of 1/2, 1/4 and 2
    with pytest.raises(ValueError, match="longer than argument 1"):
        median_ratio([1.0], [1.0, 2.0])


def test_programs_take_turns_and_warm_up_rounds_are_not_measured():
    calls = []
    programs = {name: lambda name=name: calls.append(name) for name in "abc"}
    stopwatch = time_in_turn(programs, rounds=3, warm_up_rounds=2)
    assert "".join(calls) == "bca" + "cab" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in stopwatch.wall.items()} == {"a": 3, "b": 3, "c": 3}


def fill(mebibytes: int) -> tuple[int, str]:
    before = peak_bytes()
    np.ones(mebibytes * MEBIBYTE, dtype=np.uint8)
    return peak_bytes() - before, current_process().name


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_alone():
    ballast = np.ones(400 * MEBIBYTE, dtype=np.uint8)
    added, name = in_own_process(fill, 100)
    assert 95 * MEBIBYTE < added < 130 * MEBIBYTE  # a peak inherited from this process would hide them
    assert name != current_process().name and len(ballast)


def test_settings_below_one_are_refused():
    check_at_least_one(Settings("out"), "rounds")
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        check_at_least_one(Settings("out", rounds=0), "rounds")


@pytest.fixture
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_results_are_written_with_the_settings_they_belong_to(monkeypatch, tmp_path, capsys, threads_as_before):
    monkeypatch.setattr(measuring, "set_up_logging", lambda output_dir: None)  # for a process of its own
    torch.set_num_threads(2)
    arguments, report = Settings(str(tmp_path)), lambda found: f"{found['threads']} thread(s)\n"
    run_benchmark(arguments, lambda: {"threads": torch.get_num_threads()}, report, "abc")
    results = {"setting": {"rounds": 3, "threads": 1, "torch": torch.__version__}, "threads": 1}
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == results
    assert (tmp_path / "benchmark.md").read_text(encoding="utf-8") == "1 thread(s)\n"
    assert "1 thread(s)" in capsys.readouterr().out
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished" and record["data_fingerprint"] == "abc" and record["threads"] == 1
    assert record["metrics"]["benchmark"] == results
