"""A small evaluation split and recommenders for it."""

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from hf_ilora import PopularityConfig, PopularityForNextItem, TransitionCountsConfig, TransitionCountsForNextItem

NUM_ITEMS = 40


@pytest.fixture(scope="session")
def histories():
    """50 users with 1 to 25 items, repeats among them."""
    generator = np.random.default_rng(0)
    return [generator.integers(1, NUM_ITEMS + 1, size=generator.integers(1, 26)) for _ in range(50)]


@pytest.fixture(scope="session")
def split(histories):
    """One row per user with 6 candidates; the target was sometimes seen before."""
    generator = np.random.default_rng(1)
    targets = generator.integers(1, NUM_ITEMS + 1, size=len(histories))
    targets[:5] = [history[0] for history in histories[:5]]
    candidates = []
    for target in targets:
        others = generator.permutation(np.setdiff1d(np.arange(1, NUM_ITEMS + 1), [target]))[:5]
        candidates.append(generator.permutation(np.append(others, target)))
    ids = List(Value("int32"))
    features = Features({"user_id": Value("int64"), "history": ids, "target": Value("int32"), "candidates": ids})
    columns = {"user_id": range(100, 150), "history": histories, "target": targets, "candidates": candidates}
    return Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="session")
def counts(histories):
    return TransitionCountsForNextItem.fit(histories, TransitionCountsConfig(num_items=NUM_ITEMS)).eval()


@pytest.fixture(scope="session")
def popularity(histories):
    return PopularityForNextItem.fit(histories, PopularityConfig(num_items=NUM_ITEMS)).eval()
