"""Recommends items, with their titles, for a user of a prepared data set or for any history.

python recipes/recommend.py --model outputs/ml-100k/sasrec --data_dir outputs/ml-100k/data --user 1
python recipes/recommend.py --model outputs/ml-100k/sasrec --history 50 172 181
"""

import hf_ilora_cli.openmp  # isort: skip  # noqa: F401 - before torch
from dataclasses import dataclass, field

import torch

from hf_ilora import SequenceDatasets
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora_cli.shown_text import shown


@dataclass
class RecommendArguments:
    """The model, and the user or history to recommend for."""

    model: str = field(metadata={"help": "folder or Hub name of a saved model with a catalogue"})
    data_dir: str | None = field(default=None, metadata={"help": "prepared data set with the user"})
    user: str | None = field(default=None, metadata={"help": "raw user id in the data set"})
    history: list[str] | None = field(default=None, metadata={"help": "raw item ids, oldest first"})
    top_k: int = field(default=10, metadata={"help": "number of recommendations"})
    shown: int = field(default=5, metadata={"help": "number of newest items of the history to print"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model of an iLoRA"}
    )

    def __post_init__(self):
        if (self.user is None) == (self.history is None) or (self.user is not None and self.data_dir is None):
            raise ValueError("expected either --user with --data_dir, or --history with raw item ids")
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


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    model = load_recommender(arguments.model, trust_remote_code=arguments.trust_remote_code)
    catalogue = model.catalogue
    if catalogue is None:
        raise ValueError(f"{arguments.model} has no catalogue (items.parquet): expected one with the weights")
    if arguments.user is not None:
        sequences = SequenceDatasets.load(arguments.data_dir)
        raw_ids = sequences.raw_ids
        check_catalogue(model, arguments.model, sequences.num_items, raw_ids)
        history = history_of_user(sequences, arguments.data_dir, arguments.user)
    else:
        known = {str(raw): raw for raw in catalogue.raw_ids(range(1, len(catalogue) + 1))}
        # Unknown ids are passed on, because the error of the catalogue suggests similar ones.
        history = catalogue.item_ids([known.get(raw, known.get(raw.strip(), raw)) for raw in arguments.history])
    print(f"The newest of {len(history)} items in the history:")
    for title in catalogue.titles(history[-arguments.shown :]):
        print(f"    {shown(title)}")
    item_ids, scores = model.recommend(torch.tensor([history]), top_k=arguments.top_k)
    print(f"Recommended by {shown(arguments.model)}:")
    titles = catalogue.titles(item_ids[0])
    for place, (title, score) in enumerate(zip(titles, scores[0].tolist(), strict=True), start=1):
        print(f"{place:3d}. {shown(title)}  ({score:.2f})")


if __name__ == "__main__":
    run_main(main)
