"""Measures time and memory of preparing a large table: parquet, Dataset, `build_sequences`, save, load.

    python -m benchmarks.data --rows 20000000 --output_dir outputs/benchmarks/data
    python -m benchmarks.data --rows 20000000 --protocol temporal_users --output_dir outputs/benchmarks/temporal_data
    python -m benchmarks.data --rows 100000000 --out_of_core --memory_gigabytes 4 --output_dir outputs/benchmarks/large

The table is synthetic and shaped like MovieLens-20M: long-tailed histories and item frequencies, times in random order
with ties. The stages run in their own process, whose peak memory is reported. Pages of mapped files, which the system
reclaims when memory is short, count in the peak; `--memory_gigabytes` limits all other memory, so a run that needs more
fails. Set OMP_NUM_THREADS=1 to measure one thread.
"""

import logging
import resource
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, disable_progress_bars

from benchmarks.measuring import PeakMemory, Stopwatch, in_own_process, peak_bytes, run_benchmark
from hf_ilora import SequenceDatasets, build_sequences, load_interactions
from hf_ilora.runs import parse_arguments, run_main

logger = logging.getLogger(__name__)

ROWS_PER_CHUNK = 1 << 20
ML_20M_ROWS, ML_20M_USERS, ML_20M_ITEMS = 20_000_263, 138_493, 26_744
MIN_ROWS = 100_000  # enough for ten users with histories


@dataclass
class DataBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    rows: int = field(default=20_000_000, metadata={"help": "interactions; users and items shrink with them"})
    protocol: str = field(
        default="leave_one_out",
        metadata={"choices": ["leave_one_out", "temporal_users"], "help": "protocol of the splits"},
    )
    string_ids: bool = field(default=False, metadata={"help": "raw ids are strings instead of integers"})
    seed: int = field(default=0, metadata={"help": "random seed of the synthetic table"})
    work_dir: str | None = field(
        default=None, metadata={"help": "folder for temporary files, 1.5 GB for 20 million rows"}
    )
    out_of_core: bool = field(
        default=False, metadata={"help": "keep tables in files in work_dir, as `hf-ilora prepare --work_dir` does"}
    )
    memory_gigabytes: float | None = field(
        default=None, metadata={"help": "limit of the memory that is not mapped from files (RLIMIT_DATA)"}
    )

    def __post_init__(self):
        if self.rows < MIN_ROWS:
            raise ValueError(f"rows is {self.rows}: expected at least {MIN_ROWS}")


ARGUMENTS = (DataBenchmarkArguments,)


def write_tables(folder: Path, arguments: DataBenchmarkArguments) -> None:
    """Write interactions.parquet and items.parquet to `folder`."""
    rows, generator = arguments.rows, np.random.default_rng(arguments.seed)
    num_users = round(ML_20M_USERS * rows / ML_20M_ROWS)
    num_items = min(ML_20M_ITEMS, round(ML_20M_ITEMS * (rows / ML_20M_ROWS) ** 0.5))
    # Log-normal histories: median 68, mean 144 and longest about 9,000, as in MovieLens-20M.
    users = np.cumsum(generator.lognormal(0, 1.22, num_users))
    items = np.cumsum(1 / (np.arange(num_items) + 50) ** 1.1)
    id_type = pa.string() if arguments.string_ids else pa.int64()
    columns = [("user_id", id_type), ("item_id", id_type), ("timestamp", pa.int64())]
    with pq.ParquetWriter(folder / "interactions.parquet", pa.schema(columns)) as writer:
        for first in range(0, rows, ROWS_PER_CHUNK):
            size = min(ROWS_PER_CHUNK, rows - first)
            user = np.searchsorted(users, generator.random(size) * users[-1])
            item = np.searchsorted(items, generator.random(size) * items[-1])
            seconds = generator.integers(8 * 10**8, 14 * 10**8, size) // 60 * 60  # to the minute, for ties
            # Raw ids have gaps, so that they are not the codes already.
            ids = [pa.array(codes * 7 + 1).cast(id_type) for codes in (user, item)]
            writer.write_batch(pa.record_batch([*ids, pa.array(seconds)], names=[name for name, _ in columns]))
    raw_ids = pa.array(np.arange(num_items) * 7 + 1)
    table = {
        "item_id": raw_ids.cast(id_type),
        "title": raw_ids.cast(pa.string()),
        "year": pa.nulls(num_items, pa.int32()),
        "genres": pa.array([[]] * num_items, pa.list_(pa.string())),
    }
    pq.write_table(pa.table(table), folder / "items.parquet")


