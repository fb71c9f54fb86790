"""The table and the plot that show quality beside latency and size."""

import csv
import dataclasses
import json

import pytest

from hf_ilora.evaluation.latency import Latency, ModelSize
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.report import ModelReport, ReportContext, markdown_table, plot_quality, write_table
from hf_ilora.evaluation.statistics import Interval, RunComparison, summarize_ranks
from tests.evaluation.drawn_texts import texts_of

CONTEXT = ReportContext("data", "0123456789abcdef0123", "test", 50, 40, 6, 10, 500, 0, compared="masked/ndcg@10")


@pytest.fixture
def reports(split, popularity, counts):
    comparison = RunComparison(0.1, 0.2, Interval(0.1, -0.01234, 0.2), 0.03, 50)
    return [
        ModelReport(
            name,
            model.config.model_type,
            summarize_ranks(rank_split(model, split), num_resamples=50),
            Latency(0.5 * number, 1.25, 300, 1, "cpu"),
            ModelSize(1234, 5_000_000),
            comparison if number > 1 else None,
        )
        for number, (name, model) in enumerate([("popular|first", popularity), ("counts", counts)], start=1)
    ]


def test_markdown_table_has_a_row_per_model_with_everything_side_by_side(reports):
    lines = markdown_table(reports, CONTEXT).splitlines()
    header, _, first, second = (line for line in lines if line.startswith("|"))
    assert header.count("|") == second.count("|") == 13
    assert first.startswith("| popular\\|first |")
    interval = reports[1].quality["masked/ndcg@10"]
    expected = f"| {interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}] |".replace("0.", ".")
    assert expected in second
    assert "| +.1000 [-.0123, +.2000], p=0.0300 | 1.00 / 1.25 | 1,234 | 5.00 |" in second
    assert "1 thread(s), cpu" in "\n".join(lines)


