"""Converts the published rows of LLaRA and iLoRA, and the authors' SASRec, to a data set and a model of hf_ilora.

    python recipes/prepare_reference_data.py recipes/configs/reference-lastfm/data.yaml --source data/llara_lastfm
    python recipes/prepare_reference_data.py recipes/configs/reference-movielens/data.yaml --source data/llara_movielens

The source folder contains validation.parquet and test.parquet (history, target and 20 fixed candidates), items.parquet
(item_id from 0, title) and train.parquet. MovieLens was published without train rows: `--train_from ml-100k` rebuilds
them from MovieLens-100K by LLaRA's protocol. The recipe writes data/ (a `SequenceDatasets`), sasrec/ (for
`from_pretrained`, with the same catalogue), run.json and run.log to the output folder.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora import SequenceDatasets, build_sequences, convert_reference_sasrec, load_movielens
from hf_ilora.data.storage import FILES
from hf_ilora.files import check_replaceable
from hf_ilora.reference.convert_models import load_reference_state_dict, reference_catalogue
from hf_ilora.reference.published_sequences import load_published_sequences
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import check_at_least_one

logger = logging.getLogger(__name__)


@dataclass
class ReferenceDataArguments:
    """The published files and the folder to write to."""

    source: str = field(metadata={"help": "folder of the published parquet files"})
    output_dir: str = field(metadata={"help": "folder to write data/ and sasrec/ to"})
    train_from: str = field(
        default="published",
        metadata={
            "help": "train rows: from train.parquet, or rebuilt from MovieLens-100K",
            "choices": ("published", "ml-100k"),
        },
    )
    movielens_source: str | None = field(
        default=None, metadata={"help": "folder or zip of ml-100k; by default the cache or GroupLens"}
    )
    min_history: int = field(default=3, metadata={"help": "drop train rows with shorter histories"})
    max_history: int = field(default=10, metadata={"help": "number of newest items to keep in a history"})
    sasrec: str | None = field(
        default=None,
        metadata={"help": "the authors' SASRec weights, .safetensors or .pt; by default, sasrec/ is not written"},
    )

    def __post_init__(self):
        check_at_least_one(self, "min_history", "max_history")
        if self.max_history < self.min_history:
            raise ValueError(
                f"max_history is {self.max_history} and min_history {self.min_history}: expected max_history to be at "
                "least min_history"
            )


ARGUMENTS = (ReferenceDataArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    output = Path(arguments.output_dir)
    with sole_writer(output):
        prepare(arguments, output)


def prepare(arguments: ReferenceDataArguments, output: Path) -> None:
    """Convert rows and weights, and write them."""
    check_replaceable(output / "data", FILES)
    set_up_logging(output)
    with RunRecord(output, [arguments], seed=0) as record:
        with record.stage("data"):
            rebuilt = rebuilt_movielens(arguments) if arguments.train_from == "ml-100k" else None
            sequences = load_published_sequences(
                arguments.source,
                rebuilt=rebuilt,
                min_history=arguments.min_history,
                max_history=arguments.max_history,
            )
            sequences.save(output / "data")
        record.add_data(sequences.fingerprint)
        if arguments.sasrec is not None:
            with record.stage("sasrec"):
                model = convert_reference_sasrec(load_reference_state_dict(arguments.sasrec))
                model.catalogue = reference_catalogue(output / "data" / "items.parquet", model.config.num_items)
                model.save_pretrained(output / "sasrec")
    sizes = ", ".join(f"{name} {len(split)}" for name, split in sequences.items())
    logger.info("wrote %s: %s rows, %d items", output, sizes, sequences.num_items)


def rebuilt_movielens(arguments: ReferenceDataArguments) -> SequenceDatasets:
    """MovieLens-100K by LLaRA's protocol: ratings of 3 or more; the first 80% of the users in time are for training."""
    return build_sequences(
        *load_movielens("ml-100k", source=arguments.movielens_source),
        protocol="temporal_users",
        min_rating=3,
        min_history=arguments.min_history,
        max_history=arguments.max_history,
        num_candidates=0,
    )


if __name__ == "__main__":
    run_main(main)
