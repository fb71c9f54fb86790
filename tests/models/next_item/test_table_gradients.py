import copy

import pytest
import torch

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, SASRecConfig, SASRecForNextItem
from hf_ilora.models.next_item import encoder_for_next_item, next_item_head

NUM_ITEMS = 20
HISTORIES = torch.tensor([[0, 0, 3, 7, 3], [5, 20, 1, 9, 2]])
LABELS = torch.tensor([[-100, -100, 7, 3, 11], [20, 1, 9, 2, 5]])


def build_model(kind: str = "sasrec", **settings):
    torch.manual_seed(0)
    settings = {"num_items": NUM_ITEMS, "hidden_size": 8, "num_negatives": 6, "hidden_dropout": 0.0} | settings
    if kind == "sasrec":
        return SASRecForNextItem(SASRecConfig(attention_dropout=0.0, **settings)).train()
    if kind == "gru4rec":
        return GRU4RecForNextItem(GRU4RecConfig(**settings)).train()
    return CaserForNextItem(CaserConfig(max_length=5, **settings)).train()


def loss_of(model, labels=LABELS, histories=HISTORIES):
    torch.manual_seed(1)  # of the negatives
    return model(histories, labels=labels).loss


def gradients_of(model, labels=LABELS) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(model, labels).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.fixture
def separate_lookups(monkeypatch):
    """Switches to lookups as torch makes them."""

    def switch():
        for module in (encoder_for_next_item, next_item_head):
            monkeypatch.setattr(module, "table_for_lookups", lambda module: None)

    return switch


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sampled_softmax"},
        {"loss_type": "sampled_softmax", "score_temperature": 0.1, "head_bias": True, "repeat_bias": True},
        {"loss_type": "sampled_softmax", "negative_sharing": "position"},
        {"loss_type": "gbce", "tie_word_embeddings": False},
        {"loss_type": "bce"},
    ],
)
def test_gradients_are_those_of_separate_lookups(settings, separate_lookups):
    model = build_model(**settings)
    found = gradients_of(model)
    separate_lookups()
    for name, expected in gradients_of(model).items():
        torch.testing.assert_close(found[name], expected, msg=name)
    assert found["model.item_embedding.weight"][[3, 7, 9]].abs().min() > 0


@pytest.mark.parametrize("kind", ["gru4rec", "caser"])
def test_every_encoder_reads_the_shared_table(kind, separate_lookups):
    model = build_model(kind, loss_type="gbce")
    labels = torch.where(torch.arange(5) == 4, LABELS, -100)
    found = gradients_of(model, labels)
    separate_lookups()
    for name, expected in gradients_of(model, labels).items():
        torch.testing.assert_close(found[name], expected, msg=name)


def test_padding_has_no_gradient():
    model = build_model(loss_type="sampled_softmax", repeat_bias=True)
    assert not gradients_of(model)["model.item_embedding.weight"][0].any()


def test_gradients_of_several_batches_add_up():
    model = build_model(loss_type="sampled_softmax")
    expected = gradients_of(model)["model.item_embedding.weight"]
    for _ in range(2):
        loss_of(model).backward()
    torch.testing.assert_close(model.model.item_embedding.weight.grad, 3 * expected)


def test_the_next_gradient_takes_the_memory_of_one_that_nobody_has():
    model = build_model(loss_type="sampled_softmax")
    weight = model.model.item_embedding.weight
    loss_of(model).backward()
    address, first = weight.grad.data_ptr(), weight.grad.clone()
    model.zero_grad()
    loss_of(model, LABELS.flip(0), HISTORIES.flip(0)).backward()
    assert weight.grad.data_ptr() == address
    torch.testing.assert_close(weight.grad, first)


@pytest.mark.parametrize("part", [slice(None), 3])
def test_a_gradient_that_somebody_has_is_not_overwritten(part):
    model = build_model(loss_type="sampled_softmax")
    weight = model.model.item_embedding.weight
    loss_of(model).backward()
    held = weight.grad[part]
    before = held.clone()
    model.zero_grad()
    loss_of(model, torch.where(LABELS > 0, 4, LABELS)).backward()
    assert not torch.equal(weight.grad[part], before)
    torch.testing.assert_close(held, before, rtol=0, atol=0)


def test_a_copy_of_a_model_has_gradients_of_its_own():
    model = build_model(loss_type="sampled_softmax")
    loss_of(model).backward()
    other = copy.deepcopy(model)
    expected = model.model.item_embedding.weight.grad.clone()
    other.zero_grad()
    loss_of(other, torch.where(LABELS > 0, 4, LABELS)).backward()
    torch.testing.assert_close(model.model.item_embedding.weight.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_tables_in_bfloat16_learn_as_those_in_float32(sparse):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(loss_type="sampled_softmax").to(dtype)
        model.get_input_embeddings().sparse = sparse
        loss_of(model).backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient.dtype == dtype and gradient.is_sparse == sparse
        found.append(gradient.to_dense().float())
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.01 * found[0].abs().max().item())
