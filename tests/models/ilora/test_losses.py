"""The losses of iLoRA, by hand."""

import math

import pytest
import torch

from hf_ilora.models.ilora import losses

LOG = [math.log(n) for n in range(1, 8)]  # LOG[n - 1] is log n


def test_title_loss_sums_the_tokens_of_each_title_and_averages_over_examples():
    # softmaxes of (1/2, 1/4, 1/4), (1/5, 3/5, 1/5) and, in the second row, (1/3, 1/3, 1/3), (1/7, 1/7, 5/7)
    logits = torch.tensor([[[LOG[1], 0.0, 0.0], [0.0, LOG[2], 0.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, LOG[4]]]])
    labels = torch.tensor([[0, 1], [-100, 2]])
    expected = LOG[1] + math.log(5 / 3) + math.log(7 / 5)
    assert losses.title_loss(logits, labels, 2).item() == pytest.approx(expected / 2)
    assert losses.title_loss(logits.bfloat16(), labels, torch.tensor(8)).dtype == torch.float32


def test_title_loss_of_the_target_among_candidates():
    log_likelihoods = torch.tensor([[-3.0, -1.0, -2.0], [-5.0, -4.0, float("-inf")]], requires_grad=True)
    loss = losses.target_title_loss(log_likelihoods, torch.tensor([2, 0]), 4)
    assert loss.item() == pytest.approx((2.0 + 5.0) / 4)
    loss.backward()
    assert log_likelihoods.grad.tolist() == [[0, 0, -0.25], [-0.25, 0, 0]]


def test_candidate_loss_is_the_cross_entropy_and_padding_has_no_probability():
    scores = torch.tensor([[0.0, LOG[1], LOG[2]], [LOG[2], LOG[4], float("-inf")]], requires_grad=True)
    # probabilities (1/6, 2/6, 3/6) and (3/8, 5/8, 0)
    loss = losses.candidate_loss(scores, torch.tensor([1, 0]), 2)
    assert loss.item() == pytest.approx((LOG[2] + math.log(8 / 3)) / 2)
    loss.backward()
    expected = torch.tensor([[1 / 6, -4 / 6, 3 / 6], [-5 / 8, 5 / 8, 0]]) / 2
    torch.testing.assert_close(scores.grad, expected)


def test_targets_are_found_among_their_candidates():
    candidates = torch.tensor([[4, 9, 2], [7, 3, 0]])
    assert losses.target_columns(candidates, torch.tensor([2, 7])).tolist() == [2, 0]


@pytest.mark.parametrize(("target", "times"), [(5, 0), (3, 2)])
def test_a_target_that_its_candidates_lack_or_repeat_is_refused(target, times):
    candidates = torch.tensor([[4, 9, 2], [7, 3, 3]])
    message = f"candidates of row 1 contain its target {target} {times} times: expected it exactly once; add the target"
    with pytest.raises(ValueError, match=message):
        losses.target_columns(candidates, torch.tensor([4, target]))


def test_opinion_pool_is_the_weighted_geometric_mean_of_both_probabilities():
    # the recommender's probabilities are (1/8, 2/8, 5/8) for items 1 to 3
    recommender_scores = torch.tensor([[float("-inf"), 0.0, LOG[1], LOG[4]]])
    title_log_likelihoods = torch.tensor([[0.5, 0.25, 0.0]]).log()
    pooled = losses.opinion_pool(title_log_likelihoods, recommender_scores, torch.tensor([[3, 2, 0]]), 0.75)
    expected = [(5 / 8) ** 0.75 * 0.5**0.25, (2 / 8) ** 0.75 * 0.25**0.25, 0.0]
    torch.testing.assert_close(pooled.exp(), torch.tensor([expected]))


def test_item_loss_leaves_out_prompts_that_show_candidates_but_counts_them():
    # probabilities of items 1 to 3: (1/6, 2/6, 3/6) and (1/4, 1/4, 2/4)
    logits = torch.tensor([[float("-inf"), 0.0, LOG[1], LOG[2]], [float("-inf"), 0.0, 0.0, LOG[1]]])
    labels = torch.tensor([3, 1])
    assert losses.item_loss(logits, labels, None, 2).item() == pytest.approx((LOG[1] + LOG[3]) / 2)
    shown = torch.tensor([False, True])
    assert losses.item_loss(logits, labels, shown, 2).item() == pytest.approx(LOG[1] / 2)
