"""The titles of a catalogue as a prefix tree, which constrains generation to titles."""

from collections.abc import Iterable, Sequence

import torch

from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

from .title_tokens import TitleTokens


class TitleTrie:
    """Prefix tree of the titles of some items or of the whole catalogue; each title ends with the terminator.

    Nodes are dictionaries from tokens to nodes. A branch with a single title is stored as its item id, since most
    tokens of a title follow the one that distinguishes it.

    Args:
        title_tokens: tokenised titles of the catalogue.
        item_ids: the items that may be written, in any order, 0 for padding; None for the whole catalogue.

    Raises:
        ValueError: if there are no items, or ids outside the catalogue.
    """

    def __init__(self, title_tokens: TitleTokens, item_ids: Iterable[int] | None = None):
        num_items = len(title_tokens)
        if item_ids is None:
            items = range(1, num_items + 1)
        else:
            items = [item for item in dict.fromkeys(map(int, item_ids)) if item != PADDING_ITEM_ID]
        if not items or min(items) < 1 or max(items) > num_items:
            raise ValueError(
                f"item_ids are {f'{min(items)} to {max(items)}' if items else 'empty'}: expected at least one of the "
                f"ids 1 to {num_items} of the catalogue"
            )
        self.title_tokens, self.terminator_id = title_tokens, title_tokens.terminator_id
        self._root: dict[int, dict | int] = {}
        for item in items:
            self._add(item)

    def allowed(self, prefix: Sequence[int] | torch.Tensor) -> list[int]:
        """The tokens that may follow `prefix`, for transformers' `prefix_allowed_tokens_fn`.

        Args:
            prefix: (tokens,) token ids generated so far, without the prompt.

        Returns:
            At least one token id. It is the terminator after a complete title, and after tokens that begin no title:
            beam search fills spare beams with such tokens if there are fewer titles than beams.
        """
        prefix = _as_list(prefix)
        node = self._root
        for depth, token in enumerate(prefix):
            if isinstance(node, int):
                title = self.title_tokens.sequence(node)
                follows = len(prefix) < len(title) and title[depth : len(prefix)] == prefix[depth:]
                return [title[len(prefix)]] if follows else [self.terminator_id]
            node = node.get(token)
            if node is None:
                return [self.terminator_id]
        if isinstance(node, int):
            title = self.title_tokens.sequence(node)
            return [title[min(len(prefix), len(title) - 1)]]
        return list(node)

    def item_of(self, token_ids: Sequence[int] | torch.Tensor) -> int | None:
        """The item whose title and terminator are the first of `token_ids`; None if there is none."""
        token_ids = _as_list(token_ids)
        node = self._root
        for token in token_ids:
            if isinstance(node, int):
                break
            node = node.get(token)
            if node is None:
                return None
        if not isinstance(node, int):
            return None
        title = self.title_tokens.sequence(node)
        return node if token_ids[: len(title)] == title else None

    def _add(self, item: int) -> None:
        node = self._root
        for depth, token in enumerate(self.title_tokens.sequence(item)):
            child = node.get(token)
            if child is None:
                node[token] = item
                return
            if isinstance(child, int):  # a single title so far: move it one token further
                child = node[token] = {self.title_tokens.sequence(child)[depth + 1]: child}
            node = child


def _as_list(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    # The elements of a tensor are tensors, which are not equal to the integer keys of a dictionary.
    return token_ids.tolist() if isinstance(token_ids, torch.Tensor) else list(token_ids)


__all__ = ["TitleTrie"]
