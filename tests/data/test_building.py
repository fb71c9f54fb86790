"""build_sequences against a naive implementation, hand-made histories, and the files of a published split."""

import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, Features, List, Value, concatenate_datasets

from hf_ilora import SequenceDatasets, build_sequences, load_movielens
from tests.data.naive_sequences import (
    contents,
    in_raw_ids,
    interactions_table,
    items_table,
    naive_splits,
    random_rows,
)
from tests.paths import PROJECT

REFERENCE = PROJECT.parent / "shared" / "reference" / "llara_movielens"


class TestLeaveOneOut:
    def test_the_last_three_items_are_the_targets_of_test_validation_and_train(self, small):
        sequences = build_sequences(*small, num_candidates=0)
        assert isinstance(sequences, DatasetDict)
        assert list(sequences) == ["train", "validation", "test"]
        # Histories: user 1: 10 30 20, user 2: 10 40 20 50, user 7: 10 20 30 50 40; ids 1..5 are 10, 20, 30, 40, 50.
        assert sequences["test"].to_dict() == {
            "user_id": [1, 2, 7],
            "history": [[1, 3], [1, 4, 2], [1, 2, 3, 5]],
            "target": [2, 5, 4],
        }
        assert sequences["validation"].to_dict() == {
            "user_id": [1, 2, 7],
            "history": [[1], [1, 4], [1, 2, 3]],
            "target": [3, 2, 5],
        }
        assert sequences["train"].to_dict() == {"user_id": [2, 7], "history": [[1], [1, 2]], "target": [4, 3]}

    def test_the_catalogue_numbers_the_items_that_occur_by_raw_id(self, small):
        sequences = build_sequences(*small, num_candidates=0)
        assert sequences.num_items == 5
        assert sequences.catalogue.table.to_pydict() == {
            "item_id": [1, 2, 3, 4, 5],
            "raw_id": [10, 20, 30, 40, 50],
            "title": [f"Title of {raw_id}" for raw_id in (10, 20, 30, 40, 50)],
            "year": [1995, 1994, None, 1992, 1991],
            "genres": [["Drama", "War"], ["Drama"], [], ["Drama", "War"], ["Drama"]],
            "count": [2, 1, 1, 1, 0],
        }

    def test_every_split_has_explicit_features(self, wide):
        sequences = build_sequences(*wide, num_candidates=2)
        columns = {"user_id": Value("int64"), "history": List(Value("int32")), "target": Value("int32")}
        assert sequences["train"].features == Features(columns)
        columns["candidates"] = List(Value("int32"))
        assert sequences["validation"].features == sequences["test"].features == Features(columns)

    def test_string_ids_are_numbered_by_code_point(self):
        rows = [("ü", item, time) for time, item in enumerate(["b", "Z", "10", "9", "é"])]
        sequences = build_sequences(interactions_table(rows), items_table(["é", "b", "10", "9", "Z"]), num_candidates=0)
        assert sequences.raw_ids.tolist() == ["10", "9", "Z", "b", "é"]
        assert sequences.catalogue.titles([sequences.num_items])[0] == "Title of é"
        assert sequences["test"].to_dict() == {"user_id": ["ü"], "history": [[4, 3, 1, 2]], "target": [5]}

    def test_max_history_keeps_the_newest_items(self, small):
        sequences = build_sequences(*small, num_candidates=0, max_history=2)
        assert sequences["test"]["history"][:] == [[1, 3], [4, 2], [3, 5]]

    def test_min_history_drops_rows_with_shorter_histories(self, small):
        sequences = build_sequences(*small, num_candidates=0, min_history=2)
        assert sequences["train"]["user_id"][:] == [7]
        assert sequences["validation"]["user_id"][:] == [2, 7]


