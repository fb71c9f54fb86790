"""Measures how fast iLoRA answers, and what putting prompts together costs, on real prompts and a real language model.

    python recipes/benchmark_ilora_answers.py --data_dir outputs/ml-100k/data --recommender outputs/ml-100k/sasrec \
        --output_dir outputs/benchmark_ilora_answers --dtypes float32 bfloat16 --threads 1

Candidates scored by `score_candidates`, in rows per second, against answers that are generated as the published program
does, greedily and from embeddings, with the layer in its published form and in ours: the programs take turns on each
batch. And the time of drawing candidates and assembling prompts, as a share of a training step on the first layers; a
profile counts calls of tokenizers. The adapter is fresh and random: what is measured does not depend on its weights.
Writes benchmark.json and benchmark.md.
"""

import copy
import cProfile
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmark_ilora import median_ratio, table_of_targets, use_published_form, write_results
from torch import nn
from transformers import set_seed

from hf_ilora import Catalogue, ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.evaluation.ranking import EvaluationRows
from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM
from hf_ilora.models.ilora.gated_lora import gated_layers
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.ilora.prompts import read_templates
from hf_ilora.runs import RunRecord, parse_arguments, prompt_path, run_main, set_up_logging
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.prompt_collator import PromptCollator

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
ANSWER_TITLES = {
    "published": "generating, published form of the layer",
    "gated": "generating, gated layer",
    "full": "all tokens",
    "title": "as long as the longest target title and its terminator",
    "free": "until all rows have ended by themselves",
}


