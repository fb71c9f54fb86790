"""Evaluates any number of saved models on one prepared data set: quality, latency and size in one table.

    python recipes/evaluate_models.py --data_dir outputs/ml-100k/data --output_dir outputs/ml-100k/evaluation \
        --models outputs/ml-100k/counts/popularity outputs/ml-100k/counts/transition_counts outputs/ml-100k/sasrec-1

Models are folders that `save_pretrained` wrote, or names on the Hub. The output folder gets results.md, results.csv,
results.json and results.png, the ranks of every user under ranks/ (`compare_runs` reads them), and run.json. Every
model is compared with the first, user by user. Everything is loaded and checked before anything is measured.
"""

import hashlib
import logging
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState

from hf_ilora import ILoraForRecommendation, SequenceDatasets, compare_runs
from hf_ilora.evaluation.latency import measure_latency, model_size
from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.report import ModelReport, ReportContext, markdown_table, plot_quality, write_table
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks
from hf_ilora.evaluation.statistics import summarize_ranks
from hf_ilora.models.loading import check_catalogue, load_recommender, model_folder
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging

logger = logging.getLogger(__name__)


@dataclass
class EvaluationArguments:
    """What to evaluate, on what, and how."""

    models: list[str] = field(metadata={"help": "folders or Hub names of saved models; the first is compared with"})
    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    output_dir: str = field(metadata={"help": "folder for the table, the plot and the ranks"})
    names: list[str] | None = field(
        default=None, metadata={"help": "names of the models in the table; by default their folders"}
    )
    split: str = field(default="test", metadata={"help": "split to evaluate on", "choices": ("validation", "test")})
    k: int = field(default=10, metadata={"help": "cut-off of NDCG, hit ratio and recall"})
    batch_size: int = field(default=256, metadata={"help": "users scored at a time, per process"})
    num_resamples: int = field(default=2000, metadata={"help": "bootstrap resamples, and sign flips of the p-values"})
    seed: int = field(
        default=0, metadata={"help": "random seed for intervals, p-values and the users that latency is measured on"}
    )
    latency_calls: int = field(default=300, metadata={"help": "recommendations timed per model, one user at a time"})
    latency_threads: int = field(default=1, metadata={"help": "CPU threads while latency is measured"})
    plot: bool | None = field(
        default=None,
        metadata={"help": "draw results.png; by default where matplotlib is installed, as by the extra hf_ilora[plot]"},
    )
    device: str | None = field(default=None, metadata={"help": "where to evaluate; by default a GPU if there is one"})

    def __post_init__(self):
        if not self.models:
            raise ValueError("models is empty: expected at least one folder or Hub name")
        self.names = self.names or [model.rstrip("/") for model in self.models]
        if len(self.names) != len(self.models) or len(set(self.names)) < len(self.names):
            raise ValueError(
                f"names are {self.names} for {len(self.models)} models: expected one each, all different; give --names"
            )
        for name in ("k", "batch_size", "num_resamples", "latency_calls", "latency_threads"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")
        has_matplotlib = find_spec("matplotlib") is not None
        if self.plot and not has_matplotlib:
            raise ValueError("plot needs matplotlib: install hf_ilora[plot], or give --plot false")
        self.plot = has_matplotlib if self.plot is None else self.plot


ARGUMENTS = (EvaluationArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    sequences, split, models, folders = load_and_check(arguments)
    # Without an accelerator the processes of one launch find one another only when they are told so at the start.
    state = PartialState(cpu=not torch.accelerator.is_available())
    device = torch.device(arguments.device) if arguments.device else state.device
    output = Path(arguments.output_dir)
    set_up_logging(output)
    compared = f"ndcg@{arguments.k}"
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
    )
    with RunRecord(output, [arguments], seed=arguments.seed) as record:
        record.add_data(context.data_fingerprint)
        histories = sampled_histories(split, arguments.latency_calls, arguments.seed)
        reports, per_user = [], []
        for name, model, folder in zip(arguments.names, models, folders, strict=True):
            model.to(device)
            with record.stage(f"rank {name}"):
                scorer = model.item_scores if isinstance(model, ILoraForRecommendation) else None
                ranks = rank_split(model, split, batch_size=arguments.batch_size, scorer=scorer)
            if not state.is_main_process:
                continue
            source = RanksSource(name, context.data_fingerprint, arguments.split)
            SavedRanks.from_ranks(user_ids(split), ranks, source).save(ranks_path(output, name))
            per_user.append(metric_per_user(compared, torch.from_numpy(ranks.masked)).numpy())
            draws = {"num_resamples": arguments.num_resamples, "seed": arguments.seed}
            with record.stage(f"time {name}"):
                latency = measure_latency(model, histories, top_k=arguments.k, threads=arguments.latency_threads)
            reports.append(
                ModelReport(
                    name=name,
                    model_type=model.config.model_type,
                    quality=summarize_ranks(ranks, arguments.k, **draws),
                    latency=latency,
                    size=model_size(model, folder),
                    comparison=compare_runs(per_user[0], per_user[-1], **draws) if len(per_user) > 1 else None,
                )
            )
            record.add_metrics(name, reports[-1].quality)
        if state.is_main_process:
            write_table(reports, context, output)
            if arguments.plot:
                plot_quality(reports, context, output / "results.png")
            logger.info("wrote %s\n%s", output / "results.md", markdown_table(reports, context))


def load_and_check(arguments: EvaluationArguments):
    """Everything that is evaluated, or the error that would come up later: data, split, models and their folders."""
    sequences = SequenceDatasets.load(arguments.data_dir)
    split = sequences[arguments.split]
    if "candidates" not in split.column_names:
        raise ValueError(
            f"{arguments.data_dir} has no candidates: expected data prepared with num_candidates of 2 or more"
        )
    folders = [model_folder(name) for name in arguments.models]
    models = [load_recommender(folder) for folder in folders]
    raw_ids = sequences.raw_ids
    for name, model in zip(arguments.names, models, strict=True):
        if not check_catalogue(model, name, sequences.num_items, raw_ids):
            logger.warning("%s carries no catalogue: that its item ids mean these items could not be checked", name)
    return sequences, split, models, folders


def sampled_histories(split, num_users: int, seed: int) -> list[np.ndarray]:
    """Histories of users drawn by the seed, the same for all models."""
    drawn = np.random.default_rng(seed).permutation(len(split))[:num_users]
    return [np.asarray(history) for history in split.select(drawn)["history"]]


def user_ids(split) -> pa.ChunkedArray:
    return split.select_columns("user_id").with_format("arrow")[:]["user_id"]


def ranks_path(output: Path, name: str) -> Path:
    """Names may be paths: what cannot stand in a file name becomes a dash, and a hash keeps two names apart."""
    readable = re.sub(r"[^\w.-]+", "-", name).strip("-.")
    return output / "ranks" / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.parquet"


if __name__ == "__main__":
    run_main(main)
