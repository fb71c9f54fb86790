"""A table that is spread by rows, in a group of one process; tests/distributed has two."""

import pytest
import torch
import torch.distributed as dist

from hf_ilora import (
    DistillationArguments,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
)
from hf_ilora.evaluation.ranking import target_ranks
from hf_ilora.training.row_sharded_table import RowShardedTable, check_row_sharded
from tests.synthetic import cyclic_sequences

NUM_ITEMS = 30


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(**changes) -> SASRecForNextItem:
    sizes = {"num_items": NUM_ITEMS, "hidden_size": 8, "num_hidden_layers": 1, "max_length": 6, "num_negatives": 4}
    sizes |= {"loss_type": "sampled_softmax", "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return SASRecForNextItem(SASRecConfig(**sizes | changes))


def test_one_process_computes_what_the_model_itself_does(process_group):
    batch = torch.randint(1, NUM_ITEMS + 1, (5, 7))
    batch[0, :3] = 0
    labels = batch[:, 1:].masked_fill(batch[:, :-1].eq(0), -100)
    models, losses = [model_of(repeat_bias=True) for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    table = RowShardedTable(models[1], seed=0)
    for model in models:
        torch.manual_seed(3)
        losses.append(model(input_ids=batch[:, :-1], labels=labels).loss)
        losses[-1].backward()
    assert losses[0] == losses[1]
    assert table.block.grad.is_sparse
    wanted = models[0].get_input_embeddings().weight.grad
    torch.testing.assert_close(table.block.grad.to_dense(), wanted, rtol=0, atol=1e-7)
    assert wanted[1:].any() and not table.block.grad.to_dense()[0].any()


@pytest.mark.parametrize("config", [{}, {"score_temperature": 0.1, "repeat_bias": True}])
def test_ranks_are_those_of_the_scores_of_the_catalogue(process_group, monkeypatch, config):
    model = model_of(**config).eval()
    histories, targets = torch.randint(1, NUM_ITEMS + 1, (9, 6)), torch.randint(1, NUM_ITEMS + 1, (9,))
    if config:
        torch.nn.init.constant_(model.head.repeat_bias, 3.0)
    with torch.no_grad():
        users, scores = model.user_embeddings(histories), model.next_item_scores(histories)
    expected = torch.stack([target_ranks(scores, targets, seen) for seen in (histories, None)], dim=1)
    for scores_at_once in (9 * 7, 2**24):  # in chunks of 7 items, and of all
        monkeypatch.setattr("hf_ilora.training.row_sharded_table._SCORES_AT_ONCE", scores_at_once)
        copy = model_of(**config)
        copy.load_state_dict(model.state_dict())
        repeated = model._repeated_items(histories)
        repeated = histories if repeated is None else repeated
        ranks = RowShardedTable(copy, seed=0).ranks(copy.head, users, targets, histories, repeated)
        assert torch.equal(ranks, expected) and len(ranks.unique()) > 5


def test_a_model_on_meta_gets_random_rows_and_the_other_weights_of_an_untrained_model(process_group):
    with torch.device("meta"):
        model = model_of(num_items=5000, hidden_size=16, repeat_bias=True, popularity_power=0.5)
    table = RowShardedTable(model, seed=7)
    assert table.block.shape == (5001, 16) and not table.block[0].any()
    assert table.block.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(value.is_meta for value in model.state_dict().values())
    assert model.item_counts.tolist() == [0.0] * 5001 and model.head.repeat_bias.tolist() == [0.0]
    assert model.model.final_norm.weight.tolist() == [1.0] * 16
    assert model.model.layers[0].attention.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.config.num_items == 5000


def test_what_needs_the_whole_table_is_refused(process_group, tmp_path):
    model = model_of().eval()
    RowShardedTable(model, seed=0)
    batch = torch.tensor([[1, 2, 3]])
    for call in (
        lambda: model.recommend([[1, 2]]),
        lambda: model.similar_items([1]),
        lambda: model(batch),
        lambda: model(batch, labels=batch, scored_positions=batch > 2),
        lambda: model.score_users(torch.zeros(1, 8), batch),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"spread over processes.*write the model by trainer\.save_model"):
            call()
    assert model(batch, labels=batch).logits is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {"item_optimizer": "same"}, "with item_optimizer 'same': expected item_optimizer 'lazy_adam'"),
        ({"tie_word_embeddings": False}, {}, "with tie_word_embeddings False: expected a tied head"),
        ({"head_bias": True}, {}, "with head_bias, which is not spread"),
        ({"teacher_embedding_size": 4}, {}, "with teacher_embedding_size, whose table is not spread"),
        ({}, {"initial_items": "cooccurrence"}, "with initial_items 'cooccurrence', which makes a whole table"),
        ({}, {"save_on_each_node": True}, "with save_on_each_node"),
        ({}, {"push_to_hub": True}, "with hub_strategy 'every_save', which sends checkpoints"),
    ],
)
def test_a_training_that_cannot_spread_its_table_is_refused(tmp_path, monkeypatch, config, settings, message):
    arguments = NextItemTrainingArguments(
        str(tmp_path), use_cpu=True, item_table="row_sharded", **{"item_optimizer": "lazy_adam"} | settings
    )
    monkeypatch.setattr(NextItemTrainingArguments, "world_size", 2, raising=False)
    with pytest.raises(ValueError, match=f"item_table is 'row_sharded' {message}.*, or item_table 'replicated'"):
        check_row_sharded(model_of(**config), arguments, own_metrics=False)
    if not config and settings == {"item_optimizer": "same"}:
        arguments.item_optimizer = "lazy_adam"
        check_row_sharded(model_of(), arguments, own_metrics=False)
        with pytest.raises(ValueError, match="with compute_metrics or preprocess_logits_for_metrics"):
            check_row_sharded(model_of(), arguments, own_metrics=True)


def test_one_process_and_other_trainings_are_refused(tmp_path):
    sequences = cyclic_sequences(num_users=64)
    rows = {"train_dataset": sequences["train"], "eval_dataset": sequences["validation"]}
    settings = {"use_cpu": True, "item_optimizer": "lazy_adam"}
    arguments = NextItemTrainingArguments(str(tmp_path), item_table="row_sharded", **settings)
    with pytest.raises(ValueError, match="'row_sharded' in one process: expected two or more, such as --launch"):
        NextItemTrainer(model_of(), arguments, **rows)
    with pytest.raises(ValueError, match="with model_init: expected a model"):
        NextItemTrainer(args=arguments, model_init=model_of, **rows)
    with torch.device("meta"):
        model = model_of()
    with pytest.raises(ValueError, match="on the device meta with item_table 'replicated'"):
        NextItemTrainer(model, NextItemTrainingArguments(str(tmp_path), **settings), **rows)
    with pytest.raises(ValueError, match="item_table is 'half': expected replicated or row_sharded"):
        NextItemTrainingArguments(str(tmp_path), item_table="half")
    with pytest.raises(ValueError, match="'row_sharded' in a distillation: expected 'replicated'"):
        DistillationArguments(str(tmp_path), item_table="row_sharded")
