"""A loss that is not finite in one process ends all of them, at the same step and before anything is saved."""

from pathlib import Path

import pytest

from tests.synthetic import cyclic_sequences


@pytest.mark.slow
def test_all_processes_stop_at_the_step_at_which_one_has_such_a_loss(launch, tmp_path):
    cyclic_sequences(num_users=64).save(tmp_path / "data")
    launch("multi_cpu.yaml", Path(__file__).with_name("launched_finite_losses.py"), tmp_path / "data", tmp_path)
    found = [(tmp_path / f"process-{rank}.txt").read_text() for rank in range(2)]
    assert found[0] == found[1] and found[0].startswith("the loss of step 3 is nan, at learning rate 0.001")
    assert not list(tmp_path.rglob("*.safetensors"))
