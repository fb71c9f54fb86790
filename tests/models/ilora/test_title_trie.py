"""The tree of titles against the set of all beginnings of titles."""

import time

import numpy as np
import pytest
import torch

from hf_ilora.models.ilora.title_tokens import TitleTokens
from hf_ilora.models.ilora.title_trie import TitleTrie
from tests.tiny_tokenizers import TITLES, byte_level, byte_level_bpe, word_piece

NESTED = ["Heat", "Heat Wave", "Heat Waves", "He", "Alien", "Aliens", "M"]


def followers(title_tokens: TitleTokens, item_ids) -> dict[tuple[int, ...], set[int]]:
    """What may follow each beginning of a title, from a loop over all of them."""
    found: dict[tuple[int, ...], set[int]] = {}
    for item in item_ids:
        sequence = title_tokens.sequence(item)
        for length in range(len(sequence)):
            found.setdefault(tuple(sequence[:length]), set()).add(sequence[length])
    return found


@pytest.mark.parametrize("make_tokenizer", [byte_level, byte_level_bpe, word_piece])
@pytest.mark.parametrize("titles", [TITLES, NESTED])
def test_every_path_is_exactly_a_title(make_tokenizer, titles):
    title_tokens = TitleTokens(make_tokenizer(), titles)
    trie = TitleTrie(title_tokens)
    paths, waiting = [], [[]]
    while waiting:
        prefix = waiting.pop()
        if prefix[-1:] == [title_tokens.terminator_id]:
            paths.append(prefix)
        else:
            waiting += [[*prefix, token] for token in trie.allowed(prefix)]
    assert sorted(paths) == sorted(title_tokens.sequence(item) for item in range(1, len(titles) + 1))
    assert [trie.item_of(title_tokens.sequence(item)) for item in range(1, len(titles) + 1)] == list(
        range(1, len(titles) + 1)
    )
    for prefix, expected in followers(title_tokens, range(1, len(titles) + 1)).items():
        allowed = trie.allowed(prefix)
        assert set(allowed) == expected and len(allowed) == len(expected)


def test_a_subset_allows_only_its_titles():
    title_tokens = TitleTokens(byte_level(), NESTED)
    trie = TitleTrie(title_tokens, torch.tensor([2, 6, 0, 6]))  # padding and repetition do not count
    for prefix, expected in followers(title_tokens, [2, 6]).items():
        assert set(trie.allowed(prefix)) == expected
    assert trie.item_of(title_tokens.sequence(6)) == 6
    assert trie.item_of(title_tokens.sequence(1)) is None and trie.item_of(title_tokens.sequence(7)) is None


def test_only_the_terminator_follows_a_whole_title_or_no_title():
    title_tokens = TitleTokens(byte_level(), NESTED)
    end, trie = title_tokens.terminator_id, TitleTrie(title_tokens)
    for item in (1, 3, 7):
        sequence = title_tokens.sequence(item)
        for padding in ([], [end], [end, end], [0, 0, 0]):  # what follows in a batch whose other rows go on
            assert trie.allowed([*sequence, *padding]) == [end]
            assert trie.item_of([*sequence, *padding]) == item
    heat, wave = title_tokens.sequence(1)[:-1], title_tokens.sequence(2)[:-1]
    for wrong in ([0], [*heat, 0], [*wave, 0], [*wave[:-1], 0], [*title_tokens.sequence(7)[:-1], 5], [end]):
        assert trie.allowed(wrong) == [end], wrong
        assert trie.item_of(wrong) is None
    assert trie.item_of(heat) is None, "a title counts once it has ended"
    assert trie.item_of([]) is None


def test_tensors_mean_the_same_as_lists():
    title_tokens = TitleTokens(byte_level(), NESTED)
    trie = TitleTrie(title_tokens)
    heat = torch.tensor(title_tokens.sequence(1))
    assert (
        sorted(trie.allowed(heat[:-1])) == sorted(trie.allowed(heat[:-1].tolist()))
        and len(trie.allowed(heat[:-1])) == 2
    )
    assert trie.item_of(heat) == 1


def test_items_that_are_not_there_are_refused():
    title_tokens = TitleTokens(byte_level(), NESTED)
    for item_ids, found in (([], "empty"), ([0, 0], "empty"), ([3, 8], "3 to 8"), ([-1, 2], "-1 to 2")):
        with pytest.raises(ValueError, match=rf"item_ids are {found}: expected at least one of the ids 1 to 7"):
            TitleTrie(title_tokens, item_ids)


class CachedTitles:
    """What a trie reads of `TitleTokens`, without the seconds that tokenising takes."""

    def __init__(self, sequences: list[list[int]]):
        self.sequences, self.terminator_id = sequences, sequences[0][-1]

    def __len__(self) -> int:
        return len(self.sequences)

    def sequence(self, item_id: int) -> list[int]:
        return self.sequences[item_id - 1]


def test_a_hundred_thousand_titles_take_seconds_to_build_and_microseconds_to_ask():
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 12, 100_000)
    # like words, few tokens make up most of the titles; the last two tell titles apart
    sequences = [
        [*(generator.zipf(1.5, length) % 5000).tolist(), 5000 + item // 400, 5000 + item % 400, 9]
        for item, length in enumerate(lengths)
    ]
    started = time.process_time()
    trie = TitleTrie(CachedTitles(sequences))
    assert time.process_time() - started < 5
    prefixes = [sequence[:length] for sequence in sequences[::500] for length in range(len(sequence))]
    started = time.process_time()
    for prefix in prefixes:
        trie.allowed(prefix)
    assert (time.process_time() - started) / len(prefixes) < 200e-6
    assert all(trie.item_of(sequences[item - 1]) == item for item in range(1, 100_001, 777))
