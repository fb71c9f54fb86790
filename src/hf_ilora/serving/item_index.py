"""An approximate index of the items of a model, for catalogues whose exact ranking takes too long for one user."""

import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_ilora.files import written_whole
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.histories import padded_histories
from hf_ilora.models.next_item.item_filters import item_masks
from hf_ilora.models.next_item.next_item_model import evaluation_mode
from hf_ilora.models.next_item.top_k import ItemMasks, check_best_scores, check_top_k, ordered_top_k

INDEX_FILE = "item_index.safetensors"

_ITEMS_AT_ONCE = 2**16
_NUMBERS_AT_ONCE = 2**26
# Of k-means, which divides the catalogue into lists.
_POINTS_PER_LIST, _ROUNDS = 64, 10


class ItemIndex:
    """Finds most of the best items of a user by looking at a few lists of similar items.

    The catalogue is divided into lists around centroids. A user is compared with the centroids, then with the items of
    the nearest `probes` lists, and the model's own table scores what was found. The index keeps a copy of the table on
    the CPU, and must be built anew when the model's table changes.

    Args:
        model: a SASRec, GRU4Rec or Caser.
        centroids: (lists, width) float32.
        list_of_item: (num_items,) int64, the list of the items 1, 2 and so on.
        probes: lists to look at.

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
            digest.update(vectors)
            lists = np.ascontiguousarray(list_of_item[ids - 1], dtype=np.int64)
            self._index.add_core(len(ids), *map(faiss.swig_ptr, (vectors, ids, lists)))
        self.fingerprint = digest.hexdigest()  # of the table that scores

    @classmethod
    def build(
        cls, model: EncoderForNextItem, num_lists: int | None = None, probes: int | None = None, seed: int = 0
    ) -> "ItemIndex":
        """Divide the catalogue of a model into lists.

        Args:
            model: a SASRec, GRU4Rec or Caser, whose teacher embeddings, if any, count as they do in its scores.
            num_lists: number of lists; None means 4 x the square root of the number of items.
            probes: lists to look at for each user, see `tune`; None means an eighth of the lists.
            seed: random seed of k-means.

        Raises:
            ImportError: without the extra `index`.
            TypeError: for a model without a table of items.
            ValueError: for settings out of range.
        """
        _check(model)
        import faiss

        num_items = model.config.num_items
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
        """Write the lists to `item_index.safetensors` in a folder; the vectors remain those of the model."""
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
        histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items=None,
        excluded_items=None,
        *,
        probes: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend items as the model does, with few of them left out by mistake.

        Args:
            histories, top_k, exclude_seen, allowed_items, excluded_items: as in the model's `recommend`. Under a filter
                for all users, more lists are looked at, so that about as many items are compared as without. If each
                user has a row of `allowed_items`, all of them are compared.
            probes: lists to look at for each user; None means those of the index.

        Returns:
            item_ids (batch, top_k) int64, best first, and scores (batch, top_k) float32: the logits of the model. Their
            log p would need the scores of the whole catalogue.

        Raises:
            ValueError: as the model's `recommend`, and for `probes` out of range.
        """
        model, num_items = self.model, self.model.config.num_items
        check_top_k(top_k, num_items)
        probes = _checked_probes(self.probes if probes is None else probes, len(self.centroids))
        with evaluation_mode(model), torch.inference_mode():
            histories = padded_histories(histories, num_items, model.device, model.knows_popular_items)
            seen = histories if exclude_seen else None
            masks = item_masks(len(histories), num_items, model.device, seen, allowed_items, excluded_items)
            item_ids = histories.new_empty(len(histories), top_k)
            scores = torch.empty(item_ids.shape, device=model.device)
            has_items = histories.any(1)  # (batch,)
            if not has_items.all():
                popular = model.popular_scores().float().repeat(int((~has_items).sum()), 1)
                best = ordered_top_k(masks.of(~has_items).apply_(popular), top_k)
                scores[~has_items], item_ids[~has_items] = best
            asked = has_items.nonzero().squeeze(1)
            for users in asked.split(self._users_at_once(masks, top_k)) if len(asked) else ():
                item_ids[users], scores[users] = self._best(histories[users], masks.of(users), top_k, probes)
            check_best_scores(scores, num_items)
        return item_ids.clone(), scores.clone()

    @property
    def catalogue(self) -> Catalogue | None:
        """That of the model."""
        return self.model.catalogue

    def recall(self, histories, top_k: int = 10, exclude_seen: bool = True, probes: int | None = None) -> float:
        """Share of the items of the model's `recommend` that the index finds, averaged over histories."""
        exact, _ = self.model.recommend(histories, top_k, exclude_seen)
        return self._recall(exact, histories, exclude_seen, probes)

    def tune(self, histories, recall: float = 0.98, top_k: int = 10, exclude_seen: bool = True) -> float:
        """Set `probes` to the smallest power of two that reaches a recall on some histories, and return the recall.

        Args:
            histories: some hundred of those that will be served.
            recall: to reach, in (0, 1].
            top_k, exclude_seen: as they will be asked for.

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

    def _recall(self, exact: torch.Tensor, histories, exclude_seen: bool, probes: int | None) -> float:
        found, _ = self.recommend(histories, exact.shape[1], exclude_seen, probes=probes)
        return exact.unsqueeze(2).eq(found.unsqueeze(1)).any(2).float().mean().item()

    def _users_at_once(self, masks: ItemMasks, top_k: int) -> int:
        """How many users' candidates, with their rows of the table, are in memory."""
        candidates = top_k + sum(ids.shape[1] for ids in (masks.hidden, masks.allowed) if ids is not None)
        return max(1, _NUMBERS_AT_ONCE // (candidates * self.centroids.shape[1]))

    def _best(
        self, histories: torch.Tensor, masks: ItemMasks, top_k: int, probes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Item ids and scores (users, top_k) of histories with items; -inf where a user may get fewer."""
        newest = self.model.newest_items(histories)
        states = self.model.head.scaled(self.model.user_embeddings(newest)).float()
        if masks.allowed is not None:
            return self._best_of(masks.allowed, states, newest, masks, top_k)
        num_candidates = top_k + (0 if masks.hidden is None else masks.hidden.shape[1])
        candidates = self._search(states, num_candidates, probes, masks.available)
        item_ids, scores = self._best_of(candidates, states, newest, masks, top_k)
        lacking = ~scores.isfinite().all(1)
        if lacking.any():  # too few of the items in the lists are left
            rows = states[lacking], newest[lacking], masks.of(lacking)
            candidates = self._search(rows[0], num_candidates, len(self.centroids), masks.available)
            item_ids[lacking], scores[lacking] = self._best_of(candidates, *rows, top_k)
        return item_ids, scores

    def _best_of(
        self, candidates: torch.Tensor, states: torch.Tensor, newest: torch.Tensor, masks: ItemMasks, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the candidates of each user, (users, any) ids of which 0 is none, that the masks leave.

        `states` (users, hidden size) are those that are multiplied with the table, `newest` (users, length) what the
        model reads.
        """
        head = self.model.head
        if head.repeat_bias is not None and masks.allowed is None:  # the lists do not know of it
            candidates = torch.cat([candidates, newest], dim=1)
        candidates = F.pad(candidates, (0, max(0, top_k - candidates.shape[1])), value=PADDING_ITEM_ID)
        candidates = candidates.sort(1).values  # equal scores come in the order of ids
        rows = head.item_rows(candidates.flatten(), self.model._item_offsets()).float().view(*candidates.shape, -1)
        scores = torch.einsum("uh,uch->uc", states, rows)
        if head.bias is not None:
            scores = scores + head.bias[candidates].float()
        if head.repeat_bias is not None:
            scores = scores + head.repeat_bias.float() * _isin(candidates, newest)
        masked = candidates == PADDING_ITEM_ID
        masked[:, 1:] |= candidates[:, 1:] == candidates[:, :-1]
        if masks.hidden is not None:
            masked |= _isin(candidates, masks.hidden)
        if masks.available is not None:
            masked |= ~masks.available[candidates]
        best, places = ordered_top_k(scores.masked_fill(masked, float("-inf")), top_k)
        return candidates.gather(1, places), best

    def _search(
        self, states: torch.Tensor, num_candidates: int, probes: int, available: torch.Tensor | None
    ) -> torch.Tensor:
        """(users, num_candidates) ids of available items, 0 where the lists have no more."""
        import faiss

        if self.model.head.bias is not None:
            states = torch.cat([states, states.new_ones(len(states), 1)], dim=1)
        _use_torch_threads()
        num_items = self.model.config.num_items
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
    if not isinstance(model, EncoderForNextItem):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a SASRec, GRU4Rec or Caser, whose scores are products with a "
            "table of items"
        )
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


@torch.no_grad()
def _item_vectors(model: EncoderForNextItem, ids: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of item ids, all of them or some, and of what a user's state is multiplied with, (items, width) float32.

    A bias is one more column, for a state with a 1 behind it.
    """
    head, offsets = model.head, model._item_offsets()
    ids = np.arange(1, model.config.num_items + 1) if ids is None else ids
    for first in range(0, len(ids), _ITEMS_AT_ONCE):
        chunk = np.ascontiguousarray(ids[first : first + _ITEMS_AT_ONCE])
        on_device = torch.from_numpy(chunk).to(head.weight.device)
        rows = head.item_rows(on_device, offsets).float()
        if head.bias is not None:
            rows = torch.cat([rows, head.bias[on_device].float().unsqueeze(1)], dim=1)
        yield chunk, np.ascontiguousarray(rows.cpu().numpy())


def _isin(item_ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(users, items) bool: which ids of each user are among the same user's (users, any) others."""
    if not others.shape[1]:
        return torch.zeros_like(item_ids, dtype=torch.bool)
    others = others.sort(1).values
    places = torch.searchsorted(others, item_ids).clamp(max=others.shape[1] - 1)  # (users, items)
    return others.gather(1, places).eq(item_ids)


__all__ = ["INDEX_FILE", "ItemIndex"]
