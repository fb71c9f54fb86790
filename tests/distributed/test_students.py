"""Two processes train every kind of student, teacher embeddings included, to the weights of one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import hf_ilora  # noqa: F401  (AutoModel knows the students)

PROGRAM = Path(__file__).with_name("launched_students.py")
HISTORIES = torch.tensor([[0, 3, 9, 4, 1], [0, 0, 0, 7, 2]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        ("sasrec", ["multi_cpu.yaml", "zero2_cpu.yaml", "zero3_cpu.yaml"]),
        ("gru4rec", ["zero3_cpu.yaml"]),
        ("caser", ["zero3_cpu.yaml"]),
    ],
)
@torch.no_grad()
def test_two_processes_give_the_student_of_one(launch, tmp_path, kind, configs):
    launch("cpu.yaml", PROGRAM, kind, tmp_path / "one", "8")
    expected = AutoModel.from_pretrained(tmp_path / "one").eval()
    # equal weights mean nothing if nothing was trained: this one starts at zero
    assert expected.model.item_embedding.teacher.projection.bias.abs().max() > 1e-3
    for config in configs:
        launch(config, PROGRAM, kind, tmp_path / config, "4")
        student = AutoModel.from_pretrained(tmp_path / config).eval()
        torch.testing.assert_close(student.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-5)
        before = student(HISTORIES).logits
        torch.testing.assert_close(student.fold_teacher_embeddings()(HISTORIES).logits, before, rtol=0, atol=1e-5)
