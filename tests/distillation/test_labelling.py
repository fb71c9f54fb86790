"""Labelling: the requests, the shards of answers, and the state after a crash."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import PopularityConfig, PopularityForNextItem, SASRecConfig, SASRecForNextItem
from hf_ilora.distillation import labelling
from hf_ilora.distillation.labelling import (
    LabelFolder,
    LabelRequests,
    acquire_requests,
    label_shards,
    wait_for_shards,
)
from hf_ilora.distillation.teacher_labels import TeacherLabels
from hf_ilora.distillation.teachers import RankItemsTeacher
from tests.distillation.known_teacher import DATA_FINGERPRINT, KnownTeacher, label_all, label_settings
from tests.synthetic import cyclic_sequences

NUM_USERS, NUM_ITEMS = 20, 30


@pytest.fixture(scope="module")
def train():
    """Rows of different lengths."""
    split = cyclic_sequences(num_users=NUM_USERS)["train"]
    return split.map(lambda row, index: {"history": row["history"][index % 5 :]}, with_indices=True)


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "whole"
    label_all(path, train, KnownTeacher(NUM_ITEMS))
    return labels_in(path)


def labels_in(path):
    return TeacherLabels.load(path, DATA_FINGERPRINT).table


# --- requests ---


def test_labelling_last_positions_asks_for_the_target_after_the_whole_history(train):
    requests = LabelRequests.of_split(train)
    assert requests.history_ids.tolist() == list(range(NUM_USERS))
    assert requests.targets().tolist() == train["target"][:]
    histories = requests.histories()
    for row, example in enumerate(train):
        assert [item for item in histories[row].tolist() if item] == example["history"]
        assert histories[row, : len(example["history"])].all()  # padded on the right


def test_labelling_all_positions_asks_for_every_item_but_the_first(train):
    requests = LabelRequests.of_split(train, "all")
    expected = [
        (row, prefix_length, [*example["history"], example["target"]][prefix_length])
        for row, example in enumerate(train)
        for prefix_length in range(1, len(example["history"]) + 1)
    ]
    found = zip(requests.history_ids, requests.prefix_lengths, requests.targets(), strict=True)
    assert list(found) == expected


def test_costs_are_those_of_the_newest_items_and_of_the_prompt(train):
    costs = LabelRequests.of_split(train, "all").costs(KnownTeacher(NUM_ITEMS))
    expected = [
        10 + sum(item**2 for item in example["history"][:prefix_length][-3:])
        for example in train
        for prefix_length in range(1, len(example["history"]) + 1)
    ]
    assert costs.tolist() == expected


def test_empty_history_and_unknown_labelled_positions_are_refused(train):
    with pytest.raises(ValueError, match="'first': expected one of last, all"):
        LabelRequests.of_split(train, "first")
    broken = train.map(lambda row, index: {"history": [] if index == 7 else row["history"]}, with_indices=True)
    with pytest.raises(ValueError, match="history of row 7 is empty"):
        LabelRequests.of_split(broken)


# --- a budget ---


@pytest.fixture(scope="module")
def recommender():
    torch.manual_seed(0)
    return SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, max_length=4, initializer_range=0.5))


def test_loss_policy_asks_where_the_recommender_is_worst(train, recommender):
    requests = LabelRequests.of_split(train, "all")
    losses = []
    for row, example in enumerate(train):
        sequence = [*example["history"], example["target"]]
        for prefix_length in range(1, len(sequence)):
            logits = recommender.eval()(torch.tensor([sequence[:prefix_length][-4:]])).logits[0]
            losses.append((-logits.log_softmax(0)[sequence[prefix_length]].item(), row, prefix_length))
    chosen = acquire_requests(requests, "loss", 9, recommender, batch_size=32)
    expected = {(row, prefix_length) for _, row, prefix_length in sorted(losses)[-9:]}
    assert set(zip(chosen.history_ids.tolist(), chosen.prefix_lengths.tolist(), strict=True)) == expected


@pytest.mark.parametrize("policy", ["random", "entropy", "margin", "k_center"])
def test_policies_choose_different_requests_of_the_split(train, recommender, policy):
    requests = LabelRequests.of_split(train)
    chosen = acquire_requests(requests, policy, 6, recommender, seed=3)
    assert len(set(chosen.history_ids.tolist())) == 6 and set(chosen.history_ids) < set(range(NUM_USERS))
    again = acquire_requests(requests, policy, 6, recommender, seed=3)
    assert chosen.history_ids.tolist() == again.history_ids.tolist()


def test_policy_without_its_input_is_refused(train):
    requests = LabelRequests.of_split(train)
    with pytest.raises(ValueError, match="policy entropy reads a recommender's outputs: expected a recommender"):
        acquire_requests(requests, "entropy", 3)
    popularity = PopularityForNextItem(PopularityConfig(num_items=NUM_ITEMS))
    with pytest.raises(ValueError, match="PopularityForNextItem has no user embeddings"):
        acquire_requests(requests, "k_center", 3, popularity)
    with pytest.raises(ValueError, match="budget is 21: expected"):
        acquire_requests(requests, "random", 21)
    with pytest.raises(ValueError, match="batch_size is -1: expected at least 1"):
        acquire_requests(requests, "entropy", 3, popularity, batch_size=-1)


# --- shards ---


@pytest.mark.parametrize(("shard_rows", "batch_size", "processes"), [(1, 1, 1), (7, 3, 2), (20, 64, 3), (64, 5, 1)])
def test_labels_do_not_depend_on_shards_batches_and_processes(train, undisturbed, tmp_path, shard_rows, batch_size, processes):  # fmt: skip  # noqa: E501
    teacher = KnownTeacher(NUM_ITEMS)
    label_all(tmp_path, train, teacher, batch_size=batch_size, processes=processes, shard_rows=shard_rows)
    assert labels_in(tmp_path).equals(undisturbed)
    assert len(list(tmp_path.glob("labels-*.parquet"))) == -(-NUM_USERS // shard_rows)
    assert sum(map(len, teacher.calls)) == NUM_USERS and max(map(len, teacher.calls)) <= batch_size


@pytest.mark.parametrize("before", [True, False])
def test_kill_at_any_write_loses_and_doubles_no_row(train, undisturbed, tmp_path, monkeypatch, before):
    """A process that dies before or after a file takes its name, at each of the files in turn, and is started again."""
    replace = Path.replace
    teacher, runs, died = KnownTeacher(NUM_ITEMS), 0, True
    while died:
        writes = 0

        def replace_or_die(self, target):
            nonlocal writes
            writes += 1
            if writes == 2 and before:
                raise KeyboardInterrupt
            result = replace(self, target)
            if writes == 2:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(Path, "replace", replace_or_die)
        (tmp_path / ".labels-000002.1.unfinished.parquet").write_bytes(b"half")  # what a kill cannot clean up
        runs += 1
        try:
            label_all(tmp_path, train, teacher, shard_rows=4)
            died = False
        except KeyboardInterrupt:
            assert not (tmp_path / "teacher_labels.json").exists() or not before
    monkeypatch.undo()
    assert runs > 3
    assert labels_in(tmp_path).equals(undisturbed)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"labels-{shard:06d}.parquet" for shard in range(5)} | {
        "README.md", "requests.parquet", "teacher_labels.json", "item_embeddings.safetensors"
    }  # fmt: skip
    if not before:  # what was written is not asked again
        assert sum(map(len, teacher.calls)) == NUM_USERS


def test_run_resumes_with_another_number_of_processes(train, undisturbed, tmp_path):
    everything = LabelRequests.of_split(train)
    folder = LabelFolder(tmp_path, label_settings(NUM_ITEMS, shard_rows=3))
    folder.start(lambda: everything)
    label_shards(folder, everything, KnownTeacher(NUM_ITEMS), process=1, num_processes=2)
    teacher = KnownTeacher(NUM_ITEMS)
    label_all(tmp_path, train, teacher, processes=3, shard_rows=3)
    assert 0 < sum(map(len, teacher.calls)) < NUM_USERS
    assert labels_in(tmp_path).equals(undisturbed)


def test_finished_folder_is_checked_without_asking_the_teacher(train, undisturbed, tmp_path):
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    teacher = KnownTeacher(NUM_ITEMS)
    teacher.item_embeddings = None  # would fail
    label_all(tmp_path, train, teacher)
    assert not teacher.calls
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def change_one_distance(folder):
    path = folder / "labels-000000.parquet"
    table = pq.read_table(path)
    distances = table["teacher_distances"].to_pylist()
    distances[0][0] += 1
    column = pa.array(distances, pa.list_(pa.float32()))
    pq.write_table(pa.table([*table.columns[:3], column], schema=table.schema), path)


def change_embeddings(folder):
    save_file({"item_embeddings": torch.ones(NUM_ITEMS + 1, 5)}, folder / "item_embeddings.safetensors")


@pytest.mark.parametrize(
    ("damage", "name"), [(change_one_distance, "labels_fingerprint"), (change_embeddings, "embeddings_fingerprint")]
)
def test_finished_folder_whose_files_were_changed_is_not_described_anew(train, tmp_path, damage, name):
    """Otherwise the same command, given again, would make changed files look like the teacher's answers."""
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    damage(tmp_path)
    before = (tmp_path / "teacher_labels.json").read_bytes()
    with pytest.raises(ValueError, match=rf"have the {name} .*: expected .*; restore the files, or delete"):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    assert (tmp_path / "teacher_labels.json").read_bytes() == before


