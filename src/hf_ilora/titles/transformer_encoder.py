"""Encodes titles with a model of transformers: pools hidden states of a text encoder or a causal language model."""

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoModelForTextEncoding, PreTrainedTokenizerBase

from hf_ilora.models.ilora.language_models import (
    check_config_sizes,
    load_language_model,
    load_tokenizer,
    truncate_layers,
)
from hf_ilora.models.next_item.saved_model import WRONG_TYPES

from .encoder_source import MODULES_FILE, EncoderSource

logger = logging.getLogger(__name__)

EXTRA = 'pip install "hf_ilora[titles]"'
SHORT_TITLE = 32  # tokens; batches contain fewer longer titles, to bound their memory
_TITLES_PER_CALL = 10_000  # titles tokenised at a time
_MAX_TOKENS = 1 << 20  # for models without a limit: tokenizers refuse 10**30, their own number for it
_SECONDS_BETWEEN_PROGRESS = 10.0
_POOLING_MODES = ("mean", "cls", "lasttoken")
# The names of these modes in sentence-transformers before 5.5.
_POOLING_FLAGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
_TRANSFORMER_SETTINGS = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}


@dataclass(frozen=True)
class Pooling:
    """How the hidden states of a title become one vector.

    Attributes:
        mode: "mean" of the tokens, "cls" (the first token) or "lasttoken".
        special_tokens: whether the mean includes the tokens that the tokenizer adds.
        max_tokens: length to truncate titles to; None leaves it to the tokenizer and the model.
    """

    mode: str = "mean"
    special_tokens: bool = True
    max_tokens: int | None = None


def load_transformer(
    source: EncoderSource,
    *,
    layer: int | None,
    dtype: torch.dtype | str,
    device: torch.device,
    trust_remote_code: bool,
) -> Callable[[Sequence[str], int], torch.Tensor]:
    """Load the model of `source` and return a function that encodes titles with it.

    A model that sentence-transformers saved is pooled as its files say; it needs that library if the files name more
    modules than pooling. Another encoder gives the mean over all tokens. A causal language model gives the mean over
    the tokens of the title, after a first token that is left out because its norm often outweighs the others.

    Args:
        source: where the model is.
        layer: number of blocks after which hidden states are read; None: after the last block and its normalisation;
            -2: one block earlier.
        dtype: dtype of the weights.
        device: where to compute.
        trust_remote_code: run code that comes with the model.

    Returns:
        A function of (titles,) distinct strings and the batch size: the number of titles per forward if they have up to
        32 tokens; longer titles are fewer. It returns (titles, size) float32 on the CPU, and raises a ValueError for a
        title without tokens.

    Raises:
        ValueError: the model lacks the layer, cannot be loaded, or needs sentence-transformers, which is not installed.
        OSError: there are no weights in safetensors.
    """
    pooling = pooling_of(source)
    if pooling is None:
        return _load_sentence_transformers(source, layer, dtype, device, trust_remote_code)
    load = _load_encoder if pooling.special_tokens else _load_decoder
    model, tokenizer, layer = load(source, layer, dtype, trust_remote_code)
    return partial(_pooled, model.eval().to(device), tokenizer, layer, pooling)


@torch.no_grad()
def _pooled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layer: int | None,
    pooling: Pooling,
    titles: Sequence[str],
    batch_size: int,
) -> torch.Tensor:
    """The pooled hidden states of the titles, (titles, size)."""
    device = model.device
    token_ids, counted, starts = _tokenised(tokenizer, titles, pooling, model.config)
    lengths = np.diff(starts)  # (titles,)
    padding = tokenizer.pad_token_id or 0
    progress = _Progress(len(titles), len(token_ids))
    table = None
    # Titles of equal length need no padding. The longest come first, to run out of memory at once or not at all.
    order = lengths.argsort(kind="stable")[::-1].copy()
    first = 0
    while first < len(order):
        most = max(1, batch_size * SHORT_TITLE // lengths[order[first]])
        rows = order[first : first + min(batch_size, most)]
        first += len(rows)
        mask = np.arange(lengths[rows].max()) < lengths[rows, None]  # (rows, tokens)
        places = np.where(mask, starts[rows, None] + np.arange(mask.shape[1]), 0)
        outputs = model(
            input_ids=torch.from_numpy(np.where(mask, token_ids[places], padding)).to(device),
            attention_mask=None if mask.all() else torch.from_numpy(mask.astype(np.int64)).to(device),
            output_hidden_states=layer is not None,
        )
        states = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]  # (rows, tokens, size)
        weights = torch.from_numpy(_weights(mask, mask & counted[places], pooling.mode)).to(device)
        vectors = torch.bmm(weights.unsqueeze(1), states.float()).squeeze(1)  # (rows, size)
        if table is None:
            table = torch.empty(len(titles), vectors.shape[1])
        table[torch.from_numpy(rows)] = vectors.cpu()
        progress.report(first, int(lengths[rows].sum()))
    return table


