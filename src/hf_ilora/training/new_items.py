"""Rows for the items that training has never seen, after training."""

import logging
from dataclasses import dataclass, field

import datasets
import torch

from hf_ilora.data.columns import training_counts
from hf_ilora.titles.item_titles import ItemTitles

from .initial_items import WITH_TITLES
from .next_item_trainer import NextItemTrainer

logger = logging.getLogger(__name__)


@dataclass
class NewItemArguments:
    """Items of the catalogue that training has never seen."""

    fill_new_items: bool | None = field(
        default=None,
        metadata={
            "help": "after training, give items that never occurred in it the rows that their titles suggest; by "
            "default if the training started from titles"
        },
    )


def fill_after_training(trainer: NextItemTrainer, rows: datasets.Dataset, arguments: NewItemArguments) -> None:
    """Fill the rows of items that never occur in the training rows, if `arguments` ask for it.

    Whoever starts from titles expects these items to be recommended for what their titles say. Training undoes that:
    such an item is never a target and often a negative, which pushes its row away from every user.

    Args:
        trainer: the trainer, after `train`.
        rows: the training rows.
        arguments: whether to fill the rows.
    """
    model = trainer.model
    wanted = arguments.fill_new_items
    counts = torch.from_numpy(training_counts(rows, model.config.num_items))
    if wanted is False or (wanted is None and trainer.args.initial_items not in WITH_TITLES) or counts[1:].all():
        return
    if not model.get_input_embeddings().weight.numel() or trainer.args.item_table == "row_sharded":
        logger.warning(
            "the weights are spread over processes (ZeRO-3, or item_table row_sharded), so items that never occur in "
            "training keep their rows: call fill_new_items on the saved model"
        )
        return
    titles = ItemTitles(model, title_embeddings=trainer.item_title_embeddings(), item_counts=counts)
    logger.info("%d items never occur in training: their rows follow from their titles", titles.fill_new_items())


__all__ = ["NewItemArguments", "fill_after_training"]
