"""`pipeline("sequential-recommendation", model="user/name")` loads what is published, with hf_ilora and without it."""

import json

import pytest
from transformers import pipeline

from tests.hidden_package import run_without_hf_ilora
from tests.hub_server import sha256
from tests.publishing.hub_programs import PUSH_ILORA, PUSH_LLM, PUSH_MODEL, last_line
from tests.publishing.published_folders import sasrec, save_ilora_run

HISTORY = ["raw-3", "Title 1"]

PIPELINE = """
import json, sys
import hf_ilora
from transformers import pipeline
pipe = pipeline("sequential-recommendation", model=sys.argv[1], device="cpu", **eval(sys.argv[2]))
print(json.dumps(pipe(["raw-3", "Title 1"], top_k=3)))
"""


def answers(seed: int = 0) -> list[dict]:
    return pipeline("sequential-recommendation", model=sasrec(seed), device="cpu")(HISTORY, top_k=3)


def loaded(client, name: str, **arguments) -> list[dict]:
    return json.loads(last_line(client.succeed(PIPELINE, name, arguments)))


def test_commits_and_branches_recommend_by_their_own_weights(client, sasrec_run, tmp_path):
    sasrec(seed=1).save_pretrained(tmp_path)
    first = last_line(client.succeed(PUSH_MODEL, sasrec_run, "user/revisions", {}))
    client.succeed(PUSH_MODEL, tmp_path, "user/revisions", {})
    assert answers() != answers(seed=1)
    assert loaded(client, "user/revisions") == answers(seed=1)
    assert loaded(client, "user/revisions", revision=first) == answers()
    assert "v3 is not a valid git identifier" in client.fail(PIPELINE, "user/revisions", {"revision": "v3"})


def test_the_package_provides_the_pipeline_of_commits_that_lack_its_code(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/old", {})
    repository = client.hub.repositories["user/old"]
    files = dict(repository.commit("main").files)
    config = json.loads(files["config.json"])
    del config["custom_pipelines"], files["recommendation_pipeline.py"], files["handler.py"]
    repository.add("main", "as it was", files | {"config.json": json.dumps(config).encode()})
    assert loaded(client, "user/old") == answers()


def test_a_model_in_a_subfolder_loads_and_then_loads_from_the_cache_alone(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/folders", {})
    repository = client.hub.repositories["user/folders"]
    files = {f"models/first/{name}": content for name, content in repository.commit("main").files.items()}
    repository.add("main", "in a subfolder", files)
    settings = {"model_kwargs": {"subfolder": "models/first"}}
    assert loaded(client, "user/folders", **settings) == answers()
    requests = len(client.hub.requests)
    assert loaded(client, "user/folders", local_files_only=True, **settings) == answers()
    assert len(client.hub.requests) == requests
    assert "config.json" in client.fail(PIPELINE, "user/folders", {})


def test_a_renamed_repository_is_found_by_its_old_name(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/before", {})
    client.hub.rename("user/before", "user/after")
    for name in ("user/before", "user/after"):
        assert loaded(client, name) == answers()


def test_corrupt_weights_on_the_hub_are_reported(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/corrupt", {})
    repository = client.hub.repositories["user/corrupt"]
    files = dict(repository.commit("main").files)
    files["model.safetensors"] = files["model.safetensors"][:-10]
    client.hub.large_files[sha256(files["model.safetensors"])] = files["model.safetensors"]
    repository.add("main", "damaged", files)
    assert "model.safetensors of user/corrupt is broken" in client.fail(PIPELINE, "user/corrupt", {})


def test_an_adapter_from_the_hub_has_a_pipeline(client, tmp_path):
    folder = save_ilora_run(tmp_path / "ilora")
    client.succeed(PUSH_LLM, tmp_path / "llm")
    client.succeed(PUSH_ILORA, folder, "user/llm")
    found = loaded(client, "user/adapter")
    expected = pipeline("sequential-recommendation", model=str(folder), device="cpu")(HISTORY, top_k=3)
    assert [each["title"] for each in found] == [each["title"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-4)


# Loads with the code in the repository, with and without naming the task, and what the endpoint would load.
ALONE = """
import importlib.util, json
from huggingface_hub import snapshot_download
from transformers import pipeline

history, task = ["raw-3", "Title 1"], "sequential-recommendation"
try:
    pipeline(task, model="user/alone", device="cpu", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without trust")
pipe = pipeline(task, model="user/alone", device="cpu", trust_remote_code=True)
inferred = pipeline(model="user/alone", device="cpu", trust_remote_code=True)
for part in (pipe, pipe.model, inferred, inferred.model):
    assert type(part).__module__.startswith("transformers_modules.user.alone."), type(part)
many = list(pipe((user for user in [history, history]), top_k=3, batch_size=2))
assert many[0] == many[1]
pipe.save_pretrained("again")

def handler(folder):
    spec = importlib.util.spec_from_file_location("handler", f"{folder}/handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(folder)

endpoint = handler(snapshot_download("user/alone"))
errors = []
for request in ({"inputs": ["Titel 1"]}, {"inputs": [["raw-1"], ["raw-99"]]}):
    try:
        endpoint(request)
    except ValueError as error:
        errors.append(str(error))
try:
    handler(sys.argv[1])
except ModuleNotFoundError as error:
    errors.append(str(error))
found = [pipe(history, top_k=3), inferred(history, top_k=3), many[0]]
found += [pipeline(task, model="again", device="cpu", trust_remote_code=True)(history, top_k=3)]
found += [endpoint({"inputs": history, "parameters": {"top_k": 3}}), endpoint({"inputs": [history]})[0][:3]]
print(json.dumps([found, errors]))
"""


@pytest.mark.slow
def test_a_repository_alone_recommends_by_pipeline_and_endpoint(client, sasrec_run, tmp_path):
    client.succeed(PUSH_MODEL, sasrec_run, "user/alone", {})
    ilora = save_ilora_run(tmp_path / "ilora")
    found, errors = json.loads(run_without_hf_ilora(ALONE, ilora, home=tmp_path, **client.environment).splitlines()[-1])
    expected = answers()
    for recommended in found:
        assert [each | {"score": None} for each in recommended] == [each | {"score": None} for each in expected]
        scores = [each["score"] for each in expected]
        assert [each["score"] for each in recommended] == pytest.approx(scores, abs=1e-5)
    assert "'Titel 1' is neither" in errors[0] and "closest are 'Title 1'" in errors[0]
    assert errors[1].startswith("user 1 of the list: history: 'raw-99' is neither")
    assert "contains an iLoRA, which needs the package hf_ilora" in errors[2]