def test_the_requests_of_the_first_start_are_kept(train, tmp_path):
    everything = LabelRequests.of_split(train)
    folder = LabelFolder(tmp_path, label_settings(NUM_ITEMS))
    for indices in ([4, 2, 9], [1, 3]):
        folder.start(lambda indices=indices: everything.select(np.array(indices)))
        assert folder.requests(everything).history_ids.tolist() == [4, 2, 9]


def test_other_settings_than_those_of_the_unfinished_run_are_refused(train, tmp_path):
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    with pytest.raises(ValueError, match="shard_rows was 16 and is 8; top_k was 3 and is 5; choose another output_dir"):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS), top_k=5, shard_rows=8)


def test_labels_of_unknown_origin_are_not_overwritten(train, tmp_path):
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    (tmp_path / "requests.parquet").unlink()
    with pytest.raises(ValueError, match=r"contains labels-.* but no requests\.parquet"):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))


def test_shard_that_answers_something_else_is_refused(train, tmp_path):
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS), shard_rows=5)
    (tmp_path / "labels-000001.parquet").write_bytes((tmp_path / "labels-000000.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"labels-000001\.parquet does not answer the requests of requests\.parquet"):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS), shard_rows=5)
    (tmp_path / "labels-000001.parquet").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole parquet file"):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS), shard_rows=5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda items, distances: (items * 0, distances), r"expected ids 1\.\.30 and finite"),
        (lambda items, distances: (items + 30, distances), r"expected ids 1\.\.30 and finite"),
        (lambda items, distances: (items, distances / 0), "history 0 .*finite distances"),
        (lambda items, distances: (items[:, :2], distances), r"items \(16, 2\) and distances \(16, 3\): expected"),
    ],
)
def test_invalid_answers_are_refused_before_they_are_written(train, tmp_path, answer, message):
    teacher = KnownTeacher(NUM_ITEMS)
    rank = teacher.rank
    teacher.rank = lambda *arguments: answer(*rank(*arguments))
    with pytest.raises(ValueError, match=message):
        label_all(tmp_path, train, teacher)
    assert not list(tmp_path.glob("labels-*"))


