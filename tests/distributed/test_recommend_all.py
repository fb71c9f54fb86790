"""recipes/recommend.py killed in the middle and resumed by two processes: every user comes exactly once."""

import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hf_ilora import SASRecConfig, SASRecForNextItem
from tests.paths import RECIPES
from tests.processes import kill_with_children
from tests.recipe_runs import recipe_command, recipe_words
from tests.synthetic import cyclic_sequences

NUM_USERS = 2000


@pytest.mark.slow
def test_two_processes_resume_a_killed_run_and_every_user_comes_once(run_recipe, launch, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sequences = cyclic_sequences(num_users=NUM_USERS)
    sequences.save(tmp_path / "data")
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8, max_length=8))
    model.catalogue = sequences.catalogue
    model.save_pretrained(tmp_path / "model")
    settings = {"model": tmp_path / "model", "data_dir": tmp_path / "data", "all_users": True, "top_k": 5}
    settings |= {"batch_size": 1}  # 64 users in a part
    output, whole = tmp_path / "out.parquet", tmp_path / "whole.parquet"
    process = subprocess.Popen(
        recipe_command("recommend", **settings, output=output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "out.parquet.parts"
    try:
        while process.poll() is None and len(list(parts.glob("part-*.parquet"))) < 3:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed: take more users"
    finally:
        kill_with_children(process)
    process.wait()
    assert 3 <= len(list(parts.glob("part-*.parquet"))) < NUM_USERS // 64 and not output.exists()
    launch("multi_cpu.yaml", RECIPES / "recommend.py", *recipe_words(**settings, output=output))
    run_recipe("recommend", **settings, output=whole)
    found, expected = pq.read_table(output), pq.read_table(whole)
    assert len(found) == NUM_USERS * 5 and found["user_id"].equals(expected["user_id"])
    assert found["item_id"].equals(expected["item_id"]) and found["title"].equals(expected["title"])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["data", "model", "out.parquet", "whole.parquet"]


@pytest.mark.slow
def test_a_process_that_looks_late_finds_the_parts_that_the_first_one_has_written(launch, tmp_path):
    sequences = cyclic_sequences(num_users=24)  # the third of three parts is the first process's
    sequences.save(tmp_path / "data")
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8, max_length=8))
    model.catalogue = sequences.catalogue
    model.save_pretrained(tmp_path / "model")
    program = Path(__file__).with_name("launched_recommend_all.py")
    words = tmp_path / "model", tmp_path / "data", tmp_path / "out.parquet"
    launch("multi_cpu.yaml", program, *words, timeout_seconds=120)
    assert len(pq.read_table(tmp_path / "out.parquet")) == 48
    assert not (tmp_path / "out.parquet.parts").exists()
