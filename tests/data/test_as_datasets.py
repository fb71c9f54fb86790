"""Sequence data sets in the hands of `datasets`: read by `load_dataset`, changed by `map` and `filter`."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_dataset

from hf_ilora import SequenceDatasets, build_sequences
from tests.data.test_storage import rewrite
from tests.data.three_users import ITEMS, sequences


def read(folder, config: str, cache) -> DatasetDict:
    return load_dataset(str(folder), config, cache_dir=str(cache))


# --- load_dataset ---


def test_load_dataset_reads_splits_and_catalogue_of_a_saved_folder(tmp_path):
    sequences(protocol="last_n", num_targets=1, num_candidates=0).save(tmp_path / "data")
    splits = read(tmp_path / "data", "sequences", tmp_path / "cache")
    assert list(splits) == ["train", "validation", "test"]
    assert len({str(split.features) for split in splits.values()}) == 1
    assert splits["test"][0] == {"user_id": 1, "history": [1, 2, 3], "target": 4, "relevant_items": [4]}
    assert splits["train"][0] == {"user_id": 1, "history": [1], "target": 2, "relevant_items": []}
    items = read(tmp_path / "data", "catalogue", tmp_path / "cache")["train"]
    assert items["item_id"][:] == [1, 2, 3, 4] and items["raw_id"][:] == ITEMS["item_id"]
    assert items["title"][:] == ITEMS["title"] and items["year"][:] == ITEMS["year"]


def test_candidates_are_empty_in_the_file_of_train_and_absent_once_loaded(tmp_path):
    items = Dataset.from_dict({"item_id": range(9), "title": list("abcdefghi"), "year": [None] * 9, "genres": [[]] * 9})
    rows = {"user_id": np.repeat(range(9), 4), "item_id": [(user + k) % 9 for user in range(9) for k in range(4)]}
    interactions = Dataset.from_dict({**rows, "timestamp": list(range(4)) * 9})
    built = build_sequences(interactions, items, num_candidates=3)
    built.save(tmp_path / "data")
    splits = read(tmp_path / "data", "sequences", tmp_path / "cache")
    assert set(map(tuple, splits["train"]["candidates"][:])) == {()}
    assert splits["test"]["candidates"][:] == built["test"]["candidates"][:]
    assert SequenceDatasets.load(tmp_path / "data")["train"].column_names == ["user_id", "history", "target"]
    rewrite(tmp_path / "data" / "train.parquet", lambda table: table.set_column(3, "candidates", pa.array([[1]] * 9)))
    with pytest.raises(ValueError, match=r"train\.parquet has the columns .*candidates"):
        SequenceDatasets.load(tmp_path / "data")


def test_folder_that_was_saved_before_columns_were_equal_and_cards_existed_loads(tmp_path):
    built = sequences(protocol="last_n", num_targets=1)
    built.save(tmp_path)
    rewrite(tmp_path / "train.parquet", lambda table: table.drop_columns("relevant_items"))
    (tmp_path / "README.md").unlink()
    description = json.loads((tmp_path / "sequences.json").read_text())
    del description["source"]
    (tmp_path / "sequences.json").write_text(json.dumps(description))
    loaded = SequenceDatasets.load(tmp_path)
    assert loaded.fingerprint == built.fingerprint and loaded.source is None
    with pytest.raises(ValueError, match=r"does not say where its interactions come from.* prepare the data again"):
        loaded.push_to_hub("user/name")


def test_saved_files_have_no_metadata_but_that_of_datasets_and_no_loading_script(tmp_path):
    sequences().save(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert set(pq.read_schema(tmp_path / "train.parquet").metadata) == {b"huggingface"}


# --- map and filter ---


def test_map_and_filter_keep_the_catalogue_with_the_counts_of_their_rows(tmp_path):
    built = sequences()
    kept = built.filter(lambda row: row["user_id"] != 1)
    assert isinstance(kept, SequenceDatasets) and kept.protocol == built.protocol and kept.source == built.source
    assert kept.catalogue.titles([1, 4]) == ["a", "d"]
    assert kept["train"]["user_id"][:] == [3]
    assert built.catalogue.counts.tolist() == [0, 1, 1, 1, 1] and kept.catalogue.counts.tolist() == [0, 0, 0, 1, 1]
    kept.save(tmp_path / "kept")
    assert SequenceDatasets.load(tmp_path / "kept").fingerprint == kept.fingerprint != built.fingerprint


def test_columns_that_map_adds_are_saved_and_leave_the_fingerprint_unchanged(tmp_path):
    built = sequences()
    mapped = built.map(lambda row: {"length": len(row["history"])})
    assert isinstance(mapped, SequenceDatasets) and mapped.fingerprint == built.fingerprint
    mapped.save(tmp_path / "data")
    loaded = SequenceDatasets.load(tmp_path / "data")
    assert loaded["test"]["length"][:] == [3, 2, 3]
    assert read(tmp_path / "data", "sequences", tmp_path / "cache")["test"]["length"][:] == [3, 2, 3]
    loaded["train"] = loaded["train"].remove_columns("length")
    with pytest.raises(ValueError, match=r"further columns none and validation has \['length'\]: expected the same"):
        loaded.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_map_that_removes_or_retypes_a_column_of_sequences_gives_a_plain_dictionary():
    built = sequences()
    removed = built.map(lambda row: {"length": 1}, remove_columns=["target"])
    retyped = built.map(lambda row: {"target": [row["target"]]})
    assert type(removed) is DatasetDict and removed["test"].column_names == ["user_id", "history", "length"]
    assert type(retyped) is DatasetDict and retyped["test"]["target"][:] == [[4], [4], [1]]
