"""Reading labels: looking rows up, and refusing labels of other data and damaged ones."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file

from hf_ilora.distillation import teacher_labels
from hf_ilora.distillation.labels_card import named_teacher
from hf_ilora.distillation.teacher_labels import TeacherLabels
from tests.distillation.known_teacher import DATA_FINGERPRINT, KnownTeacher, expected_answer, label_all
from tests.synthetic import cyclic_sequences

NUM_USERS, NUM_ITEMS, TOP_K = 20, 30, 3


@pytest.fixture(scope="module")
def train():
    return cyclic_sequences(num_users=NUM_USERS)["train"]


@pytest.fixture
def folder(train, tmp_path):
    label_all(tmp_path / "labels", train, KnownTeacher(NUM_ITEMS), labelled_positions="all")
    return tmp_path / "labels"


def load(folder, **changes) -> TeacherLabels:
    return TeacherLabels.load(folder, **{"data_fingerprint": DATA_FINGERPRINT} | changes)


def test_every_prefix_has_the_answer_that_the_teacher_gives_to_it(folder, train):
    labels = load(folder)
    assert (labels.top_k, labels.num_items) == (TOP_K, NUM_ITEMS)
    assert len(labels) == sum(len(row["history"]) for row in train)
    for history_id, row in enumerate(train):
        for prefix_length in range(1, len(row["history"]) + 1):
            items, distances = labels.lookup([history_id], [prefix_length])
            expected = expected_answer(row["history"][prefix_length - 1], history_id, TOP_K, NUM_ITEMS)
            assert (items[0].tolist(), distances[0].tolist()) == expected


def test_lookup_takes_any_shape_and_gives_zeros_where_there_is_no_label(folder):
    labels = load(folder)
    history_ids = torch.tensor([[3, 3, 99], [-1, 3, 0]])
    prefix_lengths = torch.tensor([[1, 2, 1], [-1, 5000, 0]])
    items, distances = labels.lookup(history_ids, prefix_lengths)
    assert items.shape == distances.shape == (2, 3, TOP_K)
    assert (items.dtype, distances.dtype) == (torch.int64, torch.float32)
    assert items[0, :2].all() and distances[0, :2].all()
    assert not items[0, 2].any() and not items[1].any() and not distances[1].any()
    for place in (0, 1):
        alone, _ = labels.lookup(np.array([3]), np.array([1 + place]))
        assert torch.equal(alone[0], items[0, place])


def test_lookup_of_other_shapes_is_refused(folder):
    with pytest.raises(ValueError, match=r"\(2,\) and prefix_lengths \(1,\): expected the same shape"):
        load(folder).lookup([1, 2], [1])


def test_table_is_in_the_order_of_history_and_prefix_length(folder):
    table = load(folder).table
    assert table.column_names == ["history_id", "prefix_length", "teacher_items", "teacher_distances"]
    pairs = list(zip(table["history_id"].to_pylist(), table["prefix_length"].to_pylist(), strict=True))
    assert pairs == sorted(set(pairs))


def test_item_embeddings_are_those_of_the_teacher(folder):
    assert torch.equal(load(folder).item_embeddings(), KnownTeacher(NUM_ITEMS).item_embeddings())


def test_teacher_without_embeddings_says_so(train, tmp_path):
    teacher = KnownTeacher(NUM_ITEMS)
    teacher.item_embeddings = lambda: None
    label_all(tmp_path / "labels", train, teacher)
    with pytest.raises(ValueError, match=r"\(known teacher\) has no item embeddings: expected an iLoRA model"):
        load(tmp_path / "labels").item_embeddings()
    with pytest.raises(ValueError, match="has no item embeddings"):
        _ = load(tmp_path / "labels").embedding_size
    assert not (tmp_path / "labels" / "item_embeddings.safetensors").exists()


@pytest.mark.parametrize("name", ["data", "teacher"])
def test_labels_of_other_data_or_of_another_teacher_are_refused(folder, name):
    load(folder, teacher_fingerprint=KnownTeacher.fingerprint)
    message = f"the {name} of the labels in .* has the fingerprint .*: expected 0000.*, or use the {name} of these"
    with pytest.raises(ValueError, match=message):
        load(folder, **{f"{name}_fingerprint": "0" * 64})


def test_unfinished_labels_are_refused(folder):
    (folder / "teacher_labels.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected finished labels; run `hf-ilora label`"):
        load(folder)


def change_one_label(folder):
    path = folder / "labels-000001.parquet"
    table = pq.read_table(path)
    items = table["teacher_items"].to_pylist()
    items[0][0] = items[0][0] % NUM_ITEMS + 1
    columns = [*table.columns[:2], pa.array(items, pa.list_(pa.int32())), table.columns[3]]
    pq.write_table(pa.table(columns, schema=table.schema), path)


def change_description(folder, **changes):
    path = folder / "teacher_labels.json"
    description = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in description.items() if value != "dropped"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_one_label, "have 220 rows with the fingerprint .*: expected 220 with"),
        (lambda folder: (folder / "labels-000000.parquet").unlink(), "labels-000000.parquet is missing: expected 14"),
        (lambda folder: (folder / "labels-000002.parquet").write_bytes(b"PAR1"), "not a whole parquet file"),
        (lambda folder: pq.write_table(pq.read_table(folder / "requests.parquet"), folder / "labels-000003.parquet"),
         "have 424 rows: expected 220"),
        (lambda folder: (folder / "teacher_labels.json").write_text("{"), "is not JSON"),
        (lambda folder: change_description(folder, format_version=1), "format_version 1: expected 2"),
        (lambda folder: change_description(folder, top_k="dropped"), "lacks top_k"),
        (lambda folder: change_description(folder, embeddings_fingerprint="dropped"),
         "lacks embeddings_fingerprint: restore it, or delete it and run the same `hf-ilora label"),
        (lambda folder: change_description(folder, num_rows=7), "have 220 rows: expected 7"),
    ],
)  # fmt: skip
def test_damaged_labels_are_refused(folder, damage, message):
    load(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_damaged_embeddings_are_refused(folder):
    (folder / "item_embeddings.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="does not contain item_embeddings"):
        load(folder).item_embeddings()


def change_one_embedding(folder):
    path = folder / "item_embeddings.safetensors"
    tensors = load_file(path)
    tensors["item_embeddings"][7, 2] += 1
    save_file(tensors, path)


def test_embeddings_are_read_and_checked_once(folder, monkeypatch):
    labels, calls = load(folder), []
    digest = teacher_labels.embeddings_digest
    monkeypatch.setattr(teacher_labels, "embeddings_digest", lambda folder: calls.append(folder) or digest(folder))
    assert labels.embedding_size == labels.item_embeddings().shape[1]
    assert labels.item_embeddings() is labels.item_embeddings()
    assert len(calls) == 1


def test_embeddings_that_were_changed_are_refused(folder):
    change_one_embedding(folder)
    with pytest.raises(ValueError, match=r"embeddings\.safetensors has the fingerprint .*: expected .*; label"):
        load(folder).item_embeddings()


def test_folder_of_an_earlier_version_is_described_anew_by_the_same_command(folder, train):
    expected = json.loads((folder / "teacher_labels.json").read_text())
    change_description(folder, embeddings_fingerprint="dropped")
    with pytest.raises(ValueError, match="delete it and run the same"):
        load(folder)
    (folder / "teacher_labels.json").unlink()
    teacher = KnownTeacher(NUM_ITEMS)
    label_all(folder, train, teacher, labelled_positions="all")
    assert not teacher.calls
    assert json.loads((folder / "teacher_labels.json").read_text()) == expected


@pytest.mark.parametrize("name", ["top_k", "num_items", "num_rows", "num_shards"])
def test_numbers_of_the_description_that_cannot_be_are_refused(folder, name):
    path = folder / "teacher_labels.json"
    whole = json.loads(path.read_text())
    for value in (0, -1, None, True, 1.5, "3", [3], *([] if name == "num_items" else [10**12])):
        path.write_text(json.dumps(whole | {name: value}))
        with pytest.raises(ValueError, match=rf"has {name}=.*: expected|expected 1000000000000"):
            load(folder)
    for text in ("[" * 100_000, "null", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"teacher_labels\.json"):
            load(folder)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("teacher_items", lambda lists: [lists[0][:-1], *lists[1:]], "do not all have 3 items"),
        ("teacher_items", lambda lists: [None, *lists[1:]], "do not all have 3 items"),
        ("teacher_items", lambda lists: [[31, 1, 2], *lists[1:]], "contain items 1 to 31"),
        ("teacher_items", lambda lists: [[0, 1, 2], *lists[1:]], "contain items 0 to"),
        ("teacher_distances", lambda lists: [[float("nan"), 1.0, 2.0], *lists[1:]], "not finite"),
    ],
)
def test_answers_of_another_form_are_refused(folder, column, change, message):
    path = folder / "labels-000000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(column)
    changed = pa.array(change(table[column].to_pylist()), table.schema.field(column).type)
    pq.write_table(table.set_column(place, table.schema.field(place), changed), path)
    with pytest.raises(ValueError, match=message):
        load(folder)


# --- as others read them ---


def test_load_dataset_reads_finished_labels_by_their_card(folder, tmp_path):
    labels = load(folder)
    rows = load_dataset(str(folder), "labels", split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(map(str, rows.to_list())) == sorted(map(str, labels.table.to_pylist()))


def test_card_shows_teacher_budget_policy_data_and_fingerprints(train, tmp_path):
    settings = {"budget": 1200, "acquire": "entropy", "seed": 5, "recommender_fingerprint": "e" * 64}
    label_all(tmp_path / "l<b>els", train, KnownTeacher(NUM_ITEMS), **settings)
    card = (tmp_path / "l<b>els" / "README.md").read_text()
    description = json.loads((tmp_path / "l<b>els" / "teacher_labels.json").read_text())
    for fact in (
        "| teacher | known teacher |",
        "| budget | 1,200 labels |",
        "| policy that spends the budget | entropy |",
    ):
        assert fact in card
    for name in ("data", "teacher", "labels", "embeddings", "recommender"):
        assert description[f"{name}_fingerprint"] in card
    assert "# l&lt;b&gt;els" in card and str(tmp_path) not in card


def test_teacher_in_a_folder_is_named_by_the_end_of_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "ilora").mkdir(parents=True)
    assert named_teacher(f"{tmp_path}/outputs/ilora") == named_teacher("outputs/ilora") == "ilora"
    assert named_teacher("user/ilora") == "user/ilora" and named_teacher("known teacher") == "known teacher"
