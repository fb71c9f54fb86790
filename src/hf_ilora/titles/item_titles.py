"""Uses titles where interactions are missing: rows for new items, and histories for users who name what they like."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from hf_ilora.models.ilora.title_tokens import check_titles
from hf_ilora.models.loading import SavedRecommender
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.item_filters import ItemFilter, item_filter

from .embedded_encoder import EMBEDDED_ENCODER
from .encoders import TF_IDF, Encoder, encode_titles, item_title_embeddings
from .new_items import Items, add_item_rows, item_tables, new_items_table, set_item_rows

NEIGHBOURS = 20  # items whose rows are averaged for a new item
TEMPERATURES = (0.05, 0.1, 0.15, 0.2)  # of the weights in this average; known items decide which one is best
LIKED_NEIGHBOURS = 5  # items that replace a title that is not in the catalogue
_HALF_WEIGHT_COUNT = 10  # occurrences in training at which an item has half of the largest weight
_HELD_OUT = 1000  # known items that decide on the temperature
_SCORES_AT_ONCE = 1 << 24
_ROWS_AT_ONCE = 1 << 12


class ItemTitles:
    """The titles of a model's catalogue as vectors.

        z(t)   = P (e(t) - mean) / sqrt(variances + their mean), scaled to length 1, where e encodes a title and P are
                 the principal components of the catalogue's titles
        row(t) = average of the table's rows of the 20 items j with the largest cosine z(t) z(j), among those that occur
                 n_j > 0 times in training, with the weights n_j / (n_j + 10) * exp(z(t) z(j) / temperature)

    The temperature is the one of four that best predicts the rows of known items from those of other items. If the
    model scores by cosine, directions and lengths are averaged separately. Dot products need the plain average, which
    is the shorter, the less the neighbours agree. The bias of a new item is the mean bias of the rarer half of the
    items.

    Args:
        model: a recommender with a catalogue. Only SASRec, GRU4Rec and Caser accept new items.
        encoder: encodes titles, see `encode_titles`.
        title_embeddings: (num_items + 1, size) vectors of the catalogue's titles, row 0 for padding; None encodes them.
        item_counts: (num_items + 1,) occurrences of each item in training; None: those of the catalogue, or equal ones
            if the catalogue has no counts.
        encoder_settings: further arguments of `encode_titles`.

    Attributes:
        catalogue: the catalogue of the model.
        vectors: (num_items + 1, components) z(t) of all titles, zero for padding.

    Raises:
        ValueError: the model has no catalogue; the title embeddings have another shape, contain NaN or are all equal;
            or no item occurs in training.
    """

    def __init__(
        self,
        model: SavedRecommender,
        encoder: Encoder = EMBEDDED_ENCODER,
        *,
        title_embeddings: torch.Tensor | None = None,
        item_counts: torch.Tensor | None = None,
        **encoder_settings: Any,
    ):
        if model.catalogue is None:
            raise ValueError(
                "the model has no catalogue, whose titles are needed: set model.catalogue = sequences.catalogue"
            )
        self.model, self.encoder, self.encoder_settings = model, encoder, encoder_settings
        if title_embeddings is None:
            title_embeddings = item_title_embeddings(model.catalogue, encoder, **encoder_settings)
        counts = model.catalogue.counts if item_counts is None else item_counts
        counts = torch.ones(len(model.catalogue) + 1) if counts is None else torch.as_tensor(counts).cpu().float()
        self._set_catalogue(model.catalogue, title_embeddings, counts)

    def _set_catalogue(self, catalogue: Catalogue, title_embeddings: torch.Tensor, counts: torch.Tensor) -> None:
        num_items = len(catalogue)
        title_embeddings = _checked(title_embeddings, num_items + 1, "one for each item, and row 0 for padding")
        if counts.shape != (num_items + 1,):
            raise ValueError(
                f"item_counts have shape {tuple(counts.shape)}: expected {(num_items + 1,)}, one per item and one for "
                "padding"
            )
        if not counts[1:].any():
            raise ValueError("no item of the catalogue occurs in training: expected items with trained rows")
        mean = title_embeddings[1:].mean(0, dtype=torch.float64)  # (size,)
        covariance = sum(
            (part.double() - mean).T @ (part.double() - mean) for part in title_embeddings[1:].split(_ROWS_AT_ONCE)
        )
        variances, directions = torch.linalg.eigh(covariance / num_items)  # (size,), (size, size)
        varies = variances > 1e-10 * (variances.sum() + mean.square().sum())
        if not varies.any():
            raise ValueError(
                f"all {num_items} titles have the same vector: expected titles that tell items apart; choose another "
                "encoder, or give the items titles"
            )
        variances, directions = variances[varies], directions[:, varies]
        # Without adding the mean variance, fewer titles than numbers per vector would all become orthogonal.
        self._projection = directions / (variances + variances.mean()).sqrt()  # (size, components)
        self._mean, self.catalogue = mean, catalogue
        self._storage = F.pad(self._projected(title_embeddings[1:]), (0, 0, 1, 0))
        self.vectors = self._storage  # (num_items + 1, components)
        self._counts = counts.clone()  # (num_items + 1,)
        self._counts[0] = 0
        self._drop_derived()

    def _drop_derived(self) -> None:
        """Drop cached values that were derived from the catalogue, the vectors and the counts."""
        for name in ("temperature", "_item_of_title"):
            vars(self).pop(name, None)

    # --- new items ---

    def add_items(self, items: Items, title_embeddings: torch.Tensor | None = None) -> list[int]:
        """Add items to the model and its catalogue, without training.

        The model is changed in place; use it and save it as before. Every call copies the item tables, so add many
        items at once. No other thread may use the model meanwhile. Existing optimizers do not train the new tables.

        Args:
            items: (raw id, title) pairs, or a table with the columns `raw_id` (or `item_id`), `title` and optionally
                `year` and `genres`. Their count in the catalogue becomes 0.
            title_embeddings: (items, size) vectors of their titles by the same encoder; None encodes them.

        Returns:
            Their item ids, which follow those of the catalogue.

        Raises:
            TypeError: the model has no trained table of items.
            ValueError: there are no items; raw ids are repeated, already in the catalogue or of another type; a title
                is missing or blank; the title embeddings have another shape or contain NaN; or teacher embeddings are
                not folded.
        """
        item_tables(self.model)
        self._check_catalogue()
        table = new_items_table(items, self.catalogue)
        catalogue = self.catalogue.grown_by(table)
        new = torch.arange(len(self.catalogue), len(catalogue)) + 1
        counts = F.pad(self._counts, (0, len(new)))
        if title_embeddings is None and self.encoder == TF_IDF:  # TF-IDF vectors depend on all titles
            embeddings = item_title_embeddings(catalogue, self.encoder, **self.encoder_settings)
            self._set_catalogue(catalogue, embeddings, counts)
        else:
            vectors = self._vectors(table["title"].to_pylist(), title_embeddings)
            temperature = self.temperature
            self._append(vectors)
            self.catalogue, self._counts = catalogue, counts
            self._drop_derived()
            self.temperature = temperature  # depends only on known items
        add_item_rows(self.model, *self._rows(self.vectors[new]), catalogue)
        return new.tolist()

    def fill_new_items(self) -> int:
        """Set the rows of catalogue items that never occur in training, from their titles.

        Training leaves these rows at their initial values, or pushes them away from every user. The model is changed in
        place.

        Returns:
            The number of these items.

        Raises:
            TypeError, ValueError: the tables of the model cannot be changed, as in `add_items`.
        """
        item_tables(self.model)
        self._check_catalogue()
        new = (self._counts[1:] == 0).nonzero().squeeze(1) + 1
        if len(new):
            set_item_rows(self.model, new, *self._rows(self.vectors[new]))
        return len(new)

    @cached_property
    def temperature(self) -> float:
        """The temperature of the neighbours' weights."""
        known = self._counts.nonzero().squeeze(1)
        if len(known) < 2:
            return TEMPERATURES[0]
        held_out = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:_HELD_OUT]]
        item_ids, cosines = self._nearest(self.vectors[held_out], NEIGHBOURS, self._counts > 0, held_out)
        table = item_tables(self.model)[-1]  # the one that scores
        rows = _rows_of(table, held_out)
        importance = self._counts[held_out] / (self._counts[held_out] + _HALF_WEIGHT_COUNT)

        def quality(temperature: float) -> float:
            predicted = self._averages(table, item_ids, cosines, temperature)
            return float((F.cosine_similarity(predicted, rows) * importance).sum())

        return max(TEMPERATURES, key=quality)

    # --- users who name what they like ---

    def nearest_items(
        self, titles: Sequence[str], top_k: int = 1, title_embeddings: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of the catalogue with the most similar titles.

        Args:
            titles: any texts.
            top_k: items per text.
            title_embeddings: (titles, size) vectors of these texts by the same encoder; None encodes them.

        Returns:
            item_ids (titles, top_k) int64, most similar first, and cosines (titles, top_k).

        Raises:
            ValueError: there are no texts or blank ones, the vectors have another shape or contain NaN, or `top_k` is
                larger than the catalogue.
        """
        if not 1 <= top_k <= len(self.catalogue):
            raise ValueError(f"top_k is {top_k}: expected 1 to {len(self.catalogue)}, the items of the catalogue")
        self._check_catalogue()
        check_titles(titles)
        is_item = torch.arange(len(self.catalogue) + 1) > 0
        return self._nearest(self._vectors(titles, title_embeddings), top_k, is_item)

    def histories(self, liked: Sequence[Sequence[str]]) -> list[list[int]]:
        """Histories, oldest first, for users who name what they like.

        A title of the catalogue, in any case, becomes its item. Any other text becomes the five items with the most
        similar titles, the most similar one last.

        Args:
            liked: the titles that each user likes, oldest first.

        Returns:
            Item ids for each user.

        Raises:
            ValueError: a title is blank, or a user has a string instead of a list of titles.
        """
        liked = _checked_liked(liked)
        texts = list(dict.fromkeys(text for titles in liked for text in titles if not self._is_title(text)))
        items_of_text = {}
        if texts:
            nearest, _ = self.nearest_items(texts, min(LIKED_NEIGHBOURS, len(self.catalogue)))
            items_of_text = dict(zip(texts, nearest.flip(1).tolist(), strict=True))
        named = self._item_of_title
        return [
            [item for text in titles for item in items_of_text.get(text) or [named[text.strip().casefold()]]]
            for titles in liked
        ]

    def recommend(
        self,
        liked: Sequence[Sequence[str]],
        top_k: int = 10,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend items to users who name what they like.

        Args:
            liked: the titles that each user likes, oldest first: titles of items, or any texts. A user without titles
                gets the most popular items, if the catalogue has counts.
            top_k: items per user. Items that the user named are excluded.
            allowed_items, excluded_items: as for the `recommend` of the model.

        Returns:
            item_ids (users, top_k) int64, best first, and scores (users, top_k) float32: log p over the whole
            catalogue.

        Raises:
            ValueError: as `histories`, and as the `recommend` of the model.
        """
        liked = _checked_liked(liked)
        named = [
            {self._item_of_title[text.strip().casefold()] for text in row if self._is_title(text)} for row in liked
        ]
        others = item_filter("excluded_items", excluded_items, len(liked), len(self.catalogue))
        if others is not None:
            others = others.expand(len(liked), -1) if others.dim() == 1 else others
            named = [items | set(row) for items, row in zip(named, others.tolist(), strict=True)]
        return self.model.recommend(
            self.histories(liked), top_k, exclude_seen=False, allowed_items=allowed_items, excluded_items=named
        )

    @cached_property
    def _item_of_title(self) -> dict[str, int]:
        """The item of each title; the first one if several items share a title."""
        titles = self.catalogue.table["title"].to_pylist()
        return {title.strip().casefold(): row for row, title in reversed(list(enumerate(titles, start=1)))}

    def _is_title(self, text: str) -> bool:
        return isinstance(text, str) and text.strip().casefold() in self._item_of_title

    # --- vectors and rows ---

    def _append(self, vectors: torch.Tensor) -> None:
        """Append vectors (titles, components); reserves memory for more, because copying all takes milliseconds."""
        start, end = len(self.vectors), len(self.vectors) + len(vectors)
        if end > len(self._storage):
            self._storage = F.pad(self.vectors, (0, 0, 0, end + end // 8 - start))
        self._storage[start:end] = vectors
        self.vectors = self._storage[:end]

    def _check_catalogue(self) -> None:
        if self.model.catalogue is not self.catalogue:
            raise ValueError(
                "the catalogue of the model has been replaced since these titles were encoded: make a new "
                "ItemTitles(model)"
            )

    def _projected(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(titles, size) -> z, (titles, components) float32."""
        parts = embeddings.split(_ROWS_AT_ONCE)
        return torch.cat([F.normalize((part.double() - self._mean) @ self._projection).float() for part in parts])

    def _vectors(self, titles: Sequence[str], embeddings: torch.Tensor | None) -> torch.Tensor:
        if embeddings is None:
            if self.encoder == TF_IDF:
                raise ValueError(
                    "the vectors of TF-IDF depend on all titles together, so other texts have none: choose another "
                    "encoder"
                )
            embeddings = encode_titles(titles, self.encoder, **self.encoder_settings)
        embeddings = _checked(embeddings, len(titles), "one for each title")
        if embeddings.shape[1] != len(self._mean):
            raise ValueError(
                f"title embeddings have {embeddings.shape[1]} numbers per title: expected {len(self._mean)}, as those "
                "of the catalogue; use the same encoder"
            )
        return self._projected(embeddings)

    def _nearest(
        self, vectors: torch.Tensor, top_k: int, allowed: torch.Tensor, left_out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The items with the largest cosines.

        Args:
            vectors: (titles, components).
            top_k: items per title; fewer if fewer are allowed.
            allowed: (num_items + 1,) bool, the items to choose from.
            left_out: (titles,) an allowed item to leave out for each title; None leaves none out.

        Returns:
            item_ids and cosines, (titles, top_k) each, the largest first.
        """
        top_k = min(top_k, int(allowed.sum()) - (left_out is not None))
        parts = []
        for rows in torch.arange(len(vectors)).split(max(1, _SCORES_AT_ONCE // len(self.vectors))):
            cosines = (vectors[rows] @ self.vectors.T).masked_fill_(~allowed, float("-inf"))  # (rows, num_items + 1)
            if left_out is not None:
                cosines.scatter_(1, left_out[rows].unsqueeze(1), float("-inf"))
            parts.append(cosines.topk(top_k, dim=1))
        cosines, item_ids = (torch.cat(each) for each in zip(*parts, strict=True))
        return item_ids, cosines

    def _rows(self, vectors: torch.Tensor) -> tuple[list[torch.Tensor], float | None]:
        """A row in each item table for titles with these vectors, (titles, components), and their bias."""
        item_ids, cosines = self._nearest(vectors, NEIGHBOURS, self._counts > 0)
        parts = list(zip(item_ids.split(_ROWS_AT_ONCE), cosines.split(_ROWS_AT_ONCE), strict=True))
        rows = [
            torch.cat([self._averages(table, *part, self.temperature) for part in parts])
            for table in item_tables(self.model)
        ]
        if self.model.head.bias is None:
            return rows, None
        known = self._counts.nonzero().squeeze(1)
        counts, biases = self._counts[known], _rows_of(self.model.head.bias, known)
        rarity = biases if (counts == counts[0]).all() else counts
        return rows, float(biases[rarity <= rarity.median()].mean())

    def _averages(
        self, table: torch.Tensor, item_ids: torch.Tensor, cosines: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """(titles, hidden) weighted averages of the rows of `item_ids`, (titles, neighbours)."""
        log_weights = (self._counts[item_ids] / (self._counts[item_ids] + _HALF_WEIGHT_COUNT)).log()
        weights = (cosines / temperature + log_weights).softmax(1).unsqueeze(-1)  # (titles, neighbours, 1)
        rows = _rows_of(table, item_ids)  # (titles, neighbours, hidden)
        if self.model.config.score_temperature is None:
            return (weights * rows).sum(1)
        lengths = (weights * rows.norm(dim=-1, keepdim=True)).sum(1)  # (titles, 1)
        return F.normalize((weights * F.normalize(rows, dim=-1)).sum(1), dim=-1) * lengths


def add_items(
    model: EncoderForNextItem,
    items: Items,
    encoder: Encoder = EMBEDDED_ENCODER,
    *,
    title_embeddings: torch.Tensor | None = None,
    **encoder_settings: Any,
) -> EncoderForNextItem:
    """Add items to a trained SASRec, GRU4Rec or Caser and its catalogue, without training: see `ItemTitles`.

    The first call encodes all titles of the catalogue. Further calls with the same encoder encode only the new titles,
    as long as the model keeps its catalogue.

    Args:
        model: a model with a catalogue; changed in place.
        items: (raw id, title) pairs, a dictionary of titles by raw id, or a table (of pyarrow, pandas or datasets) with
            the columns `raw_id` (or `item_id`), `title` and optionally `year` and `genres`.
        encoder: encodes titles, see `encode_titles`.
        title_embeddings: (num_items + items + 1, size) vectors of all titles: row 0 for padding, then the catalogue,
            then the new items; None encodes the titles.
        encoder_settings: further arguments of `encode_titles`.

    Returns:
        The model, with the new items after the others. Save it as before.

    Raises:
        TypeError, ValueError: as `ItemTitles` and its `add_items`.
    """
    item_tables(model)
    new_embeddings = None
    if title_embeddings is not None:
        num_items = catalogue_size(model.config)
        titles = ItemTitles(model, encoder, title_embeddings=title_embeddings[: num_items + 1])
        new_embeddings = title_embeddings[num_items + 1 :]
    else:
        kept: ItemTitles | None = vars(model).get("_item_titles")
        if (
            kept is not None
            and kept.catalogue is model.catalogue
            and (kept.encoder, kept.encoder_settings) == (encoder, encoder_settings)
        ):
            titles = kept
        else:
            titles = ItemTitles(model, encoder, **encoder_settings)
    titles.add_items(items, new_embeddings)
    if title_embeddings is None:
        model._item_titles = titles
    return model


def fill_new_items(model: EncoderForNextItem, encoder: Encoder = EMBEDDED_ENCODER, **settings: Any) -> int:
    """Set the rows of catalogue items that never occur in training, from their titles.

    Args:
        model: a model with a catalogue; changed in place.
        encoder, settings: as for `ItemTitles`.

    Returns:
        The number of these items.

    Raises:
        TypeError, ValueError: as `ItemTitles` and its `fill_new_items`.
    """
    return ItemTitles(model, encoder, **settings).fill_new_items()


def _rows_of(table: torch.Tensor, item_ids: torch.Tensor) -> torch.Tensor:
    return table.detach()[item_ids.to(table.device)].float().cpu()


def _checked_liked(liked: Sequence[Sequence[str]]) -> list[list[str]]:
    if not isinstance(liked, Iterable):
        raise ValueError(f"liked is {liked!r}: expected a list of titles per user, such as [['Toy Story (1995)']]")
    for number, titles in enumerate(liked):
        if not isinstance(titles, Iterable):
            raise ValueError(f"liked[{number}] is {titles!r}: expected a list of titles per user")
        if isinstance(titles, str):
            shown = liked if isinstance(liked, str) else titles
            raise ValueError(
                f"liked[{number}] is the string {titles!r}: expected a list of titles per user, such as [[{shown!r}]]"
            )
    return [list(titles) for titles in liked]


def _checked(title_embeddings: torch.Tensor, num_rows: int, which: str) -> torch.Tensor:
    """Title embeddings (rows, size), float32 on the CPU."""
    embeddings = torch.as_tensor(title_embeddings).detach().cpu().float()
    if embeddings.dim() != 2 or len(embeddings) != num_rows:
        raise ValueError(
            f"title embeddings have shape {tuple(embeddings.shape)}: expected ({num_rows}, size), {which}; encode "
            "these titles"
        )
    finite = torch.isfinite(embeddings).all(1)
    if not finite.all():
        raise ValueError(
            f"row {int(finite.int().argmin())} of the title embeddings contains NaN or inf: expected finite numbers; "
            "encode again"
        )
    return embeddings


__all__ = ["ItemTitles", "add_items", "fill_new_items"]
