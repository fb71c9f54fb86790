"""Every model is one graph, for `torch.compile` and `torch.export`, for every batch size and length."""

import pytest
import torch

from hf_ilora import (
    CaserConfig,
    CaserForNextItem,
    GRU4RecConfig,
    GRU4RecForNextItem,
    PopularityConfig,
    PopularityForNextItem,
    SASRecConfig,
    SASRecForNextItem,
    TransitionCountsConfig,
    TransitionCountsForNextItem,
)

SIZES = {"num_items": 40, "hidden_size": 8, "max_length": 10}
MODELS = {
    "sasrec": (SASRecForNextItem, SASRecConfig, {"num_hidden_layers": 2}),
    "decay": (
        SASRecForNextItem,
        SASRecConfig,
        {"attention_decay": True, "repeat_bias": True, "head_bias": True, "position_alignment": "newest"},
    ),
    "gru4rec": (GRU4RecForNextItem, GRU4RecConfig, {"num_hidden_layers": 2}),
    "caser": (CaserForNextItem, CaserConfig, {"score_temperature": 0.1}),
}
SHAPES = ((3, 4), (5, 7), (2, 9))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(kind, **changes):
    model_class, config_class, settings = MODELS[kind]
    torch.manual_seed(0)
    return model_class(config_class(**SIZES | settings | changes)).eval()


def histories(batch, length):
    """Padded on the right, on the left and not at all."""
    items = torch.randint(1, 41, (batch, length), generator=torch.Generator().manual_seed(length))
    items[0, length // 2 :] = 0
    items[1, : length // 2] = 0
    return items


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
@torch.no_grad()
def test_forward_has_no_graph_break(kind):
    explained = torch._dynamo.explain(model_of(kind))(histories(3, 4))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_one_compiled_graph_serves_batches_of_any_shape(kind):
    model = model_of(kind)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counting)
    for shape in SHAPES:
        found, expected = compiled(histories(*shape)), model(histories(*shape))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "caser"])
def test_an_exported_model_takes_batches_of_any_shape(kind):
    model = model_of(kind)
    shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=SIZES["max_length"])}
    exported = torch.export.export(
        model, (), {"input_ids": histories(3, 4)}, dynamic_shapes={"input_ids": shapes}, strict=False
    )
    assert not [node for node in exported.graph.nodes if "sort" in str(node.target)]  # ONNX has no stable one
    with torch.no_grad():
        for shape in SHAPES:
            expected = model(histories(*shape)).logits
            found = exported.module()(input_ids=histories(*shape)).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (PopularityForNextItem, PopularityConfig(num_items=40)),
        (TransitionCountsForNextItem, TransitionCountsConfig(num_items=40, max_length=3, popularity_weight=0.1)),
    ],
)
@torch.no_grad()
def test_counts_are_one_graph_too(model_class, config):
    model = model_class.fit(histories(30, 8)[2:].tolist(), config).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = torch.export.export(
        model, (), {"input_ids": histories(3, 4)}, dynamic_shapes={"input_ids": shapes}, strict=False
    )
    for shape in SHAPES:
        expected = model(histories(*shape)).logits
        torch.testing.assert_close(compiled(histories(*shape)).logits, expected)
        torch.testing.assert_close(exported.module()(input_ids=histories(*shape)).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"loss_type": "sampled_softmax", "popularity_power": 0.5}])
def test_a_training_step_is_one_graph_with_the_loss_and_gradients_of_eager_mode(settings):
    model = model_of("sasrec", hidden_dropout=0.0, attention_dropout=0.0, num_hidden_layers=1, **settings).train()
    if "popularity_power" in settings:
        model.set_item_counts(torch.ones(41))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    items = histories(3, 6)
    labels = items.roll(-1, 1).masked_fill(items == 0, -100).masked_fill(items.roll(-1, 1) == 0, -100)
    indices = labels.ne(-100).flatten().nonzero().squeeze(1)
    for given in ({}, {"label_indices": indices}):
        loss = compiled(items, labels=labels, **given).loss
        gradient = torch.autograd.grad(loss, model.model.item_embedding.weight)[0]
        assert loss.isfinite() and gradient.isfinite().all()
        if not settings:  # others draw negatives
            expected = model(items, labels=labels).loss
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.model.item_embedding.weight)[0])


def test_padding_on_either_side_and_labels_by_index_give_the_loss_of_the_mask():
    model = model_of("sasrec", repeat_bias=True)
    items = histories(4, 7)
    labels = items.roll(-1, 1).masked_fill(items == 0, -100).masked_fill(items.roll(-1, 1) == 0, -100)
    labels[2, :3] = -100
    mask = labels != -100
    indices = mask.flatten().nonzero().squeeze(1)
    by_mask = model(items, labels=labels, scored_positions=mask)
    by_index = model(items, labels=labels, label_indices=indices, scored_positions=indices)
    assert torch.equal(by_mask.loss, by_index.loss) and torch.equal(by_mask.logits, by_index.logits)
    scores = by_mask.logits[:, 1:]
    torch.testing.assert_close(by_mask.loss, torch.nn.functional.cross_entropy(scores, labels[mask] - 1))
