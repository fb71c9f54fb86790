"""How iLoRA answers: generated titles, the item head, and item embeddings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_ilora.models.ilora import answers
from hf_ilora.models.next_item.histories import padded_histories
from tests.models.ilora.ilora_fixtures import (
    CANDIDATES,
    HISTORIES,
    HISTORY_ALONE,
    NUM_ITEMS,
    TITLES,
    fresh_model,
    merged_llm,
    naive_item_logits,
    real,
    recommender,
    text_ids,
    tiny_model,
    tokenizer,
)
from tests.tiny_language_models import ARCHITECTURES, base_llm, llm_with_window


def best_first(scores, candidates=CANDIDATES) -> tuple[torch.Tensor, torch.Tensor]:
    scores, places = scores.sort(dim=1, descending=True)
    return candidates.gather(1, places), scores


# --- generate_recommendation ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_enough_beams_rank_the_candidates_by_likelihood(architecture):
    """With beams and left padding, each sequence must keep the gates of its own user."""
    model = tiny_model(architecture, llm=llm_with_window(architecture))
    answers = model.generate_recommendation(HISTORIES, CANDIDATES, top_k=4, num_beams=8)
    item_ids, scores = best_first(model.score_candidates(HISTORIES, CANDIDATES))
    assert torch.equal(answers.item_ids, item_ids)
    torch.testing.assert_close(answers.scores, scores, rtol=1e-5, atol=1e-4)
    assert answers.texts == [[TITLES[item - 1] for item in row] for row in item_ids.tolist()]
    few = model.generate_recommendation(HISTORIES, CANDIDATES, top_k=2)
    assert few.item_ids.shape == few.scores.shape == (3, 2)
    assert all(set(found) <= set(row) for found, row in zip(few.item_ids.tolist(), CANDIDATES.tolist(), strict=True))


def test_whole_catalogue_as_a_ranked_list():
    model = tiny_model()
    answers = model.generate_recommendation(HISTORIES, top_k=NUM_ITEMS)
    catalogue = torch.arange(1, NUM_ITEMS + 1).expand(3, -1)
    histories_alone = tiny_model(prompt_templates=[HISTORY_ALONE])
    item_ids, scores = best_first(histories_alone.score_candidates(HISTORIES, catalogue), catalogue)
    assert torch.equal(answers.item_ids, item_ids)
    torch.testing.assert_close(answers.scores, scores, rtol=1e-5, atol=1e-4)
    some = model.generate_recommendation(HISTORIES, top_k=5)
    assert some.item_ids.shape == (3, 5)
    assert all(len(set(row)) == 5 and min(row) >= 1 for row in some.item_ids.tolist())
    assert (some.scores.diff(dim=1) <= 0).all()


def test_a_batch_is_answered_as_its_rows_alone():
    model = tiny_model()
    answers = model.generate_recommendation(HISTORIES, CANDIDATES, top_k=3)
    free = model.generate_recommendation(HISTORIES, CANDIDATES, top_k=3, constrained=False, max_new_tokens=6)
    for row in range(3):
        rows = slice(row, row + 1)
        alone = model.generate_recommendation(HISTORIES[rows], CANDIDATES[rows], top_k=3)
        assert torch.equal(alone.item_ids[0], answers.item_ids[row])
        torch.testing.assert_close(alone.scores[0], answers.scores[row], rtol=1e-5, atol=1e-4)
        settings = {"top_k": 3, "constrained": False, "max_new_tokens": 6}
        alone = model.generate_recommendation(HISTORIES[rows], CANDIDATES[rows], **settings)
        assert alone.texts[0] == free.texts[row]
    assert len({str(texts) for texts in free.texts}) == 3


def test_padded_candidates_are_never_answered():
    model = tiny_model()
    padded = torch.tensor([[9, 2, 0, 11], [4, 5, 0, 0], [0, 0, 0, 24]])
    answers = model.generate_recommendation(HISTORIES, padded, top_k=4, num_beams=8)
    item_ids, scores = best_first(model.score_candidates(HISTORIES, padded), padded)
    assert torch.equal(answers.item_ids, item_ids) and (item_ids == 0).sum() == 6
    torch.testing.assert_close(answers.scores, scores, rtol=1e-5, atol=1e-4)


def test_generation_settings_of_the_language_model_do_not_change_likelihoods():
    llm = base_llm()
    llm.generation_config.update(repetition_penalty=2.0, do_sample=True, temperature=0.1, min_length=5, top_k=3)
    answers = tiny_model(llm=llm).generate_recommendation(HISTORIES, CANDIDATES, top_k=4)
    expected = tiny_model().generate_recommendation(HISTORIES, CANDIDATES, top_k=4)
    assert torch.equal(answers.scores, expected.scores)


class Writes(nn.Module):
    """Replaces a language model's head, so that it writes the same text after every prompt."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens, self.step = [*text_ids(text), tokenizer().eos_token_id], 0

    def forward(self, hidden_states):
        logits = torch.full((*hidden_states.shape[:2], 260), -50.0)
        logits[:, -1, self.tokens[self.step]] = 0.0
        self.step += 1
        return logits


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Brazil", [9, 0, 0]),  # only the first row has it among its candidates
        ("I say: BRAZIL!", [9, 0, 0]),
        (" Heat", [0, 0, 3]),
        (" Heat 2", [0, 4, 3]),  # "Heat 2" contains "Heat", the third row's only candidate of the two
        (" Toy Story 2", [0, 0, 0]),  # names both of the first rows' candidates
        (" Brazil or Big", [0, 0, 0]),
        (" nothing of all", [0, 0, 0]),
    ],
)
def test_free_answers_count_when_they_name_exactly_one_candidate(text, expected):
    model = tiny_model()
    model.llm.lm_head = Writes(text)
    candidates = torch.tensor([[9, 2, 11, 1], [4, 1, 20, 2], [24, 8, 0, 3]])
    answers = model.generate_recommendation(HISTORIES, candidates, constrained=False)
    assert answers.texts == [[text.strip()]] * 3
    assert answers.item_ids.tolist() == [[item] for item in expected]
    assert answers.scores is None


