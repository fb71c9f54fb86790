"""Gates that differ between processes give the gradients of one process that sees all rows."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.gated_gradients import gated_llm, rows_of


@pytest.mark.slow
def test_two_processes_give_the_mean_of_the_gradients_of_their_rows(launch, tmp_path):
    launch("multi_cpu.yaml", Path(__file__).with_name("launched_gated_lora.py"), tmp_path)
    gated, router = gated_llm()
    gated.train()
    for rank in range(2):
        input_ids, users = rows_of(rank)
        loss = gated(input_ids, labels=input_ids, expert_gates=router(users).softmax(-1)).loss
        (loss / 2).backward()
    expected = {f"gated.{name}": parameter.grad for name, parameter in gated.trainable_parameters().items()}
    expected |= {f"router.{name}": parameter.grad for name, parameter in router.named_parameters()}
    for rank in range(2):
        found = load_file(tmp_path / f"gradients-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any()
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
