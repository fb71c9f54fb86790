"""Item embeddings of a teacher inside a recommender: what they add, how they travel, how they are folded away."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_ilora import CaserConfig, CaserForNextItem, GRU4RecConfig, GRU4RecForNextItem, SASRecConfig, SASRecForNextItem
from hf_ilora.titles.pca import pca_embeddings

NUM_ITEMS, TEACHER_SIZE = 12, 23
HISTORIES = torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 11]])
MODELS = {
    "sasrec": (SASRecConfig, SASRecForNextItem),
    "gru4rec": (GRU4RecConfig, GRU4RecForNextItem),
    "caser": (CaserConfig, CaserForNextItem),
}
USES = [
    {"teacher_embedding_use": "input", "tie_word_embeddings": True},
    {"teacher_embedding_use": "input", "tie_word_embeddings": False, "head_bias": True},
    {"teacher_embedding_use": "input_and_head", "tie_word_embeddings": True, "repeat_bias": True},
    {"teacher_embedding_use": "input_and_head", "tie_word_embeddings": True, "score_temperature": 0.5},
]


def teacher_table(seed=0):
    return torch.randn(NUM_ITEMS + 1, TEACHER_SIZE, generator=torch.Generator().manual_seed(seed))


def taught(kind="sasrec", table=True, **settings):
    config_class, model_class = MODELS[kind]
    settings = {"hidden_size": 8, "max_length": 6, "initializer_range": 0.3, "ed_weight": 0.5, **settings}
    torch.manual_seed(0)
    model = model_class(config_class(num_items=NUM_ITEMS, teacher_embedding_size=TEACHER_SIZE, **settings)).eval()
    if table:
        model.set_teacher_embeddings(teacher_table())
        torch.nn.init.normal_(model.model.item_embedding.teacher.projection.bias)  # as after training
    return model


def plain_copy(model, input_table, head_table):
    """A model without teacher embeddings that has the other weights, and these two tables."""
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("teacher")}
    for name in ("ed_weight", "architectures", "model_type", "transformers_version", "dtype"):
        settings.pop(name, None)
    plain = type(model)(type(model.config)(**settings | {"tie_word_embeddings": False}))
    weights = {name: value for name, value in model.state_dict().items() if "teacher" not in name}
    weights["model.item_embedding.weight"], weights["head.weight"] = input_table, head_table
    plain.load_state_dict(weights)
    return plain.eval()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_the_input_is_the_item_table_plus_the_weighted_projection(kind, use):
    model = taught(kind, **use)
    embedding = model.model.item_embedding
    projection = embedding.teacher.projection
    added = torch.zeros(NUM_ITEMS + 1, 8)
    for item in range(1, NUM_ITEMS + 1):
        added[item] = 0.5 * (projection.weight @ teacher_table()[item] + projection.bias)
    head_table = model.head.weight + added if use["teacher_embedding_use"] == "input_and_head" else model.head.weight
    expected = plain_copy(model, embedding.weight + added, head_table)
    torch.testing.assert_close(model(HISTORIES).logits, expected(HISTORIES).logits, rtol=1e-5, atol=1e-5)
    without = plain_copy(model, embedding.weight, model.head.weight)
    assert not torch.allclose(model(HISTORIES).logits, without(HISTORIES).logits, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("use", USES)
@torch.no_grad()
def test_a_folded_model_is_plain_and_scores_as_before(tmp_path, kind, use):
    model = taught(kind, **use)
    labels = torch.full_like(HISTORIES, -100)
    labels[:, -1] = torch.tensor([1, 2, 3])
    before, recommended = model(HISTORIES, labels=labels), model.recommend(HISTORIES, top_k=3)
    assert model.fold_teacher_embeddings() is model
    after = model(HISTORIES, labels=labels)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.loss, before.loss)
    torch.testing.assert_close(model.recommend(HISTORIES, top_k=3), recommended, rtol=0, atol=1e-5)
    assert model.model.item_embedding.weight[0].abs().sum() == 0
    model.save_pretrained(tmp_path)
    assert not [
        name for name, value in load_file(tmp_path / "model.safetensors").items() if TEACHER_SIZE in value.shape
    ]
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(HISTORIES).logits, after.logits)
    assert loaded.config.teacher_embedding_size is None
    tied = use["teacher_embedding_use"] == "input_and_head"
    assert loaded.config.tie_word_embeddings == tied
    for one in (model, loaded):
        assert (one.head.weight.data_ptr() == one.model.item_embedding.weight.data_ptr()) == tied
        assert type(one.config)(num_items=NUM_ITEMS).ed_weight == one.config.ed_weight
    once_more = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.fold_teacher_embeddings().state_dict().keys() == once_more.keys()


def test_a_folded_model_trains_on():
    model = taught().fold_teacher_embeddings().train()
    labels = torch.full_like(HISTORIES, -100)
    labels[:, -1] = 3
    model(HISTORIES, labels=labels).loss.backward()
    assert model.head.weight.grad is not None and model.model.item_embedding.weight.grad is not None
    assert model.get_input_embeddings() is model.model.item_embedding


@torch.no_grad()
def test_a_checkpoint_carries_the_table_and_another_table_scores_otherwise(tmp_path):
    model = taught()
    model.save_pretrained(tmp_path)
    loaded = SASRecForNextItem.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(HISTORIES).logits, model(HISTORIES).logits)
    assert loaded.config.teacher_embedding_size == TEACHER_SIZE
    loaded.set_teacher_embeddings(teacher_table(seed=1))
    assert not torch.allclose(loaded(HISTORIES).logits, model(HISTORIES).logits, atol=1e-3)
    folded = loaded.fold_teacher_embeddings()
    assert not torch.allclose(folded(HISTORIES).logits, model(HISTORIES).logits, atol=1e-3)


@pytest.mark.parametrize("use", ["input", "input_and_head"])
@torch.no_grad()
def test_a_table_given_to_a_call_stands_in_for_the_stored_one(use):
    model = taught(teacher_embedding_use=use)
    other = taught(teacher_embedding_use=use)
    other.set_teacher_embeddings(teacher_table(seed=1))
    given = model(HISTORIES, teacher_embeddings=other.model.item_embedding.teacher.table)
    torch.testing.assert_close(given.logits, other(HISTORIES).logits)
    assert not torch.allclose(given.logits, model(HISTORIES).logits, atol=1e-3)
    empty = taught(table=False, teacher_embedding_use=use)
    assert torch.isfinite(empty(HISTORIES, teacher_embeddings=teacher_table()).logits[:, 1:]).all()


@torch.no_grad()
def test_few_items_and_many_are_projected_alike():
    """Below the size of the catalogue the batch is projected, above it the table."""
    model = taught()
    few, many = model(HISTORIES[:1]), model(HISTORIES.repeat(20, 1))
    torch.testing.assert_close(many.logits[0], few.logits[0])


def test_training_moves_the_projection_and_not_the_table():
    model = taught().train()
    table = model.model.item_embedding.teacher.table.clone()
    assert "model.item_embedding.teacher.table" not in dict(model.named_parameters())
    labels = torch.full_like(HISTORIES, -100)
    labels[:, -1] = 3
    model(HISTORIES, labels=labels).loss.backward()
    assert model.model.item_embedding.teacher.projection.weight.grad.abs().sum() > 0
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    assert torch.equal(model.model.item_embedding.teacher.table, table)


def test_the_head_with_teacher_embeddings_learns_through_both_uses():
    """With dropout off, the gradient of the projection equals that of autograd through one whole table."""
    model = taught(teacher_embedding_use="input_and_head", hidden_dropout=0.0, attention_dropout=0.0).train()
    labels = torch.full_like(HISTORIES, -100)
    labels[:, -1] = torch.tensor([1, 2, 3])
    loss = model(HISTORIES, labels=labels).loss
    loss.backward()
    user = model(HISTORIES).user_embedding
    teacher = model.model.item_embedding.teacher
    whole = model.model.item_embedding.weight + 0.5 * (
        teacher.table @ teacher.projection.weight.t() + teacher.projection.bias
    )
    expected = F.cross_entropy((user @ whole.t())[:, 1:], labels[:, -1] - 1)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(expected, teacher.projection.weight)[0]
    torch.testing.assert_close(teacher.projection.weight.grad, gradient)


def test_bad_tables_are_refused():
    model = taught(table=False)
    with pytest.raises(ValueError, match="call set_teacher_embeddings before training"):
        model(HISTORIES)
    with pytest.raises(ValueError, match="call set_teacher_embeddings"):
        model.fold_teacher_embeddings()
    with pytest.raises(ValueError, match=r"have shape \(12, 23\): expected \(13, 23\)"):
        model.set_teacher_embeddings(teacher_table()[1:])
    with pytest.raises(ValueError, match=r"expected \(13, 23\)"):
        model(HISTORIES, teacher_embeddings=torch.ones(13, 8))
    broken = teacher_table()
    broken[5, 0] = float("nan")
    with pytest.raises(ValueError, match="item 5 hold NaN"):
        model.set_teacher_embeddings(broken)
    with pytest.raises(ValueError, match="all zero"):
        model.set_teacher_embeddings(torch.zeros(13, 23))
    plain = SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8))
    with pytest.raises(ValueError, match="teacher_embedding_size=23"):
        plain.set_teacher_embeddings(teacher_table())
    with pytest.raises(ValueError, match="without a place for them"):
        plain(HISTORIES, teacher_embeddings=teacher_table())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_embedding_size": 0}, "teacher_embedding_size is 0"),
        ({"teacher_embedding_use": "output"}, "input, input_and_head"),
        ({"teacher_embedding_use": "input_and_head", "tie_word_embeddings": False}, "expected a tied head"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(Exception, match=message):
        SASRecConfig(**{"num_items": NUM_ITEMS, "teacher_embedding_size": 4, **settings})


def test_serving_without_teacher_embeddings_runs_no_more_operations_than_after_folding():
    """The plain path must cost what it did: the same operations, whatever the model once was taught by."""
    plain = SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, tie_word_embeddings=False)).eval()
    folded = taught(max_length=50).fold_teacher_embeddings()
    counts = []
    for model in (plain, folded):
        with torch.profiler.profile() as profile:
            model.recommend(HISTORIES[1:2], top_k=3)
        counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")))
    assert counts[0] == counts[1]


# --- pca_embeddings ---


def test_components_are_uncorrelated_ordered_and_of_unit_variance():
    table = teacher_table() * torch.linspace(1, 4, TEACHER_SIZE)
    table[0] = 100  # the row of padding plays no part
    components = pca_embeddings(table, 5)
    assert components.shape == (NUM_ITEMS + 1, 5) and components.dtype == torch.float32
    assert components[0].abs().sum() == 0
    items = components[1:]
    torch.testing.assert_close(items.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(items.t() @ items / NUM_ITEMS, torch.eye(5), atol=1e-4, rtol=0)
    plain = pca_embeddings(table, 5, whiten=False)[1:]
    assert (plain.var(0).diff() < 0).all()
    torch.testing.assert_close(plain / plain.std(0, correction=0), items, atol=1e-4, rtol=1e-4)


def test_components_equal_a_singular_value_decomposition():
    table = teacher_table()
    centred = table[1:] - table[1:].mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    components = pca_embeddings(table, 4, whiten=False)[1:]
    torch.testing.assert_close(components.abs(), (u * s)[:, :4].abs(), atol=1e-4, rtol=1e-4)
    # all components together keep every distance between items
    every = pca_embeddings(table, NUM_ITEMS, whiten=False)[1:]
    torch.testing.assert_close(torch.cdist(every, every), torch.cdist(centred, centred), atol=1e-3, rtol=1e-3)


def test_components_do_not_depend_on_the_order_of_items_or_on_chance():
    table = teacher_table()
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(3))
    shuffled = torch.cat([table[:1], table[1:][order]])
    torch.testing.assert_close(
        pca_embeddings(shuffled, 3)[1:], pca_embeddings(table, 3)[1:][order], atol=1e-4, rtol=1e-4
    )
    assert torch.equal(pca_embeddings(table, 3), pca_embeddings(copy.deepcopy(table), 3))


def test_components_that_do_not_vary_stay_zero():
    table = torch.zeros(NUM_ITEMS + 1, 4)
    table[:, 2] = torch.arange(NUM_ITEMS + 1)
    components = pca_embeddings(table, 3)
    torch.testing.assert_close(components[1:, 0].var(correction=0), torch.tensor(1.0))
    assert components[:, 1:].abs().sum() == 0


def test_components_start_a_recommender():
    model = SASRecForNextItem(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8))
    table = pca_embeddings(teacher_table(), 8)
    model.start_from_item_embeddings(table)
    assert torch.equal(model.model.item_embedding.weight, table)


@pytest.mark.parametrize(
    ("table", "size", "message"),
    [
        (torch.ones(5), 2, r"shape \(5,\): expected \(num_items \+ 1"),
        (torch.randn(5, 3), 4, "size is 4: expected 1 to 3"),
        (torch.randn(5, 30), 5, "size is 5: expected 1 to 4"),
        (torch.randn(5, 30), 0, "size is 0"),
        (torch.full((5, 3), float("nan")), 2, "item 1 contains NaN"),
    ],
)
def test_bad_tables_have_no_components(table, size, message):
    with pytest.raises(ValueError, match=message):
        pca_embeddings(table, size)
