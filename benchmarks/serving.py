"""Measures how a SASRec is served: one user's answer in every form, tables of users, and memory.

    python -m benchmarks.serving --output_dir outputs/benchmarks/serving --threads 1

For each size of the catalogue: milliseconds for the top ten of one user by `recommend`, by `torch.compile`, by
onnxruntime with float32 and int8 weights (extra `onnx`), by `ExactItemIndex`, and by `ItemIndex` (extra `index`) with
its recall against the exact answer; `recommend` of a batch against the matrix product alone; `recommend_all` against
the bare program in batches, encoder, matrix product and `torch.topk`; and the memory of `recommend_all`. Compared
programs take turns in one process.

The models are untrained. Their tables are drawn around centres, as those of trained models have clusters, so that the
recall of the index is near that of real tables; pass `--model` to measure a trained one instead.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from benchmarks.measuring import PeakMemory, Stopwatch, in_own_process, run_benchmark, time_in_turn
from hf_ilora import ExactItemIndex, ItemIndex, SASRecConfig, SASRecForNextItem, export, recommend_all
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.runs.checks import check_at_least_one
from hf_ilora.serving.export import MODEL_FILE, onnx_session
from hf_ilora.serving.recommendation_graph import RecommendationGraph

logger = logging.getLogger(__name__)

FORMS = {
    "eager": "recommend",
    "compile": "torch.compile",
    "onnx": "ONNX",
    "int8": "ONNX int8",
    "exact": "ExactItemIndex",
    "index": "ItemIndex",
}
TOP_K = 10


@dataclass
class ServingBenchmarkArguments:
    """Settings of the benchmark."""

    output_dir: str = field(metadata={"help": "folder for benchmark.json and benchmark.md"})
    model: str | None = field(
        default=None, metadata={"help": "folder of a trained SASRec, GRU4Rec or Caser to measure instead of num_items"}
    )
    num_items: list[int] = field(
        default_factory=lambda: [1_682, 12_101, 100_000, 1_000_000], metadata={"help": "sizes of the catalogue"}
    )
    forms: list[str] = field(default_factory=lambda: list(FORMS), metadata={"help": "forms of serving one user"})
    hidden_size: int = field(default=64, metadata={"help": "width of the models"})
    history_length: int = field(default=50, metadata={"help": "items per history"})
    calls: int = field(default=200, metadata={"help": "answers to one user per form"})
    table_users: int = field(default=4_096, metadata={"help": "users of recommend_all; 0 skips it and the batch"})
    rounds: int = field(default=3, metadata={"help": "alternating runs of recommend_all and the bare program"})
    memory_users: int = field(default=100_000, metadata={"help": "users of the measurement of memory; 0 skips it"})
    memory_items: int = field(default=100_000, metadata={"help": "items of the measurement of memory"})
    batch_size: int = field(default=256, metadata={"help": "users per batch"})
    recall: float = field(default=0.98, metadata={"help": "recall that the index is tuned to, on other users"})
    threads: int = field(default=1, metadata={"help": "CPU threads of all programs"})

    def __post_init__(self):
        check_at_least_one(
            self, "hidden_size", "history_length", "calls", "rounds", "batch_size", "memory_items", "threads"
        )
        if unknown := [form for form in self.forms if form not in FORMS]:
            raise ValueError(f"forms contain {unknown[0]!r}: expected some of {', '.join(FORMS)}")


ARGUMENTS = (ServingBenchmarkArguments,)


def clustered_model(num_items: int, arguments: ServingBenchmarkArguments) -> SASRecForNextItem:
    """An untrained SASRec whose item table has clusters."""
    torch.manual_seed(0)
    config = SASRecConfig(num_items=num_items, hidden_size=arguments.hidden_size, max_length=arguments.history_length)
    model = SASRecForNextItem(config).eval()
    table = model.head.weight.detach()
    centres = torch.randn(max(1, num_items // 50), table.shape[1])
    table[1:] = centres[torch.randint(len(centres), (num_items,))]
    table[1:] += 0.5 * torch.randn(num_items, table.shape[1])
    return model


def random_histories(num_users: int, num_items: int, length: int, seed: int = 0) -> np.ndarray:
    """(num_users, length) item ids."""
    return np.random.default_rng(seed).integers(1, num_items + 1, size=(num_users, length))


def programs_for_one_user(
    model: SASRecForNextItem, arguments: ServingBenchmarkArguments, folder: Path
) -> tuple[dict[str, Callable], dict]:
    """Programs that answer a history (1, length) by form, and their facts: bytes of files, recall of the index."""
    programs, facts = {"eager": lambda history: model.recommend(history, TOP_K)}, {}
    if "compile" in arguments.forms:
        compiled = torch.compile(RecommendationGraph(model, TOP_K), fullgraph=True)
        programs["compile"] = torch.inference_mode()(lambda history: compiled(torch.from_numpy(history)))
    for form, quantize in (("onnx", None), ("int8", "int8")):
        if form in arguments.forms:
            exported = export(model, folder / form, top_k=TOP_K, quantize=quantize)
            session = onnx_session(folder / form / MODEL_FILE, arguments.threads)
            programs[form] = lambda history, session=session: session.run(None, {"histories": history})
            facts[form] = {"bytes": exported.num_bytes}
    if "exact" in arguments.forms:
        exact = ExactItemIndex(model)
        programs["exact"] = lambda history: exact.recommend(history, TOP_K)
    if "index" in arguments.forms:
        index, length, num_items = ItemIndex.build(model), arguments.history_length, model.config.num_items
        index.tune(random_histories(200, num_items, length, seed=1), arguments.recall, TOP_K)
        recall = index.recall(random_histories(200, num_items, length, seed=2), TOP_K)
        programs["index"] = lambda history: index.recommend(history, TOP_K)
        facts["index"] = {"recall": recall, "probes": index.probes, "lists": len(index.centroids)}
    return {form: program for form, program in programs.items() if form in arguments.forms}, facts


def measure_one_user(model: SASRecForNextItem, arguments: ServingBenchmarkArguments) -> dict[str, dict]:
    """Milliseconds of an answer to one user, by form, with the facts of `programs_for_one_user`."""
    histories = random_histories(100, model.config.num_items, arguments.history_length)
    warm_up, stopwatch = Stopwatch(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        programs, facts = programs_for_one_user(model, arguments, Path(folder))
        for call in range(-10, arguments.calls):
            history = histories[call % len(histories)][None]
            for form, program in programs.items():
                (stopwatch if call >= 0 else warm_up).time(form, program, history)
    return {
        form: {
            "p50_milliseconds": 1000 * float(np.percentile(stopwatch.wall[form], 50)),
            "p95_milliseconds": 1000 * float(np.percentile(stopwatch.wall[form], 95)),
            "p50_cpu_milliseconds": 1000 * float(np.percentile(stopwatch.cpu[form], 50)),
            "p95_cpu_milliseconds": 1000 * float(np.percentile(stopwatch.cpu[form], 95)),
            **facts.get(form, {}),
        }
        for form in programs
    }


@torch.inference_mode()
def bare_program(model: SASRecForNextItem, histories: np.ndarray, batch_size: int) -> torch.Tensor:
    """Item ids (users, TOP_K) by batches through the encoder, one matrix product with the table, and `torch.topk`."""
    best = []
    for first in range(0, len(histories), batch_size):
        states = model.user_embeddings(torch.from_numpy(histories[first : first + batch_size]))
        best.append((states @ model.head.weight[1:].t()).topk(TOP_K).indices + 1)
    return torch.cat(best)


def measure_table(model: SASRecForNextItem, arguments: ServingBenchmarkArguments) -> dict:
    """Users per second of `recommend_all` and of the bare program, and the ratio of their speeds."""
    histories = random_histories(arguments.table_users, model.config.num_items, arguments.history_length)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "recommendations.parquet"

        def all_users() -> None:
            output.unlink(missing_ok=True)
            recommend_all(model, histories, output, TOP_K, arguments.batch_size)

        programs = {
            "recommend_all": all_users,
            "bare": lambda: bare_program(model, histories, arguments.batch_size),
        }
        stopwatch = time_in_turn(programs, arguments.rounds, warm_up_rounds=1)
    return {
        "users_per_second": {name: len(histories) / seconds for name, seconds in stopwatch.medians().items()},
        # A ratio of speeds is the inverse ratio of times.
        "recommend_all_over_bare": stopwatch.ratio("bare", "recommend_all"),
        "recommend_all_over_bare_cpu": stopwatch.cpu_ratio("bare", "recommend_all"),
    }


def measure_batch(model: SASRecForNextItem, arguments: ServingBenchmarkArguments) -> dict:
    """Milliseconds of `recommend` for one batch of users and of the bare matrix product, and the ratio of the times."""
    histories = random_histories(arguments.batch_size, model.config.num_items, arguments.history_length)

    @torch.inference_mode()
    def product() -> torch.Tensor:
        return states @ model.head.weight[1:].t()

    with torch.inference_mode():
        states = model.user_embeddings(torch.from_numpy(histories))
    programs = {"recommend": lambda: model.recommend(histories, TOP_K), "product": product}
    stopwatch = time_in_turn(programs, arguments.rounds, warm_up_rounds=1)
    return {
        "cpu_milliseconds": {name: 1000 * seconds for name, seconds in stopwatch.cpu_medians().items()},
        "recommend_over_product_cpu": stopwatch.cpu_ratio("recommend", "product"),
    }


def memory_of_recommend_all(arguments: ServingBenchmarkArguments) -> dict:
    """Memory of `recommend_all` beside the model and the histories."""
    torch.set_num_threads(arguments.threads)
    model = clustered_model(arguments.memory_items, arguments)
    model.recommend(np.ones((1, arguments.history_length), dtype=np.int64), TOP_K)
    histories = random_histories(arguments.memory_users, arguments.memory_items, arguments.history_length)
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        recommend_all(model, histories, Path(folder) / "recommendations.parquet", TOP_K, arguments.batch_size)
    return {"users": len(histories), "items": arguments.memory_items, "added_bytes": peak.added_bytes()}


def memory_of_recommend(num_users: int, num_items: int, arguments: ServingBenchmarkArguments) -> int:
    """Bytes that one call of `recommend` adds to the model."""
    torch.set_num_threads(arguments.threads)
    model = clustered_model(num_items, arguments)
    model.recommend(np.ones((1, arguments.history_length), dtype=np.int64), TOP_K)
    histories = random_histories(num_users, num_items, arguments.history_length)
    peak = PeakMemory()
    model.recommend(histories, TOP_K)
    return peak.added_bytes()


def measure(arguments: ServingBenchmarkArguments) -> dict:
    if arguments.model is None:
        models = (clustered_model(num_items, arguments) for num_items in arguments.num_items)
    else:
        models = iter([AutoModel.from_pretrained(arguments.model).eval()])
    results = {"catalogues": []}
    for model in models:
        measured = {"items": model.config.num_items, "one_user": measure_one_user(model, arguments)}
        if arguments.table_users:
            measured["batch"] = measure_batch(model, arguments)
            measured["table"] = measure_table(model, arguments)
        results["catalogues"].append(measured)
        logger.info("%d items done", model.config.num_items)
    if arguments.memory_users:
        results["memory"] = in_own_process(memory_of_recommend_all, arguments)
    return results


def report(results: dict) -> str:
    """The measurements as Markdown."""
    setting = results["setting"]
    forms = [form for form in FORMS if form in setting["forms"]]
    lines = [
        "# Serving a SASRec",
        "",
        f"{setting['threads']} CPU thread(s), torch {setting['torch']}, hidden size {setting['hidden_size']}, "
        f"histories of {setting['history_length']} items. Milliseconds of CPU time for the top ten of one user: median "
        f"(95th percentile), of {setting['calls']} answers in turn.",
        "",
        f"| items | {' | '.join(FORMS[form] for form in forms)} | recall of the index | int8 / ONNX, bytes |",
        f"|---:{'|---:' * len(forms)}|---:|---:|",
    ]
    for catalogue in results["catalogues"]:
        one_user = catalogue["one_user"]
        times = [
            f"{one_user[form]['p50_cpu_milliseconds']:.2f} ({one_user[form]['p95_cpu_milliseconds']:.2f})"
            for form in forms
        ]
        recall = f"{one_user['index']['recall']:.3f}" if "index" in one_user else ""
        size = ""
        if {"onnx", "int8"} <= one_user.keys():
            size = f"{one_user['int8']['bytes'] / one_user['onnx']['bytes']:.2f}"
        lines.append(f"| {catalogue['items']:,} | {' | '.join(times)} | {recall} | {size} |")
    if any("batch" in catalogue for catalogue in results["catalogues"]):
        lines += [
            "",
            f"CPU milliseconds of `recommend` for {setting['batch_size']} users, encoder included, and of the matrix "
            "product of their states with the item table, which contains all scores.",
            "",
            "| items | recommend | product | ratio |",
            "|---:|---:|---:|---:|",
        ]
        for catalogue in results["catalogues"]:
            times, ratio = catalogue["batch"]["cpu_milliseconds"], catalogue["batch"]["recommend_over_product_cpu"]
            lines.append(
                f"| {catalogue['items']:,} | {times['recommend']:,.1f} | {times['product']:,.1f} | {ratio:.2f} |"
            )
    if any("table" in catalogue for catalogue in results["catalogues"]):
        lines += [
            "",
            f"Users per second in batches of {setting['batch_size']}: `recommend_all` into a parquet file against the "
            "encoder, one matrix product and `torch.topk`, which mask nothing and normalise nothing. Medians of "
            f"{setting['rounds']} alternating rounds, the ratio in brackets of CPU time.",
            "",
            "| items | recommend_all | bare | ratio |",
            "|---:|---:|---:|---:|",
        ]
        for catalogue in results["catalogues"]:
            table = catalogue["table"]
            speeds = table["users_per_second"]
            ratio = f"{table['recommend_all_over_bare']:.2f} ({table['recommend_all_over_bare_cpu']:.2f})"
            lines.append(
                f"| {catalogue['items']:,} | {speeds['recommend_all']:,.0f} | {speeds['bare']:,.0f} | {ratio} |"
            )
    if "memory" in results:
        memory = results["memory"]
        lines += [
            "",
            f"`recommend_all` for {memory['users']:,} users and {memory['items']:,} items adds "
            f"{memory['added_bytes'] / 2**20:,.0f} MiB to the model and the histories.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    run_benchmark(arguments, lambda: measure(arguments), report)


if __name__ == "__main__":
    run_main(main)
