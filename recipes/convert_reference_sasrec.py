"""Converts a SASRec, GRU4Rec or Caser of LLaRA, iLoRA or DLLM2Rec to a folder for `from_pretrained`.

    python recipes/convert_reference_sasrec.py --weights sasrec.pt --output_dir outputs/sasrec_movielens \
        --items items.parquet

`--weights` is the authors' `.pt` file (the whole module or its state dict, read without running code in it) or a
`.safetensors` file with the authors' parameter names. `--items` adds titles: a parquet file with `item_id` (the
authors' ids, from 0) and `title`, or the `items.parquet` of a prepared data set with the same items, on which
evaluate_models.py can then evaluate the model. The converted model gives the same scores.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from hf_ilora import CaserConfig, GRU4RecConfig, SASRecConfig, convert_reference
from hf_ilora.files import folder_written_whole
from hf_ilora.models import next_item
from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE
from hf_ilora.reference.convert_models import load_reference_state_dict, reference_catalogue
from hf_ilora.runs import parse_arguments, run_main

logger = logging.getLogger(__name__)

# What saving a model writes: weights, configuration and catalogue, and the code that loads it without hf_ilora.
OUR_FILES = {"config.json", "model.safetensors", CATALOGUE_FILE}
OUR_FILES |= {path.name for path in Path(next_item.__file__).parent.glob("*.py")}
MODEL_TYPES = {config.model_type for config in (SASRecConfig, GRU4RecConfig, CaserConfig)}


@dataclass
class ConversionArguments:
    """Which weights to convert, and where to write the model."""

    weights: str = field(metadata={"help": "the authors' .pt file, or .safetensors with the authors' names"})
    output_dir: str = field(metadata={"help": "folder to write the model to; an earlier conversion in it is replaced"})
    items: str | None = field(
        default=None,
        metadata={"help": "parquet file with the titles of the authors' ids, or items.parquet of a prepared data set"},
    )


ARGUMENTS = (ConversionArguments,)


def check_output_dir(output_dir: Path) -> None:
    """Raise a ValueError if `output_dir` contains anything but an earlier conversion."""
    if output_dir.is_file():
        raise ValueError(f"{output_dir} is a file: expected a folder; choose another output_dir")
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    problem = ", ".join(sorted(found - OUR_FILES))
    if found and not problem:
        config = output_dir / "config.json"
        is_ours = config.exists() and json.loads(config.read_text()).get("model_type") in MODEL_TYPES
        problem = "" if is_ours else "another model"
    if problem:
        raise ValueError(f"{output_dir} contains {problem}: expected a new folder or an earlier conversion")


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    output_dir = Path(arguments.output_dir)
    check_output_dir(output_dir)
    model = convert_reference(load_reference_state_dict(arguments.weights))
    if arguments.items is not None:
        model.catalogue = reference_catalogue(arguments.items, model.config.num_items)

    with folder_written_whole(output_dir, replaceable_files=OUR_FILES) as folder:
        model.save_pretrained(folder)
    logger.info(
        "%s -> %s: %s with %d items, hidden size %d, the newest %d items of a history, %s",
        arguments.weights,
        output_dir,
        type(model).__name__.removesuffix("ForNextItem"),
        model.config.num_items,
        model.config.hidden_size,
        model.config.max_length,
        "no titles" if model.catalogue is None else f"titles such as {model.catalogue.titles([1])[0]!r}",
    )


if __name__ == "__main__":
    run_main(main)
