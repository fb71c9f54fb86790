"""The programs that the benchmark of iLoRA compares compute the same thing."""

import pytest
import torch
from torch import nn

from benchmarks import ilora
from hf_ilora.models.ilora.gated_lora import GatedLoraLinear, gated_layers


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    whole = ilora.LlamaConfig
    monkeypatch.setattr(
        ilora, "LlamaConfig", lambda **sizes: whole(**sizes | {"hidden_size": 18, "intermediate_size": 24})
    )
    return ilora.ILoraBenchmarkArguments(str(tmp_path), num_layers=1, batch_size=2, tokens=12, title_tokens=3)


def test_published_form_equals_the_gated_layer():
    gates = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    gated = GatedLoraLinear(nn.Linear(6, 5), rank=4, num_experts=2, lora_alpha=ilora.LORA_ALPHA)
    nn.init.normal_(gated.lora_B)
    published = ilora.PublishedLoraLinear(gated, shared_gates=[gates])
    hidden_states = torch.randn(2, 3, 6)
    torch.testing.assert_close(published(hidden_states), gated(hidden_states, gates), rtol=1e-5, atol=1e-4)
    published.shared_gates[:] = [gates.flip(0)]
    assert (published(hidden_states) - gated(hidden_states, gates)).abs().max() > 0.1


def test_report_has_a_row_for_each_program_and_each_ratio(arguments):
    programs = dict.fromkeys(ilora.program_names(), 10.0)
    ratios = {"gated_over_plain": 1.11, "gated_over_plain_cpu": 1.0, "published_over_gated": 2.0}
    memory = {"mib": programs, "gated_over_plain": 1.05, "published_over_gated": 3.0}
    results = {
        "setting": vars(arguments) | {"torch": "2"},
        "training_step": ratios
        | {"published_over_gated_cpu": 2.0, "milliseconds": programs, "trained_parameters": dict.fromkeys(programs, 7)},
        "forward_memory": memory,
        "step_memory": memory,
    }
    lines = ilora.report(results).splitlines()
    assert "| gated over plain | 1.11 (CPU time 1.00) | 1.05 | 1.05 | |" in lines
    assert "| published over gated | 2.00 (CPU time 2.00) | 3.00 | 3.00 | |" in lines
    assert "| gated LoRA | 10 | 10 | 10 | 7 |" in lines


def test_programs_start_from_one_loss_and_each_trains(arguments):
    losses = {}
    for name in ilora.program_names():
        step = ilora.TrainingStep(name, arguments)
        losses[name] = [step.program(step.input_ids, step.user_embedding).item()]
        for _ in range(20):
            step()
        losses[name].append(step.program(step.input_ids, step.user_embedding).item())
    assert set(losses) == {"plain_lora", "gated_lora", "published_form", "peft_lora"}
    for before, after in losses.values():
        assert before == pytest.approx(losses["plain_lora"][0], rel=1e-6)
        assert after < before


def test_saved_bytes_count_what_a_forward_keeps(arguments):
    """The published form keeps a (batch, tokens, experts, out) tensor per layer, the gated one a (batch, tokens, rank)
    tensor and its gates of each rank more than the published one."""
    saved = {}
    for name in ("gated_lora", "published_form"):
        step = ilora.TrainingStep(name, arguments)
        saved[name] = step.saved_bytes()
        if name == "gated_lora":
            outputs = [layer.base_layer.out_features for layer in gated_layers(step.program.llm).values()]
    numbers = sum(2 * 12 * arguments.num_experts * out for out in outputs)
    numbers -= len(outputs) * (2 * 12 * arguments.rank + 2 * arguments.rank)
    assert saved["published_form"] - saved["gated_lora"] == 4 * numbers


@pytest.mark.slow
def test_gated_and_plain_lora_need_less_memory_than_the_published_form(tmp_path):
    """Whole benchmark, as it is started, on one small layer."""
    arguments = ilora.ILoraBenchmarkArguments(str(tmp_path), rounds=1, num_layers=1, batch_size=4, tokens=128)
    results = ilora.measure(arguments)
    assert set(results["training_step"]["milliseconds"]) == set(ilora.program_names())
    for kind in ("forward_memory", "step_memory"):
        assert results[kind]["gated_over_plain"] < results[kind]["published_over_gated"]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_experts is 3: expected 2 or more, a divisor of rank 8"):
        ilora.ILoraBenchmarkArguments("out", num_experts=3)
    with pytest.raises(ValueError, match="tokens is 8: expected more than title_tokens, 8"):
        ilora.ILoraBenchmarkArguments("out", tokens=8)
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        ilora.ILoraBenchmarkArguments("out", rounds=0)
