"""Prompts about item histories, assembled from cached tokens: the tokenizer is not called during training."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL, PADDING_ITEM_ID
from hf_ilora.models.next_item.padding import padding_to_the_end

from .title_tokens import TitleTokens, continuation_ids

# Token ids of placeholders, which item embeddings replace. They are negative, so that they clash with no token of the
# vocabulary and the embedding table need not grow.
HISTORY_PLACEHOLDER_ID = -1
CANDIDATE_PLACEHOLDER_ID = -2

_FIELDS = ("history", "candidates")
_TEMPLATE_SEPARATOR = "---"


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on the left.

    Args:
        input_ids: (batch, tokens) int64; placeholders are negative.
        attention_mask: (batch, tokens) int64, 0 for padding.
        placeholder_items: (batch, placeholders) int64: the item of each placeholder, in the order of the row, padded
            with 0 on the right.
        title_labels: (batch, tokens) int64: equal to `input_ids` at the target's title and its terminator, -100
            elsewhere; None for prompts without target.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    placeholder_items: torch.Tensor
    title_labels: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Prompts":
        """Copy the prompts to another device."""
        parts = (self.input_ids, self.attention_mask, self.placeholder_items, self.title_labels)
        return Prompts(*(None if part is None else part.to(device, non_blocking=True) for part in parts))


def read_templates(path: str | os.PathLike) -> list[str]:
    """Read prompt templates from a text file.

    Templates are separated by lines that consist of `---`; lines that start with `#` are comments. White space around
    a template is ignored.

    Raises:
        FileNotFoundError: if there is no file at `path`.
        ValueError: if a template is empty.
    """
    templates, lines = [], []
    for line in [*Path(path).read_text(encoding="utf-8").splitlines(), _TEMPLATE_SEPARATOR]:
        if line.strip() == _TEMPLATE_SEPARATOR:
            templates.append("\n".join(lines).strip())
            lines = []
        elif not line.startswith("#"):
            lines.append(line)
    if not all(templates):
        raise ValueError(f"template {templates.index('') + 1} of {path} is empty: expected text with {{history}}")
    return templates


class PromptBuilder:
    """Builds batches of prompts from item ids.

    A template such as

        This user watched {history}. Which of these comes next: {candidates}? Answer:

    becomes "This user watched Title [H], Title [H]. Which of these comes next: Title [C], Title [C]? Answer:", with a
    placeholder [H] or [C] after each title, followed by the target's title. Each title begins with a space of its own,
    so the spaces before {history} and {candidates} and at the end of the template are dropped.

    Args:
        tokenizer: a tokenizer of transformers. It is only called here.
        title_tokens: titles tokenised by the same tokenizer.
        templates: texts with {history} once and {candidates} at most once. Special tokens may be written out, as chat
            formats require.
        separator: text between two items.
        max_history: maximum number of items in a history.
        max_tokens: maximum number of tokens in a prompt, target included; None for no limit.
        placeholders: whether a placeholder for the item's embedding follows each title.

    Attributes:
        candidate_templates, history_templates: the templates with and without {candidates}.
        longest_text: number of tokens of the longest template without titles.
        longest_mark: number of tokens that follow a title, placeholder and separator together.
        pad_token_id: the tokenizer's, or else the terminator; padding is masked, so any token will do.

    Raises:
        ValueError: if there are no templates, or one has other braces, lacks {history}, or repeats a field.

    Source: the prompt of iLoRA (arXiv 2408.10159) and LLaRA. Here a title ends with the terminator token; the reference
        programs use a line break, which is not a single token in every vocabulary.
    """

    def __init__(
        self,
        tokenizer,
        title_tokens: TitleTokens,
        templates: Sequence[str],
        *,
        separator: str = ", ",
        max_history: int = 10,
        max_tokens: int | None = None,
        placeholders: bool = True,
    ):
        if isinstance(templates, str) or not templates:
            raise ValueError(f"templates are {templates!r}: expected a list of at least one text with {{history}}")
        self.title_tokens, self.max_history, self.max_tokens = title_tokens, max_history, max_tokens
        self.placeholders = placeholders
        parts = [_split_template(template) for template in templates]
        self.candidate_templates = [templates[i] for i, (fields, _) in enumerate(parts) if len(fields) == 2]
        self.history_templates = [templates[i] for i, (fields, _) in enumerate(parts) if len(fields) == 1]
        terminator = title_tokens.terminator_id
        self.pad_token_id = terminator if tokenizer.pad_token_id is None else tokenizer.pad_token_id

        # One array contains all the tokens that prompts are assembled from: the titles, then the pieces added here.
        pieces = _Pieces(title_tokens.token_ids)
        separator_ids = continuation_ids(tokenizer, [separator.rstrip(" ")])[0]
        self._marks, self._last_marks = [], []  # tokens after a title, in a history and among candidates
        for placeholder_id in (HISTORY_PLACEHOLDER_ID, CANDIDATE_PLACEHOLDER_ID):
            mark = [placeholder_id] if placeholders else []
            self._marks.append(pieces.add([*mark, *separator_ids]))
            self._last_marks.append(pieces.add(mark))
        self._terminator = pieces.add([terminator])
        texts, candidates_first = [], []
        for shows_candidates in (False, True):  # the order in which `build` numbers the templates
            for fields, literals in parts:
                if (len(fields) == 2) == shows_candidates:
                    texts.append([pieces.add(ids) for ids in _literal_ids(tokenizer, literals)])
                    candidates_first.append(fields[0] == "candidates")
        self._texts = np.array(texts)  # (templates, 3, 2): start and length of each text
        self._candidates_first = np.array(candidates_first)  # (templates,)
        self._tokens = pieces.concatenated()  # (tokens,)
        self.longest_text = int(self._texts[..., 1].sum(axis=1).max())
        self.longest_mark = max(length for _, length in self._marks)

    def build(
        self,
        histories,
        candidates=None,
        template_indices=None,
        show_candidates=None,
        targets=None,
    ) -> Prompts:
        """Check item ids and build a batch of prompts. Arguments are tensors, arrays or lists.

        Args:
            histories: (batch, length) item ids, oldest first, padded with 0 on either side.
            candidates: (batch, num_candidates) item ids in the order in which they are shown, padded with 0.
            template_indices: (batch,) index among the candidate templates or, for rows that show no candidates, among
                the history templates; 0 by default.
            show_candidates: bool, one for all rows or (batch,); by default True if `candidates` are given.
            targets: (batch,) item ids, whose titles follow the prompts.

        Returns:
            The prompts, on the CPU; with `targets` they have `title_labels`.

        Raises:
            ValueError: for shapes that do not fit, ids outside the catalogue, an empty history or one longer than
                `max_history`, candidates that lack the target, a template that does not exist, rows that shall show
                candidates but have none, and prompts longer than `max_tokens`.
        """
        histories = self._item_ids("histories", histories, 2)  # (batch, length)
        self._check_histories(histories)
        if candidates is not None:
            candidates = self._item_ids("candidates", candidates, 2, len(histories))  # (batch, num_candidates)
        if targets is not None:
            targets = self._item_ids("targets", targets, 1, len(histories))  # (batch,)
            if candidates is not None and candidates.shape[1]:
                _check_targets(targets, candidates)
        return self.assemble(histories, candidates, template_indices, show_candidates, targets)

    def assemble(
        self,
        histories: np.ndarray,
        candidates: np.ndarray | None = None,
        template_indices=None,
        show_candidates=None,
        targets: np.ndarray | None = None,
    ) -> Prompts:
        """Build prompts as `build` does, from arrays of item ids that have been checked."""
        batch = len(histories)
        if show_candidates is None:
            show_candidates = candidates is not None
        if candidates is None:
            candidates = np.zeros((batch, 0), dtype=np.int64)
        shown = _rows("show_candidates", show_candidates, batch, np.bool_)  # (batch,)
        _check_shown(shown, candidates)
        template = self._templates(0 if template_indices is None else template_indices, shown)  # (batch,)

        items, marks = zip(
            self._listed(histories, 0),
            self._listed(np.where(shown[:, None], candidates, PADDING_ITEM_ID), 1),
            strict=True,
        )
        texts = self._texts[template].transpose(1, 0, 2)[:, :, None]  # (3, batch, 1, 2)
        # Starts and lengths of the pieces of each prompt, in blocks of (batch, pieces, 2).
        middle = np.concatenate([marks[0], texts[1], marks[1]], axis=1)
        listed = np.concatenate(items, axis=1)  # (batch, length + num_candidates)
        swapped = self._candidates_first[template]
        if swapped.any():
            middle[swapped] = np.concatenate([marks[1], texts[1], marks[0]], axis=1)[swapped]
            listed[swapped] = np.concatenate(items[::-1], axis=1)[swapped]
        blocks = [texts[0], middle, texts[2]]
        target_lengths = np.zeros(batch, dtype=np.int64)
        if targets is not None:
            blocks += [self._titles(targets[:, None]), np.broadcast_to(self._terminator, (batch, 1, 2))]
            target_lengths = self.title_tokens.lengths[targets] + 1  # (batch,)
        return self._gather(np.concatenate(blocks, axis=1), listed, None if targets is None else target_lengths)

    def _titles(self, item_ids: np.ndarray) -> np.ndarray:
        """(..., 2): start and length of titles in the array of all tokens; those of padding have length 0."""
        return np.stack([self.title_tokens.starts[item_ids], self.title_tokens.lengths[item_ids]], axis=-1)

    def _listed(self, item_ids: np.ndarray, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Titles, each followed by its mark: the item ids (batch, items) and the pieces (batch, 2 * items, 2)."""
        batch, length = item_ids.shape
        real = item_ids != PADDING_ITEM_ID  # (batch, items)
        marks = np.where(real[..., None], self._marks[kind], 0)  # (batch, items, 2)
        if length:
            last = length - 1 - real[:, ::-1].argmax(axis=1)  # (batch,)
            rows = np.flatnonzero(real.any(axis=1))
            marks[rows, last[rows]] = self._last_marks[kind]
        pieces = np.stack([self._titles(item_ids), marks], axis=2)  # (batch, items, 2, 2)
        return item_ids, pieces.reshape(batch, 2 * length, 2)

    def _gather(self, pieces: np.ndarray, listed: np.ndarray, target_lengths: np.ndarray | None) -> Prompts:
        """Concatenate the tokens of the pieces (batch, pieces, 2) of each row and pad them on the left."""
        starts, lengths = pieces[..., 0].reshape(-1), pieces[..., 1]
        row_lengths = lengths.sum(axis=1)  # (batch,)
        self._check_lengths(row_lengths)
        lengths = lengths.reshape(-1)
        before = lengths.cumsum() - lengths  # number of tokens in the batch before each piece
        tokens = self._tokens[np.repeat(starts - before, lengths) + np.arange(row_lengths.sum())]  # (total,)

        longest = row_lengths.max()
        padding = (longest - row_lengths)[:, None]  # (batch, 1)
        positions = np.arange(longest)
        attended = positions >= padding  # (batch, longest)
        input_ids = np.full(attended.shape, self.pad_token_id, dtype=np.int64)
        input_ids[attended] = tokens
        title_labels = None
        if target_lengths is not None:
            title_labels = np.where(positions >= longest - target_lengths[:, None], input_ids, IGNORED_LABEL)
            title_labels = torch.from_numpy(title_labels)
        placeholder_items = torch.from_numpy(listed if self.placeholders else listed[:, :0])
        real, order, _ = padding_to_the_end(placeholder_items, None)
        return Prompts(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attended.astype(np.int64)),
            placeholder_items=placeholder_items.gather(1, order)[:, : int(real.sum(1).max())],
            title_labels=title_labels,
        )

    def _templates(self, template_indices, shown: np.ndarray) -> np.ndarray:
        """(batch,): the index in `_texts` of each row's template."""
        indices = _rows("template_indices", template_indices, len(shown), np.int64)
        counts = np.where(shown, len(self.candidate_templates), len(self.history_templates))
        wrong = (indices < 0) | (indices >= counts)
        if wrong.any():
            row = int(wrong.argmax())
            kind = "with" if shown[row] else "without"
            if counts[row] == 0:
                raise ValueError(
                    f"row {row} needs a template {kind} {{candidates}} and there is none: add one, or pass "
                    f"show_candidates={not shown[row]}"
                )
            raise ValueError(
                f"template_indices of row {row} is {indices[row]}: expected 0 to {counts[row] - 1}, a template {kind} "
                "{candidates}"
            )
        return np.where(shown, len(self.history_templates), 0) + indices

    def _item_ids(self, name: str, item_ids, dimensions: int, batch: int | None = None) -> np.ndarray:
        item_ids = torch.as_tensor(item_ids).cpu().numpy()
        if item_ids.ndim != dimensions or item_ids.dtype.kind not in "iu" or batch not in (None, len(item_ids)):
            expected = ("(batch,)", "(batch, items)")[dimensions - 1] + ("" if batch is None else f", batch {batch}")
            raise ValueError(
                f"{name} have shape {item_ids.shape} and type {item_ids.dtype}: expected integers of shape {expected}"
            )
        if len(item_ids) == 0:
            raise ValueError(f"{name} have no rows: expected at least one")
        lowest = PADDING_ITEM_ID if dimensions == 2 else PADDING_ITEM_ID + 1
        wrong = (item_ids < lowest) | (item_ids > len(self.title_tokens))
        if wrong.any():
            raise ValueError(
                f"{name} contain item {item_ids[wrong][0]}: expected ids 1 to {len(self.title_tokens)} of the catalogue"
            )
        return item_ids.astype(np.int64, copy=False)

    def _check_histories(self, histories: np.ndarray) -> None:
        lengths = (histories != PADDING_ITEM_ID).sum(axis=1)  # (batch,)
        if not lengths.all():
            raise ValueError(f"the history of row {lengths.argmin()} is empty: expected at least one item")
        if lengths.max() > self.max_history:
            raise ValueError(
                f"the history of row {lengths.argmax()} has {lengths.max()} items: expected at most {self.max_history} "
                "(max_history); pass the newest ones"
            )

    def _check_lengths(self, lengths: np.ndarray) -> None:
        if self.max_tokens is not None and lengths.max() > self.max_tokens:
            raise ValueError(
                f"the prompt of row {lengths.argmax()} has {lengths.max()} tokens: expected at most {self.max_tokens} "
                "(max_tokens, the language model's context); shorten the histories (max_history), show fewer "
                "candidates, or take a language model with a longer context"
            )


