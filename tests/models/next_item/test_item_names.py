"""Raw ids and titles become items; unknown and ambiguous names are errors, unless `fuzzy` takes the closest title."""

import logging

import numpy as np
import pyarrow as pa
import pytest
import torch

from hf_ilora import Catalogue
from hf_ilora.models.next_item.item_names import ItemNames

TITLES = ["Toy Story (1995)", "Toy Story 2 (1999)", "Heat (1995)", "1984", "Alien", "Alien", "Amélie"]


def names(raw_ids=(10, 20, 30, 40, 50, 60, 70), titles=TITLES) -> ItemNames:
    columns = {"item_id": range(1, len(titles) + 1), "raw_id": raw_ids, "title": titles}
    return ItemNames(Catalogue(pa.table({name: list(values) for name, values in columns.items()})))


def test_raw_ids_and_titles_are_found_in_every_form():
    known = names()
    expected = [3, 1, 7]
    for given in (
        [30, "Toy Story (1995)", "Amélie"],
        (30, 10, 70),
        np.array([30, 10, 70]),
        torch.tensor([30, 10, 70]),
        [{"title": "Heat (1995)"}, {"raw_id": 10}, {"raw_id": 70, "title": "Amélie", "item_id": 7, "score": -1.0}],
    ):
        assert known.item_ids(given) == expected
    assert known.item_ids([]) == []
    assert names(raw_ids=list("abcdefg")).item_ids(["c", "Toy Story (1995)"]) == [3, 1]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["Toy Storry (1995)"], r"closest are 'Toy Story \(1995\)' \(raw id 10\), .*fuzzy=True"),
        (["heat (1995)"], r"closest are 'Heat \(1995\)'"),  # case counts
        (["heat"], r"closest are 'Heat \(1995\)'"),
        (["Heat (1995)", 11, "zzz"], "2 of the 3 items are unknown: 11 is neither a raw id nor a title of the 7 items"),
        ([11, 12], "none of the 2 items is known: 11 is neither"),
        (["30"], "whose raw ids are numbers: expected 10 or 'Toy Story"),
        (["zzz"], "'zzz' is neither .*: expected names such as 10 or 'Toy Story"),
        ([" "], "' ' is neither"),
        (["Alien"], "'Alien' is the title of 2 items: expected the raw id of one, such as 50, 60"),
        ([{"title": "Alien"}], "is the title of 2 items"),
        ([{"name": "Alien"}], "in place of an item"),
        ([True], "found True in place of an item"),
        ([10.0], "found 10.0 in place of an item"),
        ([None], "found None in place of an item"),
        ([[10]], r"found \[10\] in place of an item"),
        ([{"raw_id": None}], "found None as a raw id"),
        ("Alien", "found 'Alien': expected a list"),
        ({"title": "Alien"}, "expected a list"),
        (10, "found 10: expected a list"),
    ],
)
def test_what_is_no_item_is_refused(given, error):
    with pytest.raises(ValueError, match=error):
        names().item_ids(given)


def test_unknown_raw_ids_that_are_strings_get_the_closest_raw_ids():
    known = names(raw_ids=[f"B00-{number}" for number in range(7)])
    with pytest.raises(ValueError, match="the closest raw ids are 'B00-"):
        known.item_ids(["B00-77"])
    with pytest.raises(ValueError, match=r"3 is neither .* whose raw ids are strings: expected 'B00-0'"):
        known.item_ids([3])


def test_a_text_that_is_a_raw_id_and_another_title_must_be_named():
    known = names(raw_ids=["1984", "b", "c", "d", "e", "f", "Amélie"])
    with pytest.raises(ValueError, match=r"pass \{'raw_id': '1984'\} or \{'title': '1984'\}"):
        known.item_ids(["1984"])
    assert known.item_ids([{"raw_id": "1984"}, {"title": "1984"}]) == [1, 4]
    assert known.item_ids(["Amélie"]) == [7]  # of one item


def test_close_titles_are_taken_when_asked_for_and_logged(caplog):
    with caplog.at_level(logging.WARNING):
        assert names().item_ids(["heat", 10, "toy  story 2", "amelie"], fuzzy=True) == [3, 1, 2, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "'heat' is taken for 'Heat (1995)' (raw id 30)",
        "'toy  story 2' is taken for 'Toy Story 2 (1999)' (raw id 20)",
        "'amelie' is taken for 'Amélie' (raw id 70)",
    ]
    caplog.clear()
    assert names().item_ids(["1984", 10], fuzzy=True) == [4, 1] and not caplog.records
    for given, error in ((["zzz"], "neither"), (["alien"], "title of 2 items"), ([11], "11 is neither")):
        with pytest.raises(ValueError, match=error):
            names().item_ids(given, fuzzy=True)


def test_in_a_large_catalogue_only_titles_that_begin_with_the_text_are_close(monkeypatch):
    known = names()
    monkeypatch.setattr("hf_ilora.models.next_item.item_names._MAX_TITLES_TO_COMPARE", 3)
    assert known.closest("toy story") == [1, 2]
    assert known.closest("tou story (1995)") == []
