"""The answers of a trained iLoRA: rankings of the catalogue or of candidates, generated titles, embeddings, LoRAs."""

import functools
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ilora.files import check_replaceable
from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.histories import Histories, check_batch_size, padded_histories
from hf_ilora.models.next_item.item_filters import ItemFilter, item_masks
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.next_item_model import evaluation_mode, newest_items
from hf_ilora.models.next_item.next_item_output import popular_scores, scores_or_popular
from hf_ilora.models.next_item.top_k import masked_top_k

from .candidate_order import preferred_order
from .candidate_scoring import candidate_log_likelihoods, check_context, token_positions
from .configuration_ilora import ILoraConfig
from .item_head import ItemHead
from .prompts import PromptBuilder, Prompts
from .title_generation import GeneratedRecommendation, generate_freely, generate_titles
from .title_tokens import TitleTokens, check_titles, continuation_ids
from .title_trie import TitleTrie
from .user_lora import LORA_FILES, gated_stack, lora_config, stacked_lora, write_lora


class ILoraAnswers:
    """Mixin of `ILoraForRecommendation` with its answers. They leave the mode and weights of the model unchanged.

    Every method takes `histories`, a row of item ids per user, oldest first: lists, arrays or tensors, of different
    lengths or padded with 0 on either side. A prompt shows the newest `config.max_history` items; gates and the item
    head read as many as the recommender can.
    """

    # What the model has, and its answers read.
    config: ILoraConfig
    device: torch.device
    llm: PreTrainedModel
    llm_size: int
    recommender: SASRecForNextItem
    catalogue: Catalogue
    tokenizer: PreTrainedTokenizerBase
    title_tokens: TitleTokens
    prompts: PromptBuilder
    router: nn.Module
    item_head: ItemHead | None
    embed_prompts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    expert_gates: Callable[[Histories], torch.Tensor]
    _user_embeddings: Callable[[torch.Tensor], torch.Tensor]
    _last_hidden_states: Callable[..., torch.Tensor]
    _item_logits: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    _pool_with_recommender: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

    def item_scores(self, histories: Histories) -> torch.Tensor:
        """Score the whole catalogue by the item head, in one forward per batch.

        Args:
            histories: (batch, length) item ids, in any form that the class describes.

        Returns:
            (batch, num_items + 1) logits, float32, -inf for padding.

        Raises:
            ValueError: without an item head, for an empty history, and for ids outside the catalogue.
        """
        return self._item_scores(self._padded(histories))

    def recommend(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend the `top_k` best items of the catalogue by the item head.

        Args:
            histories: (batch, length) item ids, in any form that the class describes.
            top_k: number of items per history.
            exclude_seen: leave out the items of the history.
            allowed_items: the only items to choose from: ids (items,) for all users, or a row of ids per user; None
                allows all.
            excluded_items: items to leave out, in the same forms.

        Returns:
            item_ids (batch, top_k) int64, best first, and their log-probabilities (batch, top_k) float32, which are
            normalised over the whole catalogue, excluded items included. A row without items gets the most popular
            ones if the catalogue has counts.

        Raises:
            ValueError: as `item_scores`, and if fewer than `top_k` items are left.
        """
        histories = padded_histories(histories, self._num_items, self.device, self.knows_popular_items)
        seen = histories if exclude_seen else None
        sizes = (len(histories), self._num_items, self.device)
        masks = item_masks(*sizes, seen, allowed_items, excluded_items)
        scores = scores_or_popular(self._item_scores, self.popular_scores, histories)
        log_probabilities = scores.log_softmax(-1)  # (batch, num_items + 1)
        return masked_top_k(log_probabilities, top_k, masks)

    @property
    def knows_popular_items(self) -> bool:
        """Whether the catalogue has the counts that `popular_scores` needs."""
        return self.catalogue.counts is not None

    def popular_scores(self) -> torch.Tensor:
        """(num_items + 1,) scores for users without a history."""
        assert self.catalogue.counts is not None  # see `knows_popular_items`
        return popular_scores(self.catalogue.counts, self.device)

    def rank_items(
        self,
        histories: Histories,
        top_k: int = 10,
        exclude_seen: bool = True,
        allowed_items: ItemFilter = None,
        excluded_items: ItemFilter = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Recommend as `recommend` does, but return distances, the negative log-probabilities."""
        item_ids, log_probabilities = self.recommend(histories, top_k, exclude_seen, allowed_items, excluded_items)
        return item_ids, -log_probabilities

    @torch.no_grad()
    def score_candidates(self, histories: Histories, candidates: ArrayLike) -> torch.Tensor:
        """Score each candidate by the log-likelihood of its title after the prompt.

        The prompt is read once for all candidates. With `config.recommender_weight` w > 0 the score is a logarithmic
        opinion pool: w log p(item | recommender) + (1 - w) log p(title | prompt).

        Args:
            histories: (batch, length) item ids, in any form that the class describes.
            candidates: (batch, candidates) item ids, 0 for padding. The prompt lists them if a template has
                {candidates}.

        Returns:
            (batch, candidates) scores in nats, float32, -inf for padding.

        Raises:
            ValueError: for an empty history or no candidates, ids outside the catalogue, prompts longer than the
                context, and attention implementations that ignore a custom mask.
        """
        with evaluation_mode(self):
            asked = self._padded(histories)
            item_ids = self._checked_candidates(candidates, len(asked))
            inputs = self._prompt_inputs(asked, self._user_embeddings(asked), item_ids)
            log_likelihoods = candidate_log_likelihoods(self.llm, self.title_tokens, item_ids, **inputs)
            return self._pool_with_recommender(log_likelihoods, asked, item_ids.to(self.device))

    @torch.no_grad()
    def generate_recommendation(
        self,
        histories: Histories,
        candidates: ArrayLike | None = None,
        top_k: int = 1,
        constrained: bool = True,
        max_new_tokens: int = 64,
        num_beams: int | None = None,
        first_line_only: bool = False,
    ) -> GeneratedRecommendation:
        """Let the language model write the title of the next item. `config.recommender_weight` is ignored.

        Args:
            histories: (batch, length) item ids, in any form that the class describes.
            candidates: (batch, candidates) ids of the items to choose from, 0 for padding; None means the catalogue.
            top_k: number of answers per history.
            constrained: generate titles only, so that every answer is an item. Otherwise the model writes freely, and
                an answer is valid if it contains exactly one candidate's title, as in LLaRA's and iLoRA's evaluation.
            max_new_tokens: maximum length of a free answer.
            num_beams: at least `top_k`, and at least 2 if constrained. None means the larger of 4 and `top_k` if
                constrained, else `top_k`.
            first_line_only: look for titles only in the first line of a free answer, as LLaRA and iLoRA do.

        Returns:
            The answers, best first.

        Raises:
            ValueError: as `score_candidates`, for more answers than candidates, fewer beams than answers, and prompts
                that leave no room in the context for the answer.
        """
        if num_beams is None:
            num_beams = max(4, top_k) if constrained else top_k
        fewest_beams = max(2, top_k) if constrained else top_k
        if num_beams < fewest_beams:
            raise ValueError(f"num_beams is {num_beams}: expected at least {fewest_beams} for top_k {top_k}")
        with evaluation_mode(self):
            asked, item_ids = self._padded(histories), None
            most_answers = self._num_items
            if candidates is not None:
                item_ids = self._checked_candidates(candidates, len(asked))
                most_answers = item_ids.shape[1]
            if not 1 <= top_k <= most_answers:
                raise ValueError(f"top_k is {top_k}: expected 1 to {most_answers}, the number of items to choose from")
            inputs = self._prompt_inputs(asked, self._user_embeddings(asked), item_ids)
            longest_answer = int(self.title_tokens.lengths.max()) + 1 if constrained else max_new_tokens
            check_context(self.llm, inputs["inputs_embeds"].shape[1] + longest_answer)
            parts = (self, inputs, self.tokenizer, self.title_tokens)
            if not constrained:
                return generate_freely(*parts, item_ids, top_k, num_beams, max_new_tokens, first_line_only)
            if item_ids is None:
                tries = [self._catalogue_trie] * len(asked)
            else:
                tries = [TitleTrie(self.title_tokens, row) for row in item_ids.tolist()]
            return generate_titles(*parts, tries, top_k, num_beams)

    @torch.no_grad()
    def encode_items(self, batch_size: int = 64) -> torch.Tensor:
        """Embed each item: the mean of the language model's last hidden states over the tokens of its title.

        All experts have equal gates, since there is no user.

        Args:
            batch_size: number of titles per forward.

        Returns:
            (num_items + 1, llm hidden) float32 on the CPU, zero for padding.

        Raises:
            ValueError: for a `batch_size` below 1.
        """
        check_batch_size(batch_size)
        titles = np.split(self.title_tokens.token_ids, self.title_tokens.starts[2:-1])
        return F.pad(self._encode(titles, batch_size), (0, 0, 1, 0))

    @torch.no_grad()
    def encode_titles(self, titles: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Embed titles of any items as `encode_items` does.

        Args:
            titles: (titles,) strings.
            batch_size: number of titles per forward.

        Returns:
            (titles, llm hidden) float32 on the CPU.

        Raises:
            ValueError: for no titles, one that is blank, no string or without a token, and a `batch_size` below 1.
        """
        check_titles(titles)
        check_batch_size(batch_size)
        texts = [f" {title.strip()}" for title in titles]
        token_ids = continuation_ids(self.tokenizer, texts, split_special_tokens=True)
        for title, ids in zip(titles, token_ids, strict=True):
            if not ids:
                raise ValueError(f"the title {title!r} becomes no token: give the item another title")
        return self._encode([np.array(ids, dtype=np.int64) for ids in token_ids], batch_size)

    def _encode(self, titles: list[np.ndarray], batch_size: int) -> torch.Tensor:
        """Encode titles, which are arrays of tokens: (titles, llm hidden) float32 on the CPU."""
        table = torch.zeros(len(titles), self.llm_size)
        lengths = np.array([len(title) for title in titles])  # (titles,)
        # Titles of similar length share a batch, which saves padding.
        order = lengths.argsort(kind="stable")
        with evaluation_mode(self):
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size]
                is_token = np.arange(lengths[rows].max()) < lengths[rows, None]  # (rows, tokens)
                padded = np.full(is_token.shape, self.title_tokens.terminator_id)
                padded[is_token] = np.concatenate([titles[row] for row in rows])
                input_ids, mask = (
                    torch.from_numpy(part.astype(np.int64)).to(self.device) for part in (padded, is_token)
                )
                equal_gates = torch.full((len(rows), self.config.num_experts), 1 / self.config.num_experts)
                hidden_states = self._last_hidden_states(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=token_positions(mask),
                    expert_gates=equal_gates.to(self.device),
                ).float()  # (rows, tokens, llm hidden)
                weights = mask.unsqueeze(-1) / mask.sum(1).view(-1, 1, 1)  # (rows, tokens, 1)
                table[torch.from_numpy(rows)] = (hidden_states * weights).sum(1).cpu()
        return table

    @torch.no_grad()
    def materialize_lora(
        self,
        history: ArrayLike,
        output_dir: str | os.PathLike | None = None,
        base_model: str | os.PathLike | None = None,
    ) -> dict[str, torch.Tensor]:
        """Merge the experts into one ordinary LoRA, weighted by one user's gates.

        It fits the language model as this model uses it: with `config.num_llm_layers`, only its first layers. It does
        not contain the item embeddings of prompts: with `config.item_placeholders`, pass prompts as embeddings from
        `embed_prompts`.

        Args:
            history: item ids of one user, (length,) or (1, length): a list, array or tensor.
            output_dir: folder to write the LoRA to, for PEFT and engines that read its format; None writes nothing.
            base_model: name or folder to record as the base model in adapter_config.json, such as a folder that
                `save_language_model` wrote; None takes the language model that the configuration names.

        Returns:
            State dict in PEFT's format, for a LoraConfig with `r=config.rank`, `lora_alpha=config.lora_alpha` and
            `target_modules=config.target_modules`.

        Raises:
            ValueError: for several histories, an empty one, ids outside the catalogue, and an `output_dir` that
                contains other files.
        """
        if output_dir is not None:
            check_replaceable(output_dir, LORA_FILES)
        try:
            row = torch.as_tensor(history)
        except (TypeError, ValueError) as error:
            raise ValueError(f"history is not a row of item ids ({error}): expected one, such as [3, 1, 2]") from error
        if row.dim() == 1:
            row = row.unsqueeze(0)
        if row.dim() != 2 or len(row) != 1:
            raise ValueError(f"history has shape {tuple(row.shape)}: expected one, (length,) or (1, length)")
        state = gated_stack(stacked_lora(self.llm), self.config.num_experts, self.expert_gates(row)[0])
        if output_dir is not None:
            write_lora(output_dir, state, lora_config(self.config, base_model))
        return state

    @torch.no_grad()
    def stacked_lora(
        self, output_dir: str | os.PathLike | None = None, base_model: str | os.PathLike | None = None
    ) -> dict[str, torch.Tensor]:
        """Collect all experts as one LoRA, from which a user's gates make that user's LoRA.

        A user's LoRA is the stack with each expert's rows of A multiplied by the user's gate. `user_lora` makes it from
        the written folder, without this model. The stack itself is no user's LoRA, since all its gates are 1.

        Args:
            output_dir, base_model: as in `materialize_lora`.

        Returns:
            State dict, as in `materialize_lora`.

        Raises:
            ValueError: for an `output_dir` that contains other files.
        """
        if output_dir is not None:
            check_replaceable(output_dir, LORA_FILES)
        state = stacked_lora(self.llm)
        if output_dir is not None:
            write_lora(output_dir, state, lora_config(self.config, base_model), self.config.num_experts)
        return state

    def build_prompts(self, histories: Histories, candidates: ArrayLike | None = None) -> Prompts:
        """Build the prompts that the answers start from.

        Args:
            histories: (batch, length) item ids, in any form that the class describes.
            candidates: (batch, candidates) item ids, 0 for padding; ignored if no template has {candidates}.

        Returns:
            The prompts, on the model's device.

        Raises:
            ValueError: for an empty history or no candidates, ids outside the catalogue, and prompts longer than the
                context.
        """
        asked = self._padded(histories)
        item_ids = None if candidates is None else self._checked_candidates(candidates, len(asked))
        return self._prompts(asked, item_ids)

    # --- steps of the answers: the checks of histories and candidates come first, and only once ---

    def _padded(self, histories: Histories) -> torch.Tensor:
        """(batch, length) int64 on the model's device, checked."""
        return padded_histories(histories, self._num_items, self.device)

    @property
    def _num_items(self) -> int:
        return catalogue_size(self.config)

    def _checked_candidates(self, given: ArrayLike, batch_size: int) -> torch.Tensor:
        """(batch, candidates) int64 on the CPU."""
        try:
            candidates = torch.as_tensor(given).cpu()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"candidates are not a table of item ids ({error}): expected rows of equal length; pad them with 0"
            ) from error
        if candidates.dim() != 2 or len(candidates) != batch_size or candidates.is_floating_point():
            raise ValueError(
                f"candidates have shape {tuple(candidates.shape)} and type {candidates.dtype}: expected item ids of "
                f"shape ({batch_size}, candidates), a row per history"
            )
        empty = (~candidates.ne(0).any(1)).nonzero()
        if len(empty):
            raise ValueError(f"row {int(empty[0])} has no candidates: expected at least one; leave the row out")
        lowest, highest = map(int, candidates.aminmax())
        if lowest < 0 or highest > self._num_items:
            raise ValueError(
                f"candidates contain item {lowest if lowest < 0 else highest}: expected ids 1 to "
                f"{self._num_items} of the catalogue, and 0 for padding"
            )
        return candidates.long()

    @torch.no_grad()
    def _item_scores(self, histories: torch.Tensor) -> torch.Tensor:
        if self.item_head is None:
            raise ValueError(
                "this model has no item head, which ranks the catalogue: train one with item_head residual or plain, "
                "or ask generate_recommendation or score_candidates"
            )
        with evaluation_mode(self):
            user_embeddings = self._user_embeddings(histories)
            inputs = self._prompt_inputs(histories, user_embeddings)
            position_ids = token_positions(inputs["attention_mask"])
            hidden_states = self._last_hidden_states(**inputs, position_ids=position_ids)  # (batch, tokens, llm hidden)
            return self._item_logits(hidden_states[:, -1], user_embeddings, histories)

    def _prompts(self, histories: torch.Tensor, candidates: torch.Tensor | None) -> Prompts:
        if candidates is not None and not self.prompts.candidate_templates:
            candidates = None
        if candidates is not None and self.config.candidate_order == "recommender":
            candidates = preferred_order(self.recommender, histories, candidates.to(self.device))
        shown = newest_items(histories, self.config.max_history).cpu().numpy()
        return self.prompts.assemble(shown, None if candidates is None else candidates.cpu().numpy()).to(self.device)

    def _prompt_inputs(
        self, histories: torch.Tensor, user_embeddings: torch.Tensor, candidates: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Arguments of the language model: inputs_embeds (batch, tokens, llm hidden), attention_mask, expert_gates."""
        prompts = self._prompts(histories, candidates)
        return {
            "inputs_embeds": self.embed_prompts(prompts.input_ids, prompts.placeholder_items),
            "attention_mask": prompts.attention_mask,
            "expert_gates": self.router(user_embeddings),
        }

    @functools.cached_property
    def _catalogue_trie(self) -> TitleTrie:
        return TitleTrie(self.title_tokens)


__all__ = ["ILoraAnswers"]
