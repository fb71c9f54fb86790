"""recipes/fit_counts.py from a data set to its two models."""

import json

import numpy as np
import pytest

from hf_ilora import SequenceDatasets
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.models.loading import load_recommender
from tests.synthetic import cyclic_sequences

SHORT_SEARCH = {"max_gap": [1, 3], "backward_weight": [0.5, 0], "max_length": [5, 1], "max_rounds": 2}


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=60)


@pytest.fixture(scope="module")
def fitted(run_recipe, sequences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    sequences.save(folder / "data")
    return run_recipe("fit_counts", data_dir=folder / "data", output_dir=folder / "counts", **SHORT_SEARCH)


def test_fitted_counts_are_those_of_the_best_trial_on_validation(fitted, sequences):
    record = fitted.record
    assert record["status"] == "finished" and record["data_fingerprint"] == sequences.fingerprint
    trials = record["metrics"]["search"]["trials"]
    assert len({json.dumps(trial, sort_keys=True) for trial in trials}) == len(trials) > 5
    best = max(trial["ndcg@10"] for trial in trials)
    model = load_recommender(fitted.output_dir / "transition_counts")
    settings = model.config.to_dict()
    (chosen,) = (trial for trial in trials if all(settings[name] == trial[name] for name in trial if name != "ndcg@10"))
    assert chosen["ndcg@10"] == best  # several trials may be as good
    ranks = rank_split(model, sequences["validation"]).masked
    ndcg = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean()
    assert best == pytest.approx(ndcg)
    assert record["metrics"]["validation_transition_counts"]["masked/ndcg@10"]["mean"] == pytest.approx(ndcg)
    # The walk goes forwards: counting it backwards as well can only hurt, and popularity knows nothing.
    assert chosen["backward_weight"] == 0
    assert ndcg > 2 * record["metrics"]["validation_popularity"]["masked/ndcg@10"]["mean"]


def test_fitting_reads_training_rows_only(fitted, sequences):
    popularity = load_recommender(fitted.output_dir / "popularity")
    expected = np.zeros(sequences.num_items + 1)
    for row in sequences["train"]:
        for item in [*row["history"], row["target"]]:
            expected[item] += 1
    assert popularity.item_counts.tolist() == expected.tolist()
    assert popularity.catalogue == sequences.catalogue


def test_data_without_candidates_can_be_fitted(run_recipe, sequences, tmp_path):
    splits = {name: split.select_columns(["user_id", "history", "target"]) for name, split in sequences.items()}
    SequenceDatasets(splits, sequences.catalogue, sequences.protocol | {"num_candidates": 0}).save(tmp_path / "data")
    run = run_recipe("fit_counts", data_dir=tmp_path / "data", output_dir=tmp_path / "counts", **SHORT_SEARCH)
    assert load_recommender(run.output_dir / "transition_counts").config.num_items == sequences.num_items
