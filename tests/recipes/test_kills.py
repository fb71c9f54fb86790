"""Runs that end from outside (kill -9 at any moment, signals, a full disk): the next run gives the same result."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from hf_ilora.files import LOCK_FILE
from hf_ilora.runs.record import is_finished
from tests.forked_recipes import NAMES, ForkedRecipes
from tests.processes import kill_with_children
from tests.recipe_runs import ENVIRONMENT, newest_checkpoint
from tests.tiny_ilora_parts import save_ilora, save_parts
from tests.titles.encoder_folders import save_bert

KILLS = 4  # of each of the eight recipes
RATINGS = "user,item,when,name\n" + "".join(
    f"{user},{item},{when},Title {item}\n"
    for user in range(12)
    for when, item in enumerate(range(user % 4, user % 4 + 8))
)
# Measured times, the amount that was left to do, and the loss on it.
NOT_REPEATED = ("per_second", "runtime", "labelled_now", "latency", "train_loss")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ILORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        with ForkedRecipes() as recipes:
            yield recipes


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The settings of each recipe, tiny, without the output folder."""
    folder = tmp_path_factory.mktemp("parts")
    parts = save_parts(folder, num_users=32)
    save_ilora(parts, folder / "ilora")
    save_bert(folder / "encoder")
    (folder / "ratings.csv").write_text(RATINGS)
    table = {"interactions": folder / "ratings.csv", "user_column": "user", "item_column": "item"}
    table |= {"time_column": "when", "title_column": "name", "num_candidates": 3}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 8}
    small |= {"per_device_train_batch_size": 16, "num_train_epochs": 3, "early_stopping_patience": 0}
    small |= {"use_cpu": True, "disable_tqdm": True, "initial_items": "random"}
    ilora = {"max_history": 4, "num_candidates": 5, "rank": 4, "num_experts": 2, "router_type": "linear"}
    ilora |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16, "num_train_epochs": 3}
    of_data = {"data_dir": "{output_dir}/data"}
    stages = {
        "data": {"recipe": "prepare_data.py", "options": {name: str(value) for name, value in table.items()}},
        "counts": {"recipe": "fit_counts.py", "reads": ["data"], "options": of_data | {"max_rounds": 1}},
        "sasrec": {"recipe": "train_sasrec.py", "reads": ["data"], "resumes": True, "options": of_data | small},
    }
    stages["data"]["options"]["num_candidates"] = 3
    (folder / "stages.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    labelled = {"teacher": folder / "ilora", "labelled_positions": "all", "batch_size": 8, "top_k": 5, "shard_rows": 64}
    teachers = {"teacher": [parts.recommender, "titles"], "title_encoder": folder / "encoder"}
    teachers |= {"initial_items": "titles_and_cooccurrence", "title_neighbours": 0.2}
    measured = {"latency_calls": 2, "num_resamples": 10, "k": 3, "plot": False}
    data = {"data_dir": parts.data_dir}
    return {
        "prepare_data": table,
        "fit_counts": data | {"max_rounds": 1, "max_length": 5, "history_decay": 0.8},
        "train_sasrec": data | small,
        "train_ilora": vars(parts) | ilora | {"use_cpu": True, "disable_tqdm": True},
        "label_with_teacher": data | labelled,
        "distill_sasrec": data | small | teachers | {"distilled_positions": "all", "kl_weight": 1.0, "lam": 0},
        "evaluate_models": data | measured | {"models": [parts.recommender, folder / "ilora"], "names": ["a", "b"]},
        "run_pipeline": {"config": folder / "stages.yaml"},
    }


def results(folder: Path) -> dict[str, object]:
    """The files of a run by content, and its metrics, as far as every run must give the same."""
    kept = {}
    for path in folder.parent.rglob("*"):
        name = str(path.relative_to(folder.parent))
        if path.is_dir() or "checkpoint-" in name or path.suffix in (".log", ".md", ".csv"):
            continue
        if path.name == LOCK_FILE or path.suffix == ".writer":  # of a killed process: nobody holds them
            continue
        if path.name == "run.json":
            kept[name] = repeated(json.loads(path.read_text())["metrics"])
        elif path.name == "pipeline.json":
            kept[name] = {stage: entry["status"] for stage, entry in json.loads(path.read_text()).items()}
        elif path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            del state["best_model_checkpoint"]  # its path
            kept[name] = state | {"log_history": [repeated(entry) for entry in state["log_history"]]}
        elif path.name != "results.json":
            kept[name] = path.read_bytes()
    return kept


def repeated(metrics: object) -> object:
    if not isinstance(metrics, dict):
        return metrics
    return {name: repeated(value) for name, value in metrics.items() if not name.endswith(NOT_REPEATED)}


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("prepare_data", signal.SIGTERM),
        ("fit_counts", signal.SIGINT),
        ("train_sasrec", signal.SIGTERM),
        ("train_ilora", signal.SIGTERM),
        ("label_with_teacher", signal.SIGTERM),
        ("distill_sasrec", signal.SIGINT),
        ("evaluate_models", signal.SIGTERM),
    ],
)
def test_a_request_to_end_is_on_record_and_the_next_run_finishes(forked, settings, tmp_path, name, number):
    folder = tmp_path / "run"
    fork = {"kill_at": 50, "signal": number}  # the record has begun, and the work is not done
    ended = forked.run(name, watched=tmp_path, fork=fork, **settings[name], output_dir=folder)
    assert ended.code == 128 + number and "Traceback" not in ended.output, ended.output
    [record] = tmp_path.rglob("run.json")
    content = json.loads(record.read_text())
    assert content["status"] == "failed"
    assert content["error"].startswith("KeyboardInterrupt" if number == signal.SIGINT else "Terminated: ended by")
    again = forked.run(name, watched=tmp_path, **settings[name], output_dir=folder)
    assert again.code == 0, again.output
    assert json.loads(record.read_text())["status"] == "finished"


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_again_and_again_gives_what_an_undisturbed_one_gives(forked, settings, tmp_path, name):
    draw = random.Random(name)
    whole, folder = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    undisturbed = forked.run(name, watched=whole.parent, **settings[name], output_dir=whole)
    assert undisturbed.code == 0, undisturbed.output
    expected, kills = results(whole), 0
    assert len(expected) > 2
    for attempt in itertools.count():
        # Of the last run nothing is killed; before, the later ones have less to do.
        kill_at = draw.randint(1, undisturbed.changes) if kills < KILLS else 0
        fork = {"kill_at": kill_at, "delay": draw.choice([0.0, draw.uniform(0, 0.02)])}
        ended = forked.run(name, watched=folder.parent, fork=fork, **settings[name], output_dir=folder)
        if ended.code == -9:
            kills += 1
        else:
            assert ended.code == 0, f"attempt {attempt}, {fork}: {ended.output}"
        if ended.code == 0 or is_finished(folder):
            assert results(folder) == expected
            if kills >= KILLS:
                break
            shutil.rmtree(folder.parent)
        assert attempt < 5 * KILLS
    assert not [path for path in folder.parent.rglob(".*") if "unfinished" in path.name or "previous" in path.name]


