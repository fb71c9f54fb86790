"""Prompts against whole texts that the tokenizer reads itself, and against a loop over rows."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_ilora.models.ilora.prompts import (
    CANDIDATE_PLACEHOLDER_ID,
    HISTORY_PLACEHOLDER_ID,
    PromptBuilder,
    Prompts,
    read_templates,
)
from hf_ilora.models.ilora.title_tokens import TitleTokens
from tests.paths import RECIPES
from tests.tiny_tokenizers import FAMILIES, TEMPLATES, TITLES, byte_level, byte_level_bpe, word_piece

PROMPT_FILES = sorted((RECIPES / "prompts").glob("*.txt"))
HISTORIES = [[0, 0, 4, 9], [1, 2, 10, 5], [8, 0, 0, 0]]
CANDIDATES = [[1, 2, 3, 0], [15, 9, 6, 7], [11, 13, 12, 8]]
TARGETS = [3, 6, 12]


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


def builder_of(tokenizer, templates=TEMPLATES, titles=TITLES, **settings) -> PromptBuilder:
    return PromptBuilder(tokenizer, TitleTokens(tokenizer, titles), templates, **settings)


def pieces(texts: list[str]) -> str:
    return "".join("".join(texts).lower().split())


# --- the tokens ---


def test_supervised_tokens_decode_to_exactly_the_target_and_nothing_else_is_supervised(tokenizer):
    """Five families of tokenizers, with and without bos and pad token: no label may depend on their quirks."""
    builder = builder_of(tokenizer)
    for item, title in enumerate(TITLES, start=1):
        candidates = [[item, 1 + item % len(TITLES)], [1 + item % len(TITLES), item]]
        prompts = builder.build([[0, 4], [5, 6]], candidates, template_indices=[0, 1], targets=[item, item])
        for input_ids, labels, mask in zip(
            prompts.input_ids, prompts.title_labels, prompts.attention_mask, strict=True
        ):
            supervised = labels != -100
            assert (input_ids[supervised] == labels[supervised]).all()
            assert supervised.tolist() == sorted(supervised.tolist()), "the title is the end of the prompt"
            assert mask[supervised].all()
            *written, last = labels[supervised].tolist()
            assert last == builder.title_tokens.terminator_id and last not in written
            text = tokenizer.decode(written, clean_up_tokenization_spaces=False)
            if tokenizer.sep_token:  # WordPiece: lower case, no accents, spaces around all marks
                normal = tokenizer.backend_tokenizer.normalizer.normalize_str(title)
                assert pieces([text]) == pieces([normal])
            else:
                assert text.strip() == title.strip()


def test_a_prompt_is_what_the_tokenizer_makes_of_the_whole_text(tokenizer):
    """Pieces that were tokenised apart must read as one text: bos in front, one space before each title."""
    builder = builder_of(tokenizer, placeholders=False)
    show = torch.tensor([True, True, False])
    prompts = builder.build(HISTORIES, CANDIDATES, [0, 1, 0], show, TARGETS)
    for row, template in enumerate(TEMPLATES):
        history, shown = (", ".join(TITLES[i - 1].strip() for i in ids[row] if i) for ids in (HISTORIES, CANDIDATES))
        text = template.replace(" {", "{").replace("{history}", f" {history}").replace("{candidates}", f" {shown}")
        whole = tokenizer(f"{text.rstrip()} {TITLES[TARGETS[row] - 1].strip()}")["input_ids"]
        real = prompts.input_ids[row][prompts.attention_mask[row].bool()].tolist()
        assert real == [*whole[: len(real) - 1], builder.title_tokens.terminator_id]
        assert len(whole) in (len(real) - 1, len(real)), "some tokenizers put eos or sep behind a text"
        assert prompts.placeholder_items.shape == (3, 0)


def test_bos_comes_first_and_once(tokenizer):
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    templates = ["Seen {history}. Answer:"]
    if bos is not None:
        # a chat format writes it out
        templates.append(tokenizer.convert_ids_to_tokens(bos) + "Seen {history}. Answer:")
    prompts = builder_of(tokenizer, templates).build([[1]] * len(templates), template_indices=range(len(templates)))
    for input_ids in prompts.input_ids.tolist():
        assert input_ids[:1] == [bos] if bos is not None else input_ids[0] not in tokenizer.all_special_ids
        assert input_ids.count(bos) == (bos is not None)


def test_padding_is_on_the_left_and_needs_no_pad_token(tokenizer):
    builder = builder_of(tokenizer)
    expected = tokenizer.pad_token_id if tokenizer.pad_token else builder.title_tokens.terminator_id
    prompts = builder.build([[1, 6, 7], [13, 0, 0]], targets=[1, 2])
    lengths = prompts.attention_mask.sum(dim=1)
    assert lengths[0] == prompts.input_ids.shape[1] > lengths[1]
    padding = int(lengths[0] - lengths[1])
    assert prompts.attention_mask[1].tolist() == [0] * padding + [1] * int(lengths[1])
    assert prompts.input_ids[1, :padding].tolist() == [expected] * padding
    assert (prompts.title_labels[1, :padding] == -100).all()
    alone = builder.build([[13]], targets=[2])
    assert prompts.input_ids[1, padding:].tolist() == alone.input_ids[0].tolist()
    assert prompts.title_labels[1, padding:].tolist() == alone.title_labels[0].tolist()


def test_a_template_may_begin_with_a_title_or_have_no_space_before_one(tokenizer):
    builder = builder_of(tokenizer, ["{history}\n{candidates}"], placeholders=False)
    prompts = builder.build([[1]], [[13, 3]], targets=[3])
    title = [builder.title_tokens.sequence(item)[:-1] for item in (1, 13, 3)]
    end = builder.title_tokens.sequence(3)
    real = prompts.input_ids[0].tolist()
    first = real.index(title[0][0])
    assert first <= 1 and real[first : first + len(title[0])] == title[0]
    assert real[-len(end) :] == end and real[-len(end) - len(title[2]) : -len(end)] == title[2]


def test_a_title_that_begins_another_is_told_apart_by_its_end():
    tokenizer = byte_level()
    builder = builder_of(tokenizer)
    labels = builder.build([[4], [4]], [[1, 2], [1, 2]], targets=[1, 2]).title_labels
    short, long = (row[row != -100].tolist() for row in labels)
    assert tokenizer.decode(short) == " Toy Story</s>" and tokenizer.decode(long) == " Toy Story 2</s>"


# --- placeholders ---


def readable(builder: PromptBuilder, tokenizer, row: list[int]) -> str:
    marks = {HISTORY_PLACEHOLDER_ID: "[H]", CANDIDATE_PLACEHOLDER_ID: "[C]"}
    return "".join(marks.get(token) or tokenizer.decode([token]) for token in row)


def test_each_title_is_followed_by_its_placeholder():
    tokenizer = byte_level()
    templates = ["Saw {history}. Of {candidates}: ", "Of {candidates} after {history}:", "Saw {history}:"]
    builder = builder_of(tokenizer, templates, titles=["a", "b", "c", "d"])
    prompts = builder.build(
        [[0, 1, 2], [3, 0, 0], [1, 2, 3]],
        [[3, 4], [2, 1], [4, 1]],
        [0, 1, 0],
        torch.tensor([True, True, False]),
        [4, 2, 4],
    )
    rows = [readable(builder, tokenizer, row) for row in prompts.input_ids.tolist()]
    assert rows[0] == "Saw a[H], b[H]. Of c[C], d[C]: d</s>"
    assert rows[1].replace("<pad>", "") == "Of b[C], a[C] after c[H]: b</s>"
    assert rows[2].replace("<pad>", "") == "Saw a[H], b[H], c[H]: d</s>"
    assert prompts.placeholder_items.tolist() == [[1, 2, 3, 4], [2, 1, 3, 0], [1, 2, 3, 0]]


def test_without_target_a_prompt_ends_before_the_title():
    tokenizer = byte_level()
    builder = builder_of(tokenizer, ["Saw {history}. Next: "], titles=["a", "b"], separator=" |")
    prompts = builder.build(torch.tensor([[1, 2]]))
    assert readable(builder, tokenizer, prompts.input_ids[0].tolist()) == "Saw a[H] | b[H]. Next:"
    assert prompts.title_labels is None
    with_target = builder.build(torch.tensor([[1, 2]]), targets=torch.tensor([2]))
    assert with_target.input_ids[0, :-3].tolist() == prompts.input_ids[0].tolist()


def naive_row(builder, tokenizer, template, history, candidates, target) -> tuple[list[int], list[int]]:
    """One prompt of `byte_level`, where every byte is a token and pieces can simply be strung together."""
    titles, ids, items = builder.title_tokens, [], []
    for part in re.split(r"(\{\w+\})", template):
        if part in ("{history}", "{candidates}"):
            listed = [item for item in (history if part == "{history}" else candidates) if item]
            for place, item in enumerate(listed):
                ids += tokenizer(", "[:-1])["input_ids"] if place else []
                ids += [*titles.sequence(item)[:-1], -1 if part == "{history}" else -2]
            items += listed
        else:
            ids += tokenizer(part.rstrip(" "), add_special_tokens=False)["input_ids"]
    return ids + titles.sequence(target), items


def test_batches_equal_a_loop_over_rows():
    tokenizer, generator = byte_level(), np.random.default_rng(0)
    templates = [*TEMPLATES, "{candidates}{history}", "then {history}\n"]
    builder = builder_of(tokenizer, templates)
    for batch in (1, 7, 64):
        histories = generator.integers(0, 16, (batch, 10))  # padding anywhere
        histories[:, 3] = generator.integers(1, 16, batch)
        candidates = np.stack([generator.permutation(15)[:6] + 1 for _ in range(batch)])
        candidates[:, 5] *= generator.integers(0, 2, batch)
        targets = candidates[:, 2]
        show, indices = generator.integers(0, 2, batch).astype(bool), generator.integers(0, 2, batch)
        prompts = builder.build(histories, candidates, indices, show, targets)
        for row in range(batch):
            kind = builder.candidate_templates if show[row] else builder.history_templates
            ids, items = naive_row(
                builder, tokenizer, kind[indices[row]], histories[row], candidates[row], int(targets[row])
            )
            padding = prompts.input_ids.shape[1] - len(ids)
            assert prompts.input_ids[row].tolist() == [tokenizer.pad_token_id] * padding + ids
            assert prompts.attention_mask[row].tolist() == [0] * padding + [1] * len(ids)
            width = prompts.placeholder_items.shape[1]
            assert prompts.placeholder_items[row].tolist() == items + [0] * (width - len(items))
            assert (prompts.input_ids[row] < 0).sum() == len(items)
        assert all(tensor.dtype == torch.int64 for tensor in dataclasses.astuple(prompts))


def test_no_tokenizer_is_called_after_construction(monkeypatch):
    tokenizer = byte_level_bpe()
    builder, calls = builder_of(tokenizer), []
    for name in ("__call__", "_encode_plus", "encode", "tokenize", "convert_tokens_to_ids", "decode"):
        monkeypatch.setattr(PreTrainedTokenizerFast, name, lambda *a, name=name, **k: calls.append(name))
    tokenizer("counted")
    assert calls == ["__call__"]
    builder.build(HISTORIES, CANDIDATES, targets=TARGETS)
    builder.build(HISTORIES)
    assert calls == ["__call__"]


def test_rows_without_candidates_may_be_given_some():
    builder = builder_of(byte_level())
    hidden = builder.build(HISTORIES, CANDIDATES, show_candidates=False, targets=TARGETS)
    absent = builder.build(HISTORIES, targets=TARGETS)
    for name in ("input_ids", "attention_mask", "placeholder_items", "title_labels"):
        assert torch.equal(getattr(hidden, name), getattr(absent, name))
    assert isinstance(hidden, Prompts) and not torch.equal(
        builder.build(HISTORIES, CANDIDATES).placeholder_items, hidden.placeholder_items
    )


# --- templates ---


def test_templates_are_split_by_kind_and_kept_in_order():
    builder = builder_of(
        byte_level(), ["a {history}", "b {candidates} {history}", "c {history}", "{history} {candidates}"]
    )
    assert builder.history_templates == ["a {history}", "c {history}"]
    assert builder.candidate_templates == ["b {candidates} {history}", "{history} {candidates}"]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ([], r"expected a list of at least one text with \{history\}"),
        ("Saw {history}:", r"expected a list of at least one text"),
        (["Saw nothing:"], r"has \{history\} 0 times and \{candidates\} 0 times: expected \{history\} once"),
        (["{history} {history}"], r"has \{history\} 2 times"),
        (["{history} {candidates} {candidates}"], r"\{candidates\} 2 times"),
        (["{history} {item}"], r"has \{item\}: expected no braces other than \{history\} and \{candidates\}"),
        (["{history} {}"], r"has \{\}: expected no braces"),
        (["{history} { x"], r"has a brace: expected no braces"),
        (["{history} {a b}"], r"has a brace: expected no braces"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(templates, message):
    with pytest.raises(ValueError, match=message):
        builder_of(byte_level(), templates)


def test_templates_are_read_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# a comment\n\nSaw {history}.\nAnswer:\n---\n\n  Then {history}:\n# another\n --- \n- -- {history}\n"
    )
    assert read_templates(path) == ["Saw {history}.\nAnswer:", "Then {history}:", "- -- {history}"]
    path.write_text("Saw {history}\n---\n# nothing\n")
    with pytest.raises(ValueError, match=r"template 2 of .*prompts\.txt is empty"):
        read_templates(path)
    with pytest.raises(FileNotFoundError):
        read_templates(tmp_path / "absent.txt")


@pytest.mark.parametrize("path", PROMPT_FILES, ids=lambda path: path.stem)
def test_the_templates_that_come_with_the_recipes_work(path):
    templates = read_templates(path)
    builder = builder_of(word_piece(), templates)
    assert len(builder.candidate_templates) >= 3 and len(builder.history_templates) >= 3
    assert len(set(templates)) == len(templates) and all(template.endswith("Answer:") for template in templates)
    for index in range(3):
        builder.build(HISTORIES, CANDIDATES, template_indices=[index] * 3, targets=TARGETS)
        builder.build(HISTORIES, template_indices=[index] * 3)


def test_there_are_templates_for_movies_artists_and_products():
    assert [path.stem for path in PROMPT_FILES] == ["artists", "movies", "products"]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"histories": [[1, 2, 3, 4, 5]]}, r"history of row 0 has 5 items: expected at most 4 \(max_history\)"),
        ({"histories": [[1], [0]]}, r"history of row 1 is empty: expected at least one item"),
        ({"histories": [[16]]}, r"histories contain item 16: expected ids 1 to 15 of the catalogue"),
        ({"histories": [[-1]]}, r"histories contain item -1"),
        ({"histories": [1, 2]}, r"histories have shape \(2,\) .* expected integers of shape \(batch, items\)"),
        ({"histories": [[1.0]]}, r"histories have shape \(1, 1\) and type float32: expected integers"),
        ({"histories": torch.zeros(0, 3, dtype=torch.int64)}, r"histories have no rows"),
        ({"histories": [[1]], "targets": [0]}, r"targets contain item 0: expected ids 1 to 15"),
        ({"histories": [[1]], "targets": [1, 2]}, r"targets have shape \(2,\) .*batch 1"),
        ({"histories": [[1]], "candidates": [[1, 99]]}, r"candidates contain item 99"),
        ({"histories": [[1]], "candidates": [[1], [2]]}, r"candidates have shape \(2, 1\)"),
        ({"histories": [[1]], "candidates": [[2, 3]], "targets": [4]}, r"candidates of row 0 lack its target 4"),
        ({"histories": [[1]], "show_candidates": True}, r"row 0 shall show candidates and has none"),
        ({"histories": [[1]], "candidates": [[0]]}, r"row 0 shall show candidates and has none"),
        (
            {"histories": [[1]], "template_indices": [1]},
            r"template_indices of row 0 is 1: expected 0 to 0, a",
        ),
        ({"histories": [[1]], "template_indices": [-1]}, r"template_indices of row 0 is -1"),
        ({"histories": [[1]], "template_indices": [0, 0]}, r"template_indices have shape \(2,\)"),
        ({"histories": [[1]], "show_candidates": [1]}, r"show_candidates have shape \(1,\) and type int64"),
    ],
)
def test_rows_that_cannot_be_prompts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        builder_of(byte_level(), max_history=4).build(**arguments)


def test_padding_does_not_count_towards_the_longest_history():
    assert builder_of(byte_level(), max_history=2).build([[0, 0, 1, 2, 0, 0]]).placeholder_items.tolist() == [[1, 2]]


def test_templates_of_the_other_kind_only_are_an_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"template with \{candidates\} and there is none: add one.*candidates=False"):
        builder_of(byte_level(), ["{history}"]).build([[1]], [[1, 2]])
    with pytest.raises(ValueError, match=r"template without \{candidates\} and there is none.*candidates=True"):
        builder_of(byte_level(), ["{history} {candidates}"]).build([[1]])


def test_prompts_longer_than_the_context_are_refused_with_the_remedy():
    builder = builder_of(byte_level(), ["{history}:"])
    length = builder.build([[1], [6]], targets=[2, 2]).input_ids.shape[1]
    builder_of(byte_level(), ["{history}:"], max_tokens=length).build([[1], [6]], targets=[2, 2])
    message = rf"prompt of row 1 has {length} tokens: expected at most {length - 1} \(max_tokens.*shorten the histories"
    with pytest.raises(ValueError, match=message):
        builder_of(byte_level(), ["{history}:"], max_tokens=length - 1).build([[1], [6]], targets=[2, 2])
