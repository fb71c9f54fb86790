"""The handler in the folder of a model answers the requests of an endpoint: JSON in, JSON out."""

import datetime
import json
import subprocess
import sys

import pyarrow as pa
import pytest
from transformers import pipeline

from hf_ilora.models.next_item.handler import EndpointHandler
from tests.publishing.published_folders import sasrec, save_ilora_run

HISTORY = ["raw-3", "Title 1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sasrec")
    model = sasrec()
    columns = {"added": [datetime.date(2024, 1, 31)] * 30, "price": pa.array([float("nan")] * 30)}
    model.catalogue = model.catalogue.with_columns(columns)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(folder):
    return EndpointHandler(str(folder))


def test_answers_are_those_of_the_pipeline_as_json(endpoint, folder):
    pipe = pipeline("sequential-recommendation", model=str(folder))
    answers = endpoint({"inputs": HISTORY, "parameters": {"top_k": 2, "excluded_items": ["Title 2"]}})
    assert json.loads(json.dumps(answers, allow_nan=False)) == answers
    expected = pipe(HISTORY, top_k=2, excluded_items=["Title 2"])
    assert [each["score"] for each in answers] == [each["score"] for each in expected]
    assert [each["title"] for each in answers] == [each["title"] for each in expected]
    assert answers[0]["added"] == "2024-01-31" and answers[0]["price"] is None
    both = endpoint({"inputs": [HISTORY, {"history": ["raw-7"], "candidates": ["Title 3", "Title 4"]}]})
    assert [each["title"] for each in both[0]] == [each["title"] for each in pipe(HISTORY)]
    assert {each["title"] for each in both[1]} == {"Title 3", "Title 4"}


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({}, "the request has the keys none: expected inputs"),
        ([HISTORY], "the request has list: expected inputs"),
        ({"inputs": HISTORY, "params": {}}, "the request has the keys inputs, params"),
        ({"inputs": "Title 1"}, "inputs are 'Title 1': expected a list"),
        ({"inputs": None}, "inputs are None"),
        ({"inputs": HISTORY, "parameters": [3]}, r"parameters are \[3\]: expected a dictionary of top_k"),
        ({"inputs": HISTORY, "parameters": {"topk": 3}}, "parameters are {'topk': 3}: expected a dictionary of top_k"),
        ({"inputs": HISTORY, "parameters": {"num_workers": 64}}, "parameters are .*: expected a dictionary of top_k"),
        ({"inputs": HISTORY, "parameters": {"top_k": "3"}}, "top_k is '3'"),
        ({"inputs": ["Titel 1"]}, "closest are 'Title 1'"),
        ({"inputs": [["raw-1"], ["raw-99", "raw-98"]]}, "user 1 of the list: history: none of the 2 items is known"),
        ({"inputs": []}, "the history is empty"),
    ],
)
def test_wrong_requests_are_refused(endpoint, request_, error):
    with pytest.raises(ValueError, match=error):
        endpoint(request_)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        EndpointHandler(str(tmp_path))


# An endpoint imports handler.py by its path. The first folder's own code answers, the second one needs the package.
PROGRAM = """
import importlib.util, json, sys
answers = []
for folder in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "hf_ilora" not in sys.modules
    answers.append(module.EndpointHandler(folder)({"inputs": ["raw-3", "Title 1"]}))
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_handlers_work_by_themselves_where_the_package_is_installed(folder, tmp_path):
    ilora = save_ilora_run(tmp_path / "ilora")
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder, ilora], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for found, each in zip(json.loads(done.stdout.splitlines()[-1]), (folder, ilora), strict=True):
        expected = pipeline("sequential-recommendation", model=str(each), device="cpu")(HISTORY)
        assert [item["title"] for item in found] == [item["title"] for item in expected]
        scores = [item["score"] for item in expected]
        assert [item["score"] for item in found] == pytest.approx(scores, abs=1e-4)
