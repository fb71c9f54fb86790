"""Runs the checks and measurements that need a GPU, in less than ten minutes on one.

    python -m benchmarks.gpu --output_dir outputs/benchmarks/gpu

The checks are independent: a failing one is reported with its error, and the others run. Models have random weights,
and nothing is downloaded. `--rehearse true` runs the same code on a CPU with tiny sizes, to find mistakes in it; its
figures mean nothing.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, set_seed

from benchmarks.ilora import LORA_ALPHA, TARGET_MODULES, smollm2_config
from benchmarks.measuring import run_benchmark
from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.evaluation.results import markdown_rows
from hf_ilora.models.ilora.gated_lora import add_gated_lora
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora_cli.shipped import RECIPE, shipped_folder

logger = logging.getLogger(__name__)

SMALL_LLM = smollm2_config()
LARGE_LLM = LlamaConfig(  # 1.5 billion parameters, the shapes of Qwen2.5-1.5B
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
TINY_LLM = LlamaConfig(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
LAUNCHES = ("single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


@dataclass
class GpuBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    rounds: int = field(default=20, metadata={"help": "measured calls of each program; medians are reported"})
    num_items: int = field(default=1_000_000, metadata={"help": "items of the catalogue that is ranked"})
    only: list[str] | None = field(default=None, metadata={"help": "names of the checks to run; by default all"})
    rehearse: bool = field(default=False, metadata={"help": "run on the CPU with tiny sizes"})

    def __post_init__(self):
        check_at_least_one(self, "rounds", "num_items")
        if unknown := set(self.only or ()) - set(CHECKS):
            raise ValueError(f"only contains {', '.join(sorted(unknown))}: expected some of {', '.join(CHECKS)}")
        if self.rehearse:
            self.rounds, self.num_items = 2, 1000

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


def milliseconds(program: Callable[[], object], arguments: GpuBenchmarkArguments) -> float:
    """Median time of a call, including the device's work."""
    times = []
    for _ in range(arguments.rounds + 3):
        wait(arguments)
        begin = time.perf_counter()
        program()
        wait(arguments)
        times.append(1000 * (time.perf_counter() - begin))
    return torch.tensor(times[3:]).median().item()


def wait(arguments: GpuBenchmarkArguments) -> None:
    if not arguments.rehearse:
        torch.cuda.synchronize()


def peak_mebibytes(program: Callable[[], object], arguments: GpuBenchmarkArguments) -> float | None:
    """How far a call raises the peak of the device's memory; None in a rehearsal."""
    if arguments.rehearse:
        program()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    program()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class SASRecStep:
    """Forward, backward and AdamW of a SASRec on random histories."""

    def __init__(self, arguments: GpuBenchmarkArguments, dtype: torch.dtype, **settings):
        set_seed(0)
        num_items = 1000 if arguments.rehearse else 12_101
        self.model = SASRecForNextItem(SASRecConfig(num_items=num_items, hidden_dropout=0.0, **settings))
        self.model.to(arguments.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.rows = torch.randint(1, num_items + 1, (8 if arguments.rehearse else 256, 51), device=arguments.device)
        self.dtype, self.device_type = dtype, arguments.device.type

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=self.rows[:, :-1], labels=self.rows[:, 1:]).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def check_bf16_training(arguments: GpuBenchmarkArguments) -> dict:
    """SASRec learns in bfloat16 as in float32."""
    measured = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        step = SASRecStep(arguments, dtype)
        losses = [step().item() for _ in range(50)]
        measured |= {f"{name}: ms per step": milliseconds(step, arguments), f"{name}: loss after 50 steps": losses[-1]}
    difference = abs(measured["bfloat16: loss after 50 steps"] / measured["float32: loss after 50 steps"] - 1)
    if difference > 0.05:
        raise RuntimeError(f"the losses of float32 and bfloat16 differ by {difference:.0%}: expected at most 5%")
    return measured


def check_host_waits(arguments: GpuBenchmarkArguments) -> dict:
    """A training step of SASRec does not wait for the device."""
    step = SASRecStep(arguments, torch.bfloat16, loss_type="sampled_softmax", num_negatives=256)
    step()
    if not arguments.rehearse:
        torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        if not arguments.rehearse:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


