"""Flat arrays of columns, by hand."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk

from hf_ilora.data.columns import ListColumn, flatten_lists, list_array, read_column, repeated_values, slice_indices


def test_lists_become_flat_values_with_boundaries_and_back():
    lists = [[3, 1], [], [2]]
    values, boundaries = flatten_lists(Dataset.from_dict({"items": lists}), "items")
    assert values.tolist() == [3, 1, 2] and boundaries.tolist() == [0, 2, 2, 3]
    assert list_array(values, np.diff(boundaries)).to_pylist() == lists


LISTS = [[3, 1], [], [2], [7, 8, 9], [4]]


@pytest.fixture(params=["one chunk", "chunks", "selected", "mapped"])
def lists_split(request, tmp_path):
    if request.param == "one chunk":
        return Dataset.from_dict({"items": LISTS})
    if request.param == "chunks":
        return concatenate_datasets([Dataset.from_dict({"items": lists}) for lists in (LISTS[:2], LISTS[2:])])
    if request.param == "selected":
        return Dataset.from_dict({"items": LISTS[::-1]}).select([4, 3, 2, 1, 0])
    Dataset.from_dict({"items": LISTS}).save_to_disk(tmp_path, num_shards=2)
    return load_from_disk(tmp_path)


def test_a_list_column_gives_each_row(lists_split):
    column = ListColumn(lists_split, "items")
    assert [column[row].tolist() for row in range(len(column))] == LISTS
    assert column.lengths.tolist() == [2, 0, 1, 3, 1]
    assert np.concatenate(list(column.pieces())).tolist() == [3, 1, 2, 7, 8, 9, 4]


def test_a_list_column_copies_nothing():
    split = concatenate_datasets([Dataset.from_dict({"items": lists}) for lists in (LISTS[:2], LISTS[2:])])
    column, chunks = ListColumn(split, "items"), read_column(split, "items").chunks
    assert np.shares_memory(column[0], chunks[0].values.to_numpy())
    assert np.shares_memory(column[3], chunks[1].values.to_numpy())


def test_a_list_column_without_rows_has_none():
    column = ListColumn(Dataset.from_dict({"items": LISTS}).select([]), "items")
    assert len(column) == 0 and list(column.pieces()) == []


def test_slice_indices_concatenates_ranges():
    assert slice_indices(np.array([5, 2, 9]), np.array([8, 2, 11])).tolist() == [5, 6, 7, 9, 10]


def test_repeated_values_are_listed_once_in_order_of_first_appearance():
    assert repeated_values(pa.chunked_array([["c", "a", "b"], ["a", "c", "c"]])).to_pylist() == ["c", "a"]
