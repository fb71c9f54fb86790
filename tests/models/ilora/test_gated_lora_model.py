"""Gated LoRA on any model: equal to iLoRA's layer, with gates from outside, saved alone and merged."""

import copy
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_ilora import GatedLoraConfig, GatedLoraLinear, GatedLoraModel, get_gated_lora_model
from hf_ilora.models.ilora import gated_lora_model
from hf_ilora.models.ilora.gated_lora import add_gated_lora, gated_layers
from tests.models.ilora.gate_gradients import GATES, OTHER_GATES, check_each_forward_used_its_own_gates, gradients
from tests.models.ilora.ilora_fixtures import tiny_model
from tests.paths import PROJECT
from tests.tiny_language_models import ATTENTION, MLP, base_llm, save_llm

RANK, EXPERTS, ALPHA = 8, 4, 16.0
IDS = torch.randint(1, 200, (3, 7), generator=torch.Generator().manual_seed(5))
FEATURES = torch.randn(3, 5, generator=torch.Generator().manual_seed(7))


def config(**changes) -> GatedLoraConfig:
    settings = {"rank": RANK, "num_experts": EXPERTS, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    return GatedLoraConfig(**settings | changes)


def randomised(model, seed: int = 1):
    """The model with a B that is not zero in every gated layer."""
    generator = torch.Generator().manual_seed(seed)
    for layer in gated_layers(model).values():
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def gated_llm(**changes) -> GatedLoraModel:
    return randomised(get_gated_lora_model(base_llm(), config(**changes)))


def mlp() -> nn.Sequential:
    set_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def gated_mlp() -> GatedLoraModel:
    return randomised(get_gated_lora_model(mlp(), config(target_modules="all-linear")))


def bert() -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    set_seed(3)
    return BertForSequenceClassification(BertConfig(vocab_size=200, initializer_range=0.3, **sizes)).eval()


def naive_layer(layer: GatedLoraLinear, inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """One row and one expert after the other."""
    size, rows = RANK // EXPERTS, []
    for row, row_gates in zip(inputs, gates, strict=True):
        output = F.linear(row, layer.base_layer.weight, layer.base_layer.bias)
        for expert, gate in enumerate(row_gates):
            part = slice(expert * size, (expert + 1) * size)
            output = output + ALPHA / size * gate * (row @ layer.lora_A[part].t() @ layer.lora_B[:, part].t())
        rows.append(output)
    return torch.stack(rows)


# --- the same as iLoRA ---


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_language_model_computes_bit_for_bit_what_ilora_computes(architecture):
    ours, theirs = base_llm(architecture), base_llm(architecture)
    set_seed(4)
    add_gated_lora(theirs, ATTENTION + MLP, RANK, EXPERTS, ALPHA, 0.3)
    set_seed(4)
    model = get_gated_lora_model(ours, config(target_modules=ATTENTION + MLP, lora_dropout=0.3))
    fresh = {name: value for name, value in theirs.state_dict().items() if "lora_" in name}
    assert fresh.keys() == model.adapter_state().keys()
    assert all(torch.equal(value, fresh[name]) for name, value in model.adapter_state().items())

    randomised(model), randomised(theirs)
    outputs = [each.eval()(IDS, expert_gates=GATES).logits for each in (model, theirs)]
    assert torch.equal(*outputs)
    assert (outputs[0] - base_llm(architecture)(IDS).logits).abs().max() > 0.01
    found = []
    for each in (model, theirs):
        found.append(
            {name.removeprefix("base_model."): value for name, value in gradients(each.train(), IDS, GATES).items()}
        )
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) and value.any() for name, value in found[0].items())


def test_the_adapter_of_an_ilora_fits_its_language_model():
    ilora = tiny_model()
    model = get_gated_lora_model(base_llm(), config())
    adapter = {name.removeprefix("llm."): value for name, value in ilora.state_dict().items() if "lora_" in name}
    for name, value in model.adapter_state().items():
        value.copy_(adapter.pop(name))
    assert not adapter
    with torch.no_grad():
        assert torch.equal(model(IDS, expert_gates=GATES).logits, ilora.llm(IDS, expert_gates=GATES).logits)


