"""Training on sharded parquet that is killed again and again: no row is lost, and none is read twice."""

import contextlib
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import MemoryMappedTable
from transformers import TrainerCallback, set_seed

from hf_ilora import NextItemTrainer, NextItemTrainingArguments, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.runs.checkpoints import last_whole_checkpoint

ROWS, BATCH, EPOCHS, KILLS = 123, 8, 3, 20
STEPS = EPOCHS * -(-ROWS // BATCH)


class Killed(BaseException):
    """Ends training on the spot, as `kill -9` does: nothing is saved on the way out."""


class KilledAtStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


class CountingTrainer(NextItemTrainer):
    """Notes which rows each step trains on: their first items, by which they differ."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.rows_of_step = {}

    def training_step(self, model, inputs, *arguments, **options):
        self.rows_of_step[self.state.global_step] = inputs["input_ids"][:, 0].tolist()
        return super().training_step(model, inputs, *arguments, **options)


@pytest.fixture
def shards(tmp_path):
    """Histories as another program writes them, in several parts; row r begins with item r + 1."""
    generator = np.random.default_rng(0)
    for name, parts in (("train", 5), ("validation", 2), ("test", 1)):
        (tmp_path / "histories" / name).mkdir(parents=True)
        for part, rows in enumerate(np.array_split(np.arange(ROWS), parts)):
            histories = [[row + 1, *generator.integers(1, ROWS + 1, 3).tolist()] for row in rows.tolist()]
            table = {"user_id": rows, "history": histories, "target": rows + 1}
            pq.write_table(pa.table(table), tmp_path / "histories" / name / f"part-{part}.parquet")
    (tmp_path / "histories" / "items").mkdir()
    ids = np.arange(1, ROWS + 1)
    items = pa.table({"item_id": ids, "raw_id": ids, "title": [f"Title {item}" for item in ids]})
    pq.write_table(items, tmp_path / "histories" / "items" / "part-0.parquet")
    return tmp_path / "histories"


def train(folder, shards, kill_at=0):
    """One run of a process: it reads the data anew, resumes from the newest checkpoint, and may be killed."""
    sequences = SequenceDatasets.from_parquet(shards, cache_dir=shards / "cache")
    assert all(isinstance(split.data, MemoryMappedTable) for split in sequences.values())
    set_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 4}
    trainer = CountingTrainer(
        SASRecForNextItem(SASRecConfig(num_items=ROWS, **sizes)),
        NextItemTrainingArguments(
            str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, windows="last",
            dataloader_num_workers=2, save_strategy="steps", save_steps=2, save_total_limit=2, eval_strategy="no",
            load_best_model_at_end=False, early_stopping_patience=0, use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=sequences["train"],
        processing_class=sequences.catalogue,
        callbacks=[KilledAtStep(kill_at)],
    )  # fmt: skip
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    return trainer


@pytest.mark.slow
def test_twenty_kills_lose_no_row_and_double_none(shards, tmp_path):
    undisturbed = train(tmp_path / "whole", shards)
    expected, draw = undisturbed.rows_of_step, random.Random(0)
    assert list(expected) == list(range(STEPS))
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS // EPOCHS, (epoch + 1) * STEPS // EPOCHS)
        assert sorted(row for step in steps for row in expected[step]) == list(range(1, ROWS + 1))
    folder, found, kills, killed_at = tmp_path / "killed", {}, 0, 0
    while kills < KILLS:
        killed_at = min(killed_at + draw.randint(1, 3), STEPS - 1)  # also before the next checkpoint is written
        run = train(folder, shards, killed_at)
        for step, rows in run.rows_of_step.items():
            assert rows == expected[step]  # repeated steps since the last checkpoint read the same rows
            found[step] = rows
        assert run.state.global_step == killed_at
        kills += 1
    last = train(folder, shards)
    found |= last.rows_of_step
    assert found == expected
    for name, weights in undisturbed.model.state_dict().items():
        assert weights.equal(last.model.state_dict()[name]), name
