"""The answers of models to a history, and the items of the history that are near them."""

import numpy as np
import pytest
import torch

from hf_ilora import PopularityConfig, PopularityForNextItem, add_items
from hf_ilora.demo.answers import answer_of
from tests.demo import shelf


def test_the_best_items_come_with_their_probabilities_and_the_nearest_titles_of_the_history():
    model, history = shelf.sasrec(), [6, 1, 2]
    answer = answer_of(model, history, top_k=3)
    vectors = model.head.weight.detach().numpy()
    with torch.no_grad():
        scores = model(torch.tensor([history])).logits[0]
    probabilities = scores[1:].softmax(0).numpy()
    unseen = sorted(set(range(1, 9)) - set(history), key=lambda item: -probabilities[item - 1])
    assert [each.item_id for each in answer.recommendations] == unseen[:3]
    assert [each.rank for each in answer.recommendations] == [1, 2, 3]
    assert {each.item_id for each in answer.recommendations[:2]} == {3, 4}  # the other soaps
    for each in answer.recommendations:
        assert each.probability == pytest.approx(probabilities[each.item_id - 1], rel=1e-4)
        directions = vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True)
        cosines = {item: directions[item - 1] @ directions[each.item_id - 1] for item in history}
        expected = [item for item in sorted(cosines, key=lambda item: -cosines[item])[:2] if cosines[item] > 0]
        assert [item for item, _ in each.nearest] == expected
        assert [near for _, near in each.nearest] == pytest.approx([cosines[item] for item in expected], abs=1e-5)
    assert answer.similarity == "cosine" and answer.milliseconds > 0
    assert answer.expert_gates == [] and answer.notes == []


def test_only_items_that_the_model_reads_are_near():
    history = [1, 2, 5, 6, 7, 8]  # its max_length is 4
    answer = answer_of(shelf.sasrec(), history, top_k=2)
    assert {item for each in answer.recommendations for item, _ in each.nearest} <= {5, 6, 7, 8}


def test_a_counting_model_shows_the_transitions_from_the_history():
    answer = answer_of(shelf.counts(), [5, 1], top_k=2)
    by_item = {each.item_id: each.nearest for each in answer.recommendations}
    assert [item for item, _ in by_item[2]] == [1] and answer.similarity == "weight"
    assert [item for item, _ in answer_of(shelf.counts(), [2, 5], top_k=1).recommendations[0].nearest] == [5]
    backwards = answer_of(shelf.counts(), [2], top_k=7).recommendations
    assert all(each.nearest == [] for each in backwards)  # 1 comes before 2, and nothing after it


def test_popularity_has_no_similar_items():
    model = PopularityForNextItem.fit([[1, 2], [2, 3]], PopularityConfig(num_items=8))
    model.catalogue = shelf.catalogue()
    answer = answer_of(model, [1], top_k=2)
    assert answer.similarity is None and answer.recommendations[0].item_id == 2
    assert all(each.nearest == [] for each in answer.recommendations)


def test_an_ilora_shows_the_gates_of_its_experts(tmp_path):
    model = shelf.ilora(tmp_path)
    answer = answer_of(model, [1, 2], top_k=3)
    assert answer.expert_gates == pytest.approx(model.expert_gates([[1, 2]])[0].tolist())
    assert len(answer.expert_gates) == 3 and sum(answer.expert_gates) == pytest.approx(1)
    assert answer.expert_gates != pytest.approx(answer_of(model, [6], top_k=3).expert_gates)
    assert answer.similarity == "cosine" and answer.recommendations[0].nearest


def test_a_new_item_is_shown_at_its_rank_even_if_it_is_not_among_the_best():
    model = shelf.sasrec()
    add_items(model, [(900, "Lavender soap four")], title_embeddings=vectors_of_titles())
    new = 9
    first = answer_of(model, [1], top_k=7, new_items=[new])
    assert new in [each.item_id for each in first.recommendations[:4]]  # beside the other soaps
    assert len(first.recommendations) == 7
    last = answer_of(model, [5], top_k=1, new_items=[new])
    assert [each.item_id for each in last.recommendations][1:] == [new]
    everything = model.recommend([[5]], top_k=8)[0][0].tolist()
    assert last.recommendations[1].rank == everything.index(new) + 1 > 3
    assert new not in [each.item_id for each in answer_of(model, [new, 5], 1, [new]).recommendations]


def vectors_of_titles() -> torch.Tensor:
    """(10, 3) vectors of padding, of the items of the shelf and of a new soap."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([[1.0, 0, 0]] * 4 + [[0, 1.0, 0]] * 4 + [[1.0, 0, 0]])
    return torch.cat([torch.zeros(1, 3), groups + 0.1 * torch.randn(9, 3, generator=generator)])


def test_items_that_a_model_does_not_know_are_left_out_of_the_history():
    model = shelf.sasrec()
    known, with_new = answer_of(model, [1, 2], 3), answer_of(model, [1, 9, 2], 3, new_items=[9])
    assert with_new.recommendations == known.recommendations
    assert "left out" in with_new.notes[0] and "without training" in with_new.notes[0]


def test_without_a_history_popular_items_are_shown_or_a_title_is_asked_for():
    answer = answer_of(shelf.sasrec(), [], 2)
    assert [each.item_id for each in answer.recommendations] == [2, 5] and "popular" in answer.notes[0]
    answer = answer_of(shelf.sasrec(with_counts=False), [], 2)
    assert answer.recommendations == [] and answer.milliseconds is None and "add a title" in answer.notes[0]


def test_a_history_of_everything_leaves_nothing():
    answer = answer_of(shelf.sasrec(), list(range(1, 9)), 2)
    assert answer.recommendations == [] and "All its items" in answer.notes[0]
    assert len(answer_of(shelf.sasrec(), list(range(1, 8)), 2).recommendations) == 1
