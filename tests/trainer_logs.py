"""Checkpoints with the part of a run that learning curves read."""

import json
from pathlib import Path

LOG = [
    {"epoch": 1.0, "loss": 6.0, "step": 10},
    {"epoch": 1.0, "eval_ndcg@10": 0.1, "eval_loss": 5.5, "step": 10},
    {"epoch": 2.0, "loss": 5.0, "step": 20},
    {"epoch": 2.0, "eval_ndcg@10": 0.2, "eval_loss": 5.0, "step": 20},
]


def save_run(folder: Path, log: list[dict] = LOG) -> Path:
    """Write two checkpoints, each with the Trainer's log up to its step; returns the folder of the run."""
    for step in (10, 20):
        state = {"global_step": step, "log_history": [entry for entry in log if entry["step"] <= step]}
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return folder
