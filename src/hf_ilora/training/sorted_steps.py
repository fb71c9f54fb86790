"""The order of training prompts: random steps, whose prompts are sorted by length into their batches."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from .candidate_rows import CandidateRows
from .prompt_collator import PromptCollator


class SortedSteps(Sampler[int]):
    """The random order of the Trainer, in which the rows of each optimizer step are sorted by their number of tokens.

    A step sees the rows that it would see anyway, so that its loss and gradient stay the same; but the batches that it
    accumulates are of prompts of about the same length, and need little padding. The longest come first. The order
    depends on (seed, epoch) alone, so that a resumed run repeats it.

    Args:
        rows: the training rows, whose epoch decides the order.
        collator: makes the prompts.
        rows_per_step: rows of all batches and processes of an optimizer step.
        seed: random seed for the order.
    """

    def __init__(self, rows: CandidateRows, collator: PromptCollator, rows_per_step: int, seed: int):
        self.rows, self.collator, self.rows_per_step, self.seed = rows, collator, rows_per_step, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        # As accelerate's SeedableRandomSampler, the Trainer's own.
        generator = torch.Generator().manual_seed(self.seed + self.rows.epoch)
        order = torch.randperm(len(self.rows), generator=generator).numpy()
        measure = copy.copy(self.collator)
        measure.order_candidates = None  # the order of the candidates changes no length
        for start in range(0, len(order), self.rows_per_step):
            of_step = order[start : start + self.rows_per_step]
            lengths = measure([self.rows[index] for index in of_step])["attention_mask"].sum(1).numpy()
            yield from of_step[np.argsort(-lengths, kind="stable")].tolist()


__all__ = ["SortedSteps"]
