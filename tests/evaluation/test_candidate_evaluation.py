"""The candidate table has the numbers of the functions it calls, measured with a tiny language model."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ilora import ILoraConfig, ILoraForRecommendation, SASRecConfig, SASRecForNextItem, compare_runs
from hf_ilora.evaluation.candidate_evaluation import CandidateEvaluation
from hf_ilora.evaluation.candidate_ranking import generate_answers, rank_candidates
from hf_ilora.evaluation.candidate_report import (
    CandidateContext,
    candidate_table,
    plot_candidate_hits,
    write_candidate_table,
)
from hf_ilora.evaluation.expert_usage import expert_usage
from hf_ilora.evaluation.ranking import rank_split
from hf_ilora.evaluation.results import seed_summary
from hf_ilora.evaluation.saved_ranks import SavedRanks
from tests.synthetic import cyclic_sequences
from tests.tiny_tokenizers import byte_level_bpe


@pytest.fixture(scope="module")
def sequences():
    return cyclic_sequences(num_users=40)


def ilora(sequences, seed=0, recommender_seed=0, **settings):
    """A model whose adapter is random and not zero, so that its experts matter."""
    torch.manual_seed(recommender_seed)
    recommender = SASRecForNextItem(SASRecConfig(num_items=sequences.num_items, hidden_size=8, initializer_range=0.5))
    tokenizer = byte_level_bpe()
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,
        )
    )
    model = ILoraForRecommendation.from_base(
        llm,
        recommender,
        tokenizer,
        sequences.catalogue,
        ILoraConfig(**{"rank": 4, "num_experts": 2, "router_type": "linear", "max_history": 4} | settings),
        untrained_recommender=True,
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5 if name.startswith("router") else 0.2)
    return model.eval()


def context_of(sequences, split, generate="none"):
    return CandidateContext("data", sequences.fingerprint, "test", len(split), 30, 5, 10, 200, 0, generate=generate)


def test_a_model_trained_without_titles_has_no_ranking_by_titles(sequences):
    split = sequences["test"].select(range(5))
    settings = {"item_head": "residual", "item_loss_weight": 1.0, "language_loss_weight": 0.0}
    evaluation = CandidateEvaluation(context_of(sequences, split), split)
    evaluation.add_model(ilora(sequences, **settings), "iLoRA", "here")
    assert [row.name for row in evaluation.reports()] == ["SASRec", "iLoRA, item head"]


def test_rows_have_the_numbers_of_the_functions_that_measure_them(sequences, tmp_path):
    split = sequences["test"].select(range(10))
    model, other = ilora(sequences, item_head="residual"), ilora(sequences, seed=1, num_experts=1)
    context = context_of(sequences, split, "free")
    evaluation = CandidateEvaluation(context, split, batch_size=8, max_new_tokens=4)
    evaluation.add_model(model, "iLoRA", "here")
    evaluation.add_model(other, "plain LoRA", "there")
    evaluation.add_language_model(ilora(sequences, num_experts=1), "zero-shot", "llm")
    rows = evaluation.reports()
    assert [row.name for row in rows] == ["zero-shot", "iLoRA", "plain LoRA", "SASRec", "iLoRA, item head"]
    _, first, second, sasrec, head = rows

    ranks = rank_candidates(model, split)
    assert first.quality["candidates/hit_ratio@1"].mean == pytest.approx((ranks == 1).mean())
    assert first.quality["candidates/ndcg@10"].mean == pytest.approx((1 / np.log2(ranks + 1)).mean())
    answers = generate_answers(model, split, max_new_tokens=4).quality()
    assert first.quality["answers/valid_ratio"] == answers.valid_ratio
    assert first.quality["answers/hit_ratio@1_of_all"] == answers.hit_ratio_of_all
    expected = rank_split(model.recommender, split)
    assert sasrec.quality["masked/ndcg@10"].mean == pytest.approx(
        np.where(expected.masked <= 10, 1 / np.log2(expected.masked + 1), 0).mean()
    )
    hits = [(each == 1).astype(float) for each in (expected.candidates, ranks)]
    assert first.comparison == compare_runs(*hits, num_resamples=200)
    assert sasrec.comparison is None and sasrec.num_parameters == sasrec.num_trained
    of_head = rank_split(model, split, scorer=model.item_scores)
    assert head.quality["masked/hit_ratio@10"].mean == pytest.approx((of_head.masked <= 10).mean())
    assert head.quality["candidates/hit_ratio@1"].mean == pytest.approx((of_head.candidates == 1).mean())
    assert "masked/ndcg@10" not in first.quality and "answers/valid_ratio" not in head.quality
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < second.num_trained < first.num_trained == trained < first.num_parameters
    assert all(row.seconds_per_user > 0 for row in rows)
    assert list(evaluation.usages) == ["iLoRA (here)"]  # plain LoRA has no router
    gates = torch.cat([model.expert_gates(torch.tensor([history])) for history in split["history"]])
    usage = evaluation.usages["iLoRA (here)"]
    assert usage["all users"].mean_gate == pytest.approx(expert_usage(gates).mean_gate, abs=1e-6)
    assert sum(group.num_users for group in usage.values()) == 2 * len(gates)

    evaluation.write_rows(tmp_path)
    saved = pq.read_table(tmp_path / "candidate_ranks.parquet")
    assert saved["user_id"].to_pylist() == split["user_id"][:]
    assert saved["iLoRA (here)"].to_pylist() == ranks.tolist()
    (path,) = (tmp_path / "ranks").glob("SASRec-1-*.parquet")
    loaded = SavedRanks.load(path)
    assert loaded.ranks("masked").tolist() == expected.masked.tolist()
    (path,) = (tmp_path / "answers").glob("iLoRA-*.parquet")
    written = pq.read_table(path).to_pylist()
    assert [row["target"] for row in written] == [f"Title {100 + item - 1}" for item in split["target"]]


def test_models_with_different_sasrecs_are_each_compared_with_their_own(sequences):
    split = sequences["test"].select(range(8))
    evaluation = CandidateEvaluation(context_of(sequences, split), split)
    models = [ilora(sequences, recommender_seed=seed) for seed in (0, 1, 0)]
    for number, model in enumerate(models):
        evaluation.add_model(model, "iLoRA", f"run {number}")
    rows = evaluation.reports()
    assert [row.name for row in rows] == ["iLoRA"] * 3 + ["SASRec 1", "SASRec 2"]
    for row, model in zip(rows, models, strict=False):
        assert row.comparison.mean_a == pytest.approx((rank_split(model.recommender, split).candidates == 1).mean())
        assert row.seconds_per_answer is None


def test_table_shows_every_metric_once_and_seeds_as_mean_and_deviation(sequences, tmp_path):
    split = sequences["test"].select(range(8))
    context = context_of(sequences, split)
    evaluation = CandidateEvaluation(context, split)
    for seed in (0, 1):
        evaluation.add_model(ilora(sequences, seed=seed), "i|LoRA", f"seed {seed}")
    rows = evaluation.reports()
    summary = seed_summary(rows)
    values = [row.quality["candidates/hit_ratio@1"].mean for row in rows[:2]]
    assert list(summary) == ["i|LoRA"]
    assert summary["i|LoRA"]["candidates/hit_ratio@1"] == {
        "runs": 2,
        "mean": pytest.approx(np.mean(values)),
        "standard_deviation": pytest.approx(np.std(values, ddof=1)),
    }
    text = candidate_table(rows, context)
    assert (
        "HR@1 of 5" in text and "HR@10 of all items" in text and "ValidRatio" not in text and "s / answer" not in text
    )
    assert text.count(r"| i\|LoRA |") == 3 and "Mean ± standard deviation" in text
    write_candidate_table(rows, context, tmp_path, "\nappended\n")
    assert (tmp_path / "results.md").read_text() == text + "\nappended\n"
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["models"][1]["comparison"]["p_value"] == rows[1].comparison.p_value
    assert content["seeds"]["i|LoRA"]["candidates/hit_ratio@1"]["runs"] == 2
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["candidates/hit_ratio@1"]) for line in lines[:2]] == values
    assert lines[0]["masked/ndcg@10"] == "" and lines[2]["p_value"] == ""
    plot_candidate_hits(rows, context, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_report_and_unknown_generation_are_refused(sequences, tmp_path):
    split = sequences["test"].select(range(2))
    with pytest.raises(ValueError, match="generate is 'freely': expected one of none, free, constrained"):
        CandidateEvaluation(context_of(sequences, split, "freely"), split)
    with pytest.raises(ValueError, match="no models to report on"):
        write_candidate_table([], context_of(sequences, split), tmp_path)
