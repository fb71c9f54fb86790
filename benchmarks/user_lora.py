"""Measures a batch of users who each have a LoRA of their own: by gates, and by an adapter per user in PEFT.

    python -m benchmarks.user_lora --output_dir outputs/benchmarks/user_lora --threads 1

Both programs answer the same prompts with the same random Llama and the same mixes of experts: iLoRA by the gates of
all users, PEFT by the LoRAs that `user_lora` makes of the stack, named per row by `adapter_names`. Their logits are
compared first. The language model without adapters takes turns with them, as a lower bound. They read whole prompts
without a cache, as for the scores of candidates, and one token after a cached prompt, as in generation.
"""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from benchmarks.measuring import run_benchmark, time_in_turn
from hf_ilora import ILoraConfig, user_lora
from hf_ilora.models.ilora.gated_lora import add_gated_lora, gated_layers
from hf_ilora.models.ilora.user_lora import lora_config, stacked_lora, write_lora
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one

VOCABULARY = 1000
PROGRAM_TITLES = {"gates": "gates", "peft": "PEFT, `adapter_names`", "base": "no adapters"}


@dataclass
class UserLoraBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=7, metadata={"help": "forwards per program and length, in turn; medians are reported"})
    users: int = field(default=64, metadata={"help": "users in a batch, each with other gates"})
    tokens: list[int] = field(
        default_factory=lambda: [1, 8, 32], metadata={"help": "tokens per user without a cache, a measurement each"}
    )
    cached_tokens: list[int] = field(
        default_factory=lambda: [32, 128],
        metadata={"help": "tokens per user in the cache while one more is read, a measurement each"},
    )
    num_layers: int = field(default=2, metadata={"help": "decoder layers"})
    hidden_size: int = field(default=64, metadata={"help": "hidden size; the MLP is three times as wide"})
    num_heads: int = field(default=4, metadata={"help": "attention heads"})
    rank: int = field(default=8, metadata={"help": "rank of the LoRA, sum over the experts"})
    num_experts: int = field(default=4, metadata={"help": "experts"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "users", "num_layers", "num_heads")
        if self.hidden_size < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}: expected a multiple of twice num_heads, {2 * self.num_heads}"
            )
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"tokens are {self.tokens}: expected lengths of at least 1")
        if min(self.cached_tokens, default=1) < 1:
            raise ValueError(f"cached_tokens are {self.cached_tokens}: expected lengths of at least 1")
        self.lora()  # checks rank and num_experts

    def lora(self) -> ILoraConfig:
        return ILoraConfig(rank=self.rank, num_experts=self.num_experts, lora_dropout=0.0)


ARGUMENTS = (UserLoraBenchmarkArguments,)


def random_llama(arguments: UserLoraBenchmarkArguments) -> PreTrainedModel:
    """A Llama with random weights, the same at every call."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
    )
    return LlamaForCausalLM(config).eval()


class Programs:
    """The language model with gated layers, in PEFT with an adapter per user, and alone.

    Attributes:
        expert_gates: (users, experts).
        stack_bytes, adapter_bytes: size of the stack's file, and of the files of all users.
        load_seconds: CPU seconds that PEFT took to load all users' adapters.
    """

    def __init__(self, arguments: UserLoraBenchmarkArguments):
        lora = arguments.lora()
        self.base, self.gated = random_llama(arguments), random_llama(arguments)
        add_gated_lora(self.gated, lora.target_modules, lora.rank, lora.num_experts, lora.lora_alpha, lora.lora_dropout)
        self.gated.eval()
        generator = torch.Generator().manual_seed(0)
        for layer in gated_layers(self.gated).values():
            nn.init.normal_(layer.lora_B, std=0.02, generator=generator)
        self.expert_gates = torch.randn(arguments.users, lora.num_experts, generator=generator).softmax(1)
        self.names = [f"user_{user}" for user in range(arguments.users)]
        with tempfile.TemporaryDirectory() as folder:
            self._write_and_load(Path(folder), lora, random_llama(arguments))

    def _write_and_load(self, folder: Path, lora: ILoraConfig, llm: PreTrainedModel) -> None:
        from peft import PeftModel  # a dependency of development alone

        write_lora(folder / "stack", stacked_lora(self.gated), lora_config(lora, "random Llama"), lora.num_experts)
        for name, gates in zip(self.names, self.expert_gates, strict=True):
            user_lora(folder / "stack", gates, folder / name)
        self.stack_bytes = weight_bytes(folder / "stack")
        self.adapter_bytes = sum(weight_bytes(folder / name) for name in self.names)
        begin = time.process_time()
        self.peft = PeftModel.from_pretrained(llm, folder / self.names[0], self.names[0])
        for name in self.names[1:]:
            self.peft.load_adapter(folder / name, name)
        self.load_seconds = time.process_time() - begin
        self.peft.eval()

    @torch.no_grad()
    def logits(self, name: str, input_ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """(users, vocabulary) of the last token, by a program's name; with a cache, `input_ids` come after it."""
        keywords = {"gates": {"expert_gates": self.expert_gates}, "peft": {"adapter_names": self.names}, "base": {}}
        llm = {"gates": self.gated, "peft": self.peft, "base": self.base}[name]
        keywords = keywords[name] | {"use_cache": cache is not None, "past_key_values": cache}
        return llm(input_ids=input_ids, logits_to_keep=1, **keywords).logits[:, 0]


