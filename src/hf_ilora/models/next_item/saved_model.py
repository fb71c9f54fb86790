"""Checks a saved model by its configuration and the headers of its weights, before building or reading anything."""

import copy
import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# Errors that transformers and torch raise for a configuration with values of unexpected types.
WRONG_TYPES = (AttributeError, KeyError, OverflowError, RecursionError, TypeError)

Shape = tuple[int, ...]


def read_config(
    config_class: type[PreTrainedConfig], path: str | os.PathLike, hub_arguments: dict, changes: dict | None = None
) -> PreTrainedConfig:
    """Read config.json.

    Args:
        config_class: the expected class.
        path: folder, or name on the Hub.
        hub_arguments: revision, token and other arguments of `from_pretrained` about the Hub.
        changes: values that replace saved ones.

    Raises:
        OSError: when there is no such folder or repository.
        ValueError: when config.json is missing, is of another class, or has values that the class rejects.
    """
    remedy = "restore the folder that save_pretrained wrote"
    try:
        saved, _ = PreTrainedConfig.get_config_dict(path, **hub_arguments)
        model_type = saved.get("model_type")
    except WRONG_TYPES as error:
        raise ValueError(f"{CONFIG_NAME} of {path} is not a configuration ({error!r}): {remedy}") from error
    if not saved:
        raise ValueError(f"{path} has no {CONFIG_NAME}, or an empty one: expected what save_pretrained wrote")
    if model_type != config_class.model_type:
        raise ValueError(
            f"{CONFIG_NAME} of {path} has model_type {model_type!r}: expected {config_class.model_type!r}; load it "
            "with the class that saved it"
        )
    try:
        return config_class.from_dict(saved, **(changes or {}))
    except (ValueError, *WRONG_TYPES) as error:
        if changes:
            given = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            raise ValueError(f"{path} with {given} has a wrong value ({error}): correct the argument") from error
        raise ValueError(f"{CONFIG_NAME} of {path} has a wrong value ({error}): {remedy}") from error


def saved_weights(path: str | os.PathLike, hub_arguments: dict) -> list[str]:
    """The safetensors files of a saved model: one, or its shards; empty if there are none.

    Raises:
        ValueError: when the index of the shards is damaged, or a shard is missing.
    """
    if (file := saved_file(path, SAFE_WEIGHTS_NAME, hub_arguments)) is not None:
        return [file]
    if (index := saved_file(path, SAFE_WEIGHTS_INDEX_NAME, hub_arguments)) is None:
        return []
    try:
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        files = {name: saved_file(path, name, hub_arguments) for name in sorted(names)}
    except (ValueError, *WRONG_TYPES) as error:
        raise _broken(SAFE_WEIGHTS_INDEX_NAME, path, error) from error
    for name, file in files.items():
        if file is None:
            raise ValueError(
                f"{path} has no {name}, which {SAFE_WEIGHTS_INDEX_NAME} names: restore the folder that save_pretrained "
                "wrote"
            )
    return list(files.values())


def weights_fingerprint(folder: str | os.PathLike) -> str | None:
    """Digest of the weights in a folder, 16 hexadecimal digits; None if it has none.

    Raises:
        ValueError: as `saved_weights`.
    """
    files = saved_weights(folder, {})
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def check_download(file: str, path: str | os.PathLike) -> None:
    """Compare a file from the Hub with the sha256 that the Hub states.

    The Hub's cache names a large file by its sha256, but the client only compares sizes when it downloads one. Files in
    other folders and in caches on disks without symbolic links have no such name, and are not checked.

    Args:
        file: path that `saved_file` returned.
        path: folder or Hub name of the model, for messages.

    Raises:
        ValueError: when the file has other content.
    """
    blob = Path(file).resolve()
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != blob.name:
        raise ValueError(
            f"{os.path.basename(file)} of {path} is broken: its sha256 is {found[:16]}..., expected "
            f"{blob.name[:16]}... as on the Hub; delete {blob} and load again"
        )


