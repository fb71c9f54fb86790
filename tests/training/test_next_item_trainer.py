"""The Trainer of next-item models on splits as they are, and what it says to those who forget something."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback, TrainingArguments, set_seed

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    Catalogue,
    GRU4RecConfig,
    GRU4RecForNextItem,
    NextItemTrainer,
    NextItemTrainingArguments,
    SASRecConfig,
    SASRecForNextItem,
)
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings
from tests.synthetic import cyclic_sequences

NUM_ITEMS = 30
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_length": 6}


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=64)


def sasrec(seed=0, num_items=NUM_ITEMS, **settings):
    set_seed(seed)
    return SASRecForNextItem(SASRecConfig(num_items=num_items, **SIZES | settings))


def arguments(folder, **settings):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 16, "use_cpu": True, "disable_tqdm": True}
    return NextItemTrainingArguments(str(folder), **defaults | settings)


def trainer_of(folder, sequences, model=None, **settings):
    keywords = ("train_dataset", "eval_dataset", "processing_class", "model_init", "callbacks")
    given = {name: settings.pop(name) for name in keywords if name in settings}
    splits = {"train_dataset": sequences["train"], "eval_dataset": sequences["validation"]}
    return NextItemTrainer(model, arguments(folder, **settings), **splits | given)


def test_ten_lines_train_evaluate_and_save_a_model_that_recommends_titles(sequences, tmp_path):
    model = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, **SIZES))
    trainer = NextItemTrainer(
        model,
        NextItemTrainingArguments(
            str(tmp_path / "out"), num_train_epochs=12, learning_rate=2e-2, use_cpu=True, disable_tqdm=True
        ),
        train_dataset=sequences["train"],
        eval_dataset=sequences["validation"],
        processing_class=sequences.catalogue,
    )
    trainer.train()
    # Two of thirty items can come next: a model that knows the rule has the right one among ten.
    assert trainer.evaluate()["eval_unmasked_hit_ratio@10"] > 0.9
    trainer.save_model()
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    item_ids, scores = loaded.recommend([[1, 2, 3]], top_k=3)
    assert loaded.catalogue == sequences.catalogue and len(loaded.catalogue.titles(item_ids[0])) == 3
    assert (scores[0, :-1] >= scores[0, 1:]).all()
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_metrics_of_evaluate_and_ranks_of_predict_are_those_of_rank_split(sequences, tmp_path):
    trainer = trainer_of(tmp_path, sequences, sasrec())
    expected = rank_split(trainer.model, sequences["validation"])
    metrics = trainer.evaluate()
    for prefix, ranks in (("", expected.masked), ("unmasked_", expected.unmasked)):
        assert metrics[f"eval_{prefix}ndcg@10"] == pytest.approx(ndcg_at(torch.from_numpy(ranks), 10).mean().item())
        assert metrics[f"eval_{prefix}mrr"] == pytest.approx((1 / ranks).mean())
    predicted = trainer.predict(sequences["test"])
    of_test = rank_split(trainer.model, sequences["test"])
    assert np.array_equal(predicted.predictions, np.stack([of_test.masked, of_test.unmasked], axis=1))
    assert predicted.metrics["test_unmasked_mrr"] == pytest.approx((1 / of_test.unmasked).mean())


def test_predictions_keep_the_order_of_the_rows_where_training_groups_them_by_length(sequences, tmp_path):
    histories = [row[-(1 + number % 5) :] for number, row in enumerate(sequences["test"]["history"])]
    rows = sequences["test"].remove_columns("history").add_column("history", histories)
    trainer = trainer_of(tmp_path, sequences, sasrec(), train_sampling_strategy="group_by_length")
    expected = rank_split(trainer.model, rows)
    assert trainer.predict(rows).predictions[:, 1].tolist() == expected.unmasked.tolist()
    trainer.train()


def test_several_evaluation_sets_have_metrics_of_their_own(sequences, tmp_path):
    splits = {"validation": sequences["validation"], "test": sequences["test"]}
    trainer = trainer_of(
        tmp_path, sequences, sasrec(), eval_dataset=splits, metric_for_best_model="eval_test_ndcg@10", max_steps=4
    )
    trainer.train()
    assert {"eval_validation_ndcg@10", "eval_test_ndcg@10"} <= trainer.evaluate().keys()
    assert trainer.evaluate(sequences["test"])["eval_mrr"] == trainer.evaluate()["eval_test_mrr"]


def test_rows_may_come_as_a_stream(sequences, tmp_path):
    streams = {"train_dataset": sequences["train"].to_iterable_dataset()}
    streams |= {"eval_dataset": sequences["validation"].to_iterable_dataset()}
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, sequences, sasrec(), **streams, **settings)
    trainer.train()
    assert trainer.state.global_step == 4
    expected = rank_split(trainer.model, sequences["validation"]).unmasked
    assert trainer.evaluate()["eval_unmasked_mrr"] == pytest.approx((1 / expected).mean())


def test_item_embeddings_have_a_learning_rate_of_their_own(sequences, tmp_path):
    trainer = trainer_of(tmp_path, sequences, sasrec(), item_learning_rate_factor=0.1, weight_decay=0.5)
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decayed, undecayed, items = (
        {names[parameter] for parameter in group["params"]} for group in trainer.optimizer.param_groups
    )
    assert items == {"model.item_embedding.weight"}
    assert all(names[parameter] in decayed | undecayed | items for parameter in names)
    assert all(trainer.model.state_dict()[name].dim() > 1 for name in decayed)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-3, 1e-3, 1e-4])
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.5, 0.0, 0.5]


def test_training_starts_from_the_items_that_the_arguments_name(sequences, tmp_path):
    class FirstItems(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.table = model.model.item_embedding.weight.detach().clone()

    first = FirstItems()
    trainer = trainer_of(tmp_path, sequences, sasrec(), initial_items="cooccurrence", callbacks=[first])
    trainer.train()
    columns = sequences["train"]["history"], sequences["train"]["target"]
    rows = [[*history, target] for history, target in zip(*columns, strict=True)]
    torch.testing.assert_close(first.table, cooccurrence_embeddings(rows, NUM_ITEMS, 8))
    trainer.train()  # continues from the trained weights
    assert not torch.equal(first.table, cooccurrence_embeddings(rows, NUM_ITEMS, 8))


def test_a_resumed_run_ends_where_the_whole_run_does(sequences, tmp_path):
    settings = {"initial_items": "cooccurrence", "save_total_limit": 9, "skip_probability": 0.2, "max_steps": -1}
    settings |= {"num_train_epochs": 3}
    trainer_of(tmp_path / "whole", sequences, sasrec(), **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = trainer_of(tmp_path / "resumed", sequences, sasrec(seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = load_file(tmp_path / "whole" / "checkpoint-12" / "model.safetensors")
    found = load_file(tmp_path / "resumed" / "checkpoint-12" / "model.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_a_search_gets_a_fresh_model_for_every_trial(sequences, tmp_path):
    def fresh():
        return SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, **SIZES))

    settings = {"model_init": fresh, "processing_class": sequences.catalogue, "initial_items": "cooccurrence"}
    trainer = trainer_of(tmp_path, sequences, **settings)
    losses, models = [], []
    for _ in range(2):
        losses.append(trainer.train().training_loss)
        models.append(trainer.model)
    assert losses[0] == losses[1] and models[0] is not models[1]
    assert models[1].catalogue == sequences.catalogue


def test_training_compiles(sequences, tmp_path):
    plain = trainer_of(tmp_path / "plain", sequences, sasrec(hidden_dropout=0.0, attention_dropout=0.0))
    compiled = trainer_of(
        tmp_path / "compiled",
        sequences,
        sasrec(hidden_dropout=0.0, attention_dropout=0.0),
        torch_compile=True,
        torch_compile_backend="eager",
    )
    assert compiled.train().training_loss == pytest.approx(plain.train().training_loss, rel=1e-4)
    compiled.save_model()
    assert load_file(tmp_path / "compiled" / "model.safetensors").keys() == plain.model.state_dict().keys() - {
        "head.weight"
    }


def test_negatives_are_drawn_by_the_counts_of_the_rows(sequences, tmp_path):
    model = sasrec(loss_type="sampled_softmax", popularity_power=0.5, num_negatives=8)
    trainer_of(tmp_path, sequences, model).train()
    items = np.concatenate([*sequences["train"]["history"], sequences["train"]["target"]])
    assert model.item_counts.tolist() == np.bincount(items, minlength=NUM_ITEMS + 1).tolist()


def test_rows_that_are_prefixes_have_one_label_each(tmp_path):
    prefixes = cyclic_sequences(num_users=40, protocol="temporal_users")
    trainer = trainer_of(tmp_path, prefixes, sasrec())
    assert trainer.train_dataset.labelled_positions == "last"
    assert all((row["labels"] != -100).sum() == 1 for row in map(trainer.train_dataset.__getitem__, range(20)))


def test_prefixes_may_be_labelled_everywhere_with_a_warning(tmp_path, caplog):
    prefixes = cyclic_sequences(num_users=40, protocol="temporal_users")
    trainer = trainer_of(tmp_path, prefixes, sasrec(), labelled_positions="all")
    assert trainer.train_dataset.labelled_positions == "all"
    assert "most targets count many times" in caplog.text


def test_caser_has_one_label_per_window_and_refuses_others(sequences, tmp_path):
    caser = CaserForNextItem(CaserConfig(num_items=NUM_ITEMS, hidden_size=8, max_length=6))
    trainer = trainer_of(tmp_path, sequences, caser)
    trainer.train()
    assert trainer.train_dataset.labelled_positions == "last"
    for settings in ({"labelled_positions": "all"}, {"skip_probability": 0.1}):
        with pytest.raises(ValueError, match="Caser predicts the item after the newest one only"):
            trainer_of(tmp_path, sequences, caser, **settings)


def test_the_card_says_how_to_use_the_model_and_keeps_a_text_that_is_there(sequences, tmp_path):
    trainer = trainer_of(tmp_path / "sasrec-cycle", sequences, sasrec(), processing_class=sequences.catalogue)
    trainer.create_model_card(license="apache-2.0", tags="cycle")
    card = (tmp_path / "sasrec-cycle" / "README.md").read_text()
    assert "from_pretrained(" in card and "license: apache-2.0" in card and "- cycle" in card
    (tmp_path / "sasrec-cycle" / "README.md").write_text("---\ntags:\n- mine\n---\n\nMy own words.\n")
    trainer.create_model_card()
    card = (tmp_path / "sasrec-cycle" / "README.md").read_text()
    assert "My own words." in card and "- mine" in card and "from_pretrained(" not in card


def test_a_model_without_a_catalogue_is_warned_about(sequences, tmp_path, caplog):
    trainer_of(tmp_path, sequences, sasrec())
    assert "will be saved without titles: pass processing_class=sequences.catalogue" in caplog.text


def test_plain_arguments_are_refused(sequences, tmp_path):
    with pytest.raises(TypeError, match=r"args is a TrainingArguments: expected NextItemTrainingArguments\("):
        NextItemTrainer(sasrec(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=sequences["train"])


def test_arguments_may_be_left_out(sequences, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    trainer = NextItemTrainer(sasrec(), train_dataset=sequences["train"], eval_dataset=sequences["validation"])
    assert isinstance(trainer.args, NextItemTrainingArguments) and trainer.args.output_dir == "tmp_trainer"


def gru4rec():
    return GRU4RecForNextItem(GRU4RecConfig(num_items=NUM_ITEMS, hidden_size=8, max_length=6))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is a Linear: expected a SASRecForNextItem"),
        ({"processing_class": "items"}, TypeError, "processing_class is a str: expected a Catalogue"),
        ({"model": sasrec(num_items=20)}, ValueError, r"train_dataset holds item \d+ in history: expected ids 1 to 20"),
        (
            {"train_dataset": Dataset.from_dict({"items": [[1, 2]]})},
            ValueError,
            r"train_dataset has no column history and target \(found: items\)",
        ),
        ({"eval_dataset": None}, ValueError, "eval_strategy is 'epoch' without an eval_dataset: pass"),
        (
            {"metric_for_best_model": "ndcg"},
            ValueError,
            "metric_for_best_model is 'ndcg': expected one of loss, ndcg@10",
        ),
        ({"eval_strategy": "no"}, ValueError, "pass early_stopping_patience=0 and load_best_model_at_end=False"),
        ({"windows": "first"}, ValueError, "windows='first'"),
        ({"labelled_positions": "some"}, ValueError, "labelled_positions"),
        ({"initial_items": "titles"}, ValueError, "initial_items is 'titles': expected one of random"),
        ({"model": gru4rec(), "initial_items": "cooccurrence"}, ValueError, "only SASRec can start from item"),
        ({"item_learning_rate_factor": -1}, ValueError, "expected at least 0"),
        ({"early_stopping_patience": -1}, ValueError, "early_stopping_patience is -1"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, ValueError, "persistent_workers"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(sequences, tmp_path, changes, error, message):
    changes = {"model": sasrec()} | changes
    with pytest.raises(error, match=message):
        trainer_of(tmp_path / "run", sequences, changes.pop("model"), **changes)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_stream_has_no_counts_and_no_cooccurrence(sequences, tmp_path):
    stream = sequences["train"].to_iterable_dataset()
    with pytest.raises(ValueError, match="popularity_power needs the item counts"):
        model = sasrec(loss_type="sampled_softmax", popularity_power=0.5)
        trainer_of(tmp_path, sequences, model, train_dataset=stream)
    with pytest.raises(ValueError, match=r"expected a datasets.Dataset as train_dataset"):
        trainer_of(tmp_path, sequences, sasrec(), train_dataset=stream, initial_items="cooccurrence")


def test_a_trained_model_does_not_start_anew(sequences, tmp_path):
    sasrec().save_pretrained(tmp_path / "trained")
    trained = SASRecForNextItem.from_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="which is trained: expected 'random'"):
        trainer_of(tmp_path, sequences, trained, initial_items="cooccurrence")
    trainer_of(tmp_path, sequences, trained).train()


def test_a_model_of_other_items_is_refused_although_it_knows_as_many(sequences, tmp_path):
    model = sasrec()
    table = sequences.catalogue.table
    raw_ids = pa.array(np.arange(1, NUM_ITEMS + 1))
    model.catalogue = Catalogue(table.set_column(table.column_names.index("raw_id"), "raw_id", raw_ids))
    model.save_pretrained(tmp_path / "trained")
    trained = SASRecForNextItem.from_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"items of .*trained have other raw ids than in the data set"):
        trainer_of(tmp_path, sequences, trained, processing_class=sequences.catalogue)


def test_a_process_with_several_gpus_is_refused(sequences, tmp_path, monkeypatch):
    monkeypatch.setattr(NextItemTrainingArguments, "n_gpu", property(lambda self: 4))
    with pytest.raises(ValueError, match="this process sees 4 GPUs: expected one per process"):
        trainer_of(tmp_path, sequences, sasrec())


def test_the_log_has_the_best_epoch_and_its_metric(sequences, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3, "early_stopping_patience": 1, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, sequences, sasrec(), **settings)
    trainer.train()
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    # Nothing is learnt: the second evaluation is no better than the first, and training stops.
    assert trainer.state.epoch == 2 and state["best_global_step"] == 4
