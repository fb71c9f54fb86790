"""Recommends items, with their titles, for a user of a prepared data set, a history, liked titles, or nobody known.

python recipes/recommend.py --model outputs/ml-100k/sasrec --data_dir outputs/ml-100k/data --user 1
python recipes/recommend.py --model outputs/ml-100k/sasrec --history 50 172 181
python recipes/recommend.py --model outputs/ml-100k/sasrec --liked "Star Wars" "a comedy about a wedding"
python recipes/recommend.py --model outputs/ml-100k/sasrec

A liked title that is not in the catalogue is replaced by the five items with the most similar titles. Without a user,
history or titles, the most popular items are printed.
"""

import hf_ilora_cli.openmp  # isort: skip  # noqa: F401 - before torch
from dataclasses import dataclass, field

from hf_ilora import Catalogue, ItemTitles, SequenceDatasets
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER
from hf_ilora_cli.shown_text import shown


@dataclass
class RecommendArguments:
    """The model, and the user, history or titles to recommend for."""

    model: str = field(metadata={"help": "folder or Hub name of a saved model with a catalogue"})
    data_dir: str | None = field(
        default=None, metadata={"help": "prepared data set with the user, or to count what is popular"}
    )
    user: str | None = field(default=None, metadata={"help": "raw user id in the data set"})
    history: list[str] | None = field(default=None, metadata={"help": "raw item ids, oldest first"})
    liked: list[str] | None = field(default=None, metadata={"help": "titles that the user likes, or any texts"})
    title_encoder: str = field(
        default=EMBEDDED_ENCODER, metadata={"help": "what encodes titles for liked; see encode_titles"}
    )
    top_k: int = field(default=10, metadata={"help": "number of recommendations"})
    shown: int = field(default=5, metadata={"help": "number of newest items of the history to print"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the title encoder or the language model of an iLoRA"}
    )

    def __post_init__(self):
        given = [f"--{name}" for name in ("user", "history", "liked") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: expected one of them, or none for popular items")
        if self.user is not None and self.data_dir is None:
            raise ValueError("--user is given without --data_dir: expected the prepared data set with the user")
        if self.shown < 1:
            raise ValueError(f"shown is {self.shown}: expected at least 1")


ARGUMENTS = (RecommendArguments,)


def history_of_user(sequences: SequenceDatasets, data_dir: str, user: str) -> list[int]:
    """All items of a user of the data set, oldest first, including the test target."""
    test = sequences["test"]
    users = test.with_format("arrow")["user_id"][:].to_pylist()
    by_name = {str(raw): row for row, raw in enumerate(users)}
    user = user if user in by_name else user.strip()
    if user not in by_name:
        raise ValueError(
            f"user {user} is not in {data_dir}: expected one of its {len(users)} users, such as {users[0]}"
        )
    row = test[by_name[user]]
    return [*row["history"], row["target"]]


def history_of(arguments: RecommendArguments, catalogue: Catalogue, sequences: SequenceDatasets | None) -> list[int]:
    """The item ids of the user or the history; none for nobody known."""
    if arguments.user is not None:
        return history_of_user(sequences, arguments.data_dir, arguments.user)
    if arguments.history is None:
        return []
    known = {str(raw): raw for raw in catalogue.raw_ids(range(1, len(catalogue) + 1))}
    # Unknown ids are passed on, because the error of the catalogue suggests similar ones.
    return catalogue.item_ids([known.get(raw, known.get(raw.strip(), raw)) for raw in arguments.history])


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    model, sequences = load_recommender(arguments.model, trust_remote_code=arguments.trust_remote_code), None
    if model.catalogue is None:
        raise ValueError(f"{arguments.model} has no catalogue (items.parquet): expected one with the weights")
    if arguments.data_dir is not None:
        sequences = SequenceDatasets.load(arguments.data_dir)
        check_catalogue(model, arguments.model, sequences.num_items, sequences.raw_ids)
        if model.catalogue.counts is None:
            model.catalogue = model.catalogue.with_counts(sequences.catalogue.counts)
    if arguments.liked is not None:
        titles = ItemTitles(model, arguments.title_encoder, trust_remote_code=arguments.trust_remote_code)
        (history,) = titles.histories([arguments.liked])
        item_ids, scores = titles.recommend([arguments.liked], top_k=arguments.top_k)
    else:
        history = history_of(arguments, model.catalogue, sequences)
        if not history and not model.knows_popular_items:
            raise ValueError(
                f"{arguments.model} was saved without the counts of its items, so nothing is known to be popular: pass "
                "--data_dir, or --user, --history or --liked"
            )
        item_ids, scores = model.recommend([history], top_k=arguments.top_k)
    if history:
        print(f"The newest of {len(history)} items in the history:")
        for title in model.catalogue.titles(history[-arguments.shown :]):
            print(f"    {shown(title)}")
    print(f"Recommended by {shown(arguments.model)}:" if history else "Popular, since there is no history:")
    titles = model.catalogue.titles(item_ids[0].tolist())
    for place, (title, score) in enumerate(zip(titles, scores[0].tolist(), strict=True), start=1):
        print(f"{place:3d}. {shown(title)}  ({score:.2f})")


if __name__ == "__main__":
    run_main(main)