def pooling_of(source: EncoderSource) -> Pooling | None:
    """How the hidden states of a model are pooled; None if only sentence-transformers can do it.

    Raises:
        ValueError: the files of sentence-transformers are damaged.
    """
    modules = source.read_json(MODULES_FILE)
    if modules is None:
        architectures = source.config.get("architectures") or []
        is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
        return Pooling(special_tokens=not is_causal)
    try:
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]) or modules[0]["path"]:
            return None
        settings = source.read_json("sentence_bert_config.json") or {}
        prompts = source.read_json("config_sentence_transformers.json") or {}
        pooling = source.read_json(f"{modules[1]['path']}/config.json")
        modes = pooling.get("pooling_mode") or [
            mode for flag, mode in _POOLING_FLAGS.items() if pooling.get(f"pooling_mode_{flag}")
        ]
        others = [
            flag
            for flag, chosen in pooling.items()
            if chosen and flag.startswith("pooling_mode_") and flag.removeprefix("pooling_mode_") not in _POOLING_FLAGS
        ]
        modes = [modes] if isinstance(modes, str) else list(modes)
        is_plain = (
            settings.keys() <= _TRANSFORMER_SETTINGS
            and settings.get("transformer_task", "feature-extraction") == "feature-extraction"
            and set(settings.get("modality_config", ["text"])) == {"text"}
            and not settings.get("do_lower_case")
            and not prompts.get("default_prompt_name")
        )
        if not is_plain or others or len(modes) != 1 or modes[0] not in _POOLING_MODES:
            return None
        return Pooling(modes[0], max_tokens=settings.get("max_seq_length"))
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{MODULES_FILE} of {source.location}, or a file that it names, is not what sentence-transformers writes "
            f"({error!r}): restore the folder"
        ) from error