def check_compile(arguments: GpuBenchmarkArguments) -> dict:
    """A compiled SASRec gives the scores of the eager one."""
    model = SASRecStep(arguments, torch.float32).model.eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    histories = torch.randint(1, model.config.num_items + 1, (32, 50), device=arguments.device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(histories).logits, model(histories).logits, rtol=1e-3, atol=1e-3)
        return {
            "eager: ms": milliseconds(lambda: model(histories), arguments),
            "compiled: ms": milliseconds(lambda: compiled(histories), arguments),
        }


def check_large_catalogue(arguments: GpuBenchmarkArguments) -> dict:
    """`recommend` finds on the device what it finds on the CPU, without all scores in memory."""
    set_seed(0)
    model = SASRecForNextItem(SASRecConfig(num_items=arguments.num_items)).eval()
    histories = torch.randint(1, arguments.num_items + 1, (256, 50)).tolist()
    expected, _ = model.recommend(histories[:8], top_k=10)
    model.to(arguments.device)
    found, _ = model.recommend(histories[:8], top_k=10)
    same = (torch.as_tensor(found).cpu() == torch.as_tensor(expected)).float().mean().item()
    if same < 0.95:
        raise RuntimeError(f"{same:.0%} of the items are those that the CPU recommends: expected 95% or more")
    table, users = model.head.weight.detach(), torch.randn(256, model.config.hidden_size, device=arguments.device)
    return {
        "256 users: ms": milliseconds(lambda: model.recommend(histories, top_k=10), arguments),
        "256 users: MiB": peak_mebibytes(lambda: model.recommend(histories, top_k=10), arguments),
        "matrix product and topk: ms": milliseconds(lambda: (users @ table.T).topk(10), arguments),
        "one user: ms": milliseconds(lambda: model.recommend(histories[:1], top_k=10), arguments),
    }


class ILoraStep:
    """Forward, backward and AdamW of a language model with gated LoRA on random prompts."""

    def __init__(self, arguments: GpuBenchmarkArguments, config: LlamaConfig, attention: str, checkpointing: bool):
        set_seed(0)
        config = TINY_LLM if arguments.rehearse else config
        with torch.device(arguments.device):
            self.llm = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
        add_gated_lora(self.llm, TARGET_MODULES, 8, 4, lora_alpha=LORA_ALPHA, lora_dropout=0.0)
        self.llm.to(arguments.device).train()
        if checkpointing:
            self.llm.activation_checkpointing_enable()
            self.llm.enable_input_require_grads()
        self.shape = (2, 16) if arguments.rehearse else (16, 512)
        self.input_ids = torch.randint(0, config.vocab_size, self.shape, device=arguments.device)
        self.gates = torch.rand(self.shape[0], 4, device=arguments.device).softmax(dim=1)  # (batch, experts)
        trained = [parameter for parameter in self.llm.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        logits = self.llm(self.input_ids, expert_gates=self.gates, use_cache=False, logits_to_keep=8).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.input_ids[:, -7:].flatten()).backward()
        self.optimizer.step()


def check_ilora_training(arguments: GpuBenchmarkArguments) -> dict:
    """A language model with gated LoRA trains in bfloat16."""
    measured = {}
    attentions = ["sdpa", *(["flash_attention_2"] if find_spec("flash_attn") and not arguments.rehearse else [])]
    for title, config in (("135M", SMALL_LLM), ("1.5B", LARGE_LLM)):
        for attention in attentions:
            for checkpointing in (False, True):
                step = ILoraStep(arguments, config, attention, checkpointing)
                name = f"{title}, {attention}{', activation checkpointing' if checkpointing else ''}"
                measured[f"{name}: MiB"] = peak_mebibytes(step, arguments)
                tokens = step.shape[0] * step.shape[1]
                measured[f"{name}: tokens per second"] = 1000 * tokens / milliseconds(step, arguments)
                del step
    return measured


