"""What all encoders with a head share."""

import pytest
import torch

from tests.scoring_models import MODELS, sasrec

HISTORIES = torch.tensor([[3, 1, 2, 3], [0, 0, 5, 9], [7, 0, 0, 0], [4, 8, 0, 0]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 4)])  # without padding, and with padding on either side
@torch.no_grad()
def test_only_last_has_the_scores_and_the_user_embedding_of_a_whole_forward(name, rows):
    model = MODELS[name](20)
    whole, last = model(HISTORIES[rows]), model(HISTORIES[rows], only_last=True)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if name != "bfloat16" else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(last.logits, whole.logits, **tolerance)
    torch.testing.assert_close(last.user_embedding, whole.user_embedding, **tolerance)
    assert last.last_hidden_state is None


@torch.no_grad()
def test_only_last_reads_the_attention_mask():
    model, mask = sasrec(20), torch.tensor([[1, 1, 0, 0]])
    masked = model(torch.tensor([[4, 8, 5, 6]]), attention_mask=mask, only_last=True)
    torch.testing.assert_close(masked.logits, model(torch.tensor([[4, 8]])).logits)


def test_only_last_refuses_what_it_would_not_read():
    with pytest.raises(ValueError, match="expected no labels"):
        sasrec(20)(HISTORIES, labels=HISTORIES, only_last=True)
