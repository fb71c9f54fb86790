"""The tables of the study on language: means, differences, groups and costs by hand."""

import numpy as np
import pyarrow as pa
import pytest

from experiments.language_report import (
    MeasuredSplit,
    RowReport,
    measured_split,
    plot,
    settings_text,
    table_lines,
    title_encoder,
)
from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.ranking import SplitRanks
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks


def saved(path, masked):
    ranks = SplitRanks(np.array(masked), np.array(masked) + 1, None)
    SavedRanks.from_ranks(pa.array(range(len(masked))), ranks, RanksSource("m", "f", "validation")).save(path)
    return path


def test_seeds_are_averaged_and_compared_with_the_reference_user_by_user(tmp_path):
    own = [saved(tmp_path / "1", [1, 3, 20]), saved(tmp_path / "2", [1, 20, 20])]
    reference = [saved(tmp_path / "3", [3, 20, 20])]
    measured = measured_split(own, reference, None, np.array([0, 7, 30]))
    assert measured.metrics["masked/ndcg@10"] == pytest.approx([1.5 / 3, 1 / 3])
    assert measured.metrics["masked/hit_ratio@10"] == pytest.approx([2 / 3, 1 / 3])
    assert measured.metrics["unmasked/ndcg@10"][1] == pytest.approx(1 / np.log2(3) / 3)
    assert measured.to_reference.difference.mean == pytest.approx((0.5 + 0.25) / 3)
    assert measured.to_twin is None
    assert measured.groups == {"0": (1, 1.0), "6-10": (1, 0.25), "more": (1, 0.0)}


def report(name, kind, value, test=None, comparison=None) -> RowReport:
    def split(mean):
        metrics = {f"{ranking}/{metric}": [mean, mean + 0.002] for ranking in ("masked", "unmasked")
                   for metric in ("ndcg@10", "hit_ratio@10")}  # fmt: skip
        return MeasuredSplit(metrics, {"more": (10, mean)}, comparison, None)

    splits = {"validation": split(value)} | ({} if test is None else {"test": split(test)})
    trials = [({}, 0.05), ({"teacher_weights": [1.0, 3.0]}, 0.06)] if kind == "student" else []
    latency, size = Latency(3.5, 4.0, 10, 1, "cpu"), ModelSize(1000, 4_000_000)
    return RowReport(name, name, kind, [1, 2], {}, trials, splits, 5.25, latency, size)


def test_tables_show_the_claimed_rows_on_the_test_split_alone():
    text = "\n".join(
        table_lines("main", [report("ids", "ids", 0.068, 0.053), report("control", "control", 0.06)], None)
    )
    assert "| ids | 2 | .0690 ± .0014 |" in text and "| ids | 2 | .0540 ± .0014 |" in text
    assert text.count("| control | 2 |") == 1
    assert "| ids | 5.2 | 3.50 / 4.00 | 1,000 | 4.00 |" in text
    student = "\n".join(table_lines("main", [report("a", "student", 0.07)], None))
    assert "| a | `--teacher_weights 1.0 3.0` | .0600 |" in student and "| a | as configured | .0500 |" in student


def test_settings_are_shown_as_options():
    assert settings_text({"a": 1, "b": [1.0, 2.0]}) == "`--a 1 --b 1.0 2.0`"


@pytest.mark.parametrize(
    ("settings", "encoder"),
    [
        ({"initial_items": "titles_and_cooccurrence"}, "mini"),
        ({"initial_items": "cooccurrence", "teacher": ["A", "titles"]}, "mini"),
        ({"title_neighbours": 0.2}, "mini"),
        ({"initial_items": "cooccurrence", "teacher": ["A"], "title_neighbours": 0.0}, None),
        ({}, None),
    ],
)
def test_a_run_pays_for_the_encoding_of_titles_if_it_reads_them(settings, encoder):
    record = {"configuration": {"TrainingArguments": {"title_encoder": "mini", **settings}}}
    assert title_encoder(record) == encoder


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [report(kind, kind, 0.05 + number / 100) for number, kind in enumerate(("baseline", "ids", "student"))]
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    plot(rows[:1], tmp_path / "one.png")
