"""Routers against the published program's numbers and naive implementations, and what every router promises."""

import copy
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_ilora.models.ilora.configuration_ilora import ROUTER_TYPES
from hf_ilora.models.ilora.routers import (
    ConvRouter,
    LinearRouter,
    MlpRouter,
    NoisyRouter,
    SingleExpert,
    TopKRouter,
    build_router,
)
from tests.paths import SHARED

REFERENCE = SHARED / "reference" / "ilora"


def users(batch=6, gate_size=16, seed=0):
    return torch.randn(batch, gate_size, generator=torch.Generator().manual_seed(seed))


def golden(name):
    path = REFERENCE / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return load_file(path)


def our_name(reference_name):
    """The published program's name of a weight of the conv router -> ours."""
    name = reference_name.removeprefix("router.")
    block = re.fullmatch(r"layer(\d)\.(\d)\.(conv|bn)(\d\..*)", name)
    if block:
        stage, place, kind, rest = block.groups()
        return f"stages.{3 * (int(stage) - 1) + int(place)}.{'convolution' if kind == 'conv' else 'norm'}{rest}"
    return name.replace("conv1", "convolution").replace("bn1", "norm").replace("gate.fc", "projection")


def randomised(router, seed=0):
    """The router with every weight and statistic away from its first value, so that none can be overlooked."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in router.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return router


# --- the published program ---


def test_conv_router_gives_the_published_gates_in_evaluation_and_training():
    reference = golden("router_conv")
    router = ConvRouter(gate_size=64, num_experts=4)
    router.load_state_dict({our_name(name): w for name, w in reference.items() if name.startswith("router.")})
    user_embedding = reference["user_embedding"]
    evaluated = router.eval()(user_embedding)
    trained = router.train()(user_embedding)
    torch.testing.assert_close(evaluated, reference["gate_eval"], rtol=0, atol=1e-5)
    torch.testing.assert_close(trained, reference["gate_train"], rtol=0, atol=1e-5)
    assert (evaluated - trained).abs().max() > 0.01
    other = ConvRouter(gate_size=64, num_experts=4).eval()(user_embedding)
    assert (other - reference["gate_eval"]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("file", "router", "names"),
    [
        ("gate_dense", LinearRouter(64, 4), {"linear_layer": "projection"}),
        ("gate_dense", NoisyRouter(64, 4).eval(), {"linear_layer": "projection"}),
        ("gate_mlp", MlpRouter(64, 4), {"linear_layer1": "hidden", "linear_layer2": "projection"}),
        ("gate_topk", TopKRouter(64, 4, top_k=1), {"linear_layer": "projection"}),
    ],
)
def test_router_gives_the_published_gates(file, router, names):
    reference = golden(file)
    weights = {}
    for name, weight in reference.items():
        if name.startswith("gate."):
            _, layer, kind = name.split(".")
            weights[f"{names[layer]}.{kind}"] = weight
    unloaded = router(reference["user_embedding"])
    router.load_state_dict(weights)
    torch.testing.assert_close(router(reference["user_embedding"]), reference["gate"], rtol=0, atol=1e-5)
    assert (unloaded - reference["gate"]).abs().max() > 0.01


# --- naive implementations ---


def naive_batch_norm(signal, norm, training):
    """signal: channels x length lists of (batch,) tensors -> the same, normalised."""
    result = []
    for channel, places in enumerate(signal):
        values = torch.cat(places)
        mean = values.mean() if training else norm.running_mean[channel]
        variance = ((values - mean) ** 2).mean() if training else norm.running_var[channel]
        scale = norm.weight[channel] / (variance + norm.eps).sqrt()
        result.append([(value - mean) * scale + norm.bias[channel] for value in places])
    return result


def naive_convolution(signal, weight, stride):
    length = len(signal[0])
    return [
        [
            sum(
                weight[out, channel, tap] * signal[channel][place + tap - 1]
                for channel in range(len(signal))
                for tap in range(3)
                if 0 <= place + tap - 1 < length
            )
            for place in range(0, length, stride)
        ]
        for out in range(weight.shape[0])
    ]


def naive_conv_router(router, user_embedding, training):
    """Place by place and channel by channel; an independent statement of the ResNet of the reference."""

    def relu(signal):
        return [[value.clamp(min=0) for value in places] for places in signal]

    signal = [[user_embedding[:, place] for place in range(user_embedding.shape[1])]]  # 1 channel
    signal = relu(naive_batch_norm(naive_convolution(signal, router.convolution.weight, 1), router.norm, training))
    zeros = torch.zeros(user_embedding.shape[0])
    for index, block in enumerate(router.stages):
        stride = 2 if index in (3, 6) else 1
        inner = naive_convolution(signal, block.convolution1.weight, stride)
        inner = relu(naive_batch_norm(inner, block.norm1, training))
        inner = naive_batch_norm(naive_convolution(inner, block.convolution2.weight, 1), block.norm2, training)
        shortcut = [places[::stride] for places in signal]
        missing = [[zeros] * len(shortcut[0])] * ((len(inner) - len(signal)) // 2)
        shortcut = missing + shortcut + missing
        added = zip(inner, shortcut, strict=True)
        signal = relu([[i + s for i, s in zip(a, b, strict=True)] for a, b in added])
    pooled = torch.stack([sum(places) / len(places) for places in signal], dim=1)  # (batch, 64)
    return torch.softmax(pooled @ router.projection.weight.t() + router.projection.bias, dim=1)


@pytest.mark.parametrize("training", [False, True])
def test_conv_router_equals_naive_implementation(training):
    router = randomised(ConvRouter(gate_size=9, num_experts=3)).train(training)
    with torch.no_grad():
        expected = naive_conv_router(router, users(4, 9), training)
        torch.testing.assert_close(router(users(4, 9)), expected, rtol=0, atol=1e-5)


def naive_gates(router, user):
    """One user, number by number."""
    user = user.double()
    router = copy.deepcopy(router).double().requires_grad_(False)
    if isinstance(router, MlpRouter):
        hidden = [float(row @ user + b) for row, b in zip(router.hidden.weight, router.hidden.bias, strict=True)]
        user = torch.tensor([h * 0.5 * (1 + math.erf(h / math.sqrt(2))) for h in hidden]).double()
        logits = [float(r @ user + b) for r, b in zip(router.projection.weight, router.projection.bias, strict=True)]
    else:
        logits = [float(row @ user) for row in router.projection.weight]
    probabilities = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    if isinstance(router, TopKRouter):
        kept = sorted(probabilities)[-router.top_k :]
        total = sum(map(math.exp, kept))
        return [math.exp(p) / total if p in kept else 0.0 for p in probabilities]
    return probabilities


@pytest.mark.parametrize("router_type", ["linear", "mlp", "top_k", "noisy"])
def test_router_equals_naive_implementation(router_type):
    router = randomised(build_router(router_type, 16, 5, top_k=3)).eval()
    expected = [naive_gates(router, user) for user in users()]
    torch.testing.assert_close(router(users()), torch.tensor(expected), rtol=0, atol=1e-5)


# --- what every router promises ---


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
@pytest.mark.parametrize(("gate_size", "num_experts"), [(8, 2), (64, 4), (100, 3), (129, 8)])
def test_gates_are_float32_probabilities_for_any_size(router_type, gate_size, num_experts):
    router = build_router(router_type, gate_size, num_experts)
    for training in (True, False):
        gates = router.train(training)(users(5, gate_size))
        assert gates.shape == (5, num_experts)
        assert gates.dtype == torch.float32
        assert (gates >= 0).all()
        torch.testing.assert_close(gates.sum(1), torch.ones(5))


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_autocast_does_not_round_the_gates(router_type):
    router = build_router(router_type, 16, 4).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gates = router(users())
    assert gates.dtype == torch.float32
    assert torch.equal(gates, router(users()))


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_router_in_bfloat16_takes_and_gives_float32(router_type):
    gates = build_router(router_type, 16, 4).to(torch.bfloat16).eval()(users())
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates.sum(1), torch.ones(6))


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_gradients_reach_every_weight_and_the_user_embedding(router_type):
    router = randomised(build_router(router_type, 16, 4))
    user_embedding = users().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (router(user_embedding) * weights).sum().backward()
    for name, parameter in [*router.named_parameters(), ("user_embedding", user_embedding)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_router_learns_to_tell_users_apart(router_type):
    torch.manual_seed(0)
    router = build_router(router_type, 16, 4, top_k=4)  # an expert that is not kept gets no gradient
    experts = torch.arange(6) % 4
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.nll_loss(router(users()).clamp(min=1e-6).log(), experts).backward()
        optimizer.step()
    assert torch.equal(router.eval()(users()).argmax(1), experts)


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_one_user_alone_can_be_trained_on(router_type):
    router = build_router(router_type, 8, 2).train()
    gates = router(users(1, 8))
    gates[0, 0].backward()
    assert gates.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in router.parameters())


@pytest.mark.parametrize("router_type", [t for t in ROUTER_TYPES if t != "top_k"])
def test_a_new_router_has_no_favourite_expert(router_type):
    torch.manual_seed(3)
    for training in (True, False):
        gates = build_router(router_type, 64, 4).train(training)(users(256, 64)).mean(0)
        torch.testing.assert_close(gates, torch.full((4,), 0.25), rtol=0, atol=0.08)


def test_gates_of_a_user_do_not_depend_on_the_batch_in_evaluation():
    for router_type in ROUTER_TYPES:
        router = randomised(build_router(router_type, 16, 4)).eval()
        torch.testing.assert_close(router(users())[2:3], router(users()[2:3]))


def test_noise_only_in_training():
    router = NoisyRouter(16, 4, noise_std=0.5)
    torch.manual_seed(0)
    assert not torch.allclose(router.train()(users()), router(users()))
    assert torch.equal(router.eval()(users()), router(users()))


def test_noise_is_normal_with_the_given_deviation():
    torch.manual_seed(0)
    router = NoisyRouter(16, 4, noise_std=0.3).train()
    user = users(1).expand(5000, -1)
    noisy = router(user).log()
    quiet = router.eval()(user).log()
    noise = (noisy - quiet).detach()
    differences = noise[:, 1:] - noise[:, :1]  # free of what the softmax takes off
    torch.testing.assert_close(differences.mean(0), torch.zeros(3), rtol=0, atol=0.03)
    torch.testing.assert_close(differences.std(0), torch.full((3,), 0.3 * math.sqrt(2)), rtol=0, atol=0.03)
    silent = NoisyRouter(16, 4, noise_std=0).train()
    assert torch.equal(silent(users()), silent(users()))


def test_top_k_keeps_the_most_probable_experts():
    router = TopKRouter(4, 4, top_k=2)
    with torch.no_grad():
        router.projection.weight.copy_(torch.eye(4))
    gates = router(torch.tensor([[0.0, math.log(3), math.log(4), 0.0]]))
    # probabilities 1/9, 3/9, 4/9, 1/9; then exp(3/9) and exp(4/9) over their sum
    low, high = math.exp(3 / 9), math.exp(4 / 9)
    expected = torch.tensor([[0.0, low / (low + high), high / (low + high), 0.0]])
    torch.testing.assert_close(gates, expected)


def test_single_expert_has_no_parameters_and_a_gate_of_one():
    router = build_router("conv", 4, num_experts=1)
    assert isinstance(router, SingleExpert)
    assert not router.state_dict()
    gates = router(users(3, 4).to(torch.bfloat16))
    assert torch.equal(gates, torch.ones(3, 1))
    assert gates.dtype == torch.float32


def test_build_router_passes_its_arguments_on():
    assert isinstance(build_router("conv", 16, 4), ConvRouter)
    assert isinstance(build_router("linear", 16, 4), LinearRouter)
    assert build_router("mlp", 16, 4).hidden.out_features == 128
    assert build_router("top_k", 16, 4, top_k=3).top_k == 3
    assert build_router("noisy", 16, 4, noise_std=0.7).noise_std == 0.7


# --- bad arguments ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: build_router("share", 64, 4),
            "router_type is 'share': expected one of conv, linear, mlp, top_k, noisy",
        ),
        (lambda: build_router("share", 64, 1), "router_type is 'share'"),
        (lambda: build_router("conv", 7, 4), "gate_size is 7: expected at least 8"),
        (lambda: build_router("linear", 0, 4), "gate_size is 0"),
        (lambda: build_router("linear", 16, 0), "num_experts 0"),
        (lambda: build_router("top_k", 16, 4, top_k=5), "top_k is 5: expected 1 to 4"),
        (lambda: build_router("top_k", 16, 4, top_k=0), "top_k is 0"),
        (lambda: build_router("noisy", 16, 4, noise_std=-0.1), "noise_std is -0.1"),
        (lambda: LinearRouter(16, 1), "use SingleExpert"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_conv_router_of_bfloat16_parameters_keeps_float32_statistics():
    """DeepSpeed's bfloat16 leaves a model so."""
    torch.manual_seed(1)
    router = build_router("conv", 16, 4)
    expected = copy.deepcopy(router)
    for parameter in router.parameters():
        parameter.data = parameter.data.bfloat16()
    embeddings = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    gates = router(embeddings)
    torch.testing.assert_close(gates, expected(embeddings), rtol=0.02, atol=0.002)
    assert gates.dtype == router.norm.running_var.dtype == torch.float32
    torch.testing.assert_close(router.norm.running_var, expected.norm.running_var, rtol=0.02, atol=0)
    assert not torch.equal(router.norm.running_var, torch.ones(16))
    gates[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in router.parameters())


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
@pytest.mark.parametrize("shape", [(3, 15), (3, 17), (16,), (2, 3, 16)])
def test_embeddings_of_another_shape_are_refused(router_type, shape):
    message = re.escape(f"user_embedding has shape {shape}: expected (batch, 16)")
    with pytest.raises(ValueError, match=message):
        build_router(router_type, 16, 4)(torch.zeros(shape))
