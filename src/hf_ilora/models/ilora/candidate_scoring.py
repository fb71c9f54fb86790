"""Log-likelihoods of many titles after one prompt; the language model reads the prompt only once."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

from .title_tokens import TitleTokens

# Approximate number of logits in one forward: 256 MB in float32.
_MAX_LOGITS = 1 << 26
# Approximate number of tokens in one forward on a CPU. Its matrices then fit into the cache, and rows of similar length
# share a forward.
_MAX_CPU_TOKENS = 1536
# Number of tokens whose logits are normalised at once, so that intermediate results fit into the cache of a CPU.
_TOKENS_NORMALISED_AT_ONCE = 16
# Attention implementations that accept a custom mask.
_MASKED_ATTENTION = ("sdpa", "eager")


def candidate_log_likelihoods(
    llm: PreTrainedModel,
    title_tokens: TitleTokens,
    candidates: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
) -> torch.Tensor:
    """log p(title | prompt): the sum of log p(token | prompt, earlier tokens) over a title's tokens and its terminator.

    The titles of all candidates are concatenated after the prompt into one sequence. A mask lets each token see the
    prompt and its own title only, so the prompt is neither computed nor stored more than once.

    Args:
        llm: language model with gated layers.
        title_tokens: tokenised titles of the catalogue.
        candidates: (batch, candidates) item ids, 0 for padding.
        inputs_embeds: (batch, tokens, llm hidden), the embedded prompts, left-padded.
        attention_mask: (batch, tokens).
        expert_gates: (batch, experts).

    Returns:
        (batch, candidates) float32, on the device of the prompt; -inf for padding.

    Raises:
        ValueError: if there are no candidates, if the attention implementation ignores custom masks, and if prompt and
            title are longer than the context or than a sliding window.
    """
    items = candidates.cpu().numpy()
    num_tokens = inputs_embeds.shape[1]
    title_lengths = _checked_lengths(llm, title_tokens, items, num_tokens)  # (batch, candidates)
    rows_at_once = len(items)
    if inputs_embeds.device.type == "cpu":
        rows_at_once = max(1, _MAX_CPU_TOKENS // (num_tokens + int(title_lengths.sum(1).max())))
    prompt_lengths = attention_mask.sum(1)  # (batch,)
    scores = torch.zeros(candidates.shape, device=inputs_embeds.device)  # (batch, candidates)
    for rows in prompt_lengths.argsort().split(rows_at_once):
        padding = num_tokens - int(prompt_lengths[rows].max())  # shared by all these rows
        scores[rows] = _log_likelihoods(
            llm,
            title_tokens,
            items[rows.cpu().numpy()],
            inputs_embeds[rows, padding:],
            attention_mask[rows, padding:],
            expert_gates[rows],
        )
    return scores.masked_fill(candidates.to(scores.device).eq(PADDING_ITEM_ID), float("-inf"))


def _log_likelihoods(
    llm: PreTrainedModel,
    title_tokens: TitleTokens,
    items: np.ndarray,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
) -> torch.Tensor:
    """Compute `candidate_log_likelihoods` for rows that share a forward; values at padding are arbitrary."""
    device, num_tokens = inputs_embeds.device, inputs_embeds.shape[1]
    lengths = title_tokens.lengths[items]  # (batch, candidates)
    prompt_positions = token_positions(attention_mask)  # (batch, tokens)
    prompt = llm(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=prompt_positions,
        expert_gates=expert_gates,
        # A cache with sliding windows could not be cropped once the titles fill its window.
        past_key_values=DynamicCache(),
        use_cache=True,
        # An index copies the last hidden states; for a view, the output layer would copy its weights once per row.
        logits_to_keep=torch.tensor([num_tokens - 1], device=device),
    )
    cache = prompt.past_key_values
    # The prompt predicts the first token of each title, and each token of a title predicts the next one.
    first_tokens = torch.from_numpy(title_tokens.token_ids[title_tokens.starts[items]]).to(device)
    log_p = prompt.logits[:, 0].float().log_softmax(-1).gather(1, first_tokens)  # (batch, candidates)
    columns = np.flatnonzero(lengths.any(axis=0))
    num_chunks = min(len(columns), math.ceil(lengths.sum() * prompt.logits.shape[-1] / _MAX_LOGITS))
    for chunk in np.array_split(columns, num_chunks) if num_chunks else []:
        titles = _TitleRows(title_tokens, items[:, chunk], device)
        # A token sees the real tokens of the prompt, and its own title up to itself.
        own_title = titles.own_title()  # (batch, longest, longest)
        seen_prompt = attention_mask.bool().unsqueeze(1).expand(-1, own_title.shape[1], -1)
        visible = torch.cat([seen_prompt, own_title], dim=2)  # (batch, longest, prompt + longest)
        logits = llm(
            input_ids=titles.tokens,
            attention_mask=_additive_mask(visible, inputs_embeds.dtype),
            position_ids=prompt_positions[:, -1:] + 1 + titles.position_in_title,
            past_key_values=cache,
            expert_gates=expert_gates,
            use_cache=True,
            logits_to_keep=titles.is_real,
        ).logits  # (real tokens, vocabulary)
        cache.crop(-titles.tokens.shape[1])
        log_p[:, torch.from_numpy(chunk).to(device)] += titles.sums(_log_p(logits, titles.next_tokens))
    return log_p


def packed_log_likelihoods(
    llm: PreTrainedModel,
    title_tokens: TitleTokens,
    candidates: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
    with_states: bool = False,
    candidates_on_cpu: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute `candidate_log_likelihoods` for training, with gradients: prompt and titles share one forward.

    There is no cache, so gradient checkpointing works. There are no chunks, so memory grows with the number of title
    tokens times the vocabulary.

    Args:
        llm, title_tokens, candidates, inputs_embeds, attention_mask, expert_gates: as in `candidate_log_likelihoods`.
        with_states: return the last hidden state of each prompt as well.
        candidates_on_cpu: the values of `candidates`, from which the CPU lays out the titles; None copies them from the
            device, which waits for it.

    Returns:
        Log-likelihoods (batch, candidates) float32, -inf for padding, and states (batch, llm hidden) or None.

    Raises:
        ValueError: as `candidate_log_likelihoods`.
    """
    device, (batch, num_tokens, _) = inputs_embeds.device, inputs_embeds.shape
    items = candidates.cpu().numpy() if candidates_on_cpu is None else candidates_on_cpu
    _checked_lengths(llm, title_tokens, items, num_tokens)
    titles = _TitleRows(title_tokens, items, device)
    longest = titles.tokens.shape[1]
    prompt_positions = token_positions(attention_mask)  # (batch, tokens)
    seen_prompt = attention_mask.bool().unsqueeze(1)  # (batch, 1, tokens)
    causal = seen_prompt.expand(-1, num_tokens, -1).tril()  # (batch, tokens, tokens)
    visible = torch.cat(
        [
            F.pad(causal, (0, longest)),
            torch.cat([seen_prompt.expand(-1, longest, -1), titles.own_title()], dim=2),
        ],
        dim=1,
    )  # (batch, tokens + longest, tokens + longest)
    title_embeddings = llm.get_input_embeddings()(titles.tokens)  # (batch, longest, llm hidden)
    is_last = torch.arange(num_tokens, device=device).eq(num_tokens - 1).expand(batch, -1)  # (batch, tokens)
    kept = torch.cat([is_last, titles.is_real], dim=1)  # (batch, tokens + longest)
    output = llm(
        inputs_embeds=torch.cat([inputs_embeds, title_embeddings.to(inputs_embeds.dtype)], dim=1),
        attention_mask=_additive_mask(visible, inputs_embeds.dtype),
        position_ids=torch.cat([prompt_positions, prompt_positions[:, -1:] + 1 + titles.position_in_title], dim=1),
        expert_gates=expert_gates,
        use_cache=False,
        output_hidden_states=with_states,
        logits_to_keep=kept,
    )
    logits = output.logits.view(-1, output.logits.shape[-1])  # (kept tokens, vocabulary)
    # In each row, the kept tokens are the last one of the prompt and then those of the titles.
    title_sizes = title_tokens.lengths[items].sum(1)  # (batch,)
    ends_prompt = np.arange(batch) + title_sizes.cumsum() - title_sizes  # (batch,)
    in_titles = np.arange(title_sizes.sum()) + np.repeat(np.arange(1, batch + 1), title_sizes)  # (real tokens,)
    ends_prompt, in_titles = (torch.from_numpy(n).to(device, non_blocking=True) for n in (ends_prompt, in_titles))
    # The prompt predicts the first token of each title, and each token of a title predicts the next one.
    first_tokens = torch.from_numpy(title_tokens.token_ids[title_tokens.starts[items]]).to(device)
    scores = logits[ends_prompt].float().log_softmax(-1).gather(1, first_tokens)  # (batch, candidates)
    scores = scores + titles.sums(-F.cross_entropy(logits[in_titles].float(), titles.next_tokens, reduction="none"))
    scores = scores.masked_fill(candidates.to(device).eq(PADDING_ITEM_ID), float("-inf"))
    return scores, output.hidden_states[-1][:, num_tokens - 1] if with_states else None


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens): the position of each token among the real tokens of its row, from 0; 0 for left padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def _additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(batch, queries, keys) bool -> (batch, 1, queries, keys): 0 where visible, else the lowest number."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min).unsqueeze(1)


