"""Rows of history, target and candidates for training and evaluating a language model that picks titles."""

from typing import TypedDict

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch.utils.data import Dataset as TorchDataset

from hf_ilora.data.columns import flatten_lists, read_column

TARGET_ITEMS = ("last", "random")


class CandidateRow(TypedDict):
    """A row for a prompt, see `CandidateRows`."""

    history: np.ndarray
    target: int
    candidates: np.ndarray
    uniforms: np.ndarray


class CandidateRows(TorchDataset):
    """The rows of a split with candidates: the split's own, or else candidates that are drawn anew each epoch.

    Drawn candidates are the target and items that are not in the row's history, all different, uniformly drawn and
    shuffled. They depend on (seed, epoch, row) alone, so that a resumed run repeats them. Where
    `build_sequences` cut the histories (max_history), as the published programs do, items from before the cut may be
    drawn.

    Args:
        split: rows with `history` (list of item ids, oldest first), `target` and, for evaluation, `candidates`.
        num_items: size of the catalogue.
        max_history: newest items that a row keeps; candidates keep clear of the whole history all the same.
        num_candidates: drawn per row, the target among them; a split's own candidates keep their number.
        seed: random seed for all draws.
        target_items: "last", the row's target, for rows that are prefixes of each other (temporal_users); or "random",
            for whole histories (leave_one_out): another item of the row each epoch, with the items before it as
            history. A split's own candidates belong to the last target.
        uniforms: the two numbers of every row; None draws them for every row and epoch, or takes zeros for a split with
            its own candidates.

    Items are dictionaries: `history` (items,) int64, `target` int, `candidates` (num_candidates,) int64 and `uniforms`,
    two numbers in [0, 1) by which the collator chooses the row's prompt.

    Raises:
        ValueError: for a split without rows, an empty history, ids outside the catalogue, candidates without the
            target or of different numbers, and a history that leaves too few items to draw from.
    """

    def __init__(
        self,
        split: Dataset,
        num_items: int,
        max_history: int = 10,
        num_candidates: int = 20,
        seed: int = 0,
        target_items: str = "last",
        uniforms: tuple[float, float] | None = None,
    ):
        if len(split) == 0:
            raise ValueError("the split is empty: expected at least one row; loosen the filters")
        if max_history < 1 or num_candidates < 1:
            raise ValueError(f"max_history={max_history}, num_candidates={num_candidates}: expected at least 1 of each")
        if target_items not in TARGET_ITEMS:
            raise ValueError(f"target_items is {target_items!r}: expected one of {', '.join(TARGET_ITEMS)}")
        self.items, self.boundaries = flatten_lists(split, "history")  # (total,), (rows + 1,)
        self.targets = read_column(split, "target").to_numpy()  # (rows,)
        self.num_items, self.max_history, self.num_candidates = num_items, max_history, num_candidates
        self.seed, self.epoch, self.uniforms = seed, 0, None if uniforms is None else np.array(uniforms)
        self.target_items, self.candidates = target_items, None
        self._check("history", self.items)
        self._check("target", self.targets)
        lengths = np.diff(self.boundaries)  # (rows,)
        if not lengths.all():
            raise ValueError(
                f"the history of row {lengths.argmin()} is empty: drop users with fewer interactions "
                "(min_user_interactions)"
            )
        if "candidates" in split.column_names:
            self.candidates = self._own_candidates(split)
            self.num_candidates = self.candidates.shape[1]
            return
        for row in np.flatnonzero(lengths + num_candidates > num_items).tolist():
            free = int((~self._taken(row)).sum())
            if free < num_candidates - 1:
                raise ValueError(
                    f"row {row} leaves {free} of {num_items} items to draw candidates from: expected at least "
                    f"{num_candidates - 1}; lower num_candidates"
                )

    def __len__(self) -> int:
        return len(self.targets)

    def set_epoch(self, epoch: int) -> None:
        """Draw other candidates from now on; worker processes must be started anew, as the Trainer does per epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> CandidateRow:
        index = range(len(self))[index]  # a negative index would draw differently, one too large read past the end
        history = self.items[self.boundaries[index] : self.boundaries[index + 1]]
        target = self.targets[index]
        if self.candidates is None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            if self.target_items == "random":
                sequence = np.append(history, target)
                place = generator.integers(1, len(sequence))
                history, target = sequence[:place], sequence[place]
            candidates, uniforms = self._draw(index, target, generator)
        else:
            candidates, uniforms = self.candidates[index], np.zeros(2)
        return {
            "history": history[-self.max_history :].astype(np.int64),
            "target": int(target),
            "candidates": candidates,
            "uniforms": uniforms if self.uniforms is None else self.uniforms,
        }

    def _draw(self, index: int, target: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Candidates (num_candidates,) and two numbers of one row."""
        *uniforms, place = generator.random(3)
        taken = self._taken(index)  # (num_items + 1,)
        length = self.boundaries[index + 1] - self.boundaries[index]
        if 2 * (length + self.num_candidates) > self.num_items:  # most draws would be rejected
            negatives = generator.permutation(np.flatnonzero(~taken)).tolist()
        else:
            distinct: dict[int, None] = {}
            while len(distinct) < self.num_candidates - 1:
                items = generator.integers(1, self.num_items + 1, self.num_candidates)
                distinct.update(dict.fromkeys(items[~taken[items]].tolist()))
            negatives = list(distinct)
        place = int(place * self.num_candidates)  # the negatives are in random order already
        candidates = [*negatives[:place], target, *negatives[place : self.num_candidates - 1]]
        return np.array(candidates, dtype=np.int64), np.array(uniforms)

    def _taken(self, index: int) -> np.ndarray:
        """(num_items + 1,) bool, the items that may not be drawn for a row: padding, its history and its target."""
        taken = np.zeros(self.num_items + 1, dtype=bool)
        taken[self.items[self.boundaries[index] : self.boundaries[index + 1]]] = True
        taken[self.targets[index]] = taken[0] = True
        return taken

    def _own_candidates(self, split: Dataset) -> np.ndarray:
        items, boundaries = flatten_lists(split, "candidates")
        lengths = np.diff(boundaries)
        if lengths.min() != lengths.max() or not lengths.max():
            raise ValueError(
                f"rows have {lengths.min()} to {lengths.max()} candidates: expected the same number, at least 1, in all"
            )
        self._check("candidates", items)
        candidates = items.reshape(len(lengths), -1).astype(np.int64)  # (rows, candidates)
        found = (candidates == self.targets[:, None]).any(axis=1)  # (rows,)
        if not found.all():
            row = int(found.argmin())
            raise ValueError(
                f"candidates of row {row} lack its target {self.targets[row]}: expected it to be one of them"
            )
        return candidates

    def _check(self, column: str, item_ids: np.ndarray) -> None:
        wrong = (item_ids < 1) | (item_ids > self.num_items)
        if wrong.any():
            raise ValueError(
                f"{column} holds item {item_ids[wrong][0]}: expected ids 1..{self.num_items} of the catalogue"
            )


def draw_candidates(split: Dataset, num_items: int, num_candidates: int = 20, seed: int = 0) -> Dataset:
    """A training split with drawn candidates, to evaluate on rows that no model learnt from.

    Args:
        split: rows with user_id, history and target.
        num_items: size of the catalogue.
        num_candidates: drawn per row as in `CandidateRows`, the target among them.
        seed: random seed for the draw.

    Returns:
        The rows with a column `candidates`, each with a user_id of its own ("7, row 3"), as results per user need.

    Raises:
        ValueError: as `CandidateRows`.
    """
    rows = CandidateRows(split, num_items, num_candidates=num_candidates, seed=seed)
    candidates = [rows[index]["candidates"].tolist() for index in range(len(rows))]
    names = [f"{user}, row {index}" for index, user in enumerate(read_column(split, "user_id").to_pylist())]
    features = Features({"user_id": Value("string"), "candidates": List(Value("int32"))})
    added = Dataset.from_dict({"user_id": names, "candidates": candidates}, features=features)
    return concatenate_datasets([split.remove_columns("user_id"), added], axis=1)
