"""Caser against filters moved by hand, and the interface that it shares with SASRec."""

import pytest
import torch
import torch.nn.functional as F

from hf_ilora import CaserConfig, CaserForNextItem

NUM_ITEMS = 30
LEFT = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 11]])
RIGHT = torch.tensor([[7, 8, 9, 0, 0], [1, 2, 3, 4, 5], [11, 0, 0, 0, 0]])
ROWS = [[7, 8, 9], [1, 2, 3, 4, 5], [11]]


def small_model(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"hidden_size": 8, "max_length": 6, "initializer_range": 0.3, "num_horizontal_filters": 3, **settings}
    return CaserForNextItem(CaserConfig(num_items=NUM_ITEMS, **settings)).eval()


def last_labels(histories, targets=(10, 6, 12)):
    labels = torch.full_like(histories, -100)
    for row, target in enumerate(targets):
        labels[row, histories[row].nonzero().max()] = target
    return labels


def naive_user_embedding(model, items):
    """One history: every filter at every place of the picture, number by number."""
    encoder, length = model.model, model.config.max_length
    picture = torch.zeros(length, model.config.hidden_size)
    picture[length - len(items) :] = encoder.item_embedding.weight[items]
    found = []
    for height, filters in enumerate(encoder.horizontal_filters, start=1):
        for weight, bias in zip(filters.weight, filters.bias, strict=True):  # weight (hidden, height)
            values = [
                (picture[start : start + height] * weight.t()).sum() + bias for start in range(length - height + 1)
            ]
            found.append(max(value.clamp(min=0) for value in values))
    for weight, bias in zip(encoder.vertical_filters.weight, encoder.vertical_filters.bias, strict=True):
        found.extend(weight @ picture + bias)
    return (encoder.projection.weight @ torch.stack(found) + encoder.projection.bias).clamp(min=0)


@pytest.mark.parametrize("histories", [LEFT, RIGHT])
@torch.no_grad()
def test_user_embedding_equals_filters_by_hand_on_either_side_of_padding(histories):
    model = small_model()
    for name, parameter in model.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    output = model(histories)
    for row, items in enumerate(ROWS):
        expected = naive_user_embedding(model, items)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(output.user_embedding[row], expected, rtol=1e-4, atol=1e-5)
        newest = histories[row].nonzero().max()
        torch.testing.assert_close(output.last_hidden_state[row, newest], expected, rtol=1e-4, atol=1e-5)
        others = torch.arange(5) != newest
        assert output.last_hidden_state[row, others].abs().sum() == 0


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "head_bias": True}, {"repeat_bias": True}])
@torch.no_grad()
def test_recommend_scores_as_forward_does(settings):
    model = small_model(**settings)
    if "repeat_bias" in settings:
        model.head.repeat_bias.fill_(-2.0)
    for histories in (LEFT, RIGHT, RIGHT[1:2]):
        item_ids, scores = model.recommend(histories, top_k=NUM_ITEMS, exclude_seen=False)
        torch.testing.assert_close(
            scores, model(histories).logits.log_softmax(-1).gather(1, item_ids), rtol=1e-4, atol=1e-5
        )
    long_history = torch.arange(1, 13).unsqueeze(0)
    item_ids, scores = model.recommend(long_history, top_k=5, exclude_seen=False)
    expected = model(long_history[:, -6:]).logits.log_softmax(-1)
    torch.testing.assert_close(scores, expected.gather(1, item_ids), rtol=1e-4, atol=1e-5)


REFERENCE = {"block_type": "reference", "tie_word_embeddings": False, "head_bias": True}


