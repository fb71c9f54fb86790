"""The item embeddings that an untrained SASRec starts from."""

import logging

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ilora.data.columns import training_sequences
from hf_ilora.downloads import DownloadError
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings
from hf_ilora.titles.encoders import TF_IDF, checked_item_titles, item_title_embeddings
from hf_ilora.titles.joint import joint_item_embeddings
from hf_ilora.titles.pca import pca_embeddings

logger = logging.getLogger(__name__)

WITH_TITLES = ("titles", "titles_and_cooccurrence", "titles_and_log_cooccurrence")
INITIAL_ITEMS = ("random", "cooccurrence", "plain_cooccurrence", *WITH_TITLES)


def initial_item_embeddings(
    initial_items: str,
    rows: datasets.Dataset,
    config: SASRecConfig,
    item_counts: torch.Tensor,
    title_embeddings: torch.Tensor | None,
    title_prior: float,
    targets_only: bool,
) -> torch.Tensor:
    """The embeddings that `initial_items` names, any of INITIAL_ITEMS but "random".

    Args:
        initial_items: see `NextItemTrainingArguments`.
        rows: the training rows.
        config: configuration of the model.
        item_counts: (num_items + 1,), occurrences of each item in training, as `windows.item_counts` counts them.
        title_embeddings: (num_items + 1, any), where `initial_items` needs them.
        title_prior: number of occurrences with which titles count as much as co-occurrence.
        targets_only: whether only the last item of a row is a target.

    Returns:
        (num_items + 1, hidden) float32.

    Raises:
        ValueError: for a hidden size that the titles or the number of items do not allow.
    """
    size, uses_cosine = config.hidden_size, config.score_temperature is not None
    if initial_items == "titles":
        embeddings = pca_embeddings(title_embeddings, size)
        return embeddings / embeddings[1:].norm(dim=1).mean()
    logger.info("factorising the co-occurrence of %d items", config.num_items)
    cooccurrence = cooccurrence_embeddings(
        np.split(*training_sequences(rows))[1:-1],
        config.num_items,
        size,
        take_logarithm=initial_items in ("cooccurrence", "titles_and_log_cooccurrence"),
        # A cosine reads directions only; the scale of dot products is that of the scores.
        mean_norm=1.0 if uses_cosine else None,
        targets_only=targets_only,
    )
    if initial_items not in WITH_TITLES:
        return cooccurrence
    joint = joint_item_embeddings(cooccurrence, title_embeddings, item_counts, size, title_prior)
    if uses_cosine:
        return joint
    # In a dot product, lengths say how much is known of an item: those of co-occurrence are kept.
    lengths = cooccurrence.norm(dim=1, keepdim=True)  # (num_items + 1, 1)
    known = lengths[lengths > 0]
    lengths[lengths == 0] = known.min() if len(known) else 1.0
    return F.normalize(joint, dim=1) * lengths


def check_initial_items(model: EncoderForNextItem, initial_items: str) -> None:
    """Raise a ValueError for a model that cannot start from item embeddings."""
    if not isinstance(model, SASRecForNextItem):
        raise ValueError(
            f"initial_items is {initial_items!r} for a {type(model).__name__}: expected 'random', since only SASRec "
            "can start from item embeddings"
        )
    if model.name_or_path:
        raise ValueError(
            f"initial_items is {initial_items!r} for the model of {model.name_or_path}, which is trained: expected "
            "'random', or an untrained model"
        )
    if model.config.block_type != "pre_norm":
        raise ValueError(
            f"initial_items is {initial_items!r} for block_type {model.config.block_type!r}, whose attention has no "
            "output projection: expected block_type 'pre_norm', or initial_items 'random'"
        )


def encoded_titles(catalogue: Catalogue | None, args, trust_remote_code: bool = False) -> torch.Tensor:
    """The titles of a catalogue, encoded by `title_encoder` and `title_layer`; the main process goes first.

    Args:
        catalogue: the items with their titles.
        args: `NextItemTrainingArguments`.
        trust_remote_code: run code that comes with the encoder.

    Returns:
        (num_items + 1, size) float32, zeros for padding.

    Raises:
        ValueError: without a catalogue or with titles that say nothing about the items, and as `encode_titles`.
        DownloadError: when the encoder cannot be downloaded.
    """
    check_titles(catalogue, args.title_encoder)
    try:
        with args.main_process_first(desc="encoding of titles"):
            return item_title_embeddings(
                catalogue,
                args.title_encoder,
                layer=args.title_layer,
                device=args.device,
                trust_remote_code=trust_remote_code,
            )
    except DownloadError as error:
        raise DownloadError(
            f"title_encoder {args.title_encoder} cannot be downloaded: expected a network once; without one, pass "
            "--title_encoder tf-idf or the folder of an encoder, or leave titles out, as --initial_items cooccurrence "
            f"does ({error})"
        ) from error


def check_titles(catalogue: Catalogue | None, encoder: str) -> None:
    """Raise a ValueError where the titles of a model cannot be encoded."""
    if catalogue is None:
        raise ValueError(
            "there is no catalogue, so there are no titles to encode: expected "
            "processing_class=sequences.catalogue, or title_embeddings"
        )
    checked_item_titles(catalogue)
    if encoder != TF_IDF and is_deepspeed_zero3_enabled():
        raise ValueError(
            "ZeRO-3 spreads the weights of the title encoder over processes: expected title_embeddings that were "
            "encoded before, title_encoder 'tf-idf', or another accelerate configuration"
        )


def checked_title_embeddings(table: torch.Tensor, num_items: int) -> torch.Tensor:
    """Title embeddings (num_items + 1, any) that a user passes, in float32 and with zeros for padding.

    Raises:
        ValueError: for another number of items, and numbers that are not finite.
    """
    table = torch.as_tensor(table).detach().float()
    if table.dim() != 2 or len(table) != num_items + 1:
        raise ValueError(
            f"title_embeddings have shape {tuple(table.shape)}: expected ({num_items + 1}, any), a row for padding and "
            "one for each item, such as item_title_embeddings(sequences.catalogue)"
        )
    finite = torch.isfinite(table[1:]).all(1)
    if not finite.all():
        raise ValueError(
            f"title_embeddings of item {int(finite.int().argmin()) + 1} contain NaN or inf: expected finite numbers; "
            "encode again"
        )
    return F.pad(table[1:], (0, 0, 1, 0)) if table[0].any() else table


__all__ = [
    "INITIAL_ITEMS",
    "WITH_TITLES",
    "check_initial_items",
    "check_titles",
    "checked_title_embeddings",
    "encoded_titles",
    "initial_item_embeddings",
]
