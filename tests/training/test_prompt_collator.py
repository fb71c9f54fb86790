"""Batches of prompts: their padding, their templates by draw, and whether they show candidates."""

import pickle
import time

import numpy as np
import pytest
import torch

from hf_ilora.models.ilora.prompts import PromptBuilder
from hf_ilora.models.ilora.title_tokens import TitleTokens
from hf_ilora.training.prompt_collator import PromptCollator
from tests.tiny_tokenizers import byte_level

TEMPLATES = ["0 {history}; {candidates}:", "1 {history}; {candidates}:", "2 {history}:", "3 {history}:", "4 {history}:"]


def builder_of(templates=TEMPLATES, num_items: int = 30) -> PromptBuilder:
    tokenizer = byte_level()
    return PromptBuilder(tokenizer, TitleTokens(tokenizer, [f"Item {i}" for i in range(1, num_items + 1)]), templates)


def row(history, target, candidates, uniforms=(0.0, 0.0)) -> dict:
    return {
        "history": np.array(history),
        "target": target,
        "candidates": np.array(candidates),
        "uniforms": np.array(uniforms),
    }


def first_characters(batch) -> list[str]:
    """The number at the start of each row's template."""
    first = batch["attention_mask"].argmax(dim=1, keepdim=True)
    return byte_level().convert_ids_to_tokens(batch["input_ids"].gather(1, first).squeeze(1).tolist())


def test_a_batch_holds_the_prompts_and_what_they_were_made_of():
    rows = [row([4, 5, 6], 7, [7, 8]), row([9], 2, [3, 2])]
    builder = builder_of()
    batch = PromptCollator(builder)(rows)
    prompts = builder.build([[4, 5, 6], [9, 0, 0]], [[7, 8], [3, 2]], targets=[7, 2])
    for name in ("input_ids", "attention_mask", "placeholder_items"):
        assert torch.equal(batch.pop(name), getattr(prompts, name))
    assert torch.equal(batch["title_labels"], prompts.title_labels[:, -batch["title_labels"].shape[1] :])
    assert (prompts.title_labels[:, : -batch["title_labels"].shape[1]] == -100).all()
    decoded = [byte_level().decode(labels[labels != -100]) for labels in batch.pop("title_labels")]
    assert decoded == [" Item 7</s>", " Item 2</s>"]
    assert batch.pop("histories").tolist() == [[4, 5, 6], [0, 0, 9]]
    assert batch.pop("labels").tolist() == [7, 2]
    assert batch.pop("shows_candidates").tolist() == [True, True]
    assert not batch


def test_labels_are_as_long_as_the_longest_title_of_the_batch():
    labels = PromptCollator(builder_of())([row([1], 2, [2, 3]), row([1, 4], 12, [12, 3])])["title_labels"]
    assert labels.shape == (2, len(" Item 12") + 1)
    assert (labels[:, 0] == -100).tolist() == [True, False] and (labels[:, 1:] != -100).all()


def test_the_first_number_picks_the_template_among_those_of_the_rows_kind():
    uniforms = [(0.0, 0.1), (0.49, 0.1), (0.5, 0.1), (0.999, 0.1), (0.0, 0.9), (0.33, 0.9), (0.34, 0.9), (0.999, 0.9)]
    batch = PromptCollator(builder_of(), candidate_fraction=0.5)([row([1], 2, [2, 3], draw) for draw in uniforms])
    assert first_characters(batch) == list("00112234")
    assert batch["shows_candidates"].tolist() == [True] * 4 + [False] * 4
    assert (batch["placeholder_items"] != 0).sum(dim=1).tolist() == [3] * 4 + [1] * 4


def test_the_fraction_of_rows_with_candidates_may_change():
    collator = PromptCollator(builder_of(), candidate_fraction=0.0)
    rows = [row([1], 2, [2, 3], (0.2, draw)) for draw in (0.0, 0.3, 0.999)]
    shown = []
    for share in (0.0, 0.3, 0.5, 1.0):
        collator.candidate_fraction = share
        shown.append(collator(rows)["shows_candidates"].tolist())
    assert shown == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]


def test_worker_processes_can_be_given_the_collator():
    collator = PromptCollator(builder_of())
    rows = [row([1, 2], 4, [4, 3])]
    batch, copied = collator(rows), pickle.loads(pickle.dumps(collator))(rows)
    assert all(torch.equal(batch[name], copied[name]) for name in batch)


def test_a_fraction_that_the_templates_cannot_serve_is_refused():
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"candidate_fraction is {share}: expected a fraction in \[0, 1\]"):
            PromptCollator(builder_of(), share)
    with pytest.raises(ValueError, match=r"is 1\.0 and no template is with \{candidates\}: add one.*to 0"):
        PromptCollator(builder_of(["{history}"]))
    with pytest.raises(ValueError, match=r"is 0\.5 and no template is without \{candidates\}: add one.*to 1"):
        PromptCollator(builder_of(["{history} {candidates}"]), 0.5)
    PromptCollator(builder_of(["{history}"]), 0.0)


def test_candidates_without_the_target_are_refused():
    with pytest.raises(ValueError, match=r"candidates of row 1 lack its target 4"):
        PromptCollator(builder_of())([row([1], 2, [2, 3]), row([1], 4, [2, 3])])


def test_prompts_whose_candidates_are_scored_end_before_the_title():
    rows = [row([1], 2, [2, 3]), row([1, 3], 4, [5, 4])]
    scored = PromptCollator(builder_of(), scores_candidates=True)(rows)
    assert scored["candidates"].tolist() == [[2, 3], [5, 4]] and "title_labels" not in scored
    titled = PromptCollator(builder_of())(rows)
    for index, title in enumerate((" Item 2</s>", " Item 4</s>")):
        prompt, whole = (
            batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist() for batch in (scored, titled)
        )
        assert whole[: len(prompt)] == prompt and byte_level().decode(whole[len(prompt) :]) == title


def test_thousands_of_prompts_are_put_together_in_a_second():
    """10 titles seen and 20 to choose from; tokenising them in each batch would take a hundred times as long."""
    generator = np.random.default_rng(0)
    collator = PromptCollator(builder_of(num_items=500))
    rows = []
    for _ in range(32):
        candidates = generator.permutation(500)[:20] + 1
        rows.append(row(generator.integers(1, 501, 10), candidates[0], candidates, generator.random(2)))
    collator(rows)
    started = time.process_time()
    for _ in range(40):
        collator(rows)
    assert 40 * 32 / (time.process_time() - started) > 4000
