"""Plots show names without folders, labels that do not overlap, plain numbers, and every seed."""

import numpy as np
import pytest

from hf_ilora.evaluation.plots import (
    KINDS,
    STYLES,
    CostPoint,
    data_name,
    logarithmic,
    new_figure,
    plot_quality_against_cost,
    short_names,
    spread,
    without_sources,
)
from tests.evaluation.drawn_texts import texts_of


def test_labels_keep_their_distance_and_their_order():
    heights = [0.05, 0.0501, 0.06, 0.0502, 0.0]
    places = spread(heights, 0.004)
    assert np.diff(np.sort(places)).min() > 0.99 * 0.004
    assert np.argsort(places).tolist() == np.argsort(heights).tolist()
    assert places[4] == pytest.approx(0.0)


def test_names_are_shortened_as_long_as_they_differ():
    assert short_names(["outputs/a/sasrec", "outputs/b/counts"]) == ["sasrec", "counts"]
    assert short_names(["outputs/a/sasrec", "outputs/b/sasrec"]) == ["a/sasrec", "b/sasrec"]
    assert short_names(["outputs/a/sasrec", "outputs/a/sasrec"]) == ["sasrec", "sasrec"]
    assert short_names(["SASRec, HR/NDCG", "user/name"]) == ["SASRec, HR/NDCG", "name"]
    assert short_names(["a/b", "b"]) == ["a/b", "b"]
    assert short_names([]) == []
    assert without_sources(["iLoRA (out/1)", "LoRA (out/2)", "iLoRA (out/3)"]) == [
        "iLoRA, run 1",
        "LoRA",
        "iLoRA, run 2",
    ]
    assert data_name("outputs/ml-100k/data") == "ml-100k" and data_name("/data/beauty/") == "beauty"
    assert data_name("data") == "data"


def test_styles_differ_in_colour_and_in_marker():
    for styles in (STYLES, [kind[1:] for kind in KINDS.values()]):
        assert all(len({style[place] for style in styles}) == len(styles) for place in (0, 1))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.2, 3000, ["0.1", "1", "10", "100", "1,000"]), (1.5, 20, ["2", "5", "10", "20"])],
)
def test_logarithmic_axes_have_plain_numbers(low, high, expected):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    figure, (axes,) = new_figure(6, 4)
    logarithmic(axes.xaxis, low, high)
    axes.plot([low, high], [0, 1])
    figure.draw_without_rendering()
    limits = axes.get_xlim()
    shown = [
        tick.get_text()
        for tick in axes.get_xticklabels(which="both")
        if tick.get_text() and limits[0] <= tick.get_position()[0] <= limits[1]
    ]
    assert shown == expected


def test_every_model_has_a_label_and_every_seed_a_mark(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    from matplotlib.axes import Axes

    points = [
        CostPoint("popularity", "baseline", 0.1, [0.02], (0.01, 0.03)),
        CostPoint("SASRec", "ids", 1.2, [0.05, 0.06, 0.055]),
        CostPoint("iLoRA", "language model", 900, [0.07], (0.05, 0.09)),
    ]
    drawn, plot = [], Axes.plot

    def noted(axes, xs, ys, *arguments, **settings):
        drawn.append((xs, ys))
        return plot(axes, xs, ys, *arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", noted)
        settings = {"cost": "time (ms)", "quality": "NDCG@10", "title": "a title"}
        texts = texts_of(lambda: plot_quality_against_cost(points, tmp_path / "plot.png", **settings))
    assert {"popularity", "SASRec", "iLoRA", "time (ms)", "a title", "language models"} <= texts
    assert "NDCG@10\nthin lines: 95% interval over users; thick lines and dashes: seeds" in texts
    assert ([1.2] * 3, [0.05, 0.06, 0.055]) in drawn
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_no_models_and_costs_of_zero_are_refused(tmp_path):
    for points, message in (([], "no models to draw"), ([CostPoint("a", "ids", 0, [1.0])], "the cost of a is 0")):
        with pytest.raises(ValueError, match=message):
            plot_quality_against_cost(points, tmp_path / "plot.png", cost="", quality="")
