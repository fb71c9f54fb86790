"""The table of mixtures of scores in the study on language."""

from experiments.language_mixtures import MixtureReport, mixture_lines
from hf_ilora.evaluation.statistics import Interval, RunComparison


def report(name, weights, alone, ndcg, **comparisons) -> MixtureReport:
    given = {"to_reference": None, "to_twin": None} | comparisons
    return MixtureReport(name, name.title(), weights, alone, 2000, ndcg, 0.13, **given)


def test_a_mixture_is_shown_with_its_weights_its_last_member_and_its_comparisons():
    comparison = RunComparison(0.08, 0.081, Interval(0.001, -0.0005, 0.0025), 0.2, 2000)
    lines = mixture_lines(
        [
            report("without", {"start": 1.0, "titles": 3.0}, {"start": 0.07, "titles": 0.05}, 0.08),
            report("with", {"start": 1.0, "ilora_labels": 0.5}, {"start": 0.07, "ilora_labels": 0.0654}, 0.081,
                   to_reference=comparison),
        ],
        "without",
    )  # fmt: skip
    header, without, with_it = lines[1], lines[3], lines[4]
    assert "difference to Without" in header and header.count("|") == without.count("|")
    assert without == "| Without | 2,000 | start 1, titles 3 | .0800 | .1300 | .0500 |  |  |"
    assert with_it.startswith("| With | 2,000 | start 1, ilora_labels 0.5 | .0810 | .1300 | .0654 | +.0010 [")