def saved_shapes(
    path: str | os.PathLike, hub_arguments: dict, compare_downloads: bool = False
) -> dict[str, Shape] | None:
    """The shape of each tensor in the weights, one file or shards; None if there are none in safetensors.

    Args:
        path: folder, or name on the Hub.
        hub_arguments: revision, token and other arguments of `from_pretrained` about the Hub.
        compare_downloads: also call `check_download`, which reads the files whole: 0.6 s per GB.

    Raises:
        ValueError: when a header is damaged, or does not fit the size of its file; and as `check_download`.
    """
    files = saved_weights(path, hub_arguments)
    shapes = {}
    for file in files:
        if compare_downloads:
            check_download(file, path)
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, *WRONG_TYPES) as error:
            raise _broken(os.path.basename(file), path, error) from error
    return shapes if files else None


def _broken(name: str, path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(
        f"{name} of {path} is broken ({error}): expected whole weights; restore the folder that save_pretrained wrote"
    )


def check_sizes(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    shapes: dict[str, Shape],
    path: str | os.PathLike,
    prefix: str = "",
) -> None:
    """Compare the sizes in a configuration with those of the weights, in time that only the weights determine.

    Args:
        model_class: class of the model.
        config: its configuration.
        shapes: shape of each saved tensor.
        path: folder or Hub name of the model, for messages.
        prefix: prefix of the tensors' names in the file, for messages.

    Raises:
        ValueError: when a tensor is missing or has another shape.
    """
    # A model is built layer by layer, and Caser has filters of each height up to its length: large numbers take long.
    limits = {"num_hidden_layers": len(shapes)}
    if config.model_type == "caser" and isinstance(config.horizontal_heights, range):
        limits["max_length"] = max(len(shapes), 1000)
    for name, limit in limits.items():
        if vars(config).get(name, 0) > limit:
            raise ValueError(
                f"{CONFIG_NAME} of {path} has {name} {vars(config)[name]}: expected at most {limit}, as there are "
                f"{len(shapes)} tensors in the weights; restore the folder that save_pretrained wrote"
            )
    try:
        with torch.device("meta"):  # shapes without memory
            model = model_class(copy.deepcopy(config))
    except (RuntimeError, *WRONG_TYPES) as error:
        raise ValueError(
            f"{CONFIG_NAME} of {path} describes no model ({error}): restore the folder that save_pretrained wrote"
        ) from error
    tied = (model._tied_weights_keys or ()) if vars(config).get("tie_word_embeddings") else ()
    base = f"{model.base_model_prefix}."
    missing = []
    for name, tensor in model.state_dict().items():
        # A model may be saved with its head, which adds a prefix to the encoder's names, or without it.
        found = [shapes[each] for each in (name, f"{base}{name}", name.removeprefix(base)) if each in shapes]
        if not found and name not in tied:
            missing.append(f"{prefix}{name}")
        elif found and found[0] != tuple(tensor.shape):
            raise ValueError(
                f"{prefix}{name} in the weights of {path} has shape {found[0]}: expected {tuple(tensor.shape)}, as "
                f"{CONFIG_NAME} says; the two are mismatched: restore the folder that save_pretrained wrote"
            )
    if missing:
        raise ValueError(
            f"the weights of {path} have {len(missing)} missing keys, such as {missing[0]}: expected those of a "
            f"{model_class.__name__} with this {CONFIG_NAME}; restore the folder that save_pretrained wrote"
        )


def saved_file(path: str | os.PathLike, name: str, hub_arguments: dict) -> str | None:
    """The path of a model's file, in its folder or in the Hub's cache; None if the model has no such file.

    Raises:
        ValueError: when the name belongs to something other than a file, which transformers would ignore.
    """
    here = os.path.join(path, hub_arguments.get("subfolder", ""), name)
    if os.path.lexists(here) and not os.path.isfile(here):
        raise ValueError(f"{here} is not a file: expected the one that save_pretrained wrote; restore it")
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)


__all__ = ["WRONG_TYPES", "check_download", "check_sizes", "read_config", "saved_file", "saved_shapes"]
__all__ += ["saved_weights", "weights_fingerprint"]
