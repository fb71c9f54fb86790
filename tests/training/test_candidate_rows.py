"""Drawn candidates against what the rows say about them."""

import time

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from hf_ilora.training.candidate_rows import CandidateRows, draw_candidates
from hf_ilora.training.windows import EpochCallback

ITEMS = List(Value("int32"))


def split_of(histories, targets, candidates=None) -> Dataset:
    columns = {"history": histories, "target": targets}
    features = {"history": ITEMS, "target": Value("int32")}
    if candidates is not None:
        columns["candidates"], features["candidates"] = candidates, ITEMS
    return Dataset.from_dict(columns, features=Features(features))


def random_split(rows: int = 200, num_items: int = 100, length: int = 15, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    items = [generator.permutation(num_items)[: length + 1] + 1 for _ in range(rows)]
    return split_of([row[:-1] for row in items], [row[-1] for row in items])


def all_candidates(rows: CandidateRows) -> np.ndarray:
    return np.stack([rows[index]["candidates"] for index in range(len(rows))])


@pytest.mark.parametrize(("num_items", "num_candidates"), [(100, 20), (1000, 20), (35, 20), (35, 1), (100, 2)])
def test_candidates_are_the_target_and_items_that_the_history_lacks(num_items, num_candidates):
    split = random_split(num_items=num_items)
    rows = CandidateRows(split, num_items, max_history=10, num_candidates=num_candidates)
    for index, original in enumerate(split):
        row = rows[index]
        assert row["target"] == original["target"] and row["history"].tolist() == original["history"][-10:]
        candidates = row["candidates"].tolist()
        assert len(candidates) == len(set(candidates)) == num_candidates
        assert candidates.count(row["target"]) == 1
        assert not set(candidates) & set(original["history"]), "also not with what is older than max_history"
        assert all(1 <= item <= num_items for item in candidates)
        assert row["history"].dtype == row["candidates"].dtype == np.int64
        assert row["uniforms"].shape == (2,) and (row["uniforms"] >= 0).all() and (row["uniforms"] < 1).all()


def test_draws_depend_on_seed_epoch_and_row_alone():
    split = random_split()
    first, again, other = (CandidateRows(split, 100, seed=seed) for seed in (3, 3, 4))
    backwards = [again[index] for index in reversed(range(len(again)))][::-1]
    for index, row in enumerate(backwards):
        assert (row["candidates"] == first[index]["candidates"]).all() and (
            row["uniforms"] == first[index]["uniforms"]
        ).all()
    start = all_candidates(first)
    assert (start != all_candidates(other)).any(axis=1).mean() > 0.99
    part = CandidateRows(split.select(range(7)), 100, seed=3)
    assert (all_candidates(part) == start[:7]).all()
    assert (first[-1]["candidates"] == start[-1]).all() and (first[np.int64(5)]["candidates"] == start[5]).all()


def test_each_epoch_draws_others_and_can_be_repeated():
    rows = CandidateRows(random_split(), 100)
    start, uniforms = all_candidates(rows), rows[0]["uniforms"]
    EpochCallback(rows).on_epoch_begin(None, type("State", (), {"epoch": 1.0}), None)
    assert rows.epoch == 1
    assert (all_candidates(rows) != start).any(axis=1).all() and (rows[0]["uniforms"] != uniforms).all()
    rows.set_epoch(0)
    assert (all_candidates(rows) == start).all()


@pytest.mark.parametrize(("num_items", "length"), [(60, 5), (18, 5)])
def test_every_free_item_and_every_place_is_equally_likely(num_items, length):
    """Both ways of drawing, from a large catalogue and from a small one. Bounds are six standard errors."""
    split = split_of([list(range(1, length + 1))] * 4000, [length + 1] * 4000)
    candidates = all_candidates(CandidateRows(split, num_items, num_candidates=8))
    counts = np.bincount(candidates.reshape(-1), minlength=num_items + 1)
    assert counts[length + 1] == 4000 and not counts[: length + 1].any()
    share = 7 / (num_items - length - 1)
    assert np.abs(counts[length + 2 :] / 4000 - share).max() < 6 * np.sqrt(share / 4000)
    places = np.bincount((candidates == length + 1).argmax(axis=1), minlength=8)
    assert np.abs(places / 4000 - 1 / 8).max() < 6 * np.sqrt(1 / 8 / 4000)


def test_draws_are_uniform_and_apart_from_the_candidates():
    rows = CandidateRows(random_split(rows=2000), 100)
    uniforms = np.stack([rows[index]["uniforms"] for index in range(len(rows))])
    place = np.array([(rows[index]["candidates"] == rows[index]["target"]).argmax() for index in range(len(rows))])
    assert np.abs(uniforms.mean(axis=0) - 0.5).max() < 0.04
    correlations = np.corrcoef(np.column_stack([uniforms, place]).T) - np.eye(3)
    assert np.abs(correlations).max() < 0.12


def test_evaluation_rows_keep_their_candidates():
    split = split_of([[1, 2, 3], [4]], [5, 6], candidates=[[9, 5, 7], [6, 8, 1]])
    rows = CandidateRows(split, 10, max_history=2, num_candidates=20)
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        assert [rows[index]["candidates"].tolist() for index in range(2)] == [[9, 5, 7], [6, 8, 1]]
    assert rows.num_candidates == 3 and rows[0]["history"].tolist() == [2, 3]
    assert rows[1]["uniforms"].tolist() == [0, 0] and len(rows) == 2
    assert CandidateRows(split, 10, uniforms=(0.0, 1.0))[1]["uniforms"].tolist() == [0, 1]


def test_a_catalogue_that_is_just_large_enough_serves():
    rows = CandidateRows(split_of([[1, 2, 2, 1]], [3]), 6, num_candidates=4)
    assert sorted(rows[0]["candidates"].tolist()) == [3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"row 0 leaves 3 of 6 items to draw .* at least 4; lower num_candidates"):
        CandidateRows(split_of([[1, 2, 2, 1]], [3]), 6, num_candidates=5)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (split_of([], []), r"the split is empty"),
        (split_of([[1], []], [2, 3]), r"history of row 1 is empty: drop users"),
        (split_of([[31]], [2]), r"history holds item 31: expected ids 1\.\.30"),
        (split_of([[1]], [0]), r"target holds item 0"),
        (split_of([[1]], [2], [[2, 31]]), r"candidates holds item 31"),
        (split_of([[1], [1]], [2, 2], [[2, 3], [3, 4]]), r"candidates of row 1 lack its target 2"),
        (split_of([[1], [1]], [2, 2], [[2, 3], [2]]), r"rows have 1 to 2 candidates: expected the same number"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(split, message):
    with pytest.raises(ValueError, match=message):
        CandidateRows(split, 30)


def test_settings_out_of_range_are_refused():
    for settings in ({"max_history": 0}, {"num_candidates": 0}):
        with pytest.raises(ValueError, match=r"expected at least 1 of each"):
            CandidateRows(random_split(), 100, **settings)


def test_an_index_past_the_end_is_an_error():
    with pytest.raises(IndexError):
        CandidateRows(random_split(rows=3), 100)[3]


def test_a_row_costs_microseconds():
    rows = CandidateRows(random_split(rows=1000, num_items=2000, length=100), 2000)
    costs = []
    for first in range(0, len(rows), 100):
        started = time.process_time()
        for index in range(first, first + 100):
            rows[index]
        costs.append((time.process_time() - started) / 100)
    assert min(costs) < 150e-6  # about 30 on a quiet core


def test_random_targets_take_any_item_but_the_first_with_the_items_before_it():
    history = list(range(1, 13))
    rows = CandidateRows(split_of([history], [13]), 100, max_history=4, target_items="random")
    targets = []
    for epoch in range(200):
        rows.set_epoch(epoch)
        row = rows[0]
        target = row["target"]
        assert row["history"].tolist() == list(range(max(1, target - 4), target))  # items are in the order of their ids
        assert target in row["candidates"]
        assert set(row["candidates"].tolist()) & set(range(1, 14)) == {target}  # later items are no negatives either
        targets.append(target)
    assert set(targets) == set(range(2, 14))
    rows.set_epoch(3)
    assert rows[0]["target"] == targets[3]


def test_a_split_with_candidates_keeps_its_target():
    split = split_of([[1, 2, 3]], [4], [[4, 5, 6]])
    assert CandidateRows(split, 10, target_items="random")[0]["target"] == 4


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="target_items is 'any': expected one of last, random"):
        CandidateRows(split_of([[1, 2, 3]], [4]), 10, target_items="any")


def test_drawn_candidates_make_a_split_for_evaluation():
    split = Dataset.from_dict({"user_id": ["a", "a"], "history": [[1, 2], [2, 3]], "target": [3, 4]})
    drawn = draw_candidates(split, num_items=9, num_candidates=4, seed=3)
    assert list(drawn["user_id"]) == ["a, row 0", "a, row 1"] and list(drawn["target"]) == [3, 4]
    for row in drawn:
        assert row["target"] in row["candidates"] and len(set(row["candidates"])) == 4
        assert not set(row["history"]) & set(row["candidates"])
    assert draw_candidates(split, 9, 4, seed=3)["candidates"][:] == drawn["candidates"][:]
    rows = CandidateRows(drawn, num_items=9)
    assert rows[0]["candidates"].tolist() == drawn[0]["candidates"]
