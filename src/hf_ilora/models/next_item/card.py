"""The card of a model: metadata for the Hub, and the one template, filled in with the facts about the model."""

import hashlib
import json
import re

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from .card_template import CARD_TEMPLATE
from .catalogue import Catalogue
from .configuration_next_item import TASK

_SIGNATURE = re.compile(r"<!-- card of hf_ilora, (\w{16})(?:, measured with weights (\w{16}))? -->\n?\Z")
_COUNTING = ("popularity", "transition_counts")


def model_card(
    config: PreTrainedConfig,
    catalogue: Catalogue | None,
    repo_id: str,
    revision: str | None = None,
    *,
    title: str | None = None,
    dataset_name: str | None = None,
    metadata: dict[str, object] | None = None,
    measured_weights: str | None = None,
    **sections: object,
) -> ModelCard:
    """Fill in the template.

    Texts are Markdown: the caller escapes names and titles that come from elsewhere.

    Args:
        config: configuration of the saved model; `architectures` names its class.
        catalogue: gives raw ids for the example, and the number of items that training has never seen.
        repo_id: repository that the model is in, or will be.
        revision: branch or tag; None means main.
        title: title of the page; None takes the name in `repo_id`.
        dataset_name: name of the data; None omits it.
        metadata: fields of `ModelCardData` in addition to those that follow from the configuration: license, datasets,
            language, eval_results with model_name, and further tags.
        measured_weights: `weights_fingerprint` of the evaluated model. The Trainer keeps such a card for as long as it
            pushes the same weights. None lets the Trainer replace the card with its own.
        sections: `measurements`, `pictures` (with `text` and `file`), `popularity`, `command`, `training` and
            `licence`. Without `measurements`, the card says that nothing was measured.

    Returns:
        A card that `is_untouched` accepts.
    """
    metadata = dict(metadata or {})
    tags = ["hf_ilora", config.model_type, "recommender-system", TASK, *(metadata.pop("tags", None) or [])]
    is_ilora = config.model_type == "ilora"
    if is_ilora and config.public_llm_name is not None:
        metadata |= {"base_model": config.public_llm_name, "base_model_relation": "adapter"}
    counts = None if catalogue is None else catalogue.counts
    card = ModelCard.from_template(
        ModelCardData(library_name="hf_ilora", pipeline_tag=TASK, tags=list(dict.fromkeys(tags)), **metadata),
        template_str=CARD_TEMPLATE,
        title=title or repo_id.rpartition("/")[2],
        is_ilora=is_ilora,
        counts=config.model_type in _COUNTING,
        language_model=_language_model(config) if is_ilora else None,
        architecture=config.architectures[0],
        items=f"{config.num_items:,} items" + ("" if dataset_name is None else f" of {dataset_name}"),
        usage=usage_example(config, catalogue, repo_id, revision),
        cold_items=None if counts is None else int((counts[1:] == 0).sum()),
        **sections,
    )
    return ModelCard(signed(str(card), measured_weights))


def usage_example(
    config: PreTrainedConfig, catalogue: Catalogue | None, repo_id: str, revision: str | None = None
) -> str:
    """Python code that loads a model from the Hub and prints recommended titles: at most five lines, with imports.

    The code loads a next-item model with the code in its repository, so that it works without hf_ilora too.

    Args:
        config: configuration of the saved model; `architectures` names its class.
        catalogue: gives raw ids for the example; None shows item ids.
        repo_id: repository of the model.
        revision: branch or tag; None means main.
    """
    source = json.dumps(repo_id) if revision is None else f"{json.dumps(repo_id)}, revision={json.dumps(revision)}"
    is_ilora = config.model_type == "ilora"
    if is_ilora:
        lines = ["import hf_ilora", "", f"model = hf_ilora.{config.architectures[0]}.from_pretrained({source})"]
    else:
        lines = ["from transformers import AutoModel", ""]
        lines.append(f"model = AutoModel.from_pretrained({source}, trust_remote_code=True)")
    if catalogue is None:
        return "\n".join([*lines, "item_ids, scores = model.recommend([[1, 2]], top_k=10)", "print(item_ids[0])"])
    shown = catalogue.raw_ids(range(1, min(len(catalogue), 2) + 1))
    lines.append(f"histories = [model.catalogue.item_ids({shown})]  # raw ids, oldest first")
    if is_ilora and config.item_head == "none":
        return "\n".join([*lines, "print(model.generate_recommendation(histories, top_k=3).texts)"])
    lines.append("item_ids, scores = model.recommend(histories, top_k=10)")
    return "\n".join([*lines, "print(model.catalogue.titles(item_ids[0]))"])


def signed(text: str, measured_weights: str | None = None) -> str:
    """Add the last line from which `is_untouched` and `measured_weights` recognise a card."""
    text = _SIGNATURE.sub("", text).rstrip() + "\n\n"
    measured = "" if measured_weights is None else f", measured with weights {measured_weights}"
    return f"{text}<!-- card of hf_ilora, {_digest(text)}{measured} -->\n"


def is_untouched(text: str) -> bool:
    """Whether this package wrote the card and nobody has edited it since, so that a new one may replace it."""
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def measured_weights(text: str) -> str | None:
    """`weights_fingerprint` of the model whose evaluation an unedited card shows; None for another card."""
    return _SIGNATURE.search(text)[2] if is_untouched(text) else None


def is_edited(text: str) -> bool:
    """Whether a person wrote or edited a card. The Hub writes metadata alone into new repositories; that is no card."""
    return not is_untouched(text) and bool(ModelCard(text).text.strip())


def newest_card(new: str, existing: str | None, weights: str | None) -> str:
    """Choose the card of a model that is saved or pushed again.

    The existing card stays if it was edited by hand, or if it has evaluation results of the same weights, which the new
    one lacks. A new card that was edited by hand always replaces it. A new card without a licence takes over the
    existing one's.

    Args:
        new: the card to publish.
        existing: the card in its place; None if there is none.
        weights: `weights_fingerprint` of the model.
    """
    if existing is None or not is_untouched(new):
        return new
    keeps = weights is not None and measured_weights(existing) == weights != measured_weights(new)
    if keeps or is_edited(existing):
        return existing
    licence = ModelCard(existing).data.get("license")
    return with_metadata(new, license=licence) if licence and not ModelCard(new).data.get("license") else new


def with_metadata(text: str, **metadata: object) -> str:
    """Set metadata of a card, except those that are None; `tags` are added to the card's own.

    An unedited card still counts as unedited afterwards.
    """
    card = ModelCard(text)
    tags = [*(card.data.tags or []), *(metadata.pop("tags", None) or [])]
    for name, value in (metadata | {"tags": list(dict.fromkeys(tags)) or None}).items():
        if value is not None:
            setattr(card.data, name, value)
    return signed(str(card), measured_weights(text)) if is_untouched(text) else str(card)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _language_model(config: PreTrainedConfig) -> str:
    name = config.public_llm_name
    if name is None:
        return "a language model of its author"
    layers = "" if config.num_llm_layers is None else f" (its first {config.num_llm_layers} layers)"
    is_plain = config.llm_revision is not None and re.fullmatch(r"[\w./-]+", config.llm_revision)
    return f"the language model `{name}`{layers}" + (f" at commit `{config.llm_revision}`" if is_plain else "")


__all__ = ["is_edited", "is_untouched", "measured_weights", "model_card", "newest_card", "signed", "usage_example"]
__all__ += ["with_metadata"]
