"""Ensembles of teachers by name, and ensemble.json."""

import json

import pytest

from hf_ilora.training.ensembles import ENSEMBLE_FILE, TunedEnsemble, check_member_weights

TUNED = TunedEnsemble(
    members=["a", "titles", "b"],
    origins=[{"fingerprint": "f"}, {"encoder": "e", "layer": None, "decay": 0.6}, {"fingerprint": "g"}],
    weights=[1.0, 3.0, 0.0],
    temperature=2.0,
    title_decay=0.6,
    title_encoder="some/encoder",
    title_layer=None,
)


def test_an_ensemble_is_read_as_it_was_saved_without_members_of_weight_zero(tmp_path):
    TUNED.save(tmp_path, {"validation_users": 3})
    found = TunedEnsemble.load(tmp_path)
    assert (found.members, found.weights, found.origins) == (["a", "titles"], [1.0, 3.0], TUNED.origins[:2])
    assert (found.temperature, found.title_decay, found.title_encoder) == (2.0, 0.6, "some/encoder")
    assert json.loads((tmp_path / ENSEMBLE_FILE).read_text())["validation_users"] == 3


def test_a_folder_without_an_ensemble_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"ensemble\.json does not exist: expected a folder that `hf-ilora tune"
    ):
        TunedEnsemble.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [1.0, -3.0, 0.0]}, "the weight of titles is -3.0: expected a finite number"),
        ({"weights": [1.0, 3.0]}, "there are 2 weights .* for the 3 teachers a, titles, b"),
        ({"weights": ["1", 3.0, 0.0]}, "is not a tuned ensemble"),
        ({"members": [1, "titles", "b"]}, "members is"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": None}, "is not a tuned ensemble"),
        ({"title_decay": 2}, "title_decay is 2"),
        ({"format_version": 7}, "has format_version 7: expected 1"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, changes, message):
    TUNED.save(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        TunedEnsemble.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / ENSEMBLE_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"is not a tuned ensemble .*: tune again with `hf-ilora tune-ensemble`"):
        TunedEnsemble.load(tmp_path)


def test_weights_that_mix_nothing_are_refused():
    with pytest.raises(ValueError, match="the weight of a is nan"):
        check_member_weights(["a"], [float("nan")])
    with pytest.raises(ValueError, match="all weights are 0: expected at least one positive"):
        check_member_weights(["a", "b"], [0.0, 0.0])
