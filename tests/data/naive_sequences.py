"""Small raw tables, and a naive implementation of the first protocols of build_sequences."""

import random

from datasets import Dataset, Features, List, Value

from hf_ilora import SequenceDatasets


def interactions_table(rows: list[tuple]) -> Dataset:
    """A table of (user, item, time) or (user, item, time, rating)."""
    names = ("user_id", "item_id", "timestamp", "rating")[: len(rows[0])]
    return Dataset.from_dict({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def items_table(raw_ids) -> Dataset:
    raw_ids = list(raw_ids)
    columns = {
        "item_id": raw_ids,
        "title": [f"Title of {raw_id}" for raw_id in raw_ids],
        "year": [None if place % 3 == 0 else 1990 + place for place in range(len(raw_ids))],
        "genres": [["Drama", "War"][: place % 3] for place in range(len(raw_ids))],
    }
    raw_type = "string" if isinstance(raw_ids[0], str) else "int64"
    types = {"item_id": Value(raw_type), "title": Value("string"), "year": Value("int32")}
    return Dataset.from_dict(columns, features=Features({**types, "genres": List(Value("string"))}))


def random_rows(
    seed: int, users: int = 14, items: int = 12, longest: int = 16, string_ids: bool = False
) -> list[tuple]:
    """Interleaved histories with ties in time, repeated interactions and ratings 1 to 5."""
    generator = random.Random(seed)
    rows = []
    for user in generator.sample(range(1000), users):
        for _ in range(generator.randint(1, longest)):
            rows.append((user, generator.randint(1, items) * 3, generator.randint(0, 8), generator.randint(1, 5)))
    generator.shuffle(rows)
    return [(f"u{user}", f"i{item}", *rest) for user, item, *rest in rows] if string_ids else rows


def naive_histories(rows: list[tuple], min_user: int, min_item: int, drop_repeats: bool) -> dict:
    histories = {}
    for user, item, time, *_ in rows:
        histories.setdefault(user, []).append((time, item))
    for user in histories:
        histories[user].sort(key=lambda pair: pair[0])  # list.sort is stable
        if drop_repeats:
            seen, kept = set(), []
            for time, item in histories[user]:
                if item not in seen:
                    kept.append((time, item))
                seen.add(item)
            histories[user] = kept
    while True:
        counts = {}
        for history in histories.values():
            for _, item in history:
                counts[item] = counts.get(item, 0) + 1
        filtered = {}
        for user, history in histories.items():
            history = [pair for pair in history if counts[pair[1]] >= min_item]
            if len(history) >= min_user:
                filtered[user] = history
        if filtered == histories:
            return dict(sorted(histories.items()))
        histories = filtered


def naive_splits(
    rows, protocol, min_user=3, min_item=1, drop_repeats=False, max_history=None, min_history=None, order="first"
):
    """{split: [(user, history, target)]} in raw ids."""
    histories = naive_histories(rows, min_user, min_item, drop_repeats)
    splits = {"train": [], "validation": [], "test": []}
    if protocol == "leave_one_out":
        for user, history in histories.items():
            sequence = [item for _, item in history]
            for name, end in (("train", len(sequence) - 3), ("validation", len(sequence) - 2), ("test", -1)):
                if len(sequence[:end]) > 0 and end != 0:
                    splits[name].append((user, sequence[:end], sequence[end]))
        longest, shortest = max_history or 10**9, min_history or 1
    else:
        place = 0 if order == "first" else -1
        in_time = sorted(histories, key=lambda user: (histories[user][place][0], user))
        first, second = len(in_time) * 8 // 10, len(in_time) * 9 // 10
        for user, history in histories.items():
            sequence = [item for _, item in history]
            name = "train" if user in in_time[:first] else "validation" if user in in_time[first:second] else "test"
            ends = range(1, len(sequence)) if name == "train" else [len(sequence) - 1]
            splits[name].extend((user, sequence[:end], sequence[end]) for end in ends)
        longest, shortest = max_history or 10, min_history or 3
    return {
        name: [(user, history[-longest:], target) for user, history, target in split if len(history) >= shortest]
        for name, split in splits.items()
    }


def in_raw_ids(sequences: SequenceDatasets) -> dict:
    raw_ids = [None, *sequences.raw_ids.tolist()]
    return {
        name: [(row["user_id"], [raw_ids[item] for item in row["history"]], raw_ids[row["target"]]) for row in split]
        for name, split in sequences.items()
    }


def contents(sequences: SequenceDatasets) -> dict:
    return {name: split.to_dict() for name, split in sequences.items()} | {
        "catalogue": sequences.catalogue.table.to_pydict()
    }
