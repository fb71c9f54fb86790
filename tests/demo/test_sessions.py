"""The session of a visitor of the demo, without the page."""

import pytest

from hf_ilora import Catalogue
from hf_ilora.demo.rendering import answers_html, history_html
from hf_ilora.demo.sessions import MAX_NEW_ITEMS, Demo, Session
from hf_ilora.models.next_item.item_names import ItemNames
from tests.demo import shelf


def demo_without_new_items(*models) -> Demo:
    return Demo(shelf.shown(*models), top_k=3, title_encoder=None)


def test_a_history_is_built_from_what_is_offered():
    session = Session(demo_without_new_items(shelf.sasrec()))
    assert session.complete("lav soap t") == ["Lavender soap two", "Lavender soap three"]
    assert session.add("Lavender soap three") and session.history == [3]
    assert not session.add("Lavender soap three") and not session.add("Fountain pen grey")
    assert session.history == [3]
    assert "Lavender soap three" not in session.complete("lav")
    assert session.answers()[0].recommendations[0].item_id in (1, 2, 4)


def test_equal_titles_are_told_apart_by_their_raw_ids():
    session = Session(demo_without_new_items(shelf.sasrec()))
    assert session.complete("black") == ["Fountain pen black", "Fountain pen black (108)"]
    assert session.add("Fountain pen black (108)") and session.history == [8]


def test_a_new_item_is_found_shown_and_recommended_to_the_one_who_added_it(encoder):
    demo = Demo(shelf.shown(shelf.sasrec(), shelf.sasrec(seed=1), shelf.counts()), top_k=4, title_encoder=encoder)
    before = [each.model.state_dict()["head.weight"].clone() for each in demo.models[:2]]
    session, other = Session(demo), Session(demo)
    nearest = session.add_new_item("  Lavender   soap five ")
    assert set(nearest) <= {"Lavender soap one", "Lavender soap two", "Lavender soap three"}
    assert session.new_titles == ["Lavender soap five"] and session.new_items == [9]
    assert session.complete("five") == ["Lavender soap five"]
    session.history.append(1)
    first, second, counting = session.answers()
    for answer in (first, second):
        assert 9 in [each.item_id for each in answer.recommendations[:4]]
    assert 9 not in [each.item_id for each in counting.recommendations] and "without training" in counting.notes[0]
    shown = answers_html(session, session.answers())
    assert "Lavender soap five <strong>(new)</strong>" in shown
    # Nobody else sees it, and the models of all are as they were.
    assert other.complete("five") != ["Lavender soap five"] and other.new_items == []
    other.history.append(1)
    assert "soap five" not in answers_html(other, other.answers())
    for model, weight in zip(demo.models, before, strict=False):
        assert model.model.config.num_items == 8 and model.model.state_dict()["head.weight"].equal(weight)
    # It may be in the history, too, and others may follow.
    session.complete("five")
    assert session.add("Lavender soap five") and "five <strong>(new)</strong>" in history_html(session)
    session.add_new_item("Fountain pen white")
    assert session.new_items == [9, 10] and session.title(10) == "Fountain pen white"
    assert session.answers()[0].recommendations[0].item_id not in (9, 1)
    raw_ids = [each.model.catalogue.raw_ids([each.model.config.num_items]) for each in demo.models]
    assert raw_ids == [[108]] * 3


def test_invalid_new_items_are_refused(encoder, monkeypatch):
    demo = Demo(shelf.shown(shelf.sasrec()), title_encoder=encoder)
    session = Session(demo)
    for title, message in {
        "  ": "expected words of 1 to 200",
        "?!": "expected words of 1 to 200",
        "pen " * 60: "has 239 characters",
        "lavender SOAP one": "search for it",
    }.items():
        with pytest.raises(ValueError, match=message):
            session.add_new_item(title)
    assert session.new_titles == [] and session.answers()[0].recommendations
    session.new_titles = [f"title {number}" for number in range(MAX_NEW_ITEMS)]
    with pytest.raises(ValueError, match="there are 20 new items"):
        session.add_new_item("another one")
    with pytest.raises(ValueError, match="takes no new items"):
        Session(demo_without_new_items(shelf.sasrec())).add_new_item("Lavender soap five")


@pytest.mark.parametrize(
    ("raw_ids", "new_raw_ids"),
    [
        ([100 + item for item in range(1, 9)], [109, 110]),
        ([f"thing {item}" for item in range(8)], ["thing 0-new-1", "thing 0-new-2"]),
    ],
)
def test_new_items_get_new_raw_ids_of_the_same_type(encoder, raw_ids, new_raw_ids):
    model = shelf.sasrec()
    model.catalogue = Catalogue(model.catalogue.table.set_column(1, "raw_id", [raw_ids]))
    session = Session(Demo(shelf.shown(model), title_encoder=encoder))
    session.add_new_item("Lavender soap five")
    session.add_new_item("Lavender soap six")
    assert session._models[0].catalogue.raw_ids(session.new_items) == new_raw_ids


def test_a_demo_needs_an_encoder_that_knows_any_title(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path))
    models = shelf.shown(shelf.sasrec())
    with pytest.raises(ValueError, match=r"tf-idf depend on all titles.*--new_items false"):
        Demo(models, title_encoder="tf-idf")
    with pytest.raises(ValueError, match=r"titles cannot be encoded.*--new_items false"):
        Demo(models, title_encoder=str(tmp_path / "no-encoder"))
    with pytest.raises(ValueError, match="top_k is 0"):
        Demo(models, title_encoder=None, top_k=0)
    assert not Demo(shelf.shown(shelf.counts()), title_encoder=str(tmp_path / "no-encoder")).takes_new_items


def test_titles_cannot_inject_code_into_the_page():
    session = Session(demo_without_new_items(shelf.sasrec(), shelf.counts()))
    (label,) = session.complete("window broken")
    assert label == shelf.SCRIPT  # Gradio shows the text of a button as text
    assert session.add(label)
    session.history.append(1)
    for shown in (history_html(session), answers_html(session, session.answers())):
        assert "<script" not in shown and "${" not in shown and "{{" not in shown
    assert "&lt;script&gt;window.broken = 1&lt;/script&gt; &#36;&#123;1 + 1&#125;" in history_html(session)


def test_a_page_labels_everything_for_screen_readers(tmp_path):
    session = Session(demo_without_new_items(shelf.sasrec(), shelf.ilora(tmp_path)))
    session.history.append(1)
    shown = answers_html(session, session.answers())
    assert '<section aria-labelledby="model-1"><h2 id="model-1">model 2</h2>' in shown
    assert "<caption>Recommended next</caption>" in shown and '<th scope="col">Rank</th>' in shown
    assert '<th scope="row">Expert 3</th><td>' in shown and shown.count('class="bar" aria-hidden="true"') == 3
    assert shown.count(" ms</strong> per answer") == 2


def test_large_catalogues_are_completed_without_comparing_every_title(monkeypatch):
    """Typing must stay quick: similar titles are looked for only where no title matches."""
    session = Session(demo_without_new_items(shelf.sasrec()))

    def refuse(*arguments):
        raise AssertionError("titles are compared")

    monkeypatch.setattr(ItemNames, "closest", refuse)
    assert session.complete("lav")
    with pytest.raises(AssertionError, match="compared"):
        session.complete("lavendar")
