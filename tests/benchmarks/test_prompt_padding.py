"""The orders that the benchmark of padding compares have the same prompts, and sorted steps the least padding."""

import pytest

from benchmarks import prompt_padding
from tests.tiny_ilora_parts import save_parts


@pytest.fixture
def arguments(tmp_path):
    parts = save_parts(tmp_path, num_users=64)
    folders = {"data_dir": str(parts.data_dir), "llm": str(parts.llm), "prompt_file": str(parts.prompt_file)}
    return prompt_padding.PaddingBenchmarkArguments(output_dir=str(tmp_path), **folders, num_candidates=5)


def test_orders_have_the_same_prompts_and_sorted_steps_the_least_padding(arguments):
    shapes = prompt_padding.prompt_shapes(arguments)
    assert list(shapes) == ["one batch", "random order", "sorted steps"]
    computed = {
        name: sum(rows * tokens for step in steps for rows, tokens in step) for name, (steps, _) in shapes.items()
    }
    assert len({real for _, real in shapes.values()}) == 1
    assert computed["one batch"] > computed["random order"] > computed["sorted steps"] > shapes["sorted steps"][1]
    assert {tuple(rows for rows, _ in step) for step in shapes["sorted steps"][0]} == {(4, 4, 4, 4)}


def test_the_report_has_a_row_for_each_order(arguments):
    programs = {"sorted steps": {"padding": 0.123, "seconds_per_step": 1.5, "speed": 1.625}}
    report = prompt_padding.report({"setting": vars(arguments) | {"torch": "2"}, "programs": programs})
    assert "| sorted steps | 12% | 1.50 | 1.62 |" in report


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="rows_per_step is 0: expected at least 1"):
        prompt_padding.PaddingBenchmarkArguments("data", "folder", rows_per_step=0)
