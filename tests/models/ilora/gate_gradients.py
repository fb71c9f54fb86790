"""Gates of three rows, and what they and the adapter get as gradients from one forward or several."""

import torch

GATES = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
OTHER_GATES = GATES.roll(1, dims=1)


def gradients(model: torch.nn.Module, input_ids: torch.Tensor, *all_gates: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of the summed losses of forwards, one per gates, and of the gates; one backward for all.

    The loss of the first gates counts once, that of the second twice. The dropout is the same in every call.
    """
    model.zero_grad()
    all_gates = [gates.clone().requires_grad_() for gates in all_gates]
    torch.manual_seed(0)
    losses = [model(input_ids, labels=input_ids, use_cache=False, expert_gates=gates).loss for gates in all_gates]
    sum(loss * (1 + index) for index, loss in enumerate(losses)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found | {f"gates {index}": gates.grad for index, gates in enumerate(all_gates)}


def check_each_forward_used_its_own_gates(
    both: dict[str, torch.Tensor], first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]
) -> None:
    """Compare the gradients of two forwards before one backward with those of either forward alone."""
    torch.testing.assert_close(both.pop("gates 0"), first["gates 0"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(both.pop("gates 1"), 2 * second["gates 0"], rtol=1e-4, atol=1e-6)
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, first[name] + 2 * second[name], rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.allclose(gradient, 3 * first[name], rtol=1e-3, atol=1e-5), name
