"""Measures what a training step of iLoRA costs against plain LoRA, PEFT's LoRA and the published form of the layer.

    python recipes/benchmark_ilora.py --output_dir outputs/benchmark_ilora --threads 1

All programs run one after the other in every round of one process, on a Llama with the shapes of SmolLM2-135M and
random weights. Three measurements: the time of a step (forward, backward, AdamW), the bytes that the forward keeps for
the backward, and the peak memory that steps add to a process. Writes benchmark.json and benchmark.md. The speed of
answers is measured by recipes/benchmark_ilora_answers.py.
"""

import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import peak_bytes
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from hf_ilora.files import written_whole
from hf_ilora.models.ilora.gated_lora import GatedLoraLinear, add_gated_lora, gated_layers
from hf_ilora.models.ilora.routers import build_router
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging

logger = logging.getLogger(__name__)

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_ALPHA, LORA_DROPOUT, GATE_SIZE = 32, 0.1, 64


@dataclass
class ILoraBenchmarkArguments:
    """What is measured."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=15, metadata={"help": "steps per program, in turn; medians are reported"})
    num_layers: int = field(default=4, metadata={"help": "decoder layers; SmolLM2-135M has 30"})
    batch_size: int = field(default=8, metadata={"help": "prompts per step"})
    tokens: int = field(default=256, metadata={"help": "tokens per prompt, title included"})
    title_tokens: int = field(default=8, metadata={"help": "tokens per prompt with a loss"})
    rank: int = field(default=8, metadata={"help": "rank of the LoRA, all experts together"})
    num_experts: int = field(default=4, metadata={"help": "experts of the gated programs"})

    def __post_init__(self):
        for name in ("threads", "rounds", "num_layers", "batch_size", "title_tokens", "rank"):
            if vars(self)[name] < 1:
                raise ValueError(f"{name} is {vars(self)[name]}: expected at least 1")
        if self.num_experts < 2 or self.rank % self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}: expected 2 or more, a divisor of rank {self.rank}")
        if self.tokens <= self.title_tokens:
            raise ValueError(f"tokens is {self.tokens}: expected more than title_tokens, {self.title_tokens}")


ARGUMENTS = (ILoraBenchmarkArguments,)


class PublishedLoraLinear(nn.Module):
    """A gated layer in the published form: the output of every expert is computed and kept, and the gates lie in a list
    outside. It shares the base layer and has the experts' weights, in the dtype of the base layer."""

    def __init__(self, gated: GatedLoraLinear, shared_gates: list[torch.Tensor]):
        super().__init__()
        self.base_layer, self.dropout, self.scaling = gated.base_layer, gated.dropout, gated.scaling
        self.shared_gates = shared_gates
        size, kind = gated.rank // gated.num_experts, {"bias": False, "dtype": gated.base_layer.weight.dtype}
        ins, outs = gated.base_layer.in_features, gated.base_layer.out_features
        self.lora_A = nn.ModuleList(nn.Linear(ins, size, **kind) for _ in range(gated.num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(size, outs, **kind) for _ in range(gated.num_experts))
        with torch.no_grad():
            for expert, (expert_a, expert_b) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
                ranks = slice(expert * size, (expert + 1) * size)
                expert_a.weight.copy_(gated.lora_A[ranks])
                expert_b.weight.copy_(gated.lora_B[:, ranks])

    def forward(self, hidden_states):
        dropped = self.dropout(hidden_states)
        experts = [expert_b(expert_a(dropped)) for expert_a, expert_b in zip(self.lora_A, self.lora_B, strict=True)]
        expert_outputs = torch.stack(experts, dim=2)  # (batch, tokens, experts, out)
        gates = self.shared_gates[0].to(expert_outputs.dtype)  # (batch, experts)
        mixed = (expert_outputs * gates[:, None, :, None]).sum(dim=2)  # (batch, tokens, out)
        return self.base_layer(hidden_states) + self.scaling * mixed


def use_published_form(llm: PreTrainedModel, shared_gates: list[torch.Tensor]) -> None:
    """Put every gated layer of a language model into the published form."""
    for name, layer in gated_layers(llm).items():
        llm.set_submodule(name, PublishedLoraLinear(layer, shared_gates))


class Program(nn.Module):
    """A language model with an adapter, and the loss on the last tokens of its prompts."""

    def __init__(self, llm: nn.Module, title_tokens: int, router: nn.Module | None, shared_gates: list | None = None):
        super().__init__()
        self.llm, self.title_tokens, self.router, self.shared_gates = llm, title_tokens, router, shared_gates

    def forward(self, input_ids: torch.Tensor, user_embedding: torch.Tensor) -> torch.Tensor:
        keywords = {}
        if self.shared_gates is not None:
            self.shared_gates[:] = [self.router(user_embedding)]
        elif self.router is not None:
            keywords = {"expert_gates": self.router(user_embedding)}
        num_tokens = input_ids.shape[1]
        # By index, as `ILoraForRecommendation` does: of a view the output layer would copy its weights for every row.
        keep = torch.arange(num_tokens - self.title_tokens - 1, num_tokens)
        logits = self.llm(input_ids=input_ids, logits_to_keep=keep, use_cache=False, **keywords).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, -self.title_tokens :].flatten())


