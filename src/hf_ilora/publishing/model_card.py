"""Writes the card of a published model: how to use it, its measurements, its data and training."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult

from hf_ilora.files import written_whole
from hf_ilora.models.ilora.configuration_ilora import ILoraConfig
from hf_ilora.models.next_item.hub_upload import CARD_FILE, card_data, check_repo_id, usage_example
from hf_ilora.publishing.measured import MeasuredTable, read_measured
from hf_ilora.publishing.publish import ModelFolder, check_folder
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown, shown

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_SIGNATURE = re.compile(r"<!-- card of hf_ilora, (\w{16}) -->\n\Z")
_METRIC_NAMES = {
    "ndcg": "NDCG",
    "hit_ratio": "HR",
    "mrr": "MRR",
    "map": "MAP",
    "valid_ratio": "ValidRatio",
}


def write_card(
    folder: str | Path,
    repo_id: str,
    *,
    dataset_name: str,
    license: str,
    results: Sequence[str | Path] = (),
    row: str | None = None,
    protocol: dict | None = None,
    seeds_table: str | Path | None = None,
    revision: str | None = None,
    checked: ModelFolder | None = None,
    output_dir: str | Path | None = None,
) -> Path:
    """Write README.md into a model's folder, or into another one.

    Args:
        folder: a folder that `check_folder` accepts.
        repo_id: "user/name" of the model on the Hub.
        dataset_name: name of the data set on the card, such as "MovieLens-100K".
        license: licence of the weights by its name on the Hub, such as "apache-2.0".
        results: results.json of `hf-ilora evaluate` and `hf-ilora evaluate-ilora`, or their folders.
        row: name or source of this model in them; None if they have only one row.
        protocol: the `protocol` of the data set.
        seeds_table: JSON of experiments/seeds.py for the same configuration with other seeds.
        revision: branch of the model; None means main.
        checked: the result of `check_folder`; None to check here.
        output_dir: folder to write README.md to, created if it does not exist; None means the folder of the model.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError, ValueError: as `check_folder` and `read_measured`; for results on other data than the run's;
            for a name that the Hub does not accept; and for a card in either folder that was written or edited by hand,
            because it is not overwritten.
    """
    check_repo_id(repo_id)
    if not dataset_name.strip():
        raise ValueError(f"dataset_name is {dataset_name!r}: expected the name of the data, such as MovieLens-100K")
    if not _LICENSE.fullmatch(license):
        raise ValueError(
            f"license is {license!r}: expected its name on the Hub, such as apache-2.0 or cc-by-nc-4.0, or other"
        )
    folder = Path(folder)
    checked = checked or check_folder(folder)
    path = Path(output_dir or folder) / CARD_FILE
    for card in (folder / CARD_FILE, path):
        if card.is_file() and not _is_untouched(card.read_text(encoding="utf-8")):
            raise ValueError(
                f"{card} was written or edited by hand: expected no card, or an unchanged one of hf_ilora; publish the "
                "card in the model's folder as it is (hf-ilora push --keep_card true), or move it away"
            )
    tables = [read_measured(Path(source), row, dataset_name) for source in results]
    for source, table in zip(results, tables, strict=True):
        _check_data(checked.run, str(source), table.data_fingerprint)
    title = repo_id.rpartition("/")[2]
    metadata = card_data(
        checked.config,
        license=license,
        model_name=title,
        eval_results=_eval_results(tables, dataset_name) or None,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {title}",
        _description(checked, dataset_name),
        f"## How to use it\n\n```python\n{usage_example(checked.config, checked.catalogue, repo_id, revision)}\n```",
        _measured_section(tables),
        *([] if seeds_table is None else [_seeds_section(Path(seeds_table))]),
        _training_section(checked, dataset_name, protocol),
        f"## Licence\n\nWeights: {in_markdown(license)}. `items.parquet` contains titles and ids of "
        f"{in_markdown(dataset_name)}, whose terms apply to them.",
    ]
    text = "\n\n".join(sections) + "\n\n"
    with written_whole(path) as unfinished:
        unfinished.write_text(f"{text}<!-- card of hf_ilora, {_digest(text)} -->\n", encoding="utf-8")
    return path


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_untouched(text: str) -> bool:
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _digest(text[: signature.start()])


def _check_data(run: dict, source: str, fingerprint: str) -> None:
    if run["data_fingerprint"] not in (None, fingerprint):
        raise ValueError(
            f"{source} was measured on data with fingerprint {fingerprint[:16]}: expected "
            f"{run['data_fingerprint'][:16]}, the data that the model was trained on; evaluate on that"
        )


def _description(checked: ModelFolder, dataset_name: str) -> str:
    config = checked.config
    items = f"{len(checked.catalogue):,} items of {in_markdown(dataset_name)}"
    if not isinstance(config, ILoraConfig):
        return f"A {config.architectures[0]} that recommends the next of {items}, for the Python package hf_ilora."
    layers = "" if config.num_llm_layers is None else f" (its first {config.num_llm_layers} layers)"
    revision = "" if config.llm_revision is None else f" at commit {code_in_markdown(config.llm_revision)}"
    return (
        "An adapter (iLoRA, arXiv 2408.10159) with which the language model "
        f"{code_in_markdown(config.llm_name_or_path)}{layers}{revision} recommends the next of {items}, for the Python "
        "package hf_ilora. It contains the adapter, the router and the frozen SASRec; the language model is loaded by "
        "its name."
    )


def _measured_section(tables: Sequence[MeasuredTable]) -> str:
    if not tables:
        return "## Measurements\n\nThere are no measurements of this model."
    return "## Measurements\n\n" + "\n\n".join(table.text.replace("# ", "### ", 1).strip() for table in tables)


def _seeds_section(path: Path) -> str:
    """Mean and standard deviation over seeds on the test split."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seeds, test = content["seeds"], content["test"]
        lines = [
            f"| {in_markdown(_metric_name(name))} | {mean:.4f} ± {test['standard_deviation'][name]:.4f} |"
            for name, mean in test["mean"].items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of seeds ({error!r}): expected the JSON of experiments/seeds.py"
        ) from error
    header = f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(in_markdown, seeds))}), test split:"
    return "\n".join([f"## Over seeds\n\n{header}\n", "| metric | value |", "|---|---:|", *lines])


