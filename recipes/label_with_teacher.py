"""Asks a teacher for the next items of the training histories and writes its answers as a data set of labels.

    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/label_with_teacher.py \
        --data_dir outputs/ml-100k/data --teacher outputs/ml-100k/ilora --output_dir outputs/ml-100k/labels

The teacher is a saved model that ranks the catalogue (iLoRA with an item head, SASRec, a model that counts), a
safetensors file of scores (one row for each training row, or for each of its positions, which `history_ids` and
`prefix_lengths` then name), or a folder with DLLM2Rec's text files. `--budget 200 --acquire entropy --recommender
outputs/ml-100k/sasrec-1` asks about the 200 histories whose next item that SASRec is least certain about.

The recipe writes the labels in shards (labels-*.parquet), the teacher's item embeddings if it has any and the split is
train (item_embeddings.safetensors), and finally teacher_labels.json; `TeacherLabels.load` reads them. To resume after a
crash, run the same command again; the number of processes and the batch size may differ. On a finished folder, the
command checks the labels and changes nothing but run.json and run.log.
"""

import hf_ilora_cli.recipe_start  # isort: skip  # noqa: F401 - answers --help before the slow imports
import logging
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from hf_ilora import SequenceDatasets
from hf_ilora.data.seeds import check_seed
from hf_ilora.devices import process_state
from hf_ilora.distillation.acquisition import ACQUISITION_POLICIES
from hf_ilora.distillation.labelling import (
    LABELLED_POSITIONS,
    LabelFolder,
    LabelRequests,
    acquire_requests,
    label_shards,
    wait_for_shards,
)
from hf_ilora.distillation.teachers import ModelTeacher, ScoreTableTeacher, Teacher, load_teacher, model_fingerprint
from hf_ilora.models.loading import check_catalogue, load_recommender
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel
from hf_ilora.runs import RunRecord, parse_arguments, run_main, set_up_logging, sole_writer
from hf_ilora.runs.checks import DTYPES, check_at_least_one, check_choice, check_top_k, most_seen_items

logger = logging.getLogger(__name__)


