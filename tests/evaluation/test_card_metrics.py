"""Metrics in the words of a model card."""

from hf_ilora.evaluation.card_metrics import eval_results, quality_in_words
from hf_ilora.evaluation.statistics import Interval


def test_each_ranking_has_one_line_with_shares_in_per_cent_and_intervals():
    quality = {
        "masked/mrr": Interval(0.09, 0.08, 0.1),
        "masked/ndcg@10": Interval(0.1155, 0.1, 0.13),
        "masked/hit_ratio@10": Interval(0.2125, 0.19, 0.24),
        "masked/recall@10": Interval(0.2125, 0.19, 0.24),
        "candidates/hit_ratio@1": Interval(0.5, 0.47, 0.53),
        "answers/valid_ratio": Interval(0.9, 0.85, 0.95),
        "answers/hit_ratio@1_of_valid": Interval(0.4, 0.3, 0.5),
        "new_items/ndcg@10": Interval(0.4, 0.3, 0.5),
    }
    assert quality_in_words(quality, 1682, 20).splitlines() == [
        "- Among all 1,682 items without those of the history: the held-out item is among the first 10 for "
        "21.2% [19.0%, 24.0%] of the users; NDCG@10 is .1155 [.1000, .1300]; the mean of 1 / rank is "
        ".0900 [.0800, .1000].",
        "- Among the 20 candidates of a row: the held-out item is first for 50.0% [47.0%, 53.0%] of the users.",
        "- Of generated answers: 90.0% [85.0%, 95.0%] of the answers name exactly one candidate; "
        "40.0% [30.0%, 50.0%] of those name the held-out item.",
    ]


def test_several_held_out_items_have_words_of_their_own_and_intervals_are_optional():
    quality = {"relevant/recall@20": 0.25, "relevant/ndcg@10": 0.1, "unmasked/hit_ratio@10": 0.125}
    assert quality_in_words(quality, 30).splitlines() == [
        "- Several held-out items of a user, among all 30 items without those of the history: 25.0% of a user's are "
        "among the first 20; NDCG@10 is .1000.",
        "- Among all 30 items: the held-out item is among the first 10 for 12.5% of the users.",
    ]
    names = [result.metric_type for result in eval_results(quality, dataset_name="Data", split="test")]
    assert names == ["recall@20", "ndcg@10", "hit_ratio@10"]
