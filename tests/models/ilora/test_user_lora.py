"""LoRAs of single users: PEFT and a reader of its format give the model's own scores, from folders of any users."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ilora import user_lora
from hf_ilora.models.ilora import user_lora as module
from hf_ilora.models.ilora.embedded_llm import WHEEL_REQUIREMENT
from hf_ilora.models.ilora.gated_lora import gated_layers
from tests.models.ilora.ilora_fixtures import (
    ALPHA,
    CANDIDATES,
    EXPERTS,
    HISTORIES,
    RANK,
    TITLES,
    ilora_config,
    naive_gates,
    naive_prompt,
    real,
    text_ids,
    tiny_model,
    tokenizer,
)
from tests.tiny_language_models import ARCHITECTURES, ATTENTION, MLP, base_llm, llm_with_window, save_llm

FILES = {"adapter_config.json", "adapter_model.safetensors"}


@torch.no_grad()
def scores_of(llm, model, row: int) -> torch.Tensor:
    """(candidates,) log p(title and terminator | prompt) of an ordinary language model, a sequence at a time."""
    prompt = naive_prompt(model, base_of(model), real(HISTORIES[row]), real(CANDIDATES[row]))
    scores = []
    for item in CANDIDATES[row].tolist():
        title = torch.tensor([*text_ids(" " + TITLES[item - 1]), tokenizer().eos_token_id])
        embeddings = torch.cat([prompt, base_of(model).get_input_embeddings()(title)])
        log_p = llm(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
        scores.append(log_p[len(prompt) - 1 : -1].gather(1, title[:, None]).sum())
    return torch.stack(scores)


def base_of(model):
    return base_llm(model.config.text_config.model_type.removesuffix("_text"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_users_folder_loaded_by_peft_gives_the_models_own_scores(architecture, tmp_path):
    model = tiny_model(architecture, llm=llm_with_window(architecture))
    expected = model.score_candidates(HISTORIES, CANDIDATES)
    for row in (0, 1):
        model.materialize_lora(HISTORIES[row], output_dir=tmp_path / str(row))
    first, second = (PeftModel.from_pretrained(llm_with_window(architecture), tmp_path / row).eval() for row in "01")
    torch.testing.assert_close(scores_of(first, model, 0), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores_of(second, model, 1), expected[1], rtol=1e-4, atol=1e-4)
    assert (scores_of(second, model, 0) - expected[0]).abs().max() > 0.01  # the control: another user's


def test_keys_and_scale_are_those_that_engines_read(tmp_path):
    """A reader that knows alpha / r and the names of the layers alone."""
    model = tiny_model()
    model.materialize_lora(HISTORIES[0], tmp_path / "user", base_model="user/base")
    assert {path.name for path in (tmp_path / "user").iterdir()} == FILES
    config = json.loads((tmp_path / "user" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (RANK, ALPHA, "user/base")
    assert config["bias"] == "none" and config["target_modules"] == ATTENTION + MLP
    assert isinstance(config["lora_alpha"], int)
    weights = load_file(tmp_path / "user" / "adapter_model.safetensors")
    names = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
    keys = {f"base_model.model.model.layers.{i}.{name}.lora_{x}.weight" for i in (0, 1) for name in names for x in "AB"}
    assert set(weights) == keys
    llm = base_llm()
    with torch.no_grad():
        for key in keys:
            if key.endswith("lora_A.weight"):
                lora_a, lora_b = weights[key], weights[key.replace("lora_A", "lora_B")]
                assert len(lora_a) == lora_b.shape[1] == config["r"]
                layer = llm.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                layer.weight += config["lora_alpha"] / config["r"] * lora_b @ lora_a
    expected = model.score_candidates(HISTORIES[:1], CANDIDATES[:1])[0]
    torch.testing.assert_close(scores_of(llm, model, 0), expected, rtol=1e-4, atol=1e-4)


def test_adapter_config_is_what_peft_itself_would_write(tmp_path):
    model = tiny_model(lora_alpha=12.5)
    model.materialize_lora(HISTORIES[0], tmp_path, base_model="user/base")
    theirs = LoraConfig(
        r=RANK,
        lora_alpha=12.5,
        target_modules=ATTENTION + MLP,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path="user/base",
    )
    assert LoraConfig.from_pretrained(tmp_path).to_dict() == theirs.to_dict()


# --- the stack ---


def test_peft_with_the_stack_and_a_users_gates_gives_the_models_own_scores(tmp_path):
    model = tiny_model()
    model.stacked_lora(tmp_path)
    llm = PeftModel.from_pretrained(base_llm(), tmp_path).eval()
    gates = naive_gates(model, real(HISTORIES[0]))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_A" in name:
                parameter.view(EXPERTS, RANK // EXPERTS, -1).mul_(gates[:, None, None])
    expected = model.score_candidates(HISTORIES[:1], CANDIDATES[:1])[0]
    torch.testing.assert_close(scores_of(llm, model, 0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"router_type": "top_k", "router_top_k": 2}, {"num_experts": 1}])
def test_any_users_lora_is_made_of_the_stacks_folder(changes, tmp_path):
    model = tiny_model(**changes)
    model.stacked_lora(tmp_path / "stack", base_model="user/base")
    expert_gates = model.expert_gates(HISTORIES)
    for row, gates in enumerate(expert_gates.detach()):
        expected = model.materialize_lora(HISTORIES[row], tmp_path / "expected", base_model="user/base")
        for form in (expert_gates[row], gates.tolist(), gates.numpy(), gates.numpy().astype(np.float64)):
            state = user_lora(tmp_path / "stack", form, output_dir=tmp_path / "user")
            assert state.keys() == expected.keys()
            for name, value in state.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        for written in (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("user", "expected")):
            for name, value in written.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert (tmp_path / "user" / "adapter_config.json").read_bytes() == (
            tmp_path / "expected" / "adapter_config.json"
        ).read_bytes()


def test_results_are_copies_without_a_graph():
    model = tiny_model()
    states = model.materialize_lora(HISTORIES[0]), model.stacked_lora()
    for state in states:
        before = {name: tensor.clone() for name, tensor in state.items()}
        assert len(state) == 28
        with torch.no_grad():
            for layer in gated_layers(model.llm).values():
                layer.lora_A.add_(1)
                layer.lora_B.add_(1)
        for name, tensor in state.items():
            assert torch.equal(tensor, before[name]) and tensor.is_contiguous() and not tensor.requires_grad


def test_one_users_lora_takes_one_history():
    model = tiny_model()
    state = model.materialize_lora(HISTORIES[0])
    for name, value in model.materialize_lora(HISTORIES[:1].tolist()).items():
        assert torch.equal(value, state[name])
    for history, shape in ((HISTORIES, (3, 4)), (3, ()), (HISTORIES[None], (1, 3, 4))):
        with pytest.raises(ValueError, match=re.escape(f"history has shape {shape}: expected one")):
            model.materialize_lora(history)


# --- the base model ---


def test_peft_finds_the_base_model_by_its_name(tmp_path, monkeypatch, caplog):
    save_llm(tmp_path / "llm")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    model = tiny_model(llm=llm, llm_name_or_path="llm")  # a relative folder, as users write it
    model.materialize_lora(HISTORIES[0], "user")
    assert "base model" not in caplog.text
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "user").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids, histories=HISTORIES[:1]).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_model_on_the_hub_is_named_with_its_revision():
    config = ilora_config(llm_name_or_path="user/llm", llm_revision="0123abc")
    written = module.lora_config(config)
    assert (written["base_model_name_or_path"], written["revision"]) == ("user/llm", "0123abc")
    written = module.lora_config(config, base_model="user/other")
    assert (written["base_model_name_or_path"], written["revision"]) == ("user/other", None)


def test_the_wheels_model_is_named_by_its_folder(monkeypatch):
    monkeypatch.setattr(module, "embedded_llm_folder", lambda: Path("/cache/SmolLM2"))
    config = ilora_config(llm_name_or_path=WHEEL_REQUIREMENT)
    assert module.lora_config(config)["base_model_name_or_path"] == "/cache/SmolLM2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "names no base model, as the language model was not loaded by name: save_language_model(folder)"),
        ({"llm_name_or_path": "user/llm", "num_llm_layers": 3}, "the LoRA fits its first 3 layers alone"),
        ({"llm_name_or_path": "user/llm", "llm_gguf_file": "llm.gguf"}, "was read from its file llm.gguf"),
    ],
)
def test_a_base_model_that_others_cannot_load_by_name_is_warned_of(changes, message, caplog):
    with caplog.at_level(logging.WARNING):
        module.lora_config(ilora_config(**changes), base_model="somewhere")
        assert not caplog.records
        module.lora_config(ilora_config(**changes))
    assert message in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_saved_language_model_is_the_base_model_of_the_loras(architecture, tmp_path):
    """Also of a language model that is used in part, and whose embeddings are tied."""
    model = tiny_model(architecture, llm=llm_with_window(architecture), num_llm_layers=1)
    model.save_language_model(tmp_path / "base")
    model.materialize_lora(HISTORIES[0], tmp_path / "user", base_model=tmp_path / "base")
    expected = model.score_candidates(HISTORIES[:1], CANDIDATES[:1])[0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.config.num_hidden_layers == 1 and len(gated_layers(model.llm)) == 7
    llm = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "user").eval()
    torch.testing.assert_close(scores_of(llm, model, 0), expected, rtol=1e-4, atol=1e-4)
    assert (scores_of(base.eval(), model, 0) - expected).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(tmp_path / "base").get_vocab() == tokenizer().get_vocab()


def test_a_quantised_language_model_cannot_be_saved(tmp_path):
    model = tiny_model()
    layer = model.llm.get_submodule("model.layers.0.mlp.up_proj").base_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised \(model.layers.0.mlp.up_proj.base_layer.weight and 0 more\)"):
        model.save_language_model(tmp_path / "base")
    assert not (tmp_path / "base").exists()


# --- bad input ---


@pytest.fixture
def stack(tmp_path):
    tiny_model().stacked_lora(tmp_path / "stack", base_model="user/base")
    return tmp_path / "stack"


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([0.5, 0.5], "expert_gates have shape (2,): expected (4,), those of one user"),
        ([[0.25] * 4] * 2, "expert_gates have shape (2, 4): expected (4,)"),
        (1.0, "expert_gates have shape (): expected (4,)"),
        ([2.0, 1.0, 0.5, 0.1], "expected numbers of at least 0 that sum to 1"),
        ([1.5, -0.5, 0.0, 0.0], "expected numbers of at least 0 that sum to 1"),
        ([float("nan"), 0.5, 0.25, 0.25], "expected numbers of at least 0 that sum to 1"),
        ([[0.5, 0.5], [1.0]], "expected 4 numbers"),
        (["a", "b", "c", "d"], "expected 4 numbers"),
        (None, "expected 4 numbers"),
    ],
)
def test_invalid_gates_are_refused(stack, gates, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        user_lora(stack, gates, output_dir=tmp_path / "user")
    assert not (tmp_path / "user").exists()


def test_folders_that_are_no_stack_are_refused(stack, tmp_path):
    gates = [0.25] * 4
    with pytest.raises(ValueError, match=r"gone has no stack of experts that can be read .*stacked_lora"):
        user_lora(tmp_path / "gone", gates)
    user_lora(stack, gates, tmp_path / "user")
    with pytest.raises(ValueError, match="is not a stack of experts, but the LoRA of one user or of"):
        user_lora(tmp_path / "user", gates)
    weights = stack / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="has no stack of experts that can be read"):
        user_lora(stack, gates)
    save_file(load_file(tmp_path / "user" / "adapter_model.safetensors"), weights)  # without metadata
    with pytest.raises(ValueError, match="or of another program"):
        user_lora(stack, gates)
    weights.write_bytes(whole)
    (stack / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="has no stack of experts that can be read"):
        user_lora(stack, gates)


def test_folders_with_other_files_are_left_alone(stack, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    model = tiny_model()
    for write in (
        lambda folder: model.materialize_lora(HISTORIES[0], folder),
        lambda folder: model.stacked_lora(folder),
        lambda folder: user_lora(stack, [0.25] * 4, folder),
    ):
        with pytest.raises(ValueError, match=r"mine contains notes.txt: expected a new folder"):
            write(tmp_path / "mine")
        with pytest.raises(ValueError, match=r"file is a file: expected a folder"):
            write(tmp_path / "file")
        write(tmp_path / "again")
        write(tmp_path / "again")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
