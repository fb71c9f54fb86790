"""Shared parts of the benchmarks: timing programs in turn, memory of a process, and result files."""

import gc
import json
import multiprocessing
import re
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch

from hf_ilora.evaluation.plots import save_figure
from hf_ilora.files import written_whole
from hf_ilora.runs import RunRecord, set_up_logging, sole_writer
from hf_ilora_cli.shown_text import shown_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Result = TypeVar("_Result")
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stopwatch:
    """Measures named programs.

    Attributes:
        wall, cpu: seconds of each call by name, of wall time and of this process's CPU time.
    """

    def __init__(self):
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, program: Callable[..., _Result], *arguments) -> _Result:
        """Call `program` with `arguments`, record its seconds under `name`, and return what it returns."""
        begin, begin_cpu = time.perf_counter(), time.process_time()
        result = program(*arguments)
        wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
        self.wall[name].append(wall)
        self.cpu[name].append(cpu)
        return result

    def medians(self) -> dict[str, float]:
        """Median wall seconds by name."""
        return {name: statistics.median(seconds) for name, seconds in self.wall.items()}

    def cpu_medians(self) -> dict[str, float]:
        """Median CPU seconds by name."""
        return {name: statistics.median(seconds) for name, seconds in self.cpu.items()}

    def ratio(self, numerator: str, denominator: str) -> float:
        """Median over the rounds of the ratio of two programs' wall times."""
        return median_ratio(self.wall[numerator], self.wall[denominator])

    def cpu_ratio(self, numerator: str, denominator: str) -> float:
        """Median over the rounds of the ratio of two programs' CPU times."""
        return median_ratio(self.cpu[numerator], self.cpu[denominator])


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def time_in_turn(programs: dict[str, Callable[[], object]], rounds: int, warm_up_rounds: int = 2) -> Stopwatch:
    """Run every program once per round, so that a slow moment of the machine hits all of them.

    Args:
        programs: the programs by name. Another one begins each round.
        rounds: measured rounds.
        warm_up_rounds: rounds before these, which are not measured.

    Returns:
        The stopwatch of the measured rounds.
    """
    names = list(programs)
    warm_up, stopwatch = Stopwatch(), Stopwatch()
    for round_ in range(-warm_up_rounds, rounds):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            (stopwatch if round_ >= 0 else warm_up).time(name, programs[name])
    return stopwatch


def in_own_process(function: Callable[..., _Result], *arguments) -> _Result:
    """Call a function in a new process, so that the peak memory is the function's own.

    Args:
        function: a function at the top of a module.
        arguments: its arguments; they and the result are pickled.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes() -> int:
    """Peak resident memory of this process, so far or since `PeakMemory` began."""
    if _STATUS.is_file():  # Linux, whose rusage begins with the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Measures how far the peak memory of this process rises above its memory at the start.

    On Linux the earlier peak is reset; elsewhere it counts, so the result is an upper bound.
    """

    def __init__(self):
        gc.collect()
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")
        self.before = psutil.Process().memory_info().rss

    def added_bytes(self) -> int:
        return peak_bytes() - self.before


def run_benchmark(
    arguments: object,
    measure: Callable[[], dict],
    report: Callable[[dict], str],
    data_fingerprint: str | None = None,
    draw: Callable[[dict], "Figure"] | None = None,
) -> None:
    """Measure, print the report, and write benchmark.json, benchmark.md, run.json, run.log and perhaps benchmark.png.

    Args:
        arguments: dataclass of the settings, with `output_dir`; a setting `threads` limits torch's CPU threads.
        measure: returns the results by name.
        report: turns the results, with the settings under "setting", into Markdown.
        data_fingerprint: fingerprint of the data set, for run.json.
        draw: turns the same results into the figure of benchmark.png; None writes none.
    """
    with sole_writer(arguments.output_dir):
        results = _measure_and_report(arguments, measure, report, data_fingerprint)
        if draw is not None:
            save_figure(draw(results), Path(arguments.output_dir) / "benchmark.png")


def _measure_and_report(
    arguments: object, measure: Callable[[], dict], report: Callable[[dict], str], data_fingerprint: str | None
) -> dict:
    set_up_logging(arguments.output_dir)
    settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
    if "threads" in settings:
        torch.set_num_threads(settings["threads"])
    with RunRecord(arguments.output_dir, [arguments], seed=0) as record:
        if data_fingerprint is not None:
            record.add_data(data_fingerprint)
        results = {"setting": settings | {"torch": torch.__version__}, **measure()}
        record.add_metrics("benchmark", results)
    text = report(results)
    files = {"benchmark.json": json.dumps(results, indent=2) + "\n", "benchmark.md": text}
    for name, content in files.items():
        with written_whole(Path(arguments.output_dir) / name) as path:
            path.write_text(content, encoding="utf-8")
    print(shown_lines(text))
    return results
