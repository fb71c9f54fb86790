"""Losses and gradients of iLoRA against the same arithmetic done row by row, without padding, with merged weights."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_ilora.models.ilora.candidate_order import PreferredOrder
from hf_ilora.models.ilora.gated_lora import gated_layers
from hf_ilora.training.prompt_collator import PromptCollator
from tests.models.ilora.ilora_fixtures import (
    ALPHA,
    EXPERTS,
    ROWS,
    batch_of,
    fresh_model,
    naive_gates,
    naive_item_logits,
    naive_log_p,
    recommender,
    tiny_model,
)
from tests.tiny_language_models import ARCHITECTURES, ATTENTION, MLP, base_llm

BOTH_LOSSES = {"item_head": "residual", "item_loss_weight": 0.5, "language_loss_weight": 2.0}


def naive_losses(model, base, rows=ROWS, shown=(True, False, True)) -> tuple[torch.Tensor, torch.Tensor]:
    """Language and item loss, averaged over all rows; rows with candidates count 0 for the latter."""
    language, item = [], []
    for row, shows in zip(rows, shown, strict=True):
        candidates = row["candidates"] if shows else None
        language.append(-naive_log_p(model, base, row["history"], candidates, row["target"]))
        if not shows and model.item_head is not None:
            item.append(-naive_item_logits(model, base, row["history"]).log_softmax(0)[row["target"]])
    return sum(language) / len(rows), sum(item, torch.tensor(0.0)) / len(rows)


# --- the losses ---


@pytest.mark.parametrize("targets", [ATTENTION, MLP], ids=["attention", "mlp"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_are_those_of_each_row_alone(architecture, targets):
    model = tiny_model(architecture, target_modules=targets, **BOTH_LOSSES)
    batch = batch_of(model)
    assert batch["shows_candidates"].tolist() == [True, False, True]
    assert not batch["attention_mask"].all()  # two rows are padded
    with torch.no_grad():
        output = model(**batch)
    language, item = naive_losses(model, base_llm(architecture))
    torch.testing.assert_close(output.language_loss, language, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(output.item_loss, item, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, 2.0 * language + 0.5 * item, rtol=1e-5, atol=1e-4)
    # the control: neither the adapter nor the item embeddings are idle
    idle_language, idle_item = naive_losses(fresh_model(architecture, **BOTH_LOSSES), base_llm(architecture))
    assert (idle_language - language).abs() > 0.1 and (idle_item - item).abs() > 0.01


@pytest.mark.parametrize("item_placeholders", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_losses_without_placeholders_and_with_plain_lora(num_experts, item_placeholders):
    model = tiny_model(num_experts=num_experts, item_placeholders=item_placeholders)
    with torch.no_grad():
        output = model(**batch_of(model))
    gates, lora_alpha = None, ALPHA
    if num_experts == 1:
        assert output.expert_gates.tolist() == [[1.0]] * 3
        assert not list(model.router.parameters())
        # by hand: one expert of gate 1 is four of gate 1 whose alpha is a quarter
        gates, lora_alpha = torch.ones(EXPERTS), ALPHA / EXPERTS
    base = base_llm()
    losses = [
        -naive_log_p(
            model, base, row["history"], row["candidates"] if shown else None, row["target"], gates, lora_alpha
        )
        for row, shown in zip(ROWS, (True, False, True), strict=True)
    ]
    torch.testing.assert_close(output.loss, sum(losses) / 3, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_either_loss_alone(architecture):
    base = base_llm(architecture)
    language_only = tiny_model(architecture)
    output = language_only(**batch_of(language_only))
    torch.testing.assert_close(output.loss, naive_losses(language_only, base)[0], rtol=1e-5, atol=1e-4)
    assert output.item_loss is None and output.item_logits is None

    settings = {"item_head": "plain", "item_loss_weight": 3.0, "language_loss_weight": 0.0}
    item_only = tiny_model(architecture, **settings)
    output = item_only(**batch_of(item_only, candidate_fraction=0.0))
    expected = naive_losses(item_only, base, shown=[False] * 3)[1]
    torch.testing.assert_close(output.item_loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, 3 * expected, rtol=1e-5, atol=1e-5)
    assert output.language_loss is None
    for row, logits in zip(ROWS, output.item_logits, strict=True):
        torch.testing.assert_close(logits, naive_item_logits(item_only, base, row["history"]), rtol=1e-4, atol=1e-5)


def test_prompts_with_candidates_do_not_train_the_item_head():
    model = tiny_model(**BOTH_LOSSES)
    output = model(**batch_of(model, candidate_fraction=1.0))
    assert output.item_loss == 0
    output.loss.backward()
    assert not model.item_head.projection.weight.grad.any()
    model(**batch_of(model, candidate_fraction=0.0)).loss.backward()
    assert model.item_head.projection.weight.grad.any()


def test_labels_may_be_wider_than_the_titles():
    """`PromptBuilder` labels whole prompts, the collator cuts columns without titles."""
    model = tiny_model(**BOTH_LOSSES)
    batch = batch_of(model)
    expected = model(**batch)
    width = batch["input_ids"].shape[1]
    for wider in (batch["title_labels"].shape[1] + 3, width - 1, width):
        columns = torch.full((3, wider - batch["title_labels"].shape[1]), -100)
        output = model(**batch | {"title_labels": torch.cat([columns, batch["title_labels"]], dim=1)})
        torch.testing.assert_close(output.language_loss, expected.language_loss)
        torch.testing.assert_close(output.item_loss, expected.item_loss)


def test_losses_are_averaged_over_the_examples_of_the_whole_batch():
    model = tiny_model(**BOTH_LOSSES)
    batch = batch_of(model)
    here, whole = model(**batch), model(**batch, num_items_in_batch=12)
    for name in ("loss", "language_loss", "item_loss"):
        torch.testing.assert_close(whole[name], here[name] / 4)


def test_two_forwards_of_one_row_each_are_one_of_both():
    model = tiny_model(**BOTH_LOSSES)
    parts = [model(**batch_of(model, [row]), num_items_in_batch=3).loss for row in ROWS]
    torch.testing.assert_close(sum(parts), model(**batch_of(model)).loss, rtol=1e-5, atol=1e-4)


def trained(folder, batch_size: int, accumulation: int, **arguments):
    """One step of plain gradient descent by the stock Trainer on 8 rows; the trainer."""
    model = tiny_model(**BOTH_LOSSES)
    rows = [row | {"uniforms": (0.0, 0.3 + 0.4 * (index % 2))} for index, row in enumerate((ROWS * 3)[:8])]
    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.01,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=lambda rows: batch_of(model, rows))
    trainer.train()
    return trainer


def trained_parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.fixture(scope="module")
def one_large_batch(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("trainer"), batch_size=8, accumulation=1)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "arguments"),
    [(1, 8, {}), (4, 2, {}), (8, 1, {"activation_checkpointing": True})],
)
def test_accumulated_batches_train_like_one(tmp_path, one_large_batch, batch_size, accumulation, arguments):
    assert not one_large_batch._loss_shifts_labels  # it would count one example too few for each row
    other = trained(tmp_path, batch_size, accumulation, **arguments)
    start, expected = trained_parameters(tiny_model(**BOTH_LOSSES)), trained_parameters(one_large_batch.model)
    for name, value in trained_parameters(other.model).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = [name for name in start if not torch.equal(start[name], expected[name])]
    assert len(moved) == len(start) - 1  # all but the vectors of placeholders without items
    losses = [
        next(log["train_loss"] for log in t.state.log_history if "train_loss" in log) for t in (other, one_large_batch)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- gates ---


def test_gates_of_histories_are_the_routers_and_may_be_given_instead():
    model = tiny_model()
    batch = batch_of(model)
    expected = model(**batch)
    gates = torch.stack([naive_gates(model, row["history"]) for row in ROWS])
    torch.testing.assert_close(expected.expert_gates, gates)
    torch.testing.assert_close(model.expert_gates(batch["histories"]), gates)
    assert (gates[0] - gates[1]).abs().max() > 0.05
    batch.pop("histories")
    torch.testing.assert_close(model(**batch, expert_gates=gates).loss, expected.loss)
    assert (model(**batch, expert_gates=gates.roll(1, 0)).loss - expected.loss).abs() > 0.01


def test_given_gates_replace_those_of_the_histories_and_the_item_head_reads_the_histories():
    model = tiny_model(**BOTH_LOSSES)
    batch = batch_of(model)
    gates = model.expert_gates(batch["histories"])
    torch.testing.assert_close(model(**batch, expert_gates=gates).loss, model(**batch).loss)
    assert (model(**batch, expert_gates=gates.roll(1, 0)).item_loss - model(**batch).item_loss).abs() > 1e-3


def test_histories_may_be_padded_on_either_side_and_long_ones_are_cut():
    model = tiny_model()
    expected = model.expert_gates(torch.tensor([[12, 21]]))
    for history in ([0, 0, 12, 21], [12, 21, 0, 0], [0, 12, 21, 0]):
        torch.testing.assert_close(model.expert_gates(torch.tensor([history])), expected)
    long = torch.tensor([[9, 8, 1, 2, 3, 4, 5, 6]])
    torch.testing.assert_close(model.expert_gates(long), model.expert_gates(long[:, -6:]))  # max_length of the SASRec


def test_gradients_reach_the_adapter_and_nothing_else():
    model = tiny_model(**BOTH_LOSSES).train()
    model(**batch_of(model)).loss.backward()
    expected = {f"llm.{name}.lora_{matrix}" for name in gated_layers(model.llm) for matrix in "AB"}
    assert len(expected) == 2 * 7 * 2
    expected |= {"router.projection.weight", "item_head.projection.weight", "item_head.log_scale"}
    expected |= {f"prompt_embedding.projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    found = {name for name, gradient in gradients.items() if gradient.any()}
    assert found == expected
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == expected | {"prompt_embedding.plain"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_of_the_router_is_the_slope_of_the_loss(architecture):
    """A gate that is lost on the way through the language model would leave a plausible but wrong slope."""
    model = tiny_model(architecture)
    batch = batch_of(model)
    model(**batch).loss.backward()
    weight = model.router.projection.weight
    with torch.no_grad():
        direction = weight.grad / weight.grad.norm()
        losses = []
        for step in (-0.02, 0.04):
            weight.add_(step * direction)
            losses.append(model(**batch).loss)
    assert (losses[1] - losses[0]).item() / 0.04 == pytest.approx(weight.grad.norm().item(), rel=0.02)


# --- training and evaluation mode ---


def test_recommender_stays_in_evaluation_mode():
    sasrec = recommender(hidden_dropout=0.5, attention_dropout=0.5)
    model = tiny_model(sasrec=sasrec)
    expected = model.expert_gates(torch.tensor([[3, 7, 30]]))
    model.train()
    assert model.training and model.llm.training and model.router.training
    assert not any(module.training for module in model.recommender.modules())
    assert torch.equal(model.expert_gates(torch.tensor([[3, 7, 30]])), expected)
    sasrec.train()  # the control: the dropout is felt
    assert not torch.equal(model.expert_gates(torch.tensor([[3, 7, 30]])), expected)


def test_dropout_of_the_experts_acts_in_training_only():
    model = tiny_model(lora_dropout=0.5)
    batch = batch_of(model)
    expected = tiny_model()(**batch).loss
    torch.testing.assert_close(model(**batch).loss, expected)
    assert (model.train()(**batch).loss - expected).abs() > 0.01


def test_examples_without_item_embeddings_carry_learned_placeholders():
    model = tiny_model()
    batch = batch_of(model)
    expected = model(**batch).loss
    model.item_embedding_probability = 0.0
    torch.testing.assert_close(model(**batch).loss, expected)  # evaluation sees all
    model.train()
    plain = model(**batch).loss
    plain.backward()
    assert (plain - expected).abs() > 0.01
    assert model.prompt_embedding.plain.grad.any(1).all()  # of histories and of candidates
    assert not model.prompt_embedding.projector[0].weight.grad.any()
    with torch.no_grad():  # item embeddings are not read
        model.recommender.model.item_embedding.weight[3] += 1
    gates = model.expert_gates(batch["histories"]).detach()
    other = {name: value for name, value in batch.items() if name != "histories"}
    losses = []
    for _ in range(2):
        losses.append(model(**other, expert_gates=gates).loss)
        with torch.no_grad():
            model.recommender.model.item_embedding.weight += 1
    assert torch.equal(*losses)


def test_each_example_carries_item_embeddings_with_the_given_probability():
    model = tiny_model().train()
    model.item_embedding_probability = 0.5
    batch = batch_of(model, ROWS * 100)
    embeddings = model.embed_prompts(batch["input_ids"], batch["placeholder_items"])
    model.item_embedding_probability = 1.0
    with_items = model.embed_prompts(batch["input_ids"], batch["placeholder_items"])
    carries = []
    for row, tokens in enumerate(batch["input_ids"]):
        same = torch.isclose(embeddings[row], with_items[row]).all(1)[tokens < 0]
        assert same.all() or not same.any()
        carries.append(bool(same.all()))
    assert 0.4 < sum(carries) / len(carries) < 0.6  # 300 examples: five standard deviations are 0.14


# --- the language model underneath ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_later_tokens_never_change_earlier_logits(architecture, attention):
    """A composite configuration can take a language model's attention, and with it its causal mask, away."""
    llm = base_llm(architecture)
    llm.set_attn_implementation(attention)
    model = tiny_model(architecture, llm=llm)
    assert {layer.self_attn.config._attn_implementation for layer in model.llm.get_decoder().layers} == {attention}
    batch = batch_of(model)
    changed = batch["input_ids"].clone()
    assert (changed[:, -5:] >= 0).all()
    changed[:, -5:] = (changed[:, -5:] + 7) % 200 + 2
    prompts = {name: batch[name] for name in ("attention_mask", "placeholder_items", "histories")}
    with torch.no_grad():
        logits, after = (model(input_ids=ids, **prompts).logits for ids in (batch["input_ids"], changed))
    real = batch["attention_mask"][:, :-5].bool()
    torch.testing.assert_close(logits[:, :-5][real], after[:, :-5][real], rtol=1e-5, atol=1e-5)
    assert (logits[:, -5:] - after[:, -5:]).abs().max() > 0.1


