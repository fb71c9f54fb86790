"""Turn the SASRec of LLaRA, iLoRA or DLLM2Rec into our folder format, with the same scores.

    python recipes/convert_reference_sasrec.py sasrec.pt outputs/sasrec_movielens --items items.parquet

The first argument is the authors' `.pt` file (the whole module or its state dict, read without running anything in it)
or a `.safetensors` file with the authors' names. `--items` gives titles: parquet with `item_id` (the reference's ids,
from 0) and `title`, or the `items.parquet` of a prepared data set with the same items; `recipes/evaluate_models.py`
then compares the model on that data set. The folder is for `from_pretrained`.
"""

import argparse
import json
import logging
import shutil
import tempfile
from pathlib import Path

from hf_ilora import SASRecConfig, convert_reference_sasrec
from hf_ilora.models import next_item
from hf_ilora.models.next_item.catalogue import CATALOGUE_FILE
from hf_ilora.reference.convert_sasrec import load_reference_state_dict, reference_catalogue

logger = logging.getLogger(__name__)

OUR_FILES = {"config.json", "model.safetensors", CATALOGUE_FILE}
OUR_FILES |= {path.name for path in Path(next_item.__path__[0]).glob("[a-z]*.py")}  # the code that a model brings along


def check_output_dir(output_dir: Path) -> None:
    """Raise a ValueError when `output_dir` holds anything but an earlier conversion."""
    found = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    problem = ", ".join(sorted(found - OUR_FILES))
    if found and not problem:
        config = output_dir / "config.json"
        is_ours = config.exists() and json.loads(config.read_text()).get("model_type") == SASRecConfig.model_type
        problem = "" if is_ours else "another model"
    if problem:
        raise ValueError(f"{output_dir} holds {problem}: expected a new folder or an earlier conversion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="the authors' .pt file, or .safetensors with the authors' names")
    parser.add_argument("output_dir", type=Path, help="folder to write; replaced when it is an earlier conversion")
    parser.add_argument("--items", type=Path, help="parquet with titles: the reference's, or of a prepared data set")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    output_dir = arguments.output_dir
    check_output_dir(output_dir)
    model = convert_reference_sasrec(load_reference_state_dict(arguments.weights))
    if arguments.items is not None:
        model.catalogue = reference_catalogue(arguments.items, model.config.num_items)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as workplace:
        new = Path(workplace) / "new"
        model.save_pretrained(new)
        previous = output_dir.with_name(f".{output_dir.name}.previous")  # where a kill between the renames leaves it
        if output_dir.exists():
            shutil.rmtree(previous, ignore_errors=True)
            output_dir.rename(previous)
        try:
            new.rename(output_dir)
        except OSError:
            if previous.exists():
                previous.rename(output_dir)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    logger.info(
        "%s -> %s: SASRec with %d items, hidden size %d, the newest %d items of a history, %s",
        arguments.weights,
        output_dir,
        model.config.num_items,
        model.config.hidden_size,
        model.config.max_length,
        "no titles" if model.catalogue is None else f"titles such as {model.catalogue.titles([1])[0]!r}",
    )


if __name__ == "__main__":
    main()
