"""GRU4Rec against gates written out by hand, and the interface that it shares with SASRec."""

import pytest
import torch
import torch.nn.functional as F

from hf_ilora import GRU4RecConfig, GRU4RecForNextItem

NUM_ITEMS = 30
LEFT = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 11]])
RIGHT = torch.tensor([[7, 8, 9, 0, 0], [1, 2, 3, 4, 5], [11, 0, 0, 0, 0]])
ROWS = [[7, 8, 9], [1, 2, 3, 4, 5], [11]]


def small_model(seed=0, **settings):
    torch.manual_seed(seed)
    settings = {"hidden_size": 12, "max_length": 8, "initializer_range": 0.3, **settings}
    return GRU4RecForNextItem(GRU4RecConfig(num_items=NUM_ITEMS, **settings)).eval()


def naive_states(model, items):
    """The states of one history, gate by gate and layer by layer."""
    states = [model.model.item_embedding.weight[item] for item in items]
    gru = model.model.gru
    for layer in range(model.config.num_hidden_layers):
        input_weights = getattr(gru, f"weight_ih_l{layer}").chunk(3)
        hidden_weights = getattr(gru, f"weight_hh_l{layer}").chunk(3)
        input_biases = getattr(gru, f"bias_ih_l{layer}").chunk(3)
        hidden_biases = getattr(gru, f"bias_hh_l{layer}").chunk(3)
        hidden = torch.zeros(model.config.hidden_size)
        for position, state in enumerate(states):
            read = [w @ state + b for w, b in zip(input_weights, input_biases, strict=True)]
            kept = [w @ hidden + b for w, b in zip(hidden_weights, hidden_biases, strict=True)]
            reset, update = torch.sigmoid(read[0] + kept[0]), torch.sigmoid(read[1] + kept[1])
            candidate = torch.tanh(read[2] + reset * kept[2])
            hidden = (1 - update) * candidate + update * hidden
            states[position] = hidden
    return torch.stack(states)


@pytest.mark.parametrize("num_hidden_layers", [1, 2])
@pytest.mark.parametrize("histories", [LEFT, RIGHT])
@torch.no_grad()
def test_states_equal_gates_by_hand_on_either_side_of_padding(num_hidden_layers, histories):
    model = small_model(num_hidden_layers=num_hidden_layers)
    for name, parameter in model.model.gru.named_parameters():
        if name.startswith("bias"):
            torch.nn.init.normal_(parameter)
    output = model(histories)
    for row, items in enumerate(ROWS):
        expected = naive_states(model, items)
        torch.testing.assert_close(output.user_embedding[row], expected[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.last_hidden_state[row][histories[row] != 0], expected, rtol=1e-4, atol=1e-5)
        assert output.last_hidden_state[row][histories[row] == 0].abs().sum() == 0


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": False, "head_bias": True}, {"repeat_bias": True}])
@torch.no_grad()
def test_recommend_scores_as_forward_does(settings):
    model = small_model(**settings)
    if "repeat_bias" in settings:
        model.head.repeat_bias.fill_(-2.0)
    for histories in (LEFT, RIGHT):
        item_ids, scores = model.recommend(histories, top_k=NUM_ITEMS, exclude_seen=False)
        logits = model(histories).logits
        assert torch.isneginf(logits[:, 0]).all()
        torch.testing.assert_close(scores, logits.log_softmax(-1).gather(1, item_ids), rtol=1e-4, atol=1e-5)
        ranked, distances = model.rank_items(histories, top_k=3)
        assert torch.equal(ranked, model.recommend(histories, top_k=3)[0])
        torch.testing.assert_close(distances, -logits.log_softmax(-1).gather(1, ranked), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_loss_by_definition_at_every_labelled_position():
    model = small_model(head_bias=True)
    labels = torch.tensor([[8, 9, 10, -100, -100], [2, -100, 4, 5, 6], [12, -100, -100, -100, -100]])
    output = model(RIGHT, labels=labels)
    scores = output.last_hidden_state @ model.head.weight.t() + model.head.bias
    expected = F.cross_entropy(scores[labels != -100][:, 1:], labels[labels != -100] - 1)
    torch.testing.assert_close(output.loss, expected)
    parts = sum(model(RIGHT[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=8).loss for i in range(3))
    torch.testing.assert_close(parts, expected)


@pytest.mark.parametrize("loss_type", ["cross_entropy", "sampled_softmax", "gbce", "bce"])
def test_every_loss_learns_a_cycle(loss_type):
    """Item i is always followed by i + 1: after some steps the model must predict it, with every loss."""
    model = small_model(
        loss_type=loss_type, num_negatives=20, hidden_dropout=0.0, hidden_size=16, head_bias=True
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    sequences = (torch.arange(NUM_ITEMS).unsqueeze(1) + torch.arange(5)) % NUM_ITEMS + 1  # (items, 5)
    for _ in range(250):
        output = model(sequences[:, :4], labels=sequences[:, 1:])
        assert output.logits is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    best = model.eval()(sequences[:, :4]).logits.argmax(-1)
    assert (best == sequences[:, 4]).float().mean() > 0.9


@pytest.mark.parametrize("settings", [{}, {"num_hidden_layers": 2, "tie_word_embeddings": False, "head_bias": True}])
@torch.no_grad()
def test_save_and_load_give_equal_scores_and_other_weights_others(tmp_path, settings):
    model = small_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = GRU4RecForNextItem.from_pretrained(tmp_path).eval()
    assert torch.equal(model(LEFT).logits, loaded(LEFT).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not torch.allclose(model(LEFT).logits, small_model(seed=1, **settings)(LEFT).logits)


def test_fresh_weights_of_the_gates_have_the_published_range():
    gru = small_model().model.gru
    bound = (6 / 24) ** 0.5
    assert bound * 0.95 < gru.weight_hh_l0.abs().max() <= bound
    assert gru.bias_ih_l0.abs().sum() == 0


@torch.no_grad()
def test_published_initial_weights():
    model = small_model(initialization="reference", initializer_range=0.01, tie_word_embeddings=False, head_bias=True)
    bound = 12**-0.5
    for parameter in (*model.model.gru.parameters(), *model.head.parameters()):
        assert bound * 0.7 < parameter.abs().max() <= bound
    assert model.model.item_embedding.weight.std() == pytest.approx(0.01, rel=0.15)
    assert model.model.item_embedding.weight[0].eq(0).all()


def test_bad_input_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="max_length"):
        model(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels contain 31: expected item ids 1\.\.30"):
        model(RIGHT, labels=RIGHT.masked_fill(RIGHT == 9, 31).masked_fill(RIGHT == 0, -100))
    with pytest.raises(ValueError, match=r"GRU4RecConfig\.num_items is None"):
        GRU4RecForNextItem(GRU4RecConfig())
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        GRU4RecConfig(num_items=3, num_hidden_layers=0)
    assert model.recommend(torch.arange(1, 13).unsqueeze(0), top_k=5)[0].shape == (1, 5)  # longer: the newest are read