def test_attention_of_the_language_model_survives_saving_its_configuration():
    llm = base_llm()
    config = llm.config
    model = tiny_model(llm=llm)
    copy.deepcopy(model.config).to_dict()
    assert model.llm.config is config and config._attn_implementation == "sdpa"
    assert model.config.text_config is not config


def test_a_fresh_adapter_changes_nothing():
    model = fresh_model(item_placeholders=False)
    batch = batch_of(model)
    batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        expected = base_llm()(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
        ).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real])


def test_padding_does_not_count_in_the_positions():
    """Rotary positions forgive a shift, others would not."""
    model = tiny_model()
    batch = batch_of(model)
    batch.pop("labels")
    seen = []
    model.llm.register_forward_pre_hook(
        lambda module, args, arguments: seen.append(arguments["position_ids"]), with_kwargs=True
    )
    model(**batch)
    for mask, places in zip(batch["attention_mask"], seen[0], strict=True):
        assert places[mask.bool()].tolist() == list(range(int(mask.sum())))


def test_logits_to_keep_gives_the_logits_of_the_last_tokens():
    model = tiny_model()
    batch = batch_of(model)
    batch.pop("labels")
    assert torch.equal(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:])


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_bfloat16_language_model_trains_a_float32_adapter(architecture):
    model = tiny_model(architecture, llm=base_llm(architecture).to(torch.bfloat16), **BOTH_LOSSES)
    output = model(**batch_of(model))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    trained = trained_parameters(model)
    assert all(value.dtype == torch.float32 for value in trained.values())
    expected = tiny_model(architecture, **BOTH_LOSSES)
    torch.testing.assert_close(output.loss, expected(**batch_of(expected)).loss, rtol=0.02, atol=0.0)


