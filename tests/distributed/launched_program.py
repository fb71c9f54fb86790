"""Trains a linear model on 16 rows for one epoch; each process reports what it was and which rows it read."""

import json
import os
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_ilora.runs import RunRecord, leave_launch, parse_arguments


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)
        self.rows_read = []

    def forward(self, features, row, labels):
        self.rows_read += row.tolist()
        scores = self.layer(features).squeeze(-1)  # (batch,)
        return {"loss": ((scores - labels) ** 2).mean(), "logits": scores}


(arguments,) = parse_arguments((TrainingArguments,))
generator = torch.Generator().manual_seed(0)
features = torch.randn(16, 4, generator=generator)
rows = [{"features": features[i], "row": i, "labels": features[i].sum()} for i in range(16)]
with RunRecord(arguments.output_dir, [arguments], seed=arguments.seed):
    model = Linear()
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
report = {
    "world_size": arguments.world_size,
    "rank": arguments.process_index,
    "is_main": trainer.is_world_process_zero(),
    "device": arguments.device.type,
    "distributed_type": trainer.accelerator.distributed_type.value,
    "rows": model.rows_read,
}
Path(arguments.output_dir, f"report_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(report))
leave_launch()
