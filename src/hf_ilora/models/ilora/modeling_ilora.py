"""iLoRA as a `PreTrainedModel`: a frozen language model whose LoRA experts are gated per user by a frozen SASRec."""

import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from hf_ilora.models.next_item.catalogue import Catalogue
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL
from hf_ilora.models.next_item.histories import Histories
from hf_ilora.models.next_item.hub_upload import HubUploads
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.next_item_model import check_has_weights, evaluation_mode

from . import losses
from .answers import ILoraAnswers
from .candidate_scoring import packed_log_likelihoods, token_positions
from .checkpoint import ILoraCheckpoint
from .configuration_ilora import ILoraConfig
from .gated_lora import add_gated_lora
from .item_head import ItemHead
from .language_models import truncate_layers
from .prompt_embedding import PromptEmbedding, check_placeholders
from .prompts import PromptBuilder
from .routers import build_router
from .title_tokens import TitleTokens


@dataclass
class ILoraOutput(ModelOutput):
    """Output of `ILoraForRecommendation`.

    Args:
        loss: scalar, the weighted sum of the losses below.
        language_loss: scalar, -log p(title | prompt) in nats, averaged over the examples.
        candidate_loss: scalar, -log p(target among the candidates) in nats, averaged over the examples.
        item_loss: scalar, -log p(item | prompt) by the item head in nats, averaged over all examples; those whose
            prompt shows candidates count as 0.
        logits: (batch, tokens, vocabulary) of the language model, or of the last tokens with `logits_to_keep`.
        item_logits: (batch, num_items + 1) of the item head, in evaluation mode.
        expert_gates: (batch, experts).
        past_key_values: cache of the language model, with `use_cache`.
    """

    loss: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    candidate_loss: torch.Tensor | None = None
    item_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    item_logits: torch.Tensor | None = None
    expert_gates: torch.Tensor | None = None
    past_key_values: object | None = None


