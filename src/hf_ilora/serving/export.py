"""Exports a trained next-item model to a folder from which it is served without torch."""

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from torch import nn
from transformers.utils import CONFIG_NAME

from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.statistics import compare_runs
from hf_ilora.files import folder_written_whole
from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE
from hf_ilora.models.next_item.configuration_next_item import catalogue_size
from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem
from hf_ilora.models.next_item.modeling_gru4rec import GRU
from hf_ilora.serving.recommendation_graph import RecommendationGraph

if TYPE_CHECKING:
    import onnx
    import onnxruntime

logger = logging.getLogger(__name__)

MODEL_FILE, WEIGHTS_FILE, DESCRIPTION_FILE, README_FILE = "model.onnx", "model.onnx.data", "export.json", "README.md"
FILES = (MODEL_FILE, WEIGHTS_FILE, DESCRIPTION_FILE, README_FILE, CATALOGUE_FILE, CONFIG_NAME)
FORMATS, QUANTIZATIONS = ("onnx",), ("int8",)
MAX_DIFFERENCE = 1e-4

_EXTRA = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 20
_INPUT = "histories"
# An output for checks and measurements, which the exported file does not have.
_ITEM_SCORES = "item_scores"
# A protobuf file is limited to 2 GiB: larger weights get a file of their own.
_LARGEST_FILE = 2**31 - 2**24


@dataclass(frozen=True)
class ExportedQuality:
    """The NDCG@10 of an exported file beside that of its model, on the same users, seen items masked.

    Args:
        model: mean of the model.
        exported: mean of the file.
        difference: exported - model, with `low` and `high`, the ends of its 95% interval over users.
        num_users: number of users.
    """

    model: float
    exported: float
    difference: float
    low: float
    high: float
    num_users: int


@dataclass(frozen=True)
class ExportedModel:
    """The content of export.json: the settings and measurements of an exported model.

    Args:
        format: "onnx".
        model_type: model type of the configuration, such as "sasrec".
        num_items: size of the catalogue.
        max_length: number of newest items of a history that the model reads.
        top_k: items per history; None for the scores of all items.
        exclude_seen: whether the items of the history are left out.
        quantize: "int8" or None.
        num_bytes: size of the file and its weights.
        max_difference: largest difference between the scores of onnxruntime and of the model, on random histories.
        ndcg_at_10: measured quality; None if it was not measured.
    """

    format: str
    model_type: str
    num_items: int
    max_length: int
    top_k: int | None
    exclude_seen: bool
    quantize: str | None
    num_bytes: int
    max_difference: float
    ndcg_at_10: ExportedQuality | None


