"""Data sets are pushed to a Hub and loaded again, with the real clients and a server with realistic faults."""

import json

import pytest

from hf_ilora import SequenceDatasets, TeacherLabels
from hf_ilora.data.sources import SOURCES
from tests.data.test_storage import small_sequences
from tests.distillation.known_teacher import KnownTeacher, label_all
from tests.hub_server import READER, STRANGER, sha256
from tests.paths import RECIPES
from tests.publishing.hub_programs import RECIPE, last_line

FILES = {"README.md", "items.parquet", "sequences.json", "test.parquet", "train.parquet", "validation.parquet"}

PUSH = """
import sys
from hf_ilora import SequenceDatasets
folder, repo_id, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
print(SequenceDatasets.load(folder).push_to_hub(repo_id, **arguments).oid)
"""
LOAD = """
import sys
from hf_ilora import SequenceDatasets
sequences = SequenceDatasets.load(sys.argv[1], **eval(sys.argv[2]))
print(sequences.fingerprint, sequences.catalogue.titles([1, 6]))
"""
LOAD_WITHOUT_PACKAGE = """
import json, sys
from datasets import load_dataset
arguments = eval(sys.argv[2])
splits = load_dataset(sys.argv[1], "sequences", **arguments)
items = load_dataset(sys.argv[1], "catalogue", split="train", **arguments)
print(json.dumps([{name: split.to_list() for name, split in splits.items()}, items["title"][:]]))
"""
USE_DATA_CARD = """
import sys
from huggingface_hub import DatasetCard
for code in DatasetCard.load(sys.argv[1]).text.split("```python")[1:]:
    exec(code.split("```")[0])
print(sorted(sequences), items.num_rows)
"""


@pytest.fixture
def saved(tmp_path):
    """A folder of a data set, and the data set."""
    sequences = small_sequences()
    sequences.save(tmp_path / "saved")
    return tmp_path / "saved", sequences


def repository(client, name: str = "user/data"):
    return client.hub.repositories[f"datasets/{name}"]


def replace_file(client, name: str, path: str, content: bytes | None) -> None:
    """Commit another content of a file, or delete the file."""
    files = dict(repository(client, name).commit("main").files)
    del files[path]
    if content is not None:
        files[path] = client.hub.large_files[sha256(content)] = content
    repository(client, name).add("main", "changed", files)


def cache(tmp_path, name: str = "cache") -> dict:
    return {"cache_dir": str(tmp_path / name)}


def test_a_pushed_data_set_loads_with_the_package_and_without_it(client, saved, tmp_path):
    folder, sequences = saved
    client.succeed(PUSH, folder, "user/data", {})
    assert set(repository(client).commit("main").files) == FILES | {".gitattributes"}
    loaded = client.succeed(LOAD, "user/data", {}, token=None)
    assert last_line(loaded) == f"{sequences.fingerprint} {sequences.catalogue.titles([1, 6])}"
    splits, titles = json.loads(
        last_line(client.succeed(LOAD_WITHOUT_PACKAGE, "user/data", cache(tmp_path), token=None))
    )
    assert titles == sequences.catalogue.titles(range(1, 7))
    assert splits["test"] == sequences["test"].to_list()
    assert splits["train"] == [row | {"candidates": []} for row in sequences["train"].to_list()]
    assert last_line(client.succeed(USE_DATA_CARD, "user/data", token=None)) == "['test', 'train', 'validation'] 6"


def test_data_set_is_sent_once_and_a_card_edited_on_the_hub_stays(client, saved):
    folder, _ = saved
    first = last_line(client.succeed(PUSH, folder, "user/data", {"license": "cc-by-4.0"}))
    assert "license: cc-by-4.0" in repository(client).commit("main").files["README.md"].decode()
    assert last_line(client.succeed(PUSH, folder, "user/data", {"license": "cc-by-4.0"})) == first
    card = repository(client).commit("main").files["README.md"].decode().replace("# data", "# Mine")
    replace_file(client, "user/data", "README.md", card.encode())
    small_sequences(seed=1).save(folder)
    client.succeed(PUSH, folder, "user/data", {})
    assert "# Mine" in repository(client).commit("main").files["README.md"].decode()