class TestOrder:
    def test_ties_in_time_stay_in_input_order(self):
        rows = [(1, 50, 4), (1, 30, 4), (1, 40, 4), (1, 10, 4), (1, 20, 3)]
        sequences = build_sequences(interactions_table(rows), items_table([10, 20, 30, 40, 50]), num_candidates=0)
        assert in_raw_ids(sequences)["test"] == [(1, [20, 50, 30, 40], 10)]
        # The control: another input order gives other targets.
        sequences = build_sequences(interactions_table(rows[::-1]), items_table([10, 20, 30, 40, 50]), num_candidates=0)
        assert in_raw_ids(sequences)["test"] == [(1, [20, 10, 40, 30], 50)]

    def test_without_ties_the_input_order_changes_nothing(self):
        generator = random.Random(3)
        rows = [(user, item, item * 17 % 101 + user) for user in range(8) for item in generator.sample(range(50), 9)]
        in_order = build_sequences(interactions_table(rows), items_table(range(50)), num_candidates=5)
        shuffled = build_sequences(
            interactions_table(random.Random(1).sample(rows, 72)), items_table(range(50)[::-1]), num_candidates=5
        )
        for split in in_order:
            assert shuffled[split].to_dict() == in_order[split].to_dict()

    def test_fractions_of_seconds_order_the_items(self):
        rows = [(1, 10, 2.75), (1, 20, 2.25), (1, 30, 2.5), (1, 40, 0.0)]
        sequences = build_sequences(interactions_table(rows), items_table([10, 20, 30, 40]), num_candidates=0)
        assert in_raw_ids(sequences)["test"] == [(1, [40, 20, 30], 10)]

    def test_selected_rows_and_chunks_read_like_a_plain_table(self):
        """A Dataset may carry an indices mapping, a format, and many chunks."""
        rows = random_rows(5)
        plain = build_sequences(interactions_table(rows), items_table(range(3, 40, 3)), num_candidates=2)
        doubled = interactions_table([*rows, *rows]).add_column("extra", list(range(2 * len(rows))))
        selected = doubled.select([*range(0, len(rows), 2), *range(1, len(rows), 2)])
        selected = selected.select(np.argsort(selected["extra"][:])).with_format("torch")
        chunked = concatenate_datasets(
            [interactions_table(rows[place : place + 7]) for place in range(0, len(rows), 7)]
        )
        for table in (selected, chunked):
            assert contents(build_sequences(table, items_table(range(3, 40, 3)), num_candidates=2)) == contents(plain)


class TestAgainstNaive:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("protocol", ["leave_one_out", "temporal_users"])
    def test_random_tables_are_split_as_by_hand(self, protocol, seed):
        rows = random_rows(seed, users=40 + seed, string_ids=seed % 2 == 1)
        keywords = {"min_user_interactions": 3 + seed % 3, "min_item_interactions": 1 + seed % 4}
        if protocol == "temporal_users":
            keywords["order_users_by"] = "first" if seed % 4 < 2 else "last"
        if seed % 3 == 2:
            keywords |= {"max_history": 4, "min_history": 2}
        keywords["drop_repeats"] = seed % 5 == 4
        items = items_table(sorted({item for _, item, *_ in rows}))
        sequences = build_sequences(interactions_table(rows), items, protocol, num_candidates=0, **keywords)
        expected = naive_splits(
            rows,
            protocol,
            min_user=keywords["min_user_interactions"],
            min_item=keywords["min_item_interactions"],
            drop_repeats=keywords["drop_repeats"],
            max_history=keywords.get("max_history"),
            min_history=keywords.get("min_history"),
            order=keywords.get("order_users_by", "first"),
        )
        assert in_raw_ids(sequences) == expected
        assert min(len(split) for split in expected.values()) > 0  # the comparison is not an empty one

    def test_min_rating_equals_dropping_the_rows_first(self):
        rows = random_rows(21, users=30)
        items = items_table(range(3, 40, 3))
        filtered = [row for row in rows if row[3] >= 3]
        found = build_sequences(interactions_table(rows), items, "temporal_users", min_rating=3, num_candidates=2)
        expected = build_sequences(interactions_table(filtered), items, "temporal_users", num_candidates=2)
        assert contents(found) == contents(expected)
        unfiltered = build_sequences(interactions_table(rows), items, "temporal_users", num_candidates=2)
        assert contents(found) != contents(unfiltered)