@pytest.mark.parametrize(
    ("text", "whole", "first"), [(" Brazil\nBig", 0, 9), (" Brazil", 9, 9), (" my answer:\nBrazil", 9, 0)]
)
def test_the_first_line_of_a_free_answer_counts_alone_if_asked(text, whole, first):
    model = tiny_model()
    candidates = torch.tensor([[9, 2, 11, 1, 4]])
    for first_line_only, expected in ((False, whole), (True, first)):
        model.llm.lm_head = Writes(text)
        settings = {"constrained": False, "first_line_only": first_line_only}
        answers = model.generate_recommendation(HISTORIES[:1], candidates, **settings)
        assert answers.texts == [[text.strip()]] and answers.item_ids.tolist() == [[expected]]


def test_free_answers_may_name_any_item_of_the_catalogue():
    for text, expected in ((" Zelig", 0), (" Amélie", 0), (" Speed", 26), (" 1984", 25)):
        model = tiny_model()
        model.llm.lm_head = Writes(text)
        answers = model.generate_recommendation(HISTORIES[:1], constrained=False)
        assert answers.item_ids.tolist() == [[expected]]  # "Zelig" contains "Z", and "Amélie" contains "M"


def test_free_answers_end_with_the_terminator_or_the_limit():
    model = tiny_model()
    model.llm.lm_head = Writes(" Brazil and then some")
    answers = model.generate_recommendation(HISTORIES, CANDIDATES, constrained=False, max_new_tokens=4)
    assert answers.texts == [["Bra"]] * 3


# --- the item head ---


