"""Loads any saved recommender by folder or Hub name, and checks that it fits a data set."""

import os
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel
from hf_ilora.models.next_item.saved_model import WRONG_TYPES

# Any recommender of this package that is saved and loaded on its own.
SavedRecommender = NextItemPreTrainedModel | ILoraForRecommendation

_MODEL_FILES = ("*.json", "*.safetensors", "*.parquet")


def model_folder(name_or_path: str) -> Path:
    """The folder of a saved model; a name on the Hub is downloaded first.

    Args:
        name_or_path: folder that `save_pretrained` wrote, or name of a model on the Hub.

    Raises:
        FileNotFoundError: when it is neither.
        ValueError: for a folder without a model.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _downloaded(name_or_path)
    if not (folder / CONFIG_NAME).is_file() or not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"{name_or_path} contains {found}: expected {CONFIG_NAME} and *.safetensors, as save_pretrained writes them"
        )
    return folder


def saved_config(name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """Read the configuration of a saved model with the installed classes; code in the folder is never run.

    Raises:
        OSError: when there is none.
        ValueError: for an unknown model type, and values that its class does not accept.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (StrictDataclassError, *WRONG_TYPES) as error:
        raise ValueError(
            f"{CONFIG_NAME} of {name_or_path} is not the configuration of a model ({error}): restore the folder that "
            "save_pretrained wrote"
        ) from error


def load_recommender(name_or_path: str | os.PathLike, *, trust_remote_code: bool = False) -> SavedRecommender:
    """Load a recommender of this package that ranks the whole catalogue, in evaluation mode.

    Args:
        name_or_path: folder that `save_pretrained` wrote, or name of a model on the Hub.
        trust_remote_code: run code that comes with the language model of an iLoRA. Recommenders are loaded by the
            installed classes, and code in their folder is never run.

    Raises:
        FileNotFoundError: when it is neither.
        ValueError: for another kind of model, an iLoRA without item head, unreadable files, an unknown model type, and
            weights that are missing, unknown or of another size.
    """
    folder = model_folder(str(name_or_path))
    try:
        config = saved_config(folder)
        if isinstance(config, ILoraConfig):
            model = ILoraForRecommendation.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"no model could be loaded from {folder}: {error}") from error
    if isinstance(model, ILoraForRecommendation):
        if model.item_head is None:
            raise ValueError(
                f"{folder} contains an iLoRA without item head, which cannot rank the catalogue: train one with "
                "--item_head residual, or evaluate it on candidates with `hf-ilora evaluate-ilora`"
            )
    elif not isinstance(model, NextItemPreTrainedModel):
        raise ValueError(
            f"{folder} contains a {type(model).__name__} (model_type {model.config.model_type}): expected a "
            "recommender of hf_ilora, which scores the next item"
        )
    return model.eval()


def check_catalogue(model: SavedRecommender, name: str, num_items: int, raw_ids: np.ndarray) -> bool:
    """Check that a model and a data set give the same items the same ids.

    Args:
        model: the model, with or without a catalogue.
        name: name of the model, for messages.
        num_items: size of the data set's catalogue.
        raw_ids: (num_items,) raw ids of the data set, in the order of item ids.

    Returns:
        Whether raw ids could be compared: False for a model without a catalogue.

    Raises:
        ValueError: for another number of items, or other raw ids.
    """
    return check_same_items(catalogue_size(model.config), model.catalogue, name, num_items, raw_ids)


def check_same_items(
    known_items: int,
    catalogue: Catalogue | None,
    name: str,
    num_items: int,
    raw_ids: np.ndarray,
    other_model: str | None = None,
) -> bool:
    """Compare a recommender's items with those of a data set or another model, as `check_catalogue` does.

    Args:
        known_items: number of items that the recommender knows.
        catalogue: its catalogue, or None.
        name: its name, for messages.
        num_items: number of items of the data set or the other model.
        raw_ids: (num_items,) raw ids of the data set or the other model, in the order of item ids.
        other_model: name of the other model; None for a data set.

    Returns:
        Whether raw ids could be compared: False without a catalogue.

    Raises:
        ValueError: for another number of items, or other raw ids.
    """
    if other_model is None:
        other, expected = "the data set", "expected the data set that the model was trained on"
    else:
        other, expected = other_model, "expected models that were trained on one data set"
    if known_items != num_items:
        raise ValueError(f"{name} knows {known_items} items and {other} has {num_items}: {expected}")
    if catalogue is None:
        return False
    known = catalogue.table["raw_id"].to_numpy()
    if known.dtype.kind != raw_ids.dtype.kind:
        raise ValueError(f"{name} has raw ids of type {known.dtype} and {other} of type {raw_ids.dtype}: {expected}")
    different = np.flatnonzero(known != raw_ids)
    if len(different):
        item = int(different[0])
        raise ValueError(
            f"{len(different)} of {num_items} items of {name} have other raw ids than in {other} (item {item + 1} "
            f"is {known[item]} in {name} and {raw_ids[item]} in {other}): {expected}"
        )
    return True


def _downloaded(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(_MODEL_FILES)))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is not a folder and could not be downloaded from the Hub ({error}): check the path or the name"
        ) from error