def _training_section(checked: ModelFolder, dataset_name: str, protocol: dict | None) -> str:
    run = checked.run
    versions = ", ".join(f"{name} {run['versions'].get(name)}" for name in ("hf_ilora", "torch", "transformers"))
    facts = {"data": in_markdown(dataset_name)}
    facts |= {in_markdown(f"protocol: {name}"): in_markdown(value) for name, value in (protocol or {}).items()}
    facts |= {
        "data fingerprint": code_in_markdown(run["data_fingerprint"]),
        "seed": in_markdown(run["seed"]),
        "versions": in_markdown(versions),
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["## Data and training", "", "All settings are in `run.json`.", "", "| | |", "|---|---|", *lines])


def _eval_results(tables: Sequence[MeasuredTable], dataset_name: str) -> list[EvalResult]:
    results = {}
    for table in tables:
        for name, interval in table.quality.items():
            if "/recall@" in name:  # one relevant item per user: equal to the hit ratio
                continue
            results[table.split, name] = EvalResult(
                task_type="other",
                task_name="Sequential recommendation",
                dataset_type=_dataset_type(dataset_name),
                dataset_name=shown(dataset_name),
                dataset_split=table.split,
                dataset_revision=table.data_fingerprint,
                metric_type=name.rpartition("/")[2],
                metric_name=_metric_name(name, table.num_candidates),
                metric_value=round(interval.mean, 6),
            )
    return list(results.values())


def _dataset_type(dataset_name: str) -> str:
    """An identifier as the Hub accepts it: of the ASCII letters and digits of a name, or a digest if it has none."""
    ascii_name = unicodedata.normalize("NFKD", dataset_name).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
    return name or f"dataset-{hashlib.sha256(dataset_name.encode()).hexdigest()[:8]}"


def _metric_name(name: str, num_candidates: int | None = None) -> str:
    """`masked/ndcg@10` as "NDCG@10, whole catalogue, seen items excluded"."""
    ranking, _, metric = name.partition("/")
    kind, at, rest = metric.partition("@")
    among = {
        "masked": "whole catalogue, seen items excluded",
        "relevant": "all relevant items, whole catalogue, seen items excluded",
        "unmasked": "whole catalogue",
        "candidates": f"among {num_candidates or 'the'} candidates",
        "answers": "generated answers",
    }
    return f"{_METRIC_NAMES.get(kind, kind)}{at}{rest.replace('_', ' ')}, {among.get(ranking, ranking)}"
