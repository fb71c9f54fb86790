"""Publishes a data set of sequences or a teacher's labels on the Hub, with a card.

    hf auth login                                       # or export HF_TOKEN=..., a token with write access
    python recipes/push_data_to_hub.py --folder outputs/songs/data --repo_id user/songs --license cc-by-4.0
    python recipes/push_data_to_hub.py --folder outputs/songs/labels --repo_id user/songs-labels --dataset user/songs

`SequenceDatasets.load("user/songs")` and `TeacherLabels.load("user/songs-labels", ...)` read what the recipe published,
and so does `datasets.load_dataset("user/songs", "sequences")`, without hf_ilora. After a failure, run the same command
again: files that have arrived are not sent twice.

A data set records the public data that it was made from. Data whose licence forbids publication or sets conditions,
such as MovieLens, are refused unless `--allow_restricted_license true` is given.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora import SequenceDatasets, TeacherLabels
from hf_ilora.distillation.teacher_labels import DESCRIPTION_FILE, read_description
from hf_ilora.runs import parse_arguments, run_main

logger = logging.getLogger(__name__)


@dataclass
class PublishDataArguments:
    """The data and the repository."""

    folder: str = field(metadata={"help": "folder of a prepared data set, or of finished labels"})
    repo_id: str = field(metadata={"help": "user/name on the Hub"})
    license: str | None = field(
        default=None,
        metadata={
            "help": "licence of the published data, by its name on the Hub, such as cc-by-4.0; by default that of the "
            "public data that the data set was made from"
        },
    )
    allow_restricted_license: bool = field(
        default=False,
        metadata={"help": "publish data although their licence forbids it or sets conditions: you have permission"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "labels: name on the Hub of the data set that they are about, for the card"}
    )
    private: bool | None = field(
        default=None, metadata={"help": "make a new repository private; by default as set on the Hub"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "branch, created if it does not exist; by default main"}
    )
    commit_message: str | None = field(default=None, metadata={"help": "commit message"})


ARGUMENTS = (PublishDataArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(arguments.folder)
    are_labels = (folder / DESCRIPTION_FILE).is_file()
    if arguments.dataset is not None and not are_labels:
        raise ValueError(
            f"dataset is given and {folder} has no {DESCRIPTION_FILE}: expected a folder of labels; leave dataset out"
        )
    settings = {"license": arguments.license, "private": arguments.private, "revision": arguments.revision}
    settings["commit_message"] = arguments.commit_message
    if are_labels:
        description = read_description(folder)
        split = description.get("split", "train")
        labels = TeacherLabels.load(folder, description["data_fingerprint"], split=split)
        commit = labels.push_to_hub(arguments.repo_id, dataset=arguments.dataset, **settings)
    else:
        allowed = arguments.allow_restricted_license
        sequences = SequenceDatasets.load(folder)
        commit = sequences.push_to_hub(arguments.repo_id, allow_restricted_license=allowed, **settings)
    logger.info("%s", commit.commit_url)


if __name__ == "__main__":
    run_main(main)
