"""Checks before the first step that every prompt fits into the language model's context."""

import copy
import logging

import numpy as np

from hf_ilora.models.ilora.prompts import PromptBuilder
from hf_ilora.models.next_item.catalogue import Catalogue

from .candidate_rows import CandidateRows
from .prompt_collator import PromptCollator

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 256


def check_prompt_lengths(
    collator: PromptCollator, rows: CandidateRows, epochs: range, catalogue: Catalogue, name: str
) -> None:
    """Raise a ValueError for a prompt that is too long, by building the prompts of all epochs.

    The draws of an epoch depend on seed, epoch and row alone, so these are the prompts that training will see. If even
    the longest titles together fit, no prompt is built.

    Args:
        collator: makes the prompts.
        rows: the data set; its epoch is restored.
        epochs: the epochs of the training, from 0.
        catalogue: title and raw id of the item, for the message.
        name: name of the data set, for the message.

    Raises:
        ValueError: for a prompt that is longer than the context, naming the item with the longest title in it.
    """
    builder = collator.prompt_builder
    title_lengths = builder.title_tokens.lengths  # (num_items + 1,), 0 for padding
    if builder.max_tokens is None or _most_tokens(builder, rows.num_candidates) <= builder.max_tokens:
        return
    logger.info("measuring the prompts of %s against a context of %d tokens", name, builder.max_tokens)
    measuring = copy.copy(builder)
    measuring.max_tokens = None
    measure = PromptCollator(measuring, collator.candidate_fraction, None, collator.scores_candidates)
    before = rows.epoch
    try:
        for epoch in epochs:
            rows.set_epoch(epoch)
            for first in range(0, len(rows), _ROWS_AT_A_TIME):
                drawn = [rows[index] for index in range(first, min(first + _ROWS_AT_A_TIME, len(rows)))]
                batch = measure(drawn)
                lengths = batch["attention_mask"].sum(1).numpy()  # (rows,)
                if collator.scores_candidates:  # each candidate's title in turn follows the prompt
                    lengths = lengths + title_lengths[batch["candidates"].numpy()].max(axis=1) + 1
                if lengths.max() <= builder.max_tokens:
                    continue
                row = int(lengths.argmax())
                items = np.append(drawn[row]["history"][-builder.max_history :], drawn[row]["target"])
                if batch["shows_candidates"][row] or collator.scores_candidates:
                    items = np.append(items, drawn[row]["candidates"])
                longest = int(items[title_lengths[items].argmax()])
                title, raw_id = catalogue.titles([longest])[0], catalogue.raw_ids([longest])[0]
                raise ValueError(
                    f"the prompt of row {first + row} of {name} in epoch {epoch + 1} has {lengths[row]} tokens: "
                    f"expected at most {builder.max_tokens}, the language model's context; its longest title is that "
                    f"of item {raw_id}, {title!r}, with {title_lengths[longest]} tokens: shorten titles, lower "
                    "max_history or num_candidates, or take a language model with a longer context"
                )
    finally:
        rows.set_epoch(before)


def _most_tokens(builder: PromptBuilder, num_candidates: int) -> int:
    """An upper bound on the number of tokens of a prompt."""
    longest = np.sort(builder.title_tokens.lengths)[::-1]
    titles = longest[: builder.max_history].sum() + longest[:num_candidates].sum() + longest[0] + 1
    return int(builder.longest_text + titles + (builder.max_history + num_candidates) * builder.longest_mark)


__all__ = ["check_prompt_lengths"]