def _load_encoder(
    source: EncoderSource, layer: int | None, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[nn.Module, PreTrainedTokenizerBase, int | None]:
    """The model, its tokenizer, and `layer` counted from the first block, None for the last."""
    check_config_sizes(source.location, source.hub_arguments)
    tokenizer = load_tokenizer(source.location, trust_remote_code=trust_remote_code, **source.hub_arguments)
    # Load only the encoder of encoder-decoders such as T5; some repositories contain nothing else.
    loader = AutoModelForTextEncoding if source.config.get("is_encoder_decoder") else AutoModel
    try:
        model, loading = loader.from_pretrained(
            source.location,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **source.hub_arguments,
        )
    except (OSError, ValueError, *WRONG_TYPES) as error:
        raise ValueError(
            f"{source.location}: the title encoder cannot be loaded ({error}); expected a text encoder with its "
            "weights in safetensors: name another folder or model"
        ) from error
    wrong = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    wrong = sorted(key for key in wrong if not key.startswith("pooler."))  # the pooler is not used
    if wrong:
        raise ValueError(
            f"{source.location} has no matching weights for {len(wrong)} tensors of {type(model).__name__}, such as "
            f"{wrong[0]}: expected all of them (missing ones would stay random); restore the folder"
        )
    return model, tokenizer, _place(layer, model.config, source)


def _load_decoder(
    source: EncoderSource, layer: int | None, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[nn.Module, PreTrainedTokenizerBase, int | None]:
    """As `_load_encoder`, without the blocks that are not needed."""
    llm, tokenizer, _ = load_language_model(
        source.location, dtype=dtype, trust_remote_code=trust_remote_code, **source.hub_arguments
    )
    place = _place(layer, llm.config, source)
    if place is not None:
        truncate_layers(llm, place + 1)  # one more, because the last hidden states would be normalised
    return llm.get_decoder(), tokenizer, place


def _place(layer: int | None, config, source: EncoderSource) -> int | None:
    num_layers = config.get_text_config().num_hidden_layers
    if layer is None:
        return None
    place = layer + num_layers + 1 if layer < 0 else layer
    if not 0 <= place <= num_layers:
        raise ValueError(
            f"layer is {layer} for {source.location}, which has {num_layers} blocks: expected 0 (the embeddings) to "
            f"{num_layers}, or -1 (after the last block) to {-num_layers - 1}"
        )
    return None if place == num_layers else place


def _tokenised(
    tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], pooling: Pooling, config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All titles' tokens (total,), whether each of them counts (total,), and where each title starts (titles + 1,)."""
    limits = (
        pooling.max_tokens,
        tokenizer.model_max_length,
        getattr(config, "max_position_embeddings", None),
        _MAX_TOKENS,
    )
    # In a causal language model, the first token attracts attention and says little, whatever it is.
    front = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    front = None if pooling.special_tokens else front
    max_length = min(limit for limit in limits if limit) - (front is not None)
    token_ids, counted, lengths = [], [], [0]
    for first in range(0, len(titles), _TITLES_PER_CALL):
        encoded = tokenizer(
            list(titles[first : first + _TITLES_PER_CALL]),
            split_special_tokens=True,  # "</s>" in a title is text
            return_special_tokens_mask=True,
            truncation=True,
            max_length=max_length,
            verbose=False,
        )
        for title, ids, is_special in zip(
            titles[first:], encoded["input_ids"], encoded["special_tokens_mask"], strict=False
        ):
            counts = np.ones(len(ids), bool) if pooling.special_tokens else ~np.array(is_special, dtype=bool)
            if not counts.any():
                raise ValueError(
                    f"the title {title!r} becomes no token of {tokenizer.name_or_path}: give the item a title in this "
                    "tokenizer's alphabet, or choose another encoder"
                )
            if counts[0] and front is not None:
                ids, counts = [front, *ids], np.append(False, counts)
            token_ids.append(np.array(ids, dtype=np.int64))
            counted.append(counts)
            lengths.append(len(ids))
    return np.concatenate(token_ids), np.concatenate(counted), np.cumsum(lengths)


def _weights(mask: np.ndarray, counted: np.ndarray, mode: str) -> np.ndarray:
    """The weight of each token in the vector of its title, (rows, tokens) float32.

    Args:
        mask: (rows, tokens), False for padding.
        counted: (rows, tokens), whether "mean" includes the token.
        mode: as in `Pooling`; "cls" takes the first token, whatever it is.
    """
    if mode == "mean":
        return (counted / counted.sum(1, keepdims=True)).astype(np.float32)
    places = np.zeros(len(mask), np.int64) if mode == "cls" else mask.sum(1) - 1  # (rows,)
    return (np.arange(mask.shape[1]) == places[:, None]).astype(np.float32)


class _Progress:
    """Logs from time to time how many titles are encoded and how long the rest will take."""

    def __init__(self, num_titles: int, num_tokens: int):
        self.num_titles, self.num_tokens, self.tokens = num_titles, num_tokens, 0
        self.begun = self.reported = time.monotonic()

    def report(self, titles: int, new_tokens: int) -> None:
        self.tokens += new_tokens
        now = time.monotonic()
        if now - self.reported < _SECONDS_BETWEEN_PROGRESS or titles == self.num_titles:
            return
        self.reported = now
        left = (now - self.begun) * (self.num_tokens / self.tokens - 1)
        logger.info("encoded %d of %d titles, about %.0f s left", titles, self.num_titles, left)


def _load_sentence_transformers(
    source: EncoderSource, layer: int | None, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool
) -> Callable[[Sequence[str], int], torch.Tensor]:
    """As `load_transformer`, with all modules of a model of sentence-transformers."""
    if layer is not None:
        raise ValueError(
            f"layer is {layer} for {source.location}, whose modules read its last one: expected layer=None"
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            f"{source.location} is more than a transformer with mean pooling: expected sentence-transformers to run "
            f"its modules; {EXTRA}"
        )
    from sentence_transformers import SentenceTransformer

    settings = dict(source.hub_arguments)
    if source.config:
        settings["model_kwargs"] = {"dtype": dtype, "use_safetensors": True}
    try:
        model = SentenceTransformer(
            source.location, device=str(device), trust_remote_code=trust_remote_code, **settings
        )
    except (OSError, ValueError, ImportError, *WRONG_TYPES) as error:
        raise ValueError(
            f"{source.location} cannot be loaded by sentence-transformers ({error}): restore the folder, or name "
            "another model"
        ) from error

    def encode(titles: Sequence[str], batch_size: int) -> torch.Tensor:
        vectors = model.encode(list(titles), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().cpu().clone()  # tensors made in inference mode cannot take part in training

    return encode


__all__ = ["Pooling", "load_transformer", "pooling_of"]