@dataclass
class AnswerBenchmarkArguments:
    """What is measured."""

    data_dir: str = field(metadata={"help": "folder written by recipes/prepare_data.py"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    recommender: str | None = field(
        default=None, metadata={"help": "folder of a SASRec trained on that data; by default a random one, as fast"}
    )
    llm: str = field(default=EMBEDDED_LLM, metadata={"help": "folder or Hub name of the language model"})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": "answers are measured with weights in each of these"}
    )
    prompt_file: str | None = field(default=None, metadata={"help": "templates, as in recipes/train_ilora.py"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=5, metadata={"help": "batches that each program answers, in turn, and training steps"})
    batch_size: int = field(default=8, metadata={"help": "rows that are answered at once, and prompts per step"})
    answer_layers: int | None = field(default=None, metadata={"help": "decoder layers that answer; by default all"})
    answer_tokens: int = field(default=64, metadata={"help": "most tokens of a generated answer"})
    step_layers: int = field(default=4, metadata={"help": "decoder layers of the training step"})

    def __post_init__(self):
        if set(self.dtypes) - set(DTYPES) or not self.dtypes:
            raise ValueError(f"dtypes is {self.dtypes}: expected some of {', '.join(DTYPES)}")
        for name in ("threads", "rounds", "batch_size", "answer_tokens", "step_layers"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")


ARGUMENTS = (AnswerBenchmarkArguments,)


def build_ilora(
    sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str, num_layers: int | None
) -> ILoraForRecommendation:
    """iLoRA with a small random adapter on the real language model; what it costs does not depend on its weights."""
    catalogue = Catalogue(sequences.catalogue.with_format("arrow")[:])
    set_seed(0)
    if arguments.recommender is None:
        recommender = SASRecForNextItem(SASRecConfig(num_items=len(catalogue), hidden_size=64))
    else:
        recommender = SASRecForNextItem.from_pretrained(arguments.recommender)
    llm, tokenizer, source = load_language_model(arguments.llm, dtype=dtype)
    config = ILoraConfig(
        llm_name_or_path=source.name_or_path,
        num_llm_layers=num_layers,
        duplicate_titles="number",
        **(
            {}
            if arguments.prompt_file is None
            else {"prompt_templates": read_templates(prompt_path(arguments.prompt_file))}
        ),
    )
    model = ILoraForRecommendation.from_base(
        llm, recommender, tokenizer, catalogue, config, untrained_recommender=arguments.recommender is None
    )
    for layer in gated_layers(model.llm).values():
        nn.init.normal_(layer.lora_B, std=1e-3)
    return model


class Answers:
    """Rows answered by the likelihood of their candidates, or by generation with either form of the layer."""

    def __init__(self, sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str):
        self.model = build_ilora(sequences, arguments, dtype, arguments.answer_layers).eval()
        self.rows = EvaluationRows(sequences["test"], self.model.config.num_items)
        # `generate` hands the output layer a view of the prompt's last token, for which torch would copy the weights of
        # the layer for every row: up to a second that is not the fault of generating.
        self.model.llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.shared_gates = []
        weights = {id(parameter): parameter for parameter in self.model.llm.parameters()}
        self.published = copy.deepcopy(self.model.llm, weights)  # the weights are not copied
        use_published_form(self.published, self.shared_gates)
        self.published.eval()

    def score(self, rows: np.ndarray) -> torch.Tensor:
        """(batch, candidates) log-likelihoods."""
        return self.model.score_candidates(self.rows.histories(rows), torch.from_numpy(self.rows.candidates[rows]))

    @torch.no_grad()
    def generate(self, rows: np.ndarray, in_published_form: bool, most_tokens: int, to_the_end: bool) -> torch.Tensor:
        """Greedy answers, (batch, generated tokens): `most_tokens` of them, or fewer when all rows have ended and
        `to_the_end` is false."""
        histories, candidates = self.rows.histories(rows), torch.from_numpy(self.rows.candidates[rows])
        prompts = self.model.build_prompts(histories, candidates)
        gates = self.model.expert_gates(histories)  # (batch, experts)
        if in_published_form:
            self.shared_gates[:] = [gates]
        program, keywords = (self.published, {}) if in_published_form else (self.model, {"expert_gates": gates})
        terminator = self.model.title_tokens.terminator_id
        return program.generate(
            inputs_embeds=self.model.embed_prompts(prompts.input_ids, prompts.placeholder_items),
            attention_mask=prompts.attention_mask,
            do_sample=False,
            num_beams=1,
            eos_token_id=terminator,
            pad_token_id=terminator,
            max_new_tokens=most_tokens,
            min_new_tokens=most_tokens if to_the_end else None,
            **keywords,
        )

    def programs(self, rows: np.ndarray, most_tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
        """What is timed on a batch."""
        title = int(self.model.title_tokens.lengths[self.rows.target[rows]].max()) + 1  # and the terminator
        programs = {"score_candidates": lambda: self.score(rows)}
        for form, published in (("published", True), ("gated", False)):
            for ending, settings in (
                ("full", (most_tokens, True)),
                ("title", (title, True)),
                ("free", (most_tokens, False)),
            ):
                programs[f"{form}_{ending}"] = lambda settings=(published, *settings): self.generate(rows, *settings)
        return programs


def measure_answers(sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str) -> dict:
    """Rows per second of scoring and of generating; ratios are medians over the rounds, of CPU time too."""
    answers = Answers(sequences, arguments, dtype)
    model, wall, cpu, tokens = answers.model, {}, {}, {}
    prompt_lengths, title_lengths = [], []
    for round_ in range(-1, arguments.rounds):  # one round warms up
        first = max(0, round_) * arguments.batch_size
        rows = np.arange(first, first + arguments.batch_size) % len(answers.rows)
        for name, program in answers.programs(rows, arguments.answer_tokens).items():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            answer = program()
            if round_ >= 0:
                wall.setdefault(name, []).append(time.perf_counter() - begin)
                cpu.setdefault(name, []).append(time.process_time() - begin_cpu)
                tokens.setdefault(name, []).append(answer.shape[1])
        candidates = torch.from_numpy(answers.rows.candidates[rows])
        prompts = model.build_prompts(answers.rows.histories(rows), candidates)
        prompt_lengths += prompts.attention_mask.sum(1).tolist()
        title_lengths += model.title_tokens.lengths[candidates].sum(1).tolist()
        logger.info("answers in %s, round %d of %d done", dtype, round_ + 1, arguments.rounds)
    generating = [name for name in wall if name != "score_candidates"]
    return {
        "llm": model.config.llm_name_or_path,
        "layers": model.config.text_config.num_hidden_layers,
        "candidates": answers.rows.candidates.shape[1],
        "prompt_tokens": statistics.mean(prompt_lengths),
        "title_tokens": statistics.mean(title_lengths),
        "rows_per_second": {name: arguments.batch_size / statistics.median(times) for name, times in wall.items()},
        "tokens_per_row": {name: statistics.mean(tokens[name]) for name in generating},
        "times_faster": {name: median_ratio(wall[name], wall["score_candidates"]) for name in generating},
        "times_faster_cpu": {name: median_ratio(cpu[name], cpu["score_candidates"]) for name in generating},
    }


def measure_prompts(sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments) -> dict:
    """Milliseconds of drawing candidates and putting prompts together, and its share of a training step."""
    model = build_ilora(sequences, arguments, "float32", arguments.step_layers).train()
    num_candidates = len(sequences["test"][0]["candidates"])
    rows = CandidateRows(sequences["train"], sequences.num_items, num_candidates=num_candidates)
    collate = PromptCollator(model.prompts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(number: int) -> tuple[float, float]:
        """Milliseconds of its prompts, and of all of it."""
        begin = time.perf_counter()
        indices = range(number * arguments.batch_size, (number + 1) * arguments.batch_size)
        batch = collate([rows[index % len(rows)] for index in indices])
        assembled = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        return 1000 * (assembled - begin), 1000 * (time.perf_counter() - begin)

    with cProfile.Profile() as profile:  # of the steps that warm up: it slows them down
        for number in range(2):
            step(number)
    assembling, stepping = zip(*(step(number) for number in range(2, 2 + arguments.rounds)), strict=True)
    return {
        "layers": arguments.step_layers,
        "milliseconds": {"prompts": statistics.median(assembling), "step": statistics.median(stepping)},
        "share": median_ratio(assembling, stepping),
        "tokenizer_calls": tokenizer_calls(profile),
    }


def tokenizer_calls(profile: cProfile.Profile) -> int:
    """Calls of anything in tokenizers or in transformers' modules about them; a profile names builtin code by text."""
    calls = 0
    for entry in profile.getstats():
        name = entry.code if isinstance(entry.code, str) else entry.code.co_filename
        calls += entry.callcount * ("tokenization" in name or "tokenizers" in name)
    return calls


def reached_targets(results: dict) -> list[tuple[str, float, str, float]]:
    """(what, measured, "<=" or ">=", limit) of everything that has a target."""
    targets = []
    for dtype, answers in results["answers"].items():
        what = (
            f"rows per second in {dtype}: score_candidates over generating {results['setting']['answer_tokens']} tokens"
        )
        targets.append((f"{what} in the published form", answers["times_faster"]["published_full"], ">=", 5.0))
    targets.append(("putting prompts together, share of a training step", results["prompts"]["share"], "<=", 0.02))
    targets.append(("tokenizer calls while training", results["prompts"]["tokenizer_calls"], "<=", 0))
    return targets


def report(results: dict) -> str:
    """The measurements as Markdown tables that explain themselves."""
    setting, prompts = results["setting"], results["prompts"]
    lines = ["# How fast iLoRA answers", "", *table_of_targets(reached_targets(results)), ""]
    lines += [
        f"CPU threads: {setting['threads']}. torch {setting['torch']}. The programs take turns on each batch, of which"
        f" there are {setting['rounds']}; times are medians, and ratios medians of the batches' ratios.",
    ]
    for dtype, answers in results["answers"].items():
        lines += ["", *answer_table(setting, dtype, answers)]
    lines += [
        "",
        "## Putting prompts together",
        "",
        f"A training step of {setting['batch_size']} prompts on the first {prompts['layers']} layers takes"
        f" {prompts['milliseconds']['step']:.0f} ms. Of these {prompts['milliseconds']['prompts']:.2f} ms,"
        f" {100 * prompts['share']:.2f} %, go into drawing candidates and assembling prompts, with"
        f" {prompts['tokenizer_calls']} calls of a tokenizer.",
    ]
    return "\n".join(lines) + "\n"


def answer_table(setting: dict, dtype: str, answers: dict) -> list[str]:
    lines = [
        f"## Answers in {dtype}",
        "",
        f"{answers['llm']}, {answers['layers']} layers, {setting['batch_size']} rows at once. Prompts have"
        f" {answers['prompt_tokens']:.0f} tokens in the mean and show {answers['candidates']} candidates, whose titles"
        f" have {answers['title_tokens']:.0f} tokens together. Generation is greedy, from embeddings, with a cache; the"
        " adapter is fresh, so answers that end by themselves end where those of the language model do.",
        "",
        "| program | tokens generated per row | rows per second | score_candidates is faster (in CPU time) |",
        "|---|---:|---:|---:|",
        f"| score_candidates | none | {answers['rows_per_second']['score_candidates']:.2f} | |",
    ]
    for name, faster in answers["times_faster"].items():
        form, ending = name.split("_")
        lines.append(
            f"| {ANSWER_TITLES[form]}, {ANSWER_TITLES[ending]} | {answers['tokens_per_row'][name]:.1f} | "
            f"{answers['rows_per_second'][name]:.2f} | {faster:.2f} ({answers['times_faster_cpu'][name]:.2f}) |"
        )
    return lines


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    set_up_logging(arguments.output_dir)
    torch.set_num_threads(arguments.threads)
    with RunRecord(arguments.output_dir, [arguments], seed=0) as record:
        sequences = SequenceDatasets.load(arguments.data_dir)
        record.add_data(sequences.fingerprint)
        settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
        results = {
            "setting": settings | {"torch": torch.__version__},
            "answers": {dtype: measure_answers(sequences, arguments, dtype) for dtype in arguments.dtypes},
            "prompts": measure_prompts(sequences, arguments),
        }
        record.add_metrics("benchmark", results)
    write_results(results, report(results), Path(arguments.output_dir))


if __name__ == "__main__":
    run_main(main)
