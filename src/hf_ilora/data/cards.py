"""Writes the cards of data sets: README.md describes the data and tells `datasets.load_dataset` which files to read."""

import json
from collections.abc import Mapping, Sequence

from huggingface_hub import DatasetCard, DatasetCardData

from hf_ilora.models.next_item.card import is_untouched, signed
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown

from .protocol_settings import LEAKS
from .sources import DataSource

TAGS = ["hf_ilora", "recommender-system", "sequential-recommendation"]


def sequences_card(
    name: str,
    protocol: Mapping[str, object],
    num_items: int,
    counts: Mapping[str, int],
    columns: Sequence[str],
    source: DataSource | None,
    fingerprint: str,
) -> str:
    """The card of a data set of sequences.

    Args:
        name: "user/name" on the Hub, or the name of the folder.
        protocol: the settings that made the splits.
        num_items: size of the catalogue.
        counts: number of rows of each split.
        columns: names of the columns of the splits.
        source: origin of the interactions; None if it is unknown.
        fingerprint: digest of the content.
    """
    files = [{"split": split, "path": f"{split}.parquet"} for split in counts]
    configs = [
        {"config_name": "sequences", "default": True, "data_files": files},
        {"config_name": "catalogue", "data_files": "items.parquet"},
    ]
    settings = {key: value for key, value in protocol.items() if key != "name" and value is not None}
    leak = LEAKS.get(str(protocol["name"]))
    named = json.dumps(name)
    described = {
        "user_id": "the raw id of the user",
        "history": "item ids, oldest first",
        "target": "the item that comes next",
        "relevant_items": "all items that count as hits, the first of them the target; empty in train",
        "candidates": "the target among items that the user never interacted with, to rank; empty in train",
    }
    sections = [
        "Chronological histories of items for next-item recommendation, with the catalogue of the "
        f"{num_items:,} items, made with the Python package hf_ilora.",
        markdown_table(("split", "rows"), {split: f"{count:,}" for split, count in counts.items()}),
        "## How to use it",
        "```python\nfrom hf_ilora import SequenceDatasets\n"
        f"sequences = SequenceDatasets.load({named})\n"
        'print(sequences["train"][0], sequences.catalogue.titles([1]))\n```',
        "Without hf_ilora:",
        "```python\nfrom datasets import load_dataset\n"
        f'sequences = load_dataset({named}, "sequences")\n'
        f'items = load_dataset({named}, "catalogue", split="train")\n```',
        "Columns of the splits:",
        "\n".join(f"- {code_in_markdown(key)}: {described.get(key, 'a further column')}" for key in columns),
        f"The catalogue maps `item_id`, 1 to {num_items}, to `raw_id`, `title` and more.",
        "## Protocol",
        markdown_table(("setting", "value"), {"protocol": protocol["name"], **settings}),
        *([] if leak is None else [f"What training knows of the future or of other users: {leak}."]),
        "## Source and licence",
        _origin(source),
        f"Fingerprint of the content (sha256): {code_in_markdown(fingerprint)}",
    ]
    return card(name, sections, configs, source or DataSource())


def card(name: str, sections: Sequence[str], configs: Sequence[dict], source: DataSource, **metadata: object) -> str:
    """A card that ends with a signature, by which `is_untouched` tells whether anybody edited it.

    Args:
        name: name of the data set; its last part becomes the title.
        sections: Markdown, in which names and titles from the data are already escaped.
        configs: the configurations that `datasets.load_dataset` offers.
        source: states the licence.
        metadata: further fields of `DatasetCardData`.
    """
    data = DatasetCardData(
        license=source.license or "unknown",
        license_name=source.name if source.license == "other" else None,
        license_link=source.homepage if source.license == "other" else None,
        tags=TAGS,
        configs=list(configs),
        **metadata,
    )
    title = in_markdown(name.rpartition("/")[2])
    return signed("\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {title}", *sections]))


def card_to_publish(new: str, existing: str | None) -> str:
    """The new card, or the existing one with the new `configs` if somebody wrote or edited it by hand.

    Raises:
        ValueError: the metadata of the existing card are not valid YAML.
    """
    if existing is None or is_untouched(existing):
        return new
    kept = DatasetCard(existing)
    kept.data["configs"] = DatasetCard(new).data["configs"]
    return str(kept)


def markdown_table(header: tuple[str, str], rows: Mapping[str, object]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {in_markdown(name)} | {in_markdown(value)} |" for name, value in rows.items())])


def _origin(source: DataSource | None) -> str:
    if source is None:
        return "The data set does not say where its interactions come from."
    parts = []
    if source.name is not None:
        parts.append(
            f"Made of {in_markdown(source.name)}" + (f"; {in_markdown(source.terms)}." if source.terms else ".")
        )
    if source.homepage is not None:
        parts.append(f"Source: {in_markdown(source.homepage)}.")
    if source.license is None:
        parts.append("Its licence is not stated.")
    elif source.license != "other" or source.terms is None:
        parts.append(f"Licence: {in_markdown(source.license)}.")
    return " ".join(parts)


__all__ = ["card", "card_to_publish", "markdown_table", "sequences_card"]
