"""What a training recipe measures at its end."""

import logging

from transformers import Trainer

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.statistics import summarize_ranks

from .record import RunRecord

logger = logging.getLogger(__name__)


def evaluate_splits(trainer: Trainer, sequences: SequenceDatasets, record: RunRecord) -> None:
    """Rank both evaluation splits with the trained model, and put their metrics on record and in the log.

    Args:
        trainer: of a next-item model, after training.
        sequences: its data set.
        record: of the run.
    """
    for split in ("validation", "test"):
        with record.stage(f"evaluate_{split}"):
            metrics = summarize_ranks(rank_split(trainer.model_wrapped, sequences[split]))
        record.add_metrics(split, metrics)
        for name, value in metrics.items():
            logger.info("%s %s %.4f [%.4f, %.4f]", split, name, value.mean, value.low, value.high)


__all__ = ["evaluate_splits"]
