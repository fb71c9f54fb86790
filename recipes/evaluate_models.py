"""Evaluates any number of saved models on one prepared data set: quality, latency and size in one table.

    python recipes/evaluate_models.py --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/evaluation \
        --models outputs/ml-100k/counts/popularity outputs/ml-100k/counts/transition_counts outputs/ml-100k/sasrec-1

Models are folders that `save_pretrained` wrote, or names on the Hub. The recipe writes results.md, results.csv,
results.json, results.png, run.json, and the ranks of every user under ranks/ (for `compare_runs`) to the output folder.
Every model is compared with the first one, user by user. All models are loaded and checked before any is measured.
A second table shows the quality by how often the target occurs in training; targets that never do, as under the
protocol cold_items, are also ranked among the new items alone.

A language model takes seconds for what a small model does in milliseconds: with `--ilora_users 200`, an iLoRA ranks a
random sample of the users, and is compared with the first model on these.
"""

import hf_ilora_cli.openmp  # isort: skip  # noqa: F401 - before torch
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from hf_ilora import ILoraForRecommendation, SequenceDatasets, compare_runs
from hf_ilora.data.columns import read_column
from hf_ilora.data.row_fractions import sampled_rows
from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import uses_accelerator
from hf_ilora.evaluation.latency import measure_latency, model_size
from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.report import ModelReport, ReportContext, markdown_table, plot_quality, write_table
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks, parquet_name
from hf_ilora.evaluation.statistics import summarize_by_count, summarize_ranks, users_by_count
from hf_ilora.models.loading import check_catalogue, load_recommender, model_folder
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
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
        default=None, metadata={"help": "names of the models in the table; by default their folders"}
    )
    split: str = field(default="test", metadata={"help": "split to evaluate on", "choices": ("validation", "test")})
    k: int = field(default=10, metadata={"help": "cut-off of NDCG, hit ratio and recall"})
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
        default=False, metadata={"help": "run code that comes with the language model of an iLoRA"}
    )
    device: str | None = field(
        default=None, metadata={"help": "device to evaluate on; by default a GPU if there is one"}
    )

    def __post_init__(self):
        self.names = names_of_models(self.models, self.names)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names are {self.names}: expected different names; pass --names")
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
    # Without an accelerator, the processes of a launch only find each other if the first PartialState is told to use
    # the CPU.
    state = PartialState(cpu=not uses_accelerator())
    with sole_writer(arguments.output_dir):
        evaluate(arguments, state)


def evaluate(arguments: EvaluationArguments, state: PartialState) -> None:
    """Measure the models and write the table."""
    sequences, split, models, folders, histories = load_and_check(arguments)
    ilora_rows = sampled_rows("ilora_users", arguments.ilora_users, len(split), arguments.seed)
    device = torch.device(arguments.device) if arguments.device else state.device
    output = Path(arguments.output_dir)
    set_up_logging(output)
    compared = f"ndcg@{arguments.k}"
    counts = sequences.catalogue.counts  # (num_items + 1,)
    target_counts = counts[read_column(split, "target").to_numpy()]  # (users,)
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
        compared=f"masked/{compared}",
        num_resamples=arguments.num_resamples,
        seed=arguments.seed,
        users_by_count=users_by_count(target_counts),
        num_new_items=int(is_new.sum()),
    )
    with RunRecord(output, [arguments], seed=arguments.seed) as record:
        record.add_data(context.data_fingerprint)
        reports, per_user = [], []  # per_user: (users,), NaN for those that the model did not rank
        for name, model, folder in zip(arguments.names, models, folders, strict=True):
            model.to(device)
            is_ilora = isinstance(model, ILoraForRecommendation)
            rows = ilora_rows if is_ilora else np.arange(len(split))
            ranked = split if len(rows) == len(split) else split.select(rows)
            with record.stage(f"rank {name}"):
                scorer = model.item_scores if is_ilora else None
                ranks = rank_split(model, ranked, batch_size=arguments.batch_size, scorer=scorer, is_new=is_new)
            if not state.is_main_process:
                continue
            source = RanksSource(name, context.data_fingerprint, arguments.split)
            saved = SavedRanks.from_ranks(read_column(ranked, "user_id"), ranks, source)
            saved.save(output / "ranks" / parquet_name(name))
            per_user.append(np.full(len(split), np.nan))
            per_user[-1][rows] = metric_per_user(compared, torch.from_numpy(ranks.masked)).numpy()
            both = ~np.isnan(per_user[0] + per_user[-1])  # (users,) ranked by the first model and by this one
            with record.stage(f"time {name}"):
                latency = measure_latency(model, histories, top_k=arguments.k, threads=arguments.latency_threads)
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
                    by_count=summarize_by_count(ranks, target_counts, arguments.k, **context.bootstrap)
                    if len(rows) == len(split)
                    else {},
                    num_users=len(rows),
                )
            )
            record.add_metrics(name, reports[-1].quality)
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


def sampled_histories(split, num_users: int, seed: int) -> list[np.ndarray]:
    """Histories of random users, the same for all models."""
    sample = np.random.default_rng(seed).permutation(len(split))[:num_users]
    return [np.asarray(history) for history in split.select(sample)["history"]]


if __name__ == "__main__":
    run_main(main)
