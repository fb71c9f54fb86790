"""Ranks equal those of a full sort written as loops, and memory does not grow with users x items."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_ilora import NextItemOutput, SASRecConfig, SASRecForNextItem
from hf_ilora.evaluation.ranking import (
    RankingMetrics,
    candidate_ranks,
    rank_split,
    ranks_from_logits,
    relevant_ranks,
    target_ranks,
)
from hf_ilora.evaluation.statistics import summarize_ranks

INFINITY = float("inf")


def naive_rank(scores, target, eligible):
    """Position of the target if items with equal scores come before it."""
    others = [item for item in eligible if item != target]
    ordered = sorted([*others, target], key=lambda item: (-float(scores[item]), item == target))
    return ordered.index(target) + 1


def random_scores(batch=30, num_items=25, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, num_items + 1, generator=generator)
    if levels:
        scores = (scores * levels).round() / levels
    target = torch.randint(1, num_items + 1, (batch,), generator=generator)
    seen = torch.randint(0, num_items + 1, (batch, 9), generator=generator)
    return scores, target, seen


@pytest.mark.parametrize("levels", [None, 2], ids=["different scores", "many ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_equal_a_full_sort(levels, dtype):
    scores, target, seen = random_scores(levels=levels)
    scores = scores.to(dtype)
    assert (seen == 0).any() and (seen == target[:, None]).any()  # padding and seen targets are covered
    masked, unmasked = target_ranks(scores, target, seen), target_ranks(scores, target)
    assert masked.dtype == unmasked.dtype == torch.int64
    for row in range(len(scores)):
        items = range(1, scores.shape[1])
        eligible = [item for item in items if item not in seen[row] or item == target[row]]
        assert unmasked[row] == naive_rank(scores[row], int(target[row]), items)
        assert masked[row] == naive_rank(scores[row], int(target[row]), eligible)
    assert (masked < unmasked).any()


def test_ranks_equal_those_worked_out_by_hand():
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.3, 0.2]])  # order of items: 2, 3, 4, 1; padding never counts
    ranks = [int(target_ranks(scores, torch.tensor([target]))) for target in (2, 3, 4, 1)]
    assert ranks == [1, 2, 3, 4]
    assert int(target_ranks(scores, torch.tensor([1]), torch.tensor([[3, 3, 2, 0, 0]]))) == 2
    assert int(target_ranks(scores, torch.tensor([4]), torch.tensor([[4, 2]]))) == 2  # a seen target stays


def test_constant_scores_rank_last():
    target, candidates = torch.tensor([3, 1]), torch.tensor([[3, 2, 5], [4, 1, 5]])
    for value in (0.0, -INFINITY, INFINITY):
        scores = torch.full((2, 7), value)
        assert target_ranks(scores, target).tolist() == [6, 6]
        assert target_ranks(scores, target, torch.tensor([[1, 2], [1, 0]])).tolist() == [4, 6]
        assert candidate_ranks(scores, candidates, target).tolist() == [3, 3]


@pytest.mark.parametrize("levels", [None, 2])
def test_candidate_ranks_equal_a_sort_of_the_candidates(levels):
    scores, target, _ = random_scores(levels=levels)
    generator = np.random.default_rng(0)
    candidates = [
        [int(item), *generator.permutation([i for i in range(1, 26) if i != item])[:7].tolist()] for item in target
    ]
    ranks = candidate_ranks(scores, torch.tensor(candidates), target)
    for row in range(len(scores)):
        assert ranks[row] == naive_rank(scores[row], int(target[row]), candidates[row])


def test_bad_scores_targets_and_candidates_are_refused():
    scores, target = torch.randn(2, 6), torch.tensor([1, 2])
    candidates = torch.tensor([[1, 2], [2, 3]])
    broken = scores.clone()
    broken[1, 4] = torch.nan
    for call in (lambda: target_ranks(broken, target), lambda: candidate_ranks(broken, candidates, target)):
        with pytest.raises(ValueError, match="scores of row 1 contain NaN"):
            call()
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=rf"target contains item {wrong}: expected ids 1\.\.5"):
            target_ranks(scores, torch.tensor([1, wrong]))
    with pytest.raises(ValueError, match=r"expected \(batch, num_items \+ 1\) and \(batch,\)"):
        target_ranks(scores, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="candidates of row 1 lack its target 2"):
        candidate_ranks(scores, torch.tensor([[1, 2], [1, 3]]), target)
    with pytest.raises(ValueError, match="candidates of row 0 contain an item twice"):
        candidate_ranks(scores, torch.tensor([[1, 1], [2, 3]]), target)
    with pytest.raises(ValueError, match="candidates contains item 0"):
        candidate_ranks(scores, torch.tensor([[1, 0], [2, 3]]), target)
    with pytest.raises(ValueError, match=r"expected \(batch, candidates\) with batch 2"):
        candidate_ranks(scores, torch.tensor([[1, 2]]), target)


def sasrec(num_items=40, seed=0):
    torch.manual_seed(seed)
    return SASRecForNextItem(SASRecConfig(num_items=num_items, hidden_size=8, max_length=6, initializer_range=0.5))


def naive_split_ranks(model, split):
    rows = []
    for row in split:
        newest = torch.tensor([row["history"][-model.config.max_length :]])
        with torch.no_grad():
            scores = model.eval()(newest).logits[0]
        items, target = range(1, len(scores)), row["target"]
        unseen = [item for item in items if item not in row["history"]]
        rows.append([naive_rank(scores, target, eligible) for eligible in (unseen, items, row["candidates"])])
    return np.array(rows)


@pytest.mark.parametrize("name", ["sasrec", "counts", "popularity"])
@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_split_ranks_equal_one_row_at_a_time(name, batch_size, split, request):
    model = sasrec() if name == "sasrec" else request.getfixturevalue(name)
    ranks = rank_split(model, split, batch_size=batch_size)
    found = np.stack([ranks.masked, ranks.unmasked, ranks.candidates], axis=1)
    assert found.tolist() == naive_split_ranks(model, split).tolist()
    if name == "sasrec":  # negative control: other weights rank otherwise
        assert (rank_split(sasrec(seed=1), split).masked != ranks.masked).any()


def test_a_split_without_candidates_has_the_same_ranks_in_the_catalogue_and_no_others(split, counts):
    without = rank_split(counts, split.remove_columns("candidates"), batch_size=7)
    ranks = rank_split(counts, split)
    assert without.masked.tolist() == ranks.masked.tolist() and without.unmasked.tolist() == ranks.unmasked.tolist()
    assert without.candidates is None
    metrics, expected = summarize_ranks(without, num_resamples=50), summarize_ranks(ranks, num_resamples=50)
    assert expected.pop("candidates/hit_ratio@1").mean == (ranks.candidates == 1).mean()
    assert metrics == expected


def test_new_targets_are_ranked_among_the_new_items_without_the_seen_ones(split, counts, popularity):
    is_new = np.arange(counts.config.num_items + 1) % 3 == 1
    for model in (counts, popularity):
        ranks = rank_split(model, split, batch_size=7, is_new=is_new)
        plain = rank_split(model, split, batch_size=7)
        assert plain.new_items is None
        assert all(
            np.array_equal(vars(ranks)[name], vars(plain)[name]) for name in ("masked", "unmasked", "candidates")
        )
        for rank, row in zip(ranks.new_items, split, strict=True):
            if not is_new[row["target"]]:
                assert rank == 0
                continue
            scores = model(torch.tensor([row["history"][-model.config.max_length :]])).logits[0]
            new = set(np.flatnonzero(is_new)) - set(row["history"])
            assert rank == naive_rank(scores, row["target"], new)
    assert 0 < (ranks.new_items > 0).sum() < len(split)
    without = rank_split(counts, split.remove_columns("candidates"), is_new=is_new)
    assert without.candidates is None and (without.new_items > 0).any()


def test_relevant_items_are_ranked_behind_others_of_their_score_and_in_their_order():
    scores = torch.tensor([[9.0, 1, 5, 5, 5, 2, 7]] * 2)  # of padding and the items 1 to 6
    relevant = torch.tensor([[3, 2, 1], [6, 0, 0]])
    assert relevant_ranks(scores, relevant).tolist() == [[3, 4, 6], [1, 0, 0]]  # behind 6 and 4
    seen = torch.tensor([[6, 5, 3, 0], [6, 0, 0, 0]])  # relevant items stay in the ranking
    assert relevant_ranks(scores, relevant, seen).tolist() == [[2, 3, 4], [1, 0, 0]]
    one = torch.tensor([4, 1])
    assert relevant_ranks(scores, one[:, None], seen)[:, 0].tolist() == target_ranks(scores, one, seen).tolist()
    for wrong, message in (
        ([[1, 1], [2, 0]], "an item twice"),
        ([[1, 2], [0, 0]], "target contains item 0"),
        ([[1, 7], [2, 0]], "target contains item 7"),
        ([[1, -1], [2, 0]], "relevant_items"),
        ([[1, 2]], r"relevant_items have shape \(1, 2\): expected \(batch, relevant\) with batch 2"),
    ):
        with pytest.raises(ValueError, match=message):
            relevant_ranks(scores, torch.tensor(wrong))


def test_lists_and_ranks_of_several_relevant_items_equal_one_row_at_a_time(split):
    split, generator = split.select(range(20)), np.random.default_rng(2)
    relevant = [
        [row["target"], *generator.permutation(np.setdiff1d(np.arange(1, 41), [row["target"]]))[: number % 4].tolist()]
        for number, row in enumerate(split)
    ]
    with_several = split.add_column("relevant_items", relevant)
    model = sasrec()
    ranks = rank_split(model, with_several, batch_size=7, top_k=38)
    assert ranks.main == "relevant" and ranks.relevant.shape == (20, 4)
    plain = rank_split(model, split, batch_size=7)
    assert plain.main == "masked" and plain.relevant is None and plain.recommended is None
    assert all(np.array_equal(vars(ranks)[name], vars(plain)[name]) for name in ("masked", "unmasked", "candidates"))
    for number, row in enumerate(split):
        with torch.no_grad():
            scores = model.eval()(torch.tensor([row["history"][-6:]])).logits[0]
        unseen = [item for item in range(1, 41) if item not in row["history"]]
        best = sorted(unseen, key=lambda item: -scores[item])[:38]
        assert ranks.recommended[number].tolist() == best + [0] * (38 - len(best))
        eligible = sorted({*unseen, *relevant[number]}, key=lambda item: -scores[item])
        places = [1 + eligible.index(item) for item in relevant[number]]
        assert ranks.relevant[number].tolist() == places + [0] * (4 - len(places))
    with pytest.raises(ValueError, match="top_k is 41: expected 1 to 40"):
        rank_split(model, split, top_k=41)
    broken = split.add_column("relevant_items", [[], *relevant[1:]])
    with pytest.raises(ValueError, match="relevant_items of row 0 are empty"):
        rank_split(model, broken)


def test_the_whole_history_is_masked_though_the_model_reads_its_end(split):
    model = sasrec()
    ranks = rank_split(model, split)
    cut = split.map(lambda row: {"history": row["history"][-6:]}, features=split.features)
    of_cut = rank_split(model, cut)
    assert (ranks.unmasked == of_cut.unmasked).all()
    assert (ranks.masked <= of_cut.masked).all() and (ranks.masked < of_cut.masked).any()


def test_training_mode_is_restored_and_no_dropout_disturbs(split):
    model = sasrec().train()
    first, second = rank_split(model, split), rank_split(model, split)
    assert model.training
    assert (first.unmasked == second.unmasked).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split.remove_columns("target"), r"has no column target \(found: user_id, history, candidates\)"),
        (lambda split: split.select([]), "the split is empty"),
        (
            lambda split: split.map(lambda row, i: {"history": [] if i == 3 else [1]}, with_indices=True),
            "of row 3 is empty",
        ),
        (lambda split: split.map(lambda row: {"history": [0]}), "history contains item 0"),
        (lambda split: split.map(lambda row: {"target": 41}), r"target contains item 41: expected ids 1\.\.40"),
        (lambda split: split.map(lambda row: {"candidates": [row["target"], 99]}), "candidates contains item 99"),
        (lambda split: split.map(lambda row: {"candidates": [row["target"] % 40 + 1]}), "lack its target"),
        (
            lambda split: split.map(lambda row, i: {"candidates": [1] * (i + 1)}, with_indices=True),
            "1 to 50 candidates",
        ),
    ],
)
def test_broken_splits_are_refused(change, message, split, counts):
    with pytest.raises(ValueError, match=message):
        rank_split(counts, change(split))


def test_batch_size_is_checked(split, counts):
    with pytest.raises(ValueError, match="batch_size is 0"):
        rank_split(counts, split, batch_size=0)


class FreshScores(nn.Module):
    """Gives every batch a score matrix of its own."""

    def __init__(self, num_items):
        super().__init__()
        self.config = SimpleNamespace(num_items=num_items, max_length=1)
        self.row = nn.Parameter(torch.linspace(-1, 1, num_items + 1))
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask):
        return NextItemOutput(logits=self.row.repeat(len(input_ids), 1))


def peak_memory_above(action):
    """Bytes of resident memory that `action` needs at most, beyond what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the former peak
    status = Path("/proc/self/status")
    read = lambda name: 1024 * int(status.read_text().partition(f"{name}:")[2].split()[0])  # noqa: E731
    before = read("VmRSS")
    action()
    return read("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of peak memory")
