"""The titles of a catalogue, tokenised once, so that prompts are assembled without a tokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from .configuration_ilora import DUPLICATE_TITLES

# Texts are tokenised after one of these. The second is for texts that would merge with a letter.
_ANCHORS = ("a", ":")
# A tokenizer may drop the numbers of numbered titles, so that they would clash in every round.
_MAX_ROUNDS_OF_NUMBERS = 5


def check_titles(titles: Sequence[str]) -> None:
    """Raise a ValueError unless `titles` are several strings, none of them blank."""
    if isinstance(titles, str):
        raise ValueError(f"titles is the string {titles!r}: expected a list of titles, such as [{titles!r}]")
    if not isinstance(titles, Iterable):
        raise ValueError(f"titles is {titles!r}: expected a list of titles, such as ['Toy Story (1995)']")
    if not len(titles):
        raise ValueError("titles are empty: expected at least one")
    for number, title in enumerate(titles, start=1):
        if not isinstance(title, str) or not title.strip():
            raise ValueError(
                f"title {number} of {len(titles)} is {title!r}: expected text; give the item a title, such as "
                f"'Item {number}', or leave it out"
            )


def continuation_ids(tokenizer, texts: Sequence[str], split_special_tokens: bool = False) -> list[list[int]]:
    """Tokenise texts as they read in the middle of a prompt.

    At the start of a text, some tokenizers insert a space, some turn a leading space into a token, and some drop it.
    Each text is therefore tokenised after a short anchor, whose tokens are then cut off.

    Args:
        tokenizer: a tokenizer of transformers.
        texts: (texts,) strings; a leading space is significant.
        split_special_tokens: read special tokens such as "</s>" in a text as ordinary characters.

    Returns:
        A list of token ids for each text, possibly empty.
    """
    settings = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
    token_ids: list[list[int]] = [[] for _ in texts]
    waiting = [index for index, text in enumerate(texts) if text]
    for anchor in _ANCHORS:
        if not waiting:
            return token_ids
        anchored = tokenizer([anchor, *(anchor + texts[index] for index in waiting)], **settings)["input_ids"]
        start = list(anchored[0])
        merged = []
        for index, ids in zip(waiting, anchored[1:], strict=True):
            if ids[: len(start)] == start:
                token_ids[index] = list(ids[len(start) :])
            else:
                merged.append(index)  # the first characters merged with the anchor
        waiting = merged
    if waiting:  # texts that merge with both anchors: their tokens alone decode to the text, too
        alone = tokenizer([texts[index] for index in waiting], **settings)["input_ids"]
        for index, ids in zip(waiting, alone, strict=True):
            token_ids[index] = list(ids)
    return token_ids


class TitleTokens:
    """The titles of items 1..num_items, and the tokens of each title in the middle of a prompt.

    Args:
        tokenizer: a tokenizer of transformers. It is only called here.
        titles: (num_items,) strings, the titles of items 1 to num_items in order; surrounding white space is ignored.
        duplicate_titles: "raise", or "number" to rename the second of two equal titles to "Title (2)".

    Attributes:
        titles: (num_items,) titles as they appear in prompts.
        token_ids: (total,) int64, the concatenated titles, without special tokens. Each begins with a space if the
            tokenizer has one.
        starts: (num_items + 2,) int64: item i is `token_ids[starts[i]:starts[i + 1]]`; item 0, padding, is empty.
        lengths: (num_items + 1,) int64, 0 for padding.
        terminator_id: token that ends a title: the tokenizer's eos token, else its sep token.

    Raises:
        ValueError: if there are no titles, a title is blank or becomes no token or unknown tokens only, two titles are
            equal or have equal tokens, or the tokenizer has neither an eos nor a sep token.
    """

    def __init__(self, tokenizer, titles: Sequence[str], duplicate_titles: str = "raise"):
        if duplicate_titles not in DUPLICATE_TITLES:
            raise ValueError(f"duplicate_titles is {duplicate_titles!r}: expected one of {', '.join(DUPLICATE_TITLES)}")
        if len(titles) == 0:
            raise ValueError("titles are empty: expected one for each item of the catalogue")
        self.terminator_id = terminator_id(tokenizer)
        self.titles = [title.strip() for title in titles]
        for index, title in enumerate(self.titles):
            if not title:
                raise ValueError(f"the title of item {index + 1} is blank: give it one, such as 'Item {index + 1}'")
        token_ids = self._tokenise(tokenizer, range(len(self.titles)))
        clashes = equal_sequences(token_ids)
        for _ in range(_MAX_ROUNDS_OF_NUMBERS if duplicate_titles == "number" else 0):
            if not clashes:
                break
            renamed = [later for _, later in clashes]
            number_titles(self.titles, renamed)
            for index, ids in zip(renamed, self._tokenise(tokenizer, renamed), strict=True):
                token_ids[index] = ids
            clashes = equal_sequences(token_ids)
        if clashes:
            raise ValueError(self._clash(clashes[0], duplicate_titles))
        self.lengths = np.array([0, *map(len, token_ids)], dtype=np.int64)
        self.starts = np.concatenate([[0], self.lengths.cumsum()])
        self.token_ids = np.array([token for ids in token_ids for token in ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.titles)

    def sequence(self, item_id: int) -> list[int]:
        """The tokens of an item's title and the terminator, as a model writes them."""
        title = self.token_ids[self.starts[item_id] : self.starts[item_id + 1]]
        return [*title.tolist(), self.terminator_id]

    def _tokenise(self, tokenizer, indices: Sequence[int]) -> list[list[int]]:
        texts = [" " + self.titles[index] for index in indices]
        token_ids = continuation_ids(tokenizer, texts, split_special_tokens=True)
        for index, ids in zip(indices, token_ids, strict=True):
            name = f"the title {self.titles[index]!r} of item {index + 1}"
            if all(token == tokenizer.unk_token_id for token in ids):
                problem = "unknown tokens only" if ids else "no token"
                raise ValueError(f"{name} becomes {problem}: give the item a title in this tokenizer's alphabet")
            if self.terminator_id in ids:
                raise ValueError(
                    f"{name} contains token {self.terminator_id}, which ends titles: expected a title without the text "
                    "of a special token"
                )
        return token_ids

    def _clash(self, clash: tuple[int, int], duplicate_titles: str) -> str:
        first, second = (f"{index + 1} ({self.titles[index]!r})" for index in clash)
        same = "title" if self.titles[clash[0]] == self.titles[clash[1]] else "tokens"
        remedy = "pass duplicate_titles='number'" if duplicate_titles == "raise" else "rename one of them"
        return f"items {first} and {second} have the same {same}: expected different titles; {remedy}"


def terminator_id(tokenizer) -> int:
    """The token that ends a title: eos, or else sep.

    Raises:
        ValueError: if the tokenizer has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if found is None:
        raise ValueError(
            "the tokenizer has neither an eos nor a sep token: expected one to end titles with; set "
            "tokenizer.eos_token to a token of its vocabulary that occurs in no title"
        )
    return found


def equal_sequences(token_ids: list[list[int]]) -> list[tuple[int, int]]:
    """Pairs (first, later) of indices, one for each sequence that repeats an earlier one."""
    first_of: dict[tuple[int, ...], int] = {}
    firsts = [first_of.setdefault(tuple(ids), index) for index, ids in enumerate(token_ids)]
    return [(first, index) for index, first in enumerate(firsts) if first != index]


def number_titles(titles: list[str], indices: list[int]) -> None:
    """Append to each title at `indices`, in place, the smallest number from 2 that makes it unique."""
    taken, next_number = set(titles), {}
    for index in indices:
        title = titles[index]
        number = next_number.get(title, 2)
        while f"{title} ({number})" in taken:
            number += 1
        next_number[title] = number + 1
        titles[index] = f"{title} ({number})"
        taken.add(titles[index])


__all__ = ["TitleTokens", "check_titles", "continuation_ids"]
