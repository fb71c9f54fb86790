"""Weights on disk, or on the meta device, are refused where a model is built or loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from tests.models.ilora.ilora_fixtures import fresh_model, recommender, tiny_model, tokenizer
from tests.tiny_language_models import base_llm

# Of a whole model on disk, before accelerate 1.15 its own refusal comes first.
REFUSED = "of {} is on disk or on the device meta|offload the whole model to the disk"
IN_MEMORY = dict.fromkeys(
    ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    base_llm().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("module", ["model.embed_tokens", "model.layers.1", "lm_head"])
def test_a_language_model_with_a_module_on_disk_takes_no_adapter(llm_folder, tmp_path, module):
    llm = AutoModelForCausalLM.from_pretrained(
        llm_folder, device_map=IN_MEMORY | {module: "disk"}, offload_folder=tmp_path
    )
    names = set(dict(llm.named_modules()))
    with pytest.raises(ValueError, match=f"{module} of LlamaForCausalLM is on disk"):
        fresh_model(llm=llm)
    assert set(dict(llm.named_modules())) == names  # no layer was wrapped


def test_a_saved_ilora_is_not_loaded_around_a_module_on_disk(llm_folder, tmp_path):
    model = tiny_model()
    model.config.llm_name_or_path = str(llm_folder)
    model.save_pretrained(tmp_path)
    for device_map in (IN_MEMORY | {"model.layers.0": "disk"}, {"": "disk"}, "meta"):
        with pytest.raises(ValueError, match=REFUSED.format("LlamaForCausalLM")):
            ILoraForRecommendation.from_pretrained(tmp_path, device_map=device_map)
    loaded = ILoraForRecommendation.from_pretrained(tmp_path, device_map="cpu")
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_layers_that_are_cut_off_may_be_on_disk(llm_folder, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(
        llm_folder, device_map=IN_MEMORY | {"model.layers.1": "disk"}, offload_folder=tmp_path
    )
    assert fresh_model(llm=llm, num_llm_layers=1).config.text_config.num_hidden_layers == 1


def test_a_recommender_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        empty = SASRecForNextItem(recommender().config)
    with pytest.raises(ValueError, match=r"model\.item_embedding of SASRecForNextItem is on disk or on"):
        fresh_model(sasrec=empty)
    recommender().save_pretrained(tmp_path)
    for device_map in ({"": "disk"}, {"model": "cpu", "head": "disk"}, "meta"):
        with pytest.raises(ValueError, match=REFUSED.format("SASRecForNextItem")):
            SASRecForNextItem.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offloaded")
