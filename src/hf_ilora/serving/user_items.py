"""Rows of item ids for many users in flat arrays, so that all histories and filters take little memory."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hf_ilora.data.columns import slice_indices
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID


@dataclass(frozen=True)
class UserItems:
    """Rows of item ids.

    Args:
        users: (rows,) the raw id of each row's user.
        items: (total,) integer item ids, all rows concatenated.
        starts: (rows + 1,) int64, where each row begins.
    """

    users: pa.Array
    items: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) items of each row."""
        return np.diff(self.starts)

    def row(self, number: int) -> np.ndarray:
        """(length,) the items of one row."""
        return self.items[self.starts[number] : self.starts[number + 1]]

    def take(self, rows: np.ndarray) -> "UserItems":
        """The rows with these numbers, in their order; -1 gives a row without items and without a user."""
        found = rows >= 0
        starts, ends = (np.where(found, bounds[rows], 0) for bounds in (self.starts[:-1], self.starts[1:]))
        users = self.users.take(pa.array(rows, mask=~found))
        return UserItems(users, self.items[slice_indices(starts, ends)], np.append(0, np.cumsum(ends - starts)))

    def padded(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, padded with 0 on the right: (rows, longest, at least 1) int64."""
        lengths = self.lengths[rows]
        steps = np.arange(max(1, lengths.max(initial=0)))  # (longest,)
        real = steps < lengths[:, None]  # (rows, longest)
        padded = np.full(real.shape, PADDING_ITEM_ID, dtype=np.int64)
        padded[real] = self.items[slice_indices(self.starts[rows], self.starts[rows] + lengths)]
        return padded


__all__ = ["UserItems"]
