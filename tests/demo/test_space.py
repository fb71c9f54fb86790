"""The folder of a Space contains everything that the Space needs, and nothing that only this machine has."""

import json
import re

import gradio
import pytest
import yaml
from packaging.requirements import Requirement

from hf_ilora.demo.shown_models import ShownModel, load_models
from hf_ilora.demo.space import write_space
from hf_ilora.models.loading import load_recommender
from tests.demo import shelf

SETTINGS = {"title": 'Soaps & "pens"', "top_k": 5, "title_encoder": "sentence-transformers/all-MiniLM-L6-v2"}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    shelf.sasrec().save_pretrained(folder / "sasrec")
    (folder / "sasrec" / "run.json").write_text('{"command": "/home/me/secret"}')
    (folder / "sasrec" / "training_args.bin").write_bytes(b"pickled")
    models = load_models([str(folder / "sasrec")])
    on_hub = ShownModel("counts", "user/counts", shelf.counts())
    write_space(folder / "space", [*models, on_hub], **SETTINGS)
    write_space(folder / "space", [*models, on_hub], **SETTINGS)  # an earlier one is replaced
    return folder / "space"


def test_the_metadata_of_the_card_tell_the_hub_how_to_run_the_space(space):
    front_matter = (space / "README.md").read_text().split("---\n")[1]
    settings = yaml.safe_load(front_matter)
    assert settings["sdk"] == "gradio" and settings["sdk_version"] == gradio.__version__
    assert settings["app_file"] == "app.py" and (space / "app.py").is_file()
    assert settings["title"] == SETTINGS["title"] and settings["models"] == ["user/counts"]
    assert re.fullmatch(r"3\.\d+", settings["python_version"])


def test_requirements_are_pinned_without_local_versions(space):
    lines = (space / "requirements.txt").read_text().splitlines()
    names = {Requirement(line).name for line in lines}
    assert {"torch", "transformers", "gradio"} <= names and "pytest" not in names and "hf_ilora" not in names
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_models_in_folders_are_copied_without_the_files_that_only_training_needs(space):
    settings = json.loads((space / "demo.json").read_text())
    assert settings["models"] == ["models/1", "user/counts"] and settings["names"] == ["sasrec", "counts"]
    assert {path.name for path in (space / "models" / "1").iterdir()} == {
        "config.json", "model.safetensors", "items.parquet",
    }  # fmt: skip
    copied, original = load_recommender(space / "models" / "1"), shelf.sasrec()
    assert copied.recommend([[1]], 3)[0].equal(original.recommend([[1]], 3)[0])
    assert (space / "hf_ilora" / "demo" / "page.py").is_file() and (space / "hf_ilora_cli").is_dir()
    assert not list(space.rglob("__pycache__"))


def test_language_models_and_encoders_that_only_this_machine_has_are_refused(tmp_path, encoder):
    shelf.ilora(tmp_path).save_pretrained(tmp_path / "ilora")
    with pytest.raises(ValueError, match=r"language model, which only this machine has"):
        write_space(tmp_path / "space", load_models([str(tmp_path / "ilora")]), **SETTINGS)
    with pytest.raises(ValueError, match=r"title_encoder .* is a folder on this machine: expected its name on the Hub"):
        write_space(tmp_path / "space", shelf.shown(shelf.counts()), **SETTINGS | {"title_encoder": encoder})
    assert not (tmp_path / "space").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="thesis"):
        write_space(tmp_path, [ShownModel("counts", "user/counts", shelf.counts())], **SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "years"
