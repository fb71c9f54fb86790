"""An approximate index of a model's items, for catalogues that are too large to rank exactly for each user."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_ilora.files import written_whole
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID, catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.histories import Histories
from hf_ilora.models.next_item.item_filters import ItemFilter
from hf_ilora.models.next_item.top_k import ItemMasks

from .candidate_items import best_candidates, check_has_table, item_rows, recommend_candidates

INDEX_FILE = "item_index.safetensors"

# Settings of k-means, which divides the catalogue into lists.
_POINTS_PER_LIST, _ROUNDS = 64, 10


class ItemIndex:
    """Finds most of a user's best items by searching a few lists of similar items.

    The catalogue is divided into lists around centroids. A user's state is compared with the centroids, then with the
    items of the nearest `probes` lists, and the model's own table scores the items found. The index keeps a copy of the
    table on the CPU, and must be rebuilt when the model's table changes.

    Args:
        model: a SASRec, GRU4Rec or Caser.
        centroids: (lists, width) float32.
        list_of_item: (num_items,) int64, the lists of items 1, 2 and so on.
        probes: number of lists to search for each user.

    Source: inverted files as in faiss, inner product.
    """

    def __init__(self, model: EncoderForNextItem, centroids: np.ndarray, list_of_item: np.ndarray, probes: int):
        import faiss

        self.model, self.probes = model, probes
        self.centroids, self.list_of_item = centroids, list_of_item
        width = centroids.shape[1]
        self._quantizer = faiss.IndexFlatIP(width)
        self._quantizer.add(centroids)
        self._index = faiss.IndexIVFFlat(self._quantizer, width, len(centroids), faiss.METRIC_INNER_PRODUCT)
        digest = hashlib.sha256()
        for ids, vectors in _item_vectors(model):
            digest.update(vectors.data)
            lists = np.ascontiguousarray(list_of_item[ids - 1], dtype=np.int64)
            self._index.add_core(len(ids), *map(faiss.swig_ptr, (vectors, ids, lists)))
        self.fingerprint = digest.hexdigest()  # of the table that scores

    @classmethod
    def build(
        cls, model: EncoderForNextItem, num_lists: int | None = None, probes: int | None = None, seed: int = 0
    ) -> "ItemIndex":
        """Divide the catalogue of a model into lists.

        Args:
            model: a SASRec, GRU4Rec or Caser; its teacher embeddings, if any, are included as in its scores.
            num_lists: number of lists; None means 4 x the square root of the number of items.
            probes: number of lists to search for each user, see `tune`; None means an eighth of the lists.
            seed: random seed of k-means.

        Raises:
            ImportError: without the extra `index`.
            TypeError: for a model without a table of items.
            ValueError: for settings out of range.
        """
        _check(model)
        import faiss

        num_items = catalogue_size(model.config)
        if num_lists is None:
            num_lists = max(1, min(round(4 * num_items**0.5), num_items // 4))
        if not 1 <= num_lists <= num_items:
            raise ValueError(f"num_lists is {num_lists}: expected 1 to {num_items}, the number of items")
        probes = _checked_probes(max(1, num_lists // 8) if probes is None else probes, num_lists)
        ids = np.arange(1, num_items + 1)
        if num_items > _POINTS_PER_LIST * num_lists:
            chosen = np.random.default_rng(seed).choice(num_items, _POINTS_PER_LIST * num_lists, replace=False)
            ids = np.sort(chosen) + 1
        points = np.concatenate([vectors for _, vectors in _item_vectors(model, ids)])
        kmeans = faiss.Kmeans(
            points.shape[1],
            num_lists,
            niter=_ROUNDS,
            seed=seed,
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=_POINTS_PER_LIST,
        )
        _use_torch_threads()
        kmeans.train(points)
        del points
        lists = [kmeans.index.search(vectors, 1)[1][:, 0] for _, vectors in _item_vectors(model)]
        return cls(model, kmeans.centroids, np.concatenate(lists), probes)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write the lists to `item_index.safetensors` in a folder; the item vectors stay in the model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"centroids": self.centroids, "list_of_item": self.list_of_item.astype(np.int32)}
        with written_whole(folder / INDEX_FILE) as path:
            save_file(tensors, path, {"fingerprint": self.fingerprint, "probes": str(self.probes)})
        return folder / INDEX_FILE

    @classmethod
    def load(cls, folder: str | os.PathLike, model: EncoderForNextItem) -> "ItemIndex":
        """Read the index of a model that `save` wrote.

        Raises:
            ImportError: without the extra `index`.
            TypeError: for a model without a table of items.
            FileNotFoundError: when the folder has no index.
            ValueError: for a damaged file, and for the index of another model, or of this one before its table changed.
        """
        _check(model)
        path = Path(folder) / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: expected the folder that ItemIndex.save wrote")
        try:
            with safe_open(path, "np") as file:
                fingerprint, probes = (file.metadata()[name] for name in ("fingerprint", "probes"))
                centroids, list_of_item = (file.get_tensor(name) for name in ("centroids", "list_of_item"))
                probes = int(probes)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): build the index again with ItemIndex.build") from error
        found, expected = (len(list_of_item), centroids.shape[1]), (model.config.num_items, _width(model))
        if found != expected:
            raise ValueError(
                f"{path} is the index of another model: it has {found[0]} items, {found[1]} wide, and the model "
                f"{expected[0]}, {expected[1]} wide; build one with ItemIndex.build(model)"
            )
        index = cls(model, centroids, list_of_item.astype(np.int64), probes)
        if index.fingerprint != fingerprint:
            raise ValueError(
                f"{path} is the index of another model, or of this one before its item table changed: expected "
                f"fingerprint {index.fingerprint[:12]} of the table, found {fingerprint[:12]}; build one with "
                "ItemIndex.build(model)"
            )
        return index

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
        *,
        probes: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend items as the model does, but miss some of them.

        Args:
            histories, top_k, exclude_seen, allowed_items, excluded_items: as in the model's `recommend`. With a filter
                for all users, more lists are searched, so that about as many items are compared as without. If each
                user has a row of `allowed_items`, all of them are compared.
            probes: number of lists to search for each user; None means the index's own `probes`.

        Returns:
            item_ids (batch, top_k) int64, best first, and scores (batch, top_k) float32: the logits of the model, since
            log p would need the scores of the whole catalogue.

        Raises:
            ValueError: as the model's `recommend`, and for `probes` out of range.
        """
        probes = _checked_probes(self.probes if probes is None else probes, len(self.centroids))
        return recommend_candidates(
            self.model,
            partial(self._best_in_lists, probes=probes),
            histories,
            top_k,
            exclude_seen,
            allowed_items,
            excluded_items,
        )

    @property
    def catalogue(self) -> Catalogue | None:
        """The catalogue of the model."""
        return self.model.catalogue

    def recall(
        self, histories: Histories, top_k: int = 10, exclude_seen: bool = True, probes: int | None = None
    ) -> float:
        """Share of the model's recommended items that the index finds, averaged over histories."""
        exact, _ = self.model.recommend(histories, top_k, exclude_seen)
        return self._recall(exact, histories, exclude_seen, probes)

    def tune(self, histories: Histories, recall: float = 0.98, top_k: int = 10, exclude_seen: bool = True) -> float:
        """Set `probes` to the smallest power of two that reaches a recall on some histories, and return that recall.

        Args:
            histories: a few hundred histories like those that will be served.
            recall: recall to reach, in (0, 1].
            top_k, exclude_seen: as in the requests that will be served.

        Raises:
            ValueError: for a recall outside of (0, 1].
        """
        if not 0 < recall <= 1:
            raise ValueError(f"recall is {recall}: expected a share in (0, 1], such as 0.98")
        exact, _ = self.model.recommend(histories, top_k, exclude_seen)
        probes, num_lists = 1, len(self.centroids)
        while (measured := self._recall(exact, histories, exclude_seen, probes)) < recall and probes < num_lists:
            probes = min(2 * probes, num_lists)
        self.probes = probes
        return measured

    def _recall(self, exact: torch.Tensor, histories: Histories, exclude_seen: bool, probes: int | None) -> float:
        found, _ = self.recommend(histories, exact.shape[1], exclude_seen, probes=probes)
        return exact.unsqueeze(2).eq(found.unsqueeze(1)).any(2).float().mean().item()

    def _best_in_lists(
        self, states: torch.Tensor, newest: torch.Tensor, masks: ItemMasks, top_k: int, probes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item ids and scores (users, top_k); -inf where fewer items are left for a user."""
        num_candidates = top_k + (0 if masks.hidden is None else masks.hidden.shape[1])
        candidates = self._search(states, num_candidates, probes, masks.available)
        item_ids, scores = best_candidates(self.model, candidates, states, newest, masks, top_k)
        lacking = ~scores.isfinite().all(1)
        if lacking.any():  # the searched lists have too few items left
            rows = states[lacking], newest[lacking], masks.of(lacking)
            candidates = self._search(rows[0], num_candidates, len(self.centroids), masks.available)
            item_ids[lacking], scores[lacking] = best_candidates(self.model, candidates, *rows, top_k)
        return item_ids, scores

    def _search(
        self, states: torch.Tensor, num_candidates: int, probes: int, available: torch.Tensor | None
    ) -> torch.Tensor:
        """(users, num_candidates) ids of available items, 0 where the searched lists have no more."""
        import faiss

        if self.model.head.bias is not None:
            states = torch.cat([states, states.new_ones(len(states), 1)], dim=1)
        _use_torch_threads()
        num_items = catalogue_size(self.model.config)
        selector = None
        if available is not None:
            probes = min(len(self.centroids), -(-probes * num_items // max(1, int(available.sum()))))
            bits = np.packbits(available.cpu().numpy(), bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersIVF(nprobe=probes, sel=selector)
        queries = np.ascontiguousarray(states.cpu().numpy())
        _, found = self._index.search(queries, min(num_candidates, num_items), params=parameters)
        return torch.from_numpy(found).clamp(min=PADDING_ITEM_ID).to(states.device)


def _check(model: EncoderForNextItem) -> None:
    """Raise unless `model` has a table of items and the extra is installed."""
    check_has_table(model)
    if find_spec("faiss") is None:
        raise ImportError('faiss is not installed: expected the extra of hf_ilora, pip install "hf_ilora[index]"')


def _checked_probes(probes: int, num_lists: int) -> int:
    if not isinstance(probes, int) or not 1 <= probes <= num_lists:
        raise ValueError(f"probes is {probes}: expected 1 to {num_lists}, the number of lists")
    return probes


def _use_torch_threads() -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())


def _width(model: EncoderForNextItem) -> int:
    return model.head.in_features + (model.head.bias is not None)


def _item_vectors(model: EncoderForNextItem, ids: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield item ids, all or the given ones, in chunks with the vectors of these items, (items, width) float32.

    If the model has a bias, it is one more column; `_search` appends a 1 to the states to match.
    """
    for chunk, rows in item_rows(model, ids):
        if model.head.bias is not None:
            rows = torch.cat([rows, model.head.bias.detach()[chunk].float().unsqueeze(1)], dim=1)
        yield chunk.cpu().numpy(), np.ascontiguousarray(rows.cpu().numpy())


__all__ = ["INDEX_FILE", "ItemIndex"]
