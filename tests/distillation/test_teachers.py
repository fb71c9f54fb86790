"""Teachers: models, a table of scores, and the text files of DLLM2Rec, asked in the same way."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hf_ilora import PopularityConfig, PopularityForNextItem
from hf_ilora.distillation.labelling import LabelRequests
from hf_ilora.distillation.teachers import (
    ModelTeacher,
    RankItemsTeacher,
    ScoreTableTeacher,
    load_teacher,
    model_fingerprint,
)
from hf_ilora.reference.dllm2rec_files import DLLM2RecFilesTeacher
from tests.models.ilora.ilora_fixtures import NUM_ITEMS, catalogue, recommender, tiny_model
from tests.synthetic import cyclic_sequences

HISTORIES = torch.tensor([[3, 7, 30, 5], [12, 21, 0, 0]])
ROWS, ITEMS = 3, 5


# --- models ---


def test_sasrec_answers_with_its_recommendations_and_their_improbability():
    model = recommender()
    teacher = ModelTeacher(model, "here")
    items, distances = teacher.rank(np.array([8, 9]), HISTORIES, 4, True)
    assert torch.equal(items, model.recommend(HISTORIES, 4)[0])
    for row, length in enumerate((4, 2)):
        log_p = model(HISTORIES[row : row + 1, :length]).logits[0].log_softmax(0)
        torch.testing.assert_close(distances[row], -log_p[items[row]], rtol=1e-4, atol=1e-5)
    assert teacher.item_embeddings() is None
    assert (teacher.num_items, teacher.max_history, teacher.answers_prefixes) == (NUM_ITEMS, 6, True)


def test_seen_items_are_left_out_on_request():
    teacher = ModelTeacher(recommender(), "here")
    seen = set(HISTORIES[0].tolist())
    everything, rest = (set(teacher.rank(np.zeros(2), HISTORIES, 26, x)[0][0].tolist()) for x in (False, True))
    assert not seen & rest and seen & everything


def test_counting_model_is_a_teacher():
    model = PopularityForNextItem(PopularityConfig(num_items=4))
    model.item_counts.copy_(torch.tensor([0.0, 1, 4, 3, 2]))
    items, distances = ModelTeacher(model, "here").rank(np.zeros(1), torch.tensor([[3]]), 2, True)
    assert items.tolist() == [[2, 4]]
    torch.testing.assert_close(distances, -torch.tensor([[0.4, 0.2]]).log())


@pytest.mark.parametrize("item_placeholders", [True, False])
def test_ilora_costs_the_tokens_of_its_prompts(item_placeholders):
    model = tiny_model(item_head="residual", item_placeholders=item_placeholders)
    teacher = ModelTeacher(model, "here")
    split = cyclic_sequences(num_users=6)["train"]  # 30 items, as many as the model knows
    requests = LabelRequests.of_split(split, "all")
    expected = [
        int(model.build_prompts(requests.select([row]).histories()).attention_mask.sum())
        for row in range(len(requests))
    ]
    assert requests.costs(teacher).tolist() == expected


def test_ilora_answers_with_its_item_head_and_embeds_titles():
    model = tiny_model(item_head="residual")
    teacher = ModelTeacher(model, "here")
    items, distances = teacher.rank(np.array([0, 1]), HISTORIES, 3, False)
    expected_distances, expected_items = (-model.item_scores(HISTORIES).log_softmax(1)).topk(3, largest=False)
    assert torch.equal(items, expected_items)
    torch.testing.assert_close(distances, expected_distances)
    assert torch.equal(teacher.item_embeddings(), model.encode_items())


def test_ilora_without_an_item_head_cannot_rank():
    with pytest.raises(ValueError, match="here has no item head"):
        ModelTeacher(tiny_model(), "here")


def test_fingerprint_is_of_weights_configuration_and_catalogue_and_not_of_the_folder(tmp_path):
    model = recommender()
    model.catalogue = catalogue()
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
    one, two = (load_teacher(str(tmp_path / name), 1, NUM_ITEMS) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint == model_fingerprint(model)
    assert one.source == str(tmp_path / "one")

    others = [recommender(), recommender(position_alignment="oldest"), recommender()]
    for other in others:
        other.catalogue = catalogue()
    with torch.no_grad():
        others[0].model.item_embedding.weight[3, 2] += 1e-6
    others[2].catalogue = catalogue([f"Title {item}" for item in range(NUM_ITEMS)])
    assert len({model_fingerprint(other) for other in [model, *others]}) == 4
    assert model_fingerprint(model.to(torch.bfloat16)) != one.fingerprint


# --- any object that ranks items ---


class Ranker:
    """Returns a given answer, and keeps the arguments of the last call."""

    def __init__(self, item_ids, distances):
        self.answer = item_ids, distances

    def rank_items(self, histories, top_k, exclude_seen):
        self.asked = histories, top_k, exclude_seen
        return self.answer


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_object_that_ranks_items_is_asked_about_whole_histories(kind):
    ranker = Ranker(kind([[3, 1], [2, 5]]), kind([[0.5, 1.0], [0.25, 2.0]]))
    teacher = RankItemsTeacher(ranker, ITEMS, "f" * 64, "a rule", max_history=2)
    items, distances = teacher.rank(np.array([8, 9]), HISTORIES, 2, True)
    assert ranker.asked == (HISTORIES, 2, True)
    assert items.tolist() == [[3, 1], [2, 5]] and items.dtype == torch.int64
    assert distances.tolist() == [[0.5, 1.0], [0.25, 2.0]]
    assert teacher.item_embeddings() is None and teacher.answers_prefixes
    assert (teacher.num_items, teacher.fingerprint, teacher.source, teacher.max_history) == (
        ITEMS, "f" * 64, "a rule", 2,
    )  # fmt: skip
    assert teacher.tokens_per_item.tolist() == [0, 1, 1, 1, 1, 1]


def test_item_ids_that_are_no_integers_are_refused():
    teacher = RankItemsTeacher(Ranker([[1.5, 2.0]], [[0.0, 1.0]]), ITEMS, "f" * 64, "a rule")
    with pytest.raises(ValueError, match=r"a rule returned item ids of type torch\.float32: expected integers"):
        teacher.rank(np.array([0]), HISTORIES[:1], 2, True)


# --- tables of scores ---


@pytest.fixture
def score_table(tmp_path):
    scores = torch.randn(ROWS, ITEMS + 1, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = float("nan")  # not read
    save_file({"scores": scores}, tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors", scores


def test_table_of_scores_answers_by_row(score_table):
    path, scores = score_table
    teacher = ScoreTableTeacher(path, ROWS, ITEMS)
    items, distances = teacher.rank(np.array([2, 0]), torch.tensor([[1, 2], [5, 0]]), 2, True)
    for row, (history_id, seen) in enumerate([(2, {1, 2}), (0, {5})]):
        log_p = scores[history_id, 1:].log_softmax(0)
        best = sorted(set(range(1, ITEMS + 1)) - seen, key=lambda item: -log_p[item - 1])[:2]
        assert items[row].tolist() == best
        torch.testing.assert_close(distances[row], -log_p[torch.tensor(best) - 1])
    assert teacher.item_embeddings() is None and not teacher.answers_prefixes
    assert teacher.fingerprint == ScoreTableTeacher(path, ROWS, ITEMS).fingerprint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"scores": torch.zeros(ROWS + 1, ITEMS + 1)}, r"shape \(4, 6\) and type .*expected floating-point \(3, 6\)"),
        ({"scores": torch.zeros(ROWS, ITEMS)}, r"expected floating-point \(3, 6\)"),
        ({"scores": torch.zeros(ROWS, ITEMS + 1, dtype=torch.int64)}, "int64: expected floating-point"),
        ({"logits": torch.zeros(ROWS, ITEMS + 1)}, "not a safetensors file with scores"),
    ],
)
def test_table_of_another_shape_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=message):
        ScoreTableTeacher(tmp_path / "scores.safetensors", ROWS, ITEMS)


def save_positions(folder, **changes):
    """Scores about two positions of row 2 and one of row 0."""
    tensors = {
        "scores": torch.randn(3, ITEMS + 1, generator=torch.Generator().manual_seed(0)),
        "history_ids": torch.tensor([2, 0, 2]),
        "prefix_lengths": torch.tensor([2, 2, 1], dtype=torch.int32),
    }
    tensors |= changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "scores.safetensors")
    return folder / "scores.safetensors", tensors["scores"]


def requests_of(history_ids, prefix_lengths):
    """About three rows of two items before the target."""
    history_ids, prefix_lengths = np.array(history_ids), np.array(prefix_lengths)
    return LabelRequests(np.ones(9, np.int64), np.arange(0, 10, 3), history_ids, prefix_lengths)


def test_table_of_positions_answers_by_row_and_number_of_items(tmp_path):
    path, scores = save_positions(tmp_path)
    teacher = ScoreTableTeacher(path, ROWS, ITEMS)
    assert teacher.answers_prefixes
    items, distances = teacher.rank(np.array([2, 2, 0]), torch.tensor([[4, 0], [4, 3], [1, 2]]), ITEMS, False)
    log_p = scores[[2, 0, 1], 1:].log_softmax(1)
    torch.testing.assert_close(-distances, log_p.sort(dim=1, descending=True).values)
    assert torch.equal(items, log_p.argsort(dim=1, descending=True) + 1)
    teacher.check_requests(requests_of([0, 2], [2, 1]))
    with pytest.raises(ValueError, match=r"lacks 1 of 2 answers, such as the one about row 0 after 1 of its items"):
        teacher.check_requests(requests_of([2, 0], [2, 1]))
    with pytest.raises(ValueError, match="lacks 1 of 1 answers, such as the one about row 1 after 2"):
        teacher.rank(np.array([1]), torch.tensor([[4, 3]]), 2, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_lengths": None}, "prefix_lengths of .* are missing: expected integers"),
        ({"history_ids": torch.tensor([0, 1])}, r"history_ids of .* are of shape \(2,\) .*expected integers \(3,\)"),
        ({"history_ids": torch.zeros(3)}, "type torch.float32: expected integers"),
        ({"history_ids": torch.tensor([2, 3, 0])}, r"answer 1 of .* has history_ids 3 .*expected rows 0\.\.2"),
        ({"history_ids": torch.tensor([2, -1, 0])}, "answer 1 of .* has history_ids -1"),
        ({"prefix_lengths": torch.tensor([1, 0, 2])}, "and prefix_lengths 0: expected .* at least 1 item"),
        ({"prefix_lengths": torch.tensor([1, 1, 1])}, "two answers about row 2 after 1 of its items: expected one"),
        ({"scores": torch.zeros(0, ITEMS + 1)}, r"shape \(0, 6\) .*expected floating-point \(answers"),
        ({"scores": torch.zeros(3, ITEMS)}, r"expected floating-point \(answers, 6\), a row per answer"),
    ],
)
def test_positions_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ScoreTableTeacher(save_positions(tmp_path, **changes)[0], ROWS, ITEMS)


def test_an_answer_about_more_items_than_a_row_has_is_refused(tmp_path):
    path, _ = save_positions(tmp_path, prefix_lengths=torch.tensor([3, 2, 1]))
    with pytest.raises(ValueError, match="answer about row 2 after 3 of its items: expected 1 to 2, the items before"):
        ScoreTableTeacher(path, ROWS, ITEMS).check_requests(requests_of([0], [2]))


# --- loading ---


@pytest.fixture
def published(tmp_path):
    np.savetxt(tmp_path / "myrank_train.txt", [[0, 4, 2], [3, 1, 0], [2, 0, 1]])
    np.savetxt(tmp_path / "confidence_train.txt", [[0.5, 0.75, 2.0], [0.25, 1.5, 1.5], [0.125, 3.0, 9.0]])
    return tmp_path


def test_teacher_is_recognised_by_its_files(published, score_table, tmp_path):
    recommender().save_pretrained(tmp_path / "sasrec")
    assert isinstance(load_teacher(str(published), ROWS, ITEMS), DLLM2RecFilesTeacher)
    assert isinstance(load_teacher(str(score_table[0]), ROWS, ITEMS), ScoreTableTeacher)
    assert isinstance(load_teacher(str(tmp_path / "sasrec"), ROWS, NUM_ITEMS), ModelTeacher)


def test_a_loaded_model_is_a_teacher_as_its_folder_is(tmp_path):
    model = recommender()
    model.save_pretrained(tmp_path / "sasrec")
    teacher = load_teacher(model, ROWS, NUM_ITEMS)
    assert isinstance(teacher, ModelTeacher) and teacher.source == "SASRecForNextItem"
    saved = load_teacher(tmp_path / "sasrec", ROWS, NUM_ITEMS)
    assert (saved.source, saved.fingerprint) == (str(tmp_path / "sasrec"), teacher.fingerprint)
    with pytest.raises(ValueError, match="dtype is bfloat16 and the teacher is loaded already"):
        load_teacher(model, ROWS, NUM_ITEMS, dtype="bfloat16")


def test_what_is_no_teacher_is_refused(published, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a teacher"):
        load_teacher(str(tmp_path / "nowhere"), ROWS, ITEMS)
    with pytest.raises(ValueError, match=r"dtype is bfloat16 and .* contains finished answers"):
        load_teacher(str(published), ROWS, ITEMS, dtype="bfloat16")
    recommender().save_pretrained(tmp_path / "sasrec")
    with pytest.raises(ValueError, match=r"dtype is bfloat16 and .* has no language model"):
        load_teacher(str(tmp_path / "sasrec"), ROWS, NUM_ITEMS, dtype="bfloat16")
