"""The Trainer of next-item models on splits as they are, and its errors for forgotten or unfit settings."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
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
    item_title_embeddings,
    joint_item_embeddings,
    whitened,
)
from hf_ilora.evaluation.rank_metrics import ndcg_at
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.titles.cooccurrence import cooccurrence_embeddings
from hf_ilora.training import initial_items
from hf_ilora.training.windows import item_counts
from tests.synthetic import cyclic_sequences
from tests.titles.encoder_folders import save_bert

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
    keywords = ("train_dataset", "eval_dataset", "processing_class", "model_init", "callbacks", "title_embeddings")
    given = {name: settings.pop(name) for name in keywords if name in settings}
    splits = {"train_dataset": sequences["train"], "eval_dataset": sequences["validation"]}
    return NextItemTrainer(model, arguments(folder, **settings), **splits | given)


class FirstItems(TrainerCallback):
    """Keeps the item embeddings that training begins with."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.table = model.model.item_embedding.weight.detach().clone()


def training_rows(sequences):
    columns = sequences["train"]["history"], sequences["train"]["target"]
    return [[*history, target] for history, target in zip(*columns, strict=True)]


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
    first = FirstItems()
    trainer = trainer_of(tmp_path, sequences, sasrec(), initial_items="cooccurrence", callbacks=[first])
    trainer.train()
    rows = training_rows(sequences)
    torch.testing.assert_close(first.table, cooccurrence_embeddings(rows, NUM_ITEMS, 8))
    trainer.train()  # continues from the trained weights
    assert not torch.equal(first.table, cooccurrence_embeddings(rows, NUM_ITEMS, 8))


TITLE_VECTORS = torch.randn(NUM_ITEMS + 1, 12, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("start", "take_logarithm"), [("titles_and_cooccurrence", False), ("titles_and_log_cooccurrence", True)]
)
@pytest.mark.parametrize("score_temperature", [0.1, None])
def test_training_starts_from_titles_and_cooccurrence(sequences, tmp_path, start, take_logarithm, score_temperature):
    first, model = FirstItems(), sasrec(score_temperature=score_temperature)
    settings = {"initial_items": start, "title_embeddings": TITLE_VECTORS, "title_prior": 20.0}
    trainer_of(tmp_path, sequences, model, callbacks=[first], **settings).train()
    rows = training_rows(sequences)
    cooccurrence = cooccurrence_embeddings(rows, NUM_ITEMS, 8, take_logarithm=take_logarithm)
    counts = torch.from_numpy(np.bincount(np.concatenate(rows), minlength=NUM_ITEMS + 1))
    expected = joint_item_embeddings(cooccurrence, TITLE_VECTORS, counts, 8, prior=20.0)
    if score_temperature is None:  # dot products keep the lengths of the co-occurrence
        expected = torch.nn.functional.normalize(expected, dim=1) * cooccurrence.norm(dim=1, keepdim=True)
    torch.testing.assert_close(first.table, expected, rtol=1e-3, atol=1e-4)


def test_an_item_that_training_has_never_seen_starts_as_short_as_the_shortest_that_it_has(sequences):
    seen = sequences["train"].map(lambda row: {"history": [item % 9 + 1 for item in row["history"]], "target": 9})
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=4)
    counts = item_counts(seen, NUM_ITEMS)
    table = initial_items.initial_item_embeddings(
        "titles_and_cooccurrence", seen, config, counts, TITLE_VECTORS, 30.0, targets_only=False
    )
    lengths = table.norm(dim=1)
    assert lengths[0] == 0 and (lengths[10:] > 0).all()
    torch.testing.assert_close(lengths[10:], lengths[1:10].min().expand(NUM_ITEMS - 9))


def test_training_starts_from_titles_alone(sequences, tmp_path):
    first, settings = FirstItems(), {"initial_items": "titles", "title_embeddings": TITLE_VECTORS}
    trainer_of(tmp_path, sequences, sasrec(), callbacks=[first], **settings).train()
    expected = whitened(TITLE_VECTORS, 8)
    torch.testing.assert_close(first.table, expected / expected[1:].norm(dim=1).mean())


def test_titles_are_encoded_once_and_not_for_a_resumed_run(sequences, tmp_path, monkeypatch):
    encoder = save_bert(tmp_path / "bert")
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path / "cache"))
    settings = {"initial_items": "titles_and_cooccurrence", "title_encoder": str(encoder), "title_layer": 1}
    settings |= {"processing_class": sequences.catalogue, "save_total_limit": 9}
    trainer = trainer_of(tmp_path / "whole", sequences, sasrec(), **settings)
    trainer.train()
    table = trainer.item_title_embeddings()
    assert torch.equal(table, item_title_embeddings(sequences.catalogue, encoder, layer=1))
    assert trainer.item_title_embeddings() is table

    def refuse(*arguments, **more):
        pytest.fail("titles are encoded although the run is resumed")

    monkeypatch.setattr(initial_items, "item_title_embeddings", refuse)
    resumed = trainer_of(tmp_path / "resumed", sequences, sasrec(seed=5), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))


