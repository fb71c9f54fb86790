"""The protocols that judge a user by several items, against naive implementations, and what they refuse."""

import random

import pytest

from hf_ilora import SequenceDatasets, build_sequences
from hf_ilora.data.protocol_settings import LEAKS
from hf_ilora.data.public_datasets import PUBLIC_DATASETS
from tests.data.naive_sequences import contents, in_raw_ids, interactions_table, items_table, naive_histories
from tests.paths import PROJECT


def rows_in_time(seed: int, users: int = 20, items: int = 15, days: int = 60) -> list[tuple]:
    """Interleaved histories with repeated items and ties in time; users begin and end at different times."""
    generator = random.Random(seed)
    rows = []
    for user in generator.sample(range(1000), users):
        first = generator.randrange(days // 2)
        times = [generator.randrange(first, days) for _ in range(generator.randint(3, 16))]
        rows += [(user, 3 * generator.randint(1, items), time) for time in times]
    generator.shuffle(rows)
    return rows


def tables(rows: list[tuple]) -> tuple:
    return interactions_table(rows), items_table(sorted({item for _, item, *_ in rows}))


def relevant(sequences: SequenceDatasets, split: str) -> dict:
    """{user: relevant raw ids}."""
    raw_ids = [None, *sequences.raw_ids.tolist()]
    return {row["user_id"]: [raw_ids[item] for item in row["relevant_items"]] for row in sequences[split]}


def judged(user, before: list, after: list) -> tuple | None:
    """(row, relevant items) of a user with a history and the items after it; None without either."""
    return ((user, before, after[0]), list(dict.fromkeys(after))) if before and after else None


def assert_splits(sequences: SequenceDatasets, train: list, validation: list, test: list) -> None:
    """Assert that a data set has these training sequences, and the rows that `judged` returned."""
    found = in_raw_ids(sequences)
    assert [(user, [*history, target]) for user, history, target in found["train"]] == [
        (user, items) for user, items in train if len(items) > 1
    ]
    for name, expected in (("validation", validation), ("test", test)):
        expected = [row for row in expected if row is not None]
        assert found[name] == [row for row, _ in expected]
        assert relevant(sequences, name) == {row[0]: items for row, items in expected}
        assert expected  # the comparison is not an empty one


class TestLastN:
    @pytest.mark.parametrize("num_targets", [2, 3])
    def test_the_last_items_test_and_as_many_before_them_validate(self, num_targets):
        rows = rows_in_time(num_targets)
        sequences = build_sequences(*tables(rows), "last_n", num_targets=num_targets, num_candidates=0)
        histories = naive_histories(rows, 2 * num_targets + 1, 1, False)
        train, validation, test = [], [], []
        for user, history in histories.items():
            items, n = [item for _, item in history], num_targets
            train.append((user, items[: -2 * n]))
            validation.append(judged(user, items[: -2 * n], items[-2 * n : -n]))
            test.append(judged(user, items[:-n], items[-n:]))
        assert_splits(sequences, train, validation, test)

    def test_one_item_is_leave_one_out(self):
        one, expected = (
            build_sequences(*tables(rows_in_time(0)), *protocol, num_candidates=3, num_targets=number)
            for protocol, number in ((["last_n"], 1), ([], None))
        )
        for name in one:
            columns = [column for column in one[name].column_names if column != "relevant_items"]
            assert one[name].select_columns(columns).to_dict() == expected[name].to_dict()
        assert one["test"]["relevant_items"][:] == [[target] for target in expected["test"]["target"]]


def naive_windows(rows: list[tuple], validation_start, test_start, test_end=10**9) -> tuple[list, list, list]:
    """Train, validation and test of `assert_splits`."""
    train, validation, test = [], [], []
    for user, history in naive_histories(rows, 3, 1, False).items():
        before = [item for time, item in history if time < validation_start]
        window = [item for time, item in history if validation_start <= time < test_start]
        train.append((user, before))
        validation.append(judged(user, before, window))
        later = [item for time, item in history if test_start <= time < test_end]
        test.append(judged(user, before + window, later))
    return train, validation, test


class TestGlobalTime:
    def test_two_moments_divide_the_interactions_of_all_users(self):
        rows = rows_in_time(1)
        settings = {"validation_start": 30, "test_start": "1970-01-01T00:00:45Z", "num_candidates": 0}
        sequences = build_sequences(*tables(rows), "global_time", **settings)
        assert_splits(sequences, *naive_windows(rows, 30, 45))
        assert sequences.protocol["test_start"] == 45 and sequences.protocol["test_share"] is None

    def test_shares_are_counted_from_the_newest_interaction_and_ties_belong_to_the_newer_window(self):
        rows = rows_in_time(2)
        times = sorted(time for *_, time in rows)
        begins = [times[len(times) - round(0.2 * len(times) * windows)] for windows in (2, 1)]
        sequences = build_sequences(*tables(rows), "global_time", test_share=0.2, num_candidates=0)
        assert_splits(sequences, *naive_windows(rows, *begins))

    def test_candidates_are_items_that_the_user_has_in_no_window(self):
        rows = rows_in_time(3, items=60)
        sequences = build_sequences(*tables(rows), "global_time", num_candidates=5)
        raw_ids = [None, *sequences.raw_ids.tolist()]
        for row in sequences["test"]:
            own = {item for user, item, _ in rows if user == row["user_id"]}
            others = [raw_ids[item] for item in row["candidates"] if item != row["target"]]
            assert row["target"] in row["candidates"] and len(others) == 4 and not own & set(others)

    @pytest.mark.parametrize("protocol", ["global_time", "time_folds"])
    def test_positions_in_a_history_are_refused_as_times(self, protocol):
        rows = [(user, item, item) for user in range(6) for item in range(10)]
        with pytest.raises(ValueError, match=r"6 of 6 users begin at the time 0: .* look like positions in a history"):
            build_sequences(*tables(rows), protocol, fold=1 if protocol == "time_folds" else None)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"validation_start": 0, "test_start": 45}, "the train split is empty: .* interactions before validation"),
            ({"validation_start": 30, "test_start": 900}, "the test split is empty: .* before test begins, and one in"),
            ({"test_share": 0.0001}, r"test_share=0.0001 divides \d+ interactions, at \d+ different times, into 2"),
        ],
    )
    def test_windows_without_interactions_are_errors(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_sequences(*tables(rows_in_time(1)), "global_time", num_candidates=0, **settings)


class TestTimeFolds:
    def test_each_fold_tests_on_a_window_and_validates_on_the_one_before(self):
        rows = rows_in_time(4, users=40)
        times = sorted(time for *_, time in rows)
        begins = [times[len(times) - round(0.15 * len(times) * windows)] for windows in (4, 3, 2, 1)] + [10**9]
        settings = {"num_folds": 3, "test_share": 0.15, "num_candidates": 0}
        folds = [build_sequences(*tables(rows), "time_folds", fold=fold, **settings) for fold in (1, 2, 3)]
        for place, sequences in enumerate(folds):
            assert_splits(sequences, *naive_windows(rows, *begins[place : place + 3]))
            assert sequences.catalogue.has_items_of(folds[0].catalogue)
        newest = build_sequences(*tables(rows), "global_time", test_share=0.15, num_candidates=0)
        assert {name: newest[name].to_dict() for name in newest} == {name: folds[2][name].to_dict() for name in newest}


class TestRandom:
    def test_the_items_of_every_user_are_divided_and_stay_in_time(self):
        rows = [(user, 3 * item, 100 * user + item) for user in range(30) for item in range(user % 17 + 3)]
        sequences = build_sequences(*tables(rows), "random", test_share=0.2, num_candidates=0)
        splits, tested, validated = (
            in_raw_ids(sequences),
            relevant(sequences, "test"),
            relevant(sequences, "validation"),
        )
        trained = {user: [*history, target] for user, history, target in splits["train"]}
        targets_in_the_middle = 0
        for user, before, target in splits["test"]:
            size = user % 17 + 3
            held = max(1, int(0.2 * size))
            assert len(tested[user]) == len(validated[user]) == held and target == tested[user][0]
            for items in (before, tested[user], validated[user]):
                assert items == sorted(items)  # item ids ascend with time
            assert sorted(before + tested[user]) == [3 * item for item in range(size)]
            own = next(history for other, history, _ in splits["validation"] if other == user)
            assert sorted(own + validated[user]) == before and trained.get(user, own) == own
            targets_in_the_middle += target < before[-1]
        assert len(splits["test"]) == 30 and targets_in_the_middle > 5

    def test_the_draw_follows_the_seed(self):
        first, again, other = (
            build_sequences(*tables(rows_in_time(5)), "random", num_candidates=0, split_seed=seed)
            for seed in (0, None, 1)
        )
        assert contents(first) == contents(again) != contents(other)


@pytest.mark.parametrize(
    ("protocol", "settings"),
    [("last_n", {"num_targets": 2}), ("time_folds", {"fold": 2, "max_history": 3}), ("random", {})],
)
def test_a_round_trip_changes_nothing(protocol, settings, tmp_path):
    sequences = build_sequences(*tables(rows_in_time(6)), protocol, num_candidates=2, **settings)
    assert sequences["test"].column_names == ["user_id", "history", "target", "relevant_items", "candidates"]
    assert max(map(len, sequences["test"]["history"])) <= settings.get("max_history", 100)
    sequences.save(tmp_path / "data")
    loaded = SequenceDatasets.load(tmp_path / "data")
    assert contents(loaded) == contents(sequences) and loaded.fingerprint == sequences.fingerprint


def test_every_protocol_logs_its_leak(caplog):
    with caplog.at_level("INFO", logger="hf_ilora"):
        build_sequences(*tables(rows_in_time(0)), "random", num_candidates=0)
    assert f"leak of random: {LEAKS['random']}" in caplog.text


def test_the_documentation_has_every_protocol_and_public_data_set():
    text = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    for name in (*LEAKS, *PUBLIC_DATASETS):
        assert f"\n| `{name}`" in text


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_targets": 2}, ValueError, "num_targets applies to last_n only: leave it out for leave_one_out"),
        ({"test_share": 0.2}, ValueError, "test_share applies to global_time, time_folds, random only"),
        ({"fold": 1, "protocol": "random"}, ValueError, "fold applies to time_folds only: leave it out for random"),
        ({"protocol": "last_n", "num_targets": 0}, ValueError, "num_targets is 0: expected 1 or more"),
        ({"protocol": "last_n", "num_targets": "2"}, TypeError, "num_targets is '2': expected an integer"),
        (
            {"protocol": "last_n", "num_targets": 2, "min_user_interactions": 4},
            ValueError,
            "min_user_interactions is 4: last_n with num_targets=2 needs 5 or more",
        ),
        ({"protocol": "random", "min_user_interactions": 2}, ValueError, "random needs 3 or more"),
        ({"protocol": "random", "split_seed": -1}, ValueError, "split_seed is -1: expected a whole number"),
        ({"protocol": "random", "test_share": 0.5}, ValueError, "test_share is 0.5: expected a share of .* below 0.5"),
        ({"protocol": "random", "test_share": "0.1"}, TypeError, "test_share is '0.1': expected a number"),
        ({"protocol": "time_folds"}, ValueError, "fold is None: expected 1 to num_folds=3"),
        ({"protocol": "time_folds", "fold": 4}, ValueError, "fold is 4: expected 1 to num_folds=3"),
        ({"protocol": "time_folds", "fold": 1, "num_folds": 1}, ValueError, "num_folds is 1: expected 2 or more"),
        (
            {"protocol": "time_folds", "fold": 1, "test_share": 0.25},
            ValueError,
            "test_share is 0.25: expected a share of the interactions, for 4 windows, above 0 and below 0.25",
        ),
        ({"protocol": "global_time", "test_start": 5}, ValueError, "validation_start is None and test_start is 5"),
        (
            {"protocol": "global_time", "validation_start": 5, "test_start": 5},
            ValueError,
            "validation_start is 5 and test_start is 5: expected an earlier one",
        ),
        (
            {"protocol": "global_time", "validation_start": "May", "test_start": 5},
            ValueError,
            "validation_start is 'May': expected seconds since 1970, or a time in ISO 8601",
        ),
        ({"protocol": "global_time", "test_start": 5, "test_share": 0.1}, ValueError, "test_start and test_share are"),
    ],
)
def test_wrong_settings_are_errors(keywords, error, message):
    with pytest.raises(error, match=message):
        build_sequences(*tables(rows_in_time(0)), **keywords)
