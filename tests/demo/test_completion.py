"""Completion of what a visitor types to titles."""

import pytest

from hf_ilora import Catalogue
from hf_ilora.demo.completion import TitleSearch
from tests.demo import shelf


@pytest.fixture(scope="module")
def search() -> TitleSearch:
    return TitleSearch(shelf.catalogue())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lav", [2, 1, 3, 4]),  # the most popular first
        ("PEN FOUN", [5, 6, 7, 8]),  # words in any order and case
        ("bleu celeste", [6]),  # without accents
        ("t", [2, 3]),  # the beginnings of words, not their middle
        ("black", [5, 8]),
        ("", []),
        (" -!", []),
    ],
)
def test_titles_are_completed_by_the_beginnings_of_their_words(search, text, expected):
    assert search.complete(text, 8) == expected
    assert search.complete(text, 1) == expected[:1]


def test_a_title_that_begins_with_the_text_comes_before_a_popular_one():
    table = shelf.catalogue().table.set_column(2, "title", [["A pen", "Pen A", *shelf.TITLES[2:]]])
    assert TitleSearch(Catalogue(table)).complete("pen a", 2) == [2, 1]


def test_a_misspelt_title_is_answered_by_similar_ones(search):
    assert search.complete("lavendar sop two", 1) == [2]


def test_without_counts_the_order_is_that_of_the_catalogue():
    assert TitleSearch(shelf.catalogue(with_counts=False)).complete("lav", 8) == [1, 2, 3, 4]
