"""Candidates in the recommender's order, on the model's device and in the collator."""

import torch

from hf_ilora.models.ilora.candidate_order import PreferredOrder, preferred_order
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem


def recommender() -> SASRecForNextItem:
    torch.manual_seed(0)
    model = SASRecForNextItem(SASRecConfig(num_items=30, hidden_size=8, max_length=4)).eval()
    torch.nn.init.normal_(model.model.item_embedding.weight)
    return model


def test_candidates_are_sorted_by_descending_score_with_padding_last():
    model = recommender()
    histories = torch.tensor([[0, 3, 5, 7, 9, 11], [1, 2, 3, 0, 0, 0]])  # the first is longer than the model reads
    candidates = torch.tensor([[4, 20, 0, 8, 30], [12, 13, 14, 15, 16]])
    ordered = preferred_order(model, histories, candidates)
    for row in range(2):
        history = histories[row][histories[row] > 0][-4:]
        scores = model(input_ids=history[None]).logits[0]
        real = [item for item in candidates[row].tolist() if item]
        expected = sorted(real, key=lambda item: -scores[item].item())
        assert ordered[row].tolist() == expected + [0] * (5 - len(real))
        assert expected != real  # the given order is another one


def test_the_copy_for_collating_orders_alike_and_does_not_follow_the_original():
    model = recommender()
    histories, candidates = torch.tensor([[1, 2, 3]]), torch.arange(5, 25)[None]
    copy = PreferredOrder(model)
    expected = preferred_order(model, histories, candidates)
    assert torch.equal(copy(histories, candidates), expected)
    torch.nn.init.normal_(model.model.item_embedding.weight)
    assert not torch.equal(preferred_order(model, histories, candidates), expected)
    assert torch.equal(copy(histories, candidates), expected)