def test_old_revision_still_loads_after_a_new_one(client, saved):
    folder, sequences = saved
    first = last_line(client.succeed(PUSH, folder, "user/data", {}))
    changed = small_sequences(seed=1)
    changed.save(folder)
    client.succeed(PUSH, folder, "user/data", {"revision": "v2"})
    assert repository(client).branches["main"] == first
    client.succeed(PUSH, folder, "user/data", {})
    for revision, expected in ((first, sequences), ("v2", changed), ("main", changed)):
        assert last_line(client.succeed(LOAD, "user/data", {"revision": revision})).startswith(expected.fingerprint)
    assert "ValueError: user/data has no revision 'v3'" in client.fail(LOAD, "user/data", {"revision": "v3"})


def test_data_set_loads_offline_from_the_cache(client, saved, tmp_path):
    folder, sequences = saved
    client.succeed(PUSH, folder, "user/data", {})
    offline = cache(tmp_path) | {"local_files_only": True}
    refused = client.fail(LOAD, "user/data", offline)
    assert "FileNotFoundError: user/data is not a folder, the Hub cannot be reached, and its cache lacks" in refused
    client.succeed(LOAD, "user/data", cache(tmp_path))
    requests = len(client.hub.requests)
    assert last_line(client.succeed(LOAD, "user/data", offline)).startswith(sequences.fingerprint)
    assert len(client.hub.requests) == requests


def test_private_data_set_is_for_its_owner(client, saved, tmp_path):
    folder, sequences = saved
    client.succeed(PUSH, folder, "user/data", {"private": True})
    assert repository(client).private
    assert last_line(client.succeed(LOAD, "user/data", {})).startswith(sequences.fingerprint)
    for token in (None, STRANGER):
        refused = client.fail(LOAD, "user/data", cache(tmp_path, str(token)), token=token)
        assert (
            "FileNotFoundError: user/data is not a folder, and the Hub has no such data set for this token" in refused
        )
    client.succeed(PUSH, folder, "user/public", {})
    assert "is public: expected a private" in client.fail(PUSH, folder, "user/public", {"private": True})


def test_movielens_is_sent_only_with_explicit_permission(client, saved):
    folder, sequences = saved
    sequences.source = SOURCES["ml-100k"]
    sequences.save(folder)
    refused = client.fail(PUSH, folder, "user/data", {"private": True})
    assert "may not redistribute" in refused and "allow_restricted_license=True" in refused
    assert not client.hub.repositories and not client.hub.requests
    client.succeed(PUSH, folder, "user/data", {"private": True, "allow_restricted_license": True})
    assert "license_name: ml-100k" in repository(client).commit("main").files["README.md"].decode()


# --- faults ---


@pytest.mark.parametrize("token", [None, "hf_unknown", READER, STRANGER])
def test_tokens_that_may_not_write_are_refused(client, saved, token):
    error = client.fail(PUSH, saved[0], "user/refused", {}, token=token)
    assert "PermissionError: the Hub does not let this token write to user/refused" in error
    assert token is None or token not in error
    assert not client.hub.repositories


def test_a_wrong_token_is_refused_when_loading(client, saved, tmp_path):
    client.succeed(PUSH, saved[0], "user/data", {})
    refused = client.fail(LOAD, "user/data", cache(tmp_path), token="hf_unknown")
    assert "PermissionError: the Hub does not let this token read user/data" in refused
    client.succeed(LOAD, "user/data", cache(tmp_path), token=READER)


@pytest.mark.parametrize(
    "fault",
    [
        ("POST", "/repos/create", 429),
        ("POST", "/commit/", 429),
        ("POST", "/commit/", "drop_answer"),
        ("POST", "/preupload/", 429),
    ],
)
def test_a_fault_or_a_rate_limit_neither_loses_nor_doubles_the_commit(client, saved, fault):
    client.hub.faults.append(fault)
    oid = last_line(client.succeed(PUSH, saved[0], "user/data", {}))
    assert not client.hub.faults
    assert [commit.oid for commit in repository(client).history()][:1] == [oid] and len(repository(client).commits) == 2


