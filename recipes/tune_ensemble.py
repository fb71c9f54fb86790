"""Finds the weights of an ensemble of teachers on the validation split, for distill_sasrec.py. It trains nothing.

    python recipes/tune_ensemble.py --data_dir outputs/beauty/data --output_dir outputs/beauty/ensemble \
        --members outputs/beauty/sasrec titles outputs/beauty/counts/transition_counts
    python recipes/distill_sasrec.py beauty/sasrec --ensemble outputs/beauty/ensemble --kl_weight 1 --lam 0 \
        --distilled_positions all --output_dir outputs/beauty/distilled

The members are saved recommenders (SASRec, GRU4Rec, models that count), the word `titles`, and labels of the validation
split (`hf-ilora label --split validation`), with which a language model takes part; distill_sasrec.py then needs the
same teacher's labels of the train split. The first member has weight 1. The weights of the others are searched one at
a time, keeping the value with the best NDCG@10 (seen items masked), until a whole round brings no improvement. Members
that do not help get weight 0, and distill_sasrec.py leaves them out.

The recipe writes ensemble.json (members, weights and all mixtures that it tried), run.json and run.log to the output
folder. It does not read the test split.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field

from accelerate import PartialState

from hf_ilora import EnsembleTeacher, SequenceDatasets
from hf_ilora.data.row_fractions import sampled_rows
from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import process_state
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.titles.embedded_encoder import EMBEDDED_ENCODER
from hf_ilora.titles.encoders import item_title_embeddings
from hf_ilora.training.ensemble_tuning import Mixture, MixtureRanking, tune_weights
from hf_ilora.training.ensembles import TunedEnsemble, check_member_weights, load_members, member_origins
from hf_ilora_cli.shown_text import in_markdown

logger = logging.getLogger(__name__)


@dataclass
class TuningArguments:
    """The members, and how their weights are searched."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder to write ensemble.json to"})
    members: list[str] = field(
        metadata={
            "help": "at least two: folders or Hub names of saved recommenders, the word titles, a folder of labels of "
            "the validation split; the first has weight 1"
        }
    )
    grid: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
        metadata={"help": "weights to try"},
    )
    max_rounds: int = field(default=3, metadata={"help": "largest number of rounds through the members"})
    validation_users: int | None = field(
        default=None, metadata={"help": "number of validation users to rank, drawn at random; by default all"}
    )
    seed: int = field(default=0, metadata={"help": "random seed of the choice of users"})
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "divides the weighted sum of scores in distillation; ranks do not depend on it"}
    )
    title_decay: float = field(
        default=0.6, metadata={"help": "for the member titles: weight of an item relative to the next newer one"}
    )
    title_encoder: str = field(
        default=EMBEDDED_ENCODER,
        metadata={
            "help": "folder or Hub name of the sentence encoder, language model or iLoRA that encodes titles, or tf-idf"
        },
    )
    title_layer: int | None = field(
        default=None,
        metadata={"help": "blocks of title_encoder after which titles are read, such as 15 or -2; by default all"},
    )
    batch_size: int = field(default=256, metadata={"help": "users scored per step"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model that encodes titles"}
    )

    def __post_init__(self):
        if len(set(self.members)) < max(2, len(self.members)):
            raise ValueError(
                f"members is {self.members}: expected at least two different ones; a single teacher needs no weights"
            )
        check_at_least_one(self, "max_rounds", "batch_size")
        if self.validation_users is not None:
            check_at_least_one(self, "validation_users")
        check_seed("seed", self.seed)
        check_member_weights([f"grid[{place}]" for place in range(len(self.grid))], self.grid)
        if not 0 < self.teacher_temperature < float("inf"):
            raise ValueError(f"teacher_temperature is {self.teacher_temperature}: expected a finite number above 0")
        if not 0 <= self.title_decay <= 1:
            raise ValueError(f"title_decay is {self.title_decay}: expected a number from 0 to 1")


ARGUMENTS = (TuningArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    state = process_state()
    with sole_writer(arguments.output_dir):
        tune(arguments, state)


def tune(arguments: TuningArguments, state: PartialState) -> None:
    """Search the weights and write them."""
    set_up_logging(arguments.output_dir)
    sequences = SequenceDatasets.load(arguments.data_dir)
    fingerprint, split = sequences.fingerprint, sequences["validation"]
    rows = sampled_rows("validation_users", arguments.validation_users, len(split), arguments.seed)
    members = load_members(
        arguments.members,
        sequences,
        lambda: item_title_embeddings(
            sequences.catalogue,
            arguments.title_encoder,
            layer=arguments.title_layer,
            device=state.device,
            trust_remote_code=arguments.trust_remote_code,
        ),
        arguments.title_decay,
        split="validation",
    )
    origins = member_origins(members, arguments.title_encoder, arguments.title_layer)
    members = list(EnsembleTeacher(members, [1.0] * len(members)).to(state.device).members)  # checks them
    with RunRecord(arguments.output_dir, [arguments], seed=arguments.seed) as record:
        record.add_data(fingerprint)
        for name, origin in zip(arguments.members, origins, strict=True):
            record.add_metrics(f"teacher {name}", origin)
        ranking = MixtureRanking(members, split, rows, arguments.batch_size, state.device)
        with record.stage("search"):
            best, tried = tune_weights(ranking, len(members), arguments.grid, arguments.max_rounds)
        trials = [quality_of(mixture) for mixture in tried]
        record.add_metrics("search", {"trials": trials})
        record.add_metrics("validation", quality_of(best))
        ensemble = TunedEnsemble(
            arguments.members,
            origins,
            list(best.weights),
            arguments.teacher_temperature,
            arguments.title_decay,
            arguments.title_encoder,
            arguments.title_layer,
        )
        evidence = {"data_fingerprint": fingerprint, "validation_users": len(rows), "seed": arguments.seed}
        ensemble.save(arguments.output_dir, evidence | {"validation": quality_of(best), "trials": trials})
        logger.info("wrote %s/ensemble.json\n%s", arguments.output_dir, table(arguments.members, best, tried))


def quality_of(mixture: Mixture) -> dict[str, object]:
    return {"weights": list(mixture.weights), "ndcg@10": mixture.ndcg, "hit_ratio@10": mixture.hit_ratio}


def table(names: list[str], best: Mixture, tried: list[Mixture]) -> str:
    """The members with their weights, how good each is alone and how good the others are without it."""
    by_weights = {mixture.weights: mixture for mixture in tried}

    def cells(weights: tuple[float, ...]) -> str:
        mixture = by_weights.get(weights)
        return "- | -" if mixture is None else f"{mixture.ndcg:.4f} | {mixture.hit_ratio:.4f}"

    lines = [
        "| member | weight | alone: NDCG@10 | HR@10 | without it: NDCG@10 | HR@10 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for place, name in enumerate(names):
        alone = tuple(float(place == other) for other in range(len(names)))
        without = (*best.weights[:place], 0.0, *best.weights[place + 1 :])
        lines.append(f"| {in_markdown(name)} | {best.weights[place]:g} | {cells(alone)} | {cells(without)} |")
    return "\n".join([*lines, f"| all together | | {cells(best.weights)} | | |"])


if __name__ == "__main__":
    run_main(main)
