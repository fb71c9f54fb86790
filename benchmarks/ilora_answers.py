"""Measures how fast iLoRA answers, and what assembling prompts costs, on real prompts and a real language model.

    python -m benchmarks.ilora_answers --data_dir outputs/ml-100k/data --recommender outputs/ml-100k/sasrec \
        --output_dir outputs/benchmarks/ilora_answers --dtypes float32 bfloat16 --threads 1

It measures first the rows per second of `score_candidates` and of greedy generation from embeddings, as in the
published program, with the layer in its published form and in ours; the programs take turns on each batch. Second, it
measures the time of drawing candidates and assembling prompts, as a fraction of a training step on the first layers,
and counts the tokenizer calls in it. The adapter is new and random: its weights do not affect the times.
"""

import copy
import cProfile
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from benchmarks.ilora import use_published_form
from benchmarks.measuring import Stopwatch, run_benchmark
from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.evaluation.evaluation_rows import EvaluationRows
from hf_ilora.models.ilora.embedded_llm import EMBEDDED_LLM
from hf_ilora.models.ilora.gated_lora import gated_layers
from hf_ilora.models.ilora.language_models import load_language_model
from hf_ilora.models.ilora.prompts import read_templates
from hf_ilora.runs import parse_arguments, prompt_path, run_main
from hf_ilora.runs.checks import DTYPES, check_at_least_one
from hf_ilora.training.candidate_rows import CandidateRows
from hf_ilora.training.prompt_collator import PromptCollator

logger = logging.getLogger(__name__)

ANSWER_TITLES = {
    "published": "generating, published form of the layer",
    "gated": "generating, gated layer",
    "full": "all tokens",
    "title": "as long as the longest target title and its terminator",
    "free": "until all rows have ended on their own",
}


@dataclass
class AnswerBenchmarkArguments:
    """Settings of the benchmark."""

    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    recommender: str | None = field(
        default=None, metadata={"help": "folder of a SASRec trained on that data; by default a random one, as fast"}
    )
    llm: str = field(default=EMBEDDED_LLM, metadata={"help": "folder or Hub name of the language model"})
    dtypes: list[str] = field(
        default_factory=lambda: ["float32"], metadata={"help": "dtypes of the weights in which answers are measured"}
    )
    prompt_file: str | None = field(
        default=None, metadata={"help": "templates: a file, or one that is shipped (movies, artists, products)"}
    )
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=5, metadata={"help": "batches that each program answers, and training steps"})
    batch_size: int = field(default=8, metadata={"help": "rows per batch, and prompts per step"})
    answer_layers: int | None = field(default=None, metadata={"help": "decoder layers that answer; by default all"})
    answer_tokens: int = field(default=64, metadata={"help": "maximal number of tokens of a generated answer"})
    step_layers: int = field(default=4, metadata={"help": "decoder layers of the training step"})

    def __post_init__(self):
        if set(self.dtypes) - set(DTYPES) or not self.dtypes:
            raise ValueError(f"dtypes is {self.dtypes}: expected some of {', '.join(DTYPES)}")
        check_at_least_one(self, "threads", "rounds", "batch_size", "answer_tokens", "step_layers")


ARGUMENTS = (AnswerBenchmarkArguments,)


def build_ilora(
    sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str, num_layers: int | None
) -> ILoraForRecommendation:
    """An iLoRA model with a small random adapter on the real language model."""
    set_seed(0)
    if arguments.recommender is None:
        recommender = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=64))
    else:
        recommender = SASRecForNextItem.from_pretrained(arguments.recommender)
    llm, tokenizer, source = load_language_model(arguments.llm, dtype=dtype)
    settings = {"llm_name_or_path": source.name_or_path, "num_llm_layers": num_layers, "duplicate_titles": "number"}
    if arguments.prompt_file is not None:
        settings["prompt_templates"] = read_templates(prompt_path(arguments.prompt_file))
    config = ILoraConfig(**settings)
    model = ILoraForRecommendation.from_base(
        llm, recommender, tokenizer, sequences.catalogue, config, untrained_recommender=arguments.recommender is None
    )
    for layer in gated_layers(model.llm).values():
        nn.init.normal_(layer.lora_B, std=1e-3)
    return model