def export(
    model: EncoderForNextItem,
    folder: str | os.PathLike,
    format: str = "onnx",
    top_k: int | None = None,
    exclude_seen: bool = True,
    quantize: str | None = None,
    split: Dataset | None = None,
) -> ExportedModel:
    """Export a model to a folder from which onnxruntime and numpy serve it, without torch.

    The folder contains model.onnx, the catalogue and the configuration of the model, export.json, and a README with a
    program that recommends. The graph takes `histories` (batch, length) int64, padded with 0 on either side, for any
    batch and any length; ids outside 1..num_items are read as padding. With `top_k` it returns `item_ids` and `scores`,
    as `recommend` does, but with id 0 and score -inf where nothing is left to recommend; without, `scores` (batch,
    num_items + 1): log p of all items, and -inf for padding and excluded items. Before the folder is written,
    onnxruntime's scores of some histories are compared with the model's.

    Args:
        model: a SASRec, GRU4Rec or Caser.
        folder: output folder; one that an earlier export wrote is replaced.
        format: "onnx".
        top_k: items per history; None returns the scores of all items.
        exclude_seen: leave out the items of the history.
        quantize: "int8" stores the weights as 8-bit integers, a quarter of the size, and scores the catalogue in
            integers; None keeps float32.
        split: an evaluation split of `build_sequences`, such as `sequences["validation"]`, on which the NDCG@10 of the
            file is compared with the model's.

    Returns:
        The content of export.json.

    Raises:
        ValueError: for a model that cannot be exported, teacher embeddings that are not folded in, settings out of
            range, packages of the extra `onnx` that are missing, a folder with other files, and a file whose scores
            are NaN or, without `quantize`, differ from the model's by more than 1e-4.

    Source: the operators of ONNX, opset 20.
    """
    for name, value, known in (("format", format, FORMATS), ("quantize", quantize, (None, *QUANTIZATIONS))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: expected {' or '.join(map(repr, known))}")
    graph = RecommendationGraph(model, top_k, exclude_seen)
    _check_extra()
    with folder_written_whole(folder, FILES) as unfinished:
        examples = _examples(graph)
        proto = onnx_model(graph)
        if quantize is not None:
            from hf_ilora.serving.int8_weights import quantize_weights  # imports onnx

            quantize_weights(proto)
        _save(proto, unfinished)
        session = onnx_session(unfinished / MODEL_FILE)
        difference = _largest_difference(session, examples)
        largest = MAX_DIFFERENCE if quantize is None else math.inf
        if not difference <= largest:  # also true for NaN
            raise ValueError(
                f"scores of the exported {type(model).__name__} differ from the model's by {difference}: expected at "
                f"most {largest}; check that the weights are finite numbers"
            )
        quality = None if split is None else _measured(model, session, split)
        del session
        del proto.graph.output[0]  # the scores that only the checks read
        _save(proto, unfinished)
        described = ExportedModel(
            format=format,
            model_type=model.config.model_type,
            num_items=catalogue_size(model.config),
            max_length=model.config.max_length,
            top_k=top_k,
            exclude_seen=exclude_seen,
            quantize=quantize,
            num_bytes=sum(file.stat().st_size for file in unfinished.glob(f"{MODEL_FILE}*")),
            max_difference=difference,
            ndcg_at_10=quality,
        )
        (unfinished / DESCRIPTION_FILE).write_text(json.dumps(asdict(described), indent=2) + "\n", encoding="utf-8")
        (unfinished / README_FILE).write_text(_readme(described, model.catalogue is not None), encoding="utf-8")
        model.config.to_json_file(unfinished / CONFIG_NAME)
        if model.catalogue is not None:
            model.catalogue.to_parquet(unfinished / CATALOGUE_FILE)
    return described


def onnx_model(graph: RecommendationGraph) -> "onnx.ModelProto":
    """Convert a graph to an ONNX model that returns `item_scores`, then its answers; the GRU of `graph` is replaced.

    Raises:
        ValueError: when torch cannot export it.
    """
    for name, module in graph.encoder.named_children():
        if isinstance(module, GRU):
            setattr(graph.encoder, name, OnnxGRU(module))
    # The sizes are neither 1 nor equal, because torch might generalise from either.
    histories = torch.zeros(graph.max_length + 3, graph.max_length + 2, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    answers = ["scores"] if graph.top_k is None else ["item_ids", "scores"]
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                (histories,),
                input_names=[_INPUT],
                output_names=[_ITEM_SCORES, *answers],
                dynamic_shapes=(sizes,),
                opset_version=_OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"torch {torch.__version__} cannot export this {type(graph.encoder).__name__} to ONNX ({error}): "
            "expected the versions of requirements.lock, which are tested; install them, or serve it with recommend"
        ) from error
    assert program is not None  # as with every export by dynamo
    return program.model_proto


class OnnxGRU(nn.Module):
    """The GRU operator of ONNX with the weights of a `GRU`, for export only: it computes nothing in torch.

    torch itself would export a loop, which takes 2.7 times as long for 50 items.

    Args:
        gru: layers of equal width.
    """

    def __init__(self, gru: GRU):
        super().__init__()
        self.hidden_size, self.num_layers = gru.hidden_size, gru.num_layers
        for layer in range(gru.num_layers):
            names = (f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}")
            weight, recurrent, *biases = (self._gates_of_onnx(getattr(gru, name).detach()) for name in names)
            self.register_buffer(f"weight{layer}", weight.unsqueeze(0))  # (1, 3 * hidden, hidden)
            self.register_buffer(f"recurrent{layer}", recurrent.unsqueeze(0))  # (1, 3 * hidden, hidden)
            self.register_buffer(f"bias{layer}", torch.cat(biases).unsqueeze(0))  # (1, 6 * hidden)

    @staticmethod
    def _gates_of_onnx(stacked: torch.Tensor) -> torch.Tensor:
        """Reset, update, candidate -> update, reset, candidate."""
        reset, update, candidate = stacked.chunk(3)
        return torch.cat([update, reset, candidate])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) -> the states of the last layer, (batch, length, hidden)."""
        states = inputs.transpose(0, 1)  # (length, batch, hidden)
        for layer in range(self.num_layers):
            names = (f"weight{layer}", f"recurrent{layer}", f"bias{layer}")
            states = torch.onnx.ops.symbolic(
                "GRU",
                (states, *(getattr(self, name) for name in names)),
                {"hidden_size": self.hidden_size, "linear_before_reset": 1},
                dtype=states.dtype,
                shape=(states.shape[0], 1, states.shape[1], self.hidden_size),  # one direction
            ).squeeze(1)
        return states.transpose(0, 1)


def onnx_session(file: str | os.PathLike, threads: int | None = None) -> "onnxruntime.InferenceSession":
    """A session of onnxruntime on the CPU.

    Args:
        file: model.onnx.
        threads: number of threads; None means the number that torch uses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _check_extra() -> None:
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(f'an export to ONNX needs {", ".join(missing)}: pip install "hf_ilora[onnx]"')


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of torch's exporter about packages and operators that these models do not use."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        exporter.setLevel(level)


