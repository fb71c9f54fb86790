"""Loads the models that a demo shows side by side; all have the same catalogue."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_ilora.devices import default_device
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import SavedRecommender, check_same_items, load_recommender
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora_cli.shown_text import shareable


@dataclass(frozen=True)
class ShownModel:
    """A model of the demo.

    Args:
        name: its name on the page.
        source: the folder or Hub name from which it was loaded.
        model: the model, which has a catalogue.
    """

    name: str
    source: str
    model: SavedRecommender

    @property
    def kind(self) -> str:
        """A description of the model for the page."""
        config = self.model.config
        if isinstance(self.model, ILoraForRecommendation):
            return f"iLoRA on {shareable(config.llm_name_or_path)}, {config.num_experts} experts"
        kind = type(self.model).__name__.removesuffix("ForNextItem")
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{kind}, {size:,} parameters" if size else kind

    @property
    def takes_new_items(self) -> bool:
        """Whether items can be added to the model without training."""
        return isinstance(self.model, EncoderForNextItem) and self.model.config.teacher_embedding_size is None


def load_models(
    sources: Sequence[str], names: Sequence[str] | None = None, *, trust_remote_code: bool = False
) -> list[ShownModel]:
    """Load the models of a demo, on the accelerator if there is one.

    Args:
        sources: folders or Hub names.
        names: names of the models on the page; None means the last part of each source, or as many of the last parts
            as tell the sources apart.
        trust_remote_code: run code that comes with the language model of an iLoRA.

    Raises:
        FileNotFoundError: for a source that is neither a folder nor a Hub name.
        ValueError: for no models, another number of names than sources, equal names, a folder without a recommender,
            and models without a catalogue or with different ones.
    """
    if not sources:
        raise ValueError("there are no models: expected at least one folder or Hub name of a saved model")
    if names is None:
        names = _last_parts(sources)
    if len(names) != len(sources) or len(set(names)) < len(names):
        raise ValueError(
            f"names are {', '.join(names)}: expected {len(sources)} different ones, one for each of the models "
            f"{', '.join(sources)}"
        )
    device = default_device()
    models = []
    for name, source in zip(names, sources, strict=True):
        model = load_recommender(source, trust_remote_code=trust_remote_code)
        if model.catalogue is None:
            raise ValueError(
                f"{source} has no catalogue (items.parquet), so its titles are unknown: assign model.catalogue = "
                "sequences.catalogue and save the model again"
            )
        models.append(ShownModel(name, source, model.to(device)))
        first = models[0].model.catalogue
        raw_ids = first.table["raw_id"].to_numpy()
        check_same_items(len(model.catalogue), model.catalogue, source, len(first), raw_ids, models[0].source)
    return models


def _last_parts(sources: Sequence[str]) -> list[str]:
    """Shorten paths to as few of their last parts as tell them apart, because a page need not show whole paths."""
    parts = [Path(source).parts for source in sources]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-number:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


__all__ = ["ShownModel", "load_models"]
