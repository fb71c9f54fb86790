"""Folders without a whole recommender, and recommenders of other items, are refused before anything is measured."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from hf_ilora import Catalogue, ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem
from hf_ilora.evaluation.latency import model_size
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.loading import check_catalogue, load_recommender, model_folder
from tests.tiny_ilora_parts import save_llm

RAW_IDS = np.arange(101, 109)


def catalogue(raw_ids):
    return Catalogue(pa.table({"item_id": range(1, 9), "raw_id": raw_ids, "title": [str(raw) for raw in raw_ids]}))


def sasrec():
    torch.manual_seed(0)
    model = SASRecForNextItem(SASRecConfig(num_items=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    model.catalogue = catalogue(RAW_IDS)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    sasrec().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_recommender_is_loaded_ready_to_score(folder):
    model = load_recommender(str(folder))
    assert type(model) is SASRecForNextItem and not model.training
    history = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(history).logits, sasrec()(history).logits)
    assert check_catalogue(model, "model", 8, RAW_IDS)


def test_what_is_no_model_folder_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder and could not be downloaded"):
        model_folder(str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match="is not a folder and could not be downloaded"):
        model_folder("someone/something")  # tests are offline
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"contains nothing: expected config.json and \*.safetensors"):
        model_folder(str(tmp_path / "empty"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected config\.json and"):
        model_folder(str(folder))


def test_a_model_of_another_kind_is_refused(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"contains a BertModel \(model_type bert\): expected a recommender"):
        load_recommender(tmp_path)


@pytest.mark.parametrize("change", ["missing", "foreign", "truncated", "other size", "unknown type"])
def test_weights_that_do_not_fit_are_refused(folder, change):
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    if change == "missing":
        del tensors["model.final_norm.weight"]
    elif change == "foreign":
        tensors["model.extra.weight"] = torch.zeros(2)
    elif change == "other size":
        settings["num_items"] = 9
    elif change == "unknown type":
        settings["model_type"] = "never_heard_of"
    save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(settings))
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no model could be loaded from"):
        load_recommender(folder)


def test_code_in_a_folder_is_not_run(folder):
    (folder / "modeling_sasrec.py").write_text("raise RuntimeError('this ran')")
    (folder / "configuration_sasrec.py").write_text("raise RuntimeError('this ran')")
    model = load_recommender(folder)
    assert type(model) is SASRecForNextItem and check_catalogue(model, "model", 8, RAW_IDS)


def test_catalogues_that_differ_are_refused():
    model = sasrec()
    with pytest.raises(ValueError, match="knows 8 items and the data set has 7"):
        check_catalogue(model, "mine", 7, RAW_IDS[:7])
    other = RAW_IDS.copy()
    other[2] = 999
    with pytest.raises(
        ValueError, match=r"1 of 8 items of mine have other raw ids .*item 3 is 103 in mine and 999 in the data set"
    ):
        check_catalogue(model, "mine", 8, other)
    with pytest.raises(ValueError, match="raw ids of type int64 and the data set of type object"):
        check_catalogue(model, "mine", 8, RAW_IDS.astype(str).astype(object))
    model.catalogue = None
    assert not check_catalogue(model, "mine", 8, other)


def test_catalogues_of_names_compare():
    model = sasrec()
    names = np.array([f"B00{raw}" for raw in RAW_IDS], dtype=object)
    model.catalogue = catalogue(names)
    assert check_catalogue(model, "mine", 8, names)
    with pytest.raises(ValueError, match="7 of 8 items"):
        check_catalogue(model, "mine", 8, np.append(names[:1], names[:7]))


def save_ilora(folder, item_head):
    save_llm(folder / "llm")
    recommender = sasrec()
    llm, tokenizer, _ = load_language_model(folder / "llm")
    config = ILoraConfig(rank=4, num_experts=2, router_type="linear", item_head=item_head)
    parts = (llm, recommender, tokenizer, recommender.catalogue, config)
    ILoraForRecommendation.from_base(*parts, untrained_recommender=True).save_pretrained(folder / "ilora")
    return folder / "ilora"


def test_an_ilora_with_an_item_head_is_a_recommender_like_others(tmp_path):
    folder = save_ilora(tmp_path, "residual")
    model = load_recommender(str(folder))
    histories = torch.tensor([[1, 2, 3]])
    item_ids, scores = model.recommend(histories, top_k=2)
    ranked, distances = model.rank_items(histories, top_k=2)
    assert torch.equal(item_ids, ranked) and torch.equal(scores, -distances)
    # its size is that of the language model too, which lies elsewhere
    assert model_size(model, folder).num_bytes > sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_an_ilora_without_item_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without item head, which cannot rank the catalogue"):
        load_recommender(save_ilora(tmp_path, "none"))
