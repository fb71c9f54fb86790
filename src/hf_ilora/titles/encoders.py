"""Encodes titles with a text encoder, a language model, an iLoRA or TF-IDF."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import torch

from hf_ilora.devices import default_device
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.ilora.title_tokens import check_titles
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.histories import check_batch_size

from .embedded_encoder import EMBEDDED_ENCODER
from .embedding_cache import cached_embeddings
from .encoder_source import locate_encoder
from .tf_idf import encode_with_tf_idf
from .transformer_encoder import load_transformer

logger = logging.getLogger(__name__)

TF_IDF = "tf-idf"


class TitleEncoder:
    """An encoder that stays in memory for several calls of `encode_titles(titles, encoder)`.

    It loads the model when it first encodes a title that the cache lacks.

    Args:
        encoder: folder or Hub name of a model, see `encode_titles`.
        layer, dtype, device, trust_remote_code: as in `encode_titles`; set them here, not there.

    Raises:
        ValueError, OSError, DownloadError, ChecksumError: as `encode_titles`.
    """

    def __init__(
        self,
        encoder: str | os.PathLike,
        *,
        layer: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ):
        self.name, self.layer, self.trust_remote_code = str(encoder), layer, trust_remote_code
        self.device = torch.device(device) if device else default_device()
        stored: torch.dtype | str = torch.float32 if self.device.type == "cpu" else "auto"
        self.dtype = stored if dtype is None else dtype
        self.source = locate_encoder(encoder)
        self.is_ilora = self.source.config.get("model_type") == ILoraConfig.model_type
        if self.is_ilora and layer is not None:
            raise ValueError(f"layer is {layer} for the iLoRA of {encoder}, which reads its last: expected layer=None")

    @property
    def settings(self) -> dict[str, object]:
        """Everything but the title that its vector depends on."""
        return {"encoder": self.source.identity, "layer": self.layer, "dtype": str(self.dtype)}

    @cached_property
    def _encode(self) -> Callable[[Sequence[str], int], torch.Tensor]:
        if self.is_ilora:
            ilora = ILoraForRecommendation.from_pretrained(
                self.source.location, trust_remote_code=self.trust_remote_code, **self.source.hub_arguments
            )
            return ilora.to(self.device).encode_titles
        return load_transformer(
            self.source,
            layer=self.layer,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )

    def encode(self, titles: Sequence[str], batch_size: int) -> torch.Tensor:
        """Encode distinct titles: (titles, size) float32 on the CPU, rows of length 1."""
        logger.info("encoding %d titles with %s on %s", len(titles), self.name, self.device)
        begun = time.monotonic()
        vectors = self._encode(titles, batch_size)
        logger.info("encoded %d titles in %.0f s", len(titles), time.monotonic() - begun)
        return _unit_rows(vectors, titles)


Encoder = str | os.PathLike | TitleEncoder | ILoraForRecommendation


def encode_titles(
    titles: Sequence[str],
    encoder: Encoder = EMBEDDED_ENCODER,
    *,
    layer: int | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Encode titles as unit vectors, whose dot products are the cosines between titles.

    Equal titles are encoded once. The vectors are cached in files and reused for the same titles, model and settings,
    except those of TF-IDF and of an iLoRA object.

    Args:
        titles: (titles,) strings, none of them blank.
        encoder: one of

            - the folder or Hub name of a sentence-transformers model, pooled as its files say. A model with more
              modules than a transformer and pooling needs `pip install "hf_ilora[titles]"`. The default,
              all-MiniLM-L6-v2, comes from a PyPI wheel if the Hub does not serve it;
            - the folder or Hub name of another text encoder of transformers: the mean of its last hidden states;
            - the folder or Hub name of a causal language model: their mean over the tokens of the title;
            - the folder or Hub name of an iLoRA, or an iLoRA object: as its `encode_items`;
            - a `TitleEncoder` of one of these, to load it once for several calls;
            - "tf-idf": words and pairs of words, reduced to at most 384 numbers. The vectors depend on all titles of
              the call. Needs `pip install "hf_ilora[titles]"`.
        layer: number of blocks after which a transformer's hidden states are read: 0 is the embeddings, -2 one block
            before the last; None reads them after the last block and its normalisation.
        batch_size: titles per forward, if they have up to 32 tokens; fewer for longer titles.
        dtype: dtype of the model's weights; None: the stored dtype on an accelerator, float32 on the CPU.
        device: where to encode; None: the accelerator, unless there is none or the launch is on the CPU.
        cache_dir: parent folder; by default HF_ILORA_CACHE if it is set, else ~/.cache/hf_ilora.
        trust_remote_code: run code that comes with the model.

    Returns:
        (titles, size) float32 on the CPU, rows of length 1; zero for titles of which TF-IDF knows no word.

    Raises:
        ValueError: there are no titles, a title is blank or not a string, the encoder is unknown or lacks the layer, a
            package is not installed, or a vector is not finite.
        OSError: the Hub cannot be reached, or a model has no weights in safetensors.
        DownloadError, ChecksumError: the embedded encoder cannot be downloaded.
    """
    vectors, rows = _encoded(titles, encoder, layer, batch_size, dtype, device, cache_dir, trust_remote_code)
    return vectors[rows]


