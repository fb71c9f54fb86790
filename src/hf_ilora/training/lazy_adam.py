"""AdamW whose steps cost as much as the rows that a batch reads, however large the item table is."""

import os

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ilora.models.next_item.encoder_for_next_item import EncoderForNextItem


class LazyAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that also takes sparse gradients of tables: it updates the rows that these contain.

    A row that a step does not read stays as it is, with its momentum: dense AdamW would move it by its momentum and
    decay it. Rows that occur several times count once, with the sum of their gradients. Parameters with dense gradients
    are updated as by AdamW, and the state has the same form.

    Args:
        params, kwargs: as in `torch.optim.AdamW`; `amsgrad` and `maximize` are for dense gradients only.

    Source: `torch.optim.SparseAdam` (TensorFlow's LazyAdam), with the weight decay of AdamW.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = [
            (table, table.grad, group)
            for group in self.param_groups
            for table in group["params"]
            if table.grad is not None and table.grad.is_sparse
        ]
        for table, _, _ in tables:
            table.grad = None  # AdamW leaves it alone
        super().step()
        for table, gradient, group in tables:
            table.grad = gradient
            self._update_rows(table, gradient, group)
        return loss

    def _update_rows(self, table: torch.Tensor, gradient: torch.Tensor, group: dict) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=table.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        (beta1, beta2), lr = group["betas"], group["lr"]
        item_ids, gradients = _summed(gradient)  # (lookups,), (lookups, hidden)
        average = state["exp_avg"][item_ids].lerp_(gradients, 1 - beta1)
        square = state["exp_avg_sq"][item_ids].mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        # What occurs several times is written several times, with equal numbers.
        state["exp_avg"][item_ids], state["exp_avg_sq"][item_ids] = average, square
        size = lr / (1 - beta1 ** state["step"])
        deviation = square.div_(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        rows = table[item_ids].mul_(1 - lr * group["weight_decay"])
        table[item_ids] = rows.sub_(average.div_(deviation).mul_(size))


def _summed(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The row ids (lookups,) of a sparse gradient, and for each the sum of all gradients of its row (lookups, hidden).

    Unlike `coalesce`, which counts the different rows, this waits for no device.
    """
    row_ids, gradients = gradient._indices()[0], gradient._values()
    place_of = row_ids.new_empty(gradient.shape[0])
    place_of[row_ids] = torch.arange(len(row_ids), device=row_ids.device)
    places = place_of[row_ids]  # (lookups,), the same one for all lookups of a row
    return row_ids, torch.zeros_like(gradients).index_add_(0, places, gradients)[places]


def check_lazy_adam(model: EncoderForNextItem, arguments: TrainingArguments) -> None:
    """Raise a ValueError for a training whose item table has no sparse gradient, or which cannot use it."""
    adam = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    spread = "DeepSpeed" if arguments.deepspeed or _launched_with("DEEPSPEED") else None
    spread = "FSDP" if arguments.fsdp or _launched_with("FSDP") else spread
    untied = arguments.world_size > 1 and not model.config.tie_word_embeddings
    for is_wrong, found, expected in (
        (
            model.config.loss_type == "cross_entropy",
            "loss_type 'cross_entropy', which reads every item in every step",
            "a sampled loss (sampled_softmax, gbce, bce)",
        ),
        (arguments.optim not in adam, f"optim {arguments.optim.value!r}", "adamw_torch or adamw_torch_fused"),
        (arguments.max_grad_norm > 0, f"max_grad_norm {arguments.max_grad_norm}", "0, no clipping"),
        (arguments.torch_compile, "torch_compile", "no compiled training"),
        (spread is not None, f"{spread}, which has no sparse gradients", "DistributedDataParallel or one process"),
        (untied, "tie_word_embeddings False in several processes", "a tied head, or one process"),
    ):
        if is_wrong:
            raise ValueError(f"item_optimizer is 'lazy_adam' with {found}: expected {expected}, or 'same'")


def _launched_with(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


__all__ = ["LazyAdamW", "check_lazy_adam"]
