"""Converts the SASRec, GRU4Rec and Caser of LLaRA, iLoRA and DLLM2Rec to models of this package with equal scores."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_caser import CaserConfig
from hf_ilora.models.next_item.configuration_gru4rec import GRU4RecConfig
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_caser import CaserForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU4RecForNextItem
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.reference.pickle_reader import read_state_dict

# The published programs read the newest 10 items and use this dropout. Their files do not say so, except where a shape
# depends on the number of items.
_MAX_LENGTH = 10
_DROPOUT = 0.1
_HEAD_AND_LOSS = {
    "tie_word_embeddings": False,
    "head_bias": True,
    "loss_type": "bce",
    "num_negatives": 1,
    "negative_sharing": "position",
}
_ITEMS, _HEAD = "item_embeddings", "s_fc"
_COMMON_MODULES = {_ITEMS: "model.item_embedding", _HEAD: "head"}

# The authors' names of modules -> ours.
_SASREC_MODULES = _COMMON_MODULES | {
    "positional_embeddings": "model.position_embedding",
    "ln_1": "model.layers.0.attention_norm",
    "mh_attn.linear_q": "model.layers.0.attention.q_proj",
    "mh_attn.linear_k": "model.layers.0.attention.k_proj",
    "mh_attn.linear_v": "model.layers.0.attention.v_proj",
    "ln_2": "model.layers.0.feed_forward_norm",
    "feed_forward.w_1": "model.layers.0.feed_forward.up_proj",
    "feed_forward.w_2": "model.layers.0.feed_forward.down_proj",
    "feed_forward.layer_norm": "model.layers.0.output_norm",
    "ln_3": "model.final_norm",
}


def convert_reference(state_dict: dict[str, torch.Tensor]) -> EncoderForNextItem:
    """Convert the authors' SASRec, GRU4Rec or Caser, which the names of the tensors tell apart.

    Args:
        state_dict: the authors' names and tensors (`load_reference_state_dict`), for N items.

    Returns:
        The result of `convert_reference_sasrec`, `convert_reference_gru4rec` or `convert_reference_caser`.

    Raises:
        ValueError: as these functions.
    """
    names = [str(name) for name in state_dict]
    if any(name.startswith("gru.") for name in names):
        return convert_reference_gru4rec(state_dict)
    if any(name.startswith(("horizontal_cnn.", "vertical_cnn.")) for name in names):
        return convert_reference_caser(state_dict)
    return convert_reference_sasrec(state_dict)


def convert_reference_sasrec(state_dict: dict[str, torch.Tensor]) -> SASRecForNextItem:
    """Convert the authors' SASRec; the result gives the same scores.

    Args:
        state_dict: the authors' names and tensors (`load_reference_state_dict`), for N items.

    Returns:
        The model, in eval mode. The reference's item i becomes i + 1, and its padding id N becomes 0. The files do not
        contain the dropout, which is set to 0.1, the default of the published programs.

    Raises:
        ValueError: for missing or unexpected names, and for shapes that do not fit one another.

    Source: the published programs of LLaRA, iLoRA and DLLM2Rec.
    """
    _check_names(state_dict, "SASRec of one block", _parameters_of(_SASREC_MODULES))
    _check_shape(state_dict, "positional_embeddings.weight", 2)
    model = SASRecForNextItem(
        SASRecConfig(
            **_sizes(state_dict),
            **_HEAD_AND_LOSS,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_length=len(state_dict["positional_embeddings.weight"]),
            hidden_dropout=_DROPOUT,
            attention_dropout=_DROPOUT,
            block_type="reference",
            position_alignment="oldest",
        )
    )
    # A convolution of width 1 is a linear layer: (hidden, hidden, 1) -> (hidden, hidden).
    linear = {name: tensor.squeeze(2) if tensor.dim() == 3 else tensor for name, tensor in state_dict.items()}
    return _with_weights(model, state_dict, _renamed(linear, _SASREC_MODULES))


def convert_reference_gru4rec(state_dict: dict[str, torch.Tensor]) -> GRU4RecForNextItem:
    """Convert the authors' GRU4Rec; the result gives the same scores.

    Args:
        state_dict: the authors' names and tensors (`load_reference_state_dict`), for N items.

    Returns:
        The model, in eval mode. The reference's item i becomes i + 1, and its padding id N becomes 0. The files do not
        contain the length of histories, which is set to 10, as in the published programs.

    Raises:
        ValueError: for missing or unexpected names, and for shapes that do not fit one another.

    Source: the published programs of LLaRA and DLLM2Rec.
    """
    num_layers = max(1, sum(str(name).startswith("gru.weight_ih_l") for name in state_dict))
    gru_names = [
        f"gru.{kind}_{source}_l{layer}"
        for layer in range(num_layers)
        for kind in ("weight", "bias")
        for source in ("ih", "hh")
    ]
    _check_names(state_dict, "GRU4Rec", _parameters_of(_COMMON_MODULES) | set(gru_names))
    model = GRU4RecForNextItem(
        GRU4RecConfig(
            **_sizes(state_dict),
            **_HEAD_AND_LOSS,
            num_hidden_layers=num_layers,
            max_length=_MAX_LENGTH,
            hidden_dropout=0.0,
            initialization="reference",
            initializer_range=0.01,
        )
    )
    return _with_weights(model, state_dict, _renamed(state_dict, _COMMON_MODULES | {"gru": "model.gru"}))


def convert_reference_caser(state_dict: dict[str, torch.Tensor]) -> CaserForNextItem:
    """Convert the authors' Caser; the result gives the same scores.

    Args:
        state_dict: the authors' names and tensors (`load_reference_state_dict`), for N items.

    Returns:
        The model, in eval mode. The reference's item i becomes i + 1, and its padding id N becomes 0. The files do not
        contain the dropout, which is set to 0.1, the default of the published programs.

    Raises:
        ValueError: for missing or unexpected names, and for shapes that do not fit one another.

    Source: the published programs of LLaRA and DLLM2Rec.
    """
    num_heights = max(1, sum(_is_horizontal(str(name)) and str(name).endswith(".weight") for name in state_dict))
    horizontal = {f"horizontal_cnn.{place}": f"model.horizontal_filters.{place}" for place in range(num_heights)}
    modules = _COMMON_MODULES | horizontal | {"vertical_cnn": "model.vertical_filters"}
    _check_names(state_dict, "Caser", _parameters_of(modules))
    sizes = _sizes(state_dict)
    for module in (*horizontal, "vertical_cnn"):
        _check_shape(state_dict, f"{module}.weight", 4)
    model = CaserForNextItem(
        CaserConfig(
            **sizes,
            **_HEAD_AND_LOSS,
            max_length=state_dict["vertical_cnn.weight"].shape[2],
            hidden_dropout=_DROPOUT,
            block_type="reference",
            filter_heights=[state_dict[f"{module}.weight"].shape[2] for module in horizontal],
            num_horizontal_filters=len(state_dict["horizontal_cnn.0.weight"]),
            initialization="reference",
            initializer_range=0.01,
        )
    )
    flat = dict(state_dict)
    for name, tensor in state_dict.items():
        if _is_horizontal(name) and tensor.dim() == 4:
            flat[name] = tensor.squeeze(1).transpose(-1, -2)  # (filters, hidden, height)
        elif name == "vertical_cnn.weight":
            flat[name] = tensor.flatten(1)  # (1, length)
    return _with_weights(model, state_dict, _renamed(flat, modules))


def reference_catalogue(items_path: str | os.PathLike, num_items: int) -> Catalogue:
    """The catalogue of a converted model, from a table of titles.

    Args:
        items_path: parquet with `item_id` (the reference's ids, 0..num_items - 1) and `title`, and optionally `raw_id`,
            `year` and `genres`. Without `raw_id`, the reference's ids become the raw ids. The catalogue of a prepared
            data set with the same items, with the ids 1..num_items, is also accepted.
        num_items: number of items of the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a table, or has other ids.
    """
    try:
        items = pq.read_table(items_path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{items_path} is not a whole parquet file ({error}): write the table again") from error
    if "item_id" not in items.column_names or not pa.types.is_integer(items.schema.field("item_id").type):
        raise ValueError(f"{items_path} has the columns {items.column_names}: expected an integer column item_id")
    item_ids = items["item_id"].to_numpy()
    if np.array_equal(np.sort(item_ids), np.arange(1, num_items + 1)):
        return Catalogue(items)
    if not np.array_equal(np.sort(item_ids), np.arange(num_items)):
        raise ValueError(
            f"{items_path} has {len(item_ids)} rows: expected the reference's ids 0 to {num_items - 1}, once each, or "
            f"the catalogue of a prepared data set with the ids 1 to {num_items}"
        )
    if "raw_id" not in items.column_names:
        items = items.append_column("raw_id", items["item_id"])
    return Catalogue(items.drop_columns("item_id").append_column("item_id", pa.array(item_ids + 1)))


def load_reference_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read the authors' names and tensors from their file, without running anything in it.

    Args:
        path: a safetensors file with the authors' names, or a file of `torch.save` (in either of its formats) with the
            whole module (SASRec, GRU4Rec or Caser) or its state dict.

    Raises:
        UnsafePickleError: a pickle names a class or function that the authors' files do not.
        ValueError: the file is truncated or of another kind, or its sizes do not fit its bytes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def _is_horizontal(name: str) -> bool:
    return name.startswith("horizontal_cnn.")


def _parameters_of(modules: dict[str, str]) -> set[str]:
    """The authors' names of the parameters of `modules`; embeddings have no bias."""
    names = {f"{module}.weight" for module in modules}
    return names | {f"{module}.bias" for module in modules if not module.endswith("_embeddings")}


def _check_names(state_dict: dict[str, torch.Tensor], kind: str, expected: set[str]) -> None:
    missing, unexpected = sorted(expected - state_dict.keys()), sorted(map(str, state_dict.keys() - expected))
    if any(name.startswith("fc_4096_64.") for name in unexpected):
        raise ValueError(
            "the state dict contains fc_4096_64, DLLM2Rec's projection of LLM embeddings: expected a plain model; if "
            "it was trained with ed_weight 0, drop fc_4096_64.weight and fc_4096_64.bias"
        )
    if missing or unexpected:
        raise ValueError(
            f"this is not the authors' {kind}: missing {', '.join(missing) or 'nothing'}; unexpected "
            f"{', '.join(unexpected) or 'nothing'}"
        )
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is not a tensor of floating-point numbers: expected the authors' weights")


def _check_shape(state_dict: dict[str, torch.Tensor], name: str, num_dimensions: int) -> None:
    shape = tuple(state_dict[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise ValueError(f"{name} has shape {shape}: expected {num_dimensions} dimensions, none of size 0")


def _sizes(state_dict: dict[str, torch.Tensor]) -> dict[str, int]:
    shape = tuple(state_dict[f"{_ITEMS}.weight"].shape)
    if len(shape) != 2 or shape[0] < 2:
        raise ValueError(f"{_ITEMS}.weight has shape {shape}: expected at least two rows of the hidden size")
    return {"num_items": shape[0] - 1, "hidden_size": shape[1]}


def _renamed(state_dict: dict[str, torch.Tensor], modules: dict[str, str]) -> dict[str, tuple[str, torch.Tensor]]:
    """The authors' name -> our name, and the tensor with its rows in the order of our ids."""
    renamed = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        values = tensor.detach().to(torch.float32)
        if module == _ITEMS:
            values = values.roll(1, dims=0)  # the last row, padding, becomes the first
        elif module == _HEAD:
            values = torch.cat([values.new_zeros(1, *values.shape[1:]), values])  # (num_items + 1, ...)
        renamed[name] = f"{modules[module]}.{kind}", values
    return renamed


def _with_weights(
    model: EncoderForNextItem, state_dict: dict[str, torch.Tensor], renamed: dict[str, tuple[str, torch.Tensor]]
) -> EncoderForNextItem:
    """The model with the tensors that `_renamed` returned, in eval mode."""
    expected = model.state_dict()
    for name, (our_name, values) in renamed.items():
        if values.shape != expected[our_name].shape:
            raise ValueError(
                f"{name} has shape {tuple(state_dict[name].shape)}: expected one that fits the "
                f"{model.config.num_items} items and hidden size {model.config.hidden_size} of {_ITEMS}.weight"
            )
    model.load_state_dict(dict(renamed.values()))
    return model.eval()


__all__ = [
    "convert_reference",
    "convert_reference_caser",
    "convert_reference_gru4rec",
    "convert_reference_sasrec",
    "load_reference_state_dict",
    "reference_catalogue",
]
