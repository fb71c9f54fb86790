"""The pipeline of an iLoRA: the item head ranks the catalogue, and the likelihoods of titles rank candidates."""

import pytest
import torch
from transformers import pipeline

from tests.models.ilora.ilora_fixtures import TITLES, tiny_model

TASK = "sequential-recommendation"
USERS = [["Toy Story 2", "raw 3"], ["raw 7"], {"history": ["Heat", "Big", "Up"]}]
ITEM_IDS = [[2, 3], [7], [3, 11, 6]]


def ids_and_scores(answers):
    return [each["item_id"] for each in answers], [each["score"] for each in answers]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_item_head_ranks_the_catalogue(batch_size):
    model = tiny_model(item_head="residual")
    pipe = pipeline(TASK, model=model, device="cpu")
    item_ids, scores = model.recommend(ITEM_IDS, top_k=3)
    answers = pipe(USERS, top_k=3, batch_size=batch_size)
    for user, ids, values in zip(answers, item_ids.tolist(), scores.tolist(), strict=True):
        assert ids_and_scores(user) == (ids, pytest.approx(values, abs=1e-4))
        assert [each["title"] for each in user] == [TITLES[item_id - 1] for item_id in ids]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_of_titles_rank_candidates_without_an_item_head(batch_size):
    model = tiny_model()
    pipe = pipeline(TASK, model=model, device="cpu", batch_size=batch_size)
    users = [
        {"history": USERS[0], "candidates": ["raw 9", "Alien", "Toy Story 2", "raw 1"]},  # one is seen
        {"history": USERS[1], "candidates": ["raw 4", "raw 5"]},
        {"history": ["Heat", "Big", "Up"]},
    ]
    answers = pipe(users, candidates=["raw 20", "raw 8", "raw 30"], excluded_items=["raw 8"])
    for user, history, candidates in zip(answers, ITEM_IDS, ([9, 7, 1], [4, 5], [20, 30]), strict=True):
        scores = model.score_candidates(torch.tensor([history]), [candidates])[0].tolist()
        expected = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
        assert ids_and_scores(user) == (
            [item for item, _ in expected],
            pytest.approx([score for _, score in expected], abs=1e-3),
        )
    assert ids_and_scores(pipe(users, top_k=1, candidates=["raw 20"])[1])[0] == ids_and_scores(answers[1])[0][:1]
    with pytest.raises(ValueError, match="no item head, which ranks the catalogue: pass candidates"):
        pipe(USERS)
