"""iLoRA as a `PreTrainedModel`: a frozen language model whose expert LoRA is gated for each user by a frozen SASRec."""

import copy
import functools
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, ModelOutput, cached_file

from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE, Catalogue
from hf_ilora.models.next_item.configuration_next_item import IGNORED_LABEL
from hf_ilora.models.next_item.histories import padded_histories
from hf_ilora.models.next_item.hub_upload import HubUploads, UploadOfSaved
from hf_ilora.models.next_item.modeling_sasrec import SASRecForNextItem
from hf_ilora.models.next_item.next_item_model import evaluation_mode, newest_items
from hf_ilora.models.next_item.next_item_output import top_k_items

from .candidate_order import preferred_order
from .candidate_scoring import candidate_log_likelihoods, check_context, packed_log_likelihoods, positions
from .configuration_ilora import ILoraConfig, check_public_llm
from .gated_lora import add_gated_lora, plain_lora
from .item_head import ItemHead
from .language_models import load_language_model, load_tokenizer, truncate_layers
from .prompt_embedding import PromptEmbedding, check_placeholders
from .prompts import PromptBuilder, Prompts
from .routers import build_router
from .title_generation import GeneratedRecommendation, generate_freely, generate_titles
from .title_tokens import TitleTokens
from .title_trie import TitleTrie

# How the Hub is asked for the language model, as for the adapter.
LLM_HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only")


@dataclass
class ILoraOutput(ModelOutput):
    """Output of `ILoraForRecommendation`.

    Args:
        loss: scalar, the weighted sum of those below.
        language_loss: scalar, -log p(title | prompt) in nats, averaged over the examples.
        candidate_loss: scalar, -log p(target among the candidates) by the likelihoods of their titles, averaged.
        item_loss: scalar, -log p(item | prompt) by the item head, averaged over all examples; those that show
            candidates count as 0.
        logits: (batch, tokens or the last of them, vocabulary) of the language model.
        item_logits: (batch, num_items + 1) of the item head, in evaluation.
        expert_gates: (batch, experts).
        past_key_values: of the language model, with `use_cache`.
    """

    loss: torch.FloatTensor | None = None
    language_loss: torch.FloatTensor | None = None
    candidate_loss: torch.FloatTensor | None = None
    item_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    item_logits: torch.FloatTensor | None = None
    expert_gates: torch.FloatTensor | None = None
    past_key_values: object | None = None