def test_an_interrupted_upload_leaves_no_part_and_resumes(client, saved):
    """The commit comes last: until then no file is visible, and files that have arrived are not sent again."""
    folder, sequences = saved
    client.hub.faults += [("POST", "/commit/", "drop")] * 4
    error = client.fail(PUSH, folder, "user/data", {})
    assert "OSError: the connection to the Hub failed while sending user/data" in error and "push again" in error
    assert set(repository(client).commit("main").files) == {".gitattributes"}
    assert "user/data on the Hub: " in client.fail(LOAD, "user/data", {})
    sent = client.hub.count("PUT", "/large_files/")
    client.succeed(PUSH, folder, "user/data", {})
    assert client.hub.count("PUT", "/large_files/") == sent == 4
    assert last_line(client.succeed(LOAD, "user/data", {})).startswith(sequences.fingerprint)


def test_a_lasting_rate_limit_is_reported(client, saved):
    client.hub.faults += [("POST", "/commit/", 429)] * 4
    error = client.fail(PUSH, saved[0], "user/data", {})
    assert "OSError: user/data could not be sent" in error and "429" in error and "push again" in error


def test_a_download_that_breaks_off_resumes(client, saved, tmp_path):
    folder, sequences = saved
    client.succeed(PUSH, folder, "user/data", {})
    client.hub.faults.append(("GET", "/large_files/", "cut"))
    assert last_line(client.succeed(LOAD, "user/data", cache(tmp_path))).startswith(sequences.fingerprint)
    assert not client.hub.faults


def test_a_tampered_file_is_reported_and_the_revision_before_loads(client, saved, tmp_path):
    folder, sequences = saved
    sound = last_line(client.succeed(PUSH, folder, "user/data", {}))
    small_sequences(seed=1).save(tmp_path / "other")
    replace_file(client, "user/data", "test.parquet", (tmp_path / "other" / "test.parquet").read_bytes())
    refused = client.fail(LOAD, "user/data", {})
    assert "ValueError: user/data on the Hub: the files in" in refused and "load another revision" in refused
    assert f"expected {sequences.fingerprint}" in refused
    assert last_line(client.succeed(LOAD, "user/data", {"revision": sound})).startswith(sequences.fingerprint)


def test_a_data_set_without_its_catalogue_is_refused(client, saved):
    client.succeed(PUSH, saved[0], "user/data", {})
    replace_file(client, "user/data", "items.parquet", None)
    refused = client.fail(LOAD, "user/data", {})
    assert "FileNotFoundError: user/data on the Hub: " in refused and "has no items.parquet" in refused


def test_other_repositories_are_refused(client, saved):
    assert "the Hub has no such data set" in client.fail(LOAD, "user/nothing", {})
    client.succeed("from huggingface_hub import create_repo; create_repo('user/model')")
    assert "the Hub has no such data set" in client.fail(LOAD, "user/model", {})


def test_renamed_data_set_is_found_by_its_old_name(client, saved, tmp_path):
    folder, sequences = saved
    client.succeed(PUSH, folder, "user/data", {})
    client.hub.rename("datasets/user/data", "datasets/user/newer")
    assert last_line(client.succeed(LOAD, "user/data", cache(tmp_path))).startswith(sequences.fingerprint)
    client.succeed(LOAD_WITHOUT_PACKAGE, "user/data", cache(tmp_path, "other"))


def test_folder_wins_over_a_name_on_the_hub(client, saved, tmp_path):
    client.succeed(PUSH, saved[0], "user/data", {})
    local = small_sequences(seed=1)
    local.save(tmp_path / "user" / "data")
    printed = client.succeed(
        "import os\nos.chdir(sys.argv[3])\n".join(["import sys\n", LOAD]), "user/data", {}, tmp_path
    )
    assert last_line(printed).startswith(local.fingerprint)
    assert SequenceDatasets.load(tmp_path / "user" / "data").fingerprint == local.fingerprint


# --- labels ---

PUSH_LABELS = """
import sys
from hf_ilora import TeacherLabels
folder, repo_id, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
print(TeacherLabels.load(folder, sys.argv[4]).push_to_hub(repo_id, **arguments).oid)
"""
LOAD_LABELS = """
import sys
from hf_ilora import TeacherLabels
labels = TeacherLabels.load(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))
print(labels.table.to_pylist(), labels.item_embeddings().tolist())
"""
USE_LABELS_CARD = """
import sys
from huggingface_hub import DatasetCard
from datasets import load_dataset
exec(DatasetCard.load(sys.argv[1]).text.split("```python")[1].split("```")[0])
print(labels.table.to_pylist() == load_dataset(sys.argv[1], "labels", split="train").to_list())
"""


