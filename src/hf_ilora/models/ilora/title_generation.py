"""Generates titles with a language model: constrained to the catalogue or to candidates, or free."""

from dataclasses import dataclass

import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase

from .named_titles import named_titles
from .title_tokens import TitleTokens
from .title_trie import TitleTrie

# Beam search initialises unused beams with -1e9, far below the log-likelihood of any title.
_LOWEST_SCORE = -1e8


@dataclass(frozen=True)
class GeneratedRecommendation:
    """Answers of a language model.

    Args:
        item_ids: (batch, top_k) int64 on the CPU, best first; 0 where the answer is not a valid item.
        scores: (batch, top_k) log-likelihoods of the answers, -inf where `item_ids` is 0; None for free answers.
        texts: the answers, `top_k` per row.
    """

    item_ids: torch.Tensor
    scores: torch.Tensor | None
    texts: list[list[str]]


def generate_titles(
    model: GenerationMixin,
    prompt: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    title_tokens: TitleTokens,
    tries: list[TitleTrie],
    top_k: int,
    num_beams: int,
) -> GeneratedRecommendation:
    """Generate the most likely titles by beam search among the allowed ones.

    Args:
        model: the model whose `generate` is called.
        prompt: arguments of `generate`: inputs_embeds (batch, tokens, llm hidden), attention_mask (batch, tokens) and
            others that the model needs.
        tokenizer, title_tokens: those of the model.
        tries: prefix trees of the allowed titles, one per row.
        top_k: number of answers per row.
        num_beams: at least `top_k`, and at least 2.

    Returns:
        The answers with their log-likelihoods, each title at most once per row.
    """

    def allowed(row: int, answer: torch.Tensor) -> list[int]:
        return tries[row].allowed(answer.tolist())

    output = model.generate(
        **prompt,
        **_settings(title_tokens, top_k, num_beams),
        max_new_tokens=int(title_tokens.lengths.max()) + 1,
        length_penalty=0.0,  # scores are log-likelihoods of titles, not means per token
        prefix_allowed_tokens_fn=allowed,
        output_scores=True,
    )
    answers = output.sequences.view(len(tries), top_k, -1).tolist()
    item_ids = torch.tensor(
        [[trie.item_of(answer) or 0 for answer in row] for trie, row in zip(tries, answers, strict=True)]
    )
    scores = output.sequences_scores.view(len(tries), top_k).float().cpu()
    # With fewer titles than beams, some beams contain no title or repeat one.
    missing = scores < _LOWEST_SCORE
    item_ids = item_ids.masked_fill(missing, 0)
    return GeneratedRecommendation(
        item_ids, scores.masked_fill(item_ids == 0, float("-inf")), _texts(tokenizer, answers)
    )


def generate_freely(
    model: GenerationMixin,
    prompt: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    title_tokens: TitleTokens,
    candidates: torch.Tensor | None,
    top_k: int,
    num_beams: int,
    max_new_tokens: int,
    first_line_only: bool = False,
) -> GeneratedRecommendation:
    """Generate text without constraints. An answer is valid if it contains the title of exactly one candidate.

    Args:
        model, prompt, tokenizer, title_tokens, top_k, num_beams: as in `generate_titles`.
        candidates: (batch, candidates) item ids, 0 for padding; None means the whole catalogue.
        max_new_tokens: maximum number of tokens of an answer.
        first_line_only: as in `named_titles`.

    Returns:
        The answers, without scores.
    """
    output = model.generate(**prompt, **_settings(title_tokens, top_k, num_beams), max_new_tokens=max_new_tokens)
    answers = output.sequences.view(len(prompt["inputs_embeds"]), top_k, -1).tolist()
    texts = _texts(tokenizer, answers)
    item_ids = torch.zeros(len(texts), top_k, dtype=torch.int64)
    for row, row_texts in enumerate(texts):
        items = range(1, len(title_tokens) + 1) if candidates is None else candidates[row].tolist()
        items = [item for item in items if item]
        titles = [title_tokens.titles[item - 1] for item in items]
        for place, text in enumerate(row_texts):
            named = named_titles(text, titles, first_line_only)
            item_ids[row, place] = items[named[0]] if len(named) == 1 else 0
    return GeneratedRecommendation(item_ids, None, texts)


def _settings(title_tokens: TitleTokens, top_k: int, num_beams: int) -> dict:
    return {
        "do_sample": False,
        "num_beams": num_beams,
        "num_return_sequences": top_k,
        "eos_token_id": title_tokens.terminator_id,
        "pad_token_id": title_tokens.terminator_id,
        "return_dict_in_generate": True,
    }


def _texts(tokenizer: PreTrainedTokenizerBase, answers: list[list[list[int]]]) -> list[list[str]]:
    return [[text.strip() for text in tokenizer.batch_decode(row, skip_special_tokens=True)] for row in answers]


__all__ = ["GeneratedRecommendation", "generate_freely", "generate_titles"]
