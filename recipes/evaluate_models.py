"""Evaluates any number of saved models on one prepared data set: quality, latency and size in one table.

    python recipes/evaluate_models.py --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/evaluation \
        --models outputs/ml-100k/counts/popularity outputs/ml-100k/counts/transition_counts outputs/ml-100k/sasrec-1

Models are folders that `save_pretrained` wrote, or names on the Hub. The recipe writes results.md, results.csv,
results.json, results.png, run.json, and the ranks of every user under ranks/ (for `compare_runs`) to the output folder.
Every model is compared with the first one, user by user. All models are loaded and checked before any is measured.
Models with the same name are runs with different seeds: the table adds their mean and standard deviation, and the plot
of quality against the time of a recommendation shows all of them in one place.
Further tables describe the recommended lists (coverage, Gini, novelty, popularity, serendipity, and with
--title_encoder their diversity by titles), and group the quality by the length of the history and by how often the
target occurs in training. Targets that never occur there, as under the protocol cold_items, are also ranked among the
new items alone. If users have several relevant items, the metrics count all of them.

A language model takes seconds for what a small model does in milliseconds: with `--ilora_users 200`, an iLoRA ranks a
random sample of the users, and is compared with the first model on these.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from hf_ilora import (
    ILoraForRecommendation,
    PopularityForNextItem,
    SequenceDatasets,
    TrainingFacts,
    TransitionCountsForNextItem,
    beyond_accuracy,
    compare_runs,
    item_title_embeddings,
)
from hf_ilora.data.columns import flatten_lists, padded_lists, read_column
from hf_ilora.data.row_fractions import sampled_rows
from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import process_state
from hf_ilora.evaluation.latency import measure_latency, model_size
from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import SplitRanks, rank_split
from hf_ilora.evaluation.report import ModelReport, ReportContext, markdown_table, plot_quality, write_table
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks, parquet_name
from hf_ilora.evaluation.statistics import (
    COUNT_GROUPS,
    LENGTH_GROUPS,
    rows_by_group,
    summarize_by_count,
    summarize_by_length,
    summarize_ranks,
    users_by_group,
)
from hf_ilora.models.loading import check_catalogue, load_recommender, model_folder
from hf_ilora.runs import RunRecord, parse_arguments, read_record, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import (
    check_at_least_one,
    check_device,
    check_threads,
    check_top_k,
    checked_plot,
    most_seen_items,
    names_of_models,
)

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """The models, the data to evaluate them on, and the settings of the measurements."""

    models: list[str] = field(
        metadata={"help": "folders or Hub names of saved models; the others are compared with the first"}
    )
    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder to write the table, the plot and the ranks to"})
    names: list[str] | None = field(
        default=None,
        metadata={
            "help": "names of the models in the table, by default their folders; models with the same name are runs of "
            "one model with different seeds"
        },
    )
    split: str = field(default="test", metadata={"help": "split to evaluate on", "choices": ("validation", "test")})
    k: int = field(default=10, metadata={"help": "cut-off of the metrics, and length of the recommended lists"})
    title_encoder: str | None = field(
        default=None,
        metadata={
            "help": "encoder of titles that measures the diversity within a list: folder or Hub name, such as "
            "sentence-transformers/all-MiniLM-L6-v2, or tf-idf; by default diversity is not measured"
        },
    )
    batch_size: int = field(default=256, metadata={"help": "users scored per step, per process"})
    ilora_users: int | None = field(
        default=None, metadata={"help": "number of users that an iLoRA ranks, drawn at random; by default all"}
    )
    num_resamples: int = field(default=2000, metadata={"help": "bootstrap resamples, and sign flips of the p-values"})
    seed: int = field(
        default=0,
        metadata={
            "help": "random seed of intervals, p-values, the users of ilora_users and of the latency measurement"
        },
    )
    latency_calls: int = field(
        default=300, metadata={"help": "number of recommendations timed per model, one user at a time"}
    )
    latency_threads: int = field(default=1, metadata={"help": "CPU threads while latency is measured"})
    plot: bool | None = field(
        default=None,
        metadata={"help": "draw results.png; by default if matplotlib is installed (extra hf_ilora[plot])"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model of an iLoRA or title_encoder"}
    )
    device: str | None = field(
        default=None, metadata={"help": "device to evaluate on; by default a GPU if there is one"}
    )

    def __post_init__(self):
        self.names = names_of_models(self.models, self.names)
        runs = list(zip(self.names, self.models, strict=True))
        if len(set(runs)) < len(runs):
            raise ValueError(f"models are {self.models}: expected no model twice under one name; pass --names")
        check_at_least_one(self, "k", "batch_size", "num_resamples", "latency_calls", "latency_threads")
        if self.ilora_users is not None:
            check_at_least_one(self, "ilora_users")
        check_threads("latency_threads", self.latency_threads)
        check_seed("seed", self.seed)
        if self.device is not None:
            check_device(self.device)
        self.plot = checked_plot(self.plot)


ARGUMENTS = (EvaluationArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    state = process_state()
    with sole_writer(arguments.output_dir):
        evaluate(arguments, state)


def evaluate(arguments: EvaluationArguments, state: PartialState) -> None:
    """Measure the models and write the table."""
    sequences, split, models, folders, histories = load_and_check(arguments)
    kinds = [kind_of(model, folder) for model, folder in zip(models, folders, strict=True)]
    ilora_rows = sampled_rows("ilora_users", arguments.ilora_users, len(split), arguments.seed)
    device = torch.device(arguments.device) if arguments.device else state.device
    output = Path(arguments.output_dir)
    set_up_logging(output)
    counts = sequences.catalogue.counts  # (num_items + 1,)
    relevant, main = relevant_items(split)
    compared = f"{main}/ndcg@{arguments.k}"
    item_counts = np.where(relevant > 0, counts[relevant], -1)  # of the shape of `relevant`; -1: padding, in no group
    lengths = np.diff(flatten_lists(split, "history")[1])  # (users,)
    is_new = counts == 0
    is_new[0] = False  # padding
    context = ReportContext(
        data=arguments.data_dir,
        data_fingerprint=sequences.fingerprint,
        split=arguments.split,
        num_users=len(split),
        num_items=sequences.num_items,
        num_candidates=sequences.protocol["num_candidates"],
        k=arguments.k,
        compared=compared,
        num_resamples=arguments.num_resamples,
        seed=arguments.seed,
        users_by_count=users_by_group(item_counts, COUNT_GROUPS),
        num_new_items=int(is_new.sum()),
        users_by_length=users_by_group(lengths, LENGTH_GROUPS),
        title_encoder=arguments.title_encoder,
    )
    with RunRecord(output, [arguments], seed=arguments.seed) as record:
        record.add_data(context.data_fingerprint)
        with record.stage("titles"):
            facts = TrainingFacts.of(sequences, title_vectors(arguments, sequences))
        reports, per_user = [], []  # per_user: (users,), NaN for those that the model did not rank
        for name, given, kind, model, folder in zip(
            arguments.names, arguments.models, kinds, models, folders, strict=True
        ):
            label = name if arguments.names.count(name) == 1 else f"{name} ({given})"
            model.to(device)
            is_ilora = isinstance(model, ILoraForRecommendation)
            rows = ilora_rows if is_ilora else np.arange(len(split))
            ranked = split if len(rows) == len(split) else split.select(rows)
            with record.stage(f"rank {label}"):
                scorer = model.item_scores if is_ilora else None
                ranks = rank_split(
                    model, ranked, batch_size=arguments.batch_size, scorer=scorer, is_new=is_new, top_k=arguments.k
                )
            if not state.is_main_process:
                continue
            source = RanksSource(label, context.data_fingerprint, arguments.split)
            saved = SavedRanks.from_ranks(read_column(ranked, "user_id"), ranks, source)
            saved.save(output / "ranks" / parquet_name(label))
            per_user.append(np.full(len(split), np.nan))
            per_user[-1][rows] = metric_per_user(f"ndcg@{arguments.k}", torch.from_numpy(vars(ranks)[main])).numpy()
            both = ~np.isnan(per_user[0] + per_user[-1])  # (users,) ranked by the first model and by this one
            with record.stage(f"time {label}"):
                latency = measure_latency(model, histories, top_k=arguments.k, threads=arguments.latency_threads)
            by_count, by_length = {}, {}
            with record.stage(f"intervals of {label}"):
                lists = beyond_accuracy(ranks.recommended, facts, relevant[rows], **context.bootstrap)
                if len(rows) == len(split):
                    by_count = summarize_by_count(ranks, item_counts, arguments.k, **context.bootstrap)
                    by_length = quality_by_length(ranks, lengths, facts, relevant, context)
            reports.append(
                ModelReport(
                    name=name,
                    model_type=model.config.model_type,
                    quality=summarize_ranks(ranks, arguments.k, **context.bootstrap),
                    latency=latency,
                    size=model_size(model, folder),
                    comparison=compare_runs(per_user[0][both], per_user[-1][both], **context.bootstrap)
                    if len(per_user) > 1
                    else None,
                    by_count=by_count,
                    num_users=len(rows),
                    source=given,
                    kind=kind,
                    lists=lists,
                    by_length=by_length,
                )
            )
            record.add_metrics(label, reports[-1].quality | reports[-1].lists)
        if state.is_main_process:
            write_table(reports, context, output)
            if arguments.plot:
                plot_quality(reports, context, output / "results.png")
            logger.info("wrote %s\n%s", output / "results.md", markdown_table(reports, context))


def load_and_check(arguments: EvaluationArguments):
    """The data, the split, the models, their folders and histories to time, checked against each other."""
    sequences = SequenceDatasets.load(arguments.data_dir)
    split = sequences[arguments.split]
    histories = sampled_histories(split, arguments.latency_calls, arguments.seed)
    check_top_k("k", arguments.k, sequences.num_items, most_seen_items(histories))
    folders = [model_folder(name) for name in arguments.models]
    models = [load_recommender(folder, trust_remote_code=arguments.trust_remote_code) for folder in folders]
    raw_ids = sequences.raw_ids
    for name, model in zip(arguments.names, models, strict=True):
        if not check_catalogue(model, name, sequences.num_items, raw_ids):
            logger.warning("%s has no catalogue, so its item ids could not be checked against those of the data", name)
    return sequences, split, models, folders, histories


def quality_by_length(
    ranks: SplitRanks, lengths: np.ndarray, facts: TrainingFacts, relevant: np.ndarray, context: ReportContext
) -> dict[str, dict]:
    """The quality of the ranks and of the recommended lists, by the length of the history.

    Args:
        ranks: ranks and recommended lists of all users.
        lengths: (users,) length of each history.
        facts: the training data, for the quality of lists.
        relevant: relevant items of the users, as `relevant_items` returns them.
        context: settings of the evaluation.
    """
    found = summarize_by_length(ranks, lengths, context.k, **context.bootstrap)
    for group, users in rows_by_group(lengths, LENGTH_GROUPS).items():
        found[group] |= beyond_accuracy(ranks.recommended[users], facts, relevant[users], **context.bootstrap)
    return found


def kind_of(model: torch.nn.Module, folder: Path) -> str:
    """The kind of a model, one of `plots.KINDS`: by its type, and by the run.json in its folder if there is one."""
    if isinstance(model, ILoraForRecommendation):
        return "language model"
    if isinstance(model, PopularityForNextItem | TransitionCountsForNextItem):
        return "baseline"
    run = Path(folder) / "run.json"
    if not run.is_file():
        return "ids"
    record = read_record(run)
    start = record["metrics"].get("start", {}).get("initial_items", "")
    return "student" if "DistillationArguments" in record["configuration"] or start.startswith("titles") else "ids"


def relevant_items(split) -> tuple[np.ndarray, str]:
    """The items that count as right answers, and the name of their ranking.

    Returns:
        (users, relevant) item ids, padded with 0, and "relevant"; or, for a split with one relevant item per user,
        (users,) targets and "masked".
    """
    if "relevant_items" not in split.column_names:
        return read_column(split, "target").to_numpy(), "masked"
    return padded_lists(split, "relevant_items"), "relevant"


def title_vectors(arguments: EvaluationArguments, sequences: SequenceDatasets) -> torch.Tensor | None:
    """(num_items + 1, size) of `title_encoder`; None without one."""
    if arguments.title_encoder is None:
        return None
    return item_title_embeddings(
        sequences.catalogue, arguments.title_encoder, trust_remote_code=arguments.trust_remote_code
    )


def sampled_histories(split, num_users: int, seed: int) -> list[np.ndarray]:
    """Histories of random users, the same for all models."""
    sample = np.random.default_rng(seed).permutation(len(split))[:num_users]
    return [np.asarray(history) for history in split.select(sample)["history"]]


if __name__ == "__main__":
    run_main(main)
