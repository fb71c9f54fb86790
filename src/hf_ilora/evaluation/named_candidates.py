"""LLaRA's rule of a valid answer: it names exactly one of its candidates."""

from collections.abc import Sequence

from hf_ilora.models.ilora.named_titles import named_titles


def named_candidates(answer: str, candidate_titles: Sequence[str], first_line_only: bool = False) -> list[int]:
    """The indices of the candidates whose title the answer contains, ignoring case.

    This is LLaRA's rule, `named_titles`.

    Args:
        answer: generated text.
        candidate_titles: (candidates,), none of them blank.
        first_line_only: as in `named_titles`.

    Raises:
        ValueError: for no candidates and for blank titles, which every text would contain.
    """
    if not len(candidate_titles):
        raise ValueError("there are no candidate titles: expected at least one")
    if not all(title.strip() for title in candidate_titles):
        raise ValueError(f"a title among {list(candidate_titles)} is blank: expected text; give the item a title")
    return named_titles(answer, candidate_titles, first_line_only)


def is_valid(answer: str, candidate_titles: Sequence[str], first_line_only: bool = False) -> bool:
    """Whether the answer names exactly one candidate; the arguments are those of `named_candidates`.

    Raises:
        ValueError: as `named_candidates`.
    """
    return len(named_candidates(answer, candidate_titles, first_line_only)) == 1
