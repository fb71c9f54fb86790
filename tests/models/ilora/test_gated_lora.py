"""Gated LoRA against the published program's numbers, naive experts and models with merged weights."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config

from hf_ilora.models.ilora.gated_lora import GatedLoraLinear, add_gated_lora, gated_layers
from tests.models.ilora.gate_gradients import GATES, OTHER_GATES, check_each_forward_used_its_own_gates, gradients
from tests.models.ilora.ilora_fixtures import ALPHA, EXPERTS, RANK, merged_llm
from tests.paths import SHARED
from tests.tiny_language_models import ARCHITECTURES, ATTENTION, CONFIGS, MLP, llm_with_window

REFERENCE = SHARED / "reference" / "ilora"
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}
INPUT_IDS = torch.randint(1, 101, (3, 7), generator=torch.Generator().manual_seed(5))


def base_model(architecture="llama"):
    """Its sliding window is shorter than `INPUT_IDS`."""
    return llm_with_window(architecture, window=4)


def gated_model(architecture="llama", targets=ATTENTION + MLP, num_experts=EXPERTS, dropout=0.0):
    """The base model with gated layers whose B is not zero."""
    llm = base_model(architecture)
    add_gated_lora(llm, targets, RANK, num_experts, ALPHA, dropout)
    generator = torch.Generator().manual_seed(1)
    for layer in gated_layers(llm).values():
        with torch.no_grad():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return llm.eval()


def naive_experts(hidden_states, base_weight, lora_A, lora_B, gates, lora_alpha):
    """One expert after the other, as the paper writes it."""
    experts = gates.shape[1]
    size = lora_A.shape[0] // experts
    output = hidden_states @ base_weight.t()
    for expert in range(experts):
        part = slice(expert * size, (expert + 1) * size)
        expert_output = hidden_states @ lora_A[part].t() @ lora_B[:, part].t()
        output = output + lora_alpha / size * gates[:, expert, None, None] * expert_output
    return output


def layer_of(base_weight, lora_A, lora_B, num_experts, lora_alpha, dropout=0.0):
    base = nn.Linear(base_weight.shape[1], base_weight.shape[0], bias=False)
    layer = GatedLoraLinear(base, lora_A.shape[0], num_experts, lora_alpha, dropout)
    with torch.no_grad():
        base.weight.copy_(base_weight)
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    base.requires_grad_(False)
    return layer


def random_case(seed=0, batch=3, tokens=5, inputs=12, outputs=10, rank=RANK, experts=EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, inputs), (outputs, inputs), (rank, inputs), (outputs, rank), (batch, experts)]
    x, weight, a, b, gates = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, a, b, gates.softmax(1)


# --- the layer ---


@pytest.mark.parametrize("case", [0, 1, 2])
def test_layer_gives_the_published_output(case):
    path = REFERENCE / f"layer_{case}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    with safe_open(path, "pt") as file:
        settings = file.metadata()
    golden = load_file(path)
    layer = layer_of(
        golden["base_weight"],
        golden["lora_A"],
        golden["lora_B"],
        int(settings["num_experts"]),
        float(settings["lora_alpha"]),
    )
    assert layer.rank == int(settings["rank"])
    output = layer(golden["x"], golden["gate"])
    torch.testing.assert_close(output, golden["y"], rtol=1e-5, atol=1e-5)
    other = layer(golden["x"], golden["gate"].roll(1, dims=1))
    assert (other - golden["y"]).abs().max() > 0.01


@pytest.mark.parametrize(("rank", "experts"), [(8, 4), (9, 3), (4, 4), (6, 1)])
def test_layer_and_its_gradients_equal_naive_experts(rank, experts):
    x, weight, a, b, gates = random_case(rank=rank, experts=experts)
    layer = layer_of(weight, a, b, experts, lora_alpha=12.0)
    ours = [x.clone().requires_grad_(), gates.clone().requires_grad_(), layer.lora_A, layer.lora_B]
    naive = [tensor.clone().requires_grad_() for tensor in (x, gates, a, b)]
    output = layer(ours[0], ours[1])
    expected = naive_experts(naive[0], weight, naive[2], naive[3], naive[1], lora_alpha=12.0)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    loss_weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (output * loss_weights).sum().backward()
    (expected * loss_weights).sum().backward()
    for mine, theirs in zip(ours, naive, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    assert layer.base_layer.weight.grad is None


def test_one_expert_is_plain_lora():
    x, weight, a, b, _ = random_case()
    layer = layer_of(weight, a, b, num_experts=1, lora_alpha=16.0)
    expected = x @ weight.t() + 16.0 / RANK * (x @ a.t() @ b.t())
    torch.testing.assert_close(layer(x, torch.ones(3, 1)), expected, rtol=1e-5, atol=1e-4)


def test_a_new_layer_changes_nothing_and_learns():
    base = nn.Linear(12, 10)
    layer = GatedLoraLinear(base, RANK, EXPERTS, ALPHA, 0.5)
    x = random_case()[0]
    assert torch.equal(layer(x, GATES), base(x))
    layer(x, GATES).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


def test_dropout_is_before_the_experts_and_only_in_training():
    x, weight, a, b, gates = random_case()
    layer = layer_of(weight, a, b, EXPERTS, 12.0, dropout=0.5)
    torch.manual_seed(3)
    output = layer.train()(x, gates)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    expected = naive_experts(dropped, weight, a, b, gates, 12.0) + (x - dropped) @ weight.t()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    without = naive_experts(x, weight, a, b, gates, 12.0)
    torch.testing.assert_close(layer.eval()(x, gates), without, rtol=1e-5, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_no_tensor_contains_the_output_of_each_expert():
    batch, tokens, inputs, outputs = 3, 50, 8, 16
    x, weight, a, b, gates = random_case(batch=batch, tokens=tokens, inputs=inputs, outputs=outputs)
    x.requires_grad_()
    layer = layer_of(weight, a, b, EXPERTS, ALPHA, dropout=0.1).train()
    with LargestTensor() as ours:
        layer(x, gates.requires_grad_()).sum().backward()
    assert ours.numbers == batch * tokens * outputs

    with LargestTensor() as published:  # the control: the published program makes such a tensor
        rank_states = (x @ a.t()).unflatten(2, (EXPERTS, -1))  # (batch, tokens, experts, rank / experts)
        expert_outputs = torch.einsum("bter,oer->bteo", rank_states, b.unflatten(1, (EXPERTS, -1)))
        (gates[:, None, :, None] * expert_outputs).sum(2)
    assert published.numbers == batch * tokens * EXPERTS * outputs


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_quantised_base_layer_gets_the_same_lora():
    x, weight, a, b, gates = random_case()
    layer = layer_of(weight, a, b, EXPERTS, 12.0)
    quantised = quantize_dynamic(nn.Sequential(copy.deepcopy(layer.base_layer)), {nn.Linear}, dtype=torch.qint8)[0]
    assert not isinstance(quantised, nn.Linear)
    wrapped = GatedLoraLinear(quantised, RANK, EXPERTS, 12.0)
    with torch.no_grad():
        wrapped.lora_A.copy_(a)
        wrapped.lora_B.copy_(b)
    assert [name for name, _ in wrapped.named_parameters()] == ["lora_A", "lora_B"]
    lora = layer(x, gates) - x @ weight.t()
    torch.testing.assert_close(wrapped(x, gates), quantised(x) + lora, rtol=1e-5, atol=1e-4)
    assert not torch.equal(quantised(x), x @ weight.t())  # it is quantised
    wrapped(x, gates).sum().backward()
    assert wrapped.lora_A.grad.abs().sum() > 0


def test_adapter_stays_float32_on_a_bfloat16_base_layer():
    x, weight, a, b, gates = random_case()
    layer = layer_of(weight, a, b, EXPERTS, 12.0)
    layer.base_layer.to(torch.bfloat16)
    assert GatedLoraLinear(layer.base_layer, RANK, EXPERTS, ALPHA).lora_A.dtype == torch.float32
    output = layer(x.to(torch.bfloat16), gates)
    assert output.dtype == torch.bfloat16
    rounded = x.to(torch.bfloat16)
    lora = naive_experts(rounded.float(), torch.zeros_like(weight), a, b, gates, 12.0)
    expected = layer.base_layer(rounded).float() + lora
    # the parameters are float32, their products are rounded as the base layer's are
    assert (output.float() - expected).abs().max() < 0.02 * expected.abs().max()
    output.sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("lora_alpha", "lora_dropout", "message"),
    [
        (0.0, 0.0, "lora_alpha is 0.0: expected a positive, finite number"),
        (float("nan"), 0.0, "lora_alpha is nan"),
        (8.0, 1.0, r"lora_dropout is 1.0: expected a probability in \[0, 1\)"),
        (8.0, float("nan"), "lora_dropout is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(lora_alpha, lora_dropout, message):
    with pytest.raises(ValueError, match=message):
        GatedLoraLinear(nn.Linear(4, 4), 4, 2, lora_alpha, lora_dropout)


@pytest.mark.parametrize(
    ("rank", "experts", "message"),
    [
        (8, 3, "rank 8 is not divisible by num_experts 3"),
        (4, 8, "rank 4 is not divisible by num_experts 8"),
        (0, 1, "rank is 0: expected at least 1"),
        (8, 0, "num_experts is 0: expected at least 1"),
    ],
)
def test_rank_that_experts_cannot_share_is_refused(rank, experts, message):
    with pytest.raises(ValueError, match=message):
        GatedLoraLinear(nn.Linear(4, 4), rank, experts, ALPHA)


@pytest.mark.parametrize("shape", [(2, 4), (6, 4), (3, 3), (1, 4), (3,), (3, 1, 4)])
def test_gates_of_another_shape_are_refused(shape):
    x, weight, a, b, _ = random_case()
    layer = layer_of(weight, a, b, EXPERTS, ALPHA)
    with pytest.raises(ValueError, match=re.escape(f"expert_gates have shape {shape}: expected (3, 4)")):
        layer(x, torch.ones(shape))


def test_a_layer_without_gates_is_refused():
    x, weight, a, b, gates = random_case()
    layer = layer_of(weight, a, b, EXPERTS, ALPHA)
    with pytest.raises(ValueError, match="no expert_gates reached this layer"):
        layer(x)
    layer.hand_gates(gates)
    expected = layer(x)
    assert torch.equal(expected, layer(x, gates))
    with pytest.raises(ValueError, match="no expert_gates reached this layer"):
        layer(x)  # those that were handed over served one forward
    layer.hand_gates(gates)
    layer(x, gates)
    with pytest.raises(ValueError, match="no expert_gates reached this layer"):
        layer(x)


# --- a whole language model ---


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_is_the_model_with_that_users_lora_merged(architecture, targets):
    llm = gated_model(architecture, TARGETS[targets])
    with torch.no_grad():
        logits = llm(INPUT_IDS, expert_gates=GATES).logits
        for row, gates in enumerate(GATES):
            expected = merged_llm(llm, gates, base_model(architecture))(INPUT_IDS[row : row + 1]).logits[0]
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
        plain = base_model(architecture)(INPUT_IDS).logits
        other = llm(INPUT_IDS, expert_gates=OTHER_GATES).logits
    assert (logits - plain).abs().max() > 0.01
    assert (logits - other)[:2].abs().max() > 0.01
    torch.testing.assert_close(logits[2], other[2])  # equal gates


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_adapter_is_trained_and_all_of_it(architecture):
    llm = gated_model(architecture)
    names = {name for name, parameter in llm.named_parameters() if parameter.requires_grad}
    layers = CONFIGS[architecture].num_hidden_layers
    assert len(gated_layers(llm)) == 7 * layers
    assert names == {f"{name}.lora_{matrix}" for name in gated_layers(llm) for matrix in "AB"}
    for name, gradient in gradients(llm, INPUT_IDS, GATES).items():
        assert gradient.abs().sum() > 0, name


def test_names_of_wrapped_layers_are_returned():
    names = add_gated_lora(base_model(), ["v_proj", "down_proj"], RANK, EXPERTS, ALPHA, 0.0)
    expected = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.v_proj", "mlp.down_proj")]
    assert names == expected


@pytest.mark.parametrize("targets", TARGETS)
def test_gates_of_an_earlier_call_are_never_used(targets):
    llm = gated_model(targets=TARGETS[targets])
    llm(INPUT_IDS, expert_gates=GATES)
    for stale in ({}, {"expert_gates": None}):
        with pytest.raises(ValueError, match="no expert_gates reached this layer"):
            llm(INPUT_IDS, **stale)
    with pytest.raises(ValueError, match=re.escape("expert_gates have shape (2, 4): expected (3, 4)")):
        llm(INPUT_IDS, expert_gates=GATES[:2])


class FailsOnce(nn.Module):
    """A linear layer that raises at its first call."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.failed = linear, False

    def forward(self, hidden_states):
        if not self.failed:
            self.failed = True
            raise ArithmeticError("the layer broke")
        return self.linear(hidden_states)