def item_title_embeddings(
    catalogue_or_titles: Catalogue | Sequence[str],
    encoder: Encoder = EMBEDDED_ENCODER,
    *,
    layer: int | None = None,
    batch_size: int = 64,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
) -> torch.Tensor:
    """Encode the titles of items 1 to num_items as a table of item embeddings, with a row for padding.

    Args:
        catalogue_or_titles: the catalogue, or (num_items,) titles in the order of item ids.
        encoder, layer, batch_size, dtype, device, cache_dir, trust_remote_code: as in `encode_titles`.

    Returns:
        (num_items + 1, size) float32 on the CPU, rows of length 1 and zeros in row 0, for padding.

    Raises:
        ValueError: all titles are equal, or are the raw ids, as in a catalogue made without titles; otherwise as
            `encode_titles`.
    """
    titles = checked_item_titles(catalogue_or_titles)
    vectors, rows = _encoded(titles, encoder, layer, batch_size, dtype, device, cache_dir, trust_remote_code)
    table = torch.zeros(len(titles) + 1, vectors.shape[1])
    torch.index_select(vectors, 0, rows, out=table[1:])
    return table


def _encoded(
    titles: Sequence[str],
    encoder: Encoder,
    layer: int | None,
    batch_size: int,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    cache_dir: str | Path | None,
    trust_remote_code: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of the distinct titles, and the row of each title among them, (titles,) int64."""
    check_titles(titles)
    check_batch_size(batch_size)
    has_layers = not isinstance(encoder, ILoraForRecommendation | TitleEncoder) and encoder != TF_IDF
    if layer is not None and not has_layers:
        raise ValueError(f"layer is {layer} for an encoder without a choice of layers: expected layer=None")
    unique = sorted(set(titles))
    if isinstance(encoder, ILoraForRecommendation):
        vectors = _unit_rows(encoder.encode_titles(unique, batch_size), unique)
    elif encoder == TF_IDF:
        vectors = _unit_rows(encode_with_tf_idf(unique), unique)
    else:
        if not isinstance(encoder, TitleEncoder):
            encoder = TitleEncoder(
                encoder, layer=layer, dtype=dtype, device=device, trust_remote_code=trust_remote_code
            )
        vectors = cached_embeddings(unique, encoder.settings, lambda: encoder.encode(unique, batch_size), cache_dir)
    row_of = {title: row for row, title in enumerate(unique)}
    return vectors, torch.tensor([row_of[title] for title in titles])


def checked_item_titles(catalogue_or_titles: Catalogue | Sequence[str]) -> Sequence[str]:
    """The titles of items 1 to num_items, after checking that they tell items apart.

    Raises:
        ValueError: as `item_title_embeddings`.
    """
    if not isinstance(catalogue_or_titles, Catalogue):
        titles = catalogue_or_titles
    else:
        table = catalogue_or_titles.table
        titles = table["title"].to_pylist()
        if table["title"].equals(table["raw_id"].cast(pa.string())):
            raise ValueError(
                f"the titles of the catalogue are its raw ids (the first is {titles[0]!r}), because the data were "
                "prepared without titles: expected titles; prepare the data with a column of titles"
            )
    check_titles(titles)
    if len(titles) > 1 and len(set(titles)) == 1:
        raise ValueError(
            f"all {len(titles)} titles are {titles[0]!r}: expected titles that tell items apart; check the column that "
            "they were read from"
        )
    return titles


def _unit_rows(vectors: torch.Tensor, titles: Sequence[str]) -> torch.Tensor:
    finite = torch.isfinite(vectors).all(1)
    if not finite.all():
        raise ValueError(
            f"the vector of the title {titles[int(finite.int().argmin())]!r} contains NaN or inf: expected finite "
            "numbers; choose another dtype, such as float32, or another encoder"
        )
    vectors = vectors.float()
    return vectors.div_(vectors.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny))


__all__ = ["TF_IDF", "Encoder", "TitleEncoder", "checked_item_titles", "encode_titles", "item_title_embeddings"]
