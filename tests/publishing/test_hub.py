"""Models are pushed to a Hub and loaded again, with the real clients and a server with realistic faults."""

import json
import re
from pathlib import Path

import pytest
import torch

from hf_ilora import ILoraForRecommendation, SASRecForNextItem
from hf_ilora.models.ilora.language_models import load_language_model
from tests.hidden_package import run_without, run_without_hf_ilora
from tests.hub_server import READER, STRANGER, sha256
from tests.paths import RECIPES
from tests.publishing.hub_programs import PUSH_ILORA, PUSH_LLM, PUSH_MODEL, RECIPE, USE_CARD, last_line
from tests.publishing.published_folders import HISTORIES, catalogue, sasrec, save_ilora_run, write_results

MODEL_FILES = {"README.md", "config.json", "items.parquet", "model.safetensors"}

PUSH_FOLDER = """
import sys
from hf_ilora.publishing import push_folder, write_card
folder, repo_id, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
write_card(folder, repo_id, dataset_name="Data", license="mit")
print(push_folder(folder, repo_id, **arguments).oid)
"""
PUSH_RECIPE = RECIPES / "push_to_hub.py"
LOAD = """
import sys, torch
from hf_ilora import SASRecForNextItem
model = SASRecForNextItem.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
item_ids, _ = model.recommend(torch.tensor([[3, 1, 2]]), top_k=3)
print(model.catalogue.titles(item_ids[0]))
"""


def titles(model: SASRecForNextItem, history=(3, 1, 2), top_k=3) -> str:
    item_ids, _ = model.recommend(torch.tensor([history]), top_k=top_k)
    return str(model.catalogue.titles(item_ids[0]))


def code_files(folder) -> set[str]:
    """The names of the code files in the folder of a saved next-item model."""
    names = {path.name for path in folder.glob("*.py")}
    assert {"modeling_sasrec.py", "configuration_sasrec.py", "catalogue.py"} <= names
    return names


