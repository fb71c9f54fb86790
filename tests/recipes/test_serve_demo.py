"""recipes/serve_demo.py: what it refuses before it serves, and what it hands to the page and to a Space."""

import sys

import pytest

from hf_ilora.demo import page
from hf_ilora.runs import parse_arguments
from hf_ilora.runs.recipe_files import load_recipe
from tests.demo import shelf
from tests.paths import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shelf.sasrec().save_pretrained(folder / "sasrec")
    shelf.counts().save_pretrained(folder / "counts")
    return folder


@pytest.fixture
def served(monkeypatch):
    """The arguments of each call of `serve`, which serves nothing here."""
    calls = []
    monkeypatch.setattr(page, "serve", lambda *arguments: calls.append(arguments))
    return calls


def test_the_first_words_are_the_models():
    (arguments,) = parse_arguments(
        load_recipe(RECIPES / "serve_demo.py").ARGUMENTS, ["a", "b", "--names", "x", "y", "--port", "80"]
    )
    assert arguments.models == ["a", "b"] and arguments.names == ["x", "y"] and arguments.port == 80


def test_the_page_listens_on_this_machine_alone(folder, served, run_recipe):
    run_recipe("serve_demo", models=[folder / "sasrec", folder / "counts"], new_items=False, title="Soaps", port=7999)
    ((blocks, host, port),) = served
    assert (host, port) == ("127.0.0.1", 7999)
    assert blocks.title == "Soaps" and not blocks.analytics_enabled
    names = [component["props"].get("label") for component in blocks.get_config_file()["components"]]
    assert "Search titles" in names


def test_mistakes_end_before_anything_is_served(folder, served, run_recipe, monkeypatch):
    with pytest.raises(ValueError, match="required: --models"):
        run_recipe("serve_demo")
    with pytest.raises(FileNotFoundError, match="no-such-folder is not a folder"):
        run_recipe("serve_demo", models=[folder / "sasrec", folder / "no-such-folder"])
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'the demo needs gradio.*pip install "hf_ilora\[demo\]"'):
        run_recipe("serve_demo", models=folder / "sasrec")
    assert served == []


def test_a_space_is_written_instead(folder, served, run_recipe, tmp_path, capsys):
    run_recipe("serve_demo", models=folder / "sasrec", new_items=False, space_dir=tmp_path / "space")
    assert (tmp_path / "space" / "app.py").is_file() and served == []
    assert "only if the licence of the data allows" in capsys.readouterr().out