class Answers:
    """Rows answered by the likelihood of their candidates, or by generation with either form of the layer."""

    def __init__(self, sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str):
        self.model = build_ilora(sequences, arguments, dtype, arguments.answer_layers).eval()
        self.rows = EvaluationRows(sequences["test"], self.model.config.num_items)
        # `generate` passes the output layer a view of the prompt's last token, for which torch would copy the layer's
        # weights once per row. This takes up to a second, which generation does not need.
        self.model.llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        self.shared_gates = []
        weights = {id(parameter): parameter for parameter in self.model.llm.parameters()}
        self.published = copy.deepcopy(self.model.llm, weights)  # shares the weights
        use_published_form(self.published, self.shared_gates)
        self.published.eval()

    def score(self, rows: np.ndarray) -> torch.Tensor:
        """(batch, candidates) log-likelihoods."""
        return self.model.score_candidates(self.rows.histories(rows), torch.from_numpy(self.rows.candidates[rows]))

    @torch.no_grad()
    def generate(self, rows: np.ndarray, in_published_form: bool, max_tokens: int, to_the_end: bool) -> torch.Tensor:
        """Greedy answers, (batch, generated tokens): `max_tokens` tokens, or fewer once all rows have ended, unless
        `to_the_end` suppresses the end of a title."""
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
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens if to_the_end else None,
            **keywords,
        )

    def programs(self, rows: np.ndarray, max_tokens: int) -> dict[str, Callable[[], torch.Tensor]]:
        """The programs that answer a batch, by name."""
        title = int(self.model.title_tokens.lengths[self.rows.target[rows]].max()) + 1  # and the terminator
        programs = {"score_candidates": lambda: self.score(rows)}
        for form, published in (("published", True), ("gated", False)):
            for ending, settings in (
                ("full", (max_tokens, True)),
                ("title", (title, True)),
                ("free", (max_tokens, False)),
            ):
                programs[f"{form}_{ending}"] = lambda settings=(published, *settings): self.generate(rows, *settings)
        return programs


def measure_answers(sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments, dtype: str) -> dict:
    """Rows per second of scoring and of generating, and their ratios."""
    answers = Answers(sequences, arguments, dtype)
    model, warm_up, stopwatch, tokens = answers.model, Stopwatch(), Stopwatch(), defaultdict(list)
    prompt_lengths, title_lengths = [], []
    for round_ in range(-1, arguments.rounds):  # one round warms up
        first = max(0, round_) * arguments.batch_size
        rows = np.arange(first, first + arguments.batch_size) % len(answers.rows)
        for name, program in answers.programs(rows, arguments.answer_tokens).items():
            answer = (stopwatch if round_ >= 0 else warm_up).time(name, program)
            if round_ >= 0:
                tokens[name].append(answer.shape[1])
        candidates = torch.from_numpy(answers.rows.candidates[rows])
        prompts = model.build_prompts(answers.rows.histories(rows), candidates)
        prompt_lengths += prompts.attention_mask.sum(1).tolist()
        title_lengths += model.title_tokens.lengths[candidates].sum(1).tolist()
        logger.info("answers in %s, round %d of %d done", dtype, round_ + 1, arguments.rounds)
    seconds = stopwatch.medians()
    generating = [name for name in seconds if name != "score_candidates"]
    return {
        "llm": model.config.llm_name_or_path,
        "layers": model.config.text_config.num_hidden_layers,
        "candidates": answers.rows.candidates.shape[1],
        "prompt_tokens": statistics.mean(prompt_lengths),
        "title_tokens": statistics.mean(title_lengths),
        "rows_per_second": {name: arguments.batch_size / seconds[name] for name in seconds},
        "tokens_per_row": {name: statistics.mean(tokens[name]) for name in generating},
        "times_faster": {name: stopwatch.ratio(name, "score_candidates") for name in generating},
        "times_faster_cpu": {name: stopwatch.cpu_ratio(name, "score_candidates") for name in generating},
    }


