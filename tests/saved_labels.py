"""Labels of a teacher on disk, as recipes/label_with_teacher.py writes them."""

from pathlib import Path

from hf_ilora import SequenceDatasets
from hf_ilora.distillation.labelling import LabelFolder, LabelRequests, label_shards
from hf_ilora.distillation.teachers import Teacher


def save_labels(
    folder: Path, sequences: SequenceDatasets, teacher: Teacher, labelled_positions: str, **changes: object
) -> None:
    """Label the training rows with the teacher's four best items; `changes` override the settings of the folder."""
    requests = LabelRequests.of_split(sequences["train"], labelled_positions)
    settings = {
        "data_fingerprint": sequences.fingerprint, "teacher_fingerprint": teacher.fingerprint,
        "num_items": sequences.num_items, "top_k": 4, "shard_rows": 64, "labelled_positions": labelled_positions,
    }  # fmt: skip
    labels = LabelFolder(folder, settings | changes)
    labels.start(lambda: requests)
    label_shards(
        labels, labels.requests(requests), teacher, exclude_seen=False, batch_size=16, process=0, num_processes=1
    )
    labels.finish(labels.requests(requests), teacher)
