"""Cards of data sets: their content, and which edits stay."""

from dataclasses import replace

import yaml

from hf_ilora.data.cards import card_to_publish
from hf_ilora.data.sources import SOURCES
from tests.data.three_users import sequences


def test_card_shows_protocol_counts_source_and_fingerprint(tmp_path):
    built = sequences()
    built.source = replace(SOURCES["ml-1m"], terms="<b>terms</b>")
    built.save(tmp_path / "d*ta")
    card = (tmp_path / "d*ta" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["license"] == "other" and metadata["license_name"] == "ml-1m"
    assert "# d\\*ta" in card and "&lt;b&gt;terms" in card and built.fingerprint in card
    assert "| train | 2 |" in card and "| protocol | leave_one_out |" in card
    assert "training has interactions of other users that are newer" in card
    assert str(tmp_path) not in card


def test_card_edited_by_hand_stays_and_takes_the_new_files():
    first, second = (sequences(**settings) for settings in ({}, {"max_history": 2}))
    old, new = (each._card("user/name", each.fingerprint) for each in (first, second))
    assert old != new and card_to_publish(new, None) == new and card_to_publish(new, old) == new
    edited = old.replace("# name", "# My data").replace("sequences\n  default", "mine\n  default")
    assert edited.count("mine") == 1
    kept = card_to_publish(new, edited)
    assert "# My data" in kept and "mine" not in kept and "config_name: sequences" in kept
