"""SASRec against a naive implementation, and the promises that its interface makes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_ilora import SASRecConfig, SASRecForNextItem, SASRecModel
from hf_ilora.data.columns import repeat_share

NUM_ITEMS = 40
LEFT = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 11]])
RIGHT = torch.tensor([[7, 8, 9, 0, 0], [1, 2, 3, 4, 5], [11, 0, 0, 0, 0]])


def small_model(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"hidden_size": 16, "max_length": 8, "initializer_range": 0.3, **settings}
    return SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, **settings)).eval()


def naive_user_embedding(model, items):
    """One history without padding, head by head and position by position; an independent statement of the block."""
    config, encoder = model.config, model.model
    first = config.max_length - len(items) if config.position_alignment == "newest" else 0
    hidden = torch.stack(
        [encoder.item_embedding.weight[i] + encoder.position_embedding.weight[first + p] for p, i in enumerate(items)]
    )
    size = config.hidden_size // config.num_attention_heads
    for layer in encoder.layers:
        normed = layer.attention_norm(hidden)
        source = normed if config.block_type == "pre_norm" else hidden
        q, k, v = layer.attention.q_proj(normed), layer.attention.k_proj(source), layer.attention.v_proj(source)
        attended = torch.zeros_like(hidden)
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            for position in range(len(items)):
                scores = torch.stack([q[position, part] @ k[j, part] / math.sqrt(size) for j in range(position + 1)])
                weights = scores.exp() / scores.exp().sum()
                attended[position, part] = sum(weights[j] * v[j, part] for j in range(position + 1))
        up, down = layer.feed_forward.up_proj, layer.feed_forward.down_proj
        if config.block_type == "pre_norm":
            hidden = hidden + layer.attention.o_proj(attended)
            hidden = hidden + down(F.gelu(up(layer.feed_forward_norm(hidden))))
        else:
            normed = layer.feed_forward_norm(attended + normed)
            hidden = layer.output_norm(down(torch.relu(up(normed))) + normed)
    return encoder.final_norm(hidden)[-1]


@pytest.mark.parametrize("block_type", ["pre_norm", "reference"])
@pytest.mark.parametrize("position_alignment", ["newest", "oldest"])
@pytest.mark.parametrize("num_attention_heads", [1, 4])
def test_user_embedding_equals_naive_implementation(block_type, position_alignment, num_attention_heads):
    model = small_model(
        block_type=block_type, position_alignment=position_alignment, num_attention_heads=num_attention_heads
    )
    with torch.no_grad():
        output = model(LEFT)
        for row, items in enumerate([[7, 8, 9], [1, 2, 3, 4, 5], [11]]):
            torch.testing.assert_close(
                output.user_embedding[row], naive_user_embedding(model, items), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("block_type", ["pre_norm", "reference"])
def test_padding_side_changes_nothing(block_type):
    model = small_model(block_type=block_type)
    with torch.no_grad():
        left, right = model(LEFT), model(RIGHT)
        wide = model(F.pad(RIGHT, (0, 3)))
    torch.testing.assert_close(left.logits, right.logits)
    torch.testing.assert_close(left.logits, wide.logits)
    torch.testing.assert_close(left.user_embedding, right.user_embedding)
    torch.testing.assert_close(left.last_hidden_state[0, 2:], right.last_hidden_state[0, :3])
    assert left.last_hidden_state[0, :2].abs().sum() == 0


def test_attention_mask_hides_items():
    model = small_model()
    with torch.no_grad():
        masked = model(torch.tensor([[5, 7, 8, 9], [6, 1, 2, 3]]), attention_mask=torch.tensor([[0, 1, 1, 1]] * 2))
        plain = model(torch.tensor([[7, 8, 9], [1, 2, 3]]))
    torch.testing.assert_close(masked.logits, plain.logits)


def test_later_items_do_not_reach_earlier_positions():
    model = small_model(position_alignment="oldest")
    with torch.no_grad():
        before = model(torch.tensor([[1, 2, 3, 4]])).last_hidden_state
        after = model(torch.tensor([[1, 2, 3, 30]])).last_hidden_state
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])


def test_order_of_items_matters():
    model = small_model()
    with torch.no_grad():
        assert not torch.allclose(model(torch.tensor([[1, 2, 3]])).logits, model(torch.tensor([[2, 1, 3]])).logits)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "head_bias": True}, {"head_bias": True}])
def test_logits_and_loss_by_definition(settings):
    model = small_model(**settings)
    labels = torch.tensor([[8, 9, 10, -100, -100], [2, 3, 4, 5, 6], [12, -100, -100, -100, -100]])
    table = model.head.weight
    bias = model.head.bias if model.config.head_bias else torch.zeros(NUM_ITEMS + 1)
    with torch.no_grad():
        output = model(RIGHT, labels=labels)
        scores = output.last_hidden_state @ table.t() + bias  # (batch, length, items + 1)
        expected = F.cross_entropy(
            scores[..., 1:].flatten(0, 1), (labels - 1).clamp(min=-100).flatten(), reduction="none"
        )
        expected = expected[labels.flatten() != -100].mean()
    torch.testing.assert_close(output.loss, expected)
    assert torch.isneginf(output.logits[:, 0]).all()
    torch.testing.assert_close(output.logits[0, 1:], scores[0, 2, 1:])
    tied = table.data_ptr() == model.model.item_embedding.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def test_score_temperature_scores_by_cosine():
    model = small_model(score_temperature=0.1)
    with torch.no_grad():
        output = model(RIGHT)
        expected = F.cosine_similarity(output.user_embedding.unsqueeze(1), model.head.weight[1:].unsqueeze(0), dim=-1)
    torch.testing.assert_close(output.logits[:, 1:], expected / 0.1)


def test_attention_decay_equals_naive_distance_penalty():
    model = small_model(attention_decay=True, num_hidden_layers=1, num_attention_heads=2)
    layer, items = model.model.layers[0], [3, 9, 4, 7]
    with torch.no_grad():
        hidden = model.model.item_embedding.weight[items] + model.model.position_embedding.weight[-4:]
        normed = layer.attention_norm(hidden)
        attention = layer.attention
        q, k, v = (m(normed).view(4, 2, 8) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        attended = torch.zeros(4, 2, 8)
        for head in range(2):
            decay = layer.attention.log_decay[head].exp()
            scores = torch.stack([q[3, head] @ k[j, head] / math.sqrt(8) - decay * (3 - j) for j in range(4)])
            attended[3, head] = torch.softmax(scores, 0) @ v[:, head]
        hidden = hidden + layer.attention.o_proj(attended.view(4, 16))
        hidden = hidden + layer.feed_forward(layer.feed_forward_norm(hidden))
        expected = model.model.final_norm(hidden)[3]
        torch.testing.assert_close(model(torch.tensor([items])).user_embedding[0], expected, rtol=1e-4, atol=1e-5)
    assert layer.attention.log_decay.exp().tolist() == pytest.approx([0.4, 0.1])


def test_the_gradient_of_the_attention_decay_is_that_of_finite_differences():
    model = small_model(attention_decay=True)
    labels = torch.tensor([[8, 9, 3, -100, -100], [2, 3, 4, 5, 6], [4, -100, -100, -100, -100]])
    model(RIGHT, labels=labels).loss.backward()
    decay, step = model.model.layers[0].attention.log_decay, 0.01
    for head in range(len(decay)):
        losses = []
        for change in (step, -step):
            changed = decay.detach().clone()
            changed[head] += change
            parameters = {"model.layers.0.attention.log_decay": changed}
            losses.append(torch.func.functional_call(model, parameters, (RIGHT,), {"labels": labels}).loss.item())
        difference = (losses[0] - losses[1]) / (2 * step)
        assert difference and decay.grad[head].item() == pytest.approx(difference, rel=0.02, abs=1e-4)


def test_start_from_item_embeddings_recommends_neighbours_before_training():
    model = small_model(hidden_size=32, initializer_range=0.001)
    table = torch.randn(NUM_ITEMS + 1, 32, generator=torch.Generator().manual_seed(0))
    table[12] = table[11] + 0.1 * table[13]  # item 12 is like item 11
    model.start_from_item_embeddings(table)
    item_ids, _ = model.recommend(torch.tensor([[11]]), top_k=1)
    assert item_ids.tolist() == [[12]]
    assert model.model.item_embedding.weight[0].abs().sum() == 0
    with pytest.raises(ValueError, match="expected \\(41, 32\\)"):
        model.start_from_item_embeddings(table[1:])
    with pytest.raises(ValueError, match="pre_norm"):
        small_model(block_type="reference").start_from_item_embeddings(torch.zeros(NUM_ITEMS + 1, 16))


@torch.no_grad()
def test_published_initial_weights_are_a_normal_item_table_and_layers_as_pytorch_has_them():
    model = small_model(hidden_size=64, initialization="reference", initializer_range=1.0, tie_word_embeddings=False)
    for layer in (model.model.layers[0].attention.q_proj, model.head):  # uniform, up to 1 / sqrt(64)
        assert 0.12 < layer.weight.abs().max() <= 0.125
        assert layer.weight.std() == pytest.approx(0.125 / 3**0.5, rel=0.1)
    assert 0.1 < model.model.layers[0].attention.q_proj.bias.abs().max() <= 0.125
    assert model.model.item_embedding.weight[1:].std() == pytest.approx(1, rel=0.1)
    assert model.model.position_embedding.weight.std() == pytest.approx(1, rel=0.2)
    assert model.model.final_norm.weight.eq(1).all()


def test_biases_start_from_the_logarithms_of_counts():
    model = small_model(head_bias=True)
    counts = torch.arange(NUM_ITEMS + 1, dtype=torch.float32)
    model.start_from_item_embeddings(torch.zeros(NUM_ITEMS + 1, 16), item_counts=counts)
    assert (model.head.bias[5] - model.head.bias[2]).item() == pytest.approx(math.log(6 / 3), abs=1e-6)
    assert model.head.bias[1:].mean().item() == pytest.approx(0, abs=1e-6)


def test_the_bias_of_repeats_starts_from_the_logarithm_of_their_share():
    model = small_model(repeat_bias=True)
    model.start_from_item_embeddings(torch.zeros(NUM_ITEMS + 1, 16), repeat_share=0.01)
    assert model.head.repeat_bias.item() == pytest.approx(math.log(0.01))
    with pytest.raises(ValueError, match="repeat_share is 0: expected"):
        model.start_from_item_embeddings(torch.zeros(NUM_ITEMS + 1, 16), repeat_share=0)
    items = np.array([5, 7, 5, 5, 5, 7])  # in rows of 4 and 2 items: 2 of 4 targets are repeats
    assert repeat_share(items, np.array([0, 4, 6])) == pytest.approx(3 / 5)


def test_repeat_bias_touches_every_seen_item_once_and_only_up_to_its_position():
    model = small_model(repeat_bias=True)
    history = torch.tensor([[0, 5, 7, 5, 9]])
    labels = torch.tensor([[-100, 7, 5, 9, 3]])
    with torch.no_grad():
        plain = model(history, labels=labels)
        model.head.repeat_bias.fill_(-2.0)
        biased = model(history, labels=labels)
        scores = plain.last_hidden_state[0, 1:] @ model.head.weight.t()  # (4, items + 1)
        for position, seen in enumerate([[5], [5, 7], [5, 7], [5, 7, 9]]):
            scores[position, seen] -= 2.0
    torch.testing.assert_close(biased.logits[0, 1:], scores[3, 1:])
    torch.testing.assert_close(biased.loss, F.cross_entropy(scores[:, 1:], labels[0, 1:] - 1))


@pytest.mark.parametrize(
    ("loss_type", "negative_sharing", "popularity_power"),
    [
        ("cross_entropy", "batch", 0.0),
        ("sampled_softmax", "batch", 0.0),
        ("sampled_softmax", "position", 0.5),
        ("gbce", "batch", 0.5),
        ("gbce", "position", 0.0),
        ("bce", "position", 0.0),
    ],
)
def test_every_loss_learns_a_cycle(loss_type, negative_sharing, popularity_power):
    """Item i is always followed by i + 1: after some steps the model must say so, whatever the loss."""
    model = small_model(
        loss_type=loss_type, negative_sharing=negative_sharing, popularity_power=popularity_power, num_negatives=20,
        hidden_dropout=0.0, attention_dropout=0.0, head_bias=True,
    ).train()  # fmt: skip
    if popularity_power:
        model.set_item_counts(torch.ones(NUM_ITEMS + 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    sequences = (torch.arange(NUM_ITEMS).unsqueeze(1) + torch.arange(5)) % NUM_ITEMS + 1  # (items, 5)
    for _ in range(300):
        output = model(sequences[:, :4], labels=sequences[:, 1:])
        assert output.logits is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    best = model.eval()(sequences[:, :4]).logits.argmax(-1)
    assert (best == sequences[:, 4]).float().mean() > 0.9


def test_popularity_sampling_without_counts_says_what_to_do():
    model = small_model(loss_type="sampled_softmax", popularity_power=0.5).train()
    with pytest.raises(ValueError, match="set_item_counts"):
        model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 0, -100))
    with pytest.raises(ValueError, match="popularity_power is 0"):
        small_model().set_item_counts(torch.ones(NUM_ITEMS + 1))


def test_loss_stays_finite_for_a_target_that_training_never_saw():
    model = small_model(loss_type="sampled_softmax", popularity_power=0.5)
    counts = torch.ones(NUM_ITEMS + 1)
    counts[9] = 0
    model.set_item_counts(counts)
    labels = torch.full_like(RIGHT, -100)
    labels[0, 2] = 9
    assert torch.isfinite(model(RIGHT, labels=labels).loss)


def test_bfloat16_scores_do_not_tie():
    """Ranks come from scores, and ties count against the model: low precision must not make any."""
    torch.manual_seed(0)
    config = SASRecConfig(num_items=3000, hidden_size=16, max_length=8, initializer_range=0.3)
    model = SASRecForNextItem(config).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(RIGHT).logits
    assert logits.dtype == torch.float32
    assert len(logits[0].unique()) > 2900
    assert model.to(torch.bfloat16)(RIGHT).logits.dtype == torch.float32


@pytest.mark.parametrize("loss_type", ["cross_entropy", "sampled_softmax", "bce"])
@pytest.mark.parametrize("label", [0, -1, NUM_ITEMS + 1])
def test_labels_outside_the_catalogue_are_refused(loss_type, label):
    labels = torch.full_like(RIGHT, -100)
    labels[0, 1] = label
    with pytest.raises(ValueError, match=f"labels contain {label}: expected item ids 1..{NUM_ITEMS}"):
        small_model(loss_type=loss_type)(RIGHT, labels=labels)


def test_encoder_of_a_saved_recommender_loads_alone(tmp_path):
    model = small_model(head_bias=True, repeat_bias=True)
    model.save_pretrained(tmp_path)
    encoder = SASRecModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(LEFT).last_hidden_state, model(LEFT).last_hidden_state)
    assert encoder.get_input_embeddings() is encoder.item_embedding


def test_an_encoder_is_saved_but_not_pushed(tmp_path):
    encoder = small_model().model
    with pytest.raises(ValueError, match="push the SASRecForNextItem whose encoder it is"):
        encoder.push_to_hub("user/encoder")
    with pytest.raises(ValueError, match="recommends nothing"):
        encoder.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    assert not (tmp_path / "pushed").exists()
    encoder.save_pretrained(tmp_path / "saved")
    assert torch.equal(SASRecModel.from_pretrained(tmp_path / "saved").final_norm.weight, encoder.final_norm.weight)


def test_recommendations_can_be_used_where_gradients_flow():
    model = small_model()
    item_ids, _ = model.recommend(RIGHT, top_k=3)
    model(RIGHT).logits.gather(1, item_ids).sum().backward()
    assert model.model.item_embedding.weight.grad is not None


@pytest.mark.parametrize("block_type", ["pre_norm", "reference"])
def test_gradient_checkpointing_changes_no_gradient(block_type):
    gradients = []
    for checkpointing in (False, True):
        model = small_model(block_type=block_type, hidden_dropout=0.0, attention_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 0, -100)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_loss_of_parts_sums_to_the_loss_of_the_whole_batch():
    model = small_model()
    labels = RIGHT.masked_fill(RIGHT == 0, -100)
    with torch.no_grad():
        whole = model(RIGHT, labels=labels).loss
        count = (labels != -100).sum()
        parts = sum(model(RIGHT[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_decay": True, "repeat_bias": True},
        {"block_type": "reference", "num_hidden_layers": 1},
        {"position_alignment": "oldest", "attention_decay": True, "num_hidden_layers": 3},
    ],
)
@pytest.mark.parametrize("histories", [LEFT, RIGHT])
def test_recommend_scores_as_forward_does(settings, histories):
    """The last block computes the last position only: no padding and no other row may leak in."""
    model = small_model(**settings)
    item_ids, scores = model.recommend(histories, top_k=NUM_ITEMS, exclude_seen=False)
    with torch.no_grad():
        expected = model(histories).logits.log_softmax(-1)
    torch.testing.assert_close(scores, expected.gather(1, item_ids), rtol=1e-4, atol=1e-5)


def test_recommend_excludes_seen_items_and_sorts():
    model = small_model()
    item_ids, scores = model.recommend(RIGHT, top_k=NUM_ITEMS - 5)
    assert item_ids.shape == scores.shape == (3, NUM_ITEMS - 5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row, history in zip(item_ids.tolist(), RIGHT.tolist(), strict=True):
        assert not set(row) & set(history) and 0 not in row
    with_seen, _ = model.recommend(RIGHT, top_k=NUM_ITEMS, exclude_seen=False)
    assert sorted(with_seen[0].tolist()) == list(range(1, NUM_ITEMS + 1))


def test_recommend_reads_the_newest_items_and_excludes_all():
    model = small_model()
    history = torch.arange(1, 13).unsqueeze(0)  # twelve items, eight are read
    item_ids, scores = model.recommend(history, top_k=20)
    expected = model(history[:, -8:]).logits.log_softmax(-1)
    expected[:, :13] = float("-inf")
    torch.testing.assert_close(scores, expected.topk(20).values)
    padded, _ = model.recommend(F.pad(history, (0, 4)), top_k=20)
    assert torch.equal(padded, item_ids)


def test_recommend_ignores_dropout_and_keeps_the_mode():
    model = small_model(hidden_dropout=0.9).train()
    first, second = model.recommend(RIGHT)[1], model.recommend(RIGHT)[1]
    assert torch.equal(first, second) and model.training


def test_rank_items_gives_the_recommended_items_and_minus_log_p_over_the_whole_catalogue():
    model = small_model(hidden_dropout=0.9).train()
    item_ids, distances = model.rank_items(LEFT, top_k=5)
    assert model.training
    expected_items, scores = model.recommend(LEFT, top_k=5)
    assert torch.equal(item_ids, expected_items) and torch.equal(distances, -scores)
    probabilities = model.eval()(LEFT).logits.softmax(-1)  # seen items keep their share
    torch.testing.assert_close(distances, -probabilities.gather(1, item_ids).log())
    every_item, distances = model.rank_items(LEFT, top_k=NUM_ITEMS, exclude_seen=False)
    torch.testing.assert_close((-distances).exp().sum(1), torch.ones(3))
    assert sorted(every_item[0].tolist()) == list(range(1, NUM_ITEMS + 1))
    with pytest.raises(ValueError, match="history 1 is empty"):
        model.rank_items(torch.tensor([[1, 2], [0, 0]]))


def test_forward_refuses_bad_input():
    model = small_model()
    with pytest.raises(ValueError, match="max_length"):
        model(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="expected ids"):
        model(torch.tensor([[NUM_ITEMS + 1]]))
    for top_k in (NUM_ITEMS + 1, 0, 2.0):
        with pytest.raises(ValueError, match="top_k"):
            model.recommend(RIGHT, top_k=top_k)
    with pytest.raises(ValueError, match="labels have shape"):
        model(RIGHT, labels=RIGHT[:, :2])
    with pytest.raises(ValueError, match="attention_mask have shape"):
        model(RIGHT, attention_mask=torch.ones(1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 3}, "not divisible"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"block_type": "post_norm"}, "pre_norm"),
        ({"loss_type": "hinge"}, "cross_entropy"),
        ({"score_temperature": -1.0}, "score_temperature"),
        ({"num_items": 0}, "num_items"),
        ({"repeat_bias": True, "loss_type": "bce"}, "expected cross_entropy"),
        ({"pad_token_id": 5}, "pad_token_id"),
        ({"max_length": "fifty"}, "max_length"),
    ],
)
def test_config_refuses_bad_values(settings, message):
    with pytest.raises(Exception, match=message):
        SASRecConfig(**{"num_items": NUM_ITEMS, **settings})


def test_model_without_catalogue_size_is_refused():
    with pytest.raises(ValueError, match="num_items is None"):
        SASRecModel(SASRecConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"block_type": "reference", "tie_word_embeddings": False, "head_bias": True},
        {"attention_decay": True, "repeat_bias": True},
    ],
)
def test_save_and_load_give_equal_scores(tmp_path, settings):
    model = small_model(**settings)
    model.save_pretrained(tmp_path)
    loaded, info = SASRecForNextItem.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(model(LEFT).logits, loaded.eval()(LEFT).logits)
        assert not torch.allclose(model(LEFT).logits, small_model(seed=1, **settings)(LEFT).logits)


def test_bfloat16_autocast_stays_close():
    model = small_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 0, -100))
    with torch.no_grad():
        exact = model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 0, -100))
    torch.testing.assert_close(output.loss, exact.loss, rtol=3e-2, atol=3e-2)


def test_padding_row_stays_zero_in_training():
    model = small_model(tie_word_embeddings=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    padding = model.model.item_embedding.weight[0].detach().clone()
    model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 0, -100)).loss.backward()
    optimizer.step()
    torch.testing.assert_close(model.model.item_embedding.weight[0].detach(), padding)
    assert padding.abs().sum() == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"repeat_bias": True}, {"head_bias": True, "tie_word_embeddings": False}, {"score_temperature": 0.1}],
    ids=["tied", "repeat_bias", "untied", "cosine"],
)
def test_scored_positions_have_the_logits_of_their_histories(settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "hidden_dropout": 0.0, "attention_dropout": 0.0, "position_alignment": "oldest"}
    model = SASRecForNextItem(SASRecConfig(num_items=20, **sizes, **settings)).train()
    if "repeat_bias" in settings:
        model.head.repeat_bias.data.fill_(0.7)
    input_ids = torch.tensor([[0, 0, 3, 4, 3], [1, 2, 5, 0, 0]])  # padding on either side
    labels = torch.tensor([[-100, -100, 4, 3, 7], [2, 5, 9, -100, -100]])
    scored = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 1, 0, 0]]).bool()
    logits = model(input_ids, labels=labels, scored_positions=scored).logits
    alone = [model(torch.tensor([history])).logits[0] for history in ([3], [3, 4, 3], [1, 2], [1, 2, 5])]
    torch.testing.assert_close(logits, torch.stack(alone))
    items = torch.tensor([7, 19, 3])
    some = model(input_ids, labels=labels, scored_positions=scored, scored_items=items).logits
    torch.testing.assert_close(some, logits[:, items])
    own = torch.tensor([[3, 3], [7, 1], [20, 5], [4, 2]])  # other items for each position
    some = model(input_ids, labels=labels, scored_positions=scored, scored_items=own).logits
    torch.testing.assert_close(some, logits.gather(1, own))
