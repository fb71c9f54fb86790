"""The best items in chunks, against a sort of all scores by hand."""

import math

import pytest
import torch

from hf_ilora.models.next_item import next_item_head
from hf_ilora.models.next_item import top_k as module
from hf_ilora.models.next_item.top_k import ItemMasks, masked_top_k, ordered_top_k, top_k_in_chunks
from tests.scoring_models import MODELS, sasrec

NUM_ITEMS = 200


def sorted_by_hand(scores: list[float], top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda column: (-scores[column], column))[:top_k]


@pytest.fixture(params=[1, 10**9], ids=["few candidates are sorted", "whole chunks are searched"])
def small_chunks(request, monkeypatch):
    """Chunks of three users and twenty items, so that a tiny catalogue takes many."""
    monkeypatch.setattr(module, "_FEW_SCORES", 0)
    monkeypatch.setattr(module, "_SCORES_AT_ONCE", {"cpu": 60, "other": 60})
    monkeypatch.setattr(module, "_USERS_AT_ONCE", {"cpu": 3, "other": 3})
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(module, "_SCORES_PER_CANDIDATE", request.param)


@pytest.mark.parametrize("values", [3, 1000])  # nearly all scores are equal, or few are
@pytest.mark.parametrize(("width", "top_k"), [(1, 1), (7, 7), (300, 10), (5_000, 40), (17_001, 10), (16_500, 1)])
def test_equal_scores_come_in_the_order_of_their_columns(width, top_k, values):
    scores = torch.randint(0, values, (3, width), generator=torch.Generator().manual_seed(width)).float()
    scores[1, : width // 2] = float("-inf")
    for search in (ordered_top_k, module._top_k_of_blocks):  # the second one is that of a GPU and of wide rows
        best, columns = search(scores, top_k)
        for row in range(3):
            expected = sorted_by_hand(scores[row].tolist(), top_k)
            assert columns[row].tolist() == expected
            assert best[row].tolist() == scores[row, expected].tolist()


def integer_scores(num_users: int, seed: int = 0) -> torch.Tensor:
    """(num_users, NUM_ITEMS + 1) with many ties; padding has the highest score."""
    scores = torch.randint(-9, 10, (num_users, NUM_ITEMS + 1), generator=torch.Generator().manual_seed(seed)).float()
    scores[:, 0] = 50
    return scores


def in_chunks(scores: torch.Tensor, top_k: int, masks: ItemMasks):
    def score_items(users, items, out):
        assert out.numel() <= 60
        out.copy_(scores[users, items])

    return top_k_in_chunks(score_items, len(scores), NUM_ITEMS, top_k, masks, scores.device)


@pytest.mark.parametrize("masked", ["nothing", "hidden", "allowed", "available", "all"])
def test_chunks_give_the_items_of_all_scores(small_chunks, masked):
    scores = integer_scores(8)
    generator = torch.Generator().manual_seed(1)
    hidden, allowed, available = None, None, None
    may_get = [set(range(1, NUM_ITEMS + 1)) for _ in range(8)]
    if masked in ("hidden", "all"):
        hidden = torch.randint(0, NUM_ITEMS + 1, (8, 40), generator=generator)  # twice the same among them
        may_get = [items - set(row) for items, row in zip(may_get, hidden.tolist(), strict=True)]
    if masked in ("allowed", "all"):
        allowed = torch.randint(0, NUM_ITEMS + 1, (8, 120), generator=generator)
        may_get = [items & set(row) for items, row in zip(may_get, allowed.tolist(), strict=True)]
    if masked in ("available", "all"):
        available = torch.rand(NUM_ITEMS + 1, generator=generator) < 0.5
        may_get = [{item for item in items if available[item]} for items in may_get]
    masks = ItemMasks(hidden, allowed, available)
    item_ids, best, log_sum_exp = in_chunks(scores, 10, masks)
    dense_ids, dense_best = masked_top_k(scores, 10, masks)
    for user in range(8):
        expected = sorted(may_get[user], key=lambda item, user=user: (-scores[user, item], item))[:10]
        assert item_ids[user].tolist() == dense_ids[user].tolist() == expected
        assert best[user].tolist() == dense_best[user].tolist() == scores[user, expected].tolist()
    of_items = scores[:, 1:].double().exp().sum(1).log()  # masked items count, padding does not
    torch.testing.assert_close(log_sum_exp.double(), of_items, rtol=1e-6, atol=0)


def test_the_sum_over_the_catalogue_survives_scores_of_any_size(small_chunks):
    scores = torch.linspace(-800, 900, NUM_ITEMS + 1).repeat(2, 1)
    scores[1] = scores[1].flip(0)
    _, _, log_sum_exp = in_chunks(scores, 1, ItemMasks())
    torch.testing.assert_close(log_sum_exp.double(), scores[:, 1:].double().logsumexp(1), rtol=1e-6, atol=0)


def test_scores_that_are_not_finite_and_too_few_items_are_refused(small_chunks):
    scores = integer_scores(4)
    scores[2, 150] = math.nan
    with pytest.raises(ValueError, match="row 2 contain NaN"):
        in_chunks(scores, 3, ItemMasks())
    few = torch.zeros(4, NUM_ITEMS + 1, dtype=torch.int64)
    few[:, :5] = torch.tensor([7, 190, 7, 0, 33])
    with pytest.raises(ValueError, match="top_k is 4, but row 0 has 3 of 200 items left"):
        in_chunks(integer_scores(4), 4, ItemMasks(allowed=few))
    with pytest.raises(ValueError, match="expected 1 to 200"):
        in_chunks(scores, 201, ItemMasks())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("num_users", "by_numpy"), [(1, False), (1, True), (7, False)])
