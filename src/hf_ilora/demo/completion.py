"""Completes what a visitor types to titles of the catalogue."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.item_names import ItemNames

_APOSTROPHES = {ord("'"): None, 0x2019: None}


class TitleSearch:
    """Finds items by the beginnings of words in their titles, ignoring case, accents and punctuation.

    Args:
        catalogue: the items to search; its counts, if any, put popular items first.
    """

    def __init__(self, catalogue: Catalogue):
        counts = np.zeros(len(catalogue) + 1) if catalogue.counts is None else catalogue.counts
        self._titles = [folded(title) for title in catalogue.table["title"].to_pylist()]
        self._popular_first = (np.argsort(-counts[1:], kind="stable") + 1).tolist()
        self._names = ItemNames(catalogue)

    def complete(self, text: str, count: int) -> list[int]:
        """Return at most `count` items whose titles contain words that begin with those of `text`.

        Titles that begin with the text come first, then popular items. If no title matches, the items with the most
        similar titles are returned.
        """
        words = folded(text).split()
        found = [item for item in self._popular_first if words and begin_words(words, self._titles[item - 1])]
        beginning = " ".join(words)
        found.sort(key=lambda item: not self._titles[item - 1].startswith(beginning))
        return (found or self._names.closest(text, count))[:count]


def folded(text: str) -> str:
    """The words of a text in lower case, without accents and punctuation."""
    letters = unicodedata.normalize("NFKD", text.casefold()).translate(_APOSTROPHES)
    return " ".join(re.findall(r"\w+", "".join(each for each in letters if not unicodedata.combining(each))))


def begin_words(words: Sequence[str], title: str) -> bool:
    """Whether each of `words` begins a word of the folded title."""
    return all(f" {word}" in f" {title}" for word in words)


__all__ = ["TitleSearch", "begin_words", "folded"]