def test_memory_does_not_grow_with_users_times_items():
    num_users, num_items, batch_size = 1_600, 20_000, 32
    model = FreshScores(num_items)
    columns = {"history": [[1]] * num_users, "target": [2] * num_users, "candidates": [[2, 3]] * num_users}
    split = Dataset.from_dict(columns)
    rank_split(model, split.select(range(batch_size)), batch_size=batch_size)
    needed = peak_memory_above(lambda: rank_split(model, split, batch_size=batch_size))
    all_scores = num_users * num_items * 4  # 128 MB
    assert needed < all_scores / 4
    # Negative control: the measurement sees score matrices that are kept.
    assert peak_memory_above(lambda: [model(torch.ones(32, 1), None).logits for _ in range(50)]) > all_scores / 2


def evaluation_batch(rows):
    """A batch as the evaluation collator makes it: labels are -100 except for the target at the last real position."""
    length = 6
    batch = {"input_ids": torch.zeros(len(rows), length, dtype=torch.int64)}
    batch["labels"] = torch.full((len(rows), length), -100)
    batch["seen_items"] = torch.zeros(len(rows), max(len(row["history"]) for row in rows), dtype=torch.int64)
    for number, row in enumerate(rows):
        newest = row["history"][-length:]
        batch["input_ids"][number, : len(newest)] = torch.tensor(newest)
        batch["labels"][number, len(newest) - 1] = row["target"]
        batch["seen_items"][number, : len(row["history"])] = torch.tensor(row["history"])
    return batch