class _Pieces:
    """Collects token sequences into one array."""

    def __init__(self, token_ids: np.ndarray):
        self.arrays, self.length = [token_ids], len(token_ids)

    def add(self, token_ids: list[int]) -> tuple[int, int]:
        """Append a sequence; returns its start and length in the array."""
        self.arrays.append(np.array(token_ids, dtype=np.int64))
        self.length += len(token_ids)
        return self.length - len(token_ids), len(token_ids)

    def concatenated(self) -> np.ndarray:
        return np.concatenate(self.arrays)


def _split_template(template: str) -> tuple[list[str], list[str]]:
    """Split a template into its fields, in order, and the texts before, between and after them."""
    parts = re.split(r"\{(\w*)\}", template)
    fields, literals = parts[1::2], parts[::2]
    foreign = [field for field in fields if field not in _FIELDS]
    if foreign or any(brace in literal for literal in literals for brace in "{}"):
        raise ValueError(
            f"the template {template!r} has {'{' + foreign[0] + '}' if foreign else 'a brace'}: expected no braces "
            "other than {history} and {candidates}"
        )
    if fields.count("history") != 1 or fields.count("candidates") > 1:
        raise ValueError(
            f"the template {template!r} has {{history}} {fields.count('history')} times and {{candidates}} "
            f"{fields.count('candidates')} times: expected {{history}} once and {{candidates}} at most once"
        )
    return fields, literals


