"""Trains every kind of next-item model with teacher embeddings for two steps, and saves each in a folder of its own.

accelerate launch ... launched_students.py FOLDER BATCH_SIZE_PER_PROCESS
"""

import sys

import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, SASRecConfig, SASRecForNextItem
from hf_ilora.runs import leave_launch, parse_arguments

NUM_ITEMS, TEACHER_SIZE = 20, 12
BOTH = {"teacher_embedding_use": "input_and_head", "repeat_bias": True}
STUDENTS = {
    "sasrec": (SASRecForNextItem, SASRecConfig, {"attention_dropout": 0.0, **BOTH}),
    "gru4rec": (GRU4RecForNextItem, GRU4RecConfig, {}),
    "caser": (CaserForNextItem, CaserConfig, {"tie_word_embeddings": False, "head_bias": True}),
}
SETTINGS = {
    "num_train_epochs": 1,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


def main(kind: str, folder: str, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    histories = torch.randint(1, NUM_ITEMS + 1, (16, 6), generator=generator)
    table = torch.randn(NUM_ITEMS + 1, TEACHER_SIZE, generator=generator)
    rows = [{"input_ids": row[:5], "labels": torch.tensor([-100] * 4 + [int(row[5])])} for row in histories]
    settings = SETTINGS | {"output_dir": folder, "per_device_train_batch_size": batch_size}
    (arguments,) = parse_arguments((TrainingArguments,), [f"--{name}={value}" for name, value in settings.items()])
    set_seed(1)
    model_class, config_class, own = STUDENTS[kind]
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 8, "max_length": 5, "teacher_embedding_size": TEACHER_SIZE}
    model = model_class(config_class(**sizes, hidden_dropout=0.0, initializer_range=0.3, **own))
    model.set_teacher_embeddings(table)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    leave_launch()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
