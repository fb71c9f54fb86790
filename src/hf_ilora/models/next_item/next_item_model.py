"""The base of all next-item models: recommending, checks, and saving with catalogue and code."""

import dataclasses
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .catalogue import CATALOGUE_FILE, Catalogue, open_parquet
from .configuration_next_item import NextItemConfig
from .handler import EndpointHandler  # noqa: F401  transformers saves the files that a model imports
from .histories import Histories, ItemIds, padded_histories, single_items
from .hub_upload import HubUploads, UploadOfSaved
from .item_filters import ItemFilter, item_masks
from .next_item_output import popular_scores, scores_or_popular
from .padding import lowest_and_highest, padding_to_the_front
from .recommendation_pipeline import CUSTOM_PIPELINES
from .reference_initialization import initialize_as_reference
from .saved_model import check_download, check_sizes, read_config, saved_file, saved_shapes
from .top_k import REMEDY_FOR_ITEMS, ItemMasks, masked_top_k, top_k_in_chunks
from .whole_saves import saved_whole

logger = logging.getLogger(__name__)

# Arguments that locate the weights, and with them the catalogue.
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def newest_items(input_ids: torch.Tensor, max_length: int) -> torch.Tensor:
    """The newest items of histories padded on either side: (batch, length) -> (batch, <= max_length)."""
    if input_ids.shape[1] <= max_length:
        return input_ids
    return padding_to_the_front(input_ids)[:, -max_length:]


