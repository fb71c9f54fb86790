"""Batches of several processes in which no row is repeated to fill the last step."""

import math
from collections.abc import Callable, Iterator

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data import Dataset as TorchDataset

from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL

# The index of a filler.
_NO_ROW = -1
# Key of batches with fillers: (number of real rows, number of rows with the fillers).
_ROW_COUNTS = "row_counts"


class _Filler:
    """Takes the place of a row. A batch of fillers alone is collated from `example`, and is ignored."""

    def __init__(self, example: object):
        self.example = example


class RowsWithFiller(TorchDataset):
    """The rows of a data set, and a filler for the batches of `fill_last_step`.

    Args:
        rows: a data set with at least one row.
    """

    def __init__(self, rows: TorchDataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> object:
        return _Filler(self.rows[0]) if index == _NO_ROW else self.rows[index]


class _FilledBatches(BatchSampler):
    """Batches of row indices that all have the same size, a multiple of the number of processes; fillers come last."""

    def __init__(self, batches: BatchSampler, multiple: int):
        self.batches, self.multiple = batches, multiple
        self.batch_size, self.drop_last = batches.batch_size, False

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.multiple) * self.multiple

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch + [_NO_ROW] * (self.batch_size - len(batch))
        for _ in range(len(self) - len(self.batches)):
            yield [_NO_ROW] * self.batch_size


def fill_last_step(dataloader: DataLoader) -> None:
    """Give fillers to processes that have no row left in the last step.

    accelerate gives them the first rows again, so that the last step of several processes would differ from that of
    one.

    Args:
        dataloader: prepared by accelerate, over `RowsWithFiller`. One that is not divided among processes, drops
            the last rows, or is told to leave batches uneven stays as it is.
    """
    shard = getattr(dataloader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or shard.num_processes == 1:
        return
    if shard.drop_last or not shard.even_batches:
        return
    shard.batch_sampler = _FilledBatches(shard.batch_sampler, 1 if shard.split_batches else shard.num_processes)


class WithoutFillers:
    """A collator that leaves the fillers out of its batches.

    Args:
        collator: makes a batch of rows.
    """

    def __init__(self, collator: Callable[[list], dict]):
        self.collator = collator

    def __call__(self, rows: list) -> dict:
        real = [row for row in rows if not isinstance(row, _Filler)]
        if len(real) == len(rows):
            return self.collator(rows)
        batch = self.collator(real or [rows[0].example])
        return batch | {_ROW_COUNTS: (len(real), len(rows))}


def take_row_counts(batch: dict) -> tuple[int, int] | None:
    """Take out of a batch its numbers of rows, without and with fillers; None for a batch without fillers."""
    return batch.pop(_ROW_COUNTS, None)


def without_fillers_labels(batch: dict) -> dict:
    """A batch whose labels may be counted: a batch of fillers alone gets none."""
    if "labels" not in batch or batch.get(_ROW_COUNTS, (1, 1))[0]:
        return batch
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED_LABEL)}


__all__ = ["RowsWithFiller", "WithoutFillers", "fill_last_step", "take_row_counts", "without_fillers_labels"]