def weight_bytes(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def measure_length(programs: Programs, tokens: int, cached_tokens: int, rounds: int) -> dict:
    """Milliseconds of a forward over this many tokens by program, ratios, and how far the logits differ."""
    shape = (len(programs.names), cached_tokens + tokens)
    input_ids = torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))
    known, read = input_ids.split([cached_tokens, tokens], dim=1)
    caches = {name: DynamicCache() if cached_tokens else None for name in PROGRAM_TITLES}
    if cached_tokens:
        for name, cache in caches.items():
            programs.logits(name, known, cache)

    def logits_of(name: str) -> torch.Tensor:
        logits = programs.logits(name, read, caches[name])
        if cached_tokens:
            caches[name].crop(-tokens)
        return logits

    logits = {name: logits_of(name) for name in PROGRAM_TITLES}
    stopwatch = time_in_turn({name: lambda name=name: logits_of(name) for name in PROGRAM_TITLES}, rounds)
    return {
        "tokens": tokens,
        "cached_tokens": cached_tokens,
        "cpu_milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.cpu_medians().items()},
        "milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.medians().items()},
        "peft_over_gates_cpu": stopwatch.cpu_ratio("peft", "gates"),
        "peft_over_gates": stopwatch.ratio("peft", "gates"),
        "peft_over_base_cpu": stopwatch.cpu_ratio("peft", "base"),
        "gates_over_base_cpu": stopwatch.cpu_ratio("gates", "base"),
        "largest_difference": (logits["gates"] - logits["peft"]).abs().max().item(),
        "largest_effect": (logits["gates"] - logits["base"]).abs().max().item(),
    }


def measure(arguments: UserLoraBenchmarkArguments) -> dict:
    programs = Programs(arguments)
    lengths = [(1, cached) for cached in arguments.cached_tokens] + [(tokens, 0) for tokens in arguments.tokens]
    return {
        "stack_bytes": programs.stack_bytes,
        "adapter_bytes": programs.adapter_bytes,
        "load_cpu_seconds": programs.load_seconds,
        "lengths": [measure_length(programs, *length, arguments.rounds) for length in lengths],
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    lines = [
        f"# {setting['users']} users in one batch, each with a LoRA of their own",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}. Medians of CPU time over {setting['rounds']} "
        "rounds in which all programs take turns; ratios are medians of the rounds' ratios. One forward of a Llama "
        f"with random float32 weights ({setting['num_layers']} layers, hidden {setting['hidden_size']}), logits of "
        f"the last token. {setting['num_experts']} experts with rank {setting['rank']} in sum, on all linear layers. "
        "PEFT over no adapters is what gates would reach if they took no time.",
        "",
        f"| tokens per user | in the cache | {', ms | '.join(PROGRAM_TITLES.values())}, ms | PEFT over gates | "
        "PEFT over no adapters | gates over no adapters |",
        f"|---:|---:|{'---:|' * (len(PROGRAM_TITLES) + 3)}",
    ]
    for length in results["lengths"]:
        milliseconds = " | ".join(f"{length['cpu_milliseconds'][name]:.1f}" for name in PROGRAM_TITLES)
        lines.append(
            f"| {length['tokens']} | {length['cached_tokens']} | {milliseconds} | "
            f"{length['peft_over_gates_cpu']:.1f} | {length['peft_over_base_cpu']:.1f} | "
            f"{length['gates_over_base_cpu']:.2f} |"
        )
    difference = max(length["largest_difference"] for length in results["lengths"])
    effect = min(length["largest_effect"] for length in results["lengths"])
    lines += [
        "",
        f"Logits of gates and PEFT differ by at most {difference:.0e}; the adapters change them by up to {effect:.1g}. "
        f"The stack of all experts takes {results['stack_bytes'] / 1e6:.2f} MB for any number of users, the "
        f"{setting['users']} adapters {results['adapter_bytes'] / 1e6:.2f} MB and {results['load_cpu_seconds']:.1f} s "
        "of CPU time to load.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
