"""The exported graph answers as `recommend` does, whatever the model, the padding and the lengths."""

import pyarrow as pa
import pytest
import torch

from hf_ilora import Catalogue, PopularityConfig, PopularityForNextItem
from hf_ilora.serving.recommendation_graph import RecommendationGraph
from tests.serving.next_item_models import MAX_LENGTH, MODELS, NUM_ITEMS, next_item_model

# Padding after, before and on both sides of the items, none at all, and more items than the models read.
HISTORIES = torch.tensor(
    [
        [3, 9, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 7, 2, 7, 30, 2],
        [0, 0, 0, 0, 5, 40, 1, 0, 0, 0, 0, 0, 0],
        [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 13],
    ]
)


def catalogue(counts):
    ids = list(range(1, NUM_ITEMS + 1))
    return Catalogue(pa.table({"item_id": ids, "raw_id": ids, "title": [f"Title {i}" for i in ids], "count": counts}))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_the_best_items_are_those_of_recommend(kind, exclude_seen):
    model = next_item_model(kind)
    _, item_ids, scores = RecommendationGraph(model, 7, exclude_seen)(HISTORIES)
    expected_ids, expected_scores = model.recommend(HISTORIES, 7, exclude_seen)
    assert torch.equal(item_ids, expected_ids)
    torch.testing.assert_close(scores, expected_scores)


@pytest.mark.parametrize("kind", MODELS)
def test_without_top_k_all_items_have_their_log_probability(kind):
    model = next_item_model(kind)
    item_scores, scores = RecommendationGraph(model)(HISTORIES)
    with torch.no_grad():
        expected = model.next_item_scores(HISTORIES[:3, :MAX_LENGTH])
    torch.testing.assert_close(item_scores[2], expected[2])
    expected = item_scores.log_softmax(1)
    for row, history in enumerate(HISTORIES.tolist()):
        expected[row, [0, *history]] = float("-inf")
    torch.testing.assert_close(scores, expected)


def test_users_without_items_get_popular_items():
    model = next_item_model("sasrec")
    model.catalogue = catalogue([1] * 20 + [100] + [1] * 19)
    histories = torch.tensor([[0, 0], [4, 0]])
    _, item_ids, scores = RecommendationGraph(model, 3)(histories)
    expected_ids, expected_scores = model.recommend(histories, 3)
    assert item_ids[0, 0] == expected_ids[0, 0] == 21
    assert torch.equal(item_ids[1], expected_ids[1])
    torch.testing.assert_close(scores, expected_scores)


def test_places_without_an_item_left_to_recommend_are_padding():
    model = next_item_model("sasrec", num_items=4)
    histories = torch.tensor([[1, 2, 4], [0, 0, 0]])  # the catalogue has no counts, so nothing is popular
    _, item_ids, scores = RecommendationGraph(model, 2)(histories)
    assert item_ids.tolist() == [[3, 0], [0, 0]]
    assert scores.isneginf().tolist() == [[False, True], [True, True]]
    assert RecommendationGraph(model)(histories)[1][1].isneginf().all()


def test_a_model_in_another_dtype_or_in_training_is_copied_and_stays_as_it_is():
    model = next_item_model("sasrec").bfloat16().train()
    graph = RecommendationGraph(model, 3)
    assert {tensor.dtype for tensor in graph.state_dict().values()} == {torch.float32}
    assert not any(module.training for module in graph.modules())
    assert model.training and model.dtype == torch.bfloat16
    assert graph.encoder.item_embedding.weight is graph.head.weight


def test_models_that_cannot_be_exported_are_refused():
    counts = PopularityForNextItem(PopularityConfig(num_items=4))
    with pytest.raises(ValueError, match=r"PopularityForNextItem cannot be exported: expected .* distil"):
        RecommendationGraph(counts)


def test_teacher_embeddings_are_folded_first():
    model = next_item_model("sasrec", teacher_embedding_size=4)
    model.set_teacher_embeddings(torch.randn(NUM_ITEMS + 1, 4))
    expected = model.recommend(HISTORIES, 3)
    with pytest.raises(ValueError, match=r"not folded in: .* call model.fold_teacher_embeddings\(\) first"):
        RecommendationGraph(model, 3)
    _, item_ids, scores = RecommendationGraph(model.fold_teacher_embeddings(), 3)(HISTORIES)
    assert torch.equal(item_ids, expected[0])
    torch.testing.assert_close(scores, expected[1])


@pytest.mark.parametrize("top_k", [0, NUM_ITEMS + 1, 2.0])
def test_a_wrong_number_of_items_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}: expected 1 to 40"):
        RecommendationGraph(next_item_model("sasrec"), top_k)


SMALLER = (HISTORIES, HISTORIES[:3, :6], HISTORIES[1:3, 4:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sasrec_with_everything", "gru4rec"])
@torch.no_grad()
def test_two_compiled_graphs_serve_batches_of_any_shape(kind):
    graph, graphs = RecommendationGraph(next_item_model(kind), 5), []

    def counting(captured, inputs):
        graphs.append(captured)
        return captured.forward

    torch._dynamo.reset()
    compiled = torch.compile(graph, fullgraph=True, dynamic=True, backend=counting)
    for histories in SMALLER:
        for found, expected in zip(compiled(histories), graph(histories), strict=True):
            torch.testing.assert_close(found, expected)
    assert len(graphs) == 2  # of histories longer than the model reads, and of others
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_serves_batches_of_any_shape():
    graph = RecommendationGraph(next_item_model("sasrec_with_everything"), 5)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    # torch cannot tell that min(length, max_length) is not its own square.
    settings = {"dynamic_shapes": (sizes,), "prefer_deferred_runtime_asserts_over_guards": True}
    exported = torch.export.export(graph, (HISTORIES,), **settings).module()
    for histories in SMALLER:
        for found, expected in zip(exported(histories), graph(histories), strict=True):
            torch.testing.assert_close(found, expected)
