"""The published rule that finds the items that a free answer names."""

from collections.abc import Sequence


def named_titles(answer: str, titles: Sequence[str], first_line_only: bool = False) -> list[int]:
    """The indices of the titles that the answer contains, ignoring case.

    An answer that contains a title also contains every title that is part of it ("Alien" in "Aliens") or equal to it.
    It then names several.

    Args:
        answer: generated text.
        titles: any number of titles, none of them blank.
        first_line_only: ignore the text after the first line that is not blank, as the programs of LLaRA and iLoRA do.

    Source: LLaRA (SIGIR 2024), section 4.1, and the program of iLoRA (NeurIPS 2024).
    """
    if first_line_only:
        answer = answer.strip().split("\n", 1)[0]
    folded = answer.lower()
    return [place for place, title in enumerate(titles) if title.lower() in folded]


__all__ = ["named_titles"]
