"""recipes/plot_results.py: pictures from finished evaluations and runs."""

import json

import pytest

from tests.paths import PROJECT
from tests.trainer_logs import save_run

pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")

RESULTS = PROJECT / "docs" / "results"


@pytest.mark.parametrize("results", ["ml-100k-evaluation.json", "reference-lastfm-test.json"])
def test_a_published_evaluation_is_drawn_from_its_file(run_recipe, results, tmp_path, capsys):
    output = tmp_path / "drawn.png"
    run_recipe("plot_results", results=RESULTS / results, output=output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"wrote {output}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["drawn.png"]


def test_runs_are_drawn_as_learning_curves(run_recipe, tmp_path):
    runs = [save_run(tmp_path / f"seed-{seed}") for seed in (1, 2)]
    run_recipe("plot_results", runs=runs, names=["SASRec", "SASRec"], output=tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected either --results, an evaluation, or --runs"),
        ({"runs": "a", "results": "b"}, "expected either --results, an evaluation, or --runs"),
        ({"results": "b", "names": "c"}, "names apply to --runs only"),
        ({"runs": "a", "names": ["b", "c"]}, "for 1 models: expected one name for each"),
        ({"runs": "a", "output": "picture.doc"}, "the suffix of output is '.doc': expected one of .png, .pdf, .svg"),
        ({"results": "missing"}, "no results at missing"),
        ({"runs": "missing"}, "missing has no trainer_state.json"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run_recipe, settings, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_recipe("plot_results", **{"output": tmp_path / "picture.png"} | settings)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_evaluation_is_refused(run_recipe, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"context": {}}))
    with pytest.raises(ValueError, match="is not a table of an evaluation"):
        run_recipe("plot_results", results=tmp_path, output=tmp_path / "picture.png")
