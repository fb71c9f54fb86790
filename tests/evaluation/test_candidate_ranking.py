"""Ranks among candidates equal those of one row at a time, and generated answers are judged by LLaRA's rule."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ilora.evaluation.candidate_ranking import generate_answers, rank_candidates
from hf_ilora.evaluation.ranking import rank_split, ranks_among_candidates
from tests.evaluation.ranking_model import ChoosingModel, title


def naive_rank(model, row):
    """1 + the number of other candidates with a score at least as high."""
    with torch.no_grad():
        scores = model.eval().item_scores(torch.tensor([row["history"]]))[0]
    return 1 + sum(scores[item] >= scores[row["target"]] for item in row["candidates"] if item != row["target"])


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_ranks_equal_one_row_at_a_time_in_the_order_of_the_split(split, batch_size):
    model = ChoosingModel()
    ranks = rank_candidates(model, split, batch_size=batch_size)
    assert ranks.tolist() == [naive_rank(model, row) for row in split]
    assert ranks.dtype == np.int64
    # Negative control: another model chooses otherwise.
    assert (rank_candidates(ChoosingModel(seed=1), split) != ranks).any()


def test_the_model_is_handed_whole_histories_and_its_mode_is_restored(split):
    model = ChoosingModel().train()
    rank_candidates(model, split, batch_size=64)
    assert model.training
    assert max(model.lengths_seen) == max(len(history) for history in split["history"])


def test_constant_scores_put_the_target_last():
    candidates, target = torch.tensor([[3, 2, 5], [4, 1, 5]]), torch.tensor([3, 1])
    assert ranks_among_candidates(torch.zeros(2, 3), candidates, target).tolist() == [3, 3]
    assert ranks_among_candidates(torch.tensor([[2.0, 1, 3], [1, 2, 0]]), candidates, target).tolist() == [2, 1]


def test_bad_scores_are_refused():
    candidates, target = torch.tensor([[3, 2], [4, 1]]), torch.tensor([3, 1])
    with pytest.raises(ValueError, match="scores of row 1 contain NaN"):
        ranks_among_candidates(torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), candidates, target)
    with pytest.raises(ValueError, match=r"candidate_scores have shape \(2, 3\): expected \(2, 2\)"):
        ranks_among_candidates(torch.zeros(2, 3), candidates, target)
    with pytest.raises(ValueError, match="candidates of row 1 lack its target 5"):
        ranks_among_candidates(torch.zeros(2, 2), candidates, torch.tensor([3, 5]))


def test_a_split_without_candidates_is_refused(split):
    for measure in (rank_candidates, generate_answers):
        with pytest.raises(ValueError, match="has no column candidates: expected data prepared with num_candidates"):
            measure(ChoosingModel(), split.remove_columns("candidates"))


def test_an_item_head_is_ranked_by_its_scorer(split):
    model = ChoosingModel()
    ranks = rank_split(model, split, batch_size=7, scorer=model.item_scores)
    assert ranks.candidates.tolist() == rank_candidates(model, split).tolist()
    with torch.no_grad():
        scores = [model.eval().item_scores(torch.tensor([row["history"]]))[0] for row in split]
    for row, score, masked, unmasked in zip(split, scores, ranks.masked, ranks.unmasked, strict=True):
        others = [item for item in range(1, 41) if item != row["target"] and score[item] >= score[row["target"]]]
        assert unmasked == 1 + len(others)
        assert masked == 1 + len([item for item in others if item not in row["history"]])


@pytest.mark.parametrize("constrained", [False, True])
def test_generated_answers_are_judged_by_the_published_rule(split, constrained):
    model = ChoosingModel()
    answers = generate_answers(model, split, constrained=constrained, batch_size=7)
    assert answers.target_titles == [title(row["target"]) for row in split]
    assert answers.candidate_titles == [[title(item) for item in row["candidates"]] for row in split]
    silent = [row["history"][-1] % 2 == 1 and not constrained for row in split]
    assert [text == "no idea" for text in answers.texts] == silent
    chosen = []
    for row in split:
        with torch.no_grad():
            scores = model.eval().item_scores(torch.tensor([row["history"]]))[0]
        chosen.append(max(row["candidates"], key=lambda item, scores=scores: scores[item]))
    hits = sum(item == row["target"] for item, row, quiet in zip(chosen, split, silent, strict=True) if not quiet)
    quality = answers.quality()
    assert (quality.num_valid, quality.num_correct) == (len(split) - sum(silent), hits)
    assert quality.valid_ratio.mean == 1 - sum(silent) / len(split)


def test_the_first_line_of_a_generated_answer_decides_if_asked(split):
    answers = generate_answers(ChoosingModel(), split, batch_size=7)
    rambling = replace(answers, texts=[f"{text}\n{', '.join(answers.candidate_titles[0])}" for text in answers.texts])
    assert rambling.quality().num_valid < answers.quality().num_valid
    assert rambling.quality(first_line_only=True) == answers.quality()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(split, launch, tmp_path):
    split.to_parquet(tmp_path / "split.parquet")
    program = Path(__file__).with_name("ranking_program.py")
    launch("multi_cpu.yaml", program, tmp_path / "split.parquet", tmp_path)
    expected = rank_candidates(ChoosingModel(), split).tolist()
    texts = generate_answers(ChoosingModel(), split).texts
    for process in range(2):
        found = json.loads((tmp_path / f"found_{process}.json").read_text())
        assert found == {"num_processes": 2, "ranks": expected, "texts": texts}
