"""Reads the rows of an evaluation split, and divides them into batches for the processes."""

from collections.abc import Iterator

import numpy as np
import torch

from hf_ilora.data.columns import flatten_lists, padded_lists, read_column
from hf_ilora.devices import process_state
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.histories import check_batch_size


class EvaluationRows:
    """An evaluation split as flat arrays: reading rows one by one from a `datasets.Dataset` takes longer than scoring.

    Args:
        split: `datasets.Dataset` with the columns history and target, and optionally candidates and relevant_items.
        num_items: size of the catalogue.

    Attributes:
        items: (total,) item ids of all histories, concatenated.
        starts: (users + 1,) where each history begins in `items`.
        lengths: (users,) items in each history.
        target: (users,) int64 item ids.
        candidates: (users, candidates) int64 item ids; None for a split without candidates.
        relevant_items: (users, relevant) int64 item ids, padded with 0; None for a split with one target per row.

    Raises:
        ValueError: for missing columns, no rows, empty histories, rows with different numbers of candidates, and ids
            outside the catalogue.
    """

    def __init__(self, split, num_items: int):
        missing = [name for name in ("history", "target") if name not in split.column_names]
        if missing:
            raise ValueError(
                f"the split has no column {', '.join(missing)} (found: {', '.join(split.column_names)}): expected an "
                "evaluation split of build_sequences, with history and target"
            )
        if not len(split):
            raise ValueError("the split is empty: expected at least one row to evaluate")
        self.items, self.starts = flatten_lists(split, "history")  # (total,), (users + 1,)
        self.target = read_column(split, "target").to_numpy().astype(np.int64)  # (users,)
        self.candidates = _read_candidates(split) if "candidates" in split.column_names else None
        self.relevant_items = _read_relevant(split) if "relevant_items" in split.column_names else None
        self.lengths = np.diff(self.starts)  # (users,)
        if not self.lengths.min():
            row = int(self.lengths.argmin())
            raise ValueError(
                f"history of row {row} is empty: drop users with fewer interactions (min_user_interactions)"
            )
        for name, ids in (("history", self.items), ("target", self.target), ("candidates", self.candidates)):
            if ids is not None:
                check_known_items(name, ids, num_items)
        if self.relevant_items is not None:
            check_known_items("relevant_items", self.relevant_items[self.relevant_items != PADDING_ITEM_ID], num_items)

    def __len__(self) -> int:
        return len(self.target)

    def by_length(self) -> np.ndarray:
        """Row numbers, longest history first: (users,)."""
        return np.argsort(-self.lengths, kind="stable")

    def batches_of_process(self, batch_size: int) -> Iterator[tuple[np.ndarray, bool]]:
        """This process's batches of row numbers, (batch,) each, and whether to keep their results.

        All processes get the same number of batches, because under ZeRO-3 all of them must run every forward: a process
        without a batch of its own repeats another one and drops the results.

        Raises:
            ValueError: for `batch_size` < 1.
        """
        check_batch_size(batch_size)
        state = process_state()
        # Longest first: if memory is too small, the first batch fails.
        batches = np.split(self.by_length(), range(batch_size, len(self), batch_size))
        for first in range(0, len(batches), state.num_processes):
            mine = first + state.process_index
            yield batches[min(mine, len(batches) - 1)], mine < len(batches)

    def histories(self, rows: np.ndarray) -> torch.Tensor:
        """The items of each row, oldest first, padded with 0 on the right: (rows, longest) int64."""
        lengths = self.lengths[rows]
        steps = np.arange(lengths.max())  # (longest,)
        places = self.starts[rows][:, None] + steps  # (rows, longest)
        real = steps < lengths[:, None]
        histories = np.where(real, self.items[np.where(real, places, 0)], PADDING_ITEM_ID)
        return torch.from_numpy(histories.astype(np.int64))


def _read_candidates(split) -> np.ndarray:
    """(users, candidates) int64."""
    candidates, starts = flatten_lists(split, "candidates")
    lengths = np.diff(starts)
    if lengths.min() != lengths.max() or not lengths.max():
        raise ValueError(
            f"rows have {lengths.min()} to {lengths.max()} candidates: expected the same number, at least 1, in all"
        )
    return candidates.reshape(len(lengths), -1).astype(np.int64)


def _read_relevant(split) -> np.ndarray:
    """(users, relevant) int64, padded with 0."""
    relevant = padded_lists(split, "relevant_items")
    is_empty = ~relevant.any(axis=1)
    if is_empty.any():
        raise ValueError(
            f"relevant_items of row {int(is_empty.argmax())} are empty: expected at least the target; prepare the data "
            "again"
        )
    return relevant


def check_known_items(name: str, ids: torch.Tensor | np.ndarray, num_items: int) -> None:
    """Raise a ValueError unless all ids are 1..num_items."""
    if not len(ids):
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 1 or highest > num_items:
        raise ValueError(
            f"{name} contains item {lowest if lowest < 1 else highest}: expected ids 1..{num_items} of the model's "
            "catalogue; evaluate a model on the data set it was trained on"
        )
