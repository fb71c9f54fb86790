"""The recipes that make the tables: several seeds of one configuration, and the memory of a large catalogue."""

import json
import subprocess
import sys

import pytest

from tests.paths import RECIPES
from tests.synthetic import cyclic_sequences

pytestmark = pytest.mark.slow


def test_table_of_seeds_holds_their_mean_and_runs_no_seed_twice(tmp_path):
    cyclic_sequences(num_users=60).save(tmp_path / "data")
    config = tmp_path / "small.yaml"
    config.write_text(
        f"data_dir: {tmp_path / 'data'}\nhidden_size: 8\nmax_length: 8\nnum_train_epochs: 2\noutput_dir: unused\n"
        "use_cpu: true\n"
    )
    options = ["--config_file", config, "--output_dir", tmp_path / "seeds", "--table", tmp_path / "table"]
    command = [
        sys.executable,
        str(RECIPES / "run_seeds.py"),
        *map(str, options),
        "--seeds",
        "1",
        "2",
        "--parallel",
        "2",
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    runs = [json.loads((tmp_path / "seeds" / f"seed-{seed}" / "run.json").read_text()) for seed in (1, 2)]
    assert [run["seed"] for run in runs] == [1, 2]
    values = [run["metrics"]["test"]["masked/ndcg@10"]["mean"] for run in runs]
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["test"]["mean"]["masked/ndcg@10"] == pytest.approx(sum(values) / 2)
    assert f"**{sum(values) / 2:.4f}**" in (tmp_path / "table.md").read_text()

    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "training in" not in again.stderr
    assert json.loads((tmp_path / "seeds" / "seed-1" / "run.json").read_text()) == runs[0]

    config.write_text(config.read_text().replace("hidden_size: 8", "hidden_size: 16"))
    edited = subprocess.run(command, capture_output=True, text=True, check=False)
    assert edited.returncode != 0 and "hidden_size was 8 and is 16" in edited.stderr


def test_million_items_train_in_two_gigabytes_beside_table_and_optimizer():
    command = [sys.executable, str(RECIPES / "benchmark.py"), "--memory-of", "1000000", "2"]
    measured = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert measured["table_and_optimizer_gib"] == pytest.approx(3 * 1_000_001 * 64 * 4 / 2**30)
    assert 0 < measured["overhead_gib"] < 2
