"""Writes the card of a published model: how to use it, its measurements, its data and training."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_ilora.data.protocol_settings import LEAKS
from hf_ilora.evaluation.card_metrics import ABOUT_NDCG, eval_results, metric_name
from hf_ilora.files import written_whole
from hf_ilora.models.next_item.card import is_untouched, model_card
from hf_ilora.models.next_item.hub_upload import CARD_FILE, check_repo_id
from hf_ilora.models.next_item.saved_model import weights_fingerprint
from hf_ilora.publishing.measured import MeasuredTable, read_measured
from hf_ilora.publishing.publish import ModelFolder, check_folder
from hf_ilora_cli.shown_text import code_in_markdown, in_markdown, shareable_command

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def write_card(
    folder: str | Path,
    repo_id: str,
    *,
    dataset_name: str,
    license: str,
    dataset_ids: Sequence[str] = (),
    results: Sequence[str | Path] = (),
    row: str | None = None,
    protocol: dict | None = None,
    seeds_table: str | Path | None = None,
    revision: str | None = None,
    checked: ModelFolder | None = None,
    output_dir: str | Path | None = None,
) -> Path:
    """Write README.md into a model's folder, or into another one, with copies of the plots beside the results.

    If a Trainer pushes the same weights later, it keeps a card with results.

    Args:
        folder: a folder that `check_folder` accepts.
        repo_id: "user/name" of the model on the Hub.
        dataset_name: name of the data set on the card, such as "MovieLens-100K".
        license: licence of the weights by its name on the Hub, such as "apache-2.0".
        dataset_ids: names of the data sets on the Hub, "user/name", if they are published.
        results: results.json of `hf-ilora evaluate` and `hf-ilora evaluate-ilora`, or their folders.
        row: name or source of this model in the results; None if they have only one row.
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
            which is not overwritten.
    """
    check_repo_id(repo_id)
    _check_dataset_ids(dataset_ids)
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
        if card.is_file() and not is_untouched(card.read_text(encoding="utf-8")):
            raise ValueError(
                f"{card} was written or edited by hand: expected no card, or an unchanged one of hf_ilora; publish the "
                "card in the model's folder as it is (hf-ilora push --keep_card true), or move it away"
            )
    tables = [read_measured(Path(source), row, dataset_name) for source in results]
    for source, table in zip(results, tables, strict=True):
        _check_data(checked.run, str(source), table.context.data_fingerprint)
    measurements = _measurements(tables, checked.run, protocol, seeds_table)  # before a picture is copied
    card = model_card(
        checked.config,
        checked.catalogue,
        repo_id,
        revision,
        dataset_name=in_markdown(dataset_name),
        metadata={"license": license, "datasets": list(dataset_ids) or None}
        | _measured_metadata(tables, repo_id, dataset_name, dataset_ids),
        measured_weights=weights_fingerprint(folder) if measurements else None,
        measurements=measurements,
        pictures=_copied_pictures(tables, path.parent),
        popularity=" ".join(filter(None, (table.popularity for table in tables))),
        command=shareable_command(checked.run["command"]) if checked.run.get("command") else None,
        training=_training(checked.run, dataset_name, protocol),
        licence=f"Weights: {in_markdown(license)}. `items.parquet` contains titles and ids of "
        f"{in_markdown(dataset_name)}, whose terms apply to them.",
    )
    with written_whole(path) as unfinished:
        unfinished.write_text(str(card), encoding="utf-8")
    return path


def _check_dataset_ids(dataset_ids: Sequence[str]) -> None:
    for name in dataset_ids:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"dataset_ids contain {name!r}, which the Hub does not accept as a name ({error}): expected user/name"
            ) from error


def _check_data(run: dict, source: str, fingerprint: str) -> None:
    if run["data_fingerprint"] not in (None, fingerprint):
        raise ValueError(
            f"{source} was measured on data with fingerprint {fingerprint[:16]}: expected "
            f"{run['data_fingerprint'][:16]}, the data that the model was trained on; evaluate on that"
        )


def _measurements(
    tables: Sequence[MeasuredTable], run: dict, protocol: dict | None, seeds_table: str | Path | None
) -> str:
    """All measurements, in words and as tables; empty if there are none."""
    parts = [] if seeds_table is None else [_seeds_section(Path(seeds_table))]
    if tables:
        of_protocol = ""
        if protocol is not None:
            leak = LEAKS.get(protocol.get("name"))
            of_protocol = f"Protocol {in_markdown(protocol.get('name'))}."
            of_protocol += f" What training knows of the future and of other users: {leak}. " if leak else " "
        about = f"{of_protocol}One training run, with seed {in_markdown(run['seed'])}. "
        parts[:0] = [f"{about}In brackets: 95% intervals over users. {ABOUT_NDCG}", *(table.words for table in tables)]
        parts += [table.table.replace("# ", "### ", 1).strip() for table in tables]
    return "\n\n".join(parts)


def _measured_metadata(
    tables: Sequence[MeasuredTable], repo_id: str, dataset_name: str, dataset_ids: Sequence[str]
) -> dict[str, object]:
    results = {}
    for table in tables:
        of_table = eval_results(
            table.report.quality,
            dataset_name=dataset_name,
            dataset_id=dataset_ids[0] if dataset_ids else None,
            split=table.context.split,
            revision=table.context.data_fingerprint,
            num_candidates=table.context.num_candidates,
        )
        results |= {(result.dataset_split, result.metric_name): result for result in of_table}
    return {"model_name": repo_id.rpartition("/")[2], "eval_results": list(results.values())} if results else {}


def _copied_pictures(tables: Sequence[MeasuredTable], folder: Path) -> list[dict[str, str]]:
    """Copy the plots of the tables into the folder of the card; return the file and the text of each."""
    pictures = []
    for table in tables:
        if table.picture is not None:
            name = f"results-{len(pictures) + 1}.png"
            with written_whole(folder / name) as unfinished:
                shutil.copyfile(table.picture, unfinished)
            text = f"Plot of the results: {table.context.data}, {table.context.split} split"
            pictures.append({"text": in_markdown(text), "file": name})
    return pictures


def _seeds_section(path: Path) -> str:
    """The section with mean and standard deviation over seeds on the test split."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seeds, test = content["seeds"], content["test"]
        lines = [
            f"| {in_markdown(metric_name(name))} | {mean:.4f} ± {test['standard_deviation'][name]:.4f} |"
            for name, mean in test["mean"].items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of seeds ({error!r}): expected the JSON of experiments/seeds.py"
        ) from error
    header = f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(in_markdown, seeds))}), test split:"
    return "\n".join([f"### Over seeds\n\n{header}\n", "| metric | value |", "|---|---:|", *lines])


def _training(run: dict, dataset_name: str, protocol: dict | None) -> str:
    versions = ", ".join(f"{name} {run['versions'].get(name)}" for name in ("hf_ilora", "torch", "transformers"))
    facts = {"data": in_markdown(dataset_name)}
    facts |= {in_markdown(f"protocol: {name}"): in_markdown(value) for name, value in (protocol or {}).items()}
    facts |= {
        "data fingerprint": code_in_markdown(run["data_fingerprint"]),
        "seed": in_markdown(run["seed"]),
        "versions": in_markdown(versions),
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["All settings are in `run.json`.", "", "| | |", "|---|---|", *lines])
