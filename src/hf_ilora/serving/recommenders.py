"""The recommenders that `recommend_all` accepts, and what it needs to know about each."""

import hashlib
import inspect
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike

from hf_ilora.distillation.ensemble import EnsembleTeacher
from hf_ilora.distillation.teachers import model_fingerprint
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import SavedRecommender
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size

from .exact_item_index import ExactItemIndex
from .item_index import ItemIndex

_ARGUMENTS = ("top_k", "exclude_seen", "allowed_items", "excluded_items")


@runtime_checkable
class Recommender(Protocol):
    """Any other object that recommends: a model of another library, a service, a rule.

    Attributes:
        num_items: size of the catalogue; item ids run 1..num_items.
        catalogue: catalogue of these items, or None.
        fingerprint: identifies everything that determines the answers, such as the sha256 of the weights; a run is
            resumed only if it has not changed.
    """

    num_items: int
    catalogue: Catalogue | None
    fingerprint: str

    def recommend(
        self,
        histories: np.ndarray,
        top_k: int,
        exclude_seen: bool,
        allowed_items: np.ndarray | None,
        excluded_items: np.ndarray | None,
    ) -> tuple[ArrayLike, ArrayLike]:
        """Recommend items to a batch of users.

        Args:
            histories: (users, longest) int64 array of item ids, oldest first, padded with 0 on the right.
            top_k: items per user.
            exclude_seen: leave out the items of the history.
            allowed_items, excluded_items: None, or an array of item ids: (items,) for all users, or (users, any) with
                a row for each, padded with 0.

        Returns:
            item_ids (users, top_k), best first, and scores (users, top_k): tensors, arrays or lists.
        """


AnyRecommender: TypeAlias = SavedRecommender | ItemIndex | ExactItemIndex | EnsembleTeacher | Recommender


@dataclass(frozen=True)
class AskedRecommender:
    """A recommender with the facts that `recommend_all` needs before it asks for recommendations.

    Args:
        recommender: the recommender to ask.
        num_items: size of its catalogue.
        catalogue: its catalogue, or None.
        knows_popular_items: whether it recommends to users without a history.
        batch_size: default number of users per call.
    """

    recommender: AnyRecommender
    num_items: int
    catalogue: Catalogue | None
    knows_popular_items: bool
    batch_size: int

    @classmethod
    def of(cls, recommender: AnyRecommender) -> "AskedRecommender":
        """Find out these facts about a recommender.

        Raises:
            TypeError: for an object that is not a recommender.
            ValueError: for an ensemble with stored labels, which cover the training rows only.
        """
        model = recommender.model if isinstance(recommender, ItemIndex | ExactItemIndex) else recommender
        if isinstance(model, SavedRecommender):
            batch_size = 8 if isinstance(model, ILoraForRecommendation) else _batch_size(model.device)
            return cls(
                recommender, catalogue_size(model.config), model.catalogue, model.knows_popular_items, batch_size
            )
        if isinstance(recommender, EnsembleTeacher):
            if recommender.labels:
                raise ValueError(
                    "the ensemble contains stored labels, which cover the training rows only: expected members that "
                    "recommend to any user; leave the labels out"
                )
            batch_size = _batch_size(recommender.device)
            return cls(recommender, recommender.num_items, recommender.catalogue, False, batch_size)
        if not isinstance(recommender, Recommender):
            raise TypeError(
                f"model is a {type(recommender).__name__}: expected a recommender of hf_ilora such as a "
                "SASRecForNextItem, which AutoModel.from_pretrained loads, an ItemIndex, an EnsembleTeacher, or an "
                "object with the method recommend and the attributes num_items, catalogue and fingerprint (see "
                "hf_ilora.serving.recommenders.Recommender)"
            )
        parameters = inspect.signature(recommender.recommend).parameters
        missing = [name for name in _ARGUMENTS if name not in parameters]
        if missing and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            raise TypeError(
                f"{type(recommender).__name__}.recommend does not take {', '.join(missing)}: expected "
                f"recommend(histories, {', '.join(_ARGUMENTS)})"
            )
        return cls(recommender, recommender.num_items, recommender.catalogue, False, _batch_size(torch.device("cpu")))

    def fingerprint(self) -> str:
        """Identifies everything that determines the answers."""
        recommender = self.recommender
        if isinstance(recommender, ItemIndex):
            digest = hashlib.sha256(f"{model_fingerprint(recommender.model)} {recommender.probes}".encode())
            digest.update(np.ascontiguousarray(recommender.centroids).data)
            digest.update(np.ascontiguousarray(recommender.list_of_item).data)
            return digest.hexdigest()
        if isinstance(recommender, ExactItemIndex):  # other scores than the model's
            return hashlib.sha256(f"{model_fingerprint(recommender.model)} logits".encode()).hexdigest()
        if isinstance(recommender, SavedRecommender):
            return model_fingerprint(recommender)
        return recommender.fingerprint

    def recommend(
        self,
        histories: np.ndarray,
        top_k: int,
        exclude_seen: bool,
        allowed_items: np.ndarray | None = None,
        excluded_items: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The recommender's answer, checked: item ids int64 and scores float32, (users, top_k) each.

        Raises:
            ValueError: for an answer of another shape, and ids outside the catalogue.
        """
        answer = self.recommender.recommend(
            histories,
            top_k=top_k,
            exclude_seen=exclude_seen,
            allowed_items=allowed_items,
            excluded_items=excluded_items,
        )
        item_ids, scores = (torch.as_tensor(values).cpu() for values in answer)
        expected = (len(histories), top_k)
        if item_ids.shape != expected or scores.shape != expected or item_ids.is_floating_point():
            raise ValueError(
                f"{type(self.recommender).__name__}.recommend returned item ids of shape {tuple(item_ids.shape)} and "
                f"type {item_ids.dtype} and scores of shape {tuple(scores.shape)}: expected integers {expected} and "
                "their scores"
            )
        lowest, highest = map(int, item_ids.aminmax())
        if lowest < 1 or highest > self.num_items:
            raise ValueError(
                f"{type(self.recommender).__name__}.recommend returned item {lowest if lowest < 1 else highest}: "
                f"expected ids 1..{self.num_items}"
            )
        return item_ids.long().numpy(), scores.float().numpy()


def _batch_size(device: torch.device) -> int:
    return 256 if device.type == "cpu" else 2048


__all__ = ["AskedRecommender", "Recommender"]
