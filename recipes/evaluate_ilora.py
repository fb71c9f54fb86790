"""Evaluates iLoRA models in one table with the SASRec that they read and, if asked to, the plain language model.

    python recipes/evaluate_ilora.py --data_dir outputs/reference/movielens/data --split validation \
        --models outputs/reference/movielens/lora outputs/reference/movielens/ilora --names "plain LoRA" iLoRA \
        --zero_shot true --generate free --output_dir outputs/reference/movielens/evaluation

Every model ranks each user's fixed candidates by the likelihood of their titles and, with --generate, generates its
answer; an item head ranks the whole catalogue (`recipes/evaluate_models.py` also measures the coverage, novelty and
other qualities of its lists). Models with the same name are runs with different seeds: the table adds their mean and
standard deviation. Select models on the validation split, and run the test split once. If validation and test have few
users, `--split train --train_fraction 0.95 1` compares models on users that none of them was trained on.

The recipe writes results.md, results.csv, results.json, results.png, experts.png (expert usage), run.json and run.log
to the output folder, and for every user the rank among the candidates (candidate_ranks.parquet), the rank in the
catalogue (ranks/, for `compare_runs`) and the generated answer (answers/).
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import gc
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState

from hf_ilora import ILoraConfig, ILoraForRecommendation, SequenceDatasets
from hf_ilora.data.columns import training_sequences
from hf_ilora.data.row_fractions import check_fraction, rows_in_fraction
from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import process_state
from hf_ilora.evaluation.candidate_evaluation import GENERATE, CandidateEvaluation
from hf_ilora.evaluation.candidate_report import (
    CandidateContext,
    candidate_table,
    plot_candidate_hits,
    write_candidate_table,
)
from hf_ilora.evaluation.expert_usage import plot_expert_usage, usage_table
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import (
    DTYPES,
    check_at_least_one,
    check_choice,
    check_top_k,
    checked_plot,
    most_seen_items,
    names_of_models,
)
from hf_ilora.training.candidate_rows import draw_candidates

logger = logging.getLogger(__name__)

ZERO_SHOT = "zero-shot LLM"
SPLITS = ("validation", "test", "train")
NUM_CANDIDATES = 20  # for data that were prepared without candidates


@dataclass
class ILoraEvaluationArguments:
    """The models, the data to evaluate them on, and the settings of the measurements."""

    models: list[str] = field(metadata={"help": "folders or Hub names of iLoRA models"})
    data_dir: str = field(metadata={"help": "folder of the data set that the models were trained on"})
    output_dir: str = field(metadata={"help": "folder to write the table, the plots and the ranks to"})
    names: list[str] | None = field(
        default=None,
        metadata={"help": "names of the models in the table; runs of one model with different seeds share a name"},
    )
    zero_shot: bool = field(
        default=False,
        metadata={"help": "also evaluate the language model of the first model without adapter and embeddings"},
    )
    generate: str = field(
        default="none", metadata={"help": "whether and how the models generate answers", "choices": GENERATE}
    )
    first_line_only: bool = field(
        default=False,
        metadata={"help": "read only the first line of a free answer, as the programs of LLaRA and iLoRA do"},
    )
    max_new_tokens: int = field(default=40, metadata={"help": "longest free answer, in tokens"})
    recommenders: list[str] | None = field(
        default=None, metadata={"help": "folders or Hub names of further recommenders for the table"}
    )
    split: str = field(
        default="validation",
        metadata={"help": "split to evaluate on (train: see train_fraction)", "choices": SPLITS},
    )
    train_fraction: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "start and end of the evaluated part of the train split, as fractions of its rows"},
    )
    limit_rows: int = field(
        default=-1, metadata={"help": "number of rows to evaluate, spread evenly over the split; -1: all"}
    )
    k: int = field(default=10, metadata={"help": "cut-off of NDCG, and of the hit ratio in the catalogue"})
    batch_size: int = field(default=8, metadata={"help": "users per step, per process"})
    dtype: str | None = field(
        default=None, metadata={"help": "data type of the language models; by default as saved", "choices": DTYPES}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the language models"})
    num_resamples: int = field(default=2000, metadata={"help": "bootstrap resamples, and sign flips of the p-values"})
    seed: int = field(
        default=0, metadata={"help": "random seed of intervals, p-values and of candidates that the rows lack"}
    )
    plot: bool | None = field(
        default=None,
        metadata={"help": "draw the plots; by default if matplotlib is installed (extra hf_ilora[plot])"},
    )

    def __post_init__(self):
        self.names = names_of_models(self.models, self.names)
        if ZERO_SHOT in self.names:
            raise ValueError(
                f"names are {self.names}: {ZERO_SHOT!r} is the row of the plain language model; choose another name"
            )
        check_fraction(self.train_fraction)
        if self.split != "train" and self.train_fraction != [0, 1]:
            raise ValueError(f"train_fraction is {self.train_fraction} for split {self.split}: expected --split train")
        if self.first_line_only and self.generate != "free":
            raise ValueError(f"first_line_only is true with generate {self.generate!r}: expected --generate free")
        check_at_least_one(self, "k", "batch_size", "num_resamples", "max_new_tokens")
        check_seed("seed", self.seed)
        check_choice("dtype", self.dtype, (None, *DTYPES))
        if self.limit_rows < 1 and self.limit_rows != -1:
            raise ValueError(f"limit_rows is {self.limit_rows}: expected at least 1, or -1 for all")
        self.plot = checked_plot(self.plot)


ARGUMENTS = (ILoraEvaluationArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    state = process_state()
    with sole_writer(arguments.output_dir):
        evaluate(arguments, state)


def evaluate(arguments: ILoraEvaluationArguments, state: PartialState) -> None:
    """Measure the models and write the table."""
    sequences, split = load_data(arguments)
    check_top_k("k", arguments.k, sequences.num_items)
    for model in arguments.models:  # before anything is measured
        ILoraConfig.from_pretrained(model)
    trusts = {"trust_remote_code": arguments.trust_remote_code}
    recommenders = {name: load_recommender(name, **trusts) for name in arguments.recommenders or []}
    raw_ids = sequences.raw_ids
    for name, recommender in recommenders.items():
        check_catalogue(recommender, name, sequences.num_items, raw_ids)
    output = Path(arguments.output_dir)
    set_up_logging(output)
    num_candidates = len(split[0]["candidates"])
    if "candidates" not in sequences[arguments.split].column_names:
        logger.info("the rows have no candidates: %d are drawn for each, with seed %d", num_candidates, arguments.seed)
    context = CandidateContext(
        data=arguments.data_dir,
        data_fingerprint=sequences.fingerprint,
        split=arguments.split,
        num_users=len(split),
        num_items=sequences.num_items,
        num_candidates=num_candidates,
        k=arguments.k,
        generate=arguments.generate,
        first_line_only=arguments.first_line_only,
        num_resamples=arguments.num_resamples,
        seed=arguments.seed,
    )
    with RunRecord(output, [arguments], seed=arguments.seed) as record:
        record.add_data(context.data_fingerprint)
        evaluation = CandidateEvaluation(context, split, arguments.batch_size, arguments.max_new_tokens)
        for name, recommender in recommenders.items():
            with record.stage(f"evaluate {name}"):
                evaluation.add_recommender(recommender.to(state.device), name)
        for number, (name, source) in enumerate(zip(arguments.names, arguments.models, strict=True)):
            with record.stage(f"load {source}"):
                model = ILoraForRecommendation.from_pretrained(source, dtype=arguments.dtype, **trusts)
                check_catalogue(model, source, sequences.num_items, raw_ids)
                model.to(state.device)
            with record.stage(f"evaluate {source}"):
                evaluation.add_model(model, name, source)
            if number == 0 and arguments.zero_shot:
                with record.stage(ZERO_SHOT):
                    bare = without_adapter(model, arguments.dtype, arguments.trust_remote_code).to(state.device)
                    evaluation.add_language_model(bare, ZERO_SHOT, bare.config.llm_name_or_path)
                    del bare
            del model
            gc.collect()  # before the next language model is loaded
        reports = evaluation.reports()
        for report in reports:
            record.add_metrics(f"{report.name} ({report.source})", report.quality)
        if state.is_main_process:
            usages = evaluation.usages
            appendix = f"\nExpert usage:\n\n{usage_table(usages)}" if usages else ""
            write_candidate_table(reports, context, output, appendix)
            evaluation.write_rows(output)
            if arguments.plot:
                plot_candidate_hits(reports, context, output / "results.png")
                if usages:
                    plot_expert_usage(usages, output / "experts.png")
            logger.info("wrote %s\n%s%s", output / "results.md", candidate_table(reports, context), appendix)


def load_data(arguments: ILoraEvaluationArguments):
    """The data set, and the rows to evaluate, with candidates that are drawn if the data have none."""
    sequences = SequenceDatasets.load(arguments.data_dir)
    split = sequences[arguments.split]
    if arguments.split == "train":
        split = rows_in_fraction(split, arguments.train_fraction)
    if arguments.limit_rows != -1:
        rows = np.linspace(0, len(split) - 1, min(arguments.limit_rows, len(split)))
        split = split.select(rows.astype(int))
    if "candidates" in split.column_names:
        return sequences, split
    num_candidates = sequences.protocol["num_candidates"]
    if not num_candidates:  # at most as many as every user has unseen items
        most = most_seen_items(np.split(*training_sequences(split))[1:-1])
        num_candidates = min(NUM_CANDIDATES, sequences.num_items - most + 1)
    return sequences, draw_candidates(split, sequences.num_items, num_candidates, arguments.seed)


def without_adapter(
    model: ILoraForRecommendation, dtype: str | None, trust_remote_code: bool
) -> ILoraForRecommendation:
    """The language model that `model` was trained on, with plain-text prompts and an adapter that adds zero.

    With one expert there is no router, and an untrained LoRA adds zero.
    """
    config = model.config
    llm, tokenizer, _ = load_language_model(
        config.llm_name_or_path,
        revision=config.llm_revision,
        gguf_file=config.llm_gguf_file,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    plain = ILoraConfig(
        llm_name_or_path=config.llm_name_or_path,
        num_llm_layers=config.num_llm_layers,
        rank=1,
        num_experts=1,
        target_modules=config.target_modules,
        item_placeholders=False,
        prompt_templates=config.prompt_templates,
        title_separator=config.title_separator,
        duplicate_titles=config.duplicate_titles,
        max_history=config.max_history,
    )
    bare = ILoraForRecommendation.from_base(
        llm, model.recommender, tokenizer, model.catalogue, plain, untrained_recommender=True
    )
    return bare.eval()


if __name__ == "__main__":
    run_main(main)