def measure_prompts(sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments) -> dict:
    """Milliseconds of drawing candidates and assembling prompts, and their fraction of a training step."""
    model = build_ilora(sequences, arguments, "float32", arguments.step_layers).train()
    num_candidates = len(sequences["test"][0]["candidates"])
    rows = CandidateRows(sequences["train"], sequences.num_items, num_candidates=num_candidates)
    collate = PromptCollator(model.prompts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def assemble(number: int) -> dict[str, torch.Tensor]:
        indices = range(number * arguments.batch_size, (number + 1) * arguments.batch_size)
        return collate([rows[index % len(rows)] for index in indices])

    def step(number: int, stopwatch: Stopwatch) -> None:
        batch = stopwatch.time("prompts", assemble, number)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    with cProfile.Profile() as profile:  # only while warming up, since profiling slows the steps down
        for number in range(2):
            step(number, Stopwatch())
    stopwatch = Stopwatch()
    for number in range(2, 2 + arguments.rounds):
        stopwatch.time("step", step, number, stopwatch)
    return {
        "layers": arguments.step_layers,
        "milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.medians().items()},
        "fraction": stopwatch.ratio("prompts", "step"),
        "tokenizer_calls": tokenizer_calls(profile),
    }


def tokenizer_calls(profile: cProfile.Profile) -> int:
    """How often the profiled code called tokenizers, or transformers' modules of tokenizers."""
    calls = 0
    for entry in profile.getstats():
        # A profile names built-in code by text.
        name = entry.code if isinstance(entry.code, str) else entry.code.co_filename
        calls += entry.callcount * ("tokenization" in name or "tokenizers" in name)
    return calls


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, prompts = results["setting"], results["prompts"]
    lines = [
        "# How fast iLoRA answers",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}. The programs take turns on each of "
        f"{setting['rounds']} batches; times are medians, and ratios are medians of the batches' ratios.",
    ]
    for dtype, answers in results["answers"].items():
        lines += ["", *answer_table(setting, dtype, answers)]
    lines += [
        "",
        "## Assembling prompts",
        "",
        f"A training step of {setting['batch_size']} prompts on the first {prompts['layers']} layers takes "
        f"{prompts['milliseconds']['step']:.0f} ms. Drawing candidates and assembling prompts takes "
        f"{prompts['milliseconds']['prompts']:.2f} ms of it, {100 * prompts['fraction']:.2f} %, and calls a tokenizer "
        f"{prompts['tokenizer_calls']} times.",
    ]
    return "\n".join(lines) + "\n"


def answer_table(setting: dict, dtype: str, answers: dict) -> list[str]:
    lines = [
        f"## Answers in {dtype}",
        "",
        f"{answers['llm']}, {answers['layers']} layers, {setting['batch_size']} rows per batch. Prompts have "
        f"{answers['prompt_tokens']:.0f} tokens on average and show {answers['candidates']} candidates, whose titles "
        f"have {answers['title_tokens']:.0f} tokens in sum. Generation is greedy, from embeddings, with a cache. The "
        "adapter is untrained, so answers that end on their own end where the language model would end them.",
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


def measure(sequences: SequenceDatasets, arguments: AnswerBenchmarkArguments) -> dict:
    return {
        "answers": {dtype: measure_answers(sequences, arguments, dtype) for dtype in arguments.dtypes},
        "prompts": measure_prompts(sequences, arguments),
    }


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    sequences = SequenceDatasets.load(arguments.data_dir)
    run_benchmark(arguments, lambda: measure(sequences, arguments), report, sequences.fingerprint)


if __name__ == "__main__":
    run_main(main)