def test_a_second_table_groups_targets_by_their_counts(reports, tmp_path):
    write_table(reports, CONTEXT, tmp_path)
    assert "training count" not in (tmp_path / "results.md").read_text()
    few, many = Interval(0.25, 0.125, 0.5), Interval(0.75, 0.5, 1.0)
    metrics = ("masked/ndcg@10", "masked/hit_ratio@10")
    groups = {"0": dict.fromkeys((*metrics, "new_items/ndcg@10", "new_items/hit_ratio@10"), few)}
    groups["more"] = dict.fromkeys(metrics, many)
    reports = [dataclasses.replace(report, by_count=groups) for report in reports]
    context = dataclasses.replace(CONTEXT, users_by_count={"0": 7, "more": 1043}, num_new_items=1237)
    write_table(reports, context, tmp_path)
    lines = (tmp_path / "results.md").read_text().partition("## By the training count of the target")[2].splitlines()
    assert "ranked among the 1,237 new items" in "\n".join(lines)
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2] == f"| 0 | 7 | popular\\|first |{' .2500 [.1250, .5000] |' * 4}"
    assert rows[5] == f"| more | 1,043 | counts |{' .7500 [.5000, 1.0000] |' * 2}  |  |"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["models"][1]["by_count"]["more"]["masked/ndcg@10"]["high"] == 1
    with (tmp_path / "results.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["count 0: new_items/ndcg@10 low"] == "0.125"


def test_metrics_of_lists_have_tables_of_their_own(reports, tmp_path):
    write_table(reports, CONTEXT, tmp_path)
    assert "##" not in (tmp_path / "results.md").read_text()
    names = ("coverage", "gini", "novelty", "serendipity", *(f"decile_{decile}" for decile in range(1, 11)))
    lists = {f"{name}@10": Interval(number + 0.25, number, number + 0.5) for number, name in enumerate(names)}
    group = {"masked/ndcg@10": Interval(0.25, 0.125, 0.5), "novelty@10": Interval(3.5, 3, 4)}
    context = dataclasses.replace(CONTEXT, users_by_length={"1-5": 20, "more": 30})
    reports = [reports[0], dataclasses.replace(reports[1], lists=lists, by_length={"1-5": group})]
    write_table(reports, context, tmp_path)
    text = (tmp_path / "results.md").read_text()
    about, shares, lengths = (part.splitlines() for part in text.split("\n## ")[1:])
    rows = [line for line in about if line.startswith("|")]
    assert rows[0] == (
        "| model | users | MAP@10 | precision@10 | coverage | Gini | novelty, bits | most popular tenth | serendipity |"
    )
    precision = reports[1].quality["masked/precision@10"]
    assert rows[3].startswith("| counts | 50 | ") and f"{precision.mean:.4f}".removeprefix("0") in rows[3]
    assert rows[3].endswith("| 1.2500 [1.0000, 1.5000] | 2.2500 [2.0000, 2.5000] | 4.2500 [4.0000, 4.5000] | 3.2500 [3.0000, 3.5000] |")  # fmt: skip  # noqa: E501
    rows = [line for line in shares if line.startswith("|")]
    assert rows[0] == "| tenth of the items | counts |" and len(rows) == 12
    assert rows[2] == "| 1 (most popular) | 4.2500 [4.0000, 4.5000] |"
    rows = [line for line in lengths if line.startswith("|")]
    assert rows[0] == "| items | users | model | NDCG@10 | novelty, bits |"
    assert rows[3] == "| 1-5 | 20 | counts | .2500 [.1250, .5000] | 3.5000 [3.0000, 4.0000] |"
    assert rows[5] == "| more | 30 | counts |  |  |"
    content = json.loads((tmp_path / "results.json").read_text())["models"][1]
    assert content["lists"]["gini@10"]["low"] == 1 and content["by_length"]["1-5"]["novelty@10"]["high"] == 4
    with (tmp_path / "results.csv").open(newline="") as file:
        row = list(csv.DictReader(file))[1]
    assert (row["coverage@10"], row["length 1-5: novelty@10 high"]) == ("0.25", "4")


def test_users_with_several_relevant_items_are_judged_by_all_in_the_tables(reports, tmp_path):
    of_all = {f"relevant/{name}@10": Interval(0.5, 0.25, 0.75) for name in ("ndcg", "recall", "map", "precision")}
    reports = [dataclasses.replace(report, quality=report.quality | of_all) for report in reports]
    context = dataclasses.replace(CONTEXT, compared="relevant/ndcg@10", users_by_count={"1-5": 50})
    by_count = {"1-5": {f"relevant/{name}@10": Interval(0.5, 0.25, 0.75) for name in ("ndcg", "hit_ratio", "recall")}}
    reports[0] = dataclasses.replace(reports[0], by_count=by_count)
    write_table(reports, context, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| model | NDCG@10 of all | recall@10 of all | NDCG@10 masked |" in text
    assert "Users have several relevant items" in text and "relevant/ndcg@10 minus that of" in text
    assert "| count | users | model | NDCG@10 | HR@10 | recall@10 |" in text
    assert "judged by those of their relevant items that have the count" in text


def test_names_with_markup_cannot_change_the_page_the_terminal_or_the_plot(reports, tmp_path):
    name = "\x1b[2J\u202e<script>\n| row | [x](y) $a_ $b"
    reports = [dataclasses.replace(reports[0], name=name), reports[1]]
    context = dataclasses.replace(CONTEXT, data=name)
    write_table(reports, context, tmp_path)
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert len(markdown.splitlines()) == len(markdown_table(reports, CONTEXT).splitlines())
    assert "\\x1b\\[2J\\\\u202e&lt;script&gt;" in markdown
    for text in (markdown, (tmp_path / "results.csv").read_text(encoding="utf-8")):
        assert not set(text) & set("\x1b\u202e")
    assert "<script>" not in markdown
    plot_quality(reports, context, tmp_path / "plot.png")  # matplotlib would read a formula between the dollars


def test_csv_and_json_contain_the_same_numbers(reports, tmp_path):
    write_table(reports, CONTEXT, tmp_path / "new")
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["context"]["data_fingerprint"] == CONTEXT.data_fingerprint
    for row, model, report in zip(rows, content["models"], reports, strict=True):
        for name, interval in report.quality.items():
            assert float(row[name]) == model["quality"][name]["mean"] == interval.mean
            assert float(row[f"{name} low"]) == model["quality"][name]["low"] == interval.low
        assert float(row["latency p50_ms"]) == model["latency"]["p50_ms"] == report.latency.p50_ms
    assert (rows[0]["p_value"], rows[1]["p_value"]) == ("", "0.03")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["results.csv", "results.json", "results.md"]


def test_a_table_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no models to report on"):
        write_table([], CONTEXT, tmp_path)


def test_a_table_that_fails_leaves_the_earlier_one_whole(reports, tmp_path, monkeypatch):
    write_table(reports, CONTEXT, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("hf_ilora.evaluation.results.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_table(reports[:1], CONTEXT, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_plot_has_a_labelled_point_for_each_model_and_no_folders(reports, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra 'plot'")
    names = ["outputs/ml/counts/popularity", "outputs/ml/sasrec-1"]
    reports = [dataclasses.replace(report, name=name) for report, name in zip(reports, names, strict=True)]
    reports[0] = dataclasses.replace(reports[0], kind="baseline", num_users=20)
    context = dataclasses.replace(CONTEXT, data="outputs/ml/data")
    texts = texts_of(lambda: plot_quality(reports, context, tmp_path / "results.png"))
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
    assert {"popularity (20 users)", "sasrec-1", "ml, test split, 50 users", "baselines that count"} <= texts
    assert "NDCG@10 without seen items\nthin lines: 95% interval over users" in texts
    assert not any("outputs" in text or "/data" in text for text in texts)


def test_runs_of_one_name_are_one_point_with_their_spread_and_a_mean_in_the_table(reports, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra 'plot'")
    ndcg = [Interval(0.125, 0, 1), Interval(0.375, 0, 1)]
    reports = [
        dataclasses.replace(report, name="SASRec", source=f"seed-{seed}", quality={"masked/ndcg@10": ndcg[seed]})
        for seed, report in enumerate(reports)
    ]
    texts = texts_of(lambda: plot_quality(reports, CONTEXT, tmp_path / "results.png"))
    assert "NDCG@10 without seen items\nthick lines and dashes: seeds" in texts
    write_table(reports, CONTEXT, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| SASRec | 2 | .2500 ± .1768 |" in text
    seeds = json.loads((tmp_path / "results.json").read_text())["seeds"]
    assert seeds["SASRec"]["masked/ndcg@10"]["mean"] == 0.25