def test_recommend_gives_the_best_of_the_logits(small_chunks, monkeypatch, name, num_users, by_numpy):
    monkeypatch.setattr(next_item_head, "_numpy_is_faster", lambda weight: by_numpy)
    model = MODELS[name](NUM_ITEMS)
    histories = torch.randint(1, NUM_ITEMS + 1, (num_users, 6), generator=torch.Generator().manual_seed(2))
    histories[:, 0] = 0
    item_ids, log_probabilities = model.recommend(histories, top_k=9)
    with torch.no_grad():
        expected = model(histories).logits.log_softmax(1)  # (num_users, NUM_ITEMS + 1)
    for user, history in enumerate(histories.tolist()):
        unseen = [item for item in range(1, NUM_ITEMS + 1) if item not in history]
        best = sorted(unseen, key=lambda item, user=user: -expected[user, item])[:9]
        torch.testing.assert_close(log_probabilities[user], expected[user, best], rtol=1e-5, atol=1e-5)
        of_answers = expected[user, item_ids[user]]  # items that score alike may change places by rounding
        torch.testing.assert_close(of_answers, expected[user, best], rtol=1e-5, atol=1e-5)
        assert len(set(item_ids[user].tolist()) & set(unseen)) == 9


def test_users_without_history_get_popular_items_in_chunks(small_chunks):
    model, ids = sasrec(NUM_ITEMS), torch.arange(1, NUM_ITEMS + 1)
    counts = torch.cat([torch.zeros(1), (ids % 50 + 1).float()])
    model.popular_scores = lambda: counts.log()
    masks = ItemMasks(hidden=torch.tensor([[49, 0], [0, 0], [99, 149]]))
    item_ids, log_probabilities = model.best_items(torch.tensor([[0, 0], [3, 4], [0, 0]]), 2, masks)
    assert item_ids[[0, 2]].tolist() == [[99, 149], [49, 199]]
    torch.testing.assert_close(log_probabilities[[0, 2]], (50 / counts.sum()).log().expand(2, 2))
    alone = model.best_items(torch.tensor([[3, 4]]), 2, ItemMasks())
    torch.testing.assert_close(log_probabilities[1:2], alone[1])


def test_filters_for_all_users_and_for_each_become_masks():
    seen, excluded = torch.tensor([[1, 0], [2, 3]]), torch.tensor([[4], [0]])
    allowed = torch.tensor([1, 2, 3, 4, 5])
    scores = torch.arange(8.0).repeat(2, 1)
    masks = ItemMasks.from_filters(7, seen, allowed, excluded)
    assert masked_top_k(scores, 3, masks)[0].tolist() == [[5, 3, 2], [5, 4, 1]]
    masks = ItemMasks.from_filters(7, None, torch.tensor([[6, 2, 7], [1, 2, 0]]), torch.tensor([7]))
    assert masked_top_k(scores, 2, masks)[0].tolist() == [[6, 2], [2, 1]]
    assert masked_top_k(scores, 1, ItemMasks.from_filters(7))[0].tolist() == [[7], [7]]
