"""recipes/tune_ensemble.py from members to ensemble.json, in this process."""

import json

import pytest
import torch

from hf_ilora import SequenceDatasets, TransitionCountsConfig, TransitionCountsForNextItem
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.loading import load_recommender
from hf_ilora.training.ensembles import TunedEnsemble
from tests.recipe_runs import RecipeRun
from tests.synthetic import cyclic_sequences
from tests.tiny_ilora_parts import known_recommender
from tests.titles.encoder_folders import save_bert


@pytest.fixture(scope="module")
def parts(run_recipe, tmp_path_factory):
    """A data set, members, their labels and an encoder of titles."""
    folder = tmp_path_factory.mktemp("parts")
    sequences = cyclic_sequences(num_users=40)
    sequences.save(folder / "data")
    known_recommender(sequences).save_pretrained(folder / "sasrec")
    config = TransitionCountsConfig(num_items=30, max_length=2, backward_weight=0.0)
    counts = TransitionCountsForNextItem.fit(sequences["train"]["history"], config)
    counts.catalogue = sequences.catalogue
    counts.save_pretrained(folder / "counts")
    save_bert(folder / "encoder")
    label = {"data_dir": folder / "data", "teacher": folder / "counts", "top_k": 5}
    run_recipe("label_with_teacher", **label, output_dir=folder / "labels")
    run_recipe("label_with_teacher", **label, output_dir=folder / "validation_labels", split="validation")
    return folder


@pytest.fixture
def tune(run_recipe, parts, tmp_path, monkeypatch):
    """Runs the recipe with a data set and an output folder; what it encodes stays in the folder of the test."""
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))

    def run(**changes) -> RecipeRun:
        settings = {"data_dir": parts / "data", "output_dir": tmp_path / "ensemble", "grid": [0.5, 2.0]}
        settings |= {"members": [parts / "sasrec", "titles", parts / "counts"], "title_encoder": parts / "encoder"}
        return run_recipe("tune_ensemble", **settings | changes)

    return run


def test_weights_are_the_best_of_what_was_tried_on_validation(tune, parts, caplog):
    caplog.set_level("INFO")
    run = tune(teacher_temperature=2.0, title_decay=0.3)
    content = json.loads((run.output_dir / "ensemble.json").read_text())
    trials, record = content["trials"], run.record
    assert content["validation"]["ndcg@10"] == max(trial["ndcg@10"] for trial in trials if trial["weights"][0])
    assert content["validation"] == record["metrics"]["validation"] and trials == record["metrics"]["search"]["trials"]
    assert content["validation_users"] == 40 and record["status"] == "finished"
    tuned = TunedEnsemble.load(run.output_dir)
    assert (tuned.temperature, tuned.title_decay) == (2.0, 0.3)
    assert tuned.members[0] == str(parts / "sasrec") and str(parts / "counts") in tuned.members
    assert record["metrics"][f"teacher {parts / 'sasrec'}"] == tuned.origins[0]
    # A member alone is ranked as any model is.
    sequences = SequenceDatasets.load(parts / "data")
    for place, name in ((0, "sasrec"), (2, "counts")):
        ranks = rank_split(load_recommender(parts / name), sequences["validation"]).masked
        expected = ndcg_at(torch.from_numpy(ranks), 10).mean().item()
        assert trials[place]["weights"][place] == 1 and trials[place]["ndcg@10"] == pytest.approx(expected)
    assert "| all together |" in caplog.text and "| titles | " in caplog.text


def test_a_sample_of_users_is_drawn_by_seed(tune, tmp_path):
    settings = {"validation_users": 10, "max_rounds": 1}
    runs = {
        name: json.loads(
            (tune(**settings, seed=seed, output_dir=tmp_path / name).output_dir / "ensemble.json").read_text()
        )
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    }
    assert runs["one"] == runs["again"] and runs["one"]["validation_users"] == 10
    assert runs["one"]["trials"] != runs["other"]["trials"]


def test_labels_of_the_validation_split_take_part(tune, parts):
    members = [parts / "sasrec", parts / "validation_labels"]
    content = json.loads((tune(members=members).output_dir / "ensemble.json").read_text())
    # The labels name the best five of the counts: alone they find what these find among their five.
    assert content["trials"][1]["hit_ratio@10"] > 0.5
    assert content["origins"][1]["teacher"] == str(parts / "counts")
    with pytest.raises(
        ValueError, match=r"are about the train split: expected labels of the validation split; .*--split"
    ):
        tune(members=[parts / "sasrec", parts / "labels"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": ["titles"]}, "expected at least two different ones"),
        ({"members": ["{parts}/sasrec", "title"]}, "the teacher 'title' cannot be loaded: .* or the word titles"),
        ({"grid": [1, -1]}, r"the weight of grid\[1\] is -1.0: expected a finite number of at least 0"),
        ({"validation_users": 41}, "validation_users is 41: expected at most 40"),
        ({"validation_users": 0}, "validation_users is 0: expected at least 1"),
        ({"title_decay": 1.5}, "title_decay is 1.5: expected a number from 0 to 1"),
        ({"teacher_temperature": 0}, "teacher_temperature is 0.0: expected"),
        ({"seed": -1}, "seed is -1"),
        ({"title_encoder": "{parts}/data"}, "has no config.json"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_run_is_on_record(tune, parts, tmp_path, changes, message):
    def filled(value):
        if isinstance(value, list):
            return [filled(each) for each in value]
        return value.format(parts=parts) if isinstance(value, str) else value

    with pytest.raises(ValueError, match=message):
        tune(**{name: filled(value) for name, value in changes.items()})
    assert not (tmp_path / "ensemble" / "run.json").exists()


def test_members_of_another_catalogue_are_refused(tune, parts, tmp_path):
    known_recommender(cyclic_sequences(num_users=40, num_items=31)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other knows 31 items and the data set has 30"):
        tune(members=[parts / "sasrec", tmp_path / "other"])
