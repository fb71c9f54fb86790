"""The item head's query, by hand."""

import pytest
import torch

from hf_ilora.models.ilora.item_head import ItemHead

STATES = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
USERS = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize("residual", [True, False])
def test_query_is_the_projected_direction_of_the_state(residual):
    head = ItemHead(2, 3, residual)
    with torch.no_grad():
        head.projection.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0], [10.0, 10.0]]))
        head.log_scale.fill_(0.7)
    queries, scale = head(STATES, USERS)
    # directions (0.6, 0.8) and (0, -1)
    expected = torch.tensor([[3.0, 4.0, 14.0], [0.0, -5.0, -10.0]])
    torch.testing.assert_close(queries, expected + USERS if residual else expected)
    torch.testing.assert_close(scale, torch.tensor(0.7).exp())


def test_length_of_the_state_does_not_count():
    head = ItemHead(2, 3, residual=True)
    torch.nn.init.normal_(head.projection.weight)
    torch.testing.assert_close(head(STATES * 100, USERS)[0], head(STATES, USERS)[0])


def test_a_fresh_head_changes_nothing_and_can_learn():
    head = ItemHead(2, 3, residual=True)
    queries, scale = head(STATES, USERS)
    assert torch.equal(queries, USERS) and scale == 1
    (queries * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert head.projection.weight.grad.abs().sum() > 0
    assert not ItemHead(2, 3, residual=False)(STATES, USERS)[0].any()


def test_states_of_a_bfloat16_language_model_are_taken():
    queries, _ = ItemHead(2, 3, residual=True)(STATES.to(torch.bfloat16), USERS)
    assert queries.dtype == torch.float32
