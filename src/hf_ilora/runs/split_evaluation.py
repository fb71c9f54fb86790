"""Measures a trained model at the end of a recipe."""

import logging

from transformers import Trainer

from hf_ilora.data.sequences import SequenceDatasets
from hf_ilora.evaluation.ranking import SplitRanks, rank_split
from hf_ilora.evaluation.statistics import summarize_ranks
from hf_ilora.runs.record import RunRecord

logger = logging.getLogger(__name__)


def evaluate_splits(trainer: Trainer, sequences: SequenceDatasets, record: RunRecord) -> None:
    """Rank both evaluation splits with the trained model; write their metrics to the record and the log.

    With item_table "row_sharded", which no `rank_split` can read, only the target of each row is ranked.

    Args:
        trainer: the trainer of a next-item model, after training.
        sequences: the model's data set.
        record: the record of the run.
    """
    for split in ("validation", "test"):
        with record.stage(f"evaluate_{split}"):
            if trainer.args.item_table == "row_sharded":
                ranks = SplitRanks(*trainer.predict(sequences[split]).predictions.T)
            else:
                ranks = rank_split(trainer.model_wrapped, sequences[split])
            metrics = summarize_ranks(ranks)
        record.add_metrics(split, metrics)
        for name, value in metrics.items():
            logger.info("%s %s %.4f [%.4f, %.4f]", split, name, value.mean, value.low, value.high)
