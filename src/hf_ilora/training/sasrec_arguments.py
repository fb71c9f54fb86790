"""Arguments of train_sasrec.py: those of every next-item training, with a start that depends on the data."""

import logging
from dataclasses import dataclass, field
from typing import ClassVar

from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.titles.encoders import TF_IDF, checked_item_titles

from .initial_items import INITIAL_ITEMS
from .next_item_arguments import NextItemTrainingArguments

logger = logging.getLogger(__name__)

AUTO = "auto"
AUTO_START = "titles_and_cooccurrence"


@dataclass
class SASRecTrainingArguments(NextItemTrainingArguments):
    """Training of a SASRec: `NextItemTrainingArguments` with another default for `initial_items`.

    Args:
        initial_items: also "auto", "titles_and_cooccurrence" where the data and the model allow it, else "random"; see
            `decide_initial_items`.
    """

    initial_items_choices: ClassVar[tuple[str, ...]] = (AUTO, *INITIAL_ITEMS)

    initial_items: str = field(
        default=AUTO,
        metadata={
            "help": "item embeddings of the untrained model: random, cooccurrence, plain_cooccurrence (no logarithm, "
            "for data in which most items are rare), titles, titles_and_cooccurrence (no logarithm), "
            "titles_and_log_cooccurrence, or auto: titles_and_cooccurrence if the data have titles, else random",
        },
    )


def decide_initial_items(training: SASRecTrainingArguments, config: SASRecConfig, sequences: SequenceDatasets) -> None:
    """Replace the `initial_items` "auto" by the start that the data and the model allow, and log it."""
    if training.initial_items != AUTO:
        return
    obstacle = _obstacle(training, config, sequences)
    training.initial_items = "random" if obstacle else AUTO_START
    if obstacle:
        logger.info("initial_items is random: %s", obstacle)
    else:
        logger.info(
            "initial_items is %s, since the data have titles, which %s encodes; --initial_items random starts without",
            AUTO_START,
            training.title_encoder,
        )


def _obstacle(training: SASRecTrainingArguments, config: SASRecConfig, sequences: SequenceDatasets) -> str | None:
    """Why a model cannot start from titles and co-occurrence; None if it can."""
    try:
        checked_item_titles(sequences.catalogue)
    except ValueError:
        return "the data have no titles that tell items apart"
    if training.item_table == "row_sharded":
        return "item_table is row_sharded, and a start from titles and co-occurrence makes a whole table"
    if config.block_type != "pre_norm":
        return f"a start from titles and co-occurrence needs block_type pre_norm, and it is {config.block_type}"
    if config.hidden_size >= config.num_items:
        return (
            f"a start from titles and co-occurrence needs a hidden_size below the {config.num_items} items, and it is "
            f"{config.hidden_size}"
        )
    if training.title_encoder != TF_IDF and is_deepspeed_zero3_enabled():
        return "ZeRO-3 spreads the weights of the title encoder over processes (title_encoder tf-idf has none)"
    return None


__all__ = ["SASRecTrainingArguments", "decide_initial_items"]
