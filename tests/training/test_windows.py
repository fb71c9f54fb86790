"""Training windows and evaluation rows against hand-made sequences."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value

from hf_ilora.data.columns import training_sequences
from hf_ilora.training.windows import (
    EvaluationHistories,
    NextItemCollator,
    StreamedHistories,
    StreamedWindows,
    TrainingWindows,
    item_counts,
    rows_are_prefixes,
)

FEATURES = Features({"history": List(Value("int32")), "target": Value("int32")})


def split_of(*sequences):
    rows = {"history": [s[:-1] for s in sequences], "target": [s[-1] for s in sequences]}
    return Dataset.from_dict(rows, features=FEATURES)


SPLIT = split_of([1, 2, 3], [11, 12, 13, 14, 15, 16, 17, 18], [21, 22])


def window(dataset, index):
    row = dataset[index]
    return row["input_ids"].tolist(), row["labels"].tolist()


def test_last_window_is_the_newest():
    windows = TrainingWindows(SPLIT, max_length=3, windows="last")
    assert [window(windows, i) for i in range(len(windows))] == [
        ([1, 2], [2, 3]),
        ([15, 16, 17], [16, 17, 18]),
        ([21], [22]),
    ]


def test_all_windows_cover_every_target_once():
    windows = TrainingWindows(SPLIT, max_length=3, windows="all")
    rows = [window(windows, i) for i in range(len(windows))]
    assert ([15, 16, 17], [16, 17, 18]) in rows and ([11], [12]) in rows
    targets = sorted(target for _, labels in rows for target in labels)
    assert targets == [2, 3, 12, 13, 14, 15, 16, 17, 18, 22]
    assert windows.num_targets == len(targets)


def test_random_windows_cover_whole_histories_over_epochs():
    windows = TrainingWindows(SPLIT, max_length=3, windows="random")
    seen, places = set(), []
    for epoch in range(60):
        windows.set_epoch(epoch)
        inputs, labels = window(windows, 1)
        assert len(inputs) == 3 and labels == [i + 1 for i in inputs]
        assert window(windows, 0) == ([1, 2], [2, 3])
        seen |= set(labels)
        places.append(inputs[0])
    assert seen == set(range(12, 19))
    assert set(places) == set(range(11, 16))


def test_random_windows_repeat_for_equal_seed_and_epoch_only():
    long = split_of(*[list(range(1, 200))] * 20)
    first, second, other = (TrainingWindows(long, 10, "random", seed=seed) for seed in (3, 3, 4))
    first.set_epoch(7)
    second.set_epoch(5)
    second.set_epoch(7)
    other.set_epoch(7)
    assert np.array_equal(first.starts, second.starts)
    assert not np.array_equal(first.starts, other.starts)
    second.set_epoch(8)
    assert not np.array_equal(first.starts, second.starts)


def test_last_target_labels_one_position_per_row():
    windows = TrainingWindows(SPLIT, max_length=3, windows="last", labelled_positions="last")
    assert window(windows, 1) == ([15, 16, 17], [-100, -100, 18])
    assert windows.num_targets == 3


def test_filtered_and_sliced_splits_are_read_right():
    """An Arrow table that carries an indices mapping or an offset must not shift the rows."""
    windows = TrainingWindows(SPLIT.select([1, 2]), max_length=3, windows="last")
    assert window(windows, 0) == ([15, 16, 17], [16, 17, 18]) and window(windows, 1) == ([21], [22])
    chosen = TrainingWindows(SPLIT.select([2, 0]), max_length=3, windows="last")
    assert window(chosen, 0) == ([21], [22]) and window(chosen, 1) == ([1, 2], [2, 3])


def test_skipping_leaves_items_out_and_keeps_the_order():
    windows = TrainingWindows(split_of(list(range(1, 42))), max_length=40, skip_probability=0.5)
    lengths = []
    for epoch in range(50):
        windows.set_epoch(epoch)
        inputs, labels = window(windows, 0)
        sequence = [*inputs, labels[-1]]
        assert inputs[1:] == labels[:-1] and sequence == sorted(set(sequence)) and set(sequence) <= set(range(1, 42))
        lengths.append(len(sequence))
    assert 15 < np.mean(lengths) < 26 and len(set(lengths)) > 5
    assert window(TrainingWindows(SPLIT, 3, skip_probability=0.99), 2) == ([21], [22]), "two items must stay"


def test_shuffling_moves_items_by_less_than_the_distance():
    windows = TrainingWindows(split_of(list(range(1, 42))), max_length=40, shuffle_distance=4)
    inputs, labels = window(windows, 0)
    sequence = np.array([*inputs, labels[-1]])
    assert sorted(sequence) == list(range(1, 42)) and sequence.tolist() != sorted(sequence)
    assert np.abs(sequence - np.arange(1, 42)).max() < 4
    windows.set_epoch(1)
    assert window(windows, 0)[0] != inputs
    windows.set_epoch(0)
    assert window(windows, 0)[0] == inputs


def test_training_sequences_are_given_whole():
    items, boundaries = training_sequences(SPLIT.select([2, 0]))
    assert [row.tolist() for row in np.split(items, boundaries)[1:-1]] == [[21, 22], [1, 2, 3]]
    assert item_counts(SPLIT, 25)[[0, 1, 11, 25]].tolist() == [0, 1, 1, 0]


def test_targets_alone_are_counted_where_rows_are_prefixes():
    counts = item_counts(split_of([1, 2], [1, 2, 3]), 4, labelled_positions="last")
    assert counts.tolist() == [0, 0, 1, 1, 0]


def test_rows_of_one_user_one_after_the_other_are_prefixes():
    rows = split_of([1, 2, 3], [1, 2, 3, 4], [5, 6])
    assert not rows_are_prefixes(rows)  # nobody says whose they are
    assert rows_are_prefixes(rows.add_column("user_id", ["a", "a", "b"]))
    assert not rows_are_prefixes(rows.add_column("user_id", ["a", "b", "c"]))


@pytest.mark.parametrize("windows", ["last", "all"])
def test_streamed_rows_give_the_windows_of_rows_at_hand(windows):
    at_hand = TrainingWindows(SPLIT, 3, windows, "all")
    streamed = StreamedWindows(SPLIT.to_iterable_dataset(), 3, windows, "all")
    found = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in streamed]
    assert found == [window(at_hand, i) for i in range(len(at_hand))]


def test_streamed_random_windows_move_with_the_epoch_and_cover_the_history():
    streamed = StreamedWindows(SPLIT.to_iterable_dataset(), 3, "random")
    starts = set()
    for epoch in range(60):
        streamed.set_epoch(epoch)
        _, row, _ = streamed
        assert row["labels"].tolist() == (row["input_ids"] + 1).tolist()
        starts.add(int(row["input_ids"][0]))
    assert starts == set(range(11, 16))


def test_streamed_histories_are_those_of_rows_at_hand():
    at_hand, streamed = EvaluationHistories(SPLIT, 3), StreamedHistories(SPLIT.to_iterable_dataset(), 3)
    found, expected = (
        [{name: values.tolist() for name, values in row.items()} for row in rows]
        for rows in (streamed, [at_hand[index] for index in range(len(SPLIT))])
    )
    assert found == expected and len(found) == 3


def test_evaluation_rows_hold_newest_items_target_and_everything_seen():
    row = EvaluationHistories(SPLIT, max_length=3)[1]
    assert row["input_ids"].tolist() == [15, 16, 17]
    assert row["labels"].tolist() == [-100, -100, 18]
    assert row["seen_items"].tolist() == [11, 12, 13, 14, 15, 16, 17]


def test_collator_pads_every_key_with_its_own_value():
    batch = NextItemCollator()([EvaluationHistories(SPLIT, max_length=3)[i] for i in range(3)])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [15, 16, 17], [21, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 3, -100], [-100, -100, 18], [22, -100, -100]]
    assert batch["seen_items"].shape == (3, 7) and batch["seen_items"][0].tolist() == [1, 2, 0, 0, 0, 0, 0]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="empty"):
        TrainingWindows(SPLIT.select([]), 3)
    with pytest.raises(ValueError, match="empty"):
        EvaluationHistories(SPLIT.select([]), 3)
    with pytest.raises(ValueError, match="windows='first'"):
        TrainingWindows(SPLIT, 3, windows="first")
    with pytest.raises(ValueError, match="skip_probability=1"):
        TrainingWindows(SPLIT, 3, skip_probability=1)
    with pytest.raises(ValueError, match="must stay in its place"):
        TrainingWindows(SPLIT, 3, labelled_positions="last", skip_probability=0.1)
