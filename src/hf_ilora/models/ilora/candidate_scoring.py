"""Log-likelihoods of many titles after one prompt: the prompt is read once, and its keys and values are shared."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from hf_ilora.models.next_item.configuration_next_item import PADDING_ITEM_ID

from .title_tokens import TitleTokens

# Logits of one forward, about: 256 MB in float32.
_MAX_LOGITS = 1 << 26
# Tokens of one forward on a CPU, about: its matrices then stay in the cache, and rows of like length meet.
_MAX_CPU_TOKENS = 1536
# Tokens whose logits are normalised at once: what that makes in between stays in the cache of a CPU.
_TOKENS_NORMALISED_AT_ONCE = 16
# Attention that takes a mask of our own.
_MASKED_ATTENTION = ("sdpa", "eager")


def candidate_log_likelihoods(
    llm: PreTrainedModel,
    prompt_embeddings: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
    title_tokens: TitleTokens,
    candidates: torch.Tensor,
) -> torch.Tensor:
    """Sum of log p(token | prompt, earlier tokens of the title) over each candidate's tokens and the terminator.

    The tokens of all candidates stand one after the other behind the prompt in a single sequence, and a mask lets each
    see the prompt and its own title only, so that nothing of the prompt is computed or stored twice.

    Args:
        llm: with gated layers.
        prompt_embeddings: (batch, tokens, llm hidden), left-padded.
        attention_mask: (batch, tokens).
        expert_gates: (batch, experts).
        title_tokens: of the catalogue.
        candidates: (batch, candidates) item ids, 0 for padding.

    Returns:
        (batch, candidates) float32, on the device of the prompt; -inf for padding.

    Raises:
        ValueError: for no candidates, an attention that takes no such mask, a window of attention shorter than the
            sequence, and titles that do not fit into the context.
    """
    items = candidates.cpu().numpy()
    num_tokens = prompt_embeddings.shape[1]
    title_lengths = _checked_lengths(llm, title_tokens, items, num_tokens)  # (batch, candidates)
    rows_at_once = len(items)
    if prompt_embeddings.device.type == "cpu":
        rows_at_once = max(1, _MAX_CPU_TOKENS // (num_tokens + int(title_lengths.sum(1).max())))
    prompt_lengths = attention_mask.sum(1)  # (batch,)
    scores = torch.zeros(candidates.shape, device=prompt_embeddings.device)  # (batch, candidates)
    for rows in prompt_lengths.argsort().split(rows_at_once):
        padding = num_tokens - int(prompt_lengths[rows].max())  # that all these rows have
        scores[rows] = _log_likelihoods(
            llm,
            prompt_embeddings[rows, padding:],
            attention_mask[rows, padding:],
            expert_gates[rows],
            title_tokens,
            items[rows.cpu().numpy()],
        )
    return scores.masked_fill(candidates.to(scores.device).eq(PADDING_ITEM_ID), float("-inf"))


def _log_likelihoods(
    llm: PreTrainedModel,
    prompt_embeddings: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
    title_tokens: TitleTokens,
    items: np.ndarray,
) -> torch.Tensor:
    """`candidate_log_likelihoods` of rows that go through the language model together; of any value for padding."""
    device, num_tokens = prompt_embeddings.device, prompt_embeddings.shape[1]
    lengths = title_tokens.lengths[items]  # (batch, candidates)
    prompt_positions = positions(attention_mask)  # (batch, tokens)
    prompt = llm(
        inputs_embeds=prompt_embeddings,
        attention_mask=attention_mask,
        position_ids=prompt_positions,
        expert_gates=expert_gates,
        # Of a plain kind: a cache with sliding windows cannot be cropped once all titles fill its window.
        past_key_values=DynamicCache(),
        use_cache=True,
        # An index gives the last token as a copy; of a view, the output layer would copy its weights for every row.
        logits_to_keep=torch.tensor([num_tokens - 1], device=device),
    )
    cache = prompt.past_key_values
    # The prompt predicts the first token of each title, and each token of a title the one behind it.
    first_tokens = torch.from_numpy(title_tokens.token_ids[title_tokens.starts[items]]).to(device)
    log_p = prompt.logits[:, 0].float().log_softmax(-1).gather(1, first_tokens)  # (batch, candidates)
    columns = np.flatnonzero(lengths.any(axis=0))
    num_chunks = min(len(columns), math.ceil(lengths.sum() * prompt.logits.shape[-1] / _MAX_LOGITS))
    for chunk in np.array_split(columns, num_chunks) if num_chunks else []:
        titles = _TitleRows(title_tokens, items[:, chunk], device)
        # A token sees all real tokens of the prompt, and its own title up to itself.
        own_title = titles.candidate.unsqueeze(2) == titles.candidate.unsqueeze(1)  # (batch, longest, longest)
        seen_prompt = attention_mask.bool().unsqueeze(1).expand(-1, own_title.shape[1], -1)
        visible = torch.cat([seen_prompt, own_title.tril()], dim=2)  # (batch, longest, prompt + longest)
        mask = torch.zeros(visible.shape, dtype=prompt_embeddings.dtype, device=device)
        logits = llm(
            input_ids=titles.tokens,
            attention_mask=mask.masked_fill(~visible, torch.finfo(mask.dtype).min).unsqueeze(1),
            position_ids=prompt_positions[:, -1:] + 1 + titles.place,
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
    prompt_embeddings: torch.Tensor,
    attention_mask: torch.Tensor,
    expert_gates: torch.Tensor,
    title_tokens: TitleTokens,
    candidates: torch.Tensor,
    with_states: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`candidate_log_likelihoods` for training: prompt and titles in one forward, which gradients pass through.

    There is no cache, so that gradient checkpointing works too, and no chunking: memory grows with the tokens of all
    titles times the vocabulary.

    Args:
        llm, prompt_embeddings, attention_mask, expert_gates, title_tokens, candidates: as there.
        with_states: also return the last hidden state of each prompt.

    Returns:
        scores (batch, candidates) float32, -inf for padding, and states (batch, llm hidden) or None.

    Raises:
        ValueError: as there.
    """
    device, (batch, num_tokens, _) = prompt_embeddings.device, prompt_embeddings.shape
    items = candidates.cpu().numpy()
    _checked_lengths(llm, title_tokens, items, num_tokens)
    titles = _TitleRows(title_tokens, items, device)
    longest = titles.tokens.shape[1]
    prompt_positions = positions(attention_mask)  # (batch, tokens)
    seen_prompt = attention_mask.bool().unsqueeze(1)  # (batch, 1, tokens)
    causal = seen_prompt.expand(-1, num_tokens, -1).tril()  # (batch, tokens, tokens)
    own_title = (titles.candidate.unsqueeze(2) == titles.candidate.unsqueeze(1)).tril()  # (batch, longest, longest)
    visible = torch.cat(
        [
            F.pad(causal, (0, longest)),
            torch.cat([seen_prompt.expand(-1, longest, -1), own_title], dim=2),
        ],
        dim=1,
    )  # (batch, tokens + longest, tokens + longest)
    mask = torch.zeros(visible.shape, dtype=prompt_embeddings.dtype, device=device)
    title_embeddings = llm.get_input_embeddings()(titles.tokens)  # (batch, longest, llm hidden)
    is_last = torch.arange(num_tokens, device=device).eq(num_tokens - 1).expand(batch, -1)  # (batch, tokens)
    kept = torch.cat([is_last, titles.is_real], dim=1)  # (batch, tokens + longest)
    output = llm(
        inputs_embeds=torch.cat([prompt_embeddings, title_embeddings.to(prompt_embeddings.dtype)], dim=1),
        attention_mask=mask.masked_fill(~visible, torch.finfo(mask.dtype).min).unsqueeze(1),
        position_ids=torch.cat([prompt_positions, prompt_positions[:, -1:] + 1 + titles.place], dim=1),
        expert_gates=expert_gates,
        use_cache=False,
        output_hidden_states=with_states,
        logits_to_keep=kept,
    )
    logits = output.logits.view(-1, output.logits.shape[-1])  # (kept tokens, vocabulary)
    ends_prompt = is_last.new_zeros(kept.shape).index_fill_(1, torch.tensor([num_tokens - 1], device=device), True)[
        kept
    ]
    # The prompt predicts the first token of each title, and each token of a title the one behind it.
    first_tokens = torch.from_numpy(title_tokens.token_ids[title_tokens.starts[items]]).to(device)
    scores = logits[ends_prompt].float().log_softmax(-1).gather(1, first_tokens)  # (batch, candidates)
    scores = scores + titles.sums(-F.cross_entropy(logits[~ends_prompt].float(), titles.next_tokens, reduction="none"))
    scores = scores.masked_fill(candidates.to(device).eq(PADDING_ITEM_ID), float("-inf"))
    return scores, output.hidden_states[-1][:, num_tokens - 1] if with_states else None


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(batch, tokens): the place of each real token, from 0; padding does not count."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def _log_p(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p of `tokens` (tokens,) under `logits` (tokens, vocabulary): (tokens,) float32."""
    parts = zip(logits.split(_TOKENS_NORMALISED_AT_ONCE), tokens.split(_TOKENS_NORMALISED_AT_ONCE), strict=True)
    return torch.cat([-F.cross_entropy(part.float(), targets, reduction="none") for part, targets in parts])