def test_published_run_recommends_titles_by_the_code_on_its_card(client, sasrec_run, tmp_path):
    results = write_results(tmp_path / "evaluation")
    options = ["--model", sasrec_run, "--repo_id", "user/sasrec", "--dataset_name", "Data", "--license", "mit"]
    options += ["--results", results, "--row", "SASRec"]
    before = {path: path.stat().st_mtime_ns for path in (sasrec_run, *sasrec_run.rglob("*"))}
    client.succeed(RECIPE, PUSH_RECIPE, *options, "--output_dir", tmp_path / "out")
    assert not client.hub.repositories
    expected = MODEL_FILES | code_files(sasrec_run) | {"run.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert {path: path.stat().st_mtime_ns for path in (sasrec_run, *sasrec_run.rglob("*"))} == before
    client.succeed(RECIPE, PUSH_RECIPE, *options)
    commits = client.hub.repositories["user/sasrec"].history()
    assert len(commits) == 2 and set(commits[0].files) == expected | {".gitattributes"}
    assert ".1155 [.1000, .1300]" in commits[0].files["README.md"].decode()
    printed = client.succeed(USE_CARD, "user/sasrec", token=None)
    assert last_line(printed) == titles(sasrec(), history=(1, 2), top_k=10)


def test_a_kept_card_is_published_unchanged_and_refuses_settings_of_a_new_card(client, sasrec_run, tmp_path):
    (sasrec_run / "README.md").write_text("# Mine")
    options = ["--model", sasrec_run, "--repo_id", "user/sasrec", "--dataset_name", "Data", "--license", "mit"]
    options += ["--keep_card", "true", "--output_dir", tmp_path / "out"]
    shown = ["--results", tmp_path / "evaluation", "--row", "SASRec", "--seeds_table", tmp_path / "seeds.json"]
    refused = client.fail(RECIPE, PUSH_RECIPE, *options, *shown)
    assert "keep_card is true and results, row, seeds_table given: expected no settings of a new card" in refused
    assert not (tmp_path / "out").exists()
    client.succeed(RECIPE, PUSH_RECIPE, *options)
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine"


def test_an_edited_card_on_the_hub_is_kept_and_one_of_metadata_alone_is_completed(client, sasrec_run):
    client.succeed(PUSH_FOLDER, sasrec_run, "user/edited", {})
    repository = client.hub.repositories["user/edited"]
    files = repository.commit("main").files
    repository.add("main", "edited", files | {"README.md": files["README.md"] + b"Mine."})
    refused = last_line(client.fail(PUSH_FOLDER, sasrec_run, "user/edited", {}))
    assert "ValueError: the card of user/edited was written or edited on the Hub" in refused
    assert repository.commit("main").title == "edited"
    (sasrec_run / "README.md").write_bytes(files["README.md"] + b"Mine, and fetched.")
    program = "import sys; from hf_ilora.publishing import push_folder; push_folder(sys.argv[1], 'user/edited')"
    client.succeed(program, sasrec_run)
    assert repository.commit("main").files["README.md"].endswith(b"Mine, and fetched.")
    # The Hub writes metadata into a repository that is made there.
    repository.add("main", "a licence", {"README.md": b"---\nlicense: cc0-1.0\n---\n"})
    client.succeed(PUSH_MODEL, sasrec_run, "user/edited", {})
    card = repository.commit("main").files["README.md"].decode()
    assert "license: cc0-1.0" in card and "## How to use it" in card


def test_a_pushed_model_object_includes_its_catalogue_and_is_sent_once(client, sasrec_run):
    first = client.succeed(PUSH_MODEL, sasrec_run, "user/object", {"tags": "mine"})
    repository = client.hub.repositories["user/object"]
    assert set(repository.commit("main").files) == MODEL_FILES | code_files(sasrec_run) | {".gitattributes"}
    assert "- mine" in repository.commit("main").files["README.md"].decode()
    assert not any(str(sasrec_run).encode() in content for content in repository.commit("main").files.values())
    again = client.succeed(PUSH_MODEL, sasrec_run, "user/object", {})
    assert last_line(again) == last_line(first) == repository.branches["main"]
    assert last_line(client.succeed(LOAD, "user/object", {}, token=None)) == titles(sasrec())


def test_saving_with_a_push_sends_the_files_it_writes_and_no_others(client, sasrec_run, tmp_path):
    (tmp_path / "object").mkdir()
    (tmp_path / "object" / "optimizer.pt").write_bytes(b"stays behind")
    program = (
        "import sys; from hf_ilora import SASRecForNextItem\n"
        "model = SASRecForNextItem.from_pretrained(sys.argv[1])\n"
        "model.save_pretrained(sys.argv[2], push_to_hub=True, commit_message='saved')\n"
    )
    client.succeed(program, sasrec_run, tmp_path / "object")
    commit = client.hub.repositories["user/object"].commit("main")
    assert commit.title == "saved"
    assert set(commit.files) == MODEL_FILES | code_files(sasrec_run) | {".gitattributes"}


USE_REMOTE_CODE = """
import json
from transformers import AutoConfig, AutoModel
repo_id, histories = sys.argv[1], eval(sys.argv[2])
for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained):
    try:
        load(repo_id, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("loaded without trust")
config = AutoConfig.from_pretrained(repo_id, trust_remote_code=True)
model = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules.user.remote."), type(config)
item_ids, scores = model.recommend(histories, top_k=3)
print(json.dumps([[model.catalogue.titles(row) for row in item_ids], scores.tolist()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("push", [PUSH_MODEL, PUSH_FOLDER], ids=["push_to_hub", "push_folder"])
def test_pushed_model_recommends_where_the_package_is_not_installed(client, sasrec_run, tmp_path, push):
    client.succeed(push, sasrec_run, "user/remote", {})
    program = USE_REMOTE_CODE + USE_CARD
    printed = run_without_hf_ilora(program, "user/remote", HISTORIES.tolist(), home=tmp_path, **client.environment)
    item_ids, scores = sasrec().recommend(HISTORIES, top_k=3)
    rows = [catalogue().titles(row) for row in item_ids]
    recommended, printed_titles = printed.splitlines()
    answered_rows, answered_scores = json.loads(recommended)
    assert answered_rows == rows
    torch.testing.assert_close(torch.tensor(answered_scores), scores)  # the number of threads differs there
    assert printed_titles == titles(sasrec(), history=(1, 2), top_k=10)


def test_branches_and_commits_keep_their_own_weights(client, sasrec_run, tmp_path):
    sasrec(seed=1).save_pretrained(tmp_path)
    first = last_line(client.succeed(PUSH_MODEL, sasrec_run, "user/branches", {}))
    client.succeed(PUSH_MODEL, tmp_path, "user/branches", {"revision": "v2"})
    assert client.hub.repositories["user/branches"].branches["main"] == first
    client.succeed(PUSH_MODEL, tmp_path, "user/branches", {})
    old, new = titles(sasrec()), titles(sasrec(seed=1))
    assert old != new
    for revision, expected in (("main", new), ("v2", new), (first, old)):
        assert last_line(client.succeed(LOAD, "user/branches", {"revision": revision})) == expected
    assert "v3 is not a valid git identifier" in client.fail(LOAD, "user/branches", {"revision": "v3"})


def test_private_repository_stays_private(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/private", {"private": True})
    assert client.hub.repositories["user/private"].private
    assert last_line(client.succeed(LOAD, "user/private", {})) == titles(sasrec())
    for token in (None, STRANGER):
        other_cache = {"cache_dir": f"{client.home}/{token}"}  # which does not know what the owner loaded
        assert "make sure to pass a token" in client.fail(LOAD, "user/private", other_cache, token=token)
    client.succeed(PUSH_MODEL, sasrec_run, "user/public", {})
    commits = len(client.hub.repositories["user/public"].commits)
    assert "is public: expected a private" in client.fail(PUSH_MODEL, sasrec_run, "user/public", {"private": True})
    assert len(client.hub.repositories["user/public"].commits) == commits


@pytest.mark.parametrize("token", [None, "hf_unknown", READER, STRANGER])
def test_tokens_that_may_not_write_are_refused(client, sasrec_run, token):
    error = client.fail(PUSH_MODEL, sasrec_run, "user/refused", {}, token=token)
    assert "PermissionError: the Hub does not let this token write to user/refused" in error
    assert token is None or token not in error
    assert not client.hub.repositories


@pytest.mark.parametrize(
    "fault",
    [
        ("POST", "/repos/create", 503),
        ("POST", "/validate-yaml", 503),
        ("POST", "/commit/", 503),
        ("POST", "/commit/", "drop"),
        ("POST", "/commit/", "drop_answer"),
        ("POST", "/repos/create", 429),
        ("POST", "/commit/", 429),
        ("PUT", "/large_files/", "drop_answer"),
    ],
)
def test_a_fault_of_the_hub_neither_loses_nor_doubles_the_commit(client, sasrec_run, fault):
    client.hub.faults.append(fault)
    oid = last_line(client.succeed(PUSH_FOLDER, sasrec_run, "user/faults", {}))
    assert not client.hub.faults
    repository = client.hub.repositories["user/faults"]
    assert [commit.oid for commit in repository.history()][:1] == [oid] and len(repository.commits) == 2


def test_addresses_in_messages_have_no_signatures(client, sasrec_run):
    client.hub.faults.append(("PUT", "/large_files/", 503))
    printed = client.succeed(PUSH_MODEL, sasrec_run, "user/signed", {})
    assert "503 thrown while requesting PUT http://" in printed and "Signature" not in printed
    client.hub.faults.append(("PUT", "/large_files/", 403))
    sasrec(seed=1).save_pretrained(sasrec_run)
    error = last_line(client.fail(PUSH_MODEL, sasrec_run, "user/signed", {}))
    assert "OSError: user/signed could not be sent" in error and "/large_files/" in error and "Signature" not in error


def test_a_hub_that_stays_down_is_an_error_and_pushing_again_completes(client, sasrec_run):
    client.hub.faults += [("POST", "/commit/", 503)] * 4
    error = client.fail(PUSH_FOLDER, sasrec_run, "user/down", {})
    assert "OSError: user/down could not be sent" in error and "push again" in error
    assert len(client.hub.repositories["user/down"].commits) == 1
    client.succeed(PUSH_FOLDER, sasrec_run, "user/down", {})
    assert client.hub.count("PUT", "/large_files/") == 2  # weights and catalogue, not sent a second time


def test_a_concurrent_commit_is_not_overwritten(client, sasrec_run):
    client.hub.faults.append(("POST", "/commit/", "overtaken"))
    assert "somebody else committed" in client.fail(PUSH_FOLDER, sasrec_run, "user/shared", {})
    repository = client.hub.repositories["user/shared"]
    assert repository.commit("main").title == "somebody else"
    stale = repository.history()[1].oid
    assert f"expected {stale}" in client.fail(PUSH_FOLDER, sasrec_run, "user/shared", {"parent_commit": stale})
    client.succeed(PUSH_FOLDER, sasrec_run, "user/shared", {"parent_commit": repository.branches["main"]})
    assert {"other.txt", "run.json"} <= set(repository.commit("main").files)


def test_a_download_that_breaks_off_resumes(client, sasrec_run):
    client.succeed(PUSH_MODEL, sasrec_run, "user/download", {})
    client.hub.faults.append(("GET", "/large_files/", "cut"))
    assert last_line(client.succeed(LOAD, "user/download", {})) == titles(sasrec())
    assert not client.hub.faults


@pytest.mark.parametrize("fault", [("HEAD", "/config.json", 429), ("GET", "/large_files/", 429)])
def test_a_rate_limit_while_loading_is_waited_out(client, sasrec_run, tmp_path, fault):
    client.succeed(PUSH_MODEL, sasrec_run, "user/limited", {})
    client.hub.faults.append(fault)
    assert last_line(client.succeed(LOAD, "user/limited", {"cache_dir": str(tmp_path)})) == titles(sasrec())
    assert not client.hub.faults


def test_a_reading_token_loads_a_private_model_and_a_wrong_token_is_refused(client, sasrec_run, tmp_path):
    client.succeed(PUSH_MODEL, sasrec_run, "user/private", {"private": True})
    refused = client.fail(LOAD, "user/private", {"cache_dir": str(tmp_path)}, token="hf_unknown")
    assert "user/private" in refused and "hf_unknown" not in refused
    assert last_line(client.succeed(LOAD, "user/private", {"cache_dir": str(tmp_path)}, token=READER)) == titles(
        sasrec()
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "ValueError: model.safetensors of user/tampered is broken"),
        ("items.parquet", "items.parquet"),
        ("config.json", "config.json"),
    ],
)
def test_a_tampered_file_is_reported_and_the_revision_before_loads(client, sasrec_run, name, message):
    sound = last_line(client.succeed(PUSH_MODEL, sasrec_run, "user/tampered", {}))
    repository = client.hub.repositories["user/tampered"]
    files = repository.commit("main").files
    cut = files[name][: len(files[name]) // 2]
    client.hub.large_files[sha256(cut)] = cut
    repository.add("main", "tampered", files | {name: cut})
    assert message in last_line(client.fail(LOAD, "user/tampered", {}))
    assert last_line(client.succeed(LOAD, "user/tampered", {"revision": sound})) == titles(sasrec())


@pytest.mark.parametrize("name", ["model.safetensors", "items.parquet"])
def test_a_download_with_another_content_of_the_same_size_is_reported(client, sasrec_run, tmp_path, name):
    """The Hub's client checks only sizes, so a file damaged on the way or on disk would load."""
    client.succeed(PUSH_MODEL, sasrec_run, "user/damaged", {})
    client.hub.faults.append(("GET", sha256((sasrec_run / name).read_bytes()), "flip"))
    error = last_line(client.fail(LOAD, "user/damaged", {"cache_dir": str(tmp_path)}))
    assert not client.hub.faults
    assert f"ValueError: {name} of user/damaged is broken: its sha256 is" in error
    Path(re.search("delete (.*) and load again", error)[1]).unlink()
    assert last_line(client.succeed(LOAD, "user/damaged", {"cache_dir": str(tmp_path)})) == titles(sasrec())


def test_pull_request_leaves_the_branch_as_it_is(client, sasrec_run, tmp_path):
    sasrec(seed=1).save_pretrained(tmp_path)
    first = last_line(client.succeed(PUSH_MODEL, sasrec_run, "user/proposal", {}))
    client.succeed(PUSH_MODEL, tmp_path, "user/proposal", {"create_pr": True})
    assert client.hub.repositories["user/proposal"].branches["main"] == first
    for revision, model in (("main", sasrec()), ("refs/pr/1", sasrec(seed=1))):
        assert last_line(client.succeed(LOAD, "user/proposal", {"revision": revision})) == titles(model)


def test_names_that_the_hub_does_not_accept_are_refused(client, sasrec_run):
    assert "HFValidationError" in client.fail(PUSH_MODEL, sasrec_run, "user/a/b", {})
    assert not client.hub.repositories


def test_adapter_and_its_language_model_come_from_the_hub(client, tmp_path):
    folder = save_ilora_run(tmp_path / "ilora")
    client.succeed(PUSH_LLM, tmp_path / "llm")
    commit = client.hub.repositories["user/llm"].branches["main"]
    options = ["--model", folder, "--repo_id", "user/ilora", "--dataset_name", "Data", "--license", "mit"]
    refused = client.fail(RECIPE, PUSH_RECIPE, *options)
    assert "expected a name on the Hub" in refused and "user/ilora" not in client.hub.repositories
    options += ["--llm_name", "user/llm", "--llm_revision", commit]
    client.succeed(RECIPE, PUSH_RECIPE, *options)
    files = client.hub.repositories["user/ilora"].commit("main").files
    assert {*MODEL_FILES, "run.json", "tokenizer.json"} <= set(files)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert "base_model: user/llm" in files["README.md"].decode()

    program = (
        "import sys, torch\nfrom hf_ilora import ILoraForRecommendation\n"
        "model = ILoraForRecommendation.from_pretrained('user/ilora')\n"
        "item_ids, distances = model.rank_items(torch.tensor(eval(sys.argv[1])), top_k=5)\n"
        "print([model.catalogue.titles(row) for row in item_ids], distances.tolist(), model.config.llm_revision)\n"
    )
    printed = client.succeed(program, HISTORIES.tolist(), token=None)
    llm, _, _ = load_language_model(tmp_path / "llm")
    local = ILoraForRecommendation.from_pretrained(folder, llm=llm)
    item_ids, distances = local.rank_items(HISTORIES, top_k=5)
    rows = [local.catalogue.titles(row) for row in item_ids]
    assert last_line(printed) == f"{rows} {distances.tolist()} {commit}"
    client.succeed(USE_CARD, "user/ilora", token=None)


@pytest.mark.slow
def test_the_lines_on_an_adapters_card_run_in_a_fresh_process(client, tmp_path):
    folder = save_ilora_run(tmp_path / "ilora")
    client.succeed(PUSH_LLM, tmp_path / "llm")
    options = ["--model", folder, "--repo_id", "user/ilora", "--dataset_name", "Data", "--license", "mit"]
    client.succeed(RECIPE, PUSH_RECIPE, *options, "--llm_name", "user/llm")
    printed = run_without([], USE_CARD, "user/ilora", home=tmp_path, **client.environment)
    llm, _, _ = load_language_model(tmp_path / "llm")
    model = ILoraForRecommendation.from_pretrained(folder, llm=llm)
    assert last_line(printed) == str(model.catalogue.titles(model.recommend([[1, 2]], top_k=10)[0][0]))


def test_a_pushed_adapter_object_includes_tokenizer_and_catalogue(client, tmp_path):
    folder = save_ilora_run(tmp_path / "ilora")
    assert "only this machine has" in client.fail(PUSH_ILORA, folder, tmp_path / "llm")
    assert not client.hub.repositories
    client.succeed(PUSH_ILORA, folder, "user/llm")
    files = client.hub.repositories["user/adapter"].commit("main").files
    assert {*MODEL_FILES, "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert "hf_ilora.ILoraForRecommendation" in files["README.md"].decode()
    assert [name for name in files if name.endswith(".py")] == ["handler.py"]  # an iLoRA needs the package
