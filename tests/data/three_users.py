"""A data set of three users and four items."""

from datasets import Dataset

from hf_ilora import SequenceDatasets, build_sequences

ITEMS = {"item_id": [10, 20, 30, 40], "title": list("abcd"), "year": [1990, None, 2000, 2001], "genres": [["x"]] * 4}
# The histories of users 1, 2 and 3, in time.
USERS = {1: [10, 20, 30, 40], 2: [20, 10, 40], 3: [40, 30, 20, 10]}


def tables() -> tuple[Dataset, Dataset]:
    rows = [(user, item, time) for user, items in USERS.items() for time, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    interactions = Dataset.from_dict({"user_id": users, "item_id": items, "timestamp": times})
    return interactions, Dataset.from_dict(ITEMS)


def sequences(**settings) -> SequenceDatasets:
    return build_sequences(*tables(), **({"num_candidates": 0} | settings))