@dataclass
class LabelArguments:
    """The teacher, the histories to label, and how to spend the budget."""

    teacher: str = field(
        metadata={"help": "saved model, .safetensors file of scores, or folder of DLLM2Rec's text files"}
    )
    data_dir: str = field(metadata={"help": "folder of the prepared data set"})
    output_dir: str = field(metadata={"help": "folder to write the labels to"})
    top_k: int = field(default=10, metadata={"help": "items per label"})
    exclude_seen: bool = field(
        default=True,
        metadata={"help": "exclude the items of the history from the answers; set to false for data with repeats"},
    )
    labelled_positions: str = field(
        default="last",
        metadata={
            "help": "last: the target of each row; all: every item of a leave-one-out sequence but the first",
            "choices": LABELLED_POSITIONS,
        },
    )
    split: str = field(
        default="train",
        metadata={
            "help": "split to label: train to learn from the labels, validation for tune_ensemble.py",
            "choices": ("train", "validation"),
        },
    )
    budget: int | None = field(default=None, metadata={"help": "number of labels to ask for; by default all"})
    acquire: str = field(
        default="random",
        metadata={"help": "which labels to spend the budget on", "choices": tuple(ACQUISITION_POLICIES)},
    )
    recommender: str | None = field(
        default=None,
        metadata={"help": "saved recommender whose outputs the choice of labels is based on; random does not read it"},
    )
    seed: int = field(default=0, metadata={"help": "random seed of the choice of labels"})
    batch_size: int = field(default=16, metadata={"help": "histories per call of the teacher, per process"})
    shard_rows: int = field(
        default=256, metadata={"help": "rows per shard, the most that a crash can lose per process"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "data type of the teacher's language model; by default as saved", "choices": DTYPES},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that comes with the language model of an iLoRA"}
    )
    timeout_minutes: int = field(
        default=120,
        metadata={"help": "minutes without a new shard after which a process no longer waits for the others"},
    )

    def __post_init__(self):
        check_at_least_one(self, "top_k", "batch_size", "shard_rows", "timeout_minutes")
        check_seed("seed", self.seed)
        check_choice("dtype", self.dtype, (None, *DTYPES))
        if self.split != "train" and self.labelled_positions != "last":
            raise ValueError(
                f"labelled_positions is {self.labelled_positions} with split {self.split}: expected last, the targets "
                "of that split"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget is {self.budget}: expected at least 1")
        if self.acquire == "random":
            return
        if self.budget is None:
            raise ValueError(
                f"acquire is {self.acquire} and budget None: expected the number of labels to choose; pass --budget"
            )
        if self.recommender is None:
            raise ValueError(
                f"acquire is {self.acquire} and recommender None: expected a recommender for all but random"
            )


ARGUMENTS = (LabelArguments,)


def main() -> None:
    (arguments,) = parse_arguments(ARGUMENTS)
    state = process_state(timeout=timedelta(minutes=arguments.timeout_minutes))
    with sole_writer(arguments.output_dir):
        label(arguments, state)


def label(arguments: LabelArguments, state: PartialState) -> None:
    """Write the labels that are not there yet, and describe them."""
    sequences, teacher, recommender = load_and_check(arguments, state.device)
    all_requests = LabelRequests.of_split(sequences[arguments.split], arguments.labelled_positions)
    fingerprint = sequences.fingerprint
    settings = {
        "data_fingerprint": fingerprint,
        "teacher_fingerprint": teacher.fingerprint,
        "num_items": sequences.num_items,
        "max_history": teacher.max_history,
        "recommender_fingerprint": None if recommender is None else model_fingerprint(recommender),
    }
    names = ("top_k", "exclude_seen", "labelled_positions", "budget", "acquire", "seed", "shard_rows", "dtype")
    if arguments.split != "train":
        settings["split"] = arguments.split
    folder = LabelFolder(arguments.output_dir, settings | {name: vars(arguments)[name] for name in names})
    if state.is_main_process:
        folder.start(partial(requests_within_budget, all_requests, teacher, recommender, arguments))
    state.wait_for_everyone()
    set_up_logging(arguments.output_dir)
    with RunRecord(arguments.output_dir, [arguments], seed=arguments.seed) as record:
        record.add_data(fingerprint)
        requests = folder.requests(all_requests)
        with record.stage("label"):
            speed = label_shards(
                folder,
                requests,
                teacher,
                exclude_seen=arguments.exclude_seen,
                batch_size=arguments.batch_size,
                process=state.process_index,
                num_processes=state.num_processes,
            )
            wait_for_shards(folder, requests, 60 * arguments.timeout_minutes)
            speeds = gather_object([speed])
        rows, tokens = sum(speed.rows for speed in speeds), sum(speed.tokens for speed in speeds)
        seconds = max(speed.seconds for speed in speeds)
        logger.info("labelled %d rows (%d tokens) in %.1f s: %.4g rows, %.4g tokens per second",
                    *(rows, tokens, seconds, rows / seconds, tokens / seconds))  # fmt: skip
        if state.is_main_process:
            with record.stage("finish"):
                description = folder.finish(requests, teacher)
            speed = {"rows_per_second": rows / seconds, "tokens_per_second": tokens / seconds}
            record.add_metrics("labels", {"rows": description["num_rows"], "labelled_now": rows} | speed)
            logger.info("%s contains %d labels of %s", arguments.output_dir, description["num_rows"], teacher.source)
        state.wait_for_everyone()


def load_and_check(arguments: LabelArguments, device: torch.device):
    """The data set, the teacher, and the recommender that `acquire` reads, or None."""
    sequences = SequenceDatasets.load(arguments.data_dir)
    if arguments.labelled_positions == "all" and sequences.protocol["name"] == "temporal_users":
        raise ValueError(
            f"labelled_positions is all and {arguments.data_dir} has the protocol {sequences.protocol['name']}, whose "
            "rows are prefixes of each other: expected last"
        )
    check_top_k("top_k", arguments.top_k, sequences.num_items)
    raw_ids = sequences.raw_ids
    teacher = load_teacher(
        arguments.teacher,
        len(sequences[arguments.split]),
        sequences.num_items,
        dtype=arguments.dtype,
        device=device,
        trust_remote_code=arguments.trust_remote_code,
    )
    if isinstance(teacher, ModelTeacher):
        check_catalogue(teacher.model, arguments.teacher, sequences.num_items, raw_ids)
    if arguments.labelled_positions == "all" and not teacher.answers_prefixes:
        raise ValueError(
            f"{arguments.teacher} contains one answer per row: expected labelled_positions last, or a table of scores "
            "with history_ids and prefix_lengths"
        )
    recommender = None
    if arguments.acquire != "random":
        recommender = load_recommender(arguments.recommender).to(device)
        if not isinstance(recommender, NextItemPreTrainedModel):
            raise ValueError(
                f"{arguments.recommender} is a {type(recommender).__name__}: expected a recommender that can score "
                "every history at little cost, such as SASRec"
            )
        check_catalogue(recommender, arguments.recommender, sequences.num_items, raw_ids)
    return sequences, teacher, recommender


def requests_within_budget(
    requests: LabelRequests, teacher: Teacher, recommender, arguments: LabelArguments
) -> LabelRequests:
    """The requests to ask, longest first, so that a batch has similar lengths and too little memory shows early."""
    if arguments.budget is not None:
        requests = acquire_requests(requests, arguments.acquire, arguments.budget, recommender, arguments.seed)
    if arguments.exclude_seen:
        spans = zip(requests.boundaries[requests.history_ids], requests.prefix_lengths, strict=True)
        most_seen = most_seen_items([requests.items[start : start + length] for start, length in spans])
        check_top_k("top_k", arguments.top_k, teacher.num_items, most_seen)
    if isinstance(teacher, ScoreTableTeacher):
        teacher.check_requests(requests)
    return requests.select(np.argsort(-requests.costs(teacher), kind="stable"))


if __name__ == "__main__":
    run_main(main)
