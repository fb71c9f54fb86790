"""Flat arrays of columns, by hand."""

import numpy as np
import pyarrow as pa
from datasets import Dataset

from hf_ilora.data.columns import flatten_lists, list_array, repeated_values, slice_indices


def test_lists_become_flat_values_with_boundaries_and_back():
    lists = [[3, 1], [], [2]]
    values, boundaries = flatten_lists(Dataset.from_dict({"items": lists}), "items")
    assert values.tolist() == [3, 1, 2] and boundaries.tolist() == [0, 2, 2, 3]
    assert list_array(values, np.diff(boundaries)).to_pylist() == lists


def test_slice_indices_concatenates_ranges():
    assert slice_indices(np.array([5, 2, 9]), np.array([8, 2, 11])).tolist() == [5, 6, 7, 9, 10]


def test_repeated_values_are_listed_once_in_order_of_first_appearance():
    assert repeated_values(pa.chunked_array([["c", "a", "b"], ["a", "c", "c"]])).to_pylist() == ["c", "a"]
