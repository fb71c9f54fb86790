"""The input tables: which are accepted, how their ids are encoded, and which are errors."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.table import InMemoryTable

from hf_ilora.data import input_tables
from hf_ilora.data.input_tables import read_interactions, read_items

GOOD = {"user_id": [3, 1, 3], "item_id": ["b", "a", "c"], "timestamp": [5, 0, 7], "rating": [1.0, 5.0, 3.0]}
GOOD_ITEMS = {
    "item_id": pa.array(["a", "b", "c"]),
    "title": pa.array(["A", "B", "C"]),
    "year": pa.array([1999, None, 2001]),
    "genres": pa.array([["Drama"], [], ["War", "Drama"]]),
}
ITEM_IDS = pa.array(["a", "b"])


def arrow_dataset(columns: dict) -> Dataset:
    return Dataset(InMemoryTable(pa.table(columns)))


class TestReadInteractions:
    def test_codes_are_ranks_of_raw_ids(self):
        coded = read_interactions(arrow_dataset(GOOD), min_rating=None)
        assert coded.users.tolist() == [1, 0, 1]
        assert coded.items.tolist() == [1, 0, 2]
        assert coded.times.tolist() == [5, 0, 7]
        assert coded.user_ids.to_pylist() == [1, 3]
        assert coded.item_ids.to_pylist() == ["a", "b", "c"]
        assert {coded.users.dtype, coded.items.dtype} == {np.dtype(np.int32)}

    def test_codes_agree_across_batches(self, monkeypatch):
        monkeypatch.setattr(input_tables, "_ROWS_PER_BATCH", 4)
        generator = np.random.default_rng(0)
        columns = {"user_id": generator.integers(-9, 9, 50), "item_id": generator.integers(0, 20, 50)}
        coded = read_interactions(arrow_dataset({**columns, "timestamp": np.arange(50)}), min_rating=None)
        for codes, ids, column in ((coded.users, coded.user_ids, "user_id"), (coded.items, coded.item_ids, "item_id")):
            assert ids.to_numpy()[codes].tolist() == columns[column].tolist()
            assert ids.to_pylist() == sorted(set(columns[column].tolist()))

    @pytest.mark.parametrize("id_type", [pa.int8(), pa.uint32(), pa.int64(), pa.string(), pa.large_string()])
    def test_narrow_and_large_types_are_accepted(self, id_type):
        columns = {name: pa.array([3, 1, 2]).cast(id_type) for name in ("user_id", "item_id")}
        coded = read_interactions(arrow_dataset({**columns, "timestamp": pa.array([1, 2, 3], pa.int32())}), None)
        assert coded.user_ids.type in (pa.int64(), pa.string())
        assert [str(raw_id) for raw_id in coded.user_ids.to_pylist()] == ["1", "2", "3"]

    @pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp"])
    def test_a_missing_column_is_an_error(self, column):
        columns = {name: values for name, values in GOOD.items() if name != column}
        with pytest.raises(
            ValueError, match=f"interactions has no column {column}: expected user_id, item_id, timesta"
        ):
            read_interactions(arrow_dataset(columns), None)

    @pytest.mark.parametrize("column", ["user_id", "item_id", "timestamp", "rating"])
    def test_null_values_are_an_error(self, column):
        columns = {**GOOD, column: [GOOD[column][0], None, GOOD[column][2]]}
        with pytest.raises(ValueError, match=f"column '{column}' of interactions has null values: .* drop those rows"):
            read_interactions(arrow_dataset(columns), min_rating=2)

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("user_id", [0.5, 1.0, 2.0], "column 'user_id' of interactions is double: expected integers or strings"),
            ("item_id", [True, False, True], "column 'item_id' of interactions is bool"),
            ("item_id", [["a"], ["b"], ["c"]], "column 'item_id' of interactions is list"),
            (
                "timestamp",
                ["1", "2", "3"],
                "column 'timestamp' of interactions is string: expected seconds as integer or",
            ),
            ("timestamp", pa.array([1, 2, 3], pa.timestamp("s")), "column 'timestamp' of interactions is timestamp"),
            ("rating", ["1", "2", "3"], "column 'rating' of interactions is string: expected integer or float"),
        ],
    )
    def test_another_type_is_an_error(self, column, values, message):
        with pytest.raises(TypeError, match=message):
            read_interactions(arrow_dataset({**GOOD, column: values}), min_rating=2)

    @pytest.mark.parametrize("time", [-1, -0.5, float("nan"), float("inf")])
    def test_times_that_are_negative_or_not_finite_are_an_error(self, time):
        message = f"has 1 values that are negative or not finite, first {time}: expected seconds, 0 or more"
        with pytest.raises(ValueError, match=message):
            read_interactions(arrow_dataset({**GOOD, "timestamp": [1, time, 3]}), None)

    def test_a_nan_rating_is_an_error(self):
        with pytest.raises(ValueError, match="column 'rating' of interactions has NaN values"):
            read_interactions(arrow_dataset({**GOOD, "rating": [1.0, float("nan"), 2.0]}), min_rating=2)
        read_interactions(arrow_dataset({**GOOD, "rating": [1.0, float("nan"), 2.0]}), min_rating=None)

    def test_an_empty_table_is_an_error(self):
        with pytest.raises(ValueError, match="interactions is empty: expected at least one row"):
            read_interactions(arrow_dataset(GOOD).select([]), None)


class TestReadItems:
    def test_types_are_made_uniform(self):
        columns = {**GOOD_ITEMS, "year": pa.array([1999, 2000, 2001], pa.int16()), "extra": [1, 2, 3]}
        columns["genres"] = pa.array([[], [], []], pa.list_(pa.null()))
        table = read_items(arrow_dataset(columns), ITEM_IDS)
        assert table.schema.types == [pa.string(), pa.string(), pa.int32(), pa.list_(pa.string()), pa.int64()]
        assert table["extra"].to_pylist() == [1, 2, 3]
        assert read_items(arrow_dataset(GOOD_ITEMS | {"year": pa.nulls(3)}), ITEM_IDS)["year"].null_count == 3

    @pytest.mark.parametrize("column", list(GOOD_ITEMS))
    def test_a_missing_column_is_an_error(self, column):
        columns = {name: values for name, values in GOOD_ITEMS.items() if name != column}
        with pytest.raises(ValueError, match=f"items has no column {column}: expected item_id, title, year, genres"):
            read_items(arrow_dataset(columns), ITEM_IDS)

    @pytest.mark.parametrize(
        ("column", "value"), [("item_id", None), ("title", None), ("genres", None), ("genres", [None])]
    )
    def test_null_values_are_an_error(self, column, value):
        values = [value, *GOOD_ITEMS[column].to_pylist()[1:]]
        with pytest.raises(ValueError, match=f"column '{column}' of items has null values"):
            read_items(arrow_dataset({**GOOD_ITEMS, column: values}), ITEM_IDS)

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("item_id", [1, 2, 3], "'item_id' is int64 in items and string in interactions: expected the same type"),
            ("item_id", [1.0, 2.0, 3.0], "'item_id' of items is double: expected integers or strings"),
            ("title", [1, 2, 3], "'title' of items is int64: expected strings"),
            ("year", ["1999", "nineteen", "?"], "'year' and 'genres' of items are string and list"),
            (
                "genres",
                ["Drama", "War", "Drama"],
                "'year' and 'genres' of items are int64 and string: expected int32 and",
            ),
        ],
    )
    def test_another_type_is_an_error(self, column, values, message):
        with pytest.raises(TypeError, match=message):
            read_items(arrow_dataset({**GOOD_ITEMS, column: values}), ITEM_IDS)

    def test_repeated_items_are_an_error(self):
        columns = GOOD_ITEMS | {"item_id": pa.array(["a", "b", "a"])}
        with pytest.raises(
            ValueError, match="1 item ids occur more than once in items, first 'a': expected one row per"
        ):
            read_items(arrow_dataset(columns), ITEM_IDS)

    def test_items_of_interactions_that_are_missing_are_named(self):
        item_ids = pa.array(["a", "w", "x", "y", "z"])
        with pytest.raises(
            ValueError, match="4 item ids of interactions are missing from items, first 'w', 'x', 'y': "
        ):
            read_items(arrow_dataset(GOOD_ITEMS), item_ids)

    def test_an_empty_table_is_an_error(self):
        with pytest.raises(ValueError, match="items is empty"):
            read_items(arrow_dataset(GOOD_ITEMS).select([]), ITEM_IDS)

    def test_an_indices_mapping_is_followed(self):
        table = read_items(arrow_dataset(GOOD_ITEMS).select([2, 0, 1]), ITEM_IDS)
        assert table["title"].to_pylist() == ["C", "A", "B"]
