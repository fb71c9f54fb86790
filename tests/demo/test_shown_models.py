"""Loading the models of a demo, and refusing those that cannot be shown."""

import json

import pytest

from hf_ilora import Catalogue
from hf_ilora.demo.shown_models import load_models
from tests.demo import shelf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shelf.sasrec().save_pretrained(folder / "first" / "sasrec")
    shelf.sasrec(seed=1).save_pretrained(folder / "second" / "sasrec")
    shelf.counts().save_pretrained(folder / "counts")
    without = shelf.sasrec()
    without.catalogue = None
    without.save_pretrained(folder / "without")
    other = shelf.sasrec()
    raw_ids = [*range(101, 108), 999]
    other.catalogue = Catalogue(other.catalogue.table.set_column(1, "raw_id", [raw_ids]))
    other.save_pretrained(folder / "other")
    (folder / "nothing").mkdir()
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    (folder / "bert" / "model.safetensors").write_bytes(b"")
    return folder


def test_models_are_named_after_their_folders_or_as_the_caller_says(folder):
    first, second, counts = (str(folder / name) for name in ("first/sasrec", "second/sasrec", "counts"))
    assert [each.name for each in load_models([first, counts])] == ["sasrec", "counts"]
    assert [each.name for each in load_models([first, second, counts])] == [
        "first/sasrec",
        "second/sasrec",
        f"{folder.name}/counts",
    ]
    with pytest.raises(ValueError, match="expected 2 different ones"):
        load_models([first, first])
    assert [each.name for each in load_models([first, second], ["ids", "taught"])] == ["ids", "taught"]
    models = load_models([first, counts])
    assert models[0].kind.startswith("SASRec, ") and models[0].takes_new_items
    assert models[1].kind == "TransitionCounts" and not models[1].takes_new_items
    assert not models[0].model.training


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there are no models"),
        (["without"], r"without has no catalogue.*save the model again"),
        (
            ["first/sasrec", "other"],
            r"other have other raw ids than in .*sasrec .item 8 is 999 in .*other and 108 in .*sasrec.: expected m",
        ),
        (["nothing"], r"nothing contains nothing: expected config.json"),
        (["bert"], r"no model could be loaded from .*bert"),
    ],
)
def test_models_that_cannot_be_shown_side_by_side_are_refused(folder, names, message):
    with pytest.raises(ValueError, match=message):
        load_models([str(folder / name) for name in names])


def test_different_numbers_of_items_or_names_are_refused(folder, tmp_path):
    smaller = shelf.counts()
    smaller = type(smaller).fit([[1, 2]], type(smaller.config)(num_items=2))
    smaller.catalogue = Catalogue(shelf.catalogue().table.slice(0, 2))
    smaller.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows 2 items and .*counts has 8: expected models"):
        load_models([str(folder / "counts"), str(tmp_path)])
    with pytest.raises(ValueError, match=r"names are a: expected 2 different ones"):
        load_models([str(folder / "counts"), str(folder / "first/sasrec")], ["a"])
    with pytest.raises(ValueError, match=r"names are a, a: expected 2 different ones"):
        load_models([str(folder / "counts"), str(folder / "first/sasrec")], ["a", "a"])
    with pytest.raises(FileNotFoundError, match=r"no-such-folder is not a folder"):
        load_models([str(folder / "no-such-folder")])