@pytest.fixture
def labels(saved, tmp_path):
    """A folder of labels of the data set, in several shards, of a teacher in a folder of this machine."""
    _, sequences = saved
    teacher = KnownTeacher(sequences.num_items)
    teacher.source = str(tmp_path / "outputs" / "ilora")
    label_all(tmp_path / "labels", sequences["train"], teacher, shard_rows=3, data_fingerprint=sequences.fingerprint)
    return tmp_path / "labels", TeacherLabels.load(tmp_path / "labels", sequences.fingerprint)


def test_labels_come_back_and_name_no_folder_of_this_machine(client, saved, labels, tmp_path):
    (data_folder, sequences), (folder, expected) = saved, labels
    client.succeed(PUSH, data_folder, "user/data", {})
    settings = {"dataset": "user/data", "license": "mit"}
    first = last_line(client.succeed(PUSH_LABELS, folder, "user/labels", settings, sequences.fingerprint))
    files = repository(client, "user/labels").commit("main").files
    names = {"README.md", "teacher_labels.json", "item_embeddings.safetensors", "labels-000000.parquet"}
    assert set(files) == names | {".gitattributes"}
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert b"| teacher | ilora |" in files["README.md"] and b"license: mit" in files["README.md"]
    printed = client.succeed(LOAD_LABELS, "user/labels", sequences.fingerprint, {}, token=None)
    assert last_line(printed) == f"{expected.table.to_pylist()} {expected.item_embeddings().tolist()}"
    assert last_line(client.succeed(USE_LABELS_CARD, "user/labels", token=None)) == "True"
    assert last_line(client.succeed(PUSH_LABELS, folder, "user/labels", settings, sequences.fingerprint)) == first


def test_tampered_labels_and_labels_of_other_data_are_refused(client, saved, labels):
    (_, sequences), (folder, _) = saved, labels
    sound = last_line(client.succeed(PUSH_LABELS, folder, "user/labels", {}, sequences.fingerprint))
    refused = client.fail(LOAD_LABELS, "user/labels", "0" * 64, {})
    assert "ValueError: user/labels on the Hub: the data of the labels in" in refused
    embeddings = (folder / "item_embeddings.safetensors").read_bytes()
    replace_file(client, "user/labels", "item_embeddings.safetensors", embeddings[:-4] + bytes(4))
    assert "item_embeddings.safetensors" in client.fail(LOAD_LABELS, "user/labels", sequences.fingerprint, {})
    client.succeed(LOAD_LABELS, "user/labels", sequences.fingerprint, {"revision": sound})
    replace_file(client, "user/labels", "teacher_labels.json", None)
    assert "expected finished labels" in client.fail(LOAD_LABELS, "user/labels", sequences.fingerprint, {})


# --- the command ---

PUSH_RECIPE = RECIPES / "push_data_to_hub.py"


@pytest.mark.slow
def test_recipe_publishes_data_sets_and_labels(client, saved, labels, tmp_path):
    (data_folder, _), (folder, _) = saved, labels
    wrong = ["--folder", data_folder, "--repo_id", "user/data", "--dataset", "user/data"]
    assert "expected a folder of labels" in client.fail(RECIPE, PUSH_RECIPE, *wrong)
    client.succeed(RECIPE, PUSH_RECIPE, "--folder", data_folder, "--repo_id", "user/data", "--license", "mit")
    client.succeed(RECIPE, PUSH_RECIPE, "--folder", folder, "--repo_id", "user/labels", "--dataset", "user/data")
    assert b"license: mit" in repository(client).commit("main").files["README.md"]
    fitted = ["--data_dir", "user/data", "--output_dir", tmp_path / "counts"]  # recipes read data sets by name, too
    client.succeed(RECIPE, RECIPES / "fit_counts.py", *fitted)
    assert b"source_datasets:\n- user/data" in repository(client, "user/labels").commit("main").files["README.md"]