class _TitleRows:
    """The tokens of several titles per row, one title after the other, padded on the right.

    Attributes:
        is_real: (batch, longest) bool, False for padding.
        tokens: (batch, longest) int64, of the titles.
        candidate: (batch, longest) int64, the column of the title that a token belongs to; -1 for padding.
        place: (batch, longest) int64, of a token in its title.
        next_tokens: (real tokens,) int64, what stands behind each: the terminator after the last of a title.
        title: (real tokens,) int64, which of all titles of the batch a token belongs to.
        shape: (batch, candidates).
    """

    def __init__(self, title_tokens: TitleTokens, items: np.ndarray, device: torch.device):
        lengths = title_tokens.lengths[items]  # (batch, candidates)
        totals = lengths.sum(1)  # (batch,)
        is_real = np.arange(totals.max()) < totals[:, None]  # (batch, longest)
        flat = lengths.ravel()  # (titles,)
        title = np.repeat(np.arange(flat.size), flat)  # (real tokens,)
        place = np.arange(flat.sum()) - np.repeat(flat.cumsum() - flat, flat)
        positions = np.repeat(title_tokens.starts[items].ravel(), flat) + place
        is_last = place + 1 == np.repeat(flat, flat)
        following = title_tokens.token_ids[np.minimum(positions + 1, len(title_tokens.token_ids) - 1)]

        def padded(values: np.ndarray, fill: int) -> torch.Tensor:
            rows = np.full(is_real.shape, fill, dtype=np.int64)
            rows[is_real] = values
            return torch.from_numpy(rows).to(device)

        self.is_real = torch.from_numpy(is_real).to(device)
        self.tokens = padded(title_tokens.token_ids[positions], 0)
        self.candidate = padded(title % items.shape[1], -1)
        self.place = padded(place, 0)
        self.next_tokens = torch.from_numpy(np.where(is_last, title_tokens.terminator_id, following)).to(device)
        self.title, self.shape = torch.from_numpy(title).to(device), items.shape

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Add up what the tokens of each title have: (real tokens,) -> (batch, candidates)."""
        sums = torch.zeros(self.shape, device=values.device)
        return sums.view(-1).index_add(0, self.title, values).view(self.shape)


def _checked_lengths(llm: PreTrainedModel, title_tokens: TitleTokens, items: np.ndarray, num_tokens: int) -> np.ndarray:
    """Tokens of the titles of `items` (batch, candidates); ValueError for none, and for what attention cannot score."""
    lengths = title_tokens.lengths[items]  # (batch, candidates)
    if not lengths.any():
        raise ValueError(f"candidates have shape {items.shape} and hold no item: expected at least one")
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
    """Raise a ValueError when the longest prompt and answer, `num_tokens`, do not fit into the context."""
    _check_length(num_tokens, llm.config.get_text_config().max_position_embeddings, "context")


def _check_length(num_tokens: int, limit: int | None, name: str) -> None:
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"the longest prompt and title have {num_tokens} tokens: expected at most {limit}, the {name} of the "
            "language model; lower max_history or show fewer candidates"
        )


__all__ = ["candidate_log_likelihoods", "check_context", "packed_log_likelihoods", "positions"]
