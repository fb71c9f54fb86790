"""A small data set with a rule to learn, so that training can be tested in seconds."""

import numpy as np
from datasets import Dataset

from hf_ilora import SequenceDatasets, build_sequences


def cyclic_tables(
    num_users: int = 240, num_items: int = 30, length: int = 14, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Interactions and items: users walk through the items in steps of one or two, each from another start."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(1, 3, size=(num_users, length))
    items = (generator.integers(0, num_items, size=(num_users, 1)) + steps.cumsum(axis=1)) % num_items
    users = np.repeat(np.arange(num_users), length)
    interactions = Dataset.from_dict(
        {"user_id": users, "item_id": 100 + items.reshape(-1), "timestamp": np.tile(np.arange(length), num_users)}
    )
    ids = np.arange(100, 100 + num_items)
    columns = {"item_id": ids, "title": [f"Title {i}" for i in ids], "year": [2000] * num_items}
    return interactions, Dataset.from_dict({**columns, "genres": [["Drama"]] * num_items})


def cyclic_sequences(protocol: str = "leave_one_out", **tables) -> SequenceDatasets:
    """The splits of `cyclic_tables`: the next item is near."""
    return build_sequences(*cyclic_tables(**tables), protocol, num_candidates=5)