# --- any model ---


def test_a_model_of_torch_equals_naive_experts():
    model = gated_mlp()
    first, second = gated_layers(model).values()
    hidden = naive_layer(first, FEATURES, GATES).tanh()
    torch.testing.assert_close(model(FEATURES, expert_gates=GATES), naive_layer(second, hidden, GATES))
    image = torch.randn(3, 2, 4, 5)  # (batch, height, width, channels)
    torch.testing.assert_close(first.forward(image, GATES), naive_layer(first, image, GATES))
    assert torch.equal(
        get_gated_lora_model(mlp(), config(target_modules=["0"]))(FEATURES, expert_gates=GATES), mlp()(FEATURES)
    )


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [(r"bert\.encoder\..*attention.*(query|value)", 4), (["query", "attention.output.dense"], 4), ("all-linear", 14)],
)
def test_each_row_of_an_encoder_is_the_model_with_its_gates_merged(target_modules, count):
    model = randomised(get_gated_lora_model(bert(), config(target_modules=target_modules)))
    assert len(gated_layers(model)) == count
    with torch.no_grad():
        logits = model(IDS, expert_gates=GATES).logits
        for row, gates in enumerate(GATES):
            merged = copy.deepcopy(model).merge_and_unload(gates)
            assert not gated_layers(merged) and merged.state_dict().keys() == bert().state_dict().keys()
            torch.testing.assert_close(merged(IDS[row : row + 1]).logits[0], logits[row], rtol=1e-4, atol=1e-5)
        assert (logits - bert()(IDS).logits).abs().max() > 0.01


def test_all_linear_leaves_out_output_embeddings_and_layers_that_are_not_called():
    llm = get_gated_lora_model(base_llm(), config(target_modules="all-linear"))
    assert len(gated_layers(llm)) == 14 and isinstance(llm.base_model.lm_head, nn.Linear)
    mixed = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 12), nn.MultiheadAttention(8, 2), nn.Linear(8, 8)])
    assert list(gated_layers(get_gated_lora_model(mixed, config(target_modules="all-linear")))) == ["base_model.2"]


def test_a_layer_with_two_names_stays_one_layer(tmp_path):
    def shared():
        model = mlp()
        return nn.ModuleDict({"first": model[0], "again": model[0]})

    model = randomised(get_gated_lora_model(shared(), config(target_modules=["first", "again"])))
    assert model.base_model["first"] is model.base_model["again"]
    assert list(model.adapter_state()) == ["first.lora_A", "first.lora_B"]
    model.save_pretrained(tmp_path / "adapter")
    loaded = GatedLoraModel.from_pretrained(shared(), tmp_path / "adapter").base_model["again"]
    assert torch.equal(loaded.forward(FEATURES, GATES), model.base_model["first"].forward(FEATURES, GATES))
    assert isinstance(model.unload()["again"], nn.Linear)


def test_only_the_adapter_is_trained_and_listed(capsys):
    model = gated_mlp()
    names = [f"base_model.{layer}.lora_{matrix}" for layer in (0, 2) for matrix in "AB"]
    assert list(model.trainable_parameters()) == names
    model.print_trainable_parameters()
    # (5 + 6) * 8 + (6 + 4) * 8 trained; 5 * 6 + 6 + 6 * 4 + 4 frozen
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == "trainable params: 168 || all params: 232 || trainable%: 72.4138"


# --- gates ---


