"""Prepares MovieLens or your own table as a data set of sequences for the other recipes.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    python recipes/prepare_data.py --interactions plays.csv --user_column user --item_column song --time_column when \
        --items songs.csv --items_title_column name --output_dir outputs/songs/data

The recipe writes train, validation, test and items as parquet, and sequences.json with the settings, to the output
folder, and run.json and run.log to `<output_dir>_run`.
"""

import logging
from dataclasses import asdict, dataclass, field

from hf_ilora import build_sequences, load_interactions, load_movielens
from hf_ilora.data.sequences import checked_protocol
from hf_ilora.data.storage import FILES
from hf_ilora.files import check_replaceable
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer

logger = logging.getLogger(__name__)


@dataclass
class SourceArguments:
    """The source of the interactions: a MovieLens release, or your own table."""

    output_dir: str = field(metadata={"help": "folder to write the data set to"})
    movielens: str | None = field(
        default=None,
        metadata={
            "help": "release of MovieLens",
            "choices": ("ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m"),
        },
    )
    movielens_source: str | None = field(
        default=None, metadata={"help": "folder or zip of that release; by default the cache, else GroupLens"}
    )
    interactions: str | None = field(default=None, metadata={"help": "your own table: CSV, TSV, parquet or JSON lines"})
    user_column: str | None = field(default=None, metadata={"help": "column of user ids in your table"})
    item_column: str | None = field(default=None, metadata={"help": "column of item ids in your table"})
    time_column: str | None = field(
        default=None, metadata={"help": "column of times; by default the rows are in chronological order"}
    )
    title_column: str | None = field(default=None, metadata={"help": "column of titles in your table"})
    separator: str | None = field(
        default=None, metadata={"help": "character between the columns of your table; by default by the file type"}
    )
    items: str | None = field(default=None, metadata={"help": "your table of items, if titles are in a separate table"})
    items_item_column: str | None = field(
        default=None, metadata={"help": "column of item ids in the table of items; by default as item_column"}
    )
    items_title_column: str | None = field(default=None, metadata={"help": "column of titles in the table of items"})
    items_separator: str | None = field(
        default=None, metadata={"help": "character between the columns of the table of items, as separator"}
    )
    normalize_titles: bool = field(
        default=True,
        metadata={"help": "move a year at the end of a title to a separate column, and ', The' to the front"},
    )
    missing_titles: str = field(
        default="raise",
        metadata={
            "help": "what to do with items without a title: fail, or use the id as title",
            "choices": ("raise", "item_id"),
        },
    )
    limit_data_rows: int = field(
        default=-1, metadata={"help": "number of interactions to read, from the first; -1: all"}
    )

    def __post_init__(self):
        if (self.movielens is None) == (self.interactions is None):
            raise ValueError(
                f"movielens is {self.movielens!r} and interactions is {self.interactions!r}: expected exactly one"
            )
        if self.limit_data_rows < 1 and self.limit_data_rows != -1:
            raise ValueError(f"limit_data_rows is {self.limit_data_rows}: expected at least 1, or -1 for all")
        if self.interactions is not None and (self.user_column is None or self.item_column is None):
            raise ValueError("your own table needs --user_column and --item_column, the names of its columns of ids")


@dataclass
class SequenceArguments:
    """How to filter and split histories, see `build_sequences`."""

    protocol: str = field(
        default="leave_one_out",
        metadata={"help": "how histories are split", "choices": ("leave_one_out", "temporal_users", "cold_items")},
    )
    min_user_interactions: int = field(
        default=3, metadata={"help": "drop users with fewer interactions (k-core, together with min_item_interactions)"}
    )
    min_item_interactions: int = field(default=1, metadata={"help": "drop items with fewer interactions"})
    max_history: int | None = field(default=None, metadata={"help": "number of newest items to keep in a history"})
    min_history: int | None = field(default=None, metadata={"help": "drop rows with shorter histories"})
    num_candidates: int = field(
        default=20, metadata={"help": "candidates per evaluation row, including the target; 0: none"}
    )
    candidate_seed: int = field(default=0, metadata={"help": "random seed of the candidates"})
    drop_repeats: bool = field(default=False, metadata={"help": "keep only a user's first interaction with an item"})
    min_rating: float | None = field(default=None, metadata={"help": "ignore interactions with a lower rating"})
    order_users_by: str | None = field(
        default=None,
        metadata={"help": "temporal_users: the interaction that orders the users", "choices": ("first", "last")},
    )

    cold_share: float | None = field(
        default=None, metadata={"help": "cold_items: share of the items to take out of training; by default 0.1"}
    )
    cold_seed: int | None = field(
        default=None, metadata={"help": "cold_items: random seed that draws them; by default 0"}
    )

    def __post_init__(self):
        checked_protocol(**vars(self))


ARGUMENTS = (SourceArguments, SequenceArguments)


def main() -> None:
    source, settings = parse_arguments(ARGUMENTS)
    if source.interactions is not None and settings.min_rating is not None:
        raise ValueError("min_rating is for MovieLens only: drop the rows with low ratings from your table beforehand")
    check_replaceable(source.output_dir, FILES)
    # The data folder is replaced as a whole, so the record of the run is written to another folder.
    run_folder = f"{source.output_dir.rstrip('/')}_run"
    with sole_writer(run_folder):
        prepare(source, settings, run_folder)


def prepare(source: SourceArguments, settings: SequenceArguments, run_folder: str) -> None:
    """Read the interactions, build the data set and write it."""
    set_up_logging(run_folder)
    with RunRecord(run_folder, [source, settings], seed=settings.candidate_seed) as record:
        with record.stage("load"):
            interactions, items = load(source)
        logger.info("read %d interactions with %d items", len(interactions), len(items))
        with record.stage("build"):
            sequences = build_sequences(interactions, items, **asdict(settings))
        with record.stage("save"):
            sequences.save(source.output_dir)
        record.add_data(sequences.fingerprint)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in sequences.items())
    logger.info("wrote %s: %s rows, %d items", source.output_dir, sizes, sequences.num_items)


def load(source: SourceArguments):
    """The interactions and items of the source."""
    if source.movielens is not None:
        return load_movielens(source.movielens, source.limit_data_rows, source=source.movielens_source)
    return load_interactions(
        source.interactions,
        source.user_column,
        source.item_column,
        source.time_column,
        title_column=source.title_column,
        separator=source.separator,
        items=source.items,
        items_item_column=source.items_item_column,
        items_title_column=source.items_title_column,
        items_separator=source.items_separator,
        normalize_titles=source.normalize_titles,
        missing_titles=source.missing_titles,
        limit_data_rows=source.limit_data_rows,
    )


if __name__ == "__main__":
    run_main(main)