@pytest.mark.parametrize("broken", ["self_attn.k_proj", "mlp.up_proj"])
def test_an_exception_in_a_layer_comes_through_and_leaves_no_gates_behind(broken):
    llm = gated_model()
    expected = llm(INPUT_IDS, expert_gates=GATES).logits
    layer = llm.get_submodule(f"model.layers.1.{broken}")
    layer.base_layer = FailsOnce(layer.base_layer)
    with pytest.raises(ArithmeticError, match="the layer broke"):
        llm(INPUT_IDS, expert_gates=OTHER_GATES)
    with pytest.raises(ValueError, match="no expert_gates reached this layer"):
        llm(INPUT_IDS)
    assert torch.equal(llm(INPUT_IDS, expert_gates=GATES).logits, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(architecture, dropout):
    llm = gated_model(architecture, dropout=dropout).train()
    expected = gradients(llm, INPUT_IDS, GATES)
    llm.activation_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(llm, INPUT_IDS, GATES)
    assert recomputed.keys() == expected.keys()
    for name, gradient in recomputed.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward_use_their_own_gates(architecture, checkpointing):
    llm = gated_model(architecture).train()
    first, second = gradients(llm, INPUT_IDS, GATES), gradients(llm, INPUT_IDS, OTHER_GATES)
    if checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    both = gradients(llm, INPUT_IDS, GATES, OTHER_GATES)
    check_each_forward_used_its_own_gates(both, first, second)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padding_changes_nothing(architecture):
    llm = gated_model(architecture)
    short = INPUT_IDS[1:2, -4:]
    padded = F.pad(short, (3, 0))
    mask = (padded != 0).long()
    both = torch.cat([INPUT_IDS[:1], padded])
    with torch.no_grad():
        alone = llm(short, expert_gates=GATES[1:2]).logits[0]
        batch = llm(both, attention_mask=torch.cat([torch.ones_like(mask), mask]), expert_gates=GATES[:2]).logits
    torch.testing.assert_close(batch[1, 3:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_later_tokens_do_not_reach_earlier_ones(architecture):
    llm = gated_model(architecture)
    changed = INPUT_IDS.clone()
    changed[:, 4:] = changed[:, 4:] % 100 + 1
    with torch.no_grad():
        logits, after = (llm(ids, expert_gates=GATES).logits for ids in (INPUT_IDS, changed))
    torch.testing.assert_close(logits[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)
    assert (logits[:, 4:] - after[:, 4:]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_with_a_cache_equals_one_forward(architecture):
    llm = gated_model(architecture)
    with torch.no_grad():
        expected = llm(INPUT_IDS, expert_gates=GATES).logits
        output = llm(INPUT_IDS[:, :3], use_cache=True, expert_gates=GATES)
        logits = [output.logits]
        for place in range(3, 7):
            cache = output.past_key_values
            output = llm(INPUT_IDS[:, place : place + 1], past_key_values=cache, expert_gates=GATES)
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_made_after_a_forward_has_gates_of_its_own():
    """A gate left on a layer keeps the graph of its router alive and cannot be copied."""
    llm = gated_model()
    gates = GATES.clone().requires_grad_() * 1.0
    expected = llm(INPUT_IDS, expert_gates=gates).logits
    other = copy.deepcopy(llm)
    with torch.no_grad():
        for layer in gated_layers(llm).values():
            layer.lora_B.zero_()
        torch.testing.assert_close(other(INPUT_IDS, expert_gates=GATES).logits, expected.detach())
        torch.testing.assert_close(llm(INPUT_IDS, expert_gates=GATES).logits, base_model()(INPUT_IDS).logits)


def test_bfloat16_language_model_trains_a_float32_adapter():
    llm = base_model().to(torch.bfloat16)
    add_gated_lora(llm, ATTENTION + MLP, RANK, EXPERTS, ALPHA, 0.0)
    output = llm(INPUT_IDS, labels=INPUT_IDS, expert_gates=GATES)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    trained = [parameter for parameter in llm.parameters() if parameter.requires_grad]
    assert len(trained) == 28
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "target_modules is empty"),
        (
            ["q_proj", "query", "wo"],
            "target_modules query, wo match nothing in LlamaForCausalLM: expected some of "
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
        (["q_proj", "mlp"], "model.layers.0.mlp is a LlamaMLP: expected a linear layer"),
        (["lm_head"], "target_modules lm_head match nothing"),
    ],
)
def test_targets_that_match_no_linear_layer_are_refused(targets, message):
    llm = base_model()
    with pytest.raises(ValueError, match=re.escape(message)):
        add_gated_lora(llm, targets, RANK, EXPERTS, ALPHA, 0.0)
    assert not gated_layers(llm)  # nothing is half done
    assert all(parameter.requires_grad for parameter in llm.parameters())


def test_a_language_model_with_gated_layers_is_refused():
    llm = gated_model(targets=["q_proj"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has gated LoRA layers already"):
        add_gated_lora(llm, ["v_proj"], RANK, EXPERTS, ALPHA, 0.0)


def test_a_language_model_of_another_build_is_refused():
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(
        ValueError, match=r"GPT2Model has no layers .*wte, wpe, drop, h, ln_f.*expected a decoder as in"
    ):
        add_gated_lora(gpt2, ["c_attn"], RANK, EXPERTS, ALPHA, 0.0)
    llm = base_model()
    llm.model.layers[1] = nn.ModuleDict({"attention": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"model.layers.1 has no self_attn \(it has attention\)"):
        add_gated_lora(llm, ["q_proj"], RANK, EXPERTS, ALPHA, 0.0)