@pytest.mark.parametrize("item_head", ["residual", "plain"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_item_scores_are_those_of_the_recommenders_head(architecture, item_head):
    model = tiny_model(architecture, item_head=item_head)
    scores = model.item_scores(HISTORIES)
    base = base_llm(architecture)
    expected = torch.stack([naive_item_logits(model, base, real(history)) for history in HISTORIES])
    assert scores.dtype == torch.float32 and not scores.is_inference()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    assert (scores[:, 0] == float("-inf")).all()

    item_ids, distances = model.rank_items(HISTORIES, top_k=5, exclude_seen=False)
    log_p, best = expected.log_softmax(1).topk(5)
    assert torch.equal(item_ids, best)
    torch.testing.assert_close(distances, -log_p, rtol=1e-4, atol=1e-4)


def test_scores_with_everything_a_recommender_can_have():
    sasrec = recommender(head_bias=True, repeat_bias=True, score_temperature=0.5, tie_word_embeddings=False)
    model = tiny_model(sasrec=sasrec, item_head="residual")
    with torch.no_grad():
        model.item_head.projection.weight.zero_()
    scale = model.item_head.log_scale.exp()
    repeats = torch.tensor([[3, 7, 3, 5]])
    torch.testing.assert_close(
        model.item_scores(repeats)[:, 1:], sasrec(repeats).logits[:, 1:] * scale, rtol=1e-4, atol=1e-4
    )


def test_seen_items_are_left_out():
    model = tiny_model(item_head="residual")
    everything, _ = model.rank_items(HISTORIES, top_k=NUM_ITEMS, exclude_seen=False)
    item_ids, distances = model.rank_items(HISTORIES, top_k=26)
    for row, history in enumerate(HISTORIES):
        assert item_ids[row].tolist() == [item for item in everything[row].tolist() if item not in real(history)][:26]
    # distances are those in the whole catalogue, seen items included
    log_p = model.item_scores(HISTORIES).log_softmax(1)
    torch.testing.assert_close(distances, -log_p.gather(1, item_ids))
    with pytest.raises(ValueError, match="26 of 30 items left"):
        model.rank_items(HISTORIES, top_k=27)


def test_a_fresh_residual_head_ranks_as_the_recommender():
    model = fresh_model(item_head="residual").eval()
    histories = torch.tensor([[3, 7, 30, 5, 9, 8, 1, 12], [0, 0, 0, 0, 0, 0, 12, 21]])  # longer than prompt and window
    item_ids, _ = model.rank_items(histories, top_k=10)
    expected, _ = model.recommender.recommend(histories, top_k=10)
    assert torch.equal(item_ids, expected)
    assert not torch.equal(tiny_model(item_head="residual").rank_items(histories, top_k=10)[0], expected)


def test_prompts_show_the_newest_items():
    sasrec = recommender(max_length=4)
    model = tiny_model(sasrec=sasrec, item_head="plain")
    long = torch.tensor([[9, 8, 1, 2, 3, 0], [0, 0, 12, 21, 0, 0]])
    newest = torch.tensor([[8, 1, 2, 3], [12, 21, 0, 0]])
    for method in (model.item_scores, lambda histories: model.score_candidates(histories, CANDIDATES[:2])):
        torch.testing.assert_close(method(long), method(newest), rtol=1e-5, atol=1e-4)


# --- encode_items ---


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_item_embeddings_are_the_mean_states_of_their_titles(architecture):
    model = tiny_model(architecture)
    table = model.encode_items(batch_size=7)
    assert table.shape == (NUM_ITEMS + 1, 32) and table.dtype == torch.float32 and not table.is_inference()
    assert not table[0].any()
    llm = merged_llm(model.llm, torch.full((4,), 0.25), base_llm(architecture))
    for item, title in enumerate(TITLES, start=1):
        with torch.no_grad():
            tokens = torch.tensor([text_ids(" " + title)])
            states = llm(tokens, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(table[item], states.mean(0), rtol=1e-4, atol=1e-4)


def test_results_may_be_used_where_gradients_flow():
    model = tiny_model(item_head="residual")
    results = [
        model.encode_items(),
        model.item_scores(HISTORIES)[:, 1:],
        model.rank_items(HISTORIES, 3)[1],
        model.score_candidates(HISTORIES, CANDIDATES),
        next(iter(model.materialize_lora(HISTORIES[0]).values())),
    ]
    for result in results:
        assert not result.requires_grad
        weight = torch.ones(result.shape[-1], requires_grad=True)
        (result * weight).sum().backward()
        assert weight.grad.any()


METHODS = {
    "item_scores": lambda model, histories: model.item_scores(histories),
    "recommend": lambda model, histories: model.recommend(histories, 3)[1],
    "rank_items": lambda model, histories: model.rank_items(histories, 3)[1],
    "score_candidates": lambda model, histories: model.score_candidates(histories, CANDIDATES.tolist()),
    "generate_recommendation": lambda model, histories: model.generate_recommendation(histories, CANDIDATES).scores,
    "expert_gates": lambda model, histories: model.expert_gates(histories),
    "user_embeddings": lambda model, histories: model.user_embeddings(histories),
    "build_prompts": lambda model, histories: model.build_prompts(histories, CANDIDATES).input_ids,
}


@pytest.mark.parametrize("name", METHODS)
def test_histories_may_be_ragged_lists_arrays_or_tensors_and_are_checked_once(name, monkeypatch):
    model, calls = tiny_model(item_head="residual"), []
    monkeypatch.setattr(answers, "padded_histories", lambda *a: calls.append(a) or padded_histories(*a))
    expected = METHODS[name](model, HISTORIES)
    assert len(calls) == 1
    rows = [real(history) for history in HISTORIES]
    forms = [HISTORIES.tolist(), HISTORIES.numpy(), HISTORIES.int(), rows, [np.array(row) for row in rows]]
    for histories in [*forms, [torch.tensor(row) for row in rows]]:
        torch.testing.assert_close(METHODS[name](model, histories), expected)


def test_users_without_history_get_popular_items_if_these_are_known():
    model = tiny_model(item_head="residual")
    rows = [real(history) for history in HISTORIES]
    with pytest.raises(ValueError, match="history 1 is empty"):
        model.recommend([rows[0], []], 4)
    num_items = len(model.catalogue)
    counts = np.arange(num_items + 1)
    model.catalogue = model.catalogue.with_counts(counts)
    item_ids, scores = model.recommend([rows[0], [], rows[1]], 4)
    assert item_ids[1].tolist() == list(range(num_items, num_items - 4, -1))
    torch.testing.assert_close(scores[1].exp(), torch.arange(num_items, num_items - 4, -1) / counts.sum())
    torch.testing.assert_close(scores[[0, 2]], model.recommend(rows[:2], 4)[1])


def test_recommended_items_come_with_log_probabilities_and_ranked_ones_with_their_negatives():
    model = tiny_model(item_head="residual")
    log_p = model.item_scores(HISTORIES)[:, 1:].log_softmax(1)
    item_ids, scores = model.recommend(HISTORIES, top_k=26)
    torch.testing.assert_close(scores, log_p.gather(1, item_ids - 1))
    assert (scores.diff(dim=1) <= 0).all()
    for row, history in enumerate(HISTORIES):
        assert len(set(item_ids[row].tolist())) == 26 and not set(item_ids[row].tolist()) & set(real(history))
    ranked, distances = model.rank_items(HISTORIES, top_k=26)
    assert torch.equal(ranked, item_ids) and torch.equal(distances, -scores)
    everything, scores = model.recommend(HISTORIES, top_k=NUM_ITEMS, exclude_seen=False)
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(3))
    assert everything.sort(1).values.tolist() == [list(range(1, NUM_ITEMS + 1))] * 3


def test_the_language_models_own_weights_never_change():
    model = tiny_model(item_head="residual")
    before = copy.deepcopy(model.state_dict())
    model.score_candidates(HISTORIES, CANDIDATES)
    model.generate_recommendation(HISTORIES, CANDIDATES)
    model.rank_items(HISTORIES, 3)
    model.encode_items()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_filters_restrict_the_ranking_of_the_catalogue():
    model = tiny_model(item_head="residual")
    ranked, scores = model.recommend(HISTORIES, top_k=NUM_ITEMS, exclude_seen=False)
    allowed = [list(range(4, 20)), list(range(1, NUM_ITEMS + 1)), list(range(9, 25))]
    filters = {"allowed_items": allowed, "excluded_items": [5, 6, 21]}
    item_ids, log_probabilities = model.recommend(HISTORIES, top_k=4, **filters)
    for row, history in enumerate(torch.as_tensor(HISTORIES).tolist()):
        left = set(allowed[row]) - {5, 6, 21} - set(history)
        places = [place for place, item in enumerate(ranked[row].tolist()) if item in left][:4]
        assert item_ids[row].tolist() == ranked[row][places].tolist()
        torch.testing.assert_close(log_probabilities[row], scores[row][places])
    assert torch.equal(model.rank_items(HISTORIES, 4, **filters)[0], item_ids)
    with pytest.raises(ValueError, match="excluded_items contain item 31: expected ids 1"):
        model.recommend(HISTORIES, 4, excluded_items=[NUM_ITEMS + 1])