def _literal_ids(tokenizer, literals: list[str]) -> list[list[int]]:
    """Tokenise the texts of a template, always into three sequences: the middle one is empty for a single field."""
    # The title after a text begins with the space.
    first, *others = (literal.rstrip(" ") for literal in literals)
    first_ids = tokenizer(first, add_special_tokens=False)["input_ids"]
    prefix = _prefix_ids(tokenizer)
    if first_ids[: len(prefix)] != prefix:  # chat formats may write it out
        first_ids = [*prefix, *first_ids]
    other_ids = continuation_ids(tokenizer, others)
    return [first_ids, *([[]] if len(others) == 1 else []), *other_ids]


def _prefix_ids(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts before a text: bos, cls or none."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])


def _rows(name: str, values, batch: int, dtype) -> np.ndarray:
    """Broadcast one value for all rows, or one per row, to (batch,)."""
    values = torch.as_tensor(values).cpu().numpy()
    if values.shape not in ((), (batch,)) or (values.dtype == np.bool_) != (dtype == np.bool_):
        raise ValueError(
            f"{name} have shape {values.shape} and type {values.dtype}: expected {np.dtype(dtype)}, one or ({batch},)"
        )
    return np.broadcast_to(values, (batch,)).astype(dtype)


def _check_targets(targets: np.ndarray, candidates: np.ndarray) -> None:
    found = (candidates == targets[:, None]).any(axis=1)  # (batch,)
    if not found.all():
        row = int(found.argmin())
        raise ValueError(f"candidates of row {row} lack its target {targets[row]}: add the target to the candidates")


def _check_shown(shown: np.ndarray, candidates: np.ndarray) -> None:
    missing = shown & ~(candidates != PADDING_ITEM_ID).any(axis=1)  # (batch,)
    if missing.any():
        raise ValueError(
            f"row {missing.argmax()} shall show candidates and has none: pass candidates, or show_candidates=False"
        )


__all__ = ["CANDIDATE_PLACEHOLDER_ID", "HISTORY_PLACEHOLDER_ID", "PromptBuilder", "Prompts", "read_templates"]
