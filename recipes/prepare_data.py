"""Turns MovieLens or your own table into the sequences that everything else reads.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    python recipes/prepare_data.py --interactions plays.csv --user_column user --item_column song --time_column when \
        --items songs.csv --items_title_column name --output_dir outputs/songs/data

The output folder holds train, validation, test and items as parquet, and sequences.json with the settings. The recipe
writes run.json and run.log to `<output_dir>_run`.
"""

import logging
from dataclasses import asdict, dataclass, field

from hf_ilora import build_sequences, load_interactions, load_movielens
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class SourceArguments:
    """Where the interactions come from: a MovieLens release, or a table of your own."""

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
    interactions: str | None = field(default=None, metadata={"help": "own table: CSV, TSV, parquet or JSON lines"})
    user_column: str | None = field(default=None, metadata={"help": "column of user ids in the own table"})
    item_column: str | None = field(default=None, metadata={"help": "column of item ids in the own table"})
    time_column: str | None = field(
        default=None, metadata={"help": "column of times; none: the rows are in order of time already"}
    )
    title_column: str | None = field(default=None, metadata={"help": "column of titles in the own table"})
    items: str | None = field(default=None, metadata={"help": "own table of items, when titles stand apart"})
    items_item_column: str | None = field(default=None, metadata={"help": "column of item ids in the table of items"})
    items_title_column: str | None = field(default=None, metadata={"help": "column of titles in the table of items"})
    normalize_titles: bool = field(
        default=True, metadata={"help": "move a year at the end of a title to its own column, and ', The' to the front"}
    )
    missing_titles: str = field(
        default="raise",
        metadata={
            "help": "what to do with items without a title: fail, or use the id as title",
            "choices": ("raise", "item_id"),
        },
    )
    limit_data_rows: int = field(default=-1, metadata={"help": "read only the first so many interactions; -1: all"})

    def __post_init__(self):
        if (self.movielens is None) == (self.interactions is None):
            raise ValueError(
                f"movielens is {self.movielens!r} and interactions is {self.interactions!r}: expected exactly one"
            )
        if self.interactions is not None and (self.user_column is None or self.item_column is None):
            raise ValueError("an own table needs --user_column and --item_column, the names of its columns of ids")


@dataclass
class SequenceArguments:
    """How histories are filtered and split; see `build_sequences`."""

    protocol: str = field(
        default="leave_one_out",
        metadata={"help": "how histories are split", "choices": ("leave_one_out", "temporal_users")},
    )
    min_user_interactions: int = field(default=3, metadata={"help": "drop users with fewer, with the next: k-core"})
    min_item_interactions: int = field(default=1, metadata={"help": "drop items with fewer"})
    max_history: int | None = field(default=None, metadata={"help": "newest items kept per history"})
    min_history: int | None = field(default=None, metadata={"help": "drop rows with shorter histories"})
    num_candidates: int = field(default=20, metadata={"help": "items per evaluation row, target included; 0: none"})
    candidate_seed: int = field(default=0, metadata={"help": "random seed for the candidates"})
    drop_repeats: bool = field(default=False, metadata={"help": "keep a user's first interaction with an item only"})
    min_rating: float | None = field(default=None, metadata={"help": "ignore interactions with a lower rating"})
    order_users_by: str | None = field(
        default=None,
        metadata={"help": "temporal_users: the interaction that orders the users", "choices": ("first", "last")},
    )


ARGUMENTS = (SourceArguments, SequenceArguments)


def main() -> None:
    source, settings = parse_arguments(ARGUMENTS)
    if source.interactions is not None and settings.min_rating is not None:
        raise ValueError("min_rating with an own table: expected MovieLens; drop the rows with low ratings beforehand")
    # The data folder is replaced as a whole, so the record of the run stands beside it.
    run_folder = f"{source.output_dir.rstrip('/')}_run"
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
    """Interactions and items of the source that was asked for."""
    if source.movielens is not None:
        return load_movielens(source.movielens, source.limit_data_rows, source=source.movielens_source)
    return load_interactions(
        source.interactions,
        source.user_column,
        source.item_column,
        source.time_column,
        title_column=source.title_column,
        items=source.items,
        items_item_column=source.items_item_column,
        items_title_column=source.items_title_column,
        normalize_titles=source.normalize_titles,
        missing_titles=source.missing_titles,
        limit_data_rows=source.limit_data_rows,
    )


if __name__ == "__main__":
    run_main(main)