def limit_memory(gigabytes: float) -> None:
    """Limit the memory of this process, not counting mapped files and memory that libraries reserve without use."""
    process = psutil.Process()
    reserved_unused = process.memory_info().data - process.memory_info().rss
    resource.setrlimit(resource.RLIMIT_DATA, (round(gigabytes * 1e9) + max(0, reserved_unused),) * 2)


def prepare(folder: Path, protocol: str, out_of_core: bool, memory_gigabytes: float | None) -> dict:
    """Prepare the tables in `folder`; returns seconds per stage and the peak memory of this process."""
    disable_progress_bars()
    if memory_gigabytes is not None:
        limit_memory(memory_gigabytes)
    cache, stopwatch, memory = str(folder / "cache"), Stopwatch(), PeakMemory()
    if out_of_core:
        work_dir, titles = folder / "work", {"items": folder / "items.parquet", "items_title_column": "title"}
        columns = [folder / "interactions.parquet", "user_id", "item_id", "timestamp"]
        read, items = stopwatch.time("read parquet", lambda: load_interactions(*columns, **titles, work_dir=work_dir))
        build = partial(build_sequences, work_dir=work_dir)
    else:
        items = Dataset.from_parquet(str(folder / "items.parquet"), cache_dir=cache)
        read = stopwatch.time(
            "read parquet", lambda: Dataset.from_parquet(str(folder / "interactions.parquet"), cache_dir=cache)
        )
        build = build_sequences
    built = stopwatch.time("build_sequences", build, read, items, protocol)
    stopwatch.time("save", built.save, folder / "sequences")
    users, num_items, fingerprint = len(built["test"]), built.num_items, built.fingerprint
    del built
    loaded = stopwatch.time("load", SequenceDatasets.load, folder / "sequences")
    if loaded.fingerprint != fingerprint:
        raise RuntimeError("the loaded data differ from the saved data: expected equal fingerprints; save is broken")
    seconds, cpu_seconds = stopwatch.medians(), stopwatch.cpu_medians()
    return {
        "test_users": users,
        "items": num_items,
        "rows_per_split": {name: len(split) for name, split in loaded.items()},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "total_seconds": sum(seconds.values()),
        "total_cpu_seconds": sum(cpu_seconds.values()),
        "peak_rss_gigabytes": peak_bytes() / 1e9,
        "added_gigabytes": memory.added_bytes() / 1e9,
        "disk_megabytes": sum(file.stat().st_size for file in (folder / "sequences").iterdir()) / 1e6,
    }


def measure(arguments: DataBenchmarkArguments) -> dict:
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        write_tables(Path(folder), arguments)
        logger.info("wrote %s rows", f"{arguments.rows:,}")
        options = arguments.out_of_core, arguments.memory_gigabytes
        return {"preparation": in_own_process(prepare, Path(folder), arguments.protocol, *options)}


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, found = results["setting"], results["preparation"]
    rows = [(stage, seconds, found["cpu_seconds"][stage]) for stage, seconds in found["seconds"].items()]
    rows.append(("total", found["total_seconds"], found["total_cpu_seconds"]))
    lines = [
        "# Preparing a large table",
        "",
        f"{setting['rows']:,} interactions with {'string' if setting['string_ids'] else 'integer'} ids, "
        f"{found['items']:,} items, protocol {setting['protocol']} with {found['test_users']:,} test users"
        f"{', out of core' if setting['out_of_core'] else ''}"
        + (f", in {setting['memory_gigabytes']:g} GB" if setting["memory_gigabytes"] is not None else "")
        + ". Peak "
        f"memory {found['peak_rss_gigabytes']:.2f} GB, {found['added_gigabytes']:.2f} GB above the imported libraries; "
        f"{found['disk_megabytes']:.0f} MB on disk.",
        "",
        "| stage | seconds | CPU seconds |",
        "|---|---:|---:|",
        *(f"| {stage} | {seconds:.1f} | {cpu:.1f} |" for stage, seconds, cpu in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