class ILoraForRecommendation(HubUploads, PreTrainedModel, GenerationMixin):
    """A language model that recommends, with LoRA experts gated by the user embedding of a frozen SASRec.

    Build it with `from_base` (a fresh adapter) or `from_pretrained` (a saved one). Only the adapter, the router, the
    projector and the item head are trained and saved, with the frozen SASRec; the language model is saved by name.

    Attributes:
        llm: the causal language model, frozen, with gated layers.
        recommender: the frozen SASRec, always in evaluation mode.
        catalogue: titles and raw ids of the items.
        tokenizer, title_tokens, prompts: what makes prompts of histories.
        item_embedding_probability: probability, in training, that an example carries item embeddings and not plain
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
        items: Catalogue | None = None,
    ):
        if llm is None or recommender is None or tokenizer is None or items is None:
            raise ValueError(
                "ILoraForRecommendation was given a configuration alone: expected its parts; use from_base(llm, "
                "recommender, tokenizer, items, config) or from_pretrained"
            )
        check_recommender(recommender, items)
        # Copies: a composite configuration resets the attention of a live model whose own configuration it holds.
        config = copy.deepcopy(config)
        config.recommender_config = copy.deepcopy(recommender.config)
        if config.num_llm_layers is not None:
            truncate_layers(llm, config.num_llm_layers)
        config.text_config = copy.deepcopy(llm.config)
        attention = llm.config._attn_implementation
        super().__init__(config)
        llm.set_attn_implementation(attention)
        self.llm, self.recommender, self.catalogue = llm, recommender, items
        self.llm_size, self.gate_size = llm.config.get_text_config().hidden_size, recommender.config.hidden_size
        self.tokenizer = tokenizer
        self.title_tokens = TitleTokens(tokenizer, items.titles(range(1, len(items) + 1)), config.duplicate_titles)
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
        self.item_head = None
        if config.item_head != "none":
            self.item_head = ItemHead(self.llm_size, self.gate_size, residual=config.item_head == "residual")
        # Not the language model's: what a chat wants, such as a penalty on repetitions, would bend likelihoods.
        self.generation_config = GenerationConfig()
        self.post_init()
        if vars(llm).get("hf_device_map") is not None:
            self.hf_device_map = llm.hf_device_map  # the Trainer leaves a model alone that says where its parts are
        device = llm.get_input_embeddings().weight.device
        for part in (self.recommender, self.router, *self._small_parts()):
            part.to(device)
        # The language model is not saved; the Trainer would warn that its checkpoints lack it.
        self._keys_to_ignore_on_save = sorted(set(self.state_dict()) - set(self.adapter_names()))
        self.train(llm.training)

    def _small_parts(self) -> list[nn.Module]:
        parts = [self.prompt_embedding] if self.config.item_placeholders else []
        return parts + ([] if self.item_head is None else [self.item_head])

    # --- building, saving, loading ---

    @classmethod
    def from_base(
        cls,
        llm: PreTrainedModel,
        recommender: SASRecForNextItem,
        tokenizer: PreTrainedTokenizerBase,
        items: Catalogue,
        config: ILoraConfig | None = None,
        *,
        untrained_recommender: bool = False,
    ) -> "ILoraForRecommendation":
        """A model with a fresh adapter, which changes nothing until it is trained.

        Args:
            llm: any causal language model of transformers whose decoder layers have a `self_attn`, as loaded: its
                dtype, devices and quantisation stay. It is changed in place.
            recommender: a SASRec that was trained and loaded with `from_pretrained`. It is frozen in place.
            tokenizer: of the language model.
            items: the catalogue that both speak.
            config: rank, experts, prompts...; its parts' configurations are taken from the parts, and the language
                model's name from where it was loaded, unless it says another.
            untrained_recommender: accept a recommender that was never loaded. Its gates would be noise.

        Raises:
            ValueError: for a recommender that was not loaded or has another catalogue, titles that no prompt can hold,
                target modules that match nothing.
        """
        if not untrained_recommender and not recommender.name_or_path:
            raise ValueError(
                "the recommender was made and not loaded: expected a trained one, SASRecForNextItem.from_pretrained("
                "folder or Hub name), since gates of random user embeddings are noise; pass "
                "untrained_recommender=True if that is meant"
            )
        config = ILoraConfig() if config is None else copy.deepcopy(config)
        if config.llm_name_or_path is None:  # what transformers remembers of where the language model came from
            config.llm_name_or_path = llm.name_or_path or None
            config.llm_revision = vars(llm.config).get("_commit_hash")  # set for those from the Hub only
        return cls(config, llm, recommender, tokenizer, items)

    def adapter_names(self) -> list[str]:
        """Names, in the state dict, of what is saved: everything but the language model's own weights."""
        names = [
            name for name in self.state_dict() if not name.startswith("llm.") or name.endswith((".lora_A", ".lora_B"))
        ]
        if self.recommender.config.tie_word_embeddings:
            names.remove("recommender.head.weight")
        return names

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ):
        """Write the adapter, the frozen SASRec, the configuration, the tokenizer and the catalogue.

        Args:
            save_directory: made if it does not exist.
            state_dict: of the whole model, where the weights are spread over processes (ZeRO-3); None reads them here.
            push_to_hub: send what is written, in one commit, to `repo_id` or else the folder's name; further keyword
                arguments are those of `push_to_hub`.
            kwargs: as in transformers.

        Returns:
            The commit of `push_to_hub`, else None.

        Raises:
            ValueError: with `push_to_hub`, when the language model is known by a path of this machine.
        """
        if push_to_hub:
            check_public_llm(self.config)
        upload = UploadOfSaved(save_directory, kwargs) if push_to_hub else None
        # where this machine keeps the language model says nothing elsewhere
        self.config.text_config._name_or_path = self.config.llm_name_or_path or ""
        state_dict = self.state_dict() if state_dict is None else state_dict
        adapter = {name: state_dict[name] for name in self.adapter_names()}
        super().save_pretrained(save_directory, state_dict=adapter, **kwargs)
        if kwargs.get("is_main_process", True):
            self.tokenizer.save_pretrained(save_directory)
            self.catalogue.to_parquet(os.path.join(save_directory, CATALOGUE_FILE))
        return None if upload is None else upload.send(self)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        llm: PreTrainedModel | str | os.PathLike | None = None,
        config: ILoraConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map=None,
        quantization_config=None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **hub_arguments,
    ) -> "ILoraForRecommendation":
        """Load the adapter and the language model that it was trained on.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` wrote, or name on the Hub.
            llm: the language model, or where it is; None loads the one that the checkpoint names.
            config: None reads the saved one.
            dtype, device_map, quantization_config, attn_implementation, trust_remote_code: of the language model; the
                adapter is float32.
            hub_arguments: revision, token, cache_dir, local_files_only... of the adapter's repository; the last three
                count for the language model's, too.

        Raises:
            ValueError: for files that are missing or broken, and weights that are missing, foreign or of other shapes.
        """
        path = pretrained_model_name_or_path
        if config is None:
            config = ILoraConfig.from_pretrained(path, **hub_arguments)
        tokenizer = load_tokenizer(path, **hub_arguments)
        items = Catalogue.from_parquet(_saved_file(path, CATALOGUE_FILE, hub_arguments))
        try:
            state = load_file(_saved_file(path, SAFE_WEIGHTS_NAME, hub_arguments))
        except SafetensorError as error:
            raise ValueError(
                f"{SAFE_WEIGHTS_NAME} of {path} is broken ({error}): restore the folder that save_pretrained wrote"
            ) from error
        if not isinstance(llm, PreTrainedModel):
            if llm is None and config.llm_name_or_path is None:
                raise ValueError(f"{path} does not say which language model it was trained on: pass it as llm=")
            recorded = llm is None
            llm, _, _ = load_language_model(
                config.llm_name_or_path if recorded else llm,
                revision=config.llm_revision if recorded else None,
                gguf_file=config.llm_gguf_file if recorded else None,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                **{name: hub_arguments[name] for name in LLM_HUB_ARGUMENTS if name in hub_arguments},
            )
        recommender = SASRecForNextItem(config.recommender_config)
        model = cls(config, llm, recommender, tokenizer, items)
        model.load_adapter_state(state, str(path))
        model.name_or_path = model.config.name_or_path = str(path)
        return model.eval()

    def load_adapter_state(self, state: dict[str, torch.Tensor], origin: str = "the state dict") -> None:
        """Load what `save_pretrained` saved.

        Raises:
            ValueError: when a key is missing, foreign, or of another shape.
        """
        expected = self.adapter_names()
        missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        if missing or unexpected:
            raise ValueError(
                f"{origin} lacks {missing[:5] or 'nothing'} ({len(missing)} keys) and has {unexpected[:5] or 'nothing'}"
                f" ({len(unexpected)} keys) too many: expected the adapter of this configuration and language model"
            )
        own = self.state_dict()
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise ValueError(
                    f"{name} in {origin} has shape {tuple(value.shape)}: expected {tuple(own[name].shape)}, from the "
                    "configuration and the language model"
                )
        # Not by load_state_dict, which stumbles over quantised layers that the state says nothing of.
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)

    def train(self, mode: bool = True) -> "ILoraForRecommendation":
        """As in torch, but the frozen recommender stays in evaluation mode."""
        super().train(mode)
        self.recommender.eval()
        return self

    def init_weights(self) -> None:
        """Nothing: every part comes with its weights."""

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Gradient checkpointing of the language model.

        Raises:
            ValueError: for `use_reentrant=True`, which loses the gradients of the experts without an error.
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

    # --- the parts of a forward ---

    def user_embeddings(self, histories: torch.Tensor) -> torch.Tensor:
        """(batch, length) item ids, 0 for padding on either side -> (batch, recommender hidden), without gradients."""
        self.recommender.check_item_ids(histories)
        with torch.no_grad():
            return self.recommender.user_embeddings(self.recommender.newest_items(histories))

    def expert_gates(self, histories: torch.Tensor) -> torch.Tensor:
        """(batch, length) item ids -> (batch, experts), rows that sum to 1."""
        return self.router(self.user_embeddings(histories))

    def embed_prompts(self, input_ids: torch.Tensor, placeholder_items: torch.Tensor) -> torch.Tensor:
        """Token embeddings with the items' projected embeddings in place of the placeholders.

        Args:
            input_ids: (batch, tokens); placeholders are negative.
            placeholder_items: (batch, placeholders) the item of each placeholder in the order of the row, padded with 0
                on the right.

        Returns:
            (batch, tokens, llm hidden).

        Raises:
            ValueError: when a row has more or fewer placeholders than items; on a GPU, the device's own assertion.
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
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> ILoraOutput:
        """Loss of a batch of prompts, or logits of the language model.

        Args:
            input_ids: (batch, tokens), left-padded; placeholders are negative.
            attention_mask: (batch, tokens).
            placeholder_items: (batch, placeholders), see `embed_prompts`.
            histories: (batch, length) item ids, 0 for padding: what the gates are computed from.
            title_labels: (batch, title tokens): labels of the last tokens of `input_ids`, the target's title with its
                terminator, -100 elsewhere.
            candidates: (batch, candidates) item ids, the target among them, instead of `title_labels`: with
                `candidate_loss_weight`, behind prompts without a title.
            labels: (batch,) target items.
            shows_candidates: (batch,) bool: prompts that hold candidates do not train the item head, which would learn
                to find the target among twenty.
            expert_gates: (batch, experts), instead of `histories`.
            inputs_embeds, position_ids, past_key_values, use_cache, logits_to_keep: as in causal language models.
            num_items_in_batch: number of examples to average over; None means those of this call.

        Returns:
            Losses when `labels` are given, else `logits`.

        Raises:
            ValueError: without histories and gates, and for parts that do not fit together.
        """
        user_embeddings = None
        if expert_gates is None:
            if histories is None:
                raise ValueError("neither histories nor expert_gates were given: expected one of them")
            user_embeddings = self.user_embeddings(histories)
            expert_gates = self.router(user_embeddings)
        if placeholder_items is not None:
            inputs_embeds, input_ids = self.embed_prompts(input_ids, placeholder_items), None
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = positions(attention_mask)
        llm_arguments = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "expert_gates": expert_gates,
            **kwargs,
        }
        num_tokens = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if labels is None:
            # By index, hidden states come out in one piece. A number would make them a view, for which the output layer
            # copies its weights once per row.
            if isinstance(logits_to_keep, int) and logits_to_keep:
                logits_to_keep = torch.arange(num_tokens - logits_to_keep, num_tokens, device=expert_gates.device)
            output = self.llm(use_cache=use_cache, logits_to_keep=logits_to_keep, **llm_arguments)
            return ILoraOutput(logits=output.logits, past_key_values=output.past_key_values, expert_gates=expert_gates)
        trains_items = self.config.item_loss_weight > 0
        scores_candidates = self.config.candidate_loss_weight > 0
        if (candidates if scores_candidates else title_labels) is None:
            missing = "candidates" if scores_candidates else "title_labels"
            raise ValueError(f"labels were given without {missing}: expected both, as PromptCollator makes them")
        if histories is None and (trains_items or (scores_candidates and self.config.recommender_weight)):
            raise ValueError("this loss reads the recommender: expected histories, not expert_gates")
        num_examples = max(1, len(labels)) if num_items_in_batch is None else num_items_in_batch
        language_loss = candidate_loss = item_loss = item_logits = None
        loss = 0.0
        if scores_candidates:
            scores, last_states = packed_log_likelihoods(
                self.llm, inputs_embeds, attention_mask, expert_gates, self.title_tokens, candidates, trains_items
            )  # (batch, candidates), (batch, llm hidden)
            is_target = candidates == labels.unsqueeze(1)
            pooled = self._pooled(scores, histories, candidates)
            candidate_loss = F.cross_entropy(pooled, is_target.int().argmax(1), reduction="sum") / num_examples
            language_loss = -scores[is_target].sum() / num_examples
            loss = loss + self.config.candidate_loss_weight * candidate_loss
            loss = loss + self.config.language_loss_weight * language_loss
        elif self.config.language_loss_weight:
            title_labels = title_labels[:, -(num_tokens - 1) :]  # no token predicts the first
            # The token before a label predicts it.
            kept = torch.arange(num_tokens - title_labels.shape[1] - 1, num_tokens - 1, device=labels.device)
            output = self.llm(
                use_cache=False,
                logits_to_keep=kept,
                output_hidden_states=trains_items,
                **llm_arguments,
            )
            token_losses = F.cross_entropy(
                output.logits.flatten(0, 1).float(),
                title_labels.flatten(),
                ignore_index=IGNORED_LABEL,
                reduction="sum",
            )
            language_loss = token_losses / num_examples
            loss = loss + self.config.language_loss_weight * language_loss
            hidden_states = output.hidden_states[-1] if trains_items else None
        else:
            # The decoder alone leaves its states where its last layer is.
            hidden_states = self.llm.get_decoder()(use_cache=False, **llm_arguments).last_hidden_state
            hidden_states = hidden_states.to(expert_gates.device)
        if trains_items:
            if not scores_candidates:
                title_lengths = title_labels.ne(IGNORED_LABEL).sum(1)  # (batch,)
                last = hidden_states.shape[1] - 1 - title_lengths  # (batch,), the last token of the prompt
                last_states = hidden_states[torch.arange(len(last), device=last.device), last]  # (batch, llm hidden)
            item_logits = self._item_logits(last_states, user_embeddings, histories)
            losses = F.cross_entropy(item_logits, labels, reduction="none")  # (batch,)
            if shows_candidates is not None:
                losses = losses.masked_fill(shows_candidates, 0.0)
            item_loss = losses.sum() / num_examples
            loss = loss + self.config.item_loss_weight * item_loss
        return ILoraOutput(
            loss=loss,
            language_loss=language_loss,
            candidate_loss=candidate_loss,
            item_loss=item_loss,
            item_logits=None if self.training else item_logits,
            expert_gates=expert_gates,
        )

    def _pooled(self, log_likelihoods, histories, candidates) -> torch.Tensor:
        """(batch, candidates): log-likelihoods of titles pooled with the recommender's, by `recommender_weight`."""
        share = self.config.recommender_weight
        if not share:
            return log_likelihoods
        with torch.no_grad():
            scores = self.recommender.next_item_scores(self.recommender.newest_items(histories)).float()
            log_p = scores.log_softmax(-1).gather(1, candidates)
        return share * log_p + (1 - share) * log_likelihoods

    def _item_logits(self, last_states, user_embeddings, histories) -> torch.Tensor:
        """(batch, num_items + 1) float32."""
        queries, scale = self.item_head(last_states.to(user_embeddings.device), user_embeddings)
        scores = self.recommender.score_users(queries, self.recommender.newest_items(histories)).float()
        # Without the -inf of padding, which would make the gradient of the scale NaN.
        return F.pad(scores[:, 1:] * scale, (1, 0), value=float("-inf"))

    # --- answers ---

    @torch.no_grad()
    def item_scores(self, histories: torch.Tensor) -> torch.Tensor:
        """Scores of the whole catalogue by the item head, in one forward per batch.

        Args:
            histories: (batch, length) item ids, oldest first, 0 for padding on either side; prompts hold the newest
                `config.max_history`.

        Returns:
            (batch, num_items + 1) logits, float32, -inf for padding.

        Raises:
            ValueError: without an item head, and for histories that are empty or outside the catalogue.
        """
        if self.item_head is None:
            raise ValueError("this model has no item head: train one with item_head residual or plain")
        with evaluation_mode(self):
            histories = self._checked_histories(histories)
            prompts = self.build_prompts(histories)
            user_embeddings = self.user_embeddings(histories)
            hidden_states = (
                self.llm.get_decoder()(
                    inputs_embeds=self.embed_prompts(prompts.input_ids, prompts.placeholder_items),
                    attention_mask=prompts.attention_mask,
                    position_ids=positions(prompts.attention_mask),
                    expert_gates=self.router(user_embeddings),
                    use_cache=False,
                )
            ).last_hidden_state  # (batch, tokens, llm hidden)
            return self._item_logits(hidden_states[:, -1], user_embeddings, histories)

    def rank_items(self, histories: torch.Tensor, top_k: int = 10, exclude_seen: bool = True):
        """The `top_k` best items of the whole catalogue by the item head.

        Args:
            histories: as in `item_scores`.
            top_k: items per history.
            exclude_seen: leave out the items of the history.

        Returns:
            item_ids (batch, top_k) int64, best first, and distances (batch, top_k): -log p over the whole catalogue.

        Raises:
            ValueError: as `item_scores`, and for `top_k` larger than what is left.
        """
        histories = torch.as_tensor(histories, device=self.device)
        log_probabilities = self.item_scores(histories).log_softmax(-1)
        item_ids, scores = top_k_items(log_probabilities, histories, top_k, exclude_seen)
        return item_ids, -scores

    def recommend(self, histories: torch.Tensor, top_k: int = 10, exclude_seen: bool = True):
        """As `rank_items`, with scores instead of distances, larger is better: what every recommender answers."""
        item_ids, distances = self.rank_items(histories, top_k, exclude_seen)
        return item_ids, -distances

    @torch.no_grad()
    def score_candidates(self, histories: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Log-likelihood of each candidate's title after the prompt, which is read once for all of them.

        With `config.recommender_weight`, pooled with the recommender's log p of the item.

        Args:
            histories: as in `item_scores`.
            candidates: (batch, candidates) item ids, 0 for padding; shown in the prompt where a template shows
                candidates.

        Returns:
            (batch, candidates) scores in nats, float32, -inf for padding.

        Raises:
            ValueError: for ids outside the catalogue, histories or candidates that are empty, prompts longer than the
                context, and language models whose attention takes no mask of ours.
        """
        with evaluation_mode(self):
            histories = self._checked_histories(histories)
            candidates = self._checked_candidates(candidates, histories)
            prompts = self.build_prompts(histories, candidates)
            log_likelihoods = candidate_log_likelihoods(
                self.llm,
                self.embed_prompts(prompts.input_ids, prompts.placeholder_items),
                prompts.attention_mask,
                self.expert_gates(histories),
                self.title_tokens,
                candidates,
            )
            return self._pooled(log_likelihoods, histories, candidates.to(self.device))

    @torch.no_grad()
    def generate_recommendation(
        self,
        histories: torch.Tensor,
        candidates: torch.Tensor | None = None,
        top_k: int = 1,
        constrained: bool = True,
        max_new_tokens: int = 64,
        num_beams: int | None = None,
    ) -> GeneratedRecommendation:
        """Let the language model write the title of the next item, by itself: `config.recommender_weight` has no part.

        Args:
            histories: as in `item_scores`.
            candidates: (batch, candidates) item ids to choose among, 0 for padding; None means the whole catalogue.
            top_k: answers per history.
            constrained: allow titles only, so that every answer is an item; else the model writes freely, as in the
                published protocol, and an answer counts when it holds exactly one candidate's title.
            max_new_tokens: of free answers.
            num_beams: at least `top_k`, and 2 when constrained; None means the larger of 4 and `top_k` when
                constrained, else `top_k`.

        Returns:
            The answers, best first.

        Raises:
            ValueError: as `score_candidates`, for more answers than candidates, fewer beams than answers, and prompts
                that leave no room in the context for the longest title, or for `max_new_tokens`.
        """
        if num_beams is None:
            num_beams = max(4, top_k) if constrained else top_k
        fewest = max(2, top_k) if constrained else top_k
        if num_beams < fewest:
            raise ValueError(f"num_beams is {num_beams}: expected at least {fewest} for top_k {top_k}")
        with evaluation_mode(self):
            histories = self._checked_histories(histories)
            num_choices = self.config.num_items
            if candidates is not None:
                candidates = self._checked_candidates(candidates, histories)
                num_choices = candidates.shape[1]
            if not 1 <= top_k <= num_choices:
                raise ValueError(f"top_k is {top_k}: expected 1 to {num_choices}, the number of items to choose from")
            prompts = self.build_prompts(histories, candidates)
            prompt = {
                "inputs_embeds": self.embed_prompts(prompts.input_ids, prompts.placeholder_items),
                "attention_mask": prompts.attention_mask,
                "expert_gates": self.expert_gates(histories),
            }
            parts = (self, prompt, self.tokenizer, self.title_tokens)
            longest_answer = int(self.title_tokens.lengths.max()) + 1 if constrained else max_new_tokens
            check_context(self.llm, prompts.input_ids.shape[1] + longest_answer)
            if not constrained:
                return generate_freely(*parts, candidates, top_k, num_beams, max_new_tokens)
            if candidates is None:
                tries = [self._catalogue_trie] * len(histories)
            else:
                tries = [TitleTrie(self.title_tokens, row) for row in candidates.tolist()]
            return generate_titles(*parts, tries, top_k, num_beams)

    @functools.cached_property
    def _catalogue_trie(self) -> TitleTrie:
        return TitleTrie(self.title_tokens)

    @torch.no_grad()
    def encode_items(self, batch_size: int = 64) -> torch.Tensor:
        """The language model's embedding of each title: the mean of its last hidden states over the title's tokens.

        Every expert has the same gate, as for a user of whom nothing is known.

        Args:
            batch_size: titles per forward.

        Returns:
            (num_items + 1, llm hidden) float32 on the CPU, zero for padding.
        """
        table = torch.zeros(self.config.num_items + 1, self.llm_size)
        # by length, so that little is spent on padding
        order = self.title_tokens.lengths[1:].argsort(kind="stable") + 1
        with evaluation_mode(self):
            for first in range(0, len(order), batch_size):
                items = order[first : first + batch_size]
                # (items, tokens) each
                input_ids, mask = (torch.from_numpy(part).to(self.device) for part in self.title_tokens.padded(items))
                gates = torch.full((len(items), self.config.num_experts), 1 / self.config.num_experts)
                hidden_states = (
                    self.llm.get_decoder()(
                        input_ids=input_ids,
                        attention_mask=mask,
                        position_ids=positions(mask),
                        expert_gates=gates.to(self.device),
                        use_cache=False,
                    )
                ).last_hidden_state  # (items, tokens, llm hidden)
                hidden_states = hidden_states.to(self.device, torch.float32)
                weights = mask.unsqueeze(-1) / mask.sum(1).view(-1, 1, 1)
                table[torch.as_tensor(items)] = (hidden_states * weights).sum(1).cpu()
        return table

    @torch.no_grad()
    def materialize_lora(self, history: torch.Tensor) -> dict[str, torch.Tensor]:
        """The ordinary LoRA that one user's gates make of the experts.

        It belongs on the language model as it is here: with `config.num_llm_layers`, cut to its first layers.

        Args:
            history: (length,) or (1, length) item ids.

        Returns:
            State dict in PEFT's format, for a LoraConfig with `r=config.rank`, `lora_alpha=config.lora_alpha` and
            `target_modules=config.target_modules`.

        Raises:
            ValueError: for several histories, and as `item_scores`.
        """
        history = torch.as_tensor(history)
        if history.dim() == 1:
            history = history.unsqueeze(0)
        if len(history) != 1:
            raise ValueError(f"history has shape {tuple(history.shape)}: expected one, (length,) or (1, length)")
        with evaluation_mode(self):
            histories = self._checked_histories(history)
            return plain_lora(self.llm, self.expert_gates(histories)[0])

    def build_prompts(self, histories: torch.Tensor, candidates: torch.Tensor | None = None) -> Prompts:
        """The prompts that the answers start from, on the model's device; without candidates where no template shows
        them."""
        if candidates is not None and not self.prompts.candidate_templates:
            candidates = None
        if candidates is not None and self.config.candidate_order == "recommender":
            candidates = preferred_order(self.recommender, histories.to(self.device), candidates.to(self.device))
        return self.prompts.build(newest_items(histories, self.config.max_history), candidates).to(self.device)

    def _checked_histories(self, histories: torch.Tensor) -> torch.Tensor:
        """On the model's device; ValueError for empty ones and for ids outside the catalogue."""
        return padded_histories(histories, self.config.num_items, self.device)

    def _checked_candidates(self, candidates: torch.Tensor, histories: torch.Tensor) -> torch.Tensor:
        """(batch, candidates) on the CPU; ValueError for other shapes, rows without any, ids outside the catalogue."""
        candidates = torch.as_tensor(candidates).cpu()
        if candidates.dim() != 2 or len(candidates) != len(histories) or candidates.is_floating_point():
            raise ValueError(
                f"candidates have shape {tuple(candidates.shape)} and type {candidates.dtype}: expected item ids of "
                f"shape ({len(histories)}, candidates), a row per history"
            )
        empty = (~candidates.ne(0).any(1)).nonzero()
        if len(empty):
            raise ValueError(f"row {int(empty[0])} has no candidates: expected at least one; leave the row out")
        lowest, highest = map(int, candidates.aminmax())
        if lowest < 0 or highest > self.config.num_items:
            raise ValueError(
                f"candidates hold item {lowest if lowest < 0 else highest}: expected ids 1..{self.config.num_items} of "
                "the catalogue, 0 for padding"
            )
        return candidates.long()


def check_recommender(recommender: SASRecForNextItem, items: Catalogue) -> None:
    """Raise a ValueError unless the recommender's items are those of the catalogue."""
    if recommender.config.num_items != len(items):
        raise ValueError(
            f"the recommender knows {recommender.config.num_items} items and the catalogue has {len(items)}: "
            "expected the recommender that was trained on this catalogue"
        )
    if recommender.catalogue is not None and recommender.catalogue.table["raw_id"] != items.table["raw_id"]:
        raise ValueError(
            "the recommender's catalogue has other raw ids than the items given: expected the recommender that was "
            "trained on this catalogue"
        )


def _saved_file(path: str | os.PathLike, name: str, hub_arguments: dict) -> str:
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if found is None:
        raise ValueError(f"{path} has no {name}: expected a folder or repository that save_pretrained wrote")
    return found


__all__ = ["GeneratedRecommendation", "ILoraForRecommendation", "ILoraOutput", "check_recommender"]
