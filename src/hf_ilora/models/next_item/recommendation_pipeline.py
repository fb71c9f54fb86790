"""The pipeline of transformers for recommenders: histories of raw ids or titles in, titles and scores out."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Pipeline

from .catalogue import Catalogue
from .configuration_next_item import PADDING_ITEM_ID, TASK
from .histories import Histories
from .item_filters import ItemFilter
from .item_names import ItemNames
from .top_k import ordered_top_k

_FILTERS = ("allowed_items", "excluded_items", "candidates")
_PARAMETERS = ("top_k", "exclude_seen", *_FILTERS, "fuzzy")
_USER_KEYS = ("history", *_FILTERS)
# transformers reads these attributes of a tokenizer to batch inputs. Item ids are padded on the right, with 0.
_PADDING = SimpleNamespace(pad_token_id=PADDING_ITEM_ID, padding_side="right")


@runtime_checkable
class Recommender(Protocol):
    """The part of a model that the pipeline uses; the models of this folder and iLoRA have it."""

    catalogue: Catalogue | None
    knows_popular_items: bool

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class _User:
    """A user with item ids instead of names; each filter is (any,) int64, or None to use the call's filter."""

    history: list[int]
    allowed_items: np.ndarray | None = None
    excluded_items: np.ndarray | None = None
    candidates: np.ndarray | None = None


