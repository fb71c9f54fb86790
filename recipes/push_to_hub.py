"""Publishes a trained model on the Hub: weights, catalogue, tokenizer, run.json and a card with measured results.

    hf auth login                                       # or export HF_TOKEN=..., a token with write access
    python recipes/push_to_hub.py --model outputs/ml-100k/seeds/seed-1 --repo_id user/sasrec-ml-100k --private true \
        --dataset_name MovieLens-100K --license apache-2.0 --data_dir outputs/ml-100k/data \
        --results outputs/ml-100k/evaluation --row "SASRec, seed 1" --seeds_table docs/results/ml-100k.json

The recipe sends all files in one commit, so that `from_pretrained("user/name")` never sees half a model; after a
failure, run the same command again. With `--output_dir` it writes all files, including the card, to that folder
instead, sends nothing, and leaves the model's folder unchanged.

The catalogue contains titles and ids of the data set. Publish it only if the licence of the data allows that (the
licence of MovieLens requires permission), or make the repository private. run.json shows the settings of the run;
absolute paths in it are cut to their last part.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora.data.storage import read_description
from hf_ilora.files import written_whole
from hf_ilora.publishing import card_files, check_folder, push_folder, write_card
from hf_ilora.runs import parse_arguments, run_main

logger = logging.getLogger(__name__)


@dataclass
class PublishArguments:
    """The model, the repository, and the contents of the card."""

    model: str = field(metadata={"help": "folder of a finished run"})
    repo_id: str = field(metadata={"help": "user/name on the Hub"})
    dataset_name: str = field(metadata={"help": "name of the data set on the card, such as MovieLens-100K"})
    license: str = field(metadata={"help": "licence of the weights by its name on the Hub, such as apache-2.0"})
    dataset_ids: list[str] = field(
        default_factory=list, metadata={"help": "names of the data sets on the Hub, user/name, if they are there"}
    )
    results: list[str] = field(
        default_factory=list,
        metadata={
            "help": "measured results for the card: results.json files of evaluate and evaluate-ilora, or their folders"
        },
    )
    row: str | None = field(default=None, metadata={"help": "row of the model in the results, by its name or source"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of the data set, whose protocol the card shows"}
    )
    seeds_table: str | None = field(
        default=None, metadata={"help": "JSON table of experiments/seeds.py, whose mean over seeds the card shows"}
    )
    run_file: str | None = field(default=None, metadata={"help": "run.json, if it is not in the folder of the model"})
    llm_name: str | None = field(
        default=None, metadata={"help": "iLoRA: Hub name of the language model, if config.json names a folder"}
    )
    llm_revision: str | None = field(default=None, metadata={"help": "iLoRA: commit of --llm_name"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "iLoRA: run code that comes with the tokenizer, to check it"}
    )
    keep_card: bool = field(default=False, metadata={"help": "publish the README.md of the folder unchanged"})
    private: bool | None = field(
        default=None, metadata={"help": "make a new repository private; by default as set on the Hub"}
    )
    revision: str | None = field(
        default=None, metadata={"help": "branch, created if it does not exist; by default main"}
    )
    commit_message: str | None = field(default=None, metadata={"help": "commit message"})
    parent_commit: str | None = field(
        default=None, metadata={"help": "commit that the branch must be at; otherwise the command fails"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder to write the files to, instead of sending them"}
    )

    def __post_init__(self):
        if self.llm_revision is not None and self.llm_name is None:
            raise ValueError("llm_revision is given without llm_name: expected both, or neither")
        if self.output_dir is not None and Path(self.output_dir).is_file():
            raise ValueError(f"output_dir {self.output_dir} is a file: expected a folder; choose another")
        ignored = [name for name in ("dataset_ids", "results", "row", "seeds_table", "data_dir") if vars(self)[name]]
        if self.keep_card and ignored:
            raise ValueError(
                f"keep_card is true and {', '.join(ignored)} given: expected no settings of a new card with it; leave "
                "them out, or move the README.md of the folder away and leave keep_card out"
            )


ARGUMENTS = (PublishArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checks = {"run_file": arguments.run_file, "llm_name": arguments.llm_name, "llm_revision": arguments.llm_revision}
    checked = check_folder(arguments.model, **checks, trust_remote_code=arguments.trust_remote_code)
    if not arguments.keep_card:
        protocol = None
        if arguments.data_dir is not None:
            description = read_description(Path(arguments.data_dir))
            if checked.run["data_fingerprint"] not in (None, description["fingerprint"]):
                raise ValueError(
                    f"{arguments.data_dir} has fingerprint {description['fingerprint'][:16]}: expected "
                    f"{checked.run['data_fingerprint'][:16]}, the data that the model was trained on"
                )
            protocol = description["protocol"]
        card = write_card(
            arguments.model,
            arguments.repo_id,
            dataset_name=arguments.dataset_name,
            license=arguments.license,
            dataset_ids=arguments.dataset_ids,
            results=arguments.results,
            row=arguments.row,
            protocol=protocol,
            seeds_table=arguments.seeds_table,
            revision=arguments.revision,
            checked=checked,
            output_dir=arguments.output_dir,
        )
        logger.info("wrote %s", card)
        checked.files.update(card_files(card))
    if arguments.output_dir is not None:
        output = Path(arguments.output_dir)
        for name, content in checked.files.items():
            with written_whole(output / name) as path:
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    shutil.copyfile(content, path)
        logger.info("wrote %s: %s", output, ", ".join(sorted(checked.files)))
        return
    commit = push_folder(
        checked,
        arguments.repo_id,
        commit_message=arguments.commit_message,
        private=arguments.private,
        revision=arguments.revision,
        parent_commit=arguments.parent_commit,
    )
    logger.info("%s: %s", commit.commit_url, ", ".join(sorted(checked.files)))


if __name__ == "__main__":
    run_main(main)
