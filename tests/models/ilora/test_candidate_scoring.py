"""Likelihoods of candidates against one forward for each, without padding, cache or mask."""

import re

import pytest
import torch

from hf_ilora.models.ilora import candidate_scoring
from hf_ilora.models.ilora.candidate_scoring import candidate_log_likelihoods, packed_log_likelihoods
from tests.models.ilora.ilora_fixtures import (
    CANDIDATES,
    HISTORIES,
    HISTORY_ALONE,
    WITH_CANDIDATES,
    naive_log_p,
    real,
    text_ids,
    tiny_model,
)
from tests.tiny_language_models import ARCHITECTURES, base_llm, llm_with_window


def naive_scores(model, base, candidates=CANDIDATES, shown: bool = True) -> torch.Tensor:
    """(batch, candidates), a forward for each candidate."""
    rows = [
        [naive_log_p(model, base, real(history), real(row) if shown else None, item) for item in row.tolist()]
        for history, row in zip(HISTORIES, candidates, strict=True)
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("shown", [True, False], ids=["candidates shown", "history alone"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_those_of_each_candidate_alone(architecture, shown):
    templates = [WITH_CANDIDATES, HISTORY_ALONE] if shown else [HISTORY_ALONE]
    model = tiny_model(architecture, llm=llm_with_window(architecture), prompt_templates=templates)
    scores = model.score_candidates(HISTORIES, CANDIDATES)
    assert scores.dtype == torch.float32 and not scores.is_inference()
    torch.testing.assert_close(
        scores, naive_scores(model, llm_with_window(architecture), shown=shown), rtol=1e-5, atol=1e-4
    )
    other_user = model.score_candidates(HISTORIES.roll(1, 0), CANDIDATES)
    assert (scores - other_user).abs().min() > 1e-3


def test_eager_attention_scores_the_same():
    llm = llm_with_window("gemma3")
    llm.set_attn_implementation("eager")
    scores = tiny_model("gemma3", llm=llm).score_candidates(HISTORIES, CANDIDATES)
    expected = tiny_model("gemma3", llm=llm_with_window("gemma3")).score_candidates(HISTORIES, CANDIDATES)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("max_logits", [1, 260 * 3 * 12 * 2])
def test_scores_do_not_depend_on_how_candidates_are_divided(architecture, max_logits, monkeypatch):
    model = tiny_model(architecture, llm=llm_with_window(architecture))
    expected = model.score_candidates(HISTORIES, CANDIDATES)
    forwards = []
    model.llm.register_forward_hook(lambda *_: forwards.append(1))
    model.score_candidates(HISTORIES, CANDIDATES)
    assert len(forwards) == 2  # the prompt, and all titles at once
    monkeypatch.setattr(candidate_scoring, "_MAX_LOGITS", max_logits)
    forwards.clear()
    divided = model.score_candidates(HISTORIES, CANDIDATES)
    assert len(forwards) == (5 if max_logits == 1 else 3)
    torch.testing.assert_close(divided, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_all_titles_together_may_be_longer_than_the_window(architecture):
    """Only the prompt and the longest title must fit."""
    expected = tiny_model(architecture, llm=llm_with_window(architecture)).score_candidates(HISTORIES, CANDIDATES)
    lengths = []
    model = tiny_model(architecture, llm=llm_with_window(architecture, window=100))
    model.llm.register_forward_hook(lambda *call: lengths.append(call[2].logits.shape[1]))
    prompt = model.build_prompts(HISTORIES, CANDIDATES).input_ids.shape[1]
    scores = model.score_candidates(HISTORIES, CANDIDATES)
    assert prompt + 12 <= 100 < prompt + lengths[1]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_rows_and_candidates_do_not_touch_each_other():
    model = tiny_model(prompt_templates=[HISTORY_ALONE])
    scores = model.score_candidates(HISTORIES, CANDIDATES)
    for row in range(3):
        alone = model.score_candidates(HISTORIES[row : row + 1], CANDIDATES[row : row + 1])
        torch.testing.assert_close(alone[0], scores[row], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        model.score_candidates(HISTORIES, CANDIDATES.flip(1)).flip(1), scores, rtol=1e-5, atol=1e-4
    )


def test_padding_among_candidates_is_never_chosen():
    """Nothing is certain: a title without tokens would have log p 0, the best of all."""
    model = tiny_model()
    padded = torch.tensor([[9, 2, 0, 11], [4, 5, 0, 0], [0, 0, 0, 24]])
    scores = model.score_candidates(HISTORIES, padded)
    assert torch.equal(scores == float("-inf"), padded == 0)
    for row in range(3):
        alone = model.score_candidates(HISTORIES[row : row + 1], padded[row][padded[row] != 0][None])[0]
        torch.testing.assert_close(scores[row][padded[row] != 0], alone, rtol=1e-5, atol=1e-4)


def test_bfloat16_language_model_scores_alike():
    model = tiny_model(llm=base_llm().to(torch.bfloat16))
    scores, expected = (m.score_candidates(HISTORIES, CANDIDATES) for m in (model, tiny_model()))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.03, atol=0.5)
    assert torch.equal(scores.argmax(1), expected.argmax(1))


def test_scoring_in_training_mode_is_scoring_in_evaluation_mode():
    model = tiny_model(lora_dropout=0.5)
    expected = model.score_candidates(HISTORIES, CANDIDATES)
    model.train()
    assert torch.equal(model.score_candidates(HISTORIES, CANDIDATES), expected)
    assert model.training and model.llm.training and not model.recommender.training
    with pytest.raises(ValueError, match="is empty"):
        model.score_candidates(HISTORIES * 0, CANDIDATES)
    assert model.training


def test_ids_may_be_int32():
    model = tiny_model()
    expected = model.score_candidates(HISTORIES, CANDIDATES)
    assert torch.equal(model.score_candidates(HISTORIES.int(), CANDIDATES.int()), expected)


# --- what is refused ---


def ask(model, **changes):
    prompts = model.build_prompts(HISTORIES, CANDIDATES)
    arguments = {
        "llm": model.llm,
        "inputs_embeds": model.embed_prompts(prompts.input_ids, prompts.placeholder_items),
        "attention_mask": prompts.attention_mask,
        "expert_gates": model.expert_gates(HISTORIES),
        "title_tokens": model.title_tokens,
        "candidates": CANDIDATES,
    }
    return candidate_log_likelihoods(**arguments | changes)


def test_other_attention_is_refused():
    model = tiny_model()
    model.llm.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation is flex_attention: expected one of sdpa, eager"):
        model.score_candidates(HISTORIES, CANDIDATES)


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_windows_shorter_than_prompt_and_title_are_refused(architecture):
    length = int(tiny_model(prompt_templates=[HISTORY_ALONE]).build_prompts(HISTORIES).input_ids.shape[1])
    longest = len(text_ids(" Toy Story 2"))
    fits, short = (
        tiny_model(architecture, llm=llm_with_window(architecture, window=window), prompt_templates=[HISTORY_ALONE])
        for window in (length + longest, length + longest - 1)
    )
    expected = tiny_model(architecture, llm=llm_with_window(architecture), prompt_templates=[HISTORY_ALONE])
    torch.testing.assert_close(
        fits.score_candidates(HISTORIES, CANDIDATES), expected.score_candidates(HISTORIES, CANDIDATES)
    )
    message = f"have {length + longest} tokens: expected at most {length + longest - 1}, the sliding window"
    with pytest.raises(ValueError, match=message):
        short.score_candidates(HISTORIES, CANDIDATES)


def test_titles_that_do_not_fit_into_the_context_are_refused():
    model = tiny_model()
    prompt = model.build_prompts(HISTORIES, CANDIDATES).input_ids.shape[1]
    model.llm.config.max_position_embeddings = prompt + 11
    with pytest.raises(ValueError, match=f"{prompt + 12} tokens: expected at most {prompt + 11}, the context"):
        ask(model)
    model.llm.config.max_position_embeddings = prompt + 12
    ask(model)


def test_padding_alone_is_no_candidate():
    with pytest.raises(ValueError, match=re.escape("candidates of shape (3, 4) are all padding")):
        ask(tiny_model(), candidates=CANDIDATES * 0)


def packed(model, candidates=CANDIDATES):
    """The scores (batch, candidates) of the prompts that `score_candidates` would build, and the last states."""
    prompts = model.build_prompts(HISTORIES, candidates)
    embeddings = model.embed_prompts(prompts.input_ids, prompts.placeholder_items)
    gates = model.expert_gates(HISTORIES)
    return packed_log_likelihoods(
        model.llm, model.title_tokens, candidates, embeddings, prompts.attention_mask, gates, with_states=True
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_scores_are_those_of_the_shared_prompt(architecture):
    model = tiny_model(architecture, llm=llm_with_window(architecture))
    scores, states = packed(model)
    torch.testing.assert_close(scores, model.score_candidates(HISTORIES, CANDIDATES), rtol=1e-5, atol=1e-4)
    assert states.shape == (len(HISTORIES), model.llm_size)
    some = CANDIDATES.clone()
    some[0, -1] = 0
    assert packed(model, some)[0][0, -1] == float("-inf")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_candidate_loss_are_those_of_forwards_one_by_one(checkpointing):
    torch.manual_seed(0)
    model = tiny_model(
        "llama", llm=llm_with_window("llama"), candidate_loss_weight=1.0, language_loss_weight=0.3
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    targets = CANDIDATES[:, 1]
    prompts = model.build_prompts(HISTORIES, CANDIDATES)
    parts = {"attention_mask": prompts.attention_mask, "placeholder_items": prompts.placeholder_items}
    output = model(prompts.input_ids, histories=HISTORIES, candidates=CANDIDATES, labels=targets, **parts)
    output.loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()

    columns = []
    for column in range(CANDIDATES.shape[1]):
        rows = model.prompts.build(HISTORIES, CANDIDATES, targets=CANDIDATES[:, column])
        logits = model(
            rows.input_ids, attention_mask=rows.attention_mask, placeholder_items=rows.placeholder_items,
            histories=HISTORIES,
        ).logits  # fmt: skip
        labels = rows.title_labels[:, 1:]
        log_p = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        columns.append((log_p * labels.ne(-100)).sum(1))
    scores = torch.stack(columns, dim=1)  # (batch, candidates)
    chosen = torch.full((len(scores),), 1)
    candidate_loss = torch.nn.functional.cross_entropy(scores, chosen)
    language_loss = -scores[:, 1].mean()
    torch.testing.assert_close(output.candidate_loss, candidate_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.language_loss, language_loss, rtol=1e-4, atol=1e-5)
    (candidate_loss + 0.3 * language_loss).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


def test_candidates_are_scored_by_a_pool_with_the_recommender():
    model = tiny_model(recommender_weight=0.75, candidate_loss_weight=1.0)
    pooled = model.score_candidates(HISTORIES, CANDIDATES)
    model.config.recommender_weight = 0.0
    by_title = model.score_candidates(HISTORIES, CANDIDATES)
    with torch.no_grad():
        log_p = model.recommender(HISTORIES).logits.log_softmax(-1).gather(1, CANDIDATES)
    torch.testing.assert_close(pooled, 0.75 * log_p + 0.25 * by_title)
    assert not torch.equal(pooled.argsort(1), by_title.argsort(1))
    assert model.score_candidates(HISTORIES, torch.cat([CANDIDATES[:, :2], torch.zeros_like(CANDIDATES)], 1))[0, 2] == (
        float("-inf")
    )


def test_the_candidate_loss_is_that_of_the_pool_and_the_language_loss_is_not():
    model = tiny_model(recommender_weight=0.75, candidate_loss_weight=1.0)
    prompts = model.build_prompts(HISTORIES, CANDIDATES)
    batch = {
        "input_ids": prompts.input_ids,
        "attention_mask": prompts.attention_mask,
        "placeholder_items": prompts.placeholder_items,
        "candidates": CANDIDATES,
        "labels": CANDIDATES[:, 1],
    }
    with torch.no_grad():
        output = model(histories=HISTORIES, **batch)
    chosen = torch.full((len(HISTORIES),), 1)
    expected = torch.nn.functional.cross_entropy(model.score_candidates(HISTORIES, CANDIDATES), chosen)
    torch.testing.assert_close(output.candidate_loss, expected, rtol=1e-4, atol=1e-4)
    model.config.recommender_weight = 0.0
    by_title = model.score_candidates(HISTORIES, CANDIDATES)[:, 1]
    torch.testing.assert_close(output.language_loss, -by_title.mean(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected histories; pass them besides expert_gates"):
        model.config.recommender_weight = 0.75
        model(expert_gates=model.expert_gates(HISTORIES), **batch)
