"""Which rows the policies select, by hand."""

import math

import pytest
import torch

from hf_ilora.distillation.losses import DLLM2RecLoss
from hf_ilora.distillation.policies import (
    AllSamplesPolicy,
    GroundTruthErrorPolicy,
    KLDivergencePolicy,
    rank_gap_weights,
    sample_policy,
)

STUDENT = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
TARGET = torch.tensor([0, 2, 1])


def test_all_samples_policy_selects_every_row():
    selected = AllSamplesPolicy().select(STUDENT, None, TARGET)
    assert selected.dtype == torch.bool and selected.tolist() == [True] * 3


def test_ground_truth_error_selects_rows_whose_true_item_scores_below_the_threshold():
    """The true items score 2, -1 and 0."""
    for threshold, expected in ((0.5, [False, True, True]), (0.0, [False, True, False]), (-5.0, [False] * 3)):
        selected = GroundTruthErrorPolicy(threshold).select(STUDENT, None, TARGET)
        assert selected.dtype == torch.bool and selected.tolist() == expected


def test_kl_divergence_selects_rows_in_which_the_student_is_far_from_the_teacher():
    """Teacher 3/4, 1/4 against student 1/2, 1/2: 3/4 log 3/2 + 1/4 log 1/2 = 0.131 nats; the other rows agree."""
    student = torch.zeros(3, 2)
    teacher = torch.tensor([[math.log(3.0), 0.0], [7.0, 7.0], [-1.0, -1.0]])
    for threshold, expected in ((0.13, [True, False, False]), (0.132, [False] * 3)):
        assert KLDivergencePolicy(threshold).select(student, teacher, TARGET).tolist() == expected
    swapped = 0.5 * math.log((1 / 2) / (3 / 4)) + 0.5 * math.log((1 / 2) / (1 / 4))  # KL(student || teacher), 0.144
    assert KLDivergencePolicy(swapped - 1e-4).select(student, teacher, TARGET).tolist() == [False] * 3


def test_kl_threshold_is_in_nats_of_the_tempered_distributions():
    """At temperature 2 the teacher of log 9 is one of log 3: the divergence of the test above, not 4 times it."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(9.0), 0.0]])
    assert KLDivergencePolicy(0.13, temperature=2).select(student, teacher, TARGET[:1]).item()
    assert not KLDivergencePolicy(0.132, temperature=2).select(student, teacher, TARGET[:1]).item()


def test_policies_are_built_from_their_names():
    assert sample_policy("all", 0.3) == AllSamplesPolicy()
    assert sample_policy("ground_truth_error", 0.3) == GroundTruthErrorPolicy(0.3)
    assert sample_policy("kl_divergence", 0.3) == KLDivergencePolicy(0.3)
    with pytest.raises(ValueError, match="policy is 'some': expected one of all, ground_truth_error, kl_divergence"):
        sample_policy("some")


def test_a_mask_is_a_sample_weight_of_the_loss():
    selected = GroundTruthErrorPolicy(0.5).select(STUDENT, None, TARGET)
    labels = torch.tensor([[1, 0]] * 3), torch.rand(3, 2)
    program = DLLM2RecLoss(alpha=0, top_k=2)
    output = program(STUDENT, TARGET, (TARGET + 1) % 3, *labels, sample_weights=selected)
    of_two = program(STUDENT[1:], TARGET[1:], (TARGET[1:] + 1) % 3, *(part[1:] for part in labels))
    torch.testing.assert_close(output.ranking_loss, of_two.ranking_loss * 2 / 3)


def test_rank_gap_weights_grow_with_the_teachers_lead():
    student, teacher = torch.tensor([11, 31, 2, 1, 5]), torch.tensor([1, 1, 2, 9, 4])
    weights = rank_gap_weights(student, teacher)
    torch.testing.assert_close(weights, torch.tensor([math.tanh(1), math.tanh(3), 0.0, 0.0, math.tanh(0.1)]))
    raised = rank_gap_weights(student, teacher, sharpness=0.2, floor=0.5)
    assert raised[0].item() == pytest.approx(0.5 + 0.5 * math.tanh(2)) and raised[2:4].tolist() == [0.5, 0.5]


def test_policies_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match="teacher_scores is None: expected"):
        KLDivergencePolicy(0.1).select(STUDENT, None, TARGET)
    with pytest.raises(ValueError, match="threshold is -1: expected 0 or more nats"):
        KLDivergencePolicy(-1)
    with pytest.raises(ValueError, match="temperature is 0: expected a positive number"):
        KLDivergencePolicy(0.1, temperature=0)
    with pytest.raises(ValueError, match=r"student_ranks have shape \(2,\) and teacher_ranks \(1,\)"):
        rank_gap_weights(torch.tensor([1, 2]), torch.tensor([1]))
    with pytest.raises(ValueError, match="teacher_ranks contain 0: expected ranks of at least 1"):
        rank_gap_weights(torch.tensor([1, 2]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="sharpness is 0: expected a positive number"):
        rank_gap_weights(torch.tensor([1]), torch.tensor([1]), sharpness=0)
    with pytest.raises(ValueError, match=r"floor is 2: expected a number in \[0, 1\]"):
        rank_gap_weights(torch.tensor([1]), torch.tensor([1]), floor=2)