class TestColdItems:
    @pytest.mark.parametrize("seed", range(4))
    def test_training_is_that_of_leave_one_out_without_the_cold_items(self, seed):
        rows = random_rows(seed, users=60, items=30, string_ids=seed % 2 == 1)
        tables = interactions_table(rows), items_table(sorted({item for _, item, *_ in rows}))
        settings = {"num_candidates": 5, "max_history": 4} if seed == 3 else {"num_candidates": 5}
        plain = build_sequences(*tables, **settings)
        cold = build_sequences(*tables, "cold_items", cold_share=0.3, cold_seed=seed, **settings)
        for name in ("validation", "test"):
            assert cold[name].to_dict() == plain[name].to_dict()
        assert cold.catalogue.with_counts(plain.catalogue.counts) == plain.catalogue

        whole = build_sequences(*tables, num_candidates=0)["train"]
        items = {item for row in cold["train"] for item in [*row["history"], row["target"]]}
        taken = {item for row in whole for item in [*row["history"], row["target"]]} - items
        assert 5 <= len(taken) <= 9  # of nine cold items, some occur in validation and test only
        expected = {}
        for row in whole:
            kept = [item for item in [*row["history"], row["target"]] if item not in taken]
            if len(kept) > 1:
                expected[row["user_id"]] = kept[-settings.get("max_history", 100) - 1 :]
        assert {row["user_id"]: [*row["history"], row["target"]] for row in cold["train"]} == expected
        assert 0 < len(expected) < len(whole)
        targets = cold["test"]["target"][:] + cold["validation"]["target"][:]
        assert taken & set(targets) and any(taken & set(history) for history in cold["test"]["history"])

    def test_the_draw_follows_the_seed_and_is_stored(self, tmp_path):
        rows = random_rows(0, users=60, items=30)
        tables = interactions_table(rows), items_table(sorted({item for _, item, *_ in rows}))
        first, again, other = (
            build_sequences(*tables, "cold_items", num_candidates=0, cold_seed=seed) for seed in (0, None, 1)
        )
        assert contents(first) == contents(again) != contents(other)
        assert first.protocol["cold_share"] == 0.1 and first.protocol["cold_seed"] == 0
        first.save(tmp_path / "data")
        loaded = SequenceDatasets.load(tmp_path / "data")
        assert contents(loaded) == contents(first) and loaded.fingerprint == first.fingerprint
        assert (loaded.catalogue.counts[1:] == 0).sum() >= 3

    def test_an_empty_train_split_is_an_error(self):
        rows = [(user, item, item) for user in range(3) for item in range(1, 5)]
        with pytest.raises(ValueError, match=r"the train split is empty: .*cold_items expects users with at least 4"):
            build_sequences(
                interactions_table(rows), items_table(range(1, 5)), "cold_items", cold_share=0.7, num_candidates=0
            )


class TestCounts:
    @pytest.mark.parametrize("protocol", ["leave_one_out", "cold_items"])
    def test_the_catalogue_counts_the_items_of_the_training_rows(self, protocol):
        rows = random_rows(3, users=40, items=20)
        tables = interactions_table(rows), items_table(sorted({item for _, item, *_ in rows}))
        sequences = build_sequences(*tables, protocol, num_candidates=0)
        counts = [0] * (sequences.num_items + 1)
        for row in sequences["train"]:
            for item in [*row["history"], row["target"]]:
                counts[item] += 1
        assert sequences.catalogue.counts.tolist() == counts

    def test_prefixes_count_each_interaction_once(self):
        rows = [(user, place + 1, user + place) for user in range(10) for place in range(15)]
        sequences = build_sequences(
            interactions_table(rows), items_table(range(1, 16)), "temporal_users", num_candidates=0
        )
        assert sequences.catalogue.counts.tolist() == [0] + 15 * [8]  # of eight training users

    def test_counts_are_not_stored(self, small, tmp_path):
        sequences = build_sequences(*small, num_candidates=0)
        sequences.save(tmp_path / "data")
        assert "count" not in pq.read_table(tmp_path / "data" / "items.parquet").column_names
        other = SequenceDatasets(dict(sequences), sequences.catalogue.with_counts(np.arange(6)), sequences.protocol)
        assert other.catalogue == sequences.catalogue and other.fingerprint == sequences.fingerprint


