"""Log-likelihoods of many titles after one prompt: the prompt is read once, and its keys and values are shared."""

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from .configuration_sasrec import PADDING_ITEM_ID
from .title_tokens import TitleTokens

# Logits of one forward, at most: 256 MB in float32.
_MAX_LOGITS = 1 << 26
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
    device, batch = prompt_embeddings.device, len(candidates)
    longest = int(title_tokens.lengths[candidates.cpu().numpy()].max(initial=0))
    if not longest:
        raise ValueError(f"candidates have shape {tuple(candidates.shape)} and hold no item: expected at least one")
    _check_attention(llm, prompt_embeddings.shape[1] + longest)
    prompt_positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (batch, tokens)
    prompt = llm(
        inputs_embeds=prompt_embeddings,
        attention_mask=attention_mask,
        position_ids=prompt_positions,
        expert_gates=expert_gates,
        # Of a plain kind: a cache with sliding windows cannot be cropped once all titles fill its window.
        past_key_values=DynamicCache(),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = prompt.past_key_values
    first_log_p = prompt.logits[:, -1].float().log_softmax(-1)  # (batch, vocabulary)
    columns_per_chunk = max(1, _MAX_LOGITS // (first_log_p.numel() * longest))
    scores = []
    for chunk in candidates.split(columns_per_chunk, dim=1):
        titles = _TitleRows(title_tokens, chunk.cpu().numpy(), device)
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
        ).logits.float()  # (batch, longest, vocabulary)
        cache.crop(-titles.tokens.shape[1])
        # The prompt predicts the first token of a title, and each token the one behind it.
        log_p = logits.gather(2, titles.next_tokens.unsqueeze(2)).squeeze(2) - logits.logsumexp(-1)  # (batch, longest)
        log_p = log_p + first_log_p.gather(1, titles.tokens).masked_fill(titles.place != 0, 0.0)
        sums = torch.zeros(batch, chunk.shape[1] + 1, device=device)  # the last column takes the padding
        scores.append(sums.scatter_add(1, titles.candidate, log_p)[:, :-1])
    padding = candidates.to(device).eq(PADDING_ITEM_ID)  # (batch, candidates)
    return torch.cat(scores, dim=1).masked_fill(padding, float("-inf"))


class _TitleRows:
    """The tokens of several titles per row, one title after the other, padded on the right.

    Attributes, all (batch, longest) int64:
        tokens: of the titles.
        next_tokens: the token behind each, which is the terminator after the last of a title.
        candidate: the column of the title that a token belongs to; one more than the last column for padding.
        place: of a token in its title.
    """

    def __init__(self, title_tokens: TitleTokens, items: np.ndarray, device: torch.device):
        lengths = title_tokens.lengths[items]  # (batch, candidates)
        totals = lengths.sum(1)  # (batch,)
        real = np.arange(totals.max()) < totals[:, None]  # (batch, longest)
        flat = lengths.ravel()  # (titles,)
        place = np.arange(flat.sum()) - np.repeat(flat.cumsum() - flat, flat)  # (total,)
        positions = np.repeat(title_tokens.starts[items].ravel(), flat) + place
        is_last = place + 1 == np.repeat(flat, flat)
        following = title_tokens.token_ids[np.minimum(positions + 1, len(title_tokens.token_ids) - 1)]
        columns = np.tile(np.arange(items.shape[1]), len(items))  # (titles,)

        def padded(values: np.ndarray, fill: int) -> torch.Tensor:
            rows = np.full(real.shape, fill, dtype=np.int64)
            rows[real] = values
            return torch.from_numpy(rows).to(device)

        self.tokens = padded(title_tokens.token_ids[positions], 0)
        self.next_tokens = padded(np.where(is_last, title_tokens.terminator_id, following), 0)
        self.candidate = padded(np.repeat(columns, flat), items.shape[1])
        self.place = padded(place, 1)


def _check_attention(llm: PreTrainedModel, num_tokens: int) -> None:
    config = llm.config.get_text_config()
    if config._attn_implementation not in _MASKED_ATTENTION:
        raise ValueError(
            f"attn_implementation is {config._attn_implementation}: expected one of {', '.join(_MASKED_ATTENTION)} to "
            "score candidates; load the language model with attn_implementation='sdpa'"
        )
    window = config.to_dict().get("sliding_window")
    for limit, name in ((config.max_position_embeddings, "context"), (window, "sliding window")):
        if limit is not None and num_tokens > limit:
            raise ValueError(
                f"the longest prompt and title have {num_tokens} tokens: expected at most {limit}, the {name} of the "
                "language model; lower max_history or show fewer candidates"
            )


__all__ = ["candidate_log_likelihoods"]