def test_gates_of_a_context_apply_inside_it_only():
    model = gated_mlp()
    expected, other = model(FEATURES, expert_gates=GATES), model(FEATURES, expert_gates=OTHER_GATES)
    with model.use_gates(GATES):
        assert torch.equal(model(FEATURES), expected)
        with model.use_gates(OTHER_GATES):
            assert torch.equal(model.base_model(FEATURES), other)
        assert torch.equal(model(FEATURES, expert_gates=OTHER_GATES), other)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(FEATURES[:, :2], expert_gates=OTHER_GATES)
        assert torch.equal(model(FEATURES), expected)
    assert not torch.allclose(expected, other)
    with pytest.raises(
        ValueError, match=r"no expert_gates for 0: expected \(batch, experts\); call the GatedLoraModel"
    ):
        model(FEATURES)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (GATES[:2], r"expert_gates have shape \(2, 4\): expected \(3, 4\), \(batch, experts\); repeat the gates"),
        (GATES[:, :3], r"expert_gates have shape \(3, 3\): expected a tensor \(batch, 4\)"),
        (GATES[0], r"expert_gates have shape \(4,\): expected a tensor \(batch, 4\)"),
        (GATES.tolist(), r"expert_gates have type list: expected a tensor \(batch, 4\)"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates, message):
    with pytest.raises(ValueError, match=message):
        gated_mlp()(FEATURES, expert_gates=gates)


def test_a_beam_search_takes_repeated_gates():
    model = gated_llm()
    settings = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with model.use_gates(GATES.repeat_interleave(2, dim=0)):
        answers = model.base_model.generate(IDS, **settings)
    for row in range(3):
        merged = copy.deepcopy(model).merge_and_unload(GATES[row])
        assert torch.equal(merged.generate(IDS[row : row + 1], **settings)[0], answers[row])


def test_several_threads_use_their_own_gates():
    model = gated_llm().train()
    model.activation_checkpointing_enable()
    all_gates = torch.rand(8, 3, EXPERTS).softmax(-1)

    def gradient_of_gates(gates):
        gates = gates.clone().requires_grad_()
        loss = model(IDS, expert_gates=gates).logits.square().mean()
        return torch.autograd.grad(loss, gates)[0]

    expected = [gradient_of_gates(gates) for gates in all_gates]
    with ThreadPoolExecutor(4) as pool:
        torch.testing.assert_close(list(pool.map(gradient_of_gates, all_gates)), expected)
    assert not torch.allclose(expected[0], expected[1])


def test_a_copy_has_gates_of_its_own():
    model = gated_mlp()
    with model.use_gates(GATES):
        copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match="no expert_gates for 0"):
        copied(FEATURES)
    with copied.use_gates(OTHER_GATES):
        assert torch.equal(copied(FEATURES), model(FEATURES, expert_gates=OTHER_GATES))
        with pytest.raises(ValueError, match="no expert_gates for 0"):
            model(FEATURES)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_for_all_gates():
    model = gated_mlp()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for gates in (GATES, OTHER_GATES):
        assert torch.equal(compiled(FEATURES, expert_gates=gates), model(FEATURES, expert_gates=gates))
    with model.use_gates(OTHER_GATES):
        assert torch.equal(compiled(FEATURES), model(FEATURES))
    torch.compiler.reset()


# --- gradient checkpointing ---


def test_checkpointing_recomputes_every_forward_with_its_own_gates():
    model = gated_llm().train()
    first, second = gradients(model, IDS, GATES), gradients(model, IDS, OTHER_GATES)
    model.activation_checkpointing_enable()
    both = gradients(model, IDS, GATES, OTHER_GATES)
    check_each_forward_used_its_own_gates(both, first, second)


class CheckpointedMlp(nn.Module):
    def __init__(self, **checkpointing):
        super().__init__()
        self.mlp, self.checkpointing = mlp(), checkpointing

    def forward(self, features):
        return checkpoint(self.mlp, features, use_reentrant=False, **self.checkpointing)