def program_names() -> list[str]:
    return ["plain_lora", "gated_lora", "published_form", *(["peft_lora"] if find_spec("peft") else [])]


def build_program(name: str, arguments: ILoraBenchmarkArguments) -> Program:
    """One program, in training mode; the same seed gives all of them the same language model."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    llm = LlamaForCausalLM(config)
    rank, num_experts = arguments.rank, arguments.num_experts
    if name == "peft_lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=TARGET_MODULES)
        return Program(get_peft_model(llm, lora), arguments.title_tokens, router=None).train()
    if name == "plain_lora":
        num_experts = 1
    router = build_router("conv", GATE_SIZE, num_experts)
    add_gated_lora(llm, TARGET_MODULES, rank, num_experts, LORA_ALPHA, LORA_DROPOUT)
    if name != "published_form":
        return Program(llm, arguments.title_tokens, router).train()
    shared_gates = []
    use_published_form(llm, shared_gates)
    return Program(llm, arguments.title_tokens, router, shared_gates).train()


class TrainingStep:
    """Forward, backward and AdamW of a program on random prompts."""

    def __init__(self, name: str, arguments: ILoraBenchmarkArguments):
        self.program = build_program(name, arguments)
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.batch_size, arguments.tokens)
        self.input_ids = torch.randint(0, 49152, shape, generator=generator)
        self.user_embedding = torch.randn(arguments.batch_size, GATE_SIZE, generator=generator)
        trained = [parameter for parameter in self.program.parameters() if parameter.requires_grad]
        self.trained_parameters = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.program(self.input_ids, self.user_embedding).backward()
        self.optimizer.step()

    def saved_bytes(self) -> int:
        """Bytes that a forward keeps for its backward, each storage once, weights left out."""
        weights = {tensor.untyped_storage().data_ptr() for tensor in self.program.state_dict().values()}
        saved = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.program(self.input_ids, self.user_embedding)
        del loss  # until here its graph kept all storages, and so each had an address of its own
        return sum(saved.values())


def measure_training_step(steps: dict[str, TrainingStep], arguments: ILoraBenchmarkArguments) -> dict:
    """Milliseconds of a step of each program, in turn; ratios are medians over the rounds, of CPU time too."""
    wall, cpu = {name: [] for name in steps}, {name: [] for name in steps}
    names = list(steps)
    for round_ in range(-2, arguments.rounds):  # two rounds warm up
        first = round_ % len(names)
        for name in names[first:] + names[:first]:  # each program comes after each other one
            begin, begin_cpu = time.perf_counter(), time.process_time()
            steps[name]()
            if round_ >= 0:
                wall[name].append(1000 * (time.perf_counter() - begin))
                cpu[name].append(1000 * (time.process_time() - begin_cpu))
        logger.info("training step, round %d of %d done", round_ + 1, arguments.rounds)
    return {
        "milliseconds": {name: statistics.median(values) for name, values in wall.items()},
        "gated_over_plain": median_ratio(wall["gated_lora"], wall["plain_lora"]),
        "gated_over_plain_cpu": median_ratio(cpu["gated_lora"], cpu["plain_lora"]),
        "published_over_gated": median_ratio(wall["published_form"], wall["gated_lora"]),
        "published_over_gated_cpu": median_ratio(cpu["published_form"], cpu["gated_lora"]),
        "trained_parameters": {name: step.trained_parameters for name, step in steps.items()},
    }


def measure_forward_memory(steps: dict[str, TrainingStep]) -> dict:
    """MiB that a forward of each program keeps for its backward."""
    return _memory({name: step.saved_bytes() / 2**20 for name, step in steps.items()})


def measure_step_memory(arguments: ILoraBenchmarkArguments) -> dict:
    """Peak MiB that three steps of each program add to a process of its own that has built the program.

    Call it before this process grows: a process starts from the peak of the one that started it.
    """
    peaks = {}
    for name in program_names():
        command = [sys.executable, __file__, "--memory-of", name, json.dumps(asdict(arguments))]
        peaks[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return _memory(peaks)


def peak_of_steps(name: str, arguments: ILoraBenchmarkArguments) -> float:
    """What three steps add to the peak of this process, in MiB."""
    torch.set_num_threads(arguments.threads)
    step = TrainingStep(name, arguments)
    before = peak_bytes()
    for _ in range(3):
        step()
    return (peak_bytes() - before) / 2**20


def _memory(mib: dict[str, float]) -> dict:
    return {
        "mib": mib,
        "gated_over_plain": mib["gated_lora"] / mib["plain_lora"],
        "published_over_gated": mib["published_form"] / mib["gated_lora"],
    }


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


PROGRAM_TITLES = {
    "plain_lora": "plain LoRA (one expert)",
    "gated_lora": "gated LoRA",
    "published_form": "published form",
    "peft_lora": "PEFT's LoRA",
}


def reached_targets(results: dict) -> list[tuple[str, float, str, float]]:
    """(what, measured, "<=" or ">=", limit) of everything that has a target."""
    return [
        ("time of a step, gated over plain LoRA", results["training_step"]["gated_over_plain"], "<=", 1.10),
        ("kept for the backward, gated over plain LoRA", results["forward_memory"]["gated_over_plain"], "<=", 1.05),
    ]


def table_of_targets(targets: Iterable[tuple[str, float, str, float]]) -> list[str]:
    """Lines of a table of what was to be reached: (what, measured, "<=" or ">=", limit) each."""
    lines = ["| target | measured | limit | met |", "|---|---:|---:|---|"]
    for what, measured, sign, limit in targets:
        met = measured <= limit if sign == "<=" else measured >= limit
        lines.append(f"| {what} | {measured:.3g} | {sign} {limit:g} | {'yes' if met else 'no'} |")
    return lines


def report(results: dict) -> str:
    """The measurements as Markdown tables that explain themselves."""
    setting, step = results["setting"], results["training_step"]
    lines = ["# What a training step of iLoRA costs", "", *table_of_targets(reached_targets(results))]
    lines += [
        "",
        f"CPU threads: {setting['threads']}. torch {setting['torch']}. {setting['rounds']} rounds, in which all"
        " programs take turns; times are medians over the rounds, and their ratios medians of the rounds' ratios."
        f" Experts: {setting['num_experts']}, with rank {setting['rank']} together, on {', '.join(TARGET_MODULES)}.",
        "",
        f"Forward, backward and AdamW on {setting['num_layers']} decoder layers with the shapes of SmolLM2-135M (hidden"
        f" 576, MLP 1536, vocabulary 49152), random weights in float32: {setting['batch_size']} prompts of"
        f" {setting['tokens']} tokens, with a loss on the last {setting['title_tokens']}.",
        "",
        "| program | step, ms | kept for the backward, MiB | added to the peak by three steps, MiB | trained weights |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, milliseconds in step["milliseconds"].items():
        memory = (results[kind]["mib"][name] for kind in ("forward_memory", "step_memory"))
        lines.append(
            f"| {PROGRAM_TITLES[name]} | {milliseconds:.0f} | {' | '.join(f'{mib:.0f}' for mib in memory)} | "
            f"{step['trained_parameters'][name]:,} |"
        )
    for label, ratio in (("gated over plain", "gated_over_plain"), ("published over gated", "published_over_gated")):
        memory = (f"{results[kind][ratio]:.2f}" for kind in ("forward_memory", "step_memory"))
        lines.append(f"| {label} | {step[ratio]:.2f} (CPU time {step[ratio + '_cpu']:.2f}) | {' | '.join(memory)} | |")
    return "\n".join(lines) + "\n"


def write_results(results: dict, text: str, folder: Path) -> None:
    """benchmark.json and benchmark.md."""
    for name, content in (("benchmark.json", json.dumps(results, indent=2) + "\n"), ("benchmark.md", text)):
        with written_whole(folder / name) as path:
            path.write_text(content, encoding="utf-8")
    print(text)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    set_up_logging(arguments.output_dir)
    torch.set_num_threads(arguments.threads)
    with RunRecord(arguments.output_dir, [arguments], seed=0) as record:
        settings = {name: value for name, value in asdict(arguments).items() if name != "output_dir"}
        results = {"setting": settings | {"torch": torch.__version__}}
        step_memory = measure_step_memory(arguments)
        steps = {name: TrainingStep(name, arguments) for name in program_names()}
        results["training_step"] = measure_training_step(steps, arguments)
        results["forward_memory"] = measure_forward_memory(steps)
        results["step_memory"] = step_memory
        record.add_metrics("benchmark", results)
    write_results(results, report(results), Path(arguments.output_dir))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-of"]:
        print(peak_of_steps(sys.argv[2], ILoraBenchmarkArguments(**json.loads(sys.argv[3]))))
    else:
        run_main(main)
