"""Measures a training step of iLoRA against plain LoRA, PEFT's LoRA and the published form of the gated layer.

    python -m benchmarks.ilora --output_dir outputs/benchmarks/ilora --threads 1

All programs take turns in one process, on a Llama with the shapes of SmolLM2-135M and random weights. Three
measurements: the time of a step (forward, backward, AdamW), the bytes that the forward keeps for the backward, and the
peak memory that steps add to a process. benchmarks/ilora_answers.py measures the speed of answers.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

from benchmarks.measuring import PeakMemory, in_own_process, run_benchmark, time_in_turn
from hf_ilora.models.ilora.gated_lora import GatedLoraLinear, add_gated_lora, gated_layers
from hf_ilora.models.ilora.routers import build_router
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one

TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA_ALPHA, LORA_DROPOUT, GATE_SIZE = 32, 0.1, 64
PROGRAM_TITLES = {
    "plain_lora": "plain LoRA (one expert)",
    "gated_lora": "gated LoRA",
    "published_form": "published form",
    "peft_lora": "PEFT's LoRA",
}
# Names of the ratios that are reported, with the programs that are divided.
RATIOS = {
    "gated_over_plain": ("gated_lora", "plain_lora"),
    "published_over_gated": ("published_form", "gated_lora"),
}


@dataclass
class ILoraBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})
    rounds: int = field(default=15, metadata={"help": "steps per program, in turn; medians are reported"})
    num_layers: int = field(default=4, metadata={"help": "decoder layers; SmolLM2-135M has 30"})
    batch_size: int = field(default=8, metadata={"help": "prompts per step"})
    tokens: int = field(default=256, metadata={"help": "tokens per prompt, title included"})
    title_tokens: int = field(default=8, metadata={"help": "tokens at the end of a prompt that have a loss"})
    rank: int = field(default=8, metadata={"help": "rank of the LoRA, sum over the experts"})
    num_experts: int = field(default=4, metadata={"help": "experts of the gated programs"})

    def __post_init__(self):
        check_at_least_one(self, "threads", "rounds", "num_layers", "batch_size", "title_tokens", "rank")
        if self.num_experts < 2 or self.rank % self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}: expected 2 or more, a divisor of rank {self.rank}")
        if self.tokens <= self.title_tokens:
            raise ValueError(f"tokens is {self.tokens}: expected more than title_tokens, {self.title_tokens}")


ARGUMENTS = (ILoraBenchmarkArguments,)


class PublishedLoraLinear(nn.Module):
    """A gated layer in the published form, which computes and keeps the output of every expert.

    It shares the base layer of `gated` and copies the weights of the experts, in the dtype of the base layer. Its gates
    are the only element of `shared_gates`.
    """

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
    """Replace every gated layer of a language model by its published form."""
    for name, layer in gated_layers(llm).items():
        llm.set_submodule(name, PublishedLoraLinear(layer, shared_gates))


class Program(nn.Module):
    """A language model with an adapter, and a loss on the last tokens of its prompts."""

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
        # By index, as in `ILoraForRecommendation`: for a view, the output layer would copy its weights for every row.
        keep = torch.arange(num_tokens - self.title_tokens - 1, num_tokens)
        logits = self.llm(input_ids=input_ids, logits_to_keep=keep, use_cache=False, **keywords).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, -self.title_tokens :].flatten())


def program_names() -> list[str]:
    return ["plain_lora", "gated_lora", "published_form", *(["peft_lora"] if find_spec("peft") else [])]


def smollm2_config(num_layers: int = 30) -> LlamaConfig:
    """The shapes of SmolLM2-135M, or of its first layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def build_program(name: str, arguments: ILoraBenchmarkArguments) -> Program:
    """A program in training mode. All have the same language model, from one seed."""
    set_seed(0)
    llm = LlamaForCausalLM(smollm2_config(arguments.num_layers))
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


def measure_training_step(steps: dict[str, TrainingStep], rounds: int) -> dict:
    """Milliseconds of a step of each program, and their ratios."""
    stopwatch = time_in_turn(steps, rounds)
    measured = {
        "milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.medians().items()},
        "trained_parameters": {name: step.trained_parameters for name, step in steps.items()},
    }
    for ratio, programs in RATIOS.items():
        measured[ratio], measured[f"{ratio}_cpu"] = stopwatch.ratio(*programs), stopwatch.cpu_ratio(*programs)
    return measured


def added_mebibytes(name: str, arguments: ILoraBenchmarkArguments) -> float:
    """How far three steps raise the peak memory of this process above its memory after building the program."""
    torch.set_num_threads(arguments.threads)
    step = TrainingStep(name, arguments)
    peak = PeakMemory()
    for _ in range(3):
        step()
    return peak.added_bytes() / 2**20


def memory_and_ratios(mebibytes: dict[str, float]) -> dict:
    ratios = {ratio: mebibytes[first] / mebibytes[second] for ratio, (first, second) in RATIOS.items()}
    return {"mib": mebibytes} | ratios


def measure(arguments: ILoraBenchmarkArguments) -> dict:
    added = {name: in_own_process(added_mebibytes, name, arguments) for name in program_names()}
    steps = {name: TrainingStep(name, arguments) for name in program_names()}
    return {
        "training_step": measure_training_step(steps, arguments.rounds),
        "forward_memory": memory_and_ratios({name: step.saved_bytes() / 2**20 for name, step in steps.items()}),
        "step_memory": memory_and_ratios(added),
    }


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting, step = results["setting"], results["training_step"]
    lines = [
        "# What a training step of iLoRA costs",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}. Medians of {setting['rounds']} rounds in which "
        f"all programs take turns; ratios are medians of the rounds' ratios. {setting['num_experts']} experts with "
        f"rank {setting['rank']} in sum, on {', '.join(TARGET_MODULES)}.",
        "",
        f"A step is forward, backward and AdamW of {setting['num_layers']} decoder layers with the shapes of "
        f"SmolLM2-135M (hidden 576, MLP 1536, vocabulary 49152) and random float32 weights, on {setting['batch_size']} "
        f"prompts of {setting['tokens']} tokens with a loss on the last {setting['title_tokens']}.",
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
    for ratio in RATIOS:
        memory = (f"{results[kind][ratio]:.2f}" for kind in ("forward_memory", "step_memory"))
        label = ratio.replace("_", " ")
        lines.append(f"| {label} | {step[ratio]:.2f} (CPU time {step[ratio + '_cpu']:.2f}) | {' | '.join(memory)} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