def test_a_checkpoint_of_torch_takes_the_gates_along():
    model = randomised(get_gated_lora_model(CheckpointedMlp(), config(target_modules="all-linear")))
    model.base_model.checkpointing = {"context_fn": model.checkpoint_contexts}
    plain = gated_mlp()
    for each in (model, plain):
        losses = [each(FEATURES, expert_gates=gates).square().sum() for gates in (GATES, OTHER_GATES)]
        for loss in losses:
            loss.backward(retain_graph=True)
        losses[0].backward()  # a second recompute
    for mine, expected in zip(
        model.trainable_parameters().values(), plain.trainable_parameters().values(), strict=True
    ):
        torch.testing.assert_close(mine.grad, expected.grad)


@pytest.mark.parametrize("in_context", [False, True])
def test_a_recompute_without_the_gates_of_its_forward_is_refused(in_context):
    model = randomised(get_gated_lora_model(CheckpointedMlp(), config(target_modules="all-linear")))
    loss = model(FEATURES, expert_gates=GATES).square().sum()
    expected = "mlp.0 is recomputed without" if in_context else "no expert_gates for mlp.0"
    with pytest.raises(ValueError, match=f"{expected}.*context_fn=model.checkpoint_contexts"):
        if in_context:
            with model.use_gates(OTHER_GATES):
                loss.backward()
        else:
            loss.backward()


def test_checkpointing_that_loses_gradients_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of the gates"):
        gated_llm().activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="Sequential is not a transformers model"):
        gated_mlp().activation_checkpointing_enable()


# --- targets ---


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (
            ["q_proj", "query", "wo"],
            "target_modules query, wo match nothing in LlamaForCausalLM: expected some of down_proj, gate_proj, "
            "k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        (r".*\.query", "match nothing in LlamaForCausalLM: expected some of down_proj"),
        ("q_proj", "target_modules 'q_proj' match nothing"),  # a string is an expression for whole names
        ("(", "target_modules is '(': expected a valid regular expression"),
        (r".*\.mlp", "model.layers.0.mlp is a LlamaMLP: expected a linear layer"),
        (["norm"], "model.norm is a LlamaRMSNorm: expected a linear layer"),
    ],
)
def test_targets_that_match_no_linear_layer_are_refused(target_modules, message):
    llm = base_llm()
    with pytest.raises(ValueError, match=re.escape(message)):
        get_gated_lora_model(llm, config(target_modules=target_modules))
    assert not gated_layers(llm)
    assert all(parameter.requires_grad for parameter in llm.parameters())


def test_settings_that_were_changed_to_wrong_ones_change_no_model():
    settings, model = config(target_modules="all-linear"), mlp()
    settings.rank = 7
    with pytest.raises(ValueError, match="rank 7 is not divisible by num_experts 4"):
        get_gated_lora_model(model, settings)
    assert not gated_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_be_gated_are_refused():
    with pytest.raises(ValueError, match=r"0\.out_proj belongs to a MultiheadAttention, which reads its weight"):
        get_gated_lora_model(nn.Sequential(nn.MultiheadAttention(8, 2)), config(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"0\.linear1 belongs to a TransformerEncoderLayer, which reads its weight"):
        get_gated_lora_model(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12)), config(target_modules=["linear1"]))
    with pytest.raises(
        ValueError, match="all-linear match nothing in Sequential: expected some of a linear layer, and it"
    ):
        get_gated_lora_model(nn.Sequential(nn.Tanh()), config(target_modules="all-linear"))
    with pytest.raises(ValueError, match="LlamaForCausalLM has gated LoRA layers already"):
        get_gated_lora_model(gated_llm().base_model, config())
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="0 of Sequential is on disk or on the device meta"):
        get_gated_lora_model(nowhere, config(target_modules=["0"]))


# --- back to an ordinary model ---


