"""The best items of rows of logits, without padding and seen items."""

import pytest
import torch

from hf_ilora.models.next_item.next_item_output import top_k_items


def test_top_k_items_equal_a_full_sort():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 51, generator=generator)
    logits[:, 0] = -torch.inf
    histories = torch.randint(0, 51, (20, 12), generator=generator)
    item_ids, scores = top_k_items(logits, histories, 7, exclude_seen=True)
    for user in range(20):
        ordered = sorted(range(1, 51), key=lambda item, user=user: -logits[user, item])
        expected = [item for item in ordered if item not in histories[user]][:7]
        assert item_ids[user].tolist() == expected
        assert scores[user].tolist() == logits[user, expected].tolist()


def test_top_k_items_never_fill_up_with_padding_or_seen_items():
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, 3.0]])
    seen = torch.tensor([[0, 2]])
    assert top_k_items(logits, seen, 2, exclude_seen=True)[0].tolist() == [[3, 1]]
    with pytest.raises(ValueError, match="top_k is 3, but row 0 has 2 of 3 items left"):
        top_k_items(logits, seen, 3, exclude_seen=True)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        top_k_items(logits, seen, 4, exclude_seen=False)


def test_top_k_items_refuse_nan():
    with pytest.raises(ValueError, match="NaN"):
        top_k_items(torch.tensor([[-torch.inf, 1.0, torch.nan]]), torch.tensor([[0]]), 1, exclude_seen=True)
