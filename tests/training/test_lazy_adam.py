import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from hf_ilora import (
    DistillationArguments,
    DistillationTrainer,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
)
from hf_ilora.training.lazy_adam import LazyAdamW
from tests.synthetic import cyclic_sequences

NUM_ITEMS = 30
SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
LOOKUPS = ([3, 1, 3, 3], [1, 5], [7, 3])


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=64)


def sparse_gradient(row_ids: list[int], step: int) -> torch.Tensor:
    values = torch.randn(len(row_ids), 4, generator=torch.Generator().manual_seed(step))
    return torch.sparse_coo_tensor(torch.tensor([row_ids]), values, (9, 4), check_invariants=True)


def test_rows_are_updated_by_adamw_where_a_step_reads_them_and_otherwise_not_at_all():
    start = torch.randn(9, 4, generator=torch.Generator().manual_seed(9))
    table = nn.Parameter(start.clone())
    optimizer = LazyAdamW([table], fused=True, **SETTINGS)
    expected, average, square = start.clone(), torch.zeros(9, 4), torch.zeros(9, 4)
    for step, row_ids in enumerate(LOOKUPS):
        table.grad = sparse_gradient(row_ids, step)
        optimizer.step()
        dense = table.grad.to_dense()
        for row in set(row_ids):
            average[row] = 0.8 * average[row] + 0.2 * dense[row]
            square[row] = 0.9 * square[row] + 0.1 * dense[row] ** 2
            moved = (average[row] / (1 - 0.8 ** (step + 1))) / (
                torch.sqrt(square[row] / (1 - 0.9 ** (step + 1))) + 1e-6
            )
            expected[row] = (1 - 0.1 * 0.3) * expected[row] - 0.1 * moved
    torch.testing.assert_close(table.detach(), expected)
    untouched = [row for row in range(9) if row not in {1, 3, 5, 7}]
    assert torch.equal(table.detach()[untouched], start[untouched])


def test_it_is_sparse_adam_with_the_weight_decay_of_adamw():
    start = torch.randn(9, 4)
    tables = [nn.Parameter(start.clone()) for _ in range(2)]
    settings = {name: SETTINGS[name] for name in ("lr", "betas", "eps")}
    optimizers = [LazyAdamW([tables[0]], weight_decay=0, **settings), torch.optim.SparseAdam([tables[1]], **settings)]
    for step, row_ids in enumerate(LOOKUPS):
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.grad = sparse_gradient(row_ids, step)
            optimizer.step()
    torch.testing.assert_close(*(table.detach() for table in tables))


def test_dense_gradients_are_those_of_adamw():
    start = torch.randn(5, 3)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [LazyAdamW([weights[0]], **SETTINGS), torch.optim.AdamW([weights[1]], **SETTINGS)]
    for step in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert torch.equal(*weights)


def trainer_of(folder, sequences, seed=0, trainer_class=NextItemTrainer, config=None, **settings):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True, "save_steps": 3,
        "save_strategy": "steps", "eval_strategy": "no", "early_stopping_patience": 0, "load_best_model_at_end": False,
        "item_optimizer": "lazy_adam", "learning_rate": 0.01, "save_total_limit": 9, "weight_decay": 0.1,
    }  # fmt: skip
    arguments_class = trainer_class.arguments_class
    made = {name: settings.pop(name) for name in ("optimizers", "teacher") if name in settings}
    set_seed(seed)
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 8, "num_hidden_layers": 1, "max_length": 6, "num_negatives": 4}
    model = SASRecForNextItem(SASRecConfig(**sizes | {"loss_type": "sampled_softmax"} | (config or {})))
    arguments = arguments_class(str(folder), **defaults | settings)
    return trainer_class(model, arguments, train_dataset=sequences["train"], **made)


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False, "head_bias": True, "loss_type": "gbce"}])
def test_a_resumed_run_ends_where_the_whole_run_does(sequences, tmp_path, config):
    trainer_of(tmp_path / "whole", sequences, config=config).train()
    resumed = trainer_of(tmp_path / "resumed", sequences, seed=5, config=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not resumed.model.get_input_embeddings().sparse  # for those who train it further by hand
    whole, found = (load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "resumed"))
    start = trainer_of(tmp_path / "start", sequences, config=config).model.state_dict()
    for name, value in whole.items():
        assert torch.equal(value, found[name]), name
        assert not torch.equal(value, start[name]), name


def test_a_step_moves_only_the_rows_that_it_reads(sequences, tmp_path):
    trainer = trainer_of(tmp_path, sequences, max_steps=1, per_device_train_batch_size=1)
    start = trainer.model.get_input_embeddings().weight.detach().clone()
    read = set()
    lookup = torch.nn.functional.embedding

    def watched(item_ids, table, *arguments, **keywords):
        if len(table) == NUM_ITEMS + 1:
            read.update(item_ids.flatten().tolist())
        return lookup(item_ids, table, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", watched)
        trainer.train()
    moved = (trainer.model.get_input_embeddings().weight != start).any(1).nonzero().flatten().tolist()
    assert set(moved) <= read - {0} and 3 < len(moved) < NUM_ITEMS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"loss_type": "cross_entropy"}}, "loss_type 'cross_entropy', which reads every item in every step"),
        ({"optim": "sgd"}, "optim 'sgd': expected adamw_torch or adamw_torch_fused, or 'same'"),
        ({"max_grad_norm": 1.0}, "max_grad_norm 1.0: expected 0, no clipping, or 'same'"),
        ({"torch_compile": True}, "torch_compile: expected no compiled training"),
        ({"item_optimizer": "adagrad"}, "item_optimizer is 'adagrad': expected same or lazy_adam"),
        ({"optimizers": (None, None)}, "item_optimizer is 'lazy_adam' beside another optimizer"),
    ],
)
def test_what_it_cannot_train_is_refused(sequences, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, sequences, **settings)


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")]
)
def test_engines_without_sparse_gradients_are_refused(sequences, tmp_path, monkeypatch, variable, name):
    made = NextItemTrainingArguments(str(tmp_path), item_optimizer="lazy_adam", use_cpu=True)
    monkeypatch.setenv(variable, "true")
    model = SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, loss_type="bce"))
    with pytest.raises(ValueError, match=f"{name}, which has no sparse gradients: expected DistributedDataParallel"):
        NextItemTrainer(model, made, train_dataset=sequences["train"], eval_dataset=sequences["validation"])


def test_distillation_of_rankings_is_refused_since_it_scores_the_catalogue(sequences, tmp_path):
    teacher = SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, max_length=6))
    with pytest.raises(ValueError, match="a loss on scores of the catalogue"):
        trainer_of(tmp_path, sequences, trainer_class=DistillationTrainer, teacher=teacher, top_k=4)
    settings = {"lam": 0.0, "kl_weight": 1.0, "distilled_positions": "all"}
    trainer_of(tmp_path, sequences, trainer_class=DistillationTrainer, teacher=teacher, **settings).train()
    assert DistillationArguments(str(tmp_path)).item_optimizer == "same"
