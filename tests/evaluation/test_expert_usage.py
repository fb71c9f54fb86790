"""Expert usage equals numbers worked out by hand, and collapsed routers are recognised."""

import math

import numpy as np
import pytest
import torch

from hf_ilora.evaluation.expert_usage import (
    expert_usage,
    gates_of_histories,
    plot_expert_usage,
    usage_by_length,
    usage_table,
)
from tests.evaluation.drawn_texts import texts_of
from tests.evaluation.ranking_model import ChoosingModel


def test_usage_equals_numbers_worked_out_by_hand():
    usage = expert_usage(torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]]))
    assert usage.num_users == 4
    assert usage.mean_gate == (0.5, 0.5)
    assert usage.deviation == pytest.approx((math.sqrt(0.125), math.sqrt(0.125)))
    assert usage.top_fraction == (0.75, 0.25)  # of equal gates the first counts
    assert usage.entropy_of_mean == pytest.approx(1)
    assert usage.mean_entropy == pytest.approx(0.5)
    skewed = expert_usage(torch.tensor([[0.75, 0.25, 0.0]]))
    entropy = (-0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / math.log(3)
    assert skewed.entropy_of_mean == pytest.approx(entropy) == pytest.approx(skewed.mean_entropy)


def test_a_router_has_collapsed_if_all_users_get_one_expert_or_one_mixture():
    different = torch.eye(4).repeat(5, 1)
    assert not expert_usage(different).is_collapsed
    assert expert_usage(torch.tensor([[0.95, 0.05], [0.9, 0.1]])).is_collapsed  # one expert has more than 0.9
    assert not expert_usage(torch.tensor([[0.95, 0.05], [0.8, 0.2]])).is_collapsed
    assert expert_usage(torch.full((9, 4), 0.25)).is_collapsed  # all users alike
    assert expert_usage(torch.tensor([[0.5, 0.5], [0.51, 0.49]])).is_collapsed
    assert not expert_usage(torch.tensor([[0.5, 0.5], [0.55, 0.45]])).is_collapsed
    alone = expert_usage(torch.ones(3, 1))  # plain LoRA
    assert not alone.is_collapsed and alone.entropy_of_mean == alone.mean_entropy == 1


def test_gates_that_are_no_distributions_are_refused():
    for wrong in ([[0.5, 0.6]], [[1.5, -0.5]], [[torch.nan, 1.0]]):
        with pytest.raises(ValueError, match=r"gates of user 1 are .*: expected probabilities that sum to 1"):
            expert_usage(torch.tensor([[0.5, 0.5], *wrong]))
    for shape in ((3,), (0, 2)):
        with pytest.raises(ValueError, match=r"expected \(users, experts\)"):
            expert_usage(torch.ones(shape))


def test_gates_are_those_of_evaluation_in_the_order_of_users():
    model = ChoosingModel().train()
    histories = torch.randint(1, 41, (23, 3))
    gates = gates_of_histories(model, histories, batch_size=5)
    assert gates.argmax(1).tolist() == (histories[:, 0] % 4).tolist()
    assert model.training
    with pytest.raises(ValueError, match="batch_size is 0: expected at least 1"):
        gates_of_histories(model, histories, batch_size=0)


def test_usage_is_summarised_for_all_users_and_by_the_length_of_their_history():
    gates = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    usage = usage_by_length(gates, np.array([3, 5, 30]))
    assert {group: each.num_users for group, each in usage.items()} == {
        "all users": 3,
        "1-5 items": 2,
        "21-50 items": 1,
    }
    assert usage["all users"] == expert_usage(gates)
    assert usage["1-5 items"].mean_gate == (0.75, 0.25) and usage["21-50 items"].mean_gate == (0, 1)


def usages():
    lengths = np.array([2, 8, 8, 200])
    return {
        "linear (outputs/a)": usage_by_length(torch.eye(4), lengths),
        "a|b": usage_by_length(torch.full((4, 2), 0.5), lengths),
    }


def test_the_table_shows_every_model_and_group():
    rows = usage_table(usages()).splitlines()
    assert len(rows) == 10 and rows[2].endswith("| no |") and rows[6].endswith("| yes |")
    assert rows[6].startswith(r"| a\|b | all users | 4 | 0.500 ± 0.000, 0.500 ± 0.000 | 100%, 0% | 1.000 | 1.000")
    assert rows[4].startswith(r"| linear (outputs/a) | 6-10 items | 2 |")


def test_the_plot_names_models_experts_and_groups_and_no_folders(tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs the extra 'plot'")
    texts = texts_of(lambda: plot_expert_usage(usages(), tmp_path / "experts.png"))
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "linear",
        "a|b (collapsed)",
        "expert 1",
        "expert 4",
        "even",
        "6-10\n2 users",
        "all users\n4 users",
        "items in the history",
    } <= texts
    assert not any("outputs" in text for text in texts)


def test_no_models_are_refused(tmp_path):
    for draw in (lambda: usage_table({}), lambda: plot_expert_usage({}, tmp_path / "none.png")):
        with pytest.raises(ValueError, match="expected at least one model"):
            draw()
