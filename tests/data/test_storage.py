"""Folders of sequence data: what a failed save leaves, and the errors of damaged or foreign files."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value

from hf_ilora import SequenceDatasets, build_sequences
from hf_ilora.data import sequences as sequences_module
from hf_ilora.models.next_item import catalogue

FILES = ["README.md", "items.parquet", "sequences.json", "test.parquet", "train.parquet", "validation.parquet"]


def small_sequences(seed: int = 0, users: int = 4, num_candidates: int = 2) -> SequenceDatasets:
    rows = [(user, 10 * (1 + (user + place) % 6), place) for user in range(users) for place in range(4 + user % 2)]
    columns = zip(*rows, strict=True)
    names = ("user_id", "item_id", "timestamp")
    interactions = Dataset.from_dict({name: list(column) for name, column in zip(names, columns, strict=True)})
    raw_ids = [10, 20, 30, 40, 50, 60]
    types = {"item_id": Value("int64"), "title": Value("string"), "year": Value("int32")}
    items = Dataset.from_dict(
        {"item_id": raw_ids, "title": list("abcdef"), "year": [None] * 6, "genres": [[]] * 6},
        features=Features({**types, "genres": List(Value("string"))}),
    )
    return build_sequences(interactions, items, num_candidates=num_candidates, candidate_seed=seed)


@pytest.fixture
def folder(tmp_path):
    small_sequences().save(tmp_path / "data")
    return tmp_path / "data"


def edit_description(folder: Path, **changes) -> None:
    description = json.loads((folder / "sequences.json").read_text())
    (folder / "sequences.json").write_text(json.dumps(description | changes))


def rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.ParquetFile(path).read()), path)


class TestReplacing:
    def test_a_save_replaces_an_earlier_one(self, folder):
        second = small_sequences(users=3)
        second.save(folder)
        assert SequenceDatasets.load(folder).fingerprint == second.fingerprint
        assert sorted(os.listdir(folder)) == FILES
        assert os.listdir(folder.parent) == ["data"]

    @pytest.mark.parametrize("failing_call", [1, 3, 4, 5])
    def test_a_save_that_fails_midway_leaves_the_earlier_output_whole(self, folder, monkeypatch, failing_call):
        earlier = SequenceDatasets.load(folder).fingerprint
        calls = []

        def fail_at_last(write):
            def write_or_fail(*arguments):
                calls.append(arguments)
                if len(calls) == failing_call:
                    raise OSError("No space left on device")
                write(*arguments)

            return write_or_fail

        for name in ("write_parquet", "write_description"):
            monkeypatch.setattr(sequences_module, name, fail_at_last(sequences_module.__dict__[name]))
        with pytest.raises(OSError, match="No space left"):
            small_sequences(seed=1).save(folder)
        assert len(calls) == failing_call
        assert SequenceDatasets.load(folder).fingerprint == earlier
        assert os.listdir(folder.parent) == ["data"]
        monkeypatch.undo()
        small_sequences(seed=1).save(folder)  # and the next one works
        assert SequenceDatasets.load(folder).fingerprint != earlier

    def test_a_first_save_that_fails_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(sequences_module, "write_description", fail)
        with pytest.raises(OSError, match="No space left"):
            small_sequences().save(tmp_path / "data")
        assert os.listdir(tmp_path) == []

    def test_a_killed_save_leaves_the_earlier_output_whole(self, folder):
        earlier = SequenceDatasets.load(folder).fingerprint
        program = (
            "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import test_storage as t\n"
            "t.sequences_module.write_description = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "t.small_sequences(seed=1).save(sys.argv[2])"
        )
        command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder)]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert len(os.listdir(folder.parent)) == 3  # the unfinished folder, and its writer's lock, are hidden beside it
        assert SequenceDatasets.load(folder).fingerprint == earlier
        small_sequences().save(folder)
        assert os.listdir(folder.parent) == ["data"]

    def test_the_earlier_output_returns_when_the_exchange_fails(self, folder, monkeypatch):
        earlier = SequenceDatasets.load(folder).fingerprint
        rename = Path.rename

        def fail_for_the_new_folder(path, target):
            if path.name.endswith(".unfinished"):
                raise OSError("Device or resource busy")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
        with pytest.raises(OSError, match="busy"):
            small_sequences(seed=1).save(folder)
        assert SequenceDatasets.load(folder).fingerprint == earlier
        assert os.listdir(folder.parent) == ["data"]

    def test_a_kill_between_the_two_renames_is_named_and_repaired(self, folder, monkeypatch):
        earlier = SequenceDatasets.load(folder).fingerprint
        folder.rename(folder.with_name(".data.previous"))
        with pytest.raises(FileNotFoundError, match=r"a save was interrupted: rename .*\.data\.previous to it"):
            SequenceDatasets.load(folder)

        def fail(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(sequences_module, "write_description", fail)
        with pytest.raises(OSError, match="No space left"):
            small_sequences(seed=1).save(folder)
        assert SequenceDatasets.load(folder).fingerprint == earlier

    def test_a_folder_with_other_files_is_not_replaced(self, folder):
        (folder / "model.safetensors").write_bytes(b"weights")
        with pytest.raises(ValueError, match=r"contains model\.safetensors: expected a new folder, an empty one or"):
            small_sequences().save(folder)
        assert (folder / "model.safetensors").read_bytes() == b"weights"

    def test_a_file_is_not_replaced(self, tmp_path):
        (tmp_path / "data").write_text("notes")
        with pytest.raises(ValueError, match="data is a file: expected a folder"):
            small_sequences().save(tmp_path / "data")

    def test_a_link_to_a_folder_stays_a_link(self, folder):
        link = folder.with_name("link")
        link.symlink_to(folder, target_is_directory=True)
        second = small_sequences(seed=1)
        second.save(link)
        assert link.is_symlink()
        assert SequenceDatasets.load(folder).fingerprint == second.fingerprint

    def test_splits_that_were_selected_are_saved_as_they_are(self, tmp_path):
        sequences = small_sequences()
        whole = sequences.fingerprint
        sequences["test"] = sequences["test"].select([2, 0])
        sequences.save(tmp_path / "data")
        loaded = SequenceDatasets.load(tmp_path / "data")
        assert loaded["test"]["user_id"][:] == [2, 0]
        assert loaded.fingerprint == sequences.fingerprint != whole

    def test_an_emptied_split_is_saved_as_it_is(self, tmp_path):
        sequences = small_sequences()
        sequences["train"] = sequences["train"].select([])
        sequences.save(tmp_path / "data")
        loaded = SequenceDatasets.load(tmp_path / "data")
        assert (len(loaded["train"]), loaded.fingerprint) == (0, sequences.fingerprint)

    def test_copies_in_another_format_and_process_keep_everything(self, tmp_path):
        sequences = small_sequences()
        for copy in (sequences.with_format("torch"), pickle.loads(pickle.dumps(sequences))):
            assert (type(copy), copy.fingerprint) == (SequenceDatasets, sequences.fingerprint)
            copy.save(tmp_path / "data")
            assert SequenceDatasets.load(tmp_path / "data").fingerprint == sequences.fingerprint

    def test_folder_names_with_an_equals_sign_add_no_columns(self, tmp_path):
        small_sequences().save(tmp_path / "seed=3")
        assert SequenceDatasets.load(tmp_path / "seed=3")["train"].column_names == ["user_id", "history", "target"]


class TestLoading:
    def test_a_missing_folder_is_an_error(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"nothing is not a folder: expected one that .* prepare the data first"
        ):
            SequenceDatasets.load(tmp_path / "nothing")

    @pytest.mark.parametrize("name", FILES[1:])
    def test_a_missing_file_is_named(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {name}: expected items.parquet, sequences.json, test"):
            SequenceDatasets.load(folder)

    @pytest.mark.parametrize("name", ["train.parquet", "items.parquet"])
    @pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "zeros"])
    def test_a_damaged_parquet_file_is_named(self, folder, name, damage):
        content = (folder / name).read_bytes()
        damaged = {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "foreign": b"user_id,item_id\n1,2\n",
            "zeros": b"PAR1" + bytes(200) + content[204:],
        }
        (folder / name).write_bytes(damaged[damage])
        with pytest.raises(ValueError, match=f"{name} (is not a whole parquet file|has)"):
            SequenceDatasets.load(folder)

    def test_a_missing_column_is_named(self, folder):
        rewrite(folder / "test.parquet", lambda table: table.drop_columns("candidates"))
        message = (
            r"test\.parquet has the columns user_id: int64, history: list<\w+: int32>, target: int32: expected "
            r"user_id: int64, history: list<\w+: int32>, target: int32, candidates"
        )
        with pytest.raises(ValueError, match=message):
            SequenceDatasets.load(folder)
        rewrite(folder / "items.parquet", lambda table: table.drop_columns("raw_id"))
        with pytest.raises(
            ValueError, match=r"items\.parquet has the columns item_id: int64, title: .* expected .*raw_id"
        ):
            SequenceDatasets.load(folder)

    def test_another_type_is_an_error(self, folder):
        rewrite(folder / "train.parquet", lambda table: table.set_column(2, "target", table["target"].cast(pa.int64())))
        with pytest.raises(
            ValueError, match=r"train\.parquet has the columns .*target: int64: expected .*target: int32"
        ):
            SequenceDatasets.load(folder)

    @pytest.mark.parametrize("version", [0, 2, None])
    def test_another_version_is_an_error(self, folder, version):
        edit_description(folder, format_version=version)
        with pytest.raises(ValueError, match=f"has format_version {version}: expected 1; prepare the data again"):
            SequenceDatasets.load(folder)

    @pytest.mark.parametrize("text", ["", "{", "[1, 2]"])
    def test_a_description_that_is_not_ours_is_an_error(self, folder, text):
        (folder / "sequences.json").write_text(text)
        with pytest.raises(ValueError, match=r"sequences\.json (is not JSON|has format_version None)"):
            SequenceDatasets.load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"protocol": "leave_one_out"}, "has protocol='leave_one_out': expected a dict"),
            ({"protocol": {}}, "has a protocol without num_candidates: expected an integer"),
            ({"num_items": "6"}, "has num_items='6': expected an int"),
            ({"counts": {"train": 4}}, r"has counts=\{'train': 4\}: expected those of train, validation, test"),
            ({"fingerprint": None}, "has fingerprint=None: expected a str"),
        ],
    )
    def test_a_description_with_wrong_values_is_an_error(self, folder, changes, message):
        edit_description(folder, **changes)
        with pytest.raises(ValueError, match=message):
            SequenceDatasets.load(folder)

    def test_num_items_must_be_the_catalogue(self, folder):
        edit_description(folder, num_items=5)
        with pytest.raises(ValueError, match=r"items\.parquet has 6 rows: expected 5, as sequences\.json"):
            SequenceDatasets.load(folder)

    def test_a_catalogue_in_another_order_is_an_error(self, folder):
        rewrite(folder / "items.parquet", lambda table: table.take([1, 0, 2, 3, 4, 5]))
        with pytest.raises(ValueError, match="expected the item ids 1 to 6 in order"):
            SequenceDatasets.load(folder)

    def test_ids_above_num_items_are_an_error(self, folder):
        rewrite(folder / "items.parquet", lambda table: table.slice(0, 5))
        edit_description(folder, num_items=5)
        with pytest.raises(
            ValueError,
            match=r"train\.parquet has the values 2 to 6 in target: expected item ids of the catalogue, 1 to 5",
        ):
            SequenceDatasets.load(folder)

    def test_rows_that_are_missing_are_counted(self, folder):
        rewrite(folder / "validation.parquet", lambda table: table.slice(1))
        with pytest.raises(ValueError, match=r"validation\.parquet has 3 rows: expected 4, as sequences\.json says"):
            SequenceDatasets.load(folder)

    def test_a_file_of_another_save_is_detected(self, folder, tmp_path):
        small_sequences(seed=1).save(tmp_path / "other")
        (tmp_path / "other" / "test.parquet").replace(folder / "test.parquet")
        with pytest.raises(ValueError, match=r"have the fingerprint .* a file was changed or comes from another save"):
            SequenceDatasets.load(folder)

    def test_nulls_are_an_error(self, folder):
        def with_null(table):
            return table.set_column(2, "target", pa.array([None, *table["target"].to_pylist()[1:]], pa.int32()))

        rewrite(folder / "train.parquet", with_null)
        with pytest.raises(ValueError, match="has 1 null values in target: expected none"):
            SequenceDatasets.load(folder)

    def test_row_groups_of_another_size_are_the_same_data(self, folder):
        fingerprint = SequenceDatasets.load(folder).fingerprint
        for name in ("train", "validation", "test", "items"):
            table = pq.ParquetFile(folder / f"{name}.parquet").read()
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=2, compression="zstd")
        assert SequenceDatasets.load(folder).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 10**12}, "items.parquet has 6 rows: expected 1000000000000"),
        ({"num_items": 0}, "num_items=0: expected an int, 1 or more"),
        ({"num_items": True}, "num_items=True: expected an int"),
        ({"num_items": None}, "num_items=None: expected an int"),
        ({"counts": {"train": 10**12, "validation": 4, "test": 4}}, "train.parquet has 4 rows: expected 1000000000000"),
        ({"counts": {"train": None, "validation": 4, "test": 4}}, "expected an int, 0 or more, for each split"),
        ({"protocol": {"name": 3, "num_candidates": 2}}, "a protocol without name: expected a string"),
        (
            {"protocol": {"name": "leave_one_out", "num_candidates": True}},
            "without num_candidates: expected an integer",
        ),
    ],
    ids=str,
)
def test_absurd_values_in_the_description_are_refused(folder, changes, message):
    edit_description(folder, **changes)
    with pytest.raises(ValueError, match=message):
        SequenceDatasets.load(folder)


def test_a_tiny_split_of_many_rows_is_refused_by_its_footer(folder, monkeypatch):
    monkeypatch.setattr(catalogue, "_ALWAYS_ALLOWED_BYTES", 1 << 20)
    path, rows = folder / "train.parquet", 10**6
    schema = pq.read_schema(path)
    ones = pa.repeat(1, rows)
    lists = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), ones.cast(pa.int32()))
    columns = [lists if pa.types.is_list(each.type) else ones.cast(each.type) for each in schema]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, compression="zstd")
    description = json.loads((folder / "sequences.json").read_text())
    edit_description(folder, counts=description["counts"] | {"train": rows})
    with pytest.raises(ValueError, match=r"train\.parquet has .* claims to contain 1,000,000 rows"):
        SequenceDatasets.load(folder)


def test_nested_json_and_folders_in_place_of_files_are_refused(folder):
    whole = (folder / "sequences.json").read_text()
    (folder / "sequences.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"sequences\.json is not JSON"):
        SequenceDatasets.load(folder)
    (folder / "sequences.json").write_text(whole)
    (folder / "test.parquet").unlink()
    (folder / "test.parquet").mkdir()
    with pytest.raises(ValueError, match=r"test\.parquet is a folder: expected a parquet file"):
        SequenceDatasets.load(folder)
