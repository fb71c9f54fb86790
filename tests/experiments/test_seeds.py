"""The experiment on seeds tabulates their runs, and repeats no finished one."""

import json
import subprocess
import sys

import pytest

from tests.paths import PROJECT
from tests.synthetic import cyclic_sequences

pytestmark = pytest.mark.slow


def test_the_table_of_seeds_has_their_mean_and_no_seed_runs_twice(tmp_path):
    cyclic_sequences(num_users=60).save(tmp_path / "data")
    config = tmp_path / "small.yaml"
    config.write_text(
        f"data_dir: {tmp_path / 'data'}\nhidden_size: 8\nmax_length: 8\nnum_train_epochs: 2\noutput_dir: unused\n"
        "use_cpu: true\n"
    )
    options = ["--config_file", config, "--output_dir", tmp_path / "seeds", "--table", tmp_path / "table"]
    command = [sys.executable, "-m", "experiments.seeds", *map(str, options), "--seeds", "1", "2", "--parallel", "2"]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("train_sasrec begins in ") == 2
    runs = [json.loads((tmp_path / "seeds" / f"seed-{seed}" / "run.json").read_text()) for seed in (1, 2)]
    assert [run["seed"] for run in runs] == [1, 2]
    values = [run["metrics"]["test"]["masked/ndcg@10"]["mean"] for run in runs]
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["test"]["mean"]["masked/ndcg@10"] == pytest.approx(sum(values) / 2)
    assert f"**{sum(values) / 2:.4f}**" in (tmp_path / "table.md").read_text()

    again = run()
    assert again.returncode == 0 and "begins in" not in again.stderr
    assert json.loads((tmp_path / "seeds" / "seed-1" / "run.json").read_text()) == runs[0]

    config.write_text(config.read_text().replace("hidden_size: 8", "hidden_size: 16"))
    edited = run()
    assert edited.returncode != 0 and "hidden_size was 8 and is 16" in edited.stderr
