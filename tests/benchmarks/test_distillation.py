"""The benchmark of distillation compares the losses that its programs are named after."""

import json

import pytest
import torch

from benchmarks import distillation, measuring
from hf_ilora.distillation.losses import DLLM2RecLoss


@pytest.fixture
def arguments(tmp_path):
    return distillation.DistillationBenchmarkArguments(
        str(tmp_path), rounds=2, num_items=40, batch_size=6, lengths=[3], top_k=4
    )


@pytest.mark.parametrize("base_loss", ["bce", "cross_entropy"])
def test_published_form_is_the_reference_form(arguments, base_loss):
    batch = distillation.random_batch(arguments, length=3)
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = (distillation.ALPHA, distillation.BETA, distillation.LAM, *distillation.GAMMAS)
    settings = {"form": "reference", "base_loss": base_loss}
    program = DLLM2RecLoss(*weights, arguments.top_k, batch.propensity, **settings)
    expected = program(scores, batch.target, batch.negative, batch.teacher_items, batch.teacher_distances).loss
    loss = distillation.published_loss(scores, batch, base_loss)
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value, scores)[0] for value in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_programs_share_their_model_and_each_trains(arguments):
    steps = {name: distillation.TrainingStep(name, "cross_entropy", 3, arguments) for name in distillation.PROGRAMS}
    first, *others = (step.model.state_dict() for step in steps.values())
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    for step in steps.values():
        before = step.loss().item()
        for _ in range(20):
            step()
        assert step.loss().item() < before
    baseline = steps["baseline"]
    labelled = baseline.batch.labels != -100
    assert torch.equal(baseline.batch.labels[labelled] - 1, baseline.batch.target) and labelled.sum() == 6


def test_benchmark_writes_a_row_for_each_length_and_base_loss(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["distillation.py", *as_options(arguments)])
    monkeypatch.setattr(measuring, "set_up_logging", lambda output_dir: None)  # for a process of its own
    threads = torch.get_num_threads()
    try:
        distillation.main()
    finally:
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))
    assert [(row["length"], row["base_loss"]) for row in results["measurements"]] == [(3, "bce"), (3, "cross_entropy")]
    for row in results["measurements"]:
        assert set(row["milliseconds"]) == {"baseline", "distilled", "published"}
        row["milliseconds"] = {"baseline": 10.0, "distilled": 12.0, "published": 30.0}
        row |= {"distilled_over_baseline": 1.2, "distilled_over_baseline_cpu": 1.25}
        row |= {"published_over_distilled": 2.5, "published_over_distilled_cpu": 2.4}
    lines = distillation.report(results).splitlines()
    assert "| 3 | bce | 10 | 12 | 30 | 1.20 (1.25) | 2.50 (2.40) |" in lines
    assert "| 3 | cross_entropy | 10 | 12 | 30 | 1.20 (1.25) | 2.50 (2.40) |" in lines
    assert (tmp_path / "benchmark.md").is_file()


def as_options(arguments) -> list[str]:
    options = []
    for name, value in vars(arguments).items():
        options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return options


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="rounds is 0: expected at least 1"):
        distillation.DistillationBenchmarkArguments("out", rounds=0)
    with pytest.raises(ValueError, match="num_items is 10: expected more than top_k, 10"):
        distillation.DistillationBenchmarkArguments("out", num_items=10)
    with pytest.raises(ValueError, match=r"lengths are \[\]: expected at least one"):
        distillation.DistillationBenchmarkArguments("out", lengths=[])
