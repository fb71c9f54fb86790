"""Titles as tokens, for tokenizers that differ in what they do at the start of a text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ilora.models.ilora.title_tokens import TitleTokens, continuation_ids
from tests.tiny_tokenizers import FAMILIES, TITLES, byte_level, byte_level_bpe, sentencepiece_bpe, unigram, word_piece


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return FAMILIES[request.param]()


def words_tokenizer(words: str, **special_tokens) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Knows one letter and drops all others."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "end": 1}, [])), eos_token="end")


def test_titles_read_in_a_prompt_as_the_tokenizer_itself_would_write_them(tokenizer):
    titles = TitleTokens(tokenizer, TITLES)
    for item, title in enumerate(TITLES, start=1):
        whole = tokenizer(f"Answer: {title.strip()}", add_special_tokens=False)["input_ids"]
        before = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
        assert [*before, *titles.sequence(item)[:-1]] == whole


def test_a_title_has_one_space_before_it():
    """Llama 2 puts a space before every text: tokenising " Heat" by itself would give two."""
    tokenizer = sentencepiece_bpe()
    titles = TitleTokens(tokenizer, ["Toy Story"])
    assert tokenizer.convert_ids_to_tokens(titles.sequence(1)) == ["▁Toy", "▁Story", "</s>"]
    alone = tokenizer(" Toy Story", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[:2] != ["▁Toy", "▁Story"]


def test_text_without_a_space_continues_without_one(tokenizer):
    ids = continuation_ids(tokenizer, [", more", "s", "", ":"])
    assert ids[2] == [] and all(ids[index] for index in (0, 1, 3))
    for index, text in enumerate((", more", "s")):
        anchored = tokenizer("7", add_special_tokens=False)["input_ids"] + ids[index]
        decoded = tokenizer.decode(anchored, clean_up_tokenization_spaces=False)
        assert decoded.endswith(text) or tokenizer.sep_token  # the decoder of WordPiece puts spaces everywhere
        assert ids[index] != continuation_ids(tokenizer, [" " + text])[0] or tokenizer.sep_token


def test_offsets_point_at_each_title_and_padding_is_empty():
    titles = TitleTokens(byte_level(), ["ab", "c"])
    space, a, b, c = byte_level().convert_tokens_to_ids(["Ġ", "a", "b", "c"])
    assert titles.token_ids.tolist() == [space, a, b, space, c]
    assert titles.starts.tolist() == [0, 0, 3, 5] and titles.lengths.tolist() == [0, 3, 2]
    assert titles.token_ids.dtype == titles.starts.dtype == titles.lengths.dtype == np.int64
    assert titles.sequence(2) == [space, c, byte_level().eos_token_id]
    assert len(titles) == 2


def test_the_tokenizer_is_called_once(monkeypatch):
    calls = []
    tokenizer = byte_level_bpe()
    encode = PreTrainedTokenizerFast._encode_plus
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", lambda *a, **k: calls.append(1) or encode(*a, **k))
    titles = TitleTokens(tokenizer, TITLES)
    assert len(calls) == 1
    titles.sequence(3)
    assert len(calls) == 1


def test_titles_end_with_eos_else_sep():
    assert TitleTokens(unigram(), ["M"]).terminator_id == unigram().eos_token_id
    assert TitleTokens(word_piece(), ["M"]).terminator_id == word_piece().sep_token_id
    with pytest.raises(ValueError, match=r"neither an eos nor a sep token.*set tokenizer\.eos_token"):
        TitleTokens(words_tokenizer("? a"), ["a"])


def test_white_space_around_a_title_does_not_count():
    assert TitleTokens(byte_level_bpe(), ["  Heat\n"]).sequence(1) == TitleTokens(byte_level_bpe(), ["Heat"]).sequence(
        1
    )


def test_special_tokens_in_a_title_are_text_or_refused():
    for family, tokenizer in ((name, make()) for name, make in FAMILIES.items()):
        text = f"Heat {tokenizer.eos_token or tokenizer.sep_token}"
        if family.startswith("unigram"):  # the token is a piece of the model's own
            with pytest.raises(ValueError, match=r"'Heat </s>' of item 1 contains token 1, which ends titles"):
                TitleTokens(tokenizer, [text])
        else:
            title = TitleTokens(tokenizer, [text]).sequence(1)[:-1]
            decoded = tokenizer.decode(title, clean_up_tokenization_spaces=False)
            assert "".join(decoded.lower().split()) == text.lower().replace(" ", ""), family


def test_calling_leaves_the_tokenizer_as_it_was():
    tokenizer = byte_level_bpe()
    TitleTokens(tokenizer, ["Heat"])
    assert tokenizer("<|end|>")["input_ids"] == [tokenizer.eos_token_id]


# --- bad input ---


def test_blank_and_empty_titles_are_refused_by_item():
    with pytest.raises(ValueError, match=r"title of item 2 is blank: give it one"):
        TitleTokens(byte_level(), ["Heat", " \t "])
    with pytest.raises(ValueError, match="titles are empty"):
        TitleTokens(byte_level(), [])


def test_titles_that_tokenise_to_nothing_or_to_unknown_tokens_only_are_refused_by_item():
    """Without byte fallback a title in another script is one unknown token, the same for all of them."""
    tokenizer = words_tokenizer("? end a heat", eos_token="end", unk_token="?")
    assert TitleTokens(tokenizer, ["heat", "heat 千"]).sequence(2) == [3, 0, 1]
    with pytest.raises(ValueError, match=r"'千 尋' of item 2 becomes unknown tokens only: give the item a title"):
        TitleTokens(tokenizer, ["heat", "千 尋"])
    with pytest.raises(ValueError, match=r"'千' of item 2 becomes no token"):
        TitleTokens(letters_tokenizer(), ["a", "千"])


def test_equal_titles_are_refused_with_both_items_and_the_remedy():
    with pytest.raises(ValueError, match=r"items 1 \('Heat'\) and 3 \('Heat'\) have the same title.*'number'"):
        TitleTokens(byte_level(), ["Heat", "M", " Heat "])
    TitleTokens(byte_level(), ["Heat", "heat"])  # case tells them apart here, not for a tokenizer without case
    with pytest.raises(ValueError, match=r"items 1 \('Heat'\) and 2 \('heat'\) have the same tokens.*'number'"):
        TitleTokens(word_piece(), ["Heat", "heat"])
    with pytest.raises(ValueError, match=r"duplicate_titles is 'drop'"):
        TitleTokens(byte_level(), ["Heat"], duplicate_titles="drop")


def test_numbering_tells_equal_titles_apart_without_taking_the_title_of_another():
    titles = TitleTokens(byte_level(), ["Heat", "Heat (2)", "Heat", "Heat", "M"], duplicate_titles="number")
    assert titles.titles == ["Heat", "Heat (2)", "Heat (3)", "Heat (4)", "M"]
    assert len({tuple(titles.sequence(item)) for item in range(1, 6)}) == 5
    assert TitleTokens(word_piece(), ["Heat", "heat"], "number").titles == ["Heat", "heat (2)"]
    assert TitleTokens(word_piece(), ["Heat", "heat", "HEAT (2)"], "number").titles[0] == "Heat"


def test_numbers_that_the_tokenizer_drops_are_an_error():
    with pytest.raises(ValueError, match=r"items 1 \('a'\) and 2 \('a \(2\).*have the same tokens.*rename one of them"):
        TitleTokens(letters_tokenizer(), ["a", "a"], duplicate_titles="number")
