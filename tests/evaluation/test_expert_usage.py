"""Numbers of expert usage by hand, and what counts as collapsed."""

import math

import pytest
import torch

from hf_ilora.evaluation.expert_usage import (
    expert_usage,
    gates_of_histories,
    plot_expert_usage,
    usage_table,
)
from tests.evaluation.ranking_model import ChoosingModel


def test_values_by_hand():
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


def test_collapsed_is_one_expert_for_all_or_one_mixture_for_all():
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


def test_table_and_plot_show_every_model(tmp_path):
    usages = {"linear": expert_usage(torch.eye(4)), "a|b": expert_usage(torch.full((2, 2), 0.5))}
    rows = usage_table(usages).splitlines()
    assert len(rows) == 4 and rows[2].endswith("| no |") and rows[3].endswith("| yes |")
    assert rows[3].startswith(r"| a\|b | 2 | 0.500 ± 0.000, 0.500 ± 0.000 | 100%, 0% | 1.000 | 1.000")
    plot_expert_usage(usages, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")
    for draw in (lambda: usage_table({}), lambda: plot_expert_usage({}, tmp_path / "none.png")):
        with pytest.raises(ValueError, match="expected at least one model"):
            draw()
