"""The SASRec of LLaRA, iLoRA and DLLM2Rec as `SASRecForNextItem`, with the same scores."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_sasrec import SASRecConfig
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.reference.pickle_reader import read_state_dict

# The authors' names, without ".weight" and ".bias", and ours.
_PARAMETERS = {
    "item_embeddings": "model.item_embedding",
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
    "s_fc": "head",
}


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
    _check_names(state_dict)
    rows, hidden_size = state_dict["item_embeddings.weight"].shape
    max_length = len(state_dict["positional_embeddings.weight"])
    config = SASRecConfig(
        num_items=rows - 1,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_length=max_length,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        block_type="reference",
        position_alignment="oldest",
        tie_word_embeddings=False,
        head_bias=True,
        loss_type="bce",
        num_negatives=1,
        negative_sharing="position",
    )
    model = SASRecForNextItem(config).eval()
    expected = model.state_dict()
    converted = {}
    for name, tensor in state_dict.items():
        module, _, kind = name.rpartition(".")
        values = tensor.detach().to(torch.float32)
        if module == "item_embeddings":
            values = values.roll(1, dims=0)  # the last row, padding, becomes the first
        elif module == "s_fc":
            values = torch.cat([values.new_zeros(1, *values.shape[1:]), values])  # (num_items + 1, ...)
        elif values.dim() == 3:
            values = values.squeeze(2)  # a convolution of width 1 is a linear layer: (hidden, hidden)
        our_name = f"{_PARAMETERS[module]}.{kind}"
        if values.shape != expected[our_name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected one that fits the {rows - 1} items and hidden size "
                f"{hidden_size} of item_embeddings.weight"
            )
        converted[our_name] = values
    model.load_state_dict(converted)
    return model


def reference_catalogue(items_path: str | os.PathLike, num_items: int) -> Catalogue:
    """The catalogue of a converted model, from a table of titles.

    Args:
        items_path: parquet with `item_id` (the reference's ids, 0..num_items - 1) and `title`, and optionally `raw_id`,
            `year` and `genres`. Without `raw_id`, the reference's id is the raw id. Or the catalogue of a prepared data
            set with the same items, whose ids are 1..num_items, such as that of the whole of MovieLens-100K.
        num_items: number of items of the model.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when the file is not such a table, or has other ids.
    """
    try:
        items = pq.read_table(items_path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{items_path} is not a whole parquet file ({error})") from error
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
    """The authors' names and tensors from their file, without running anything in it.

    Args:
        path: a safetensors file with the authors' names, or a file of `torch.save` (in either of its formats) with the
            whole SASRec module or its state dict.

    Raises:
        UnsafePickleError: when a pickle names a class or function that the authors' files do not.
        ValueError: when the file is truncated, is of another kind, or its sizes do not fit its bytes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _check_names(state_dict: dict[str, torch.Tensor]) -> None:
    expected = {f"{module}.weight" for module in _PARAMETERS}
    expected |= {f"{module}.bias" for module in _PARAMETERS if not module.endswith("_embeddings")}
    missing, unexpected = sorted(expected - state_dict.keys()), sorted(map(str, state_dict.keys() - expected))
    if any(name.startswith("fc_4096_64.") for name in unexpected):
        raise ValueError(
            "the state dict contains fc_4096_64, DLLM2Rec's projection of LLM embeddings: expected a plain SASRec; if "
            "it was trained with ed_weight 0, drop fc_4096_64.weight and fc_4096_64.bias"
        )
    if missing or unexpected:
        raise ValueError(
            f"this is not the authors' SASRec of one block: missing {', '.join(missing) or 'nothing'}; unexpected "
            f"{', '.join(unexpected) or 'nothing'}"
        )
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is not a tensor of floating-point numbers: expected the authors' weights")
    for name in ("item_embeddings.weight", "positional_embeddings.weight"):
        shape = tuple(state_dict[name].shape)
        if len(shape) != 2 or shape[0] < 2:
            raise ValueError(f"{name} has shape {shape}: expected at least two rows of the hidden size")


__all__ = ["convert_reference_sasrec", "load_reference_state_dict", "reference_catalogue"]
