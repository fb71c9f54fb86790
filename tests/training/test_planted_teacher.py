"""A teacher that knows the truth must help, and the same labels given to other histories must not."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from hf_ilora import DistillationArguments, DistillationTrainer, SASRecConfig, SASRecForNextItem, build_sequences
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.distillation.teachers import RankItemsTeacher
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
    raw_ids = sequences.raw_ids
    item_of = np.zeros(NUM_ITEMS, dtype=int)
    item_of[raw_ids] = np.arange(1, len(raw_ids) + 1)
    answers = np.zeros((sequences.num_items + 1, SUCCESSORS), dtype=int)
    answers[1:] = item_of[following[raw_ids]]
    return sequences, answers, -np.log(shares)


class PlantedTeacher:
    """Answers what truly follows the newest item; shuffled, what follows an item of another history."""

    def __init__(self, sequences, answers, distances, shuffled):
        self.answers, self.distances = torch.from_numpy(answers), torch.from_numpy(distances.astype(np.float32))
        self.others = None
        if shuffled:
            self.others = torch.cat([torch.as_tensor(history) for history in sequences["train"]["history"]])
            self.generator = torch.Generator().manual_seed(5)

    def rank_items(self, histories, top_k, exclude_seen):
        newest = histories.gather(1, histories.ne(0).sum(1, keepdim=True) - 1).squeeze(1)  # (batch,)
        if self.others is not None:
            newest = self.others[torch.randint(len(self.others), (len(newest),), generator=self.generator)]
        return self.answers[newest, :top_k], self.distances[:top_k].expand(len(newest), -1)


def labels_of(world, folder, shuffled=False) -> TeacherLabels:
    """Made as recipes/label_with_teacher.py makes them, and read back."""
    sequences, answers, distances = world
    planted = PlantedTeacher(sequences, answers, distances, shuffled)
    teacher = RankItemsTeacher(planted, sequences.num_items, fingerprint=str(shuffled), source="planted")
    requests = LabelRequests.of_split(sequences["train"], "all")
    settings = {
        "data_fingerprint": sequences.fingerprint, "teacher_fingerprint": teacher.fingerprint,
        "num_items": sequences.num_items, "top_k": SUCCESSORS, "shard_rows": 256, "labelled_positions": "all",
    }  # fmt: skip
    labels = LabelFolder(folder, settings)
    labels.start(lambda: requests)
    label_shards(
        labels, labels.requests(requests), teacher, exclude_seen=False, batch_size=64, process=0, num_processes=1
    )
    labels.finish(labels.requests(requests), teacher)
    return TeacherLabels.load(folder, sequences.fingerprint, teacher.fingerprint)


def ndcg_of_student(sequences, folder, labels, lam, seed) -> float:
    set_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "max_length": 8}
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, **sizes))
    arguments = DistillationArguments(
        output_dir=str(folder), distilled_positions="all", lam=lam, seed=seed, num_train_epochs=60, use_cpu=True,
        per_device_train_batch_size=10, learning_rate=3e-3, logging_strategy="no", save_strategy="no",
        disable_tqdm=True, eval_strategy="no", load_best_model_at_end=False, early_stopping_patience=0,
        lr_scheduler_type="linear",
        num_distillation_negatives=20,
    )  # fmt: skip
    DistillationTrainer(model, arguments, train_dataset=sequences["train"], teacher_labels=labels).train()
    return summarize_ranks(rank_split(model, sequences["test"]))["masked/ndcg@10"].mean


def test_true_labels_help_by_a_third_and_shuffled_ones_do_not(world, tmp_path):
    true, shuffled = labels_of(world, tmp_path / "true"), labels_of(world, tmp_path / "shuffled", shuffled=True)
    found = {"alone": (true, 0.0), "distilled": (true, 4.0), "shuffled": (shuffled, 4.0)}
    ndcg = {
        name: np.mean([ndcg_of_student(world[0], tmp_path / "student", labels, lam, seed) for seed in range(3)])
        for name, (labels, lam) in found.items()
    }
    assert ndcg["distilled"] > 1.3 * ndcg["alone"]
    assert ndcg["shuffled"] < 1.03 * ndcg["alone"]  # what three seeds leave of chance