def test_unload_gives_the_model_back():
    model = gated_llm()
    llm = model.unload()
    assert llm.state_dict().keys() == base_llm().state_dict().keys()
    assert torch.equal(llm(IDS).logits, base_llm()(IDS).logits)
    for stale in (lambda: model(IDS, expert_gates=GATES), lambda: model.save_pretrained("adapter")):
        with pytest.raises(ValueError, match="the adapter of this LlamaForCausalLM was removed"):
            stale()


def test_merging_adds_the_experts_to_the_weight_in_its_dtype():
    model = gated_mlp()
    layer = model.base_model[0]
    expected = layer.base_layer.weight + sum(
        ALPHA / 2 * gate * layer.lora_B[:, 2 * e : 2 * e + 2] @ layer.lora_A[2 * e : 2 * e + 2]
        for e, gate in enumerate(GATES[1])
    )
    low = copy.deepcopy(model)
    low.base_model[0].base_layer.to(torch.bfloat16)
    torch.testing.assert_close(model.merge_and_unload(GATES[1])[0].weight, expected)
    weight = low.merge_and_unload(GATES[1])[0].weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), expected, rtol=0.01, atol=0.01)


def test_weights_that_cannot_be_merged_are_refused():
    with pytest.raises(ValueError, match=r"expert_gates have shape \(3, 4\): expected \(4,\), one gate per expert"):
        gated_mlp().merge_and_unload(GATES)
    tied = base_llm(tie_word_embeddings=True)
    tied = get_gated_lora_model(tied, config(target_modules=["q_proj", "lm_head"]))
    before = copy.deepcopy(tied.base_model.state_dict())
    with pytest.raises(ValueError, match="the weight of lm_head is shared with another module"):
        tied.merge_and_unload(GATES[0])
    torch.testing.assert_close(tied.base_model.state_dict(), before, rtol=0, atol=0)
    quantised = gated_mlp()
    quantised.base_model[2].base_layer = nn.Module()
    with pytest.raises(ValueError, match="2 is a Module: expected a linear layer whose weight is in floating point"):
        quantised.merge_and_unload(GATES[0])


# --- settings ---


def test_settings_survive_their_file(tmp_path):
    for targets in (["query", "value"], r".*\.(query|value)", "all-linear"):
        written = GatedLoraConfig(4, 2, 1.5, 0.25, targets, "user/llm", "abc")
        (tmp_path / "file.json").write_text(written.to_json())
        assert GatedLoraConfig.from_json_file(tmp_path / "file.json") == written
    assert config(target_modules=("a", "b")).target_modules == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 6}, "rank 6 is not divisible by num_experts 4"),
        ({"rank": 8.0}, "rank is 8.0: expected a whole number"),
        ({"num_experts": True}, "num_experts is True: expected a whole number"),
        ({"lora_alpha": 0}, "lora_alpha is 0: expected a positive, finite number"),
        ({"lora_alpha": "32"}, "lora_alpha is '32': expected a number"),
        ({"lora_dropout": 1.0}, r"lora_dropout is 1.0: expected a probability in \[0, 1\)"),
        ({"target_modules": []}, "target_modules is empty: expected names of linear layers"),
        ({"target_modules": ["q_proj", 3]}, "expected a list of names, or one string"),
        ({"target_modules": None}, "target_modules is None: expected a list of names, or one string"),
        ({"revision": 3}, "revision is 3: expected a name, or None"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


# --- saving and loading ---


@pytest.fixture
def saved(tmp_path):
    """A language model's adapter and the folder that it was saved in."""
    model = gated_llm()
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_saved_adapter_is_small_and_computes_the_same(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert load_file(folder / "adapter_model.safetensors").keys() == model.adapter_state().keys()
    loaded = GatedLoraModel.from_pretrained(base_llm(), folder)
    assert loaded.lora_config == model.lora_config
    assert not loaded.training and not loaded.trainable_parameters()
    expected = model(IDS, expert_gates=GATES).logits
    assert torch.equal(loaded(IDS, expert_gates=GATES).logits, expected)
    fresh = get_gated_lora_model(base_llm(), config())
    assert not torch.allclose(fresh(IDS, expert_gates=GATES).logits, expected)

    trained = GatedLoraModel.from_pretrained(base_llm(), folder, is_trainable=True)
    assert trained.trainable_parameters().keys() == model.trainable_parameters().keys()
    trained.save_pretrained(folder)  # over the earlier one
    torch.testing.assert_close(load_file(folder / "adapter_model.safetensors"), dict(model.adapter_state()))


def test_the_state_of_all_processes_is_saved_by_the_main_one(saved, tmp_path):
    model, folder = saved
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    gathered = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", state_dict=gathered)
    written, own = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "other", folder))
    torch.testing.assert_close(written, {name: value + 1 for name, value in own.items()})