class TestTemporalUsers:
    def test_training_takes_every_prefix_and_evaluation_the_last_item(self):
        # User u begins at time 10 - u, so that users 10..3 train, 2 validates and 1 tests.
        rows = [(user, 1 + (user + place) % 12, 10 - user + 20 * place) for user in range(1, 11) for place in range(5)]
        sequences = build_sequences(
            interactions_table(rows), items_table(range(1, 13)), "temporal_users", num_candidates=2
        )
        assert sequences["train"]["user_id"][:4] == [3, 3, 4, 4]
        assert sequences["train"]["history"][:2] == [[4, 5, 6], [4, 5, 6, 7]]
        assert sequences["train"]["target"][:2] == [7, 8]
        assert sequences["validation"]["user_id"][:] == [2]
        assert sequences["validation"]["history"][:] == [[3, 4, 5, 6]]
        assert sequences["validation"]["target"][:] == [7]
        assert sequences["test"]["user_id"][:] == [1]

    def test_histories_have_at_most_ten_items(self):
        rows = [(user, place + 1, user + place) for user in range(10) for place in range(15)]
        sequences = build_sequences(
            interactions_table(rows), items_table(range(1, 16)), "temporal_users", num_candidates=0
        )
        assert sequences["test"]["history"][:] == [list(range(5, 15))]
        assert [len(history) for history in sequences["train"]["history"][:12]] == [
            3,
            4,
            5,
            6,
            7,
            8,
            9,
            10,
            10,
            10,
            10,
            10,
        ]

    def test_boundaries_are_rounded_down_and_ties_go_by_raw_user_id(self):
        rows = [(user, place + 1, place) for user in range(23, 0, -1) for place in range(5)]
        sequences = build_sequences(
            interactions_table(rows), items_table(range(1, 6)), "temporal_users", num_candidates=0
        )
        assert sorted(set(sequences["train"]["user_id"][:])) == list(range(1, 19))
        assert sequences["validation"]["user_id"][:] == [19, 20]
        assert sequences["test"]["user_id"][:] == [21, 22, 23]

    def test_the_last_interaction_may_order_the_users_instead(self):
        rows = [(user, place + 1, place * (20 - user) + user) for user in range(1, 11) for place in range(5)]
        by_first, by_last = (
            build_sequences(
                interactions_table(rows),
                items_table(range(1, 6)),
                "temporal_users",
                num_candidates=0,
                order_users_by=order,
            )
            for order in ("first", "last")
        )
        assert (by_first["test"]["user_id"][:], by_last["test"]["user_id"][:]) == ([10], [1])

    @pytest.mark.slow
    def test_movielens_gives_the_published_rows(self):
        """All 189 rows have the published users, times and windows; 27 repeat the published order within ties as well.

        The published files sorted the ratings of each user with numpy's unstable quicksort, which still runs without
        vector instructions for long doubles: with that order as input order, all rows are equal.
        """
        if not REFERENCE.is_dir():
            pytest.skip("needs ../shared/reference beside the project")
        interactions, items = load_movielens("ml-100k")
        users, raw_items, times, ratings = (
            np.asarray(interactions[name][:]) for name in ("user_id", "item_id", "timestamp", "rating")
        )
        time_of = dict(zip(zip(users.tolist(), raw_items.tolist(), strict=True), times.tolist(), strict=True))
        published = {}
        for name in ("validation", "test"):
            rows = pq.ParquetFile(REFERENCE / f"{name}.parquet").read().to_pylist()
            published[name] = [[raw + 1 for raw in (*row["history"], row["target"])] for row in rows]

        def agreement(table):
            sequences = build_sequences(table, items, "temporal_users", min_rating=3)
            assert {name: len(sequences[name]) for name in published} == {"validation": 94, "test": 95}
            exact, same_but_for_ties = 0, 0
            for name, rows in published.items():
                for user, history, target in in_raw_ids(sequences)[name]:
                    window = [*history, target]
                    window_times = [time_of[user, item] for item in window]
                    exact += window in rows
                    same_but_for_ties += any(
                        [time_of.get((user, item)) for item in row] == window_times for row in rows
                    )
            return exact, same_but_for_ties

        assert agreement(interactions) == (27, 189)
        in_published_order = []
        for user in np.unique(users):
            rated = np.flatnonzero((users == user) & (ratings >= 3))
            in_published_order.extend(rated[np.argsort(times[rated].astype(np.longdouble), kind="quicksort")])
        assert agreement(interactions.select(in_published_order)) == (189, 189)


class TestFilters:
    def test_users_with_too_few_items_are_dropped_and_counted_in_the_log(self, small, caplog):
        interactions, items = small
        more = concatenate_datasets([interactions, interactions_table([(99, 10, 1), (99, 60, 2)])])
        with caplog.at_level("INFO", logger="hf_ilora"):
            sequences = build_sequences(more, items, num_candidates=0)
        assert "dropped 1 of 4 users, 1 of 6 items, 2 of 14 interactions" in caplog.text
        assert 99 not in sequences["test"]["user_id"][:]
        assert 60 not in sequences.raw_ids

    def test_repeats_stay_unless_dropped(self):
        rows = [(1, 10, 1), (1, 20, 2), (1, 10, 3), (1, 30, 4), (1, 20, 5), (1, 40, 6), (1, 40, 6)]
        tables = interactions_table(rows), items_table([10, 20, 30, 40])
        assert in_raw_ids(build_sequences(*tables, num_candidates=0))["test"] == [(1, [10, 20, 10, 30, 20, 40], 40)]
        dropped = build_sequences(*tables, num_candidates=0, drop_repeats=True)
        assert in_raw_ids(dropped)["test"] == [(1, [10, 20, 30], 40)]

    def test_nothing_left_is_an_error_with_counts_and_remedy(self, small):
        message = (
            r"no interaction is left of 12 \(3 users, 5 items\) with min_user_interactions=5 and "
            r"min_item_interactions=3: the longest history has 5 interactions and the most frequent item 3; lower"
        )
        with pytest.raises(ValueError, match=message):
            build_sequences(*small, min_user_interactions=5, min_item_interactions=3)

    def test_no_rating_high_enough_is_an_error(self):
        with pytest.raises(
            ValueError, match=r"none of the 1 interactions has a rating of at least min_rating=6: lower"
        ):
            build_sequences(interactions_table([(1, 10, 1, 5)]), items_table([10]), min_rating=6)

    def test_an_empty_split_is_an_error(self, small):
        interactions = interactions_table([(1, 10, 1), (1, 20, 2), (1, 30, 3)])
        with pytest.raises(ValueError, match=r"the train split is empty: .* users with at least 4 interactions"):
            build_sequences(interactions, small[1], num_candidates=0)
        with pytest.raises(ValueError, match="temporal_users divides 3 users: expected at least 10"):
            build_sequences(*small, "temporal_users")