class evaluation_mode:
    """Context with a model in evaluation mode; at its end, every module gets its former mode back.

    Several threads may enter it for one model: the first one switches the mode, the last one restores it.
    """

    _lock = threading.Lock()
    # For each model that was in training mode: the number of open contexts, and the modules to restore.
    _inside: WeakKeyDictionary[PreTrainedModel, tuple[int, list[torch.nn.Module]]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __enter__(self) -> None:
        with self._lock:
            calls, trained = self._inside.get(self.model, (0, []))
            self.switches = bool(calls) or self.model.training
            if not self.switches:
                return
            if not calls:
                trained = [module for module in self.model.modules() if module.training]
                self.model.eval()
            self._inside[self.model] = (calls + 1, trained)

    def __exit__(self, *error: object) -> None:
        if not self.switches:
            return
        with self._lock:
            calls, trained = self._inside.pop(self.model)
            if calls > 1:
                self._inside[self.model] = (calls - 1, trained)
                return
            for module in trained:
                module.training = True


def check_has_weights(model: PreTrainedModel) -> None:
    """Raise a ValueError if a `device_map` left weights of a model on disk, or if it was created without any."""
    device_map = vars(model).get("hf_device_map") or {}
    # Tied weights may be in memory although the map has one of their modules on disk.
    missing = [name for name, _ in model.named_modules() if device_map.get(name) == "disk"]
    tensors = (*model.named_parameters(), *model.named_buffers())
    missing += [name.rpartition(".")[0] for name, tensor in tensors if tensor.device.type == "meta"]
    if missing:
        raise ValueError(
            f"{missing[0] or 'the whole'} of {type(model).__name__} is on disk or on the device meta: expected every "
            "module in memory, since whatever is copied to it later would be lost; change the device_map, or load a "
            "smaller model"
        )


class NextItemPreTrainedModel(HubUploads, PreTrainedModel):
    """A model that scores the next item: `forward(input_ids, ...).logits` are (batch, num_items + 1)."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self._catalogue: Catalogue | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(self.config, NextItemConfig) and self.config.initialization == "reference":
            initialize_as_reference(module)

    @property
    def catalogue(self) -> Catalogue | None:
        """Titles and raw ids of the items, or None; saved as `items.parquet` beside the weights.

        Raises:
            TypeError: when it is set to something else.
            ValueError: when it is set to a catalogue of another size than `config.num_items`.
        """
        return self._catalogue

    @catalogue.setter
    def catalogue(self, catalogue: Catalogue | None) -> None:
        if catalogue is not None and not isinstance(catalogue, Catalogue):
            raise TypeError(
                f"catalogue is a {type(catalogue).__name__}: expected a Catalogue or None; pass sequences.catalogue, "
                "or Catalogue(table) with a pyarrow.Table of items"
            )
        if catalogue is not None and len(catalogue) != self.config.num_items:
            raise ValueError(
                f"the catalogue has {len(catalogue)} items: expected {self.config.num_items}, the num_items of the "
                "model; use the catalogue of the data set that the model is trained on"
            )
        self._catalogue = catalogue

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend the `top_k` most probable next items of each history.

        Args:
            histories: a row of item ids per user, oldest first: lists, arrays or tensors, of different lengths or
                padded with 0 on either side. The model reads the newest `config.max_length` items of a row; all of
                them count as seen. A row without items gets the most popular ones, if the catalogue has their counts.
            top_k: items per history.
            exclude_seen: leave out the items of the history.
            allowed_items: the only items to choose from: ids (items,) for all users, or a row of ids per user; None
                allows all.
            excluded_items: items to leave out, in the same forms.

        Returns:
            item_ids (batch, top_k) int64, best first, the lower id first among equal scores, and scores (batch, top_k)
            float32: log p, normalised over the whole catalogue, excluded items included.

        Raises:
            ValueError: for ids outside the catalogue, an empty history if the catalogue has no counts, or `top_k`
                larger than the number of items left.
        """
        with evaluation_mode(self), torch.inference_mode():
            histories = padded_histories(histories, self.config.num_items, self.device, self.knows_popular_items)
            seen = histories if exclude_seen else None
            sizes = (len(histories), self.config.num_items, self.device)
            masks = item_masks(*sizes, seen, allowed_items, excluded_items)
            item_ids, log_probabilities = self.best_items(histories, top_k, masks)
        return item_ids.clone(), log_probabilities.clone()  # inference tensors cannot be used where gradients flow

    def best_items(self, histories: torch.Tensor, top_k: int, masks: ItemMasks) -> tuple[torch.Tensor, torch.Tensor]:
        """The best items of histories (batch, length) and their log-probabilities, (batch, top_k) each."""
        scores = scores_or_popular(self._scores_of_newest, self.popular_scores, histories)
        item_ids, best_scores = masked_top_k(scores, top_k, masks)
        return item_ids, self.log_probabilities(best_scores, scores)

    def rank_items(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend as `recommend` does, but return distances instead of scores, as distillation needs them.

        Args:
            histories, top_k, exclude_seen, allowed_items, excluded_items: as in `recommend`.

        Returns:
            item_ids (batch, top_k) int64, best first, and distances (batch, top_k) float32: -log p over the whole
            catalogue.

        Raises:
            ValueError: as `recommend`.
        """
        item_ids, log_probabilities = self.recommend(histories, top_k, exclude_seen, allowed_items, excluded_items)
        return item_ids, -log_probabilities

    def similar_items(
        self, items: ItemIds, top_k: int = 10, allowed_items: ItemFilter = None, excluded_items: ItemFilter = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the items that are most similar to each of some items, without the item itself.

        Args:
            items: (items,) ids, in a list, array or tensor.
            top_k: number of similar items per item.
            allowed_items, excluded_items: as in `recommend`, for all items or a row for each.

        Returns:
            item_ids (items, top_k) int64, most similar first, and scores (items, top_k) float32: the cosine of the
            items' rows in the head's table or, for transition counts, the weight of the transition.

        Raises:
            ValueError: for no items, ids outside the catalogue, and `top_k` larger than the number of items left.
        """
        with evaluation_mode(self), torch.inference_mode():
            items = single_items(items, self.config.num_items, self.device)  # (items,)
            num_items = self.config.num_items
            masks = item_masks(len(items), num_items, self.device, items.unsqueeze(1), allowed_items, excluded_items)
            similarities = self._similarities(items)
            item_ids, scores, _ = top_k_in_chunks(
                similarities, len(items), num_items, top_k, masks, self.device, REMEDY_FOR_ITEMS
            )
        return item_ids.clone(), scores.clone()

    def _similarities(self, asked: torch.Tensor) -> Callable[[slice, slice, torch.Tensor], None]:
        """A `score_items` for `top_k_in_chunks`: the similarity of the items (asked,) to those of the catalogue."""
        raise ValueError(
            f"{type(self).__name__} does not know which items are alike: expected a SASRec, GRU4Rec, Caser or "
            "transition counts"
        )

    @property
    def knows_popular_items(self) -> bool:
        """Whether the catalogue has the counts that `popular_scores` needs."""
        return self._catalogue is not None and self._catalogue.counts is not None

    def popular_scores(self) -> torch.Tensor:
        """(num_items + 1,) scores for users without a history, on the scale of `next_item_scores`."""
        assert self._catalogue is not None and self._catalogue.counts is not None  # see `knows_popular_items`
        return popular_scores(self._catalogue.counts, self.device)

    def _scores_of_newest(self, histories: torch.Tensor) -> torch.Tensor:
        return self.next_item_scores(self.newest_items(histories))

    def log_probabilities(self, best_scores: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """log p of scores (batch, k) among those of the whole catalogue, (batch, num_items + 1): their softmax."""
        return (best_scores.float() - scores.float().logsumexp(-1, keepdim=True)).clamp(max=0)

    def next_item_scores(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) item ids, which are not checked -> (batch, num_items + 1) raw scores, -inf for padding."""
        raise NotImplementedError(f"{type(self).__name__} has no scores: expected a model that ends in ForNextItem")

    def newest_items(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The part of the histories that the model reads; (batch, length) -> (batch, <= max_length)."""
        return newest_items(input_ids, self.config.max_length)

    def check_item_ids(self, input_ids: torch.Tensor) -> None:
        """Raise a ValueError unless `input_ids` are (batch, length) integers and, on a CPU, inside the catalogue."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            found = (
                f"shape {tuple(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            )
            raise ValueError(
                f"input_ids have {found}: expected a tensor (batch, length) with at least one item, such as "
                "torch.tensor([[3, 1, 2]])"
            )
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids are {input_ids.dtype}: expected item ids as int64 or int32")
        bounds = lowest_and_highest(input_ids)
        if bounds is None:
            return
        lowest, highest = bounds
        if lowest < 0 or highest > self.config.num_items:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"input_ids contain item {wrong}: expected ids 1..{self.config.num_items} of this model's catalogue, "
                "0 for padding; map raw ids with model.catalogue.item_ids"
            )

    def check_input(self, input_ids: torch.Tensor, **aligned: torch.Tensor | None) -> None:
        """Raise a ValueError unless `input_ids` fit the model and `aligned` tensors have their shape."""
        self.check_item_ids(input_ids)
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"input_ids have shape {tuple(input_ids.shape)}: expected (batch, length) with length <= "
                f"{self.config.max_length} (max_length); keep the newest items, as `recommend` does"
            )
        for name, tensor in aligned.items():
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(
                    f"{name} have shape {tuple(tensor.shape)}: expected {tuple(input_ids.shape)}, that of input_ids"
                )

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> CommitInfo | None:
        """Save as in transformers, with the catalogue and the code of the model, its pipeline and its handler.

        An earlier model in the folder stays whole until all files are written, see `saved_whole`.

        Args:
            save_directory: created if it does not exist.
            push_to_hub: upload the files in one commit. The repository is `repo_id`, by default the name of the folder;
                `kwargs` may include the other arguments of the method `push_to_hub`.
            kwargs: as in transformers.

        Returns:
            The commit of `push_to_hub`, else None.
        """
        upload = UploadOfSaved(save_directory, kwargs) if push_to_hub else None
        if self._auto_class is not None:  # None for an encoder, which recommends nothing
            self.config.custom_pipelines = CUSTOM_PIPELINES
        if kwargs.get("is_main_process", True):
            with saved_whole(save_directory, kwargs.get("variant")) as unfinished:
                super().save_pretrained(unfinished, **kwargs)
                if self.catalogue is not None:
                    self.catalogue.save_pretrained(unfinished)
        else:
            super().save_pretrained(save_directory, **kwargs)  # takes part in gathering weights
        return None if upload is None else upload.send(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> Self:  # a tuple with output_loading_info, as in transformers
        """Load as in transformers, with the catalogue if there is one.

        With `ignore_mismatched_sizes=True`, tensors of other sizes than the configuration's are initialised at random,
        and a catalogue of another size is ignored: `from_pretrained(folder, ignore_mismatched_sizes=True,
        num_items=5000)` starts from the layers of a model that was trained on other items.

        Raises:
            ValueError: when a download is damaged, config.json has wrong values or sizes, a `device_map` leaves weights
                on disk, or the catalogue does not fit `num_items`; and when parameters are missing or unknown, where
                transformers would only warn and initialise them at random.
        """
        path = pretrained_model_name_or_path
        hub_arguments = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        takes_other_sizes = kwargs.get("ignore_mismatched_sizes", False)
        config = kwargs.pop("config", None)
        if not isinstance(config, PreTrainedConfig):
            fields = {field.name for field in dataclasses.fields(cls.config_class)} - {"dtype"}
            changes = {name: kwargs.pop(name) for name in fields & kwargs.keys()}
            config = read_config(cls.config_class, config or path, hub_arguments, changes)
        shapes = saved_shapes(path, hub_arguments, compare_downloads=True)
        if shapes is not None and not takes_other_sizes:
            check_sizes(cls, config, shapes, path)
        try:
            model, info = super().from_pretrained(path, *model_args, config=config, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"no {cls.__name__} could be loaded from {path}: {error}; expected whole weights that fit its "
                "config.json: restore the folder that save_pretrained wrote"
            ) from error
        for kind in ("missing", "unexpected") if takes_other_sizes else ("missing", "unexpected", "mismatched"):
            if info[f"{kind}_keys"]:
                raise ValueError(
                    f"the weights in {path} have {kind} keys {sorted(info[f'{kind}_keys'])}: expected those of a "
                    f"{cls.__name__} with this config.json; restore the folder that save_pretrained wrote"
                )
        check_has_weights(model)
        file = saved_file(path, CATALOGUE_FILE, hub_arguments)
        if file is not None:
            check_download(file, path)
            with open_parquet(file, "restore the file that save_pretrained wrote") as parquet:
                num_items = parquet.metadata.num_rows
            if num_items == config.num_items:
                model.catalogue = Catalogue.from_parquet(file)
            elif takes_other_sizes:
                logger.warning(
                    "the catalogue in %s has %d items and the model %d: it is ignored; assign model.catalogue",
                    path, num_items, config.num_items,
                )  # fmt: skip
            else:
                raise ValueError(
                    f"{file} belongs to another model: the catalogue has {num_items} items: expected "
                    f"{config.num_items}, the num_items of the model; restore the folder that save_pretrained wrote"
                )
        loaded: Any = (model, info) if wants_info else model
        return loaded
