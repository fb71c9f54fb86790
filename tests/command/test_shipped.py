"""Shipped files are found by name; an existing file comes first."""

import subprocess
import sys

import pytest

from hf_ilora.runs import prompt_path, read_config
from hf_ilora_cli.shipped import CONFIG, LAUNCH, PROMPT, RECIPE, closest_first, find_file, shipped_names
from tests.paths import PROJECT


@pytest.mark.parametrize(
    ("kind", "word", "path"),
    [
        (CONFIG, "quickstart", "recipes/configs/quickstart.yaml"),
        (CONFIG, "ml-100k/sasrec", "recipes/configs/ml-100k/sasrec.yaml"),
        (CONFIG, "ml-100k/sasrec.yaml", "recipes/configs/ml-100k/sasrec.yaml"),
        (PROMPT, "movies", "recipes/prompts/movies.txt"),
        (PROMPT, "movies.txt", "recipes/prompts/movies.txt"),
        (LAUNCH, "multi_cpu", "accelerate_configs/multi_cpu.yaml"),
        (RECIPE, "train_sasrec.py", "recipes/train_sasrec.py"),
    ],
)
def test_a_name_is_found_with_and_without_its_suffix(kind, word, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file(kind, word) == PROJECT / path


def test_an_existing_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "sasrec.yaml").write_text("a: 1\n")
    assert find_file(CONFIG, "ml-100k/sasrec.yaml").resolve() == tmp_path / "ml-100k" / "sasrec.yaml"
    assert find_file(CONFIG, "ml-100k/sasrec") == PROJECT / "recipes/configs/ml-100k/sasrec.yaml"


def test_an_unknown_name_lists_the_shipped_files_closest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        find_file(PROMPT, "movie.txt")
    assert str(error.value) == (
        f"prompt file movie.txt not found: expected a file (paths count from the working directory, {tmp_path}) or one "
        "of the shipped movies, artists, products"
    )


def test_names_are_also_compared_by_their_last_part():
    assert closest_first("sasrek", ["beauty/data", "ml-100k/ilora", "ml-100k/sasrec"])[0] == "ml-100k/sasrec"


def test_every_kind_has_files():
    assert "quickstart" in shipped_names(CONFIG) and "ml-100k/data" in shipped_names(CONFIG)
    assert set(shipped_names(PROMPT)) == {"movies", "artists", "products"}
    assert {"cpu", "ddp", "single_gpu", "zero3"} <= set(shipped_names(LAUNCH))


def test_the_settings_read_shipped_names(tmp_path, monkeypatch):
    from dataclasses import dataclass

    @dataclass
    class Arguments:
        movielens: str
        protocol: str
        min_user_interactions: int
        output_dir: str

    monkeypatch.chdir(tmp_path)
    assert read_config("ml-100k/data", (Arguments,))["movielens"] == "ml-100k"
    assert prompt_path("movies") == PROJECT / "recipes" / "prompts" / "movies.txt"


def test_finding_a_file_does_not_import_hf_ilora(tmp_path):
    code = "import sys\nfrom hf_ilora_cli.shipped import CONFIG, find_file\nprint(find_file(CONFIG, 'quickstart'))\n"
    code += "assert 'hf_ilora' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(PROJECT / "recipes" / "configs" / "quickstart.yaml")