class TestArguments:
    @pytest.mark.parametrize(
        ("keywords", "error", "message"),
        [
            ({"protocol": "newest"}, ValueError, "expected one of leave_one_out, last_n, temporal_users"),
            ({"protocol": None}, ValueError, "protocol is None"),
            ({"min_user_interactions": 2}, ValueError, "leave_one_out needs 3 or more, because"),
            ({"min_user_interactions": 0, "protocol": "temporal_users"}, ValueError, "expected 1 or more"),
            ({"min_item_interactions": 1.5}, TypeError, "min_item_interactions is 1.5: expected an integer"),
            ({"max_history": 0}, ValueError, "max_history is 0: expected 1 or more"),
            ({"max_history": True}, TypeError, "max_history is True: expected an integer"),
            ({"max_history": 2, "min_history": 3}, ValueError, "max_history=2 is below min_history=3"),
            ({"min_history": "3"}, TypeError, "min_history is '3'"),
            ({"num_candidates": -1}, ValueError, "num_candidates is -1: expected 0 or more"),
            ({"num_candidates": 1}, ValueError, "the target alone: expected 2 or more, or 0"),
            ({"candidate_seed": None}, TypeError, "candidate_seed is None: expected an integer"),
            ({"drop_repeats": 1}, TypeError, "drop_repeats is 1: expected True or False"),
            ({"min_rating": "3"}, TypeError, "min_rating is '3': expected a number or None"),
            ({"min_rating": 3}, ValueError, "interactions has no column rating"),
            ({"order_users_by": "last"}, ValueError, "order_users_by applies to temporal_users only"),
            ({"cold_share": 0.1}, ValueError, "cold_share applies to cold_items only: leave it out for leave_one_out"),
            ({"cold_seed": 0, "protocol": "temporal_users"}, ValueError, "cold_seed applies to cold_items only"),
            ({"cold_share": 1.0, "protocol": "cold_items"}, ValueError, "cold_share is 1.0: expected a share"),
            ({"cold_share": float("nan"), "protocol": "cold_items"}, ValueError, "cold_share is nan: expected a share"),
            ({"cold_share": "0.1", "protocol": "cold_items"}, TypeError, "cold_share is '0.1': expected a number"),
            ({"cold_seed": -1, "protocol": "cold_items"}, ValueError, "cold_seed is -1: expected a whole number"),
            ({"cold_seed": 0.5, "protocol": "cold_items"}, TypeError, "cold_seed is 0.5: expected an integer"),
            ({"protocol": "cold_items"}, ValueError, "cold_share=0.1 of 5 items rounds to 0: expected at least one"),
            ({"min_user_interactions": 2, "protocol": "cold_items"}, ValueError, "cold_items needs 3 or more"),
            (
                {"order_users_by": "age", "protocol": "temporal_users"},
                ValueError,
                "order_users_by is 'age': expected one of first, last",
            ),
        ],
    )
    def test_wrong_arguments_are_errors(self, small, keywords, error, message):
        with pytest.raises(error, match=message):
            build_sequences(*small, **keywords)

    def test_tables_must_be_datasets(self, small):
        interactions, items = small
        with pytest.raises(TypeError, match=r"interactions is a DatasetDict: expected a datasets\.Dataset"):
            build_sequences(DatasetDict({"train": interactions}), items)
        with pytest.raises(TypeError, match="items is a list"):
            build_sequences(interactions, items.to_list())
