"""Ranks of three users, and the files that save them."""

import numpy as np
import pyarrow as pa

from hf_ilora.evaluation.ranking import SplitRanks
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks

RANKS = SplitRanks(np.array([1, 2, 30]), np.array([2, 4, 40]), np.array([1, 1, 5]))
OTHER_RANKS = SplitRanks(np.array([3, 2, 1]), np.array([1, 1, 1]), np.array([2, 2, 2]))


def saved(path, ranks=RANKS, user_ids=("u", "v", "w"), model="m", fingerprint="f", split="test"):
    SavedRanks.from_ranks(pa.array(user_ids), ranks, RanksSource(model, fingerprint, split)).save(path)
    return path
