"""Latency is timed for one user at a time, and size counts every tensor once."""

import pytest
import torch

from hf_ilora import SASRecConfig, SASRecForNextItem
from hf_ilora.evaluation.latency import measure_latency, model_size


class Recommender:
    """Records the calls, each with the number of threads."""

    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def recommend(self, histories, top_k):
        self.calls.append((histories.tolist(), top_k, torch.get_num_threads()))
        return torch.ones(1, top_k), None


def test_latency_times_one_user_at_a_time_after_the_warm_up():
    model, threads = Recommender(), torch.get_num_threads()
    latency = measure_latency(model, [[1, 2], [3]], top_k=4, num_warm_up=3, threads=2)
    warm_up = [[[1, 2]], [[3]], [[1, 2]]]
    assert [call[0] for call in model.calls] == [*warm_up, [[1, 2]], [[3]]]
    assert {call[1:] for call in model.calls} == {(4, 2)}
    assert torch.get_num_threads() == threads
    assert 0 < latency.p50_ms <= latency.p95_ms
    assert (latency.num_calls, latency.threads, latency.device) == (2, 2, "cpu")


def test_latency_refuses_nothing_to_time_and_no_threads():
    with pytest.raises(ValueError, match="no histories"):
        measure_latency(Recommender(), [])
    with pytest.raises(ValueError, match="threads is 0"):
        measure_latency(Recommender(), [[1]], threads=0)


def test_size_counts_tied_tables_once_and_counts_of_counting_models(tmp_path, counts):
    model = SASRecForNextItem(SASRecConfig(num_items=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1))
    model.save_pretrained(tmp_path)
    size = model_size(model, tmp_path)
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.num_bytes == (tmp_path / "model.safetensors").stat().st_size
    pairs, items = counts.config.num_transitions, counts.config.num_items
    assert model_size(counts, tmp_path).num_parameters == 2 * pairs + (items + 1) + (items + 2)
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        model_size(model, tmp_path / "elsewhere")