def _save(proto: "onnx.ModelProto", folder: Path) -> None:
    """Write model.onnx, and weights that are too large for it to a file of their own."""
    import onnx

    is_large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > _LARGEST_FILE
    settings = {"save_as_external_data": True, "location": WEIGHTS_FILE} if is_large else {}
    onnx.save_model(proto, folder / MODEL_FILE, **settings)


def _item_scores(session: "onnxruntime.InferenceSession", histories: torch.Tensor) -> torch.Tensor:
    """(batch, num_items + 1) scores from a file that still has the output for checks."""
    (scores,) = session.run([_ITEM_SCORES], {_INPUT: histories.numpy()})
    return torch.from_numpy(scores)


def _examples(graph: RecommendationGraph) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random histories of other shapes than in the export, and their scores in torch."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for batch, length in ((1, 1), (4, graph.max_length + 7)):
        histories = torch.randint(1, graph.num_items + 1, (batch, length), generator=generator)
        histories[1:2, : length // 2] = 0
        histories[2:3, length // 3 :] = 0
        with torch.inference_mode():
            examples.append((histories, graph.item_scores(histories)))
    return examples


def _largest_difference(
    session: "onnxruntime.InferenceSession", examples: list[tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """The largest difference between scores; NaN if any score is NaN."""
    differences = [(_item_scores(session, histories) - scores)[:, 1:].abs().max() for histories, scores in examples]
    return float(torch.stack(differences).max())


def _measured(model: EncoderForNextItem, session: "onnxruntime.InferenceSession", split: Dataset) -> ExportedQuality:
    of_model = rank_split(model, split).masked
    of_file = rank_split(model, split, device="cpu", scorer=lambda histories: _item_scores(session, histories)).masked
    compared = compare_runs(*(ndcg_at(torch.from_numpy(ranks), 10).numpy() for ranks in (of_model, of_file)))
    return ExportedQuality(
        model=compared.mean_a,
        exported=compared.mean_b,
        difference=compared.difference.mean,
        low=compared.difference.low,
        high=compared.difference.high,
        num_users=compared.num_users,
    )


def _readme(described: ExportedModel, has_catalogue: bool) -> str:
    """The README of the folder, with a program that recommends."""
    size = described.top_k or 10
    program = [
        "import numpy as np",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{MODEL_FILE}")',
        f"# item ids 1 to {described.num_items}, oldest first; 0 is padding, on either side",
        f"histories = np.array([[1, {described.num_items}], [1, 0]], dtype=np.int64)",
    ]
    if described.top_k is not None:
        program += [f'item_ids, scores = session.run(None, {{"{_INPUT}": histories}})  # (2, {size}) each, best first']
    else:
        size = min(size, described.num_items)
        program += [
            f'(scores,) = session.run(None, {{"{_INPUT}": histories}})  # (2, {described.num_items + 1}), 0 is padding',
            f"item_ids = scores.argsort(axis=1)[:, ::-1][:, :{size}]",
        ]
    if has_catalogue:
        program += [
            "",
            "import pyarrow.parquet as pq",
            "",
            f'titles = pq.read_table("{CATALOGUE_FILE}")["title"].to_pylist()  # item 1 is row 0',
            "print([titles[item - 1] for item in item_ids[0]])",
        ]
    seen = "without the items of the history" if described.exclude_seen else "the items of the history included"
    answers = f"the {size} best items" if described.top_k is not None else "the scores of all items"
    left_out = "Padding and what is left out have the score -inf."
    if described.top_k is not None:
        left_out = "Where nothing is left to recommend, the item id is 0 and the score -inf."
    numbers = "8-bit integers" if described.quantize else "float32"
    return "\n".join(
        [
            f"# {described.model_type} of {described.num_items} items, exported by hf_ilora",
            "",
            f"`{MODEL_FILE}` reads the newest {described.max_length} items of each history and returns {answers},",
            f"{seen}. Scores are log-probabilities over the whole catalogue.",
            left_out,
            f"Item ids are 1 to {described.num_items}; other numbers are read as padding, so map unknown items to 0.",
            *(["Among equal scores, the lower id comes first."] if described.top_k is not None else []),
            f"Weights are {numbers}; {DESCRIPTION_FILE} has the settings and what was measured.",
            "",
            "```python",
            *program,
            "```",
            "",
        ]
    )