def test_an_earlier_adapter_stays_whole_when_a_save_fails(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomised(model, seed=9)

    def broken(state, file, metadata):
        file.write_bytes(b"half")
        raise OSError("the disk broke")

    with monkeypatch.context() as patch:
        patch.setattr(gated_lora_model, "save_file", broken)
        with pytest.raises(OSError, match="the disk broke"):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"contains notes\.txt"):
        model.save_pretrained(folder)


def refused(model, folder, message):
    """The adapter is refused, and the model stays as it was."""
    with pytest.raises(ValueError, match=message):
        GatedLoraModel.from_pretrained(model, folder)
    assert not gated_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_of_another_model_is_refused(saved):
    _, folder = saved
    unnamed = "for an unnamed model"
    refused(
        base_llm(num_hidden_layers=1),
        folder,
        rf"{unnamed} lacks 0 .* has 14 unexpected ones .*of 7 layers of LlamaForCausalLM",
    )
    refused(base_llm(num_hidden_layers=3), folder, r"lacks 14 tensors .*: expected those of 21 layers of LlamaFor")
    wider = base_llm(intermediate_size=64)
    refused(
        wider,
        folder,
        r"gate_proj.lora_B of the adapter in .* has shape \(48, 8\): expected \(64, 8\) for 14 layers",
    )
    refused(
        bert(), folder, r"does not fit this model: target_modules .* match nothing in BertForSequenceClassification"
    )


def test_broken_files_are_refused(saved, tmp_path):
    _, folder = saved
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, described = weights.read_bytes(), json.loads(settings.read_text())
    for content in (whole[:-10], whole[: len(whole) // 2], b"", b"\x80\x04 a pickle", b"\xff" * 64):
        weights.write_bytes(content)
        refused(base_llm(), folder, "adapter_model.safetensors of .* is broken .*restore it")
    weights.write_bytes(whole)
    for text in ("{", "[]", "", "null"):
        settings.write_text(text)
        refused(base_llm(), folder, "adapter_config.json is not the configuration of an adapter .*restore it")
    changes = {
        "peft_type": ("LORA", "has peft_type 'LORA': expected 'GATED_LORA'; load an adapter of another type with PEFT"),
        "rank": (16, r"has shape \(8, 32\): expected \(16, 32\)"),
        "num_experts": (3, "has a wrong value .rank 8 is not divisible by num_experts 3"),
        "lora_alpha": (None, "has a wrong value .lora_alpha is None: expected a number"),
        "use_dora": (True, "has a wrong value .*unexpected keyword argument 'use_dora'"),
    }
    for name, (value, message) in changes.items():
        settings.write_text(json.dumps(described | {name: value}))
        refused(base_llm(), folder, message)
    settings.write_text(json.dumps(described))
    save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights)
    refused(base_llm(), folder, r"has 1 unexpected ones \(\['extra'\]\)")
    weights.unlink()
    refused(base_llm(), folder, "has no adapter_model.safetensors: expected a folder or repository")
    settings.unlink()
    refused(base_llm(), folder, "has no adapter_config.json")
    with pytest.raises(OSError, match="nowhere"):
        GatedLoraModel.from_pretrained(base_llm(), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["user/llm", "a folder"])
def test_the_base_model_is_recorded_and_another_one_logs_a_warning(tmp_path, caplog, monkeypatch, name):
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    model, other = base_llm(), base_llm()
    model.name_or_path, other.name_or_path = name, "user/other"
    get_gated_lora_model(model, config()).save_pretrained("adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == ("user/llm" if name == "user/llm" else str(tmp_path / "a folder"))
    same = base_llm()
    same.name_or_path = name
    for each, warnings in ((same, 0), (base_llm(), 0), (other, 1)):
        caplog.clear()
        GatedLoraModel.from_pretrained(each, "adapter")
        assert sum(message.endswith("not user/other") for message in caplog.messages) == warnings


def test_peft_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)  # its import raises
    gated_mlp().save_pretrained(tmp_path / "adapter")
    GatedLoraModel.from_pretrained(mlp(), tmp_path / "adapter").merge_and_unload(GATES[0])


# --- the docs, the Trainer ---


def test_the_program_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    save_llm(tmp_path / "llm")
    docs = (PROJECT / "docs" / "teacher.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", docs, re.DOTALL)
    (program,) = [block for block in blocks if "get_gated_lora_model" in block]
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(program.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "llm"), scope)
    assert scope["gates"].grad is not None and not gated_layers(scope["model"])
    assert "\ntrainable params: 1,792 || " in f"\n{capsys.readouterr().out}"  # 2 layers of 8 * (32 + 32 + 32 + 16)