# --- gradient checkpointing ---


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    torch.manual_seed(0)  # of the dropout
    loss = model(**batch_of(model)).loss
    loss.backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


def enable_by_its_old_name(model):
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize(
    "enable",
    [lambda model: model.activation_checkpointing_enable(), enable_by_its_old_name],
    ids=["activation_checkpointing_enable", "gradient_checkpointing_enable"],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(architecture, enable):
    model = tiny_model(architecture, lora_dropout=0.2, **BOTH_LOSSES)
    loss, expected = loss_and_gradients(model)
    enable(model)
    assert model.is_activation_checkpointing
    recomputed_loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(recomputed_loss, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("arguments", [{"use_reentrant": True}, {"preserve_rng_state": False}])
def test_reentrant_checkpointing_is_refused(arguments):
    model = tiny_model()
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of the gates"):
        model.activation_checkpointing_enable(arguments)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="use_reentrant=True loses the gradients"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    assert not model.is_activation_checkpointing


def test_reentrant_checkpointing_is_refused_by_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant=True loses the gradients of the gates"):
        trained(tmp_path, 8, 1, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_training_reads_the_history_that_answers_read():
    """A prompt shows the newest items; gates, item head and the order of candidates come from the whole history."""
    model = tiny_model(item_head="residual", item_loss_weight=1.0, candidate_order="recommender")
    history = [3, 7, 30, 5, 11, 2]  # the prompt shows 4 of them, the recommender reads 6
    row = {"history": history, "target": 9, "candidates": [9, 2, 11], "uniforms": (0.0, 0.9)}
    batch = PromptCollator(model.prompts, 0.5, PreferredOrder(model.recommender))([row])
    histories = torch.tensor([history])
    prompts = model.build_prompts(histories)
    assert batch["placeholder_items"].tolist() == prompts.placeholder_items.tolist() == [history[-4:]]
    with torch.no_grad():
        output = model(**batch)
    torch.testing.assert_close(output.expert_gates, model.expert_gates(histories))
    assert not torch.allclose(output.expert_gates, model.expert_gates(histories[:, -4:]))
    torch.testing.assert_close(output.item_logits, model.item_scores(histories))

    shown = PromptCollator(model.prompts, 1.0, PreferredOrder(model.recommender))([row])["placeholder_items"]
    asked = model.build_prompts(histories, torch.tensor([row["candidates"]])).placeholder_items
    assert torch.equal(shown, asked)
