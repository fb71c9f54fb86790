"""Trains next-item models with an item table in every process, and with one that is spread over the processes.

accelerate launch ... launched_row_sharded.py FOLDER

FOLDER/data-30 and FOLDER/data-31 have data sets of so many items. Each case of `CASES` ends in
FOLDER/<case>/<item_table>, and what a process saw in FOLDER/<case>/<item_table>-<rank>.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import set_seed

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    GRU4RecConfig,
    GRU4RecForNextItem,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
    SequenceDatasets,
)
from hf_ilora.runs import leave_launch
from hf_ilora.training.row_sharded_table import RowShardedTable

SASREC = (SASRecForNextItem, SASRecConfig, {"num_hidden_layers": 1, "attention_dropout": 0.0})
SAMPLED = {"loss_type": "sampled_softmax"}
# Model, configuration and training of each; 30 items and padding are 31 rows, and 16 of them in the first process.
CASES = {
    "sasrec": (*SASREC, SAMPLED | {"repeat_bias": True, "score_temperature": 0.2}, {}),
    "accumulated": (*SASREC, SAMPLED, {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "gbce": (*SASREC, {"loss_type": "gbce", "negative_sharing": "position", "popularity_power": 0.5}, {}),
    "gru4rec": (GRU4RecForNextItem, GRU4RecConfig, {}, SAMPLED, {}),
    "caser": (CaserForNextItem, CaserConfig, {}, {"loss_type": "bce", "num_items": 31}, {}),
}
SETTINGS = {
    "max_steps": 6, "per_device_train_batch_size": 6, "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01,
    "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 9,
    "item_optimizer": "lazy_adam", "weight_decay": 0.1, "report_to": [], "per_device_eval_batch_size": 7,
}  # fmt: skip


def trainer_of(case: str, folder: Path, item_table: str, seed: int = 0, on_meta: bool = False, **changes):
    model_class, config_class, sizes, loss, settings = CASES[case]
    sizes = {"num_items": 30, "hidden_size": 8, "max_length": 6, "num_negatives": 4, "hidden_dropout": 0.0} | sizes
    arguments = NextItemTrainingArguments(
        str(folder), item_table=item_table, **SETTINGS | {"seed": seed} | settings | changes
    )
    set_seed(seed)
    with torch.device("meta" if on_meta else "cpu"):
        model = model_class(config_class(**sizes | loss))
    sequences = SequenceDatasets.load(Path(sys.argv[1], f"data-{model.config.num_items}"))
    trainer = NextItemTrainer(
        model,
        arguments,
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
    )
    return trainer, sequences


def train(case: str, folder: Path) -> None:
    """Both tables from one start, to their best checkpoint; then the sharded one again from its third step."""
    for item_table in ("replicated", "row_sharded"):
        trainer, sequences = trainer_of(case, folder / item_table, item_table)
        trainer.train()
        trainer.save_model()
        ranks = torch.from_numpy(trainer.predict(sequences["test"]).predictions)
        found = {"ranks": ranks, "rows": len(trainer.model.get_input_embeddings().weight)}
        found["log"] = [entry for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
        if item_table == "row_sharded":
            found["moments"] = len(trainer.optimizer.state[trainer._table.block]["exp_avg"])
        torch.save(found, folder / f"{item_table}-{dist.get_rank()}.pt")


def resume(folder: Path) -> None:
    """A run on meta to its end, and another one, which starts from other weights, from its checkpoint."""
    settings = {"load_best_model_at_end": False}
    whole, _ = trainer_of("sasrec", folder / "whole", "row_sharded", on_meta=True, **settings)
    whole.train()
    resumed, _ = trainer_of("sasrec", folder / "resumed", "row_sharded", seed=0, on_meta=True, **settings)
    with torch.no_grad():
        resumed._table.block.normal_()
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    messages = []
    for item_table, checkpoint in (("replicated", "whole"), ("row_sharded", "replicated")):
        trainer, _ = trainer_of("sasrec", folder / "refused", item_table, **settings)
        try:
            trainer.train(resume_from_checkpoint=str(folder / checkpoint / "checkpoint-3"))
        except ValueError as error:
            messages.append(str(error))
    torch.save(messages, folder / f"refused-{dist.get_rank()}.pt")


def look_up(folder: Path) -> None:
    """Lookups and ranks of a small table, of which each process asks something else."""
    model = SASRecForNextItem(SASRecConfig(num_items=4, hidden_size=2, num_attention_heads=1, num_hidden_layers=1))
    weights = torch.arange(10.0).view(5, 2)
    model.get_input_embeddings().weight.data.copy_(weights)
    table, rank = RowShardedTable(model, seed=0), dist.get_rank()
    item_ids = torch.tensor([[[1, 1, 3, 1]], [[3, 0, 2, 4]]][rank])
    factors = 10.0 ** torch.arange(4) * (rank + 1)
    rows = table.rows(item_ids)
    (rows * factors.view(1, 4, 1)).sum().backward()
    users = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], [[-1.0, -2.0]]][rank])
    targets, seen = (torch.tensor(ids[rank]) for ids in ([[2, 4, 4], [3]], [[[4], [1], [3]], [[2, 2, 3]]]))
    ranks = table.ranks(model.head, users, targets, seen, torch.zeros(len(users), 1, dtype=torch.int64))
    found = {"rows": rows.detach(), "gradient": table.block.grad.to_dense(), "ranks": ranks, "whole": table.whole()}
    torch.save(found, folder / f"looked_up-{rank}.pt")


if __name__ == "__main__":
    output = Path(sys.argv[1])
    trainer_of("sasrec", output / "none", "replicated")  # sets the processes up
    look_up(output)
    for name in CASES:
        train(name, output / name)
    resume(output / "sasrec")
    leave_launch()
