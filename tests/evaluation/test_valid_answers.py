"""Generated answers are judged by LLaRA's rule, with counts worked out by hand."""

import pytest

from hf_ilora.evaluation.answer_metrics import ValidRatio
from hf_ilora.evaluation.named_candidates import is_valid, named_candidates
from hf_ilora.evaluation.statistics import wilson_interval
from hf_ilora.evaluation.valid_answers import judge_answers, judge_items

TITLES = ["Heat", "Alien", "Aliens", "Big"]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("Heat", [0]),
        ("I would say: HEAT!", [0]),
        ("Alien", [1]),
        ("Aliens", [1, 2]),  # the published rule counts a title within a title
        ("heat or big", [0, 3]),
        ("bigger", [3]),
        ("none of them", []),
        ("", []),
    ],
)
def test_candidates_are_named_by_their_whole_title_whatever_its_case(answer, named):
    assert named_candidates(answer, TITLES) == named
    assert is_valid(answer, TITLES) == (len(named) == 1)


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("Heat\nBig", [0]),
        ("\n  Big \nHeat\nAlien", [3]),
        ("heat or big\nBig", [0, 3]),
        ("My answer:\nHeat", []),
        ("Heat", [0]),
        (" \n ", []),
    ],
)
def test_the_first_line_alone_counts_if_asked(answer, named):
    assert named_candidates(answer, TITLES, first_line_only=True) == named
    assert is_valid(answer, TITLES, first_line_only=True) == (len(named) == 1)


def test_lines_after_the_first_change_the_quality():
    answers, titles, targets = ["Heat\nBig", "so:\nBig", "Alien\nHeat"], [TITLES] * 3, ["Heat", "Heat", "Big"]
    whole, first = (judge_answers(answers, titles, targets, first_line_only=only) for only in (False, True))
    assert (whole.num_valid, whole.num_correct) == (1, 0)  # "so:\nBig"
    assert (first.num_valid, first.num_correct) == (2, 1)  # "Heat" and "Alien"
    metrics = (ValidRatio(), ValidRatio(first_line_only=True))
    ratios = [metric.compute(predictions=answers, references=titles)["valid_ratio"] for metric in metrics]
    assert ratios == pytest.approx([1 / 3, 2 / 3])


def test_equal_titles_are_named_together():
    assert not is_valid("Heat", ["Heat", "Heat"])


def test_hit_ratio_divides_by_the_valid_and_by_all_answers():
    answers = ["Heat", "big", "Alien", "no idea", "heat, big"]
    quality = judge_answers(answers, [TITLES] * 5, ["Heat", "Alien", "Alien", "Heat", "Heat"])
    assert (quality.num_answers, quality.num_valid, quality.num_correct) == (5, 3, 2)
    assert quality.valid_ratio.mean == 3 / 5
    assert quality.hit_ratio_of_valid.mean == 2 / 3
    assert quality.hit_ratio_of_all.mean == 2 / 5
    for interval in (quality.valid_ratio, quality.hit_ratio_of_valid, quality.hit_ratio_of_all):
        assert 0 <= interval.low < interval.mean < interval.high <= 1


def test_answers_that_are_items_are_judged_as_items():
    quality = judge_items([3, 0, 5, 7], [3, 2, 4, 7])
    assert (quality.num_answers, quality.num_valid, quality.num_correct) == (4, 3, 2)
    assert quality.valid_ratio == wilson_interval(3, 4)
    assert quality.hit_ratio_of_valid == wilson_interval(2, 3) and quality.hit_ratio_of_all == wilson_interval(2, 4)
    with pytest.raises(ValueError, match="1 answers and 2 targets: expected one of each"):
        judge_items([1], [1, 2])


def test_without_a_valid_answer_there_is_no_share_of_the_valid():
    quality = judge_answers(["?", "!"], [TITLES] * 2, ["Heat", "Big"])
    assert quality.hit_ratio_of_valid is None
    assert quality.hit_ratio_of_all.mean == quality.valid_ratio.mean == 0


def test_mismatched_and_blank_inputs_are_refused():
    with pytest.raises(ValueError, match="2 answers, 1 lists of candidates and 2 targets"):
        judge_answers(["a", "b"], [TITLES], ["Heat", "Heat"])
    with pytest.raises(ValueError, match="no answers"):
        judge_answers([], [], [])
    with pytest.raises(ValueError, match="target 'Jaws' of user 0 is not among its candidates"):
        judge_answers(["a"], [TITLES], ["Jaws"])
    with pytest.raises(ValueError, match="is blank"):
        is_valid("a", ["Heat", " "])
    with pytest.raises(ValueError, match="no candidate titles"):
        is_valid("a", [])


def test_the_metric_is_the_share_of_valid_answers_in_one_call_or_in_batches():
    metric = ValidRatio()
    answers, titles = ["Heat", "I like films", "big heat"], [TITLES, TITLES[:2], TITLES]
    assert metric.compute(predictions=answers, references=titles) == {"valid_ratio": pytest.approx(1 / 3)}
    metric.add_batch(predictions=answers[:2], references=titles[:2])
    metric.add(prediction=answers[2], reference=titles[2])
    assert metric.compute() == {"valid_ratio": pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="of no answers"):
        metric.compute(predictions=[], references=[])
