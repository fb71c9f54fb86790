"""Prepares MovieLens, another public data set or your own table as a data set of sequences for the other recipes.

    python recipes/prepare_data.py recipes/configs/ml-100k/data.yaml
    python recipes/prepare_data.py --dataset amazon-2014 --path downloads --min_item_interactions 5 \
        --min_user_interactions 5 --missing_titles item_id --output_dir outputs/beauty/data
    python recipes/prepare_data.py --interactions plays.csv --user_column user --item_column song --time_column when \
        --items songs.csv --items_title_column name --output_dir outputs/songs/data

The recipe writes train, validation, test and items as parquet, and sequences.json with the settings, to the output
folder, and run.json and run.log to `<output_dir>_run`.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_ilora import build_sequences, load_interactions, load_movielens, load_public_dataset
from hf_ilora.data.movielens import MOVIELENS
from hf_ilora.data.protocol_settings import PROTOCOLS, USER_ORDERS, checked_protocol
from hf_ilora.data.public_datasets import PUBLIC_DATASETS, RATED
from hf_ilora.data.storage import FILES
from hf_ilora.files import check_replaceable
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer

logger = logging.getLogger(__name__)


@dataclass
class SourceArguments:
    """The source of the interactions: a MovieLens release, another public data set, or your own table."""

    output_dir: str = field(metadata={"help": "folder to write the data set to"})
    movielens: str | None = field(
        default=None,
        metadata={"help": "release of MovieLens", "choices": MOVIELENS},
    )
    movielens_source: str | None = field(
        default=None, metadata={"help": "folder or zip of that release; by default the cache, else GroupLens"}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "another public data set, from its published files", "choices": PUBLIC_DATASETS}
    )
    path: str | None = field(
        default=None, metadata={"help": "folder of the files of that data set, or its file of interactions"}
    )
    interactions: str | None = field(
        default=None, metadata={"help": "your own table: CSV, TSV, RecBole's .inter, parquet or JSON lines"}
    )
    user_column: str | None = field(default=None, metadata={"help": "column of user ids in your table"})
    item_column: str | None = field(default=None, metadata={"help": "column of item ids in your table"})
    time_column: str | None = field(
        default=None, metadata={"help": "column of times; by default the rows are in chronological order"}
    )
    title_column: str | None = field(default=None, metadata={"help": "column of titles in your table"})
    rating_column: str | None = field(
        default=None, metadata={"help": "column of ratings in your table, for min_rating"}
    )
    separator: str | None = field(
        default=None,
        metadata={"help": "characters between the columns of your table, such as '::'; by default by the file type"},
    )
    column_names: list[str] | None = field(
        default=None, metadata={"help": "names of all columns of your table, if its first line is a row"}
    )
    items: str | None = field(
        default=None,
        metadata={
            "help": "your table of items, if titles are in a separate table; with --dataset, the file of titles, if it "
            "is not beside that of interactions"
        },
    )
    items_item_column: str | None = field(
        default=None, metadata={"help": "column of item ids in the table of items; by default as item_column"}
    )
    items_title_column: str | None = field(default=None, metadata={"help": "column of titles in the table of items"})
    items_separator: str | None = field(
        default=None, metadata={"help": "characters between the columns of the table of items, as separator"}
    )
    items_column_names: list[str] | None = field(
        default=None, metadata={"help": "names of all columns of the table of items, as column_names"}
    )
    metadata_columns: list[str] | None = field(
        default=None,
        metadata={"help": "further columns of the table of items to keep in the catalogue, such as price and url"},
    )
    normalize_titles: bool = field(
        default=True,
        metadata={
            "help": "your own table: move a year at the end of a title to a separate column, and ', The' to the front"
        },
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
    work_dir: str | None = field(
        default=None,
        metadata={
            "help": "for a parquet file or folder that does not fit in memory: folder for temporary files, about 70 "
            "bytes for each interaction"
        },
    )

    def __post_init__(self):
        sources = {name: vars(self)[name] for name in ("movielens", "dataset", "interactions")}
        if sum(source is not None for source in sources.values()) != 1:
            given = ", ".join(f"{name} is {source!r}" for name, source in sources.items())
            raise ValueError(f"{given}: expected exactly one")
        if (self.dataset is None) != (self.path is None):
            raise ValueError(f"dataset is {self.dataset!r} and path is {self.path!r}: expected both or neither")
        if self.limit_data_rows < 1 and self.limit_data_rows != -1:
            raise ValueError(f"limit_data_rows is {self.limit_data_rows}: expected at least 1, or -1 for all")
        if self.interactions is not None and (self.user_column is None or self.item_column is None):
            raise ValueError("your own table needs --user_column and --item_column, the names of its columns of ids")
        if self.work_dir is not None and self.interactions is None:
            raise ValueError(
                f"work_dir is {self.work_dir!r} without interactions: expected --interactions, a parquet file or a "
                "folder of parts; leave it out for MovieLens and other public data sets"
            )


@dataclass
class SequenceArguments:
    """How to filter and split histories, see `build_sequences`."""

    protocol: str = field(
        default="leave_one_out",
        metadata={"help": "how histories are split; docs/data.md says what each one leaks", "choices": PROTOCOLS},
    )
    min_user_interactions: int | None = field(
        default=None,
        metadata={
            "help": "drop users with fewer interactions (k-core, together with min_item_interactions); by default 3, "
            "or as many as last_n needs"
        },
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
        metadata={"help": "temporal_users: the interaction that orders the users", "choices": USER_ORDERS},
    )
    cold_share: float | None = field(
        default=None, metadata={"help": "cold_items: share of the items to take out of training; by default 0.1"}
    )
    cold_seed: int | None = field(
        default=None, metadata={"help": "cold_items: random seed that draws them; by default 0"}
    )
    num_targets: int | None = field(
        default=None, metadata={"help": "last_n: items of each user in test, and in validation; by default 5"}
    )
    test_share: float | None = field(
        default=None,
        metadata={
            "help": "global_time, time_folds, random: share of the interactions in test, and in validation; by default "
            "0.1"
        },
    )
    validation_start: str | None = field(
        default=None,
        metadata={
            "help": "global_time: when validation begins, instead of test_share: a time such as 2018-01-31, or seconds "
            "since 1970"
        },
    )
    test_start: str | None = field(
        default=None, metadata={"help": "global_time: when test begins, as validation_start"}
    )
    num_folds: int | None = field(default=None, metadata={"help": "time_folds: number of folds; by default 3"})
    fold: int | None = field(
        default=None, metadata={"help": "time_folds: which fold to prepare, 1 (the oldest) to num_folds"}
    )
    split_seed: int | None = field(
        default=None, metadata={"help": "random: random seed that draws the targets; by default 0"}
    )

    def __post_init__(self):
        checked_protocol(**vars(self))


ARGUMENTS = (SourceArguments, SequenceArguments)


def main() -> None:
    source, settings = parse_arguments(ARGUMENTS)
    if settings.min_rating is not None:
        if source.interactions is not None and source.rating_column is None:
            raise ValueError("min_rating needs the ratings of your table: pass --rating_column")
        if source.dataset is not None and source.dataset not in RATED:
            raise ValueError(f"min_rating is given for {source.dataset}, which has no ratings: leave it out")
    check_replaceable(source.output_dir, FILES)
    # The data folder is replaced as a whole, so the record of the run is written to another folder.
    run_folder = f"{source.output_dir.rstrip('/')}_run"
    with sole_writer(run_folder):
        prepare(source, settings, run_folder)


def prepare(source: SourceArguments, settings: SequenceArguments, run_folder: str) -> None:
    """Read the interactions, build the data set and write it."""
    set_up_logging(run_folder)
    with (
        RunRecord(run_folder, [source, settings], seed=settings.candidate_seed) as record,
        temporary_folder(source.work_dir) as work_dir,
    ):
        with record.stage("load"):
            interactions, items = load(source, work_dir)
        logger.info("read %d interactions with %d items", len(interactions), len(items))
        with record.stage("build"):
            sequences = build_sequences(interactions, items, **asdict(settings), work_dir=work_dir)
        with record.stage("save"):
            sequences.save(source.output_dir)
        record.add_data(sequences.fingerprint)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in sequences.items())
    logger.info("wrote %s: %s rows, %d items", source.output_dir, sizes, sequences.num_items)


@contextmanager
def temporary_folder(work_dir: str | None) -> Iterator[str | None]:
    """A folder in `work_dir` that is deleted at the end; None for None."""
    if work_dir is None:
        yield None
        return
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=work_dir) as folder:
        yield folder


def load(source: SourceArguments, work_dir: str | None):
    """The interactions and items of the source."""
    if source.movielens is not None:
        return load_movielens(source.movielens, source.limit_data_rows, source=source.movielens_source)
    if source.dataset is not None:
        return load_public_dataset(
            source.dataset,
            source.path,
            source.limit_data_rows,
            items=source.items,
            missing_titles=source.missing_titles,
        )
    return load_interactions(
        source.interactions,
        source.user_column,
        source.item_column,
        source.time_column,
        title_column=source.title_column,
        rating_column=source.rating_column,
        separator=source.separator,
        column_names=source.column_names,
        items=source.items,
        items_item_column=source.items_item_column,
        items_title_column=source.items_title_column,
        items_separator=source.items_separator,
        items_column_names=source.items_column_names,
        metadata_columns=source.metadata_columns,
        normalize_titles=source.normalize_titles,
        missing_titles=source.missing_titles,
        limit_data_rows=source.limit_data_rows,
        work_dir=work_dir,
    )


if __name__ == "__main__":
    run_main(main)
