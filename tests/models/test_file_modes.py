"""Saved files have the permissions of the umask, even where a writer is stricter."""

import os

import pytest

from tests.models.ilora.ilora_fixtures import catalogue, recommender, tiny_model


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def mode(request):
    """The mode of a new file under a umask that lasts for the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shards", [None, "2KB"])
def test_a_saved_recommender_follows_the_umask(tmp_path, mode, shards):
    model = recommender()
    model.catalogue = catalogue()
    for _ in range(2):  # an earlier save is replaced
        model.save_pretrained(tmp_path / "model", **({} if shards is None else {"max_shard_size": shards}))
        found = modes(tmp_path / "model")
        weights = [name for name in found if name.endswith(".safetensors")]
        assert weights == ["model.safetensors"] if shards is None else len(weights) > 1
        assert set(found.values()) == {mode} and "items.parquet" in found


def test_a_saved_ilora_follows_the_umask(tmp_path, mode):
    tiny_model().save_pretrained(tmp_path / "model")
    found = modes(tmp_path / "model")
    assert {"model.safetensors", "tokenizer.json", "items.parquet"} <= set(found)
    assert set(found.values()) == {mode}
