"""Recommends items to one user (a user id, a history, liked titles or a new user), to a table of users or to all users
of a data set.

    python recipes/recommend.py --model outputs/ml-100k/sasrec --data_dir outputs/ml-100k/data --user 1
    python recipes/recommend.py --model outputs/ml-100k/sasrec --history 50 172 181 --format json
    python recipes/recommend.py --model outputs/ml-100k/sasrec --liked "Star Wars" "a comedy about a wedding"
    python recipes/recommend.py --model outputs/ml-100k/sasrec --similar_to 50
    python recipes/recommend.py --model outputs/ml-100k/sasrec
    python recipes/recommend.py --model outputs/ml-100k/sasrec --data_dir outputs/ml-100k/data --all_users true \
        --output recommendations.parquet
    python recipes/recommend.py --model outputs/songs/sasrec --table plays.csv --user_column user --item_column song \
        --time_column when --output recommendations.parquet

A liked title that is not in the catalogue is replaced by the five items with the most similar titles. Without a user,
history or titles, the most popular items are printed. Recommendations to many users are written to the parquet file
`output`, or printed if there is none. To resume after a crash, run the same command again. Several processes
(`hf-ilora recommend --num_processes 4`, or accelerate launch) divide the users among themselves.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_ilora import Catalogue, ILoraForRecommendation, ItemTitles, SequenceDatasets, recommend_all
from hf_ilora.devices import process_state
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.serving.history_tables import UNKNOWN_ITEMS, every_user
from hf_ilora.serving.recommend_all import ANSWER_COLUMNS, check_columns, recommendations_table
from hf_ilora.serving.shown_recommendations import FORMS, recommendation_lines, title_lines
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER
from hf_ilora_cli.shown_text import shown


@dataclass
class RecommendArguments:
    """The model, and the user, history or titles to recommend for."""

    model: str = field(metadata={"help": "folder or Hub name of a saved model with a catalogue"})
    data_dir: str | None = field(
        default=None, metadata={"help": "prepared data set with the users, or with the popularity of items"}
    )
    user: str | None = field(default=None, metadata={"help": "raw user id in the data set"})
    history: list[str] | None = field(default=None, metadata={"help": "raw item ids, oldest first"})
    liked: list[str] | None = field(default=None, metadata={"help": "titles that the user likes, or any texts"})
    similar_to: list[str] | None = field(
        default=None, metadata={"help": "raw item ids: print the items that are most similar to each of them"}
    )
    title_encoder: str = field(
        default=EMBEDDED_ENCODER, metadata={"help": "encoder of titles, for liked; see encode_titles"}
    )
    top_k: int = field(default=10, metadata={"help": "number of recommendations"})
    exclude_seen: bool = field(
        default=True, metadata={"help": "leave out the items of a history; set to false for data with repeats"}
    )
    allowed_items: list[str] | None = field(
        default=None, metadata={"help": "raw item ids, the only ones to choose from; by default all"}
    )
    excluded_items: list[str] | None = field(default=None, metadata={"help": "raw item ids to leave out"})
    format: str = field(
        default="titles",
        metadata={"help": "what to print: titles to read, a table with tabs, or JSON lines", "choices": FORMS},
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "columns of the catalogue to add; by default the title and further ones, such as a price"},
    )
    shown: int = field(default=5, metadata={"help": "number of newest items of the history to print with titles"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the title encoder or the language model of an iLoRA"}
    )

    def __post_init__(self):
        names = ("user", "history", "liked", "similar_to")
        self.given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if len(self.given) > 1:
            raise ValueError(f"{' and '.join(self.given)} are given: expected one of them, or none for popular items")
        if self.user is not None and self.data_dir is None:
            raise ValueError("--user is given without --data_dir: expected the prepared data set with the user")
        if self.shown < 1:
            raise ValueError(f"shown is {self.shown}: expected at least 1")


@dataclass
class UsersArguments:
    """Many users, and where their recommendations go."""

    all_users: bool = field(default=False, metadata={"help": "recommend to every user of data_dir"})
    table: str | None = field(
        default=None,
        metadata={"help": "table with a row per user or, with item_column, per interaction (parquet, CSV, JSON lines)"},
    )
    output: str | None = field(default=None, metadata={"help": "parquet file to write; by default, print"})
    user_column: str = field(default="user_id", metadata={"help": "column of user ids in the tables"})
    history_column: str = field(
        default="history",
        metadata={"help": "column of histories, oldest item first: lists of raw ids, or text with blanks between them"},
    )
    item_column: str | None = field(default=None, metadata={"help": "column of raw item ids, of interactions"})
    time_column: str | None = field(
        default=None, metadata={"help": "column of times, of interactions; by default rows are in order"}
    )
    separator: str | None = field(default=None, metadata={"help": "character between the columns of CSV or TSV"})
    unknown_items: str = field(
        default="raise",
        metadata={"help": "what to do about items of histories that the model does not know", "choices": UNKNOWN_ITEMS},
    )
    allowed_table: str | None = field(
        default=None,
        metadata={"help": "table of users and items (item_column, by default item_id): the only ones of each user"},
    )
    excluded_table: str | None = field(
        default=None, metadata={"help": "table of users and items, in the same form, to leave out"}
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "users per call of the model; by default 256 on a CPU, 2048 on a GPU, 8 for an iLoRA"},
    )

    def __post_init__(self):
        if self.all_users and self.table is not None:
            raise ValueError("--all_users and --table are given: expected one of them")
        for name in ("output", "allowed_table", "excluded_table", "item_column", "time_column"):
            if not self.many and getattr(self, name) is not None:
                raise ValueError(f"--{name} is given for one user: expected it with --table or --all_users true")

    @property
    def many(self) -> bool:
        return self.all_users or self.table is not None


ARGUMENTS = (RecommendArguments, UsersArguments)


def history_of_user(sequences: SequenceDatasets, data_dir: str, user: str) -> list[int]:
    """All items that the data set knows of a user, oldest first, targets included."""
    table = every_user(sequences)
    by_name = {str(raw): row for row, raw in enumerate(table["user_id"].to_pylist())}
    user = user if user in by_name else user.strip()
    if user not in by_name:
        raise ValueError(
            f"user {user} is not in {data_dir}: expected one of its {len(by_name)} users, such as {next(iter(by_name))}"
        )
    return table["history"][by_name[user]].as_py()


def raw_ids_of(words: list[str] | None, catalogue: Catalogue) -> list[int] | list[str] | None:
    """Words of a command line as the raw ids that the catalogue has."""
    if words is None:
        return None
    known = {str(raw): raw for raw in catalogue.raw_ids(range(1, len(catalogue) + 1))}
    has_numbers = not all(isinstance(raw, str) for raw in known.values())

    def raw_id_of(word: str) -> int | str:
        # Unknown ids are passed on, because the error of the catalogue suggests similar ones.
        raw = known.get(word, known.get(word.strip(), word))
        return int(raw) if has_numbers and isinstance(raw, str) and raw.strip().isdecimal() else raw

    return [raw_id_of(word) for word in words]


def item_ids_of(words: list[str] | None, catalogue: Catalogue) -> list[int] | None:
    """The item ids of words of a command line."""
    return None if words is None else catalogue.item_ids(raw_ids_of(words, catalogue))


def main() -> None:
    arguments, users = parse_arguments(ARGUMENTS)
    if users.many and arguments.given:
        raise ValueError(f"{arguments.given[0]} is given with many users: expected one of them")
    if users.all_users and arguments.data_dir is None:
        raise ValueError("--all_users is given without --data_dir: expected the prepared data set with the users")
    model, sequences = load_recommender(arguments.model, trust_remote_code=arguments.trust_remote_code), None
    if model.catalogue is None:
        raise ValueError(f"{arguments.model} has no catalogue (items.parquet): expected one with the weights")
    if arguments.data_dir is not None:
        sequences = SequenceDatasets.load(arguments.data_dir)
        check_catalogue(model, arguments.model, sequences.num_items, sequences.raw_ids)
        if model.catalogue.counts is None:
            model.catalogue = model.catalogue.with_counts(sequences.catalogue.counts)
    if arguments.columns is None:
        further = [name for name in model.catalogue.metadata_columns if name not in ANSWER_COLUMNS]
        arguments.columns = ["title", *further]
    check_columns(model.catalogue, arguments.columns)
    if users.many:
        recommend_to_many(model, sequences if users.all_users else users.table, arguments, users)
    elif arguments.similar_to is not None:
        print_similar(model, arguments)
    else:
        recommend_to_one(model, sequences, arguments)


def recommend_to_many(model, source: SequenceDatasets | str, arguments: RecommendArguments, users: UsersArguments):
    """Write the recommendations to many users, or print them."""
    filters = {}
    for name in ("allowed", "excluded"):
        words, table = vars(arguments)[f"{name}_items"], vars(users)[f"{name}_table"]
        if words is not None and table is not None:
            raise ValueError(f"--{name}_items and --{name}_table are given: expected one of them")
        filters[f"{name}_items"] = raw_ids_of(words, model.catalogue) if table is None else table
    names = ("batch_size", "user_column", "history_column", "item_column", "time_column", "separator", "unknown_items")
    settings = {name: vars(users)[name] for name in names} | filters
    settings |= {name: vars(arguments)[name] for name in ("top_k", "exclude_seen", "columns")}
    state = process_state()
    model.to(state.device)
    if users.output is not None:
        recommend_all(model, source, users.output, **settings)
        if state.is_main_process:
            print(f"The recommendations are in {shown(users.output)}")
        return
    if state.num_processes > 1:
        raise ValueError(f"--output is missing: expected a file for {state.num_processes} processes to write; pass it")
    with tempfile.TemporaryDirectory() as folder:
        output = recommend_all(model, source, Path(folder) / "recommendations.parquet", **settings)
        for line in recommendation_lines(tables_of(output), arguments.format):
            print(line)


def tables_of(output: Path) -> Iterator[pa.Table]:
    """The recommendations in a file, a part at a time."""
    with pq.ParquetFile(output) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def recommend_to_one(model, sequences: SequenceDatasets | None, arguments: RecommendArguments) -> None:
    """Print the recommendations to one user."""
    filters = {
        name: item_ids_of(vars(arguments)[name], model.catalogue) for name in ("allowed_items", "excluded_items")
    }
    if arguments.liked is not None:
        titles = ItemTitles(model, arguments.title_encoder, trust_remote_code=arguments.trust_remote_code)
        (history,) = titles.histories([arguments.liked])
        item_ids, scores = titles.recommend([arguments.liked], arguments.top_k, **filters)
    else:
        history = item_ids_of(arguments.history, model.catalogue) or []
        if arguments.user is not None:
            history = history_of_user(sequences, arguments.data_dir, arguments.user)
        if not history and not model.knows_popular_items:
            raise ValueError(
                f"{arguments.model} was saved without the counts of its items, so it knows no popular items: pass "
                "--data_dir, or --user, --history or --liked"
            )
        item_ids, scores = model.recommend([history], arguments.top_k, arguments.exclude_seen, **filters)
    users = pa.array([arguments.user], pa.string())
    table = recommendations_table(model.catalogue, users, item_ids.numpy(), scores.numpy(), arguments.columns)
    if arguments.format != "titles":
        print(*recommendation_lines([table], arguments.format), sep="\n")
        return
    if history:
        print(f"The newest of {len(history)} items in the history:")
        for title in model.catalogue.titles(history[-arguments.shown :]):
            print(f"    {shown(title)}")
    print(f"Recommended by {shown(arguments.model)}:" if history else "Popular, since there is no history:")
    print(*title_lines(table.to_pylist()), sep="\n")


def print_similar(model, arguments: RecommendArguments) -> None:
    """Print the items that are most similar to those of `similar_to`."""
    if isinstance(model, ILoraForRecommendation):
        raise ValueError(f"{arguments.model} is an iLoRA: expected a SASRec, GRU4Rec, Caser or transition counts")
    filters = {
        name: item_ids_of(vars(arguments)[name], model.catalogue) for name in ("allowed_items", "excluded_items")
    }
    items = item_ids_of(arguments.similar_to, model.catalogue)
    item_ids, scores = model.similar_items(items, arguments.top_k, **filters)
    raw_ids = pa.array(model.catalogue.raw_ids(items))
    table = recommendations_table(model.catalogue, raw_ids, item_ids.numpy(), scores.numpy(), arguments.columns)
    table = table.rename_columns(["similar_to", *table.column_names[1:]])
    titles = dict(zip(raw_ids.to_pylist(), model.catalogue.titles(items), strict=True))
    for line in recommendation_lines([table], arguments.format, lambda raw_id: f"Similar to {titles[raw_id]}:"):
        print(line)


if __name__ == "__main__":
    run_main(main)