class SequentialRecommendationPipeline(Pipeline):
    """Recommends items to users, `pipeline("sequential-recommendation", model=...)`.

    Items are named by their raw ids or titles, or by dictionaries with `raw_id` or `title` if a text could be either.

    Args:
        model: a recommender with a catalogue: SASRec, GRU4Rec, Caser, a counting model, or an iLoRA.
        kwargs: arguments of transformers' `Pipeline`, and parameters of a call, for which they become the defaults.

    Raises:
        ValueError: for a model that is not a recommender, a model without a catalogue, and a catalogue with a column
            `score`.
    """

    # The catalogue, which comes with the model, maps names to ids; an iLoRA brings its own tokenizer.
    _load_tokenizer = False
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(self, model: Recommender, **kwargs: Any):
        if not isinstance(model, Recommender):
            raise ValueError(
                f"the model is a {type(model).__name__} (model_type {model.config.model_type}): expected a recommender "
                "of hf_ilora, which scores the next item"
            )
        if model.catalogue is None:
            raise ValueError(
                f"{type(model).__name__} has no catalogue, which maps raw ids and titles to items: assign "
                "model.catalogue = sequences.catalogue and save the model again, or call model.recommend with item ids"
            )
        if "score" in model.catalogue.table.column_names:
            raise ValueError("the catalogue has a column score, which the answers need themselves: rename the column")
        kwargs.pop("local_files_only", None)  # `pipeline` has used it, but passes it on
        self._names = ItemNames(model.catalogue)
        self._preprocess_params: dict[str, Any] = {}
        super().__init__(model, tokenizer=_PADDING, **kwargs)

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        """Recommend items to one user or to several.

        Args:
            inputs: one user or several. One user is a history, a list of names, oldest first; or a dictionary with
                `history` and optionally `allowed_items`, `excluded_items` and `candidates`, which replace those of the
                call. Several users are a list of these, a generator, another iterable or a torch Dataset, such as
                transformers' KeyDataset. An empty list is one user without a history.
            top_k: number of items per user, by default 10.
            exclude_seen: leave out the items of the history, by default True.
            allowed_items: names of the only items to choose from.
            excluded_items: names of items to leave out.
            candidates: names of the items to rank instead of the catalogue. An iLoRA scores them by the
                log-likelihoods of their titles, as in `score_candidates`. If the filters leave fewer than `top_k`
                candidates, all of these are ranked.
            fuzzy: for an unknown title, take the closest one of the catalogue and log a warning.
            batch_size, num_workers: as in transformers.

        Returns:
            For one user a list of dictionaries, best item first: `title`, `raw_id`, `item_id`, `score` (log p over the
            whole catalogue), and the catalogue's other columns. For a list of users a list of these lists, otherwise an
            iterator over them.

        Raises:
            TypeError: for an unknown parameter.
            ValueError: for names that are unknown or ambiguous, an empty history if the catalogue has no counts,
                filters that leave too few items, and an iLoRA without an item head that gets no candidates. The users
                of a list are checked before anything is computed.
        """
        if isinstance(inputs, torch.Tensor | np.ndarray):
            inputs = inputs.tolist()
        if isinstance(inputs, list | tuple) and any(map(_is_user, inputs)):
            fuzzy = parameters.get("fuzzy", self._preprocess_params.get("fuzzy", False))
            inputs = [self._numbered(number, user, fuzzy) for number, user in enumerate(inputs)]
        elif isinstance(inputs, Mapping):
            inputs = dict(inputs)
        elif isinstance(inputs, list | tuple):
            inputs = {"history": inputs}
        elif isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable | Dataset):
            raise ValueError(
                f"the input is {inputs!r}: expected a history, such as [{inputs!r}], a dictionary with history, or "
                "several of these"
            )
        elif not isinstance(inputs, Dataset):
            inputs = (user for user in inputs)  # transformers streams generators
        return super().__call__(inputs, **parameters)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> CommitInfo | None:
        """Save the model, whose folder includes this pipeline."""
        return self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload the model, whose repository includes this pipeline; arguments as in the model's `push_to_hub`."""
        return self.model.push_to_hub(repo_id, **kwargs)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        unknown = sorted(given.keys() - set(_PARAMETERS))
        if unknown:
            raise TypeError(f"unknown parameter {unknown[0]!r}: expected some of {', '.join(_PARAMETERS)}")
        for name in ("exclude_seen", "fuzzy"):
            if not isinstance(given.get(name, True), bool):
                raise ValueError(f"{name} is {given[name]!r}: expected True or False")
        top_k = given.get("top_k", 1)
        if isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}: expected a number of items, at least 1")
        fuzzy = given.get("fuzzy", self._preprocess_params.get("fuzzy", False))
        given |= {name: self._filter(name, given[name], fuzzy) for name in _FILTERS if name in given}
        forward = {name: value for name, value in given.items() if name not in ("candidates", "fuzzy")}
        return {name: value for name, value in given.items() if name != "top_k"}, forward, {}

    def preprocess(
        self,
        inputs: Any,
        fuzzy: bool = False,
        exclude_seen: bool = True,
        allowed_items: np.ndarray | None = None,
        excluded_items: np.ndarray | None = None,
        candidates: np.ndarray | None = None,
    ) -> dict:
        """The history of a user as a tensor (1, length), and the user's filters; the arguments are the call's."""
        user = inputs if isinstance(inputs, _User) else self._user(inputs, fuzzy)
        candidates = candidates if user.candidates is None else user.candidates
        if candidates is None:
            self._check_ranks_catalogue()
            own = {"allowed_items": user.allowed_items, "excluded_items": user.excluded_items}
        else:
            allowed = allowed_items if user.allowed_items is None else user.allowed_items
            excluded = excluded_items if user.excluded_items is None else user.excluded_items
            candidates = np.array(list(dict.fromkeys(candidates.tolist())), dtype=np.int64)  # without repeats
            if allowed is not None:
                candidates = candidates[np.isin(candidates, allowed)]
            if excluded is not None:
                candidates = candidates[~np.isin(candidates, excluded)]
            if exclude_seen:
                candidates = candidates[~np.isin(candidates, user.history)]
            if not len(candidates):
                raise ValueError(
                    "no candidate is left: expected at least one that is allowed and, with exclude_seen, not in the "
                    "history"
                )
            own = {"allowed_items": None, "excluded_items": None}
        histories = torch.tensor([user.history or [PADDING_ITEM_ID]])
        return {"histories": histories, "candidates": candidates, **own}

    def _forward(
        self,
        model_inputs: dict,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: np.ndarray | None = None,
        excluded_items: np.ndarray | None = None,
    ) -> dict[str, torch.Tensor]:
        """The best items of each user, and their scores: (users, top_k) each, padded with 0."""
        histories = model_inputs["histories"]  # (users, length)
        # A batch has a list with each user's filter; a single user has just the filter.
        candidates, allowed, excluded = (
            given if isinstance(given, list) else [given]
            for given in (model_inputs[name] for name in ("candidates", "allowed_items", "excluded_items"))
        )
        # Users with as many answers and the same kinds of filters share a call of the model.
        alike: dict[tuple[int, bool, bool, bool], list[int]] = {}
        for user, own in enumerate(zip(candidates, allowed, excluded, strict=True)):
            most = top_k if own[0] is None else min(top_k, len(own[0]))
            alike.setdefault((most, own[0] is None, own[1] is None, own[2] is None), []).append(user)
        most = max(key[0] for key in alike)
        item_ids = histories.new_zeros(len(histories), most)
        scores = torch.zeros(len(histories), most, device=histories.device)
        for (most, ranks_catalogue, takes_allowed, takes_excluded), users in alike.items():
            if ranks_catalogue:
                found = self.model.recommend(
                    histories[users],
                    top_k=most,
                    exclude_seen=exclude_seen,
                    allowed_items=allowed_items if takes_allowed else [allowed[user] for user in users],
                    excluded_items=excluded_items if takes_excluded else [excluded[user] for user in users],
                )
            else:
                found = self._best_candidates(histories[users], [candidates[user] for user in users], most)
            item_ids[users, :most], scores[users, :most] = found
        return {"item_ids": item_ids, "scores": scores}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> list[dict]:
        """The answer for one user, from its items and scores (1, top_k)."""
        item_ids, scores = model_outputs["item_ids"][0], model_outputs["scores"][0]
        is_item = item_ids != PADDING_ITEM_ID  # (top_k,)
        recommended = item_ids[is_item].tolist()
        answers = []
        rows = self.model.catalogue.take(recommended).to_pylist()
        for item_id, score, row in zip(recommended, scores[is_item].tolist(), rows, strict=True):
            answer = {"title": row.pop("title"), "raw_id": row.pop("raw_id"), "item_id": item_id, "score": score}
            answers.append(answer | row)
        return answers

    def _best_candidates(
        self, histories: torch.Tensor, candidates: list[np.ndarray], top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the candidates of each user, and their scores: (users, top_k) each."""
        if self.model.config.model_type != "ilora":
            return self.model.recommend(histories, top_k=top_k, exclude_seen=False, allowed_items=candidates)
        rows = [torch.from_numpy(row) for row in candidates]
        padded = pad_sequence(rows, batch_first=True, padding_value=PADDING_ITEM_ID)  # (users, candidates)
        scores, columns = ordered_top_k(self.model.score_candidates(histories, padded), top_k)
        return padded.to(columns.device).gather(1, columns), scores

    def _numbered(self, number: int, user: Any, fuzzy: bool) -> _User:
        try:
            return self._user(user, fuzzy)
        except ValueError as error:
            raise ValueError(f"user {number} of the list: {error}") from error

    def _user(self, given: Any, fuzzy: bool) -> _User:
        """Replace the names in a user's history and filters by item ids."""
        if self._names.catalogue is not self.model.catalogue:  # items or columns were added
            self._names = ItemNames(self.model.catalogue)
        if not isinstance(given, Mapping):
            given = {"history": given}
        unknown = sorted(map(str, given.keys() - set(_USER_KEYS)))
        if unknown or "history" not in given:
            raise ValueError(
                f"a user has the keys {', '.join(map(str, given)) or 'none'}: expected history, and optionally "
                f"{', '.join(_FILTERS)}"
            )
        try:
            history = self._names.item_ids(given["history"], fuzzy)
        except ValueError as error:
            raise ValueError(f"history: {error}") from error
        if not history and not self.model.knows_popular_items:
            raise ValueError(
                "the history is empty: expected at least one item; to recommend popular items instead, give the "
                "catalogue the column count (model.catalogue.with_counts)"
            )
        filters = {name: self._filter(name, given.get(name), fuzzy) for name in _FILTERS}
        return _User(history, **filters)

    def _filter(self, name: str, given: Any, fuzzy: bool) -> np.ndarray | None:
        """(items,) item ids of a filter."""
        if given is None:
            return None
        try:
            return np.array(self._names.item_ids(given, fuzzy), dtype=np.int64)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _check_ranks_catalogue(self) -> None:
        config = self.model.config
        if config.model_type == "ilora" and config.item_head == "none":
            raise ValueError(
                "this iLoRA has no item head, which ranks the catalogue: pass candidates, train one with item_head "
                "residual or plain, or call model.generate_recommendation"
            )


def _is_user(given: Any) -> bool:
    """Whether an element of a list is a user, not an item of a history."""
    if isinstance(given, Mapping):
        return not {"raw_id", "title"} & given.keys()
    return isinstance(given, Iterable) and not isinstance(given, str | bytes)


# The entry in config.json by which transformers finds the pipeline in the folder of a model.
CUSTOM_PIPELINES = {
    TASK: {"impl": f"recommendation_pipeline.{SequentialRecommendationPipeline.__name__}", "pt": ["AutoModel"]}
}

__all__ = ["CUSTOM_PIPELINES", "SequentialRecommendationPipeline"]