def test_ranks_from_logits_equal_those_of_the_split(split):
    model = sasrec().eval()
    batch = evaluation_batch(list(split))
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    # Across processes the Trainer pads both with -100.
    labels, seen = (nn.functional.pad(batch[name], (0, 3), value=-100) for name in ("labels", "seen_items"))
    expected = rank_split(model, split)
    for found in (
        ranks_from_logits(logits, (batch["labels"], batch["seen_items"])),
        ranks_from_logits(logits, (labels, seen)),
    ):
        assert found[:, 0].tolist() == expected.masked.tolist()
        assert found[:, 1].tolist() == expected.unmasked.tolist()


def test_ranks_from_logits_refuse_rows_without_a_label():
    labels = torch.tensor([[-100, 2], [-100, -100]])
    with pytest.raises(ValueError, match="labels of row 1 are all -100"):
        ranks_from_logits(torch.randn(2, 5), (labels, torch.zeros(2, 1, dtype=torch.int64)))


def test_ranking_metrics_over_batches_are_means_over_users():
    metrics = RankingMetrics(k=2)
    batches = [np.array([[1, 1], [2, 4]]), np.array([[3, 5]])]
    for _ in range(2):  # the second evaluation must not know the first
        assert metrics(EvalPrediction(batches[0], None), compute_result=False) == {}
        assert metrics(EvalPrediction(batches[1], None), compute_result=True) == pytest.approx(
            {
                "ndcg@2": (1 + 1 / np.log2(3) + 0) / 3,
                "hit_ratio@2": 2 / 3,
                "mrr": (1 + 1 / 2 + 1 / 3) / 3,
                "unmasked_ndcg@2": 1 / 3,
                "unmasked_hit_ratio@2": 1 / 3,
                "unmasked_mrr": (1 + 1 / 4 + 1 / 5) / 3,
            }
        )


