"""Missing and broken files, and files of another model, are found before anything is published."""

import json
import shutil

import pytest

from hf_ilora import Catalogue
from hf_ilora.publishing import check_folder, push_folder
from tests.publishing.published_folders import catalogue, save_ilora_run, write_run


@pytest.fixture(scope="module")
def ilora_run(tmp_path_factory):
    return save_ilora_run(tmp_path_factory.mktemp("ilora") / "run")


def test_only_files_of_the_model_are_published(sasrec_run):
    (sasrec_run / "notes.txt").write_text("private")
    code = {path.name for path in sasrec_run.glob("*.py")}
    assert "modeling_sasrec.py" in code
    published = set(check_folder(sasrec_run).files)
    assert published == code | {"config.json", "model.safetensors", "items.parquet", "run.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "items.parquet", "run.json"])
def test_missing_file_is_named(sasrec_run, name):
    (sasrec_run / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        check_folder(sasrec_run)


def test_broken_and_foreign_files_are_refused(sasrec_run):
    weights = (sasrec_run / "model.safetensors").read_bytes()
    (sasrec_run / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors of .* is broken"):
        check_folder(sasrec_run)
    (sasrec_run / "model.safetensors").write_bytes(weights)
    Catalogue(catalogue().table.slice(0, 5)).to_parquet(sasrec_run / "items.parquet")
    with pytest.raises(ValueError, match="5 items: expected 30"):
        check_folder(sasrec_run)


def test_run_must_be_finished(sasrec_run, tmp_path):
    write_run(sasrec_run, status="running")
    with pytest.raises(ValueError, match="is running: expected a finished one"):
        check_folder(sasrec_run)
    (sasrec_run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="not the record of a run"):
        check_folder(sasrec_run)
    write_run(tmp_path)
    assert check_folder(sasrec_run, run_file=tmp_path / "run.json").run["seed"] == 7


def test_the_published_record_contains_no_paths_of_this_machine(sasrec_run):
    settings = {"SASRecModelArguments": {"data_dir": str(sasrec_run / "data"), "output_dir": "outputs/sasrec"}}
    write_run(sasrec_run, configuration=settings, command=["hf-ilora", "--data_dir=/home/alice/films"])
    checked = check_folder(sasrec_run)
    published = json.loads(checked.files["run.json"])
    assert published["configuration"]["SASRecModelArguments"] == {"data_dir": "data", "output_dir": "outputs/sasrec"}
    assert published["command"] == ["hf-ilora", "--data_dir=films"]
    assert published == checked.run | {name: published[name] for name in ("configuration", "command")}


def test_folder_without_card_is_refused(sasrec_run):
    with pytest.raises(ValueError, match=r"no README\.md"):
        push_folder(sasrec_run, "user/sasrec")


def test_adapter_must_name_a_language_model_that_others_have(ilora_run):
    with pytest.raises(ValueError, match=r"llm' as its language model, .*expected a name on the Hub"):
        check_folder(ilora_run)
    checked = check_folder(ilora_run, llm_name="user/llm", llm_revision="a" * 40)
    published = json.loads(checked.files["config.json"])
    saved = json.loads((ilora_run / "config.json").read_text())
    changed = {name for name in published if published[name] != saved[name]}
    assert changed == {"llm_name_or_path", "llm_revision", "text_config"} and set(published) == set(saved)
    assert str(ilora_run.parent) not in checked.files["config.json"].decode()
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(checked.files)


def test_adapter_needs_its_tokenizer(ilora_run, tmp_path):
    folder = shutil.copytree(ilora_run, tmp_path / "run")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        check_folder(folder, llm_name="user/llm")