def _log_p(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(tokens,) float32: log p of `tokens` (tokens,) under `logits` (tokens, vocabulary)."""
    parts = zip(logits.split(_TOKENS_NORMALISED_AT_ONCE), tokens.split(_TOKENS_NORMALISED_AT_ONCE), strict=True)
    return torch.cat([-F.cross_entropy(part.float(), targets, reduction="none") for part, targets in parts])


class _TitleRows:
    """The titles of each row, concatenated and padded on the right.

    Attributes:
        is_real: (batch, longest) bool, False for padding.
        tokens: (batch, longest) int64, the tokens of the titles.
        candidate: (batch, longest) int64, the column of the candidate that a token belongs to; -1 for padding.
        position_in_title: (batch, longest) int64.
        next_tokens: (real tokens,) int64, the token that follows each one; the terminator follows the last of a title.
        title: (real tokens,) int64, the index of each token's title in the flattened (batch, candidates).
        shape: (batch, candidates).
    """

    def __init__(self, title_tokens: TitleTokens, items: np.ndarray, device: torch.device):
        lengths = title_tokens.lengths[items]  # (batch, candidates)
        totals = lengths.sum(1)  # (batch,)
        is_real = np.arange(totals.max()) < totals[:, None]  # (batch, longest)
        flat = lengths.ravel()  # (titles,)
        title = np.repeat(np.arange(flat.size), flat)  # (real tokens,)
        position = np.arange(flat.sum()) - np.repeat(flat.cumsum() - flat, flat)  # (real tokens,)
        indices = np.repeat(title_tokens.starts[items].ravel(), flat) + position  # (real tokens,), into token_ids
        is_last = position + 1 == np.repeat(flat, flat)
        following = title_tokens.token_ids[np.minimum(indices + 1, len(title_tokens.token_ids) - 1)]

        def padded(values: np.ndarray, fill: int) -> torch.Tensor:
            rows = np.full(is_real.shape, fill, dtype=np.int64)
            rows[is_real] = values
            return torch.from_numpy(rows).to(device, non_blocking=True)

        self.is_real = torch.from_numpy(is_real).to(device, non_blocking=True)
        self.tokens = padded(title_tokens.token_ids[indices], 0)
        self.candidate = padded(title % items.shape[1], -1)
        self.position_in_title = padded(position, 0)
        self.next_tokens = torch.from_numpy(np.where(is_last, title_tokens.terminator_id, following)).to(
            device, non_blocking=True
        )
        self.title, self.shape = torch.from_numpy(title).to(device, non_blocking=True), items.shape

    def own_title(self) -> torch.Tensor:
        """(batch, longest, longest) bool: whether a token sees another one, of its own title and not after it."""
        return (self.candidate.unsqueeze(2) == self.candidate.unsqueeze(1)).tril()

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values of tokens per title: (real tokens,) -> (batch, candidates)."""
        sums = torch.zeros(self.shape, device=values.device)
        return sums.view(-1).index_add(0, self.title, values).view(self.shape)


def _checked_lengths(llm: PreTrainedModel, title_tokens: TitleTokens, items: np.ndarray, num_tokens: int) -> np.ndarray:
    """Number of tokens of each title, (batch, candidates), after checking that the language model can score them."""
    lengths = title_tokens.lengths[items]  # (batch, candidates)
    if not lengths.any():
        raise ValueError(f"candidates of shape {items.shape} are all padding: expected at least one item")
    _check_attention(llm, num_tokens + int(lengths.max()))
    return lengths


def _check_attention(llm: PreTrainedModel, num_tokens: int) -> None:
    config = llm.config.get_text_config()
    if config._attn_implementation not in _MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {config._attn_implementation}: expected one of {', '.join(_MASKED_ATTENTION)} to "
            "score candidates; load the language model with attn_implementation='sdpa'"
        )
    check_context(llm, num_tokens)
    _check_length(num_tokens, config.to_dict().get("sliding_window"), "sliding window")


def check_context(llm: PreTrainedModel, num_tokens: int) -> None:
    """Raise a ValueError if a prompt and answer of `num_tokens` do not fit into the language model's context."""
    _check_length(num_tokens, llm.config.get_text_config().max_position_embeddings, "context")


def _check_length(num_tokens: int, limit: int | None, name: str) -> None:
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"the longest prompt and title have {num_tokens} tokens: expected at most {limit}, the {name} of the "
            "language model; lower max_history or show fewer candidates"
        )


__all__ = ["candidate_log_likelihoods", "check_context", "packed_log_likelihoods", "token_positions"]
