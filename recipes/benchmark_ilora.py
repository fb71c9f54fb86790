"""Measures what a training step of iLoRA costs against plain LoRA, PEFT's LoRA and the published form of the layer.

    python recipes/benchmark_ilora.py --output_dir outputs/benchmark_ilora --threads 1

All programs run one after the other in every round of one process, on a Llama with the shapes of SmolLM2-135M and
random weights. Three measurements: the time of a step (forward, backward, AdamW), the bytes that the forward keeps for
the backward, and the peak memory that steps add to a process. Writes benchmark.json and benchmark.md.
"""

import json
import logging
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import write_report
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_ilora.models.gated_lora import add_gated_lora, gated_layers
from hf_ilora.models.routers import build_router
from hf_ilora.runs import RunRecord, parse_arguments, set_up_logging

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
    """The published form: the output of every expert is computed and kept, and the gates lie in a list outside."""

    def __init__(self, base_layer: nn.Linear, rank: int, num_experts: int, shared_gates: list[torch.Tensor]):
        super().__init__()
        self.base_layer, self.shared_gates = base_layer, shared_gates
        size = rank // num_experts
        self.scaling = LORA_ALPHA / size
        self.dropout = nn.Dropout(LORA_DROPOUT)
        self.lora_A = nn.ModuleList(nn.Linear(base_layer.in_features, size, bias=False) for _ in range(num_experts))
        self.lora_B = nn.ModuleList(nn.Linear(size, base_layer.out_features, bias=False) for _ in range(num_experts))
        for expert in self.lora_B:
            nn.init.zeros_(expert.weight)

    def forward(self, hidden_states):
        dropped = self.dropout(hidden_states)
        experts = [expert_b(expert_a(dropped)) for expert_a, expert_b in zip(self.lora_A, self.lora_B, strict=True)]
        expert_outputs = torch.stack(experts, dim=2)  # (batch, tokens, experts, out)
        mixed = (expert_outputs * self.shared_gates[0][:, None, :, None]).sum(dim=2)  # (batch, tokens, out)
        return self.base_layer(hidden_states) + self.scaling * mixed


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
        keep = self.title_tokens + 1
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
    for layer_name, layer in gated_layers(llm).items():
        published = PublishedLoraLinear(layer.base_layer, rank, num_experts, shared_gates)
        llm.set_submodule(layer_name, published)
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
        "gated_over_plain": _median_ratio(wall["gated_lora"], wall["plain_lora"]),
        "gated_over_plain_cpu": _median_ratio(cpu["gated_lora"], cpu["plain_lora"]),
        "published_over_gated": _median_ratio(wall["published_form"], wall["gated_lora"]),
        "published_over_gated_cpu": _median_ratio(cpu["published_form"], cpu["gated_lora"]),
        "trained_parameters": {f"{name}_trained": step.trained_parameters for name, step in steps.items()},
        "target": "gated_over_plain <= 1.10",
    }


def measure_forward_memory(steps: dict[str, TrainingStep]) -> dict:
    """MiB that a forward of each program keeps for its backward."""
    return _memory({name: step.saved_bytes() / 2**20 for name, step in steps.items()}, "gated_over_plain <= 1.05")


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
    before = _peak_mib()
    for _ in range(3):
        step()
    return _peak_mib() - before


def _peak_mib() -> float:
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def _memory(mib: dict[str, float], target: str = "") -> dict:
    return {
        "mib": mib,
        "gated_over_plain": mib["gated_lora"] / mib["plain_lora"],
        "published_over_gated": mib["published_form"] / mib["gated_lora"],
        "target": target,
    }


def _median_ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


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
    write_report(results, Path(arguments.output_dir))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory-of"]:
        print(peak_of_steps(sys.argv[2], ILoraBenchmarkArguments(**json.loads(sys.argv[3]))))
    else:
        main()