def test_ranking_metrics_refuse_predictions_that_are_not_ranks():
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics=ranks_from_logits"):
        RankingMetrics()(SimpleNamespace(predictions=torch.randn(4, 100)))
    with pytest.raises(ValueError, match="k is 0"):
        RankingMetrics(k=0)


def test_the_trainer_reports_what_the_split_ranks_give(split, tmp_path):
    model = sasrec()
    arguments = TrainingArguments(
        output_dir=tmp_path,
        label_names=["labels", "seen_items"],
        batch_eval_metrics=True,
        remove_unused_columns=False,
        per_device_eval_batch_size=16,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        eval_dataset=split,
        data_collator=evaluation_batch,
        compute_metrics=RankingMetrics(k=10),
        preprocess_logits_for_metrics=ranks_from_logits,
    )
    metrics = trainer.evaluate()
    ranks = rank_split(model, split)
    for prefix, ranking in (("eval_", ranks.masked), ("eval_unmasked_", ranks.unmasked)):
        assert metrics[f"{prefix}hit_ratio@10"] == pytest.approx((ranking <= 10).mean())
        assert metrics[f"{prefix}mrr"] == pytest.approx((1 / ranking).mean())
        ndcg = np.where(ranking <= 10, 1 / np.log2(ranking + 1), 0)
        assert metrics[f"{prefix}ndcg@10"] == pytest.approx(ndcg.mean())
