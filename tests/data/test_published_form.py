"""Saved data sets as others read them: with `datasets` alone, after `map` and `filter`, and with their source."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, DatasetDict, load_dataset

from hf_ilora import SequenceDatasets, build_sequences
from hf_ilora.data.cards import card_to_publish
from hf_ilora.data.movielens import MOVIELENS
from hf_ilora.data.public_datasets import PUBLIC_DATASETS
from hf_ilora.data.sources import SOURCES, DataSource, source_to_publish, with_source
from tests.data.test_storage import rewrite

ITEMS = {"item_id": [10, 20, 30, 40], "title": list("abcd"), "year": [1990, None, 2000, 2001], "genres": [["x"]] * 4}
# The histories of users 1, 2 and 3, in time.
USERS = {1: [10, 20, 30, 40], 2: [20, 10, 40], 3: [40, 30, 20, 10]}


def tables() -> tuple[Dataset, Dataset]:
    rows = [(user, item, time) for user, items in USERS.items() for time, item in enumerate(items)]
    users, items, times = zip(*rows, strict=True)
    interactions = Dataset.from_dict({"user_id": users, "item_id": items, "timestamp": times})
    return interactions, Dataset.from_dict(ITEMS)


def sequences(**settings) -> SequenceDatasets:
    return build_sequences(*tables(), **({"num_candidates": 0} | settings))


def read(folder, config: str, cache) -> DatasetDict:
    return load_dataset(str(folder), config, cache_dir=str(cache))


# --- the folder as a data set of `datasets` ---


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


def test_card_shows_protocol_counts_source_and_fingerprint(tmp_path):
    built = sequences()
    built.source = replace(SOURCES["ml-1m"], terms="<b>terms</b>")
    built.save(tmp_path / "d*ta")
    card = (tmp_path / "d*ta" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other" and metadata["license_name"] == "ml-1m"
    assert "# d\\*ta" in card and "&lt;b&gt;terms" in card and built.fingerprint in card
    assert "| train | 2 |" in card and "| protocol | leave_one_out |" in card
    assert "training has interactions of other users that are newer" in card
    assert str(tmp_path) not in card


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


# --- sources and licences ---


def test_every_public_data_set_has_a_source_and_every_movielens_is_restricted():
    assert set(SOURCES) == {*MOVIELENS, *PUBLIC_DATASETS}
    assert all(SOURCES[name].restricted for name in MOVIELENS)


def test_source_of_public_data_reaches_the_saved_folder_through_changes_of_the_table(tmp_path):
    interactions, items = with_source("ml-100k", *tables())
    for changed in (interactions.filter(lambda row: row["user_id"] < 3), interactions.select(range(7))):
        build_sequences(changed, items, num_candidates=0).save(tmp_path)
        assert SequenceDatasets.load(tmp_path).source == SOURCES["ml-100k"]
    plain = Dataset.from_dict(interactions.to_dict())  # whose items still say so
    assert build_sequences(plain, items, num_candidates=0).source == SOURCES["ml-100k"]


def test_licence_of_own_data_is_that_of_their_info():
    interactions, items = tables()
    interactions.info.license, interactions.info.homepage = "cc-by-4.0", "https://example.org"
    assert build_sequences(interactions, items, num_candidates=0).source == DataSource(
        license="cc-by-4.0", homepage="https://example.org"
    )


def test_restricted_data_are_published_only_with_explicit_permission():
    built = build_sequences(*with_source("ml-100k", *tables()), num_candidates=0)
    for license in (None, "mit"):
        with pytest.raises(ValueError, match=r"made of ml-100k, and its licence says .* allow_restricted_license=True"):
            built.push_to_hub("user/name", license=license)
    assert source_to_publish(built.source, None, True) == SOURCES["ml-100k"]
    assert source_to_publish(None, "mit", False) == DataSource(license="mit")


@pytest.mark.parametrize("source", [[], {"name": 3}, {"other": "x"}, {"restricted": "no"}])
def test_damaged_source_is_named(tmp_path, source):
    sequences().save(tmp_path)
    description = json.loads((tmp_path / "sequences.json").read_text())
    (tmp_path / "sequences.json").write_text(json.dumps(description | {"source": source}))
    with pytest.raises(ValueError, match=r"sequences\.json: source is .*: expected an object of name, license"):
        SequenceDatasets.load(tmp_path)


# --- cards that exist ---


def test_card_edited_by_hand_stays_and_takes_the_new_files():
    first, second = (sequences(**settings) for settings in ({}, {"max_history": 2}))
    old, new = (each._card("user/name", each.fingerprint) for each in (first, second))
    assert old != new and card_to_publish(new, None) == new and card_to_publish(new, old) == new
    edited = old.replace("# name", "# My data").replace("sequences\n  default", "mine\n  default")
    assert edited.count("mine") == 1
    kept = card_to_publish(new, edited)
    assert "# My data" in kept and "mine" not in kept and "config_name: sequences" in kept


# --- folders and names ---


def test_revision_of_a_folder_is_refused(tmp_path):
    sequences().save(tmp_path)
    with pytest.raises(ValueError, match=r"revision is 'v1', but .* is a folder"):
        SequenceDatasets.load(tmp_path, revision="v1")


def test_a_hub_name_is_read_from_the_hub_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="outputs/data is not a folder, the Hub cannot be reached"):
        SequenceDatasets.load("outputs/data", cache_dir=tmp_path)
    sequences().save("outputs/data")
    assert len(SequenceDatasets.load("outputs/data")["test"]) == 3


def test_saved_files_have_no_metadata_but_that_of_datasets_and_no_loading_script(tmp_path):
    sequences().save(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert set(pq.read_schema(tmp_path / "train.parquet").metadata) == {b"huggingface"}
