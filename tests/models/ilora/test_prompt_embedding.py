"""Embeddings at the placeholders of a prompt, against a loop over tokens."""

import re

import pytest
import torch

from hf_ilora.models.ilora.prompt_embedding import PromptEmbedding, check_placeholders
from hf_ilora.models.ilora.prompts import CANDIDATE_PLACEHOLDER_ID as C
from hf_ilora.models.ilora.prompts import HISTORY_PLACEHOLDER_ID as H

INPUT_IDS = torch.tensor([[5, H, 6, H, C, 7], [0, 0, 8, C, 9, 9], [4, 4, 4, 4, 4, 4]])
ITEMS = torch.tensor([[3, 1, 2], [2, 0, 0], [0, 0, 0]])
ITEM_SIZE, LLM_SIZE = 4, 6


def parts(seed=0):
    torch.manual_seed(seed)
    embedding = PromptEmbedding(ITEM_SIZE, LLM_SIZE, initializer_range=1.0)
    return embedding, torch.randn(3, 6, LLM_SIZE), torch.randn(10, ITEM_SIZE)


def naive(embedding, tokens, input_ids, items, table):
    """One token after the other."""
    result = tokens.clone()
    for row in range(len(input_ids)):
        waiting = items[row].tolist()
        for place, token in enumerate(input_ids[row].tolist()):
            if token < 0:
                item = waiting.pop(0)
                plain = embedding.plain[0 if token == H else 1]
                result[row, place] = embedding.projector(table[item]) if item else plain
    return result


@pytest.mark.parametrize(
    "items",
    [ITEMS, ITEMS * 0, torch.tensor([[3, 0, 2], [0, 0, 0], [0, 0, 0]])],
    ids=["all carry an item", "none does", "some do"],
)
def test_placeholders_are_filled_in_their_order_and_nothing_else_changes(items):
    embedding, tokens, table = parts()
    result = embedding(tokens, INPUT_IDS, items, table[items])
    torch.testing.assert_close(result, naive(embedding, tokens, INPUT_IDS, items, table))
    assert torch.equal(result[INPUT_IDS >= 0], tokens[INPUT_IDS >= 0])
    assert not torch.isclose(result[INPUT_IDS < 0], tokens[INPUT_IDS < 0]).any()


def test_the_values_at_placeholders_do_not_count():
    embedding, tokens, table = parts()
    expected = embedding(tokens, INPUT_IDS, ITEMS, table[ITEMS])
    tokens[INPUT_IDS < 0] += 100
    assert torch.equal(embedding(tokens, INPUT_IDS, ITEMS, table[ITEMS]), expected)


def test_gradients_reach_the_parts_that_were_used():
    embedding, tokens, table = parts()
    embedding(tokens, INPUT_IDS, ITEMS, table[ITEMS]).sum().backward()
    assert embedding.projector[0].weight.grad.any() and not embedding.plain.grad.any()
    embedding.zero_grad()
    items = torch.tensor([[3, 1, 0], [2, 0, 0], [0, 0, 0]])  # a candidate without its item
    embedding(tokens, INPUT_IDS, items, table[items]).sum().backward()
    assert embedding.plain.grad.any(1).tolist() == [False, True]


def test_result_has_the_dtype_of_the_language_model():
    embedding, tokens, table = parts()
    expected = embedding(tokens, INPUT_IDS, ITEMS, table[ITEMS])
    result = embedding(tokens.to(torch.bfloat16), INPUT_IDS, ITEMS, table[ITEMS])
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0.01, atol=0.01)


def test_counts_of_placeholders_and_items_must_agree():
    check_placeholders(INPUT_IDS, ITEMS)
    check_placeholders(INPUT_IDS[2:], ITEMS[2:, :0])
    for items, row, found, expected in (
        ([[3, 1, 0], [2, 0, 0], [0, 0, 0]], 0, 3, 2),
        ([[3, 1, 2], [2, 1, 0], [0, 0, 0]], 1, 1, 2),
        ([[3, 1, 2], [2, 0, 0], [7, 0, 0]], 2, 0, 1),
    ):
        message = f"row {row} has {found} placeholders for {expected} items: expected equal numbers"
        with pytest.raises(ValueError, match=re.escape(message)):
            check_placeholders(INPUT_IDS, torch.tensor(items))
