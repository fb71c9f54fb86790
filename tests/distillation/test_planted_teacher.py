"""A teacher that knows the truth must help, and the same labels given to other histories must not."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from hf_ilora import SASRecConfig, SASRecForNextItem, build_sequences
from hf_ilora.data.windows import TrainingWindows, WindowEpochCallback
from hf_ilora.distillation.label_collator import DistillationCollator
from hf_ilora.distillation.trainer import DistillationArguments, DistillationTrainer
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.statistics import summarize_ranks

NUM_ITEMS, SUCCESSORS, USERS, LENGTH = 200, 10, 130, 9

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world():
    """Every item has ten items that may follow it, some of them likelier; a few short walks show little of it."""
    generator = np.random.default_rng(0)
    following = np.array([generator.choice(NUM_ITEMS, SUCCESSORS, replace=False) for _ in range(NUM_ITEMS)])
    shares = np.exp(-0.3 * np.arange(SUCCESSORS))
    shares /= shares.sum()
    walks = np.empty((USERS, LENGTH), dtype=int)
    walks[:, 0] = generator.integers(0, NUM_ITEMS, USERS)
    for step in range(1, LENGTH):
        choice = generator.choice(SUCCESSORS, USERS, p=shares)
        walks[:, step] = following[walks[:, step - 1], choice]
    interactions = Dataset.from_dict(
        {
            "user_id": np.repeat(np.arange(USERS), LENGTH),
            "item_id": walks.reshape(-1),
            "timestamp": np.tile(np.arange(LENGTH), USERS),
        }
    )
    ids = np.arange(NUM_ITEMS)
    catalogue = Dataset.from_dict(
        {
            "item_id": ids,
            "title": [f"Title {i}" for i in ids],
            "year": [2000] * NUM_ITEMS,
            "genres": [["Drama"]] * NUM_ITEMS,
        }
    )
    sequences = build_sequences(interactions, catalogue, "leave_one_out", num_candidates=20)
    raw_ids = np.array(sequences.catalogue["raw_id"])
    item_of = np.zeros(NUM_ITEMS, dtype=int)
    item_of[raw_ids] = np.arange(1, len(raw_ids) + 1)
    answers = np.zeros((sequences.num_items + 1, SUCCESSORS), dtype=int)
    answers[1:] = item_of[following[raw_ids]]
    return sequences, answers, -np.log(shares)


class PlantedLabels:
    """Looks up what truly follows the newest item; `shuffled` gives each history the answer about another one."""

    def __init__(self, windows, answers, distances, shuffled):
        self.items, self.starts = windows.items, windows._first_starts
        self.answers, self.distances = answers, distances
        self.asked_places = np.arange(len(self.items))
        if shuffled:
            self.asked_places = np.random.default_rng(5).permutation(len(self.items))

    def lookup(self, history_ids, positions):
        history_ids, positions = np.asarray(history_ids), np.asarray(positions)
        real = (history_ids >= 0) & (positions > 0)
        newest = self.items[self.asked_places[np.where(real, self.starts[history_ids] + positions - 1, 0)]]
        items = self.answers[newest] * real[..., None]
        distances = np.broadcast_to(self.distances, items.shape) * real[..., None]
        return torch.from_numpy(items), torch.from_numpy(distances.astype(np.float32))


def ndcg_of_student(world, folder, lam, shuffled=False, seed=0) -> float:
    sequences, answers, distances = world
    set_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "max_length": 8}
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, **sizes))
    windows = TrainingWindows(sequences["train"], 8, seed=seed, with_origins=True)
    arguments = DistillationArguments(
        output_dir=str(folder), distilled_positions="all", lam=lam, seed=seed, num_train_epochs=60, use_cpu=True,
        per_device_train_batch_size=10, learning_rate=3e-3, logging_strategy="no", save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], max_grad_norm=0.0,
        num_distillation_negatives=20,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model,
        arguments,
        train_dataset=windows,
        data_collator=DistillationCollator(PlantedLabels(windows, answers, distances, shuffled), "all"),
        callbacks=[WindowEpochCallback(windows)],
    )
    trainer.train()
    return summarize_ranks(rank_split(model, sequences["test"]))["masked/ndcg@10"].mean


def test_true_labels_help_by_a_third_and_shuffled_ones_do_not(world, tmp_path):
    baseline = ndcg_of_student(world, tmp_path, lam=0.0)
    distilled = ndcg_of_student(world, tmp_path, lam=4.0)
    shuffled = ndcg_of_student(world, tmp_path, lam=4.0, shuffled=True)
    assert distilled > 1.3 * baseline
    assert shuffled < 1.05 * baseline
