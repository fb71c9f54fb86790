"""Time and peak memory of preparing a large table: parquet -> Dataset -> build_sequences -> save -> load.

    python recipes/benchmark_data.py --rows 20000000
    python recipes/benchmark_data.py --rows 20000000 --protocol temporal_users --output outputs/benchmark_data.json

The table is synthetic, with the shape of MovieLens-20M: long-tailed histories and item frequencies, times in random
order with ties. It is written chunk by chunk, and each stage is timed in a fresh process, whose peak resident memory
is the one that is reported. Set OMP_NUM_THREADS=1 for figures of one thread.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_CHUNK = 1 << 20
ML_20M_ROWS, ML_20M_USERS, ML_20M_ITEMS = 20_000_263, 138_493, 26_744


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure), arguments.protocol)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        started = time.perf_counter()
        write_table(Path(folder), arguments.rows, arguments.string_ids, arguments.seed)
        print(f"wrote {arguments.rows:,} rows in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        command = [sys.executable, __file__, "--measure", folder, "--protocol", arguments.protocol]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    result = {"protocol": arguments.protocol, "rows": arguments.rows, "string_ids": arguments.string_ids, **result}
    print_table(result)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000, help="interactions; users and items shrink with them")
    parser.add_argument("--protocol", default="leave_one_out", choices=["leave_one_out", "temporal_users"])
    parser.add_argument("--string-ids", action="store_true", help="raw ids are strings instead of integers")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic table")
    parser.add_argument("--work-dir", help="folder for the table and the output, 1.5 GB for 20 million rows")
    parser.add_argument("--output", help="JSON file for the result")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # how this program starts itself on a table
    arguments = parser.parse_args()
    if arguments.rows < 100_000:
        parser.error(f"--rows is {arguments.rows}: expected 100000 or more, for ten users with histories")
    return arguments


def write_table(folder: Path, rows: int, string_ids: bool, seed: int) -> None:
    """Write interactions.parquet and items.parquet to `folder`."""
    generator = np.random.default_rng(seed)
    num_users = round(ML_20M_USERS * rows / ML_20M_ROWS)
    num_items = min(ML_20M_ITEMS, round(ML_20M_ITEMS * (rows / ML_20M_ROWS) ** 0.5))
    # Log-normal histories: median 68, mean 144 and longest about 9,000, as in MovieLens-20M.
    users = np.cumsum(generator.lognormal(0, 1.22, num_users))
    items = np.cumsum(1 / (np.arange(num_items) + 50) ** 1.1)
    id_type = pa.string() if string_ids else pa.int64()
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


def measure(folder: Path, protocol: str) -> dict:
    """Seconds per stage and the peak resident memory of this process."""
    from datasets import Dataset, disable_progress_bars

    from hf_ilora import SequenceDatasets, build_sequences

    disable_progress_bars()
    seconds, cpu_seconds = {}, {}

    def timed(stage, function, *arguments, **keywords):
        started, cpu_started = time.perf_counter(), time.process_time()
        result = function(*arguments, **keywords)
        seconds[stage] = round(time.perf_counter() - started, 1)
        cpu_seconds[stage] = round(time.process_time() - cpu_started, 1)
        return result

    cache = str(folder / "cache")
    read = timed("read parquet", Dataset.from_parquet, str(folder / "interactions.parquet"), cache_dir=cache)
    items = Dataset.from_parquet(str(folder / "items.parquet"), cache_dir=cache)
    built = timed("build_sequences", build_sequences, read, items, protocol)
    timed("save", built.save, folder / "sequences")
    users, items, fingerprint = len(built["test"]), built.num_items, built.fingerprint
    del built
    loaded = timed("load", SequenceDatasets.load, folder / "sequences")
    if loaded.fingerprint != fingerprint:
        raise ValueError("the loaded data differ from the saved data: expected equal fingerprints; save is broken")
    unit = 1024 if sys.platform == "darwin" else 1  # ru_maxrss counts bytes there, and kilobytes elsewhere
    peak_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "test_users": users,
        "items": items,
        "rows_per_split": {name: len(dataset) for name, dataset in loaded.items()},
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "total_seconds": round(sum(seconds.values()), 1),
        "total_cpu_seconds": round(sum(cpu_seconds.values()), 1),
        "peak_rss_gigabytes": round(peak_kilobytes * 1024 / 1e9, 2),
        "disk_megabytes": round(sum(file.stat().st_size for file in (folder / "sequences").iterdir()) / 1e6),
    }


def print_table(result: dict) -> None:
    rows = [
        (stage, f"{seconds} s", f"{result['cpu_seconds'][stage]} s") for stage, seconds in result["seconds"].items()
    ]
    rows += [("total", f"{result['total_seconds']} s", f"{result['total_cpu_seconds']} s")]
    rows += [("peak RSS", f"{result['peak_rss_gigabytes']} GB", ""), ("on disk", f"{result['disk_megabytes']} MB", "")]
    print(f"| {result['protocol']}, {result['rows']:,} rows | wall clock | CPU |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