@pytest.mark.parametrize("heights", [[2, 3, 4], [6, 1]])
@pytest.mark.parametrize("histories", [LEFT, RIGHT])
@torch.no_grad()
def test_the_reference_block_pads_last_and_has_no_projection(histories, heights):
    model = small_model(filter_heights=heights, **REFERENCE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    encoder, hidden = model.model, model.config.hidden_size
    output = model(histories)
    for row, items in enumerate(ROWS):
        picture = torch.zeros(6, hidden)
        picture[: len(items)] = encoder.item_embedding.weight[items]
        expected = []
        for height, filters in zip(heights, encoder.horizontal_filters, strict=True):
            pieces = torch.stack([picture[start : start + height] for start in range(7 - height)])
            answers = torch.einsum("pth,fht->fp", pieces, filters.weight) + filters.bias.unsqueeze(1)
            expected += [answers.amax(1).clamp(min=0)]  # (filters,)
        expected += [(encoder.vertical_filters.weight[0] @ picture + encoder.vertical_filters.bias).clamp(min=0)]
        torch.testing.assert_close(output.user_embedding[row], torch.cat(expected), rtol=1e-4, atol=1e-5)
    scores = output.user_embedding @ model.head.weight.t() + model.head.bias
    torch.testing.assert_close(output.logits[:, 1:], scores[:, 1:], rtol=1e-4, atol=1e-4)
    loss = model(histories, labels=last_labels(histories)).loss
    torch.testing.assert_close(loss, F.cross_entropy(scores[:, 1:], torch.tensor([9, 5, 11])), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_reference_block_is_saved_and_loaded(tmp_path):
    model = small_model(**REFERENCE)
    model.save_pretrained(tmp_path)
    loaded = CaserForNextItem.from_pretrained(tmp_path)
    assert torch.equal(model(LEFT).logits, loaded(LEFT).logits)
    item_ids, scores = loaded.recommend(ROWS, top_k=3)
    assert scores.isfinite().all() and item_ids.min() > 0


def test_the_default_block_has_filters_of_every_height_and_an_older_configuration_means_it():
    fresh = small_model()
    older = small_model(num_vertical_filters=4)
    assert [filters.kernel_size for filters in fresh.model.horizontal_filters] == [(n,) for n in range(1, 7)]
    assert torch.equal(fresh(LEFT).logits, older(LEFT).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_type": "authors"}, "block_type is 'authors': expected one of paper, reference"),
        (REFERENCE | {"num_vertical_filters": 4}, "num_vertical_filters is 4: expected 1 in the reference block"),
        ({"block_type": "reference"}, "pass tie_word_embeddings=False"),
        (REFERENCE | {"max_length": 3}, r"filter_heights are \[2, 3, 4\]: .* 1 to max_length, 3"),
        ({"filter_heights": []}, r"filter_heights are \[\]"),
        ({"filter_heights": [2, 2]}, r"filter_heights are \[2, 2\]: expected different heights"),
        ({"filter_heights": [0, 1]}, r"filter_heights are \[0, 1\]"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CaserConfig(num_items=3, **settings)


@torch.no_grad()
def test_published_initial_weights():
    """Xavier-normal as of filters with one channel: (height * hidden) inputs and that many outputs per filter."""
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "max_length": 10, "num_horizontal_filters": 400, "initializer_range": 0.01}
    model = CaserForNextItem(CaserConfig(num_items=500, initialization="reference", **REFERENCE, **settings))
    encoder = model.model
    assert encoder.item_embedding.weight[1:].std() == pytest.approx(0.01, rel=0.05)
    for height, filters in zip((2, 3, 4), encoder.horizontal_filters, strict=True):
        assert filters.weight.std() == pytest.approx((2 / (height * 64 * 401)) ** 0.5, rel=0.05)
        assert filters.bias.eq(0.1).all()
    assert encoder.vertical_filters.bias.eq(0.1).all()
    assert 0.5 / 10 < encoder.vertical_filters.weight.var() < 2 / 10
    bound = (64 + 3 * 400) ** -0.5
    assert bound * 0.99 < model.head.weight.abs().max() <= bound and 0 < model.head.bias.abs().max() <= bound


@torch.no_grad()
def test_loss_by_definition_after_the_last_item():
    model = small_model()
    for histories in (LEFT, RIGHT):
        output = model(histories, labels=last_labels(histories))
        scores = output.user_embedding @ model.head.weight.t()
        torch.testing.assert_close(output.loss, F.cross_entropy(scores[:, 1:], torch.tensor([9, 5, 11])))


def test_labels_before_the_last_item_are_refused():
    model = small_model()
    labels = torch.where(RIGHT == 0, -100, RIGHT)
    with pytest.raises(
        ValueError, match=r"labels choose position 0 of history 0, which has 3 items: .*labelled_positions=\"last\""
    ):
        model(RIGHT, labels=labels)
    with pytest.raises(ValueError, match="scored_positions choose position 0"):
        model(RIGHT, scored_positions=RIGHT != 0)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "gbce"])
def test_training_learns_a_cycle(loss_type):
    model = small_model(loss_type=loss_type, num_negatives=20, hidden_dropout=0.0, max_length=4, hidden_size=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sequences = (torch.arange(NUM_ITEMS).unsqueeze(1) + torch.arange(5)) % NUM_ITEMS + 1  # (items, 5)
    labels = torch.full((NUM_ITEMS, 4), -100)
    labels[:, -1] = sequences[:, 4]
    for _ in range(150):
        loss = model(sequences[:, :4], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = model.eval()(sequences[:, :4]).logits.argmax(-1)
    assert (best == sequences[:, 4]).float().mean() > 0.9


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "head_bias": True}])
@torch.no_grad()
def test_save_and_load_give_equal_scores_and_other_weights_others(tmp_path, settings):
    model = small_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = CaserForNextItem.from_pretrained(tmp_path).eval()
    assert torch.equal(model(LEFT).logits, loaded(LEFT).logits)
    assert not torch.allclose(model(LEFT).logits, small_model(seed=1, **settings)(LEFT).logits)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"CaserConfig\.num_items is None"):
        CaserForNextItem(CaserConfig())
    with pytest.raises(ValueError, match="num_vertical_filters is 0"):
        CaserConfig(num_items=3, num_vertical_filters=0)
    with pytest.raises(ValueError, match="max_length"):
        small_model()(torch.ones(1, 7, dtype=torch.long))


@torch.no_grad()
def test_full_histories_need_no_lengths():
    model = small_model().eval()
    histories = torch.tensor([[3, 1, 2], [7, 4, 9]])
    states = model.model.encode(histories, None)  # (batch, length, hidden)
    assert states[:, :-1].abs().max() == 0
    torch.testing.assert_close(states[:, -1], model(histories).user_embedding)