def test_an_encoder_that_does_not_exist_is_named_before_the_first_step(sequences, tmp_path):
    settings = {"initial_items": "titles_and_cooccurrence", "title_encoder": "nobody/no-such-model"}
    trainer = trainer_of(tmp_path, sequences, sasrec(), processing_class=sequences.catalogue, **settings)
    with pytest.raises(OSError, match=r"nobody/no-such-model .* is not a folder, and the Hub cannot be reached"):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_zero3_takes_titles_that_were_encoded_before(sequences, tmp_path, monkeypatch):
    monkeypatch.setattr(initial_items, "is_deepspeed_zero3_enabled", lambda: True)
    settings = {"initial_items": "titles", "processing_class": sequences.catalogue}
    with pytest.raises(ValueError, match="ZeRO-3 spreads the weights of the title encoder over processes: expected"):
        trainer_of(tmp_path, sequences, sasrec(), **settings)
    trainer_of(tmp_path, sequences, sasrec(), title_embeddings=TITLE_VECTORS, **settings)


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
    path = tmp_path / "sasrec-cycle" / "README.md"
    trainer.create_model_card(license="apache-2.0", tags="cycle")
    trainer.create_model_card()  # of an untouched card, the text is made anew and the metadata stay
    card = path.read_text()
    assert "from_pretrained(" in card and "license: apache-2.0" in card and "- cycle" in card
    assert "Nothing was measured" in card
    path.write_text("---\ntags:\n- mine\n---\n\nMy own words.\n")
    trainer.create_model_card(license="mit")
    card = path.read_text()
    assert "My own words." in card and "- mine" in card and "license: mit" in card and "from_pretrained(" not in card


def test_the_card_tells_the_evaluation_of_the_model_that_is_saved(sequences, tmp_path):
    settings = {"processing_class": sequences.catalogue, "max_steps": 8}
    trainer = trainer_of(tmp_path / "run", sequences, sasrec(), **settings)

    def card():
        trainer.create_model_card(dataset="Cy|cle", dataset_args="leave_one_out", dataset_tags="user/cycle")
        return ModelCard.load(tmp_path / "run" / "README.md")

    trainer.train()
    best, last = [logs for logs in trainer.state.log_history if "eval_mrr" in logs]
    assert best["eval_mrr"] != last["eval_mrr"]
    trainer.state.best_global_step = best["step"]
    told = {result.metric_name: result for result in card().data.eval_results}
    of_masked = told["MRR, whole catalogue, seen items excluded"]
    assert of_masked.metric_value == pytest.approx(best["eval_mrr"], abs=1e-6)
    assert (of_masked.dataset_split, of_masked.dataset_type) == ("validation", "user/cycle")
    measured = trainer.evaluate(sequences["test"])
    trainer.evaluate(sequences["validation"].select(range(5)), metric_key_prefix="eval_few")
    trainer.log({"eval_few_diverged": float("nan")})
    text = card().text
    assert "diverged" not in text
    assert f"Test split, {len(sequences['test'])} users:" in text and "Validation split, 5 users:" in text
    assert f"for {measured['eval_hit_ratio@10']:.1%} of the users" in text
    assert "Protocol leave_one_out. One training run, with seed 42" in text and r"items of Cy\|cle" in text
    assert "`NextItemTrainingArguments(" in text and str(tmp_path) not in text


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


def named(titles):
    """The catalogue of the data with other titles."""
    table = cyclic_sequences(num_users=64).catalogue.table
    return Catalogue(table.set_column(table.column_names.index("title"), "title", pa.array(titles)))


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
        ({"initial_items": "names"}, ValueError, "initial_items is 'names': expected one of random"),
        ({"model": gru4rec(), "initial_items": "cooccurrence"}, ValueError, "only SASRec can start from item"),
        ({"model": gru4rec(), "initial_items": "titles_and_cooccurrence"}, ValueError, "only SASRec can start from"),
        (
            {"model": sasrec(block_type="reference"), "initial_items": "titles"},
            ValueError,
            "initial_items is 'titles' for block_type 'reference', whose attention has no output projection",
        ),
        (
            {"initial_items": "titles"},
            ValueError,
            "there is no catalogue, so there are no titles to encode: expected proc",
        ),
        ({"initial_items": "titles", "processing_class": named(["Heat"] * 30)}, ValueError, "all 30 titles are 'Heat'"),
        ({"initial_items": "titles", "processing_class": named([" "] * 30)}, ValueError, "title 1 of 30 is ' '"),
        (
            {"initial_items": "titles", "processing_class": named([str(100 + i) for i in range(30)])},
            ValueError,
            "the titles of the catalogue are its raw ids",
        ),
        ({"title_embeddings": torch.ones(30, 4)}, ValueError, r"have shape \(30, 4\): expected \(31, any\), a row for"),
        ({"title_embeddings": torch.full((31, 4), torch.nan)}, ValueError, "title_embeddings of item 1 contain NaN"),
        ({"title_prior": 0}, ValueError, "title_prior is 0: expected a finite number above 0"),
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


def test_training_stops_when_no_evaluation_is_better_and_names_the_best_step(sequences, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3, "early_stopping_patience": 1, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, sequences, sasrec(), **settings)
    trainer.train()
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    # Nothing is learnt: the second evaluation is no better than the first, and training stops.
    assert trainer.state.epoch == 2 and state["best_global_step"] == 4
