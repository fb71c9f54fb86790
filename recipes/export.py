"""Exports a SASRec, GRU4Rec or Caser to ONNX: a folder that is served with onnxruntime, without torch.

    python recipes/export.py --model outputs/ml-100k/sasrec --output_dir outputs/ml-100k/onnx --top_k 10
    python recipes/export.py --model outputs/ml-100k/sasrec --output_dir outputs/ml-100k/onnx --top_k 10 \
        --quantize int8 --data_dir outputs/ml-100k/data

The folder has model.onnx, the catalogue, the configuration, export.json and a README with a program that recommends.
With `--data_dir`, the recipe measures the NDCG@10 of the file and of the model on the validation split, seen items
masked. Needs the packages of the extra `onnx`.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
from dataclasses import dataclass, field

from hf_ilora import SequenceDatasets, export
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.runs import parse_arguments, run_main
from hf_ilora.serving.export import QUANTIZATIONS
from hf_ilora_cli.shown_text import shown


@dataclass
class ExportArguments:
    """The model, the folder to write, and what the file returns."""

    model: str = field(metadata={"help": "folder or Hub name of a saved SASRec, GRU4Rec or Caser"})
    output_dir: str = field(metadata={"help": "folder to write; one that an earlier export wrote is replaced"})
    top_k: int | None = field(
        default=None, metadata={"help": "return this many items per history; by default the scores of all items"}
    )
    exclude_seen: bool = field(default=True, metadata={"help": "leave out the items of the history"})
    quantize: str | None = field(
        default=None,
        metadata={
            "choices": QUANTIZATIONS,
            "help": "int8 stores the weights as 8-bit integers, a quarter of the size; by default float32",
        },
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "prepared data set; the quality is measured on its validation split"}
    )


ARGUMENTS = (ExportArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    model, split = load_recommender(arguments.model), None
    if arguments.data_dir is not None:
        sequences = SequenceDatasets.load(arguments.data_dir)
        check_catalogue(model, arguments.model, sequences.num_items, sequences.raw_ids)
        split = sequences["validation"]
    exported = export(
        model,
        arguments.output_dir,
        top_k=arguments.top_k,
        exclude_seen=arguments.exclude_seen,
        quantize=arguments.quantize,
        split=split,
    )
    print(
        f"{shown(arguments.output_dir)}: {exported.num_bytes / 1e6:.2f} MB, scores differ by at most "
        f"{exported.max_difference:.1e} from the model's"
    )
    quality = exported.ndcg_at_10
    if quality is not None:
        print(
            f"NDCG@10 on {quality.num_users} validation users: {quality.exported:.5f}, model {quality.model:.5f}, "
            f"difference {quality.difference:+.5f} [{quality.low:+.5f}, {quality.high:+.5f}]"
        )


if __name__ == "__main__":
    run_main(main)
