"""A teacher whose answers can be computed by hand, and the folder of its labels."""

from pathlib import Path

import numpy as np
import torch

from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards

DATA_FINGERPRINT = "d" * 64


class KnownTeacher:
    """Answers with the items that follow the newest one in the catalogue; distances grow with the history id."""

    source = "known teacher"
    fingerprint = "f" * 64
    answers_prefixes = True
    max_history = 3
    tokens_per_history = 10

    def __init__(self, num_items: int):
        self.num_items = num_items
        self.tokens_per_item = np.arange(num_items + 1) ** 2  # item i costs i * i
        self.calls = []

    def rank(self, history_ids, histories, top_k, exclude_seen):
        self.calls.append(histories)
        lengths = histories.ne(0).sum(1)  # (batch,)
        newest = histories[torch.arange(len(histories)), lengths - 1]  # (batch,)
        items = (newest[:, None] + torch.arange(top_k)) % self.num_items + 1  # (batch, top_k)
        return items, torch.arange(top_k) + torch.from_numpy(history_ids)[:, None] / 1000

    def item_embeddings(self):
        return torch.arange(5.0 * (self.num_items + 1)).view(-1, 5)


def expected_answer(newest: int, history_id: int, top_k: int, num_items: int) -> tuple[list[int], list[float]]:
    return [(newest + j) % num_items + 1 for j in range(top_k)], [
        float(np.float32(j + history_id / 1000)) for j in range(top_k)
    ]


def label_settings(num_items: int, **changes) -> dict:
    settings = {"data_fingerprint": DATA_FINGERPRINT, "teacher_fingerprint": KnownTeacher.fingerprint}
    return settings | {"num_items": num_items, "top_k": 3, "shard_rows": 16} | changes


def label_all(
    path: Path, split, teacher, *, labelled_positions="last", batch_size=4, processes=1, **changes
) -> LabelFolder:
    """All processes of a run, one after the other."""
    everything = LabelRequests.of_split(split, labelled_positions)
    folder = LabelFolder(path, label_settings(teacher.num_items, **changes))
    folder.start(lambda: everything)
    requests = folder.requests(everything)
    for process in range(processes):
        label_shards(folder, requests, teacher, batch_size=batch_size, process=process, num_processes=processes)
    folder.finish(requests, teacher)
    return folder
