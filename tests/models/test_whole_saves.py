"""A save over an earlier model: what a failing write and a kill leave behind, and which files the new one replaces."""

import errno
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from transformers import modeling_utils

from hf_ilora import SASRecForNextItem
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.whole_saves import saved_whole
from tests.models.ilora.ilora_fixtures import TITLES, catalogue, recommender, tiny_model

HISTORIES = [[3, 1, 2], [7]]


def sasrec(scale: float = 1.0, **settings) -> SASRecForNextItem:
    model = recommender(**settings)
    with torch.no_grad():
        model.head.weight.mul_(scale)
    model.catalogue = catalogue([f"{title}, {scale}" for title in TITLES])
    return model


def save_sasrec(folder, scale: float, **settings) -> None:
    sasrec(scale).save_pretrained(folder, **settings)


def save_ilora(folder, scale: float) -> None:
    tiny_model(lora_alpha=16.0 * scale, llm_name_or_path="user/llm").save_pretrained(folder)


def save_language_model(folder, scale: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.llm.get_input_embeddings().weight.mul_(scale)
    model.save_language_model(folder)


SAVES = {
    "sasrec": save_sasrec,
    "shards": lambda folder, scale: save_sasrec(folder, scale, max_shard_size="2KB"),
    "ilora": save_ilora,
    "language model": save_language_model,
}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fail_at_weights(monkeypatch) -> None:
    def write_half_a_file(tensors, path, **settings):
        save_file(dict(list(tensors.items())[:1]), path, **settings)
        raise OSError("No space left on device")

    monkeypatch.setattr(modeling_utils, "safe_save_file", write_half_a_file)


def fail_at_last_file(monkeypatch) -> None:
    def refuse(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(Catalogue, "to_parquet", refuse)


@pytest.mark.parametrize("fail", [fail_at_weights, fail_at_last_file])
@pytest.mark.parametrize("kind", SAVES)
def test_a_failing_write_leaves_the_earlier_model_as_it_was(tmp_path, monkeypatch, kind, fail):
    if kind == "language model" and fail is fail_at_last_file:
        pytest.skip("it has no catalogue")
    SAVES[kind](tmp_path, 1.0)
    before = contents(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail(patch)
        SAVES[kind](tmp_path, 2.0)
    assert contents(tmp_path) == before
    SAVES[kind](tmp_path, 2.0)
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


class Killed(BaseException):
    """What ends a process: nothing in the package handles it."""


def kill_at_rename(monkeypatch, number: int) -> None:
    """End the process before the rename with this number out of the unfinished folder."""
    renames, rename = iter(range(number)), Path.replace

    def counted(self, target):
        if "unfinished" not in str(target) and next(renames, None) is None:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", counted)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_a_kill_between_two_renames_never_mixes_two_models(tmp_path, monkeypatch, number):
    """The weights of either model fit the configuration of the other, so that no size would tell."""
    sasrec(1.0, score_temperature=1.0).save_pretrained(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(patch, number)
        sasrec(2.0, score_temperature=0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        SASRecForNextItem.from_pretrained(tmp_path)
    sasrec(2.0, score_temperature=0.5).save_pretrained(tmp_path)
    assert SASRecForNextItem.from_pretrained(tmp_path).config.score_temperature == 0.5


@pytest.mark.parametrize("number", [0, 1, 4])
def test_where_the_weights_alone_are_new_one_model_or_the_other_is_there(tmp_path, monkeypatch, number):
    """As when a training run saves its model again: there is no moment without a model."""
    model = recommender()
    model.save_pretrained(tmp_path)
    earlier = model.recommend(HISTORIES, 5)[1]
    with torch.no_grad():
        model.head.weight.mul_(2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_rename(patch, number)
        model.save_pretrained(tmp_path)
    found = SASRecForNextItem.from_pretrained(tmp_path).recommend(HISTORIES, 5)[1]
    assert torch.equal(found, earlier) or torch.equal(found, model.recommend(HISTORIES, 5)[1])


def test_shards_and_a_single_file_replace_each_other(tmp_path):
    """Otherwise loading takes the older of the two: a single file goes before an index of shards."""
    for scale, settings in ((1.0, {}), (2.0, {"max_shard_size": "2KB"}), (3.0, {"max_shard_size": "1KB"}), (4.0, {})):
        model = sasrec(scale)
        model.save_pretrained(tmp_path, **settings)
        loaded = SASRecForNextItem.from_pretrained(tmp_path)
        assert torch.equal(loaded.head.weight, model.head.weight) and loaded.catalogue == model.catalogue
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_model_without_catalogue_does_not_inherit_that_of_the_earlier_one(tmp_path):
    save_sasrec(tmp_path, 1.0)
    model = sasrec(2.0)
    model.catalogue = None
    model.save_pretrained(tmp_path)
    assert SASRecForNextItem.from_pretrained(tmp_path).catalogue is None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "items.parquet").write_bytes(b"of a data set")
    model.save_pretrained(tmp_path / "data")  # where there was no model
    assert (tmp_path / "data" / "items.parquet").read_bytes() == b"of a data set"


def test_another_variant_and_other_files_stay(tmp_path):
    save_sasrec(tmp_path, 1.0, variant="fp16")
    (tmp_path / "run.json").write_text("{}")
    save_sasrec(tmp_path, 2.0, max_shard_size="2KB")
    assert {"model.fp16.safetensors", "run.json", "model.safetensors.index.json"} <= contents(tmp_path).keys()


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_stays(tmp_path):
    killed, living = (tmp_path / f".model.{number}-ab.unfinished" for number in (1, 2))
    for unfinished in (killed, living):
        unfinished.mkdir()
        (unfinished / "model.safetensors").write_bytes(b"half")
        unfinished.with_suffix(".writer").touch()
    with FileLock(living.with_suffix(".writer")):
        save_sasrec(tmp_path, 1.0)
        assert not killed.exists() and (living / "model.safetensors").exists()
    assert not killed.with_suffix(".writer").exists()
    save_sasrec(tmp_path, 1.0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_disk_without_locks_takes_a_model(tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    save_sasrec(tmp_path, 1.0)
    assert SASRecForNextItem.from_pretrained(tmp_path).config.num_items == len(TITLES)


def test_an_error_leaves_no_new_folder(tmp_path):
    with pytest.raises(OSError, match="disk full"), saved_whole(tmp_path / "new"):
        raise OSError("disk full")
    assert not (tmp_path / "new").exists()


def test_the_unfinished_folder_is_gone_after_the_block(tmp_path):
    with saved_whole(tmp_path / "new") as unfinished:
        (unfinished / "config.json").write_text("{}")
        (unfinished / "templates").mkdir()
        (unfinished / "templates" / "chat.jinja").touch()
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["chat.jinja", "config.json", "templates"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(ValueError, match="model is a file: expected a folder; choose another name"):
        recommender().save_pretrained(tmp_path / "model")
