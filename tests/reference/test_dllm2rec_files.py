"""DLLM2Rec's text files as a teacher: rows under our ids, embeddings that are not unpickled, and damaged files."""

import numpy as np
import pytest
import torch

from hf_ilora.reference.dllm2rec_files import DLLM2RecFilesTeacher

ROWS, ITEMS = 3, 5
RANKS, CONFIDENCE = [[0, 4, 2], [3, 1, 0], [2, 0, 1]], [[0.5, 0.75, 2.0], [0.25, 1.5, 1.5], [0.125, 3.0, 9.0]]


@pytest.fixture
def published(tmp_path):
    """Written as the published program's numpy does."""
    np.savetxt(tmp_path / "myrank_train.txt", RANKS)
    np.savetxt(tmp_path / "confidence_train.txt", CONFIDENCE, delimiter=", ")
    return tmp_path


def test_published_lists_answer_by_row_under_our_ids(published):
    teacher = DLLM2RecFilesTeacher(published, ROWS, ITEMS)
    items, distances = teacher.rank(np.array([2, 0]), torch.tensor([[1], [1]]), 2, False)
    assert items.tolist() == [[3, 1], [1, 5]] and distances.tolist() == [[0.125, 3.0], [0.5, 0.75]]
    assert teacher.item_embeddings() is None


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_embeddings_get_a_row_of_zeros_for_padding(published, zip_format, dtype):
    without = DLLM2RecFilesTeacher(published, ROWS, ITEMS).fingerprint
    embeddings = torch.randn(ITEMS, 4).to(dtype)
    torch.save(embeddings, published / "all_embeddings.pt", _use_new_zipfile_serialization=zip_format)
    teacher = DLLM2RecFilesTeacher(published, ROWS, ITEMS)
    table = teacher.item_embeddings()
    assert table.dtype == torch.float32 and not table[0].any()
    assert torch.equal(table[1:], embeddings.float())
    assert teacher.fingerprint != without


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_published_embeddings_are_not_unpickled(published):
    torch.save(Touch(published / "touched"), published / "all_embeddings.pt")
    with pytest.raises(ValueError, match=r"names (_?io|builtins)\.open"):
        DLLM2RecFilesTeacher(published, ROWS, ITEMS).item_embeddings()
    assert not (published / "touched").exists()


@pytest.mark.parametrize("value", [torch.zeros(ITEMS + 1, 4), torch.zeros(ITEMS), {"weight": torch.zeros(ITEMS, 4)}])
def test_published_embeddings_of_another_shape_are_refused(published, value):
    torch.save(value, published / "all_embeddings.pt")
    with pytest.raises(ValueError, match=r"expected \(5, size\)|expected a tensor"):
        DLLM2RecFilesTeacher(published, ROWS, ITEMS).item_embeddings()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("myrank_train.txt", "0 1 2\n3 4 5\n0 1 2\n", "line 2 of .* contains 5: expected item ids 0 to 4"),
        ("myrank_train.txt", "0 1 2\n3 4 -1\n0 1 2\n", "line 2 of .* contains -1: expected item ids 0 to 4"),
        ("myrank_train.txt", "0 1 2\n3 4 1.5\n0 1 2\n", "line 2 of .* contains 1.5: expected item ids"),
        ("myrank_train.txt", "0 1 2\n3 4 1\n", "has 2 lines: expected 3, one per row of the train split"),
        ("myrank_train.txt", "", "has 0 lines: expected 3"),
        ("myrank_train.txt", "0 1 2\n3 4\n0 1 2\n", "not a table of numbers"),
        ("myrank_train.txt", "0 1\n3 4\n0 1\n", r"shape \(3, 2\) and .*\(3, 3\): expected the same"),
        ("confidence_train.txt", "0 1 2\n3 nan 4\n0 1 2\n", "line 2 of .* contains NaN"),
        ("confidence_train.txt", "0 1 2\n3 high 4\n0 1 2\n", "not a table of numbers"),
        ("confidence_train.txt", "0 1 2\n3 é 4\n0 1 2\n", "not a table of numbers"),
    ],
)
def test_damaged_published_files_are_refused(published, name, text, message):
    (published / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        DLLM2RecFilesTeacher(published, ROWS, ITEMS)


def test_excluding_seen_items_and_longer_lists_are_refused(published):
    teacher = DLLM2RecFilesTeacher(published, ROWS, ITEMS)
    with pytest.raises(
        ValueError, match="finished lists, from which seen items cannot be excluded: pass exclude_seen false"
    ):
        teacher.rank(np.array([0]), torch.tensor([[1]]), 2, True)
    with pytest.raises(ValueError, match="top_k is 4: expected at most 3, the length of the lists"):
        teacher.rank(np.array([0]), torch.tensor([[1]]), 4, False)
