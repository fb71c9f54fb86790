"""The programs that the benchmark of users' LoRAs compares give the same logits, and its report has their times."""

import pytest

from benchmarks import user_lora

SMALL = {
    "users": 3,
    "tokens": [5],
    "cached_tokens": [4],
    "num_layers": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "rounds": 1,
}


def test_every_user_gets_the_same_logits_from_gates_and_from_an_adapter_in_peft():
    results = user_lora.measure(user_lora.UserLoraBenchmarkArguments("out", **SMALL))
    lengths = [(length["tokens"], length["cached_tokens"]) for length in results["lengths"]]
    assert lengths == [(1, 4), (5, 0)]  # which read the same tokens
    with_cache, whole = (length["largest_effect"] for length in results["lengths"])
    assert with_cache == pytest.approx(whole, rel=1e-3)
    for length in results["lengths"]:
        assert set(length["cpu_milliseconds"]) == set(user_lora.PROGRAM_TITLES)
        assert length["largest_difference"] < 1e-5 < 1e-3 < length["largest_effect"]
    assert results["adapter_bytes"] == pytest.approx(3 * results["stack_bytes"], rel=0.01)


def test_report_has_a_row_for_each_length():
    length = {
        "tokens": 8,
        "cached_tokens": 0,
        "cpu_milliseconds": {"gates": 10.0, "peft": 250.0, "base": 8.0},
        "peft_over_gates_cpu": 25.02,
        "peft_over_base_cpu": 31.25,
        "gates_over_base_cpu": 1.25,
        "largest_difference": 3e-7,
        "largest_effect": 0.8,
    }
    results = {
        "setting": vars(user_lora.UserLoraBenchmarkArguments("out")) | {"torch": "2"},
        "stack_bytes": 100_000,
        "adapter_bytes": 6_400_000,
        "load_cpu_seconds": 9.3,
        "lengths": [length, length | {"tokens": 1, "cached_tokens": 32, "peft_over_gates_cpu": 7.96}],
    }
    text = user_lora.report(results)
    header = (
        "| tokens per user | in the cache | gates, ms | PEFT, `adapter_names`, ms | no adapters, ms | PEFT over gates |"
    )
    assert text.splitlines()[4].startswith(header)
    assert "| 8 | 0 | 10.0 | 250.0 | 8.0 | 25.0 | 31.2 | 1.25 |" in text
    assert "| 1 | 32 | 10.0 | 250.0 | 8.0 | 8.0 | 31.2 | 1.25 |" in text
    assert "differ by at most 3e-07; the adapters change them by up to 0.8." in text
    assert "takes 0.10 MB for any number of users, the 64 adapters 6.40 MB and 9.3 s" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 0}, "users is 0: expected at least 1"),
        ({"tokens": []}, r"tokens are \[\]: expected lengths of at least 1"),
        ({"tokens": [4, 0]}, r"tokens are \[4, 0\]: expected lengths of at least 1"),
        ({"cached_tokens": [0]}, r"cached_tokens are \[0\]: expected lengths of at least 1"),
        ({"hidden_size": 20}, "hidden_size is 20: expected a multiple of twice num_heads, 8"),
        ({"num_experts": 3}, "rank 8 is not divisible by num_experts 3"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        user_lora.UserLoraBenchmarkArguments("out", **changes)