def test_progress_is_reported_with_the_time_left(train, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(labelling, "_SECONDS_BETWEEN_REPORTS", -1)
    with caplog.at_level(logging.INFO):
        label_all(tmp_path, train, KnownTeacher(NUM_ITEMS), batch_size=10, shard_rows=10)
    assert "20 rows in 2 of 2 shards are left for this process" in caplog.text
    assert "10 of 20 rows" in caplog.text and ", 0 s left" in caplog.text


def test_shards_have_the_columns_of_a_data_set(train, tmp_path):
    label_all(tmp_path, train, KnownTeacher(NUM_ITEMS))
    schema = pq.read_schema(tmp_path / "labels-000000.parquet")
    assert [str(schema.field(name).type) for name in ("history_id", "prefix_length")] == ["int64", "int32"]
    assert str(schema.field("teacher_items").type).startswith("list<")
    assert schema.field("teacher_distances").type.value_type == "float"


def test_only_labels_that_a_student_learns_from_come_with_item_embeddings(train, tmp_path):
    teacher, requests = KnownTeacher(NUM_ITEMS), LabelRequests.of_split(train)
    for split in ("train", "validation"):
        folder = LabelFolder(tmp_path / split, label_settings(NUM_ITEMS) | {"split": split})
        folder.start(lambda: requests)
        label_shards(folder, requests, teacher)
        folder.finish(requests, teacher)
        labels = TeacherLabels.load(tmp_path / split, DATA_FINGERPRINT, split=split)
        assert (tmp_path / split / "item_embeddings.safetensors").exists() == (split == "train")
        assert (labels.description["embedding_size"] is None) == (split == "validation")


# --- a teacher of another library ---


class NextInCatalogue:
    """Has nothing but rank_items: the items behind the newest one in the catalogue come next."""

    def rank_items(self, histories, top_k, exclude_seen):
        newest = [[item for item in history if item][-1] for history in histories.tolist()]
        item_ids = [[(item + j) % NUM_ITEMS + 1 for j in range(top_k)] for item in newest]
        return item_ids, [[0.5 * j for j in range(top_k)] for _ in newest]


def test_any_object_that_ranks_items_labels_a_data_set(train, tmp_path):
    teacher = RankItemsTeacher(NextInCatalogue(), NUM_ITEMS, "f" * 64, "next in the catalogue", max_history=3)
    folder = label_all(tmp_path, train, teacher, labelled_positions="all", shard_rows=7)
    labels = TeacherLabels.load(tmp_path, DATA_FINGERPRINT, teacher.fingerprint)
    assert len(labels) == sum(len(row["history"]) for row in train)
    for history_id, row in enumerate(train):
        for prefix_length, newest in enumerate(row["history"], start=1):
            items, distances = labels.lookup([history_id], [prefix_length])
            assert items[0].tolist() == [(newest + j) % NUM_ITEMS + 1 for j in range(3)]
            assert distances[0].tolist() == [0, 0.5, 1]
    assert labels.description["teacher"] == "next in the catalogue" and labels.description["embedding_size"] is None
    everything = LabelRequests.of_split(train, "all")
    assert folder.requests(everything).costs(teacher).tolist() == everything.prefix_lengths.clip(max=3).tolist()


def test_waiting_for_a_process_that_hangs_times_out(tmp_path, train):
    teacher = KnownTeacher(NUM_ITEMS)
    folder = LabelFolder(tmp_path / "labels", label_settings(NUM_ITEMS))
    folder.start(lambda: LabelRequests.of_split(train))
    requests = folder.requests(LabelRequests.of_split(train))
    label_shards(folder, requests, teacher, process=0, num_processes=2)
    with pytest.raises(
        TimeoutError, match=r"1 shards are missing in .*labels-.* first, and no process has written one"
    ):
        wait_for_shards(folder, requests, timeout_seconds=0.3)
    label_shards(folder, requests, teacher, process=1, num_processes=2)
    wait_for_shards(folder, requests, timeout_seconds=0.3)


def test_requests_without_an_answer_do_not_block_other_settings(tmp_path, train):
    teacher = KnownTeacher(NUM_ITEMS)
    settings = label_settings(NUM_ITEMS)
    LabelFolder(tmp_path, settings | {"top_k": 25}).start(lambda: LabelRequests.of_split(train))
    folder = LabelFolder(tmp_path, settings)
    folder.start(lambda: LabelRequests.of_split(train))
    requests = folder.requests(LabelRequests.of_split(train))
    label_shards(folder, requests, teacher)
    with pytest.raises(ValueError, match=r"top_k was .* and is 25"):
        LabelFolder(tmp_path, settings | {"top_k": 25}).start(lambda: LabelRequests.of_split(train))
