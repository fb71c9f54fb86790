"""The benchmark of training steps measures every program that it reports."""

import pytest
import torch

from benchmarks import training_steps


@pytest.fixture
def arguments(tmp_path):
    sizes = {"num_items": [20, 40], "lengths": [5, 10], "distilled_items": [30], "whole_items": 50}
    return training_steps.StepBenchmarkArguments(str(tmp_path), rounds=1, positions=20, **sizes)


def test_every_step_is_measured_and_reported(arguments):
    results = {
        "setting": vars(arguments) | {"torch": "2"},
        "catalogues": training_steps.measure_catalogues(arguments),
        "lengths": training_steps.measure_lengths(arguments),
        "distillation": training_steps.measure_distillation(arguments),
        "logits_megabytes": 150.4,
    }
    for kind, smallest in (("catalogues", "20"), ("lengths", "5"), ("distillation", "30")):
        for name, rows in results[kind].items():
            first = rows["base" if kind == "distillation" else smallest]
            assert first["ratio"] == 1 and first["microseconds"] > 0, name
    results["catalogues"]["lazy Adam"]["40"] = {"microseconds": 30.0, "ratio": 1.25}
    report = training_steps.report(results)
    assert "| sampled softmax, 512 negatives, lazy Adam | 40 items | 30.0 | 1.25 |" in report
    assert "needs 150 MB beside the item table" in report
    for axes, kind in zip(training_steps.draw(results).axes, ("catalogues", "lengths"), strict=True):
        drawn = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
        assert drawn == {name: [row["microseconds"] for row in rows.values()] for name, rows in results[kind].items()}


def test_a_distilled_step_learns_more_than_the_cross_entropy(tmp_path):
    config = training_steps.SASRecConfig(num_items=30, max_length=5, hidden_dropout=0.0, attention_dropout=0.0)
    losses = {}
    for name in ("base", "distilled"):
        step = training_steps.DistilledStep(config, 20, str(tmp_path), name == "distilled")
        torch.manual_seed(1)
        losses[name] = step.loss().item()
        before = step.model.head.weight.detach().clone()
        step()
        assert not torch.equal(before, step.model.head.weight)
    assert losses["distilled"] > losses["base"]


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="lengths are \\[0\\]: expected at least one, each at least 1"):
        training_steps.StepBenchmarkArguments("folder", lengths=[0])