def train(model: GatedLoraModel, folder, resumed: bool = False) -> Trainer:
    """Three steps on two rows each."""
    rows = [{"input_ids": IDS[i % 3], "labels": IDS[i % 3], "expert_gates": GATES[i % 3]} for i in range(6)]
    arguments = TrainingArguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        activation_checkpointing=True,
        remove_unused_columns=False,
        label_names=["labels"],
        save_steps=2,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
    return trainer


def test_the_trainer_trains_the_adapter_and_resumes_from_it(tmp_path):
    def tied():
        return get_gated_lora_model(
            base_llm(num_hidden_layers=1, tie_word_embeddings=True),
            config(target_modules=["q_proj", "up_proj"], lora_dropout=0.2),
        )

    model = tied()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = train(model, tmp_path)
    assert trainer.model_accepts_loss_kwargs and math.isfinite(trainer.evaluate()["eval_loss"])
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == model.trainable_parameters().keys()

    assert load_file(tmp_path / "checkpoint-2" / "model.safetensors").keys() == changed
    resumed = randomised(tied(), seed=8)
    train(resumed, tmp_path, resumed=True)
    for name, value in model.trainable_parameters().items():
        torch.testing.assert_close(resumed.trainable_parameters()[name], value)


def test_a_model_whose_forward_takes_no_other_keyword_gets_none_of_the_trainer(tmp_path):
    arguments = TrainingArguments(tmp_path, use_cpu=True)
    assert not Trainer(gated_mlp(), arguments).model_accepts_loss_kwargs


def test_a_state_dict_has_the_adapter_alone_inside_of_another_module_too():
    whole = nn.ModuleDict({"router": nn.Linear(5, EXPERTS), "gated": gated_mlp()})
    state = copy.deepcopy(whole.state_dict())
    adapter = {f"gated.base_model.{layer}.lora_{matrix}" for layer in (0, 2) for matrix in "AB"}
    assert state.keys() == {"router.weight", "router.bias"} | adapter
    for parameter in whole.parameters():
        nn.init.zeros_(parameter)
    whole.load_state_dict(state)
    torch.testing.assert_close(whole.state_dict(), state)
    del state["gated.base_model.2.lora_A"], state["router.bias"]
    with pytest.raises(
        RuntimeError, match=r'Missing key\(s\) in state_dict: "router.bias", "gated.base_model.2.lora_A"\.'
    ):
        whole.load_state_dict(state)
