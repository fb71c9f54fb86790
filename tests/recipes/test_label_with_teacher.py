"""recipes/label_with_teacher.py from a prepared data set and a saved teacher to labels, in this process."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import SASRecForNextItem, SequenceDatasets
from hf_ilora.distillation.labelling import LabelRequests
from hf_ilora.distillation.teacher_labels import TeacherLabels
from tests.recipe_runs import RecipeRun
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A data set and a SASRec that knows it."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "sasrec")
    return folder


@pytest.fixture
def label(run_recipe, parts, tmp_path):
    """Runs the recipe with the data set, the SASRec and an output folder."""

    def run(**changes) -> RecipeRun:
        settings = {"data_dir": parts / "data", "teacher": parts / "sasrec", "output_dir": tmp_path / "labels"}
        return run_recipe("label_with_teacher", **settings | changes)

    return run


def test_sasrec_labels_every_training_row(label, parts):
    run = label(top_k=4, shard_rows=16)
    sequences = SequenceDatasets.load(parts / "data")
    labels = TeacherLabels.load(run.output_dir, sequences.fingerprint)
    model = SASRecForNextItem.from_pretrained(parts / "sasrec")
    assert len(labels) == 40
    for history_id, row in enumerate(sequences["train"]):
        items, distances = labels.lookup([history_id], [len(row["history"])])
        expected_items, expected_distances = model.rank_items(torch.tensor([row["history"]]), 4)
        assert torch.equal(items, expected_items)
        torch.testing.assert_close(distances, expected_distances)
    record = run.record
    assert record["status"] == "finished" and record["data_fingerprint"] == sequences.fingerprint
    assert record["metrics"]["labels"]["rows"] == record["metrics"]["labels"]["labelled_now"] == 40
    assert record["metrics"]["labels"]["tokens_per_second"] > 0


def files(folder) -> dict[str, bytes]:
    """All that the docstring says a second run leaves as it is."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("run.json", "run.log")}


def test_second_run_asks_nothing_and_changes_nothing_but_its_record(label, parts, tmp_path):
    before = files(label().output_dir)
    shutil.copytree(parts / "sasrec", tmp_path / "copy")
    again = label(batch_size=3, teacher=tmp_path / "copy")  # the same teacher from another folder
    assert again.record["metrics"]["labels"]["labelled_now"] == 0
    assert "teacher_labels.json" in before and files(again.output_dir) == before


@pytest.mark.parametrize("policy", ["random", "loss"])
def test_budget_is_spent_on_as_many_rows(label, parts, policy):
    """Also random choice may be given a recommender: experiments change the policy and nothing else."""
    settings = {"labelled_positions": "all", "budget": 25, "recommender": parts / "sasrec"}
    folder = label(acquire=policy, **settings).output_dir
    sequences = SequenceDatasets.load(parts / "data")
    labels = TeacherLabels.load(folder, sequences.fingerprint)
    assert len(labels) == 25
    lengths = np.array([len(row) for row in sequences["train"]["history"]])
    history_ids, prefix_lengths = (labels.table[name].to_numpy() for name in ("history_id", "prefix_length"))
    assert (prefix_lengths <= lengths[history_ids]).all() and len(set(prefix_lengths.tolist())) > 1


def test_published_files_become_labels(label, parts, tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    ranks = (np.arange(40)[:, None] + np.arange(5)) % 30
    np.savetxt(published / "myrank_train.txt", ranks, fmt="%d")
    np.savetxt(published / "confidence_train.txt", np.tile(np.arange(5.0), (40, 1)))
    torch.save(torch.ones(30, 6), published / "all_embeddings.pt")
    folder = label(teacher=published, top_k=5, exclude_seen=False).output_dir
    labels = TeacherLabels.load(folder, SequenceDatasets.load(parts / "data").fingerprint)
    assert labels.table["teacher_items"].to_pylist() == (ranks + 1).tolist()
    assert labels.item_embeddings().shape == (31, 6)


def test_a_table_of_positions_labels_all_of_them(label, parts, tmp_path):
    sequences = SequenceDatasets.load(parts / "data")
    requests = LabelRequests.of_split(sequences["train"], "all")
    order = np.random.default_rng(0).permutation(len(requests))
    scores = torch.randn(len(requests), 31)
    positions = {"history_ids": requests.history_ids, "prefix_lengths": requests.prefix_lengths}

    def save(name, kept):
        tensors = {name: torch.from_numpy(values[kept]) for name, values in positions.items()}
        save_file(tensors | {"scores": scores[: len(kept)].clone()}, tmp_path / name)
        return tmp_path / name

    settings = {"labelled_positions": "all", "exclude_seen": False, "top_k": 3}
    with pytest.raises(ValueError, match=rf"lacks 1 of {len(requests)} answers"):
        label(teacher=save("part.safetensors", order[1:]), **settings)
    assert not list(tmp_path.glob("labels/*.parquet"))
    folder = label(teacher=save("scores.safetensors", order), **settings).output_dir
    labels = TeacherLabels.load(folder, sequences.fingerprint)
    items, _ = labels.lookup(*(values[order] for values in positions.values()))
    assert torch.equal(items, scores[:, 1:].argsort(dim=1, descending=True)[:, :3] + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k is 0: expected at least 1"),
        ({"labelled_positions": "first"}, "invalid choice: 'first' .*last.*all"),
        ({"acquire": "entropy"}, "acquire is entropy and budget None: expected the number of labels to choose"),
        ({"acquire": "entropy", "budget": 3}, "expected a recommender for all but random"),
        ({"budget": 0}, "budget is 0: expected at least 1"),
        ({"budget": 41}, "budget is 41"),
        ({"teacher": "nowhere"}, "nowhere is not a teacher"),
        ({"dtype": "bfloat16"}, "has no language model"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(label, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        label(**changes)
    assert not list((tmp_path).glob("labels/*"))


def test_teacher_of_another_catalogue_is_refused(label, tmp_path):
    known_recommender(cyclic_sequences(num_users=40, num_items=20)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="knows 20 items and the data set has 30"):
        label(teacher=tmp_path / "other")


def test_prefix_rows_take_no_further_positions(label, tmp_path):
    cyclic_sequences(num_users=40, protocol="temporal_users").save(tmp_path / "data")
    with pytest.raises(ValueError, match="protocol temporal_users, whose rows are prefixes"):
        label(data_dir=tmp_path / "data", labelled_positions="all")


def test_unfinished_run_with_other_settings_is_not_touched(label):
    folder = label().output_dir
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="top_k was 10 and is 4; choose another output_dir"):
        label(top_k=4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
