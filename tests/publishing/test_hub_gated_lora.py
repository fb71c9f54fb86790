"""The adapter of a gated LoRA is pushed to a Hub and loaded again."""

import pytest

from tests.hub_server import STRANGER
from tests.publishing.hub_programs import last_line

PUSH = """
import sys
from torch import nn
from hf_ilora import GatedLoraConfig, get_gated_lora_model
config = GatedLoraConfig(target_modules=["0"], base_model_name_or_path=sys.argv[2] or None)
model = get_gated_lora_model(nn.Sequential(nn.Linear(3, 2)), config)
nn.init.constant_(model.base_model[0].lora_B, float(sys.argv[3]))
print(model.push_to_hub(sys.argv[1], private=True).oid)
"""
LOAD = """
import sys
from torch import nn
from hf_ilora import GatedLoraModel
model = GatedLoraModel.from_pretrained(nn.Sequential(nn.Linear(3, 2)), sys.argv[1], **eval(sys.argv[2]))
print(model.base_model[0].lora_B[0, 0].item())
"""


def test_an_adapter_loads_by_revision_and_offline(client, tmp_path):
    first = last_line(client.succeed(PUSH, "user/adapter", "user/llm", 1))
    files = client.hub.repositories["user/adapter"].commit("main").files
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert "base_model: user/llm\n" in card and 'from_pretrained(model, "user/adapter")' in card
    client.succeed(PUSH, "user/adapter", "user/llm", 2)
    for revision, value in ((first, "1.0"), ("main", "2.0")):
        assert last_line(client.succeed(LOAD, "user/adapter", {"revision": revision})) == value
    requests = len(client.hub.requests)
    assert last_line(client.succeed(LOAD, "user/adapter", {"local_files_only": True})) == "2.0"
    assert len(client.hub.requests) == requests


@pytest.mark.parametrize("base_model", ["", "/home/me/llm"])
def test_a_base_model_of_this_machine_is_not_published(client, base_model):
    client.succeed(PUSH, "user/adapter", base_model, 1)
    files = client.hub.repositories["user/adapter"].commit("main").files
    assert b"base_model" not in files["README.md"]
    assert b'"base_model_name_or_path": null' in files["adapter_config.json"]
    assert not [name for name, content in files.items() if b"/home/me" in content]
    assert "was trained on" not in client.succeed(LOAD, "user/adapter", {})


def test_incomplete_and_private_adapters_are_refused(client, tmp_path):
    client.succeed(PUSH, "user/adapter", "", 1)
    cache = {"cache_dir": str(tmp_path)}
    assert "user/adapter" in client.fail(LOAD, "user/adapter", cache, token=STRANGER)
    repository = client.hub.repositories["user/adapter"]
    files = dict(repository.commit("main").files)
    del files["adapter_model.safetensors"]
    repository.add("main", "incomplete", files)
    refused = client.fail(LOAD, "user/adapter", cache)
    assert "ValueError: user/adapter has no adapter_model.safetensors: expected a folder or repository" in refused