class ILoraForRecommendation(ILoraAnswers, ILoraCheckpoint, HubUploads, PreTrainedModel, GenerationMixin):
    """A language model that recommends, with LoRA experts gated by the user embedding of a frozen SASRec.

    Create it with `from_base` (a fresh adapter) or `from_pretrained` (a saved one). Only the adapter, the router, the
    projector and the item head are trained. They are saved with the frozen SASRec and the name of the language model.

    Attributes:
        llm: the causal language model, frozen, with gated layers.
        recommender: the frozen SASRec, always in evaluation mode.
        catalogue: titles and raw ids of the items.
        tokenizer: tokenizer of the language model.
        title_tokens: the tokenised titles of the catalogue.
        prompts: builds prompts from histories.
        item_embedding_probability: probability, in training, that an example carries item embeddings instead of plain
            placeholders (the reference's curriculum); see `CurriculumCallback`.
    """

    config: ILoraConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: ILoraConfig,
        llm: PreTrainedModel | None = None,
        recommender: SASRecForNextItem | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        catalogue: Catalogue | None = None,
    ):
        if llm is None or recommender is None or tokenizer is None or catalogue is None:
            raise ValueError(
                "ILoraForRecommendation was given only a configuration: expected its parts as well; use "
                "from_base(llm, recommender, tokenizer, catalogue, config) or from_pretrained"
            )
        check_recommender(recommender, catalogue)
        # Copies, since a composite configuration resets the attention of a live model whose configuration it contains.
        config = copy.deepcopy(config)
        config.make_llm_path_absolute()
        config.recommender_config = copy.deepcopy(recommender.config)
        if config.num_llm_layers is not None:
            truncate_layers(llm, config.num_llm_layers)
        # The adapter goes to the device of the language model's weights; on the meta device it would lose its values.
        for part in (llm, recommender):
            check_has_weights(part)
        config.text_config = copy.deepcopy(llm.config)
        attention = llm.config._attn_implementation
        super().__init__(config)
        llm.set_attn_implementation(attention)
        self.llm, self.recommender, self.catalogue = llm, recommender, catalogue
        self.llm_size, self.gate_size = llm.config.get_text_config().hidden_size, recommender.config.hidden_size
        self.tokenizer = tokenizer
        titles = catalogue.titles(range(1, len(catalogue) + 1))
        self.title_tokens = TitleTokens(tokenizer, titles, config.duplicate_titles)
        self.prompts = PromptBuilder(
            tokenizer,
            self.title_tokens,
            config.prompt_templates,
            separator=config.title_separator,
            max_history=config.max_history,
            max_tokens=llm.config.get_text_config().max_position_embeddings,
            placeholders=config.item_placeholders,
        )
        self.item_embedding_probability = 1.0
        add_gated_lora(
            llm, config.target_modules, config.rank, config.num_experts, config.lora_alpha, config.lora_dropout
        )
        recommender.requires_grad_(False)
        self.router = build_router(
            config.router_type, self.gate_size, config.num_experts, config.router_top_k, config.router_noise
        )
        if config.item_placeholders:
            initializer_range = llm.config.get_text_config().initializer_range
            self.prompt_embedding = PromptEmbedding(self.gate_size, self.llm_size, initializer_range)
        self.item_head: ItemHead | None = None
        if config.item_head != "none":
            self.item_head = ItemHead(self.llm_size, self.gate_size, residual=config.item_head == "residual")
        # Not the language model's: chat settings such as a repetition penalty would distort likelihoods.
        self.generation_config = GenerationConfig()
        self.post_init()
        if vars(llm).get("hf_device_map") is not None:
            self.hf_device_map = llm.hf_device_map  # tells the Trainer not to move the model
        device = llm.get_input_embeddings().weight.device
        for part in (self.recommender, self.router, *self._small_parts()):
            part.to(device)
        # The Trainer would warn that its checkpoints lack the language model.
        self._keys_to_ignore_on_save = sorted(set(self.state_dict()) - set(self.adapter_names()))
        self.train(llm.training)

    def _small_parts(self) -> list[nn.Module]:
        parts = [self.prompt_embedding] if self.config.item_placeholders else []
        return parts + ([] if self.item_head is None else [self.item_head])

    @classmethod
    def from_base(
        cls,
        llm: PreTrainedModel,
        recommender: SASRecForNextItem,
        tokenizer: PreTrainedTokenizerBase,
        catalogue: Catalogue,
        config: ILoraConfig | None = None,
        *,
        untrained_recommender: bool = False,
    ) -> "ILoraForRecommendation":
        """Create a model with a fresh adapter, which does not change the language model's output until it is trained.

        Args:
            llm: any causal language model of transformers whose decoder layers have a `self_attn`. Its dtype, devices
                and quantisation stay as loaded. Gated layers are added in place.
            recommender: a SASRec that was trained and loaded with `from_pretrained`. It is frozen in place.
            tokenizer: tokenizer of the language model.
            catalogue: titles of the items that the recommender knows.
            config: rank, experts, prompts...; None takes the defaults. The parts' configurations are read from the
                parts; so is the language model's name unless `config` gives one.
            untrained_recommender: accept a recommender that was not loaded, whose gates are noise.

        Raises:
            TypeError: if `recommender` is not a SASRec, or `catalogue` is not a `Catalogue`.
            ValueError: for a recommender that was not loaded or has another catalogue, a language model that a
                `device_map` left partly on disk, titles that cannot be tokenised or have equal tokens, and target
                modules that match no layer.
        """
        if not untrained_recommender and not recommender.name_or_path:
            raise ValueError(
                "the recommender was created and not loaded: expected a trained one, SASRecForNextItem.from_pretrained("
                "folder or Hub name), since random user embeddings give random gates; pass untrained_recommender=True "
                "if that is intended"
            )
        config = ILoraConfig() if config is None else copy.deepcopy(config)
        if config.llm_name_or_path is None:  # take what transformers records of a loaded model
            config.llm_name_or_path = llm.name_or_path or None
            config.llm_revision = vars(llm.config).get("_commit_hash")  # only set for models from the Hub
        return cls(config, llm, recommender, tokenizer, catalogue)

    def train(self, mode: bool = True) -> "ILoraForRecommendation":
        """Set the mode as in torch; the frozen recommender always stays in evaluation mode."""
        super().train(mode)
        self.recommender.eval()
        return self

    def init_weights(self) -> None:
        """Do nothing: every part is initialised when it is created."""

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """Enable gradient checkpointing in the language model.

        Raises:
            ValueError: for `use_reentrant=True`, which silently loses the gradients of the gates.
        """
        checkpointing = activation_checkpointing_kwargs or {"use_reentrant": False}
        if checkpointing.get("use_reentrant", True):
            raise ValueError(
                'gradient checkpointing with use_reentrant=True loses the gradients of the gates: pass {"use_reentrant"'
                ": false}"
            )
        self.llm.activation_checkpointing_enable(checkpointing, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    # --- gates and prompts ---

    def user_embeddings(self, histories: Histories) -> torch.Tensor:
        """Embed users with the recommender, without gradients.

        Args:
            histories: (batch, length) item ids: lists, arrays or tensors, padded with 0 on either side or of different
                lengths.

        Returns:
            (batch, recommender hidden).

        Raises:
            ValueError: for an empty history and for ids outside the catalogue.
        """
        return self._user_embeddings(self._padded(histories))

    def expert_gates(self, histories: Histories) -> torch.Tensor:
        """The gates of each user, (batch, experts), rows that sum to 1; `histories` as in `user_embeddings`.

        The router runs in evaluation mode, so it draws no noise and its running statistics do not change.
        """
        user_embeddings = self.user_embeddings(histories)
        with evaluation_mode(self):
            return self.router(user_embeddings)

    def embed_prompts(self, input_ids: torch.Tensor, placeholder_items: torch.Tensor) -> torch.Tensor:
        """Embed tokens, with the items' projected embeddings in place of the placeholders.

        Args:
            input_ids: (batch, tokens); placeholders are negative.
            placeholder_items: (batch, placeholders): the item of each placeholder, in the order of the row, padded with
                0 on the right.

        Returns:
            (batch, tokens, llm hidden).

        Raises:
            ValueError: if a row has more or fewer placeholders than items; on a GPU a device assertion fails instead.
        """
        check_placeholders(input_ids, placeholder_items)
        embeddings = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (batch, tokens, llm hidden)
        if not placeholder_items.shape[1]:
            return embeddings
        if self.training and self.item_embedding_probability < 1:
            carries_items = (
                torch.rand(len(input_ids), 1, device=input_ids.device) < self.item_embedding_probability
            )  # (batch, 1)
            placeholder_items = placeholder_items * carries_items
        item_embeddings = self.recommender.model.item_embedding(placeholder_items)
        return self.prompt_embedding(embeddings, input_ids, placeholder_items, item_embeddings)

    # --- forward ---

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        placeholder_items: torch.Tensor | None = None,
        histories: torch.Tensor | None = None,
        title_labels: torch.Tensor | None = None,
        candidates: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shows_candidates: torch.Tensor | None = None,
        expert_gates: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        candidates_on_cpu: np.ndarray | None = None,
        **kwargs: Any,
    ) -> ILoraOutput:
        """Compute the loss of a batch of prompts or, without `labels`, the logits of the language model.

        With `config.candidate_loss_weight` the prompts end before the title and `candidates` are required, otherwise
        they end with the target's title and `title_labels` are required.

        Args:
            input_ids: (batch, tokens), left-padded; placeholders are negative.
            attention_mask: (batch, tokens).
            placeholder_items: (batch, placeholders), see `embed_prompts`.
            histories: (batch, length) item ids, 0 for padding, which the router, item head and recommender read.
            title_labels: (batch, title tokens): labels of the last tokens of `input_ids`, which are the target's title
                and its terminator; -100 elsewhere.
            candidates: (batch, candidates) item ids with the target among them, 0 for padding.
            labels: (batch,) target items.
            shows_candidates: (batch,) bool: prompts that show candidates. They do not train the item head, which would
                learn to find the target in the prompt.
            expert_gates: (batch, experts), used instead of gates computed from `histories`.
            inputs_embeds, position_ids, past_key_values, use_cache, logits_to_keep: as in causal language models.
            num_items_in_batch: number of examples to average over; None means those of this call.
            candidates_on_cpu: the values of `candidates`, which the Trainer's batches also have on the CPU; see
                `packed_log_likelihoods`.
            kwargs: passed on to the language model.

        Returns:
            The losses if `labels` are given, else `logits`.

        Raises:
            ValueError: if an argument that this call needs is missing, or candidates lack their target.
        """
        user_embeddings = None
        if histories is not None:
            self.recommender.check_item_ids(histories)
            user_embeddings = self._user_embeddings(histories)
        if expert_gates is None:
            if user_embeddings is None:
                raise ValueError("neither histories nor expert_gates were given: expected one of them")
            expert_gates = self.router(user_embeddings)
        if placeholder_items is not None:
            if input_ids is None:
                raise ValueError(
                    "placeholder_items were given without input_ids: expected the prompts that they are in"
                )
            inputs_embeds, input_ids = self.embed_prompts(input_ids, placeholder_items), None
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = token_positions(attention_mask)
        llm_inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "expert_gates": expert_gates,
            **kwargs,
        }
        if labels is None:
            return self._logits(llm_inputs, use_cache, logits_to_keep)
        self._check_loss_inputs(histories, title_labels, candidates)
        num_examples = max(1, len(labels)) if num_items_in_batch is None else num_items_in_batch
        return self._losses(
            llm_inputs,
            histories,
            user_embeddings,
            title_labels,
            candidates,
            labels,
            shows_candidates,
            num_examples,
            candidates_on_cpu,
        )

    def _logits(self, llm_inputs: dict, use_cache: bool | None, logits_to_keep: int | torch.Tensor) -> ILoraOutput:
        """The output of a call without labels, for generation."""
        expert_gates = llm_inputs["expert_gates"]
        if isinstance(logits_to_keep, int) and logits_to_keep:
            # An index copies the hidden states. A slice would be a view, for which the output layer copies its weights
            # once per row.
            num_tokens = _num_tokens(llm_inputs)
            logits_to_keep = torch.arange(num_tokens - logits_to_keep, num_tokens, device=expert_gates.device)
        output = self.llm(use_cache=use_cache, logits_to_keep=logits_to_keep, **llm_inputs)
        return ILoraOutput(logits=output.logits, past_key_values=output.past_key_values, expert_gates=expert_gates)

    def _losses(
        self,
        llm_inputs: dict,
        histories: torch.Tensor | None,
        user_embeddings: torch.Tensor | None,
        title_labels: torch.Tensor | None,
        candidates: torch.Tensor | None,
        labels: torch.Tensor,
        shows_candidates: torch.Tensor | None,
        num_examples: torch.Tensor | int,
        candidates_on_cpu: np.ndarray | None,
    ) -> ILoraOutput:
        """The output of a call with labels; the arguments are those of `forward`, `llm_inputs` as it prepares them.

        `_check_loss_inputs` has made sure of those that are needed.
        """
        config = self.config
        language_loss = candidate_loss = item_loss = item_logits = None
        if config.candidate_loss_weight:
            assert candidates is not None
            targets = losses.target_columns(candidates, labels)  # (batch,)
            log_likelihoods, last_states = self._read_candidates(llm_inputs, candidates, candidates_on_cpu)
            scores = self._pool_with_recommender(log_likelihoods, histories, candidates)  # (batch, candidates)
            candidate_loss = losses.candidate_loss(scores, targets, num_examples)
            language_loss = losses.target_title_loss(log_likelihoods, targets, num_examples)
        else:
            assert title_labels is not None
            title_labels = title_labels[:, 1 - _num_tokens(llm_inputs) :]  # no token predicts the prompt's first token
            logits, last_states = self._read_titles(llm_inputs, title_labels)
            if logits is not None:
                language_loss = losses.title_loss(logits, title_labels, num_examples)
        if config.item_loss_weight:
            assert last_states is not None and user_embeddings is not None and histories is not None
            item_logits = self._item_logits(last_states, user_embeddings, histories)
            item_loss = losses.item_loss(item_logits, labels, shows_candidates, num_examples)
        weighted_losses = (
            (config.candidate_loss_weight, candidate_loss),
            (config.language_loss_weight, language_loss),
            (config.item_loss_weight, item_loss),
        )
        return ILoraOutput(
            loss=reduce(torch.add, [weight * loss for weight, loss in weighted_losses if loss is not None]),
            language_loss=language_loss,
            candidate_loss=candidate_loss,
            item_loss=item_loss,
            item_logits=None if self.training else item_logits,
            expert_gates=llm_inputs["expert_gates"],
        )

    def _check_loss_inputs(
        self, histories: torch.Tensor | None, title_labels: torch.Tensor | None, candidates: torch.Tensor | None
    ) -> None:
        scores_candidates = self.config.candidate_loss_weight > 0
        if (candidates if scores_candidates else title_labels) is None:
            missing = "candidates" if scores_candidates else "title_labels"
            raise ValueError(f"labels were given without {missing}: expected both, as in PromptCollator's batches")
        reads_recommender = self.config.item_loss_weight or (scores_candidates and self.config.recommender_weight)
        if histories is None and reads_recommender:
            raise ValueError("this loss reads the recommender: expected histories; pass them besides expert_gates")

    def _read_candidates(
        self, llm_inputs: dict, candidates: torch.Tensor, candidates_on_cpu: np.ndarray | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the language model over prompts, each followed by the titles of all its candidates.

        Returns:
            log p(title | prompt) (batch, candidates), and the hidden states (batch, llm hidden) of the prompts' last
            tokens, None without an item loss.
        """
        return packed_log_likelihoods(
            self.llm,
            self.title_tokens,
            candidates,
            llm_inputs["inputs_embeds"],
            llm_inputs["attention_mask"],
            llm_inputs["expert_gates"],
            with_states=self.config.item_loss_weight > 0,
            candidates_on_cpu=candidates_on_cpu,
        )

    def _read_titles(
        self, llm_inputs: dict, title_labels: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Run the language model over prompts, each followed by the target's title.

        Returns:
            Logits (batch, title tokens, vocabulary) that predict `title_labels`, None without a language loss, and the
            hidden states (batch, llm hidden) of the prompts' last tokens, None without an item loss.
        """
        num_tokens, trains_items = _num_tokens(llm_inputs), self.config.item_loss_weight > 0
        if self.config.language_loss_weight:
            # The token before a label predicts it.
            kept = torch.arange(num_tokens - 1 - title_labels.shape[1], num_tokens - 1, device=title_labels.device)
            output = self.llm(use_cache=False, logits_to_keep=kept, output_hidden_states=trains_items, **llm_inputs)
            logits = output.logits
            if not trains_items:
                return logits, None
            hidden_states = output.hidden_states[-1]
        else:
            logits, hidden_states = None, self._last_hidden_states(**llm_inputs)
        title_lengths = title_labels.ne(IGNORED_LABEL).sum(1)  # (batch,)
        last = num_tokens - 1 - title_lengths  # (batch,)
        return logits, hidden_states[torch.arange(len(last), device=last.device), last]

    def _last_hidden_states(self, **llm_inputs: Any) -> torch.Tensor:
        """(batch, tokens, llm hidden) of the decoder alone, without logits, on the model's device."""
        return self.llm.get_decoder()(use_cache=False, **llm_inputs).last_hidden_state.to(self.device)

    def _user_embeddings(self, histories: torch.Tensor) -> torch.Tensor:
        """(batch, recommender hidden) of checked histories (batch, length)."""
        with torch.no_grad():
            return self.recommender.user_embeddings(self.recommender.newest_items(histories))

    def _item_logits(
        self, last_states: torch.Tensor, user_embeddings: torch.Tensor, histories: torch.Tensor
    ) -> torch.Tensor:
        """(batch, num_items + 1) float32 of the item head, from the prompts' last hidden states (batch, llm hidden)."""
        assert self.item_head is not None  # the configuration refuses the loss without it
        queries, scale = self.item_head(last_states.to(user_embeddings.device), user_embeddings)
        scores = self.recommender.score_users(queries, self.recommender.newest_items(histories)).float()
        # Padding is cut off before scaling: its -inf would make the gradient of the scale NaN.
        return F.pad(scores[:, 1:] * scale, (1, 0), value=float("-inf"))

    def _pool_with_recommender(
        self, title_log_likelihoods: torch.Tensor, histories: torch.Tensor | None, candidates: torch.Tensor
    ) -> torch.Tensor:
        """(batch, candidates) scores: the log-likelihoods, pooled with the recommender if it has a weight."""
        if not self.config.recommender_weight:
            return title_log_likelihoods
        assert histories is not None  # who asks has checked
        with torch.no_grad():
            recommender_scores = self.recommender.next_item_scores(self.recommender.newest_items(histories))
        return losses.opinion_pool(
            title_log_likelihoods, recommender_scores, candidates, self.config.recommender_weight
        )


def _num_tokens(llm_inputs: dict) -> int:
    """Length of the prompts, padding included."""
    inputs_embeds = llm_inputs["inputs_embeds"]
    return (llm_inputs["input_ids"] if inputs_embeds is None else inputs_embeds).shape[1]


def check_recommender(recommender: SASRecForNextItem, catalogue: Catalogue) -> None:
    """Check that a recommender is a SASRec that was trained on a catalogue.

    Raises:
        TypeError: if `recommender` is not a SASRec, or `catalogue` not a `Catalogue`.
        ValueError: if the recommender has another number of items, or a catalogue of its own with other raw ids.
    """
    if not isinstance(recommender, SASRecForNextItem):
        raise TypeError(
            f"recommender is a {type(recommender).__name__}: expected a SASRecForNextItem, whose user and item "
            "embeddings iLoRA reads; train one with `hf-ilora train-sasrec`"
        )
    if not isinstance(catalogue, Catalogue):
        raise TypeError(
            f"catalogue is a {type(catalogue).__name__}: expected a Catalogue, such as sequences.catalogue of "
            "build_sequences, model.catalogue of a saved model, or Catalogue.from_parquet(file)"
        )
    if recommender.config.num_items != len(catalogue):
        raise ValueError(
            f"the recommender knows {recommender.config.num_items} items and the catalogue has {len(catalogue)}: "
            "expected the recommender that was trained on this catalogue"
        )
    if recommender.catalogue is not None and recommender.catalogue.table["raw_id"] != catalogue.table["raw_id"]:
        raise ValueError(
            "the recommender's catalogue has other raw ids than the given one: expected the recommender that was "
            "trained on this catalogue"
        )


__all__ = ["ILoraForRecommendation", "ILoraOutput", "check_recommender"]
