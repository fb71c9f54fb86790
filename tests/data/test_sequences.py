"""Sequence data sets: fingerprints, and what is saved and loaded."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets

from hf_ilora import Catalogue, SequenceDatasets, build_sequences
from tests.data.naive_sequences import (
    contents,
    interactions_table,
    items_table,
    random_rows,
)


class TestFingerprint:
    def test_it_is_the_same_on_every_machine(self):
        """The value is pinned: if it changed, no earlier folder could be loaded."""
        rows = [(user, f"i{(user * place) % 11}", place) for user in range(1, 6) for place in range(6)]
        items = items_table([f"i{item}" for item in range(11)])
        sequences = build_sequences(interactions_table(rows), items, num_candidates=3)
        assert sequences.fingerprint == "a8a720ccff7f02dccc635293e8545a40efcfd933a552e6599fbe27997314ae39"

    def test_chunks_and_indices_do_not_change_it(self, wide):
        sequences = build_sequences(*wide, num_candidates=2)
        fingerprint = sequences.fingerprint
        test = sequences["test"]
        sequences["test"] = concatenate_datasets([test.select([0]), test.select([1, 2, 3])])
        assert sequences.fingerprint == fingerprint
        sequences["test"] = test.select([2, 1, 0, 3])
        assert sequences.fingerprint != fingerprint
        sequences["test"] = sequences["test"].select([2, 1, 0, 3])
        assert sequences.fingerprint == fingerprint

    @pytest.mark.parametrize(
        "keywords", [{"candidate_seed": 1}, {"num_candidates": 3}, {"max_history": 3}, {"drop_repeats": True}]
    )
    def test_other_settings_change_it(self, wide, keywords):
        base = {"num_candidates": 2}
        assert build_sequences(*wide, **base).fingerprint != build_sequences(*wide, **(base | keywords)).fingerprint

    def test_a_changed_row_or_title_changes_it(self, small):
        interactions, items = small
        fingerprint = build_sequences(interactions, items, num_candidates=0).fingerprint
        times = interactions["timestamp"][:]
        times[0] = 2  # moves item 30 of user 7 before item 20
        changed = interactions.remove_columns("timestamp").add_column("timestamp", times)
        assert build_sequences(changed, items, num_candidates=0).fingerprint != fingerprint
        titles = items["title"][:]
        titles[1] += "!"
        renamed = items.remove_columns("title").add_column("title", titles)
        assert build_sequences(interactions, renamed, num_candidates=0).fingerprint != fingerprint

    def test_moving_an_item_between_two_histories_changes_it(self, small):
        """The fingerprint covers lengths: the same values, cut elsewhere, are other data."""
        sequences = build_sequences(*small, num_candidates=0)
        fingerprint = sequences.fingerprint
        moved = sequences["test"].to_dict()
        moved["history"][1].insert(0, moved["history"][0].pop())
        sequences["test"] = Dataset.from_dict(moved, features=sequences["test"].features)
        assert sequences.fingerprint != fingerprint


class TestSaveAndLoad:
    @pytest.fixture
    def sequences(self):
        rows = random_rows(8, users=30, string_ids=True)
        items = items_table(sorted({item for _, item, *_ in rows}))
        return build_sequences(interactions_table(rows), items, num_candidates=3, candidate_seed=4, drop_repeats=True)

    def test_a_round_trip_changes_nothing(self, sequences, tmp_path):
        sequences.save(tmp_path / "new" / "data")
        loaded = SequenceDatasets.load(str(tmp_path / "new" / "data"))
        assert contents(loaded) == contents(sequences)
        assert loaded.protocol == sequences.protocol
        assert loaded.num_items == sequences.num_items
        assert loaded.fingerprint == sequences.fingerprint
        assert {name: split.features for name, split in loaded.items()} == {
            name: split.features for name, split in sequences.items()
        }
        assert loaded.catalogue == sequences.catalogue
        assert os.listdir(tmp_path / "new") == ["data"]

    @pytest.mark.parametrize(
        ("string_ids", "fingerprint", "items_digest"),
        [
            (
                False,
                "ee60639f0ee0ee104984c503292813c96a902c52282293f53ff94d23f03da859",
                "e3bff182118fbbdb46a2f61c7c4505b8f2e552eaafaae59affebb1cf9a50ba6e",
            ),
            (
                True,
                "098c74b9ef048b60e0d3e9c8c4649157cc15b451652f01113e53f4cc4ea9689a",
                "ec356a737ee75e43ad6632db048a17fd424f712a1adf7794775e3671304ab9d3",
            ),
        ],
    )
    def test_fingerprint_and_catalogue_file_stay_those_of_folders_prepared_earlier(
        self, tmp_path, string_ids, fingerprint, items_digest
    ):
        """Runs, labels and results record the fingerprint: if it changed, none of them would match their data."""
        rows = random_rows(8, users=30, string_ids=string_ids)
        items = items_table(sorted({item for _, item, *_ in rows}))
        sequences = build_sequences(
            interactions_table(rows), items, num_candidates=3, candidate_seed=4, drop_repeats=True
        )
        assert sequences.fingerprint == fingerprint
        sequences.save(tmp_path / "data")
        table = pq.read_table(tmp_path / "data" / "items.parquet")  # whose bytes name the version of pyarrow
        content = json.dumps([{field.name: str(field.type) for field in table.schema}, table.to_pylist()])
        assert hashlib.sha256(content.encode()).hexdigest() == items_digest

    def test_the_folder_contains_parquet_a_card_and_a_description(self, sequences, tmp_path):
        sequences.save(tmp_path / "data")
        names = {"train.parquet", "validation.parquet", "test.parquet", "items.parquet", "sequences.json", "README.md"}
        assert set(os.listdir(tmp_path / "data")) == names
        assert json.loads((tmp_path / "data" / "sequences.json").read_text()) == {
            "format_version": 1,
            "protocol": sequences.protocol,
            "num_items": sequences.num_items,
            "counts": {name: len(split) for name, split in sequences.items()},
            "fingerprint": sequences.fingerprint,
            "source": {},
        }
        assert sequences.protocol["candidate_seed"] == 4

    def test_another_process_builds_and_loads_the_same_without_a_cache(self, sequences, tmp_path):
        sequences.save(tmp_path / "data")
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_sequences as t\n"
            "rows = t.random_rows(8, users=30, string_ids=True)\n"
            "items = t.items_table(sorted({item for _, item, *_ in rows}))\n"
            "built = t.build_sequences(t.interactions_table(rows), items, num_candidates=3, candidate_seed=4,"
            " drop_repeats=True)\n"
            "print(built.fingerprint, t.SequenceDatasets.load(sys.argv[2]).fingerprint)"
        )
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONHASHSEED": "1"}
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "data")]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        assert printed.split() == [sequences.fingerprint, sequences.fingerprint]
        assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []

    def test_further_columns_of_items_are_saved_and_leave_the_fingerprint_unchanged(self, small, tmp_path):
        interactions, items = small
        plain = build_sequences(interactions, items, num_candidates=0)
        columns = {"price": [1.5, None, 3.0, 4.0, 5.0, 6.0], "tags": [["a"], [], None, ["b", "c"], [], []]}
        for name, values in columns.items():
            items = items.add_column(name, values)
        sequences = build_sequences(interactions, items, num_candidates=0)
        assert sequences.fingerprint == plain.fingerprint
        sequences.save(tmp_path / "data")
        loaded = SequenceDatasets.load(tmp_path / "data")
        assert loaded.catalogue == sequences.catalogue and loaded.catalogue.has_items_of(plain.catalogue)
        table = loaded.catalogue.table  # items 10 to 50, in the reverse order of the table of items
        assert table["price"].to_pylist() == [6.0, 5.0, 4.0, 3.0, None]
        assert table["tags"].to_pylist() == [[], [], ["b", "c"], None, []]
        with pytest.raises(ValueError, match="raw_id and count are columns of the catalogue itself; rename or drop"):
            build_sequences(interactions, items.add_column("count", range(6)), num_candidates=0)

    def test_the_catalogue_must_be_a_catalogue_with_all_columns(self, sequences):
        table = sequences.catalogue.table
        with pytest.raises(TypeError, match="catalogue is a Table: expected a Catalogue"):
            SequenceDatasets(dict(sequences), table, sequences.protocol)
        with pytest.raises(ValueError, match="the catalogue has no year, genres"):
            SequenceDatasets(dict(sequences), Catalogue(table.drop_columns(["year", "genres"])), sequences.protocol)

    def test_splits_must_be_complete(self, sequences):
        with pytest.raises(ValueError, match="splits are test, train: expected train, validation, test"):
            SequenceDatasets(
                {"train": sequences["train"], "test": sequences["test"]}, sequences.catalogue, sequences.protocol
            )
