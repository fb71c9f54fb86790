"""Gates that differ between processes give the gradients of one process that sees all rows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_ilora import GatedLoraModel
from tests.distributed.gated_gradients import gated_llm, rows_of


def summed_gradients() -> tuple[GatedLoraModel, nn.Linear]:
    """The model and the router with the gradients of the mean loss over the rows of both processes."""
    gated, router = gated_llm()
    gated.train()
    for rank in range(2):
        input_ids, users = rows_of(rank)
        loss = gated(input_ids, labels=input_ids, expert_gates=router(users).softmax(-1)).loss
        (loss / 2).backward()
    return gated, router


@pytest.mark.slow
def test_two_processes_give_the_mean_of_the_gradients_of_their_rows(launch, tmp_path):
    launch("multi_cpu.yaml", Path(__file__).with_name("launched_gated_lora.py"), tmp_path)
    gated, router = summed_gradients()
    expected = {f"gated.{name}": parameter.grad for name, parameter in gated.trainable_parameters().items()}
    expected |= {f"router.{name}": parameter.grad for name, parameter in router.named_parameters()}
    for rank in range(2):
        found = load_file(tmp_path / f"gradients-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["multi_cpu.yaml", "zero3_cpu.yaml"], ids=["fsdp2", "zero3"])
def test_parameters_that_are_divided_among_processes_learn_and_save_the_same(launch, tmp_path, config):
    launch(config, Path(__file__).with_name("launched_sharded_gated_lora.py"), tmp_path)
    gated, router = summed_gradients()
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {name.removeprefix("base_model."): each for name, each in gated.trainable_parameters().items()}
    state |= torch.load(tmp_path / "router.pt")
    expected |= {f"router.{name}": each for name, each in router.named_parameters()}
    assert state.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(state[name], parameter.data - parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
