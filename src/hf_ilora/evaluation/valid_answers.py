"""Judges generated answers: by LLaRA's rule, an answer is valid if it names exactly one of its candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_ilora.evaluation.named_candidates import named_candidates
from hf_ilora.evaluation.statistics import Interval, wilson_interval
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID


@dataclass(frozen=True)
class AnswerQuality:
    """The quality of generated answers.

    There are two definitions of HR@1 for generated answers, which differ if answers are invalid; both are given. The
    intervals are Wilson's, because these proportions come from few users and are often near 1: if all users agree, the
    bootstrap interval has width 0.

    Args:
        num_answers: number of answers.
        num_valid: number of answers that name exactly one candidate.
        num_correct: number of valid answers that name the target.
        valid_ratio: valid / all.
        hit_ratio_of_valid: correct / valid; None without a valid answer.
        hit_ratio_of_all: correct / all.
    """

    num_answers: int
    num_valid: int
    num_correct: int
    valid_ratio: Interval
    hit_ratio_of_valid: Interval | None
    hit_ratio_of_all: Interval


def judge_answers(
    answers: Sequence[str],
    candidate_titles: Sequence[Sequence[str]],
    target_titles: Sequence[str],
    first_line_only: bool = False,
) -> AnswerQuality:
    """ValidRatio, and HR@1 over the valid and over all answers, each with its 95% interval.

    Args:
        answers: (users,) generated texts.
        candidate_titles: (users, candidates) titles of each user's candidates, in any order.
        target_titles: (users,) titles of the targets, each among its candidates.
        first_line_only: as in `named_candidates`.

    Raises:
        ValueError: for no answers, lengths that differ, targets that are not among their candidates, and as
            `named_candidates`.

    Source: LLaRA (SIGIR 2024), section 4.1, and the program of iLoRA (NeurIPS 2024).
    """
    if not len(answers):
        raise ValueError("there are no answers: expected at least one user")
    if not len(answers) == len(candidate_titles) == len(target_titles):
        raise ValueError(
            f"there are {len(answers)} answers, {len(candidate_titles)} lists of candidates and {len(target_titles)} "
            "targets: expected one of each per user"
        )
    num_valid = num_correct = 0
    for user, (answer, titles, target) in enumerate(zip(answers, candidate_titles, target_titles, strict=True)):
        if target not in titles:
            raise ValueError(f"target {target!r} of user {user} is not among its candidates: expected one of {titles}")
        named = named_candidates(answer, titles, first_line_only)
        if len(named) == 1:
            num_valid += 1
            num_correct += titles[named[0]] == target
    return _quality(len(answers), num_valid, num_correct)


def judge_items(item_ids: Sequence[int], targets: Sequence[int]) -> AnswerQuality:
    """Judge answers that were constrained to titles of candidates and are therefore items; see `judge_answers`.

    Args:
        item_ids: (users,) item ids; 0 for an answer that is not an item and hence invalid.
        targets: (users,) item ids.

    Raises:
        ValueError: for no answers and lengths that differ.
    """
    if not len(item_ids) or len(item_ids) != len(targets):
        raise ValueError(f"there are {len(item_ids)} answers and {len(targets)} targets: expected one of each per user")
    num_valid = sum(item != PADDING_ITEM_ID for item in item_ids)
    num_correct = sum(item == target for item, target in zip(item_ids, targets, strict=True))
    return _quality(len(item_ids), num_valid, num_correct)


def _quality(num_answers: int, num_valid: int, num_correct: int) -> AnswerQuality:
    return AnswerQuality(
        num_answers=num_answers,
        num_valid=num_valid,
        num_correct=num_correct,
        valid_ratio=wilson_interval(num_valid, num_answers),
        hit_ratio_of_valid=wilson_interval(num_correct, num_valid) if num_valid else None,
        hit_ratio_of_all=wilson_interval(num_correct, num_answers),
    )
