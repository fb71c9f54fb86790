"""The notebooks run, one after the other, on small data and few steps; the second one publishes."""

import json
import re

import pytest

from tests.paths import PROJECT

NOTEBOOKS = PROJECT / "docs" / "notebooks"
# Runs before the cells: a small data set instead of MovieLens, whose titles share words as film titles do.
PRELUDE = f"""
import os, sys
sys.path.insert(0, {str(PROJECT)!r})
os.chdir(sys.argv[1])
import hf_ilora
from tests.synthetic import cyclic_tables

def small_movielens(name):
    interactions, items = cyclic_tables(num_users=64, num_items=60)
    titles = [f"{{first}} {{second}}" for first in "Star Red Blue Old New Lost Last Dark".split()
              for second in "Wars House Return City Love Night Road Man".split()]
    return interactions, items.remove_columns("title").add_column("title", titles[:60])

hf_ilora.load_movielens = small_movielens
"""
SMALL = {"EPOCHS": "1", "TITLE_ENCODER": "'tf-idf'"}


def program(name, **values):
    """The cells of a notebook as one program, with other values of its parameters."""
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert [cell["metadata"].get("tags") for cell in cells].count(["parameters"]) == 1
    for parameter, value in (SMALL | values).items():
        sources[0], changes = re.subn(rf"^{parameter} = .*$", f"{parameter} = {value}", sources[0], flags=re.MULTILINE)
        assert changes == 1, f"{name} has no parameter {parameter}"
    return PRELUDE + "\n".join(sources)


@pytest.mark.slow
def test_both_notebooks_run_and_the_student_arrives_on_the_hub(client, tmp_path):
    printed = client.succeed(program("train_and_recommend.ipynb"), tmp_path)
    assert re.search(r"test_ndcg@10 +0\.\d{4}", printed) and "is like" in printed
    assert (tmp_path / "outputs/notebooks/recommendations.parquet").is_file()
    printed = client.succeed(program("distil_and_publish.ipynb", REPO_ID="'user/student'"), tmp_path)
    assert "name: MovieLens-100K" in printed
    files = client.hub.repositories["user/student"].history()[0].files
    assert {"README.md", "config.json", "items.parquet", "model.safetensors", "modeling_sasrec.py"} <= set(files)


def test_notebooks_are_stored_without_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None), (
                path.name
            )
