"""Trains a SASRec whose loss is NaN in the second process alone, at the third step; each process writes what it saw."""

import os
import sys
from pathlib import Path

from hf_ilora import NextItemTrainer, NextItemTrainingArguments, SASRecConfig, SASRecForNextItem, SequenceDatasets
from hf_ilora.runs import leave_launch


class PoisonedTrainer(NextItemTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.args.process_index == 1 and self.state.global_step == 2 else loss


sequences, folder = SequenceDatasets.load(sys.argv[1]), Path(sys.argv[2])
arguments = NextItemTrainingArguments(
    str(folder), use_cpu=True, max_steps=6, per_device_train_batch_size=4, save_strategy="steps", save_steps=3,
    eval_strategy="no", early_stopping_patience=0, load_best_model_at_end=False, disable_tqdm=True,
)  # fmt: skip
model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8, num_hidden_layers=1, max_length=6))
trainer = PoisonedTrainer(model, arguments, train_dataset=sequences["train"], processing_class=sequences.catalogue)
try:
    trainer.train()
    found = "trained to the end"
except ValueError as error:
    found = str(error)
(folder / f"process-{os.environ['RANK']}.txt").write_text(found)
leave_launch()