def check_four_bit(arguments: GpuBenchmarkArguments) -> dict:
    """A language model in 4 bits (bitsandbytes) takes gated LoRA and trains."""
    if arguments.rehearse or not find_spec("bitsandbytes"):
        return {"skipped": "needs a GPU and bitsandbytes"}
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(SMALL_LLM).to(torch.bfloat16).save_pretrained(folder)
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
        llm = LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, device_map={"": 0})
    add_gated_lora(llm, TARGET_MODULES, 8, 4, lora_alpha=LORA_ALPHA, lora_dropout=0.0)
    llm.to(arguments.device)
    input_ids = torch.randint(0, SMALL_LLM.vocab_size, (8, 256), device=arguments.device)
    gates = torch.full((8, 4), 0.25, device=arguments.device)
    llm(input_ids, expert_gates=gates, labels=input_ids).loss.backward()
    gradients = [parameter.grad for parameter in llm.parameters() if parameter.requires_grad]
    if not all(gradient is not None and gradient.isfinite().all() for gradient in gradients):
        raise RuntimeError("an expert has no finite gradient")
    return {"MiB of the language model": torch.cuda.memory_allocated() / 2**20}


def check_launch_files(arguments: GpuBenchmarkArguments) -> dict:
    """The recipe of SASRec trains under every launch file, with one process."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        ratings = "user,item,when,title\n" + "".join(
            f"{user},{(user + step) % 40},{step},Title {(user + step) % 40}\n"
            for user in range(64)
            for step in range(9)
        )
        Path(folder, "ratings.csv").write_text(ratings, encoding="utf-8")
        words = ["--interactions", f"{folder}/ratings.csv", "--user_column", "user", "--item_column", "item"]
        words += ["--time_column", "when", "--title_column", "title", "--output_dir", f"{folder}/data"]
        run_program([sys.executable, str(shipped_folder(RECIPE) / "prepare_data.py"), *words])
        for launch in ("cpu",) if arguments.rehearse else LAUNCHES:
            recipe = str(shipped_folder(RECIPE) / "train_sasrec.py")
            words = ["--launch", launch, "--num_processes", "1", "--data_dir", f"{folder}/data", "--hidden_size", "16"]
            words += ["--output_dir", f"{folder}/{launch}", "--num_train_epochs", "2"]
            begin = time.perf_counter()
            try:
                run_program([sys.executable, "-m", "hf_ilora_cli.launch_recipe", recipe, *words])
                measured[f"{launch}: seconds"] = time.perf_counter() - begin
            except RuntimeError as error:
                measured[f"{launch}: failed"] = str(error)
    if failed := [name for name in measured if name.endswith("failed")]:
        raise RuntimeError("; ".join(f"{name}: {measured[name]}" for name in failed))
    return measured


def run_program(words: list[str]) -> None:
    """Run a program to its end; raises a RuntimeError with its last lines when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(" ".join(done.stderr.strip().splitlines()[-2:]))


CHECKS = {
    "bf16_training": check_bf16_training,
    "host_waits": check_host_waits,
    "compile": check_compile,
    "large_catalogue": check_large_catalogue,
    "ilora_training": check_ilora_training,
    "four_bit": check_four_bit,
    "launch_files": check_launch_files,
}


def measure(arguments: GpuBenchmarkArguments) -> dict:
    """The findings of each check, with "error" for one that failed."""
    device = "CPU, rehearsal" if arguments.rehearse else torch.cuda.get_device_name()
    results = {"device": device, "checks": {}}
    for name in arguments.only or CHECKS:
        begin = time.perf_counter()
        try:
            found = CHECKS[name](arguments)
        except Exception as error:
            logger.exception("%s failed", name)
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        results["checks"][name] = found
        logger.info("%s: %.0f s", name, time.perf_counter() - begin)
    return results


def report(results: dict) -> str:
    """The results as Markdown, one row for each figure."""
    rows = [
        [CHECKS[name].__doc__.rstrip("."), figure, f"{value:,.2f}" if isinstance(value, float) else str(value)]
        for name, found in results["checks"].items()
        for figure, value in found.items()
        if value is not None
    ]
    lines = [
        f"{results['device']}, torch {results['setting']['torch']}",
        "",
        *markdown_rows(["check", "figure", ""], rows),
    ]
    return "\n".join(lines) + "\n"


ARGUMENTS = (GpuBenchmarkArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    if not arguments.rehearse and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: run this on a machine with a GPU, or with --rehearse true")
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