def test_a_pipeline_takes_its_stages_along_when_it_is_killed_or_ended(forked, settings, tmp_path):
    """As a user starts it: the stages are processes that a launcher starts."""
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    stages = yaml.safe_load(settings["run_pipeline"]["config"].read_text())["stages"]
    del stages["counts"]
    stages["sasrec"]["options"]["num_train_epochs"] = 30
    (tmp_path / "in_forks.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    stages["sasrec"]["launch"] = "cpu"
    (tmp_path / "launched.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    undisturbed = forked.run("run_pipeline", watched=whole, config=tmp_path / "in_forks.yaml", output_dir=whole)
    assert undisturbed.code == 0, undisturbed.output

    words = ["pipeline", "--config", str(tmp_path / "launched.yaml"), "--output_dir", str(killed)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        written = newest_checkpoint(killed / "sasrec")
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_ilora", *words],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 300
            while newest_checkpoint(killed / "sasrec") == written:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(number)
            assert process.wait(timeout=60) in (-number, 128 + number)
            assert len(started) >= 2 and not psutil.wait_procs(started, timeout=60)[1]
        finally:
            kill_with_children(process)
        assert json.loads((killed / "sasrec" / "run.json").read_text())["error"] == "Terminated: ended by SIGTERM"
    last = subprocess.run(
        [sys.executable, "-m", "hf_ilora", *words], env=os.environ | ENVIRONMENT, capture_output=True, text=True
    )
    assert last.returncode == 0, last.stderr
    assert "resuming from" in last.stderr
    found, expected = results(killed), results(whole)
    assert found.pop("run/composed.yaml") != expected.pop("run/composed.yaml")  # it says how stages are launched
    assert found == expected


def test_the_death_of_a_loader_process_is_reported(forked, settings, tmp_path):
    changes = {"dataloader_num_workers": 2, "per_device_train_batch_size": 4, "output_dir": tmp_path / "run"}
    changes |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "load_best_model_at_end": False}
    every = settings["train_sasrec"] | changes
    ended = forked.run("train_sasrec", watched=tmp_path, fork={"kill_at": 60, "kill_children": True}, **every)
    assert ended.code == 1, ended.output
    assert "DataLoader worker" in ended.output
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("largest_file", [0, 20_000])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_reported_in_a_sentence_with_the_remedy(forked, settings, tmp_path, name, largest_file):
    """The process's limit for the size of files fails each write as a full disk does, with another error number."""
    fork, folder = {"largest_file": largest_file}, tmp_path / "run"
    ended = forked.run(name, watched=tmp_path, fork=fork, **settings[name], output_dir=folder)
    if ended.code == 0 and largest_file:
        return  # it fits
    *_, last = ended.output.splitlines()
    assert ended.code == 2 and last.startswith(f"{name}.py: error: "), ended.output
    assert last.endswith("and run the same command again") or "its log is" in last
    assert "Traceback" not in ended.output and ended.output.count("cannot be written") <= 4
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and ".unfinished" in path.name]
