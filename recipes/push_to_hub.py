"""Publishes a trained model on the Hub: weights, catalogue, tokenizer, run.json and a card with what was measured.

    hf auth login                                       # or export HF_TOKEN=...: a token with write access
    python recipes/push_to_hub.py --model outputs/ml-100k/seeds/seed-1 --repo_id user/sasrec-ml-100k --private true \
        --dataset_name MovieLens-100K --license apache-2.0 --data_dir outputs/ml-100k/data \
        --results outputs/ml-100k/evaluation --row "SASRec, seed 1" --seeds_table docs/results/ml-100k.json

Everything arrives in one commit or not at all, so `from_pretrained("user/name")` never sees half a model; after a
failure the same command may be given again. With `--output_dir` all of it, the card too, is written to that folder;
nothing is sent, and the model's folder stays as it is.

The catalogue holds the titles and ids of the data set: publish it only where the data's licence allows that (MovieLens'
does not without permission), or keep the repository private. run.json shows the settings of the run, folder names too.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora.data.storage import read_description
from hf_ilora.files import written_whole
from hf_ilora.models.next_item.hub_upload import CARD_FILE
from hf_ilora.publishing import check_folder, push_folder, write_card
from hf_ilora.runs import parse_arguments, run_main

logger = logging.getLogger(__name__)


@dataclass
class PublishArguments:
    """What to publish, where to, and what its card says."""

    model: str = field(metadata={"help": "folder of a finished run"})
    repo_id: str = field(metadata={"help": "user/name on the Hub"})
    dataset_name: str = field(metadata={"help": "what the card calls the data, such as MovieLens-100K"})
    license: str = field(metadata={"help": "of the weights, as the Hub names it, such as apache-2.0"})
    results: list[str] = field(
        default_factory=list, metadata={"help": "results.json of evaluate_models.py and evaluate_ilora.py, or folders"}
    )
    row: str | None = field(default=None, metadata={"help": "the model's row in the results: its name or its source"})
    data_dir: str | None = field(default=None, metadata={"help": "the data set, for the protocol on the card"})
    seeds_table: str | None = field(
        default=None, metadata={"help": "JSON of experiments/seeds.py, for the mean over seeds"}
    )
    run_file: str | None = field(default=None, metadata={"help": "run.json, when it is not in the model's folder"})
    llm_name: str | None = field(
        default=None, metadata={"help": "iLoRA: the language model on the Hub, when config.json names a folder"}
    )
    llm_revision: str | None = field(default=None, metadata={"help": "iLoRA: commit of --llm_name"})
    keep_card: bool = field(default=False, metadata={"help": "publish the README.md of the folder as it is"})
    private: bool | None = field(
        default=None, metadata={"help": "make a new repository private; by default as the Hub's setting says"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch; made when it does not exist"})
    commit_message: str | None = field(default=None, metadata={"help": "of the commit"})
    parent_commit: str | None = field(default=None, metadata={"help": "fail unless the branch stands at this commit"})
    output_dir: str | None = field(
        default=None, metadata={"help": "folder to write all that would be sent to, instead of sending it"}
    )

    def __post_init__(self):
        if self.llm_revision is not None and self.llm_name is None:
            raise ValueError("llm_revision is given without llm_name: expected both, or neither")
        ignored = [name for name in ("results", "row", "seeds_table", "data_dir") if vars(self)[name]]
        if self.keep_card and ignored:
            raise ValueError(
                f"keep_card is true and {', '.join(ignored)} given: expected none of what a new card would show; leave "
                "it out, or move the README.md of the folder away and leave keep_card out"
            )


ARGUMENTS = (PublishArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    checks = {"run_file": arguments.run_file, "llm_name": arguments.llm_name, "llm_revision": arguments.llm_revision}
    checked = check_folder(arguments.model, **checks)
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
            results=arguments.results,
            row=arguments.row,
            protocol=protocol,
            seeds_table=arguments.seeds_table,
            revision=arguments.revision,
            checked=checked,
            output_dir=arguments.output_dir,
        )
        logger.info("wrote %s", card)
        checked.files[CARD_FILE] = card
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
