"""Learning curves are read from the newest checkpoint and drawn with a line for each seed."""

import pytest

from hf_ilora.evaluation.learning_curves import LearningCurve, plot_learning_curves, read_curve
from tests.evaluation.drawn_texts import texts_of
from tests.trainer_logs import save_run


def test_the_log_of_the_newest_checkpoint_is_read(tmp_path):
    curve = read_curve(save_run(tmp_path), "SASRec")
    assert curve.loss == [(1, 6), (2, 5)]
    assert curve.validation == {"eval_ndcg@10": [(1, 0.1), (2, 0.2)], "eval_loss": [(1, 5.5), (2, 5)]}
    assert read_curve(tmp_path / "checkpoint-10", "SASRec").loss == [(1, 6)]
    (tmp_path / "checkpoint-20" / "trainer_state.json").rename(tmp_path / "trainer_state.json")  # of the end
    assert read_curve(tmp_path, "SASRec") == curve


def test_folders_without_a_log_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state.json, nor has any checkpoint-\* in it"):
        read_curve(tmp_path, "a")
    with pytest.raises(ValueError, match=r"the log of .* is empty"):
        read_curve(save_run(tmp_path / "empty", []), "a")
    (save_run(tmp_path / "broken") / "checkpoint-10" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="is not the state of a Trainer"):
        read_curve(tmp_path / "broken", "a")


def test_seeds_have_thin_lines_and_their_mean_is_the_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plot'")
    from matplotlib.axes import Axes

    first = LearningCurve("runs/SASRec", [(1, 6.0), (2, 5.0)], {"eval_ndcg@10": [(1, 0.1), (2, 0.2)]})
    second = LearningCurve("runs/SASRec", [(1, 4.0), (2, 3.0), (3, 2.0)], {"eval_ndcg@10": [(1, 0.3), (2, 0.4)]})
    other = LearningCurve("runs/iLoRA", [(1, 9.0)], {"eval_loss": [(1, 9.0)]})
    drawn, plot = [], Axes.plot

    def noted(axes, xs, ys, **settings):
        drawn.append([tuple(point) for point in zip(xs, ys, strict=True)])
        return plot(axes, xs, ys, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", noted)
        texts = texts_of(lambda: plot_learning_curves([first, other, second], tmp_path / "curves.png"))
    assert drawn[:3] == [first.loss, second.loss, [(1, 5.0), (2, 4.0)]] and drawn[3] == other.loss
    assert [(1, pytest.approx(0.2)), (2, pytest.approx(0.3))] in drawn
    assert {"SASRec", "iLoRA", "epoch", "training loss\nthin lines: seeds"} <= texts
    assert "NDCG@10 on validation, without seen items\nthin lines: seeds" in texts
    with pytest.raises(ValueError, match="no runs to draw"):
        plot_learning_curves([], tmp_path / "none.png")
