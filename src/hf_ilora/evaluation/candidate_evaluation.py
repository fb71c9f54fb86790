"""Evaluates iLoRA models one after the other on one split, together with the SASRecs that they use."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hf_ilora.data.columns import read_column
from hf_ilora.evaluation.candidate_ranking import GeneratedAnswers, generate_answers, rank_candidates
from hf_ilora.evaluation.candidate_report import CandidateContext, CandidateReport
from hf_ilora.evaluation.evaluation_rows import EvaluationRows
from hf_ilora.evaluation.expert_usage import ExpertUsage, gates_of_histories, usage_by_length
from hf_ilora.evaluation.rank_metrics import metric_per_user
from hf_ilora.evaluation.ranking import SplitRanks, rank_split
from hf_ilora.evaluation.saved_ranks import RanksSource, SavedRanks, parquet_name
from hf_ilora.evaluation.statistics import Interval, bootstrap_interval, compare_runs, summarize_ranks
from hf_ilora.files import written_whole
from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.next_item.histories import check_batch_size
from hf_ilora.models.next_item.next_item_model import NextItemPreTrainedModel

GENERATE = ("none", "free", "constrained")


class CandidateEvaluation:
    """Collects the rows of a candidate table model by model, so that only one language model is in memory at a time.

    Args:
        context: shared by all rows; `generate` determines whether and how the models generate answers.
        split: `datasets.Dataset` with the columns user_id, history, target and candidates.
        batch_size: users per step, per process.
        max_new_tokens: longest free answer, in tokens.

    Attributes:
        usages: expert usage by the label of the model, "name (source)".

    Raises:
        ValueError: for an unknown `generate`, and a `batch_size` below 1.
    """

    def __init__(self, context: CandidateContext, split, batch_size: int = 8, max_new_tokens: int = 40):
        if context.generate not in GENERATE:
            raise ValueError(f"generate is {context.generate!r}: expected one of {', '.join(GENERATE)}")
        check_batch_size(batch_size)
        self.context, self.split = context, split
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.usages: dict[str, dict[str, ExpertUsage]] = {}
        self._language_models: list[CandidateReport] = []
        self._models: list[CandidateReport] = []
        self._item_heads: list[CandidateReport] = []
        self._other_recommenders: list[CandidateReport] = []
        self._recommenders: list[CandidateReport] = []
        self._recommender_weights: list[dict[str, torch.Tensor]] = []
        self._candidate_ranks: dict[str, np.ndarray] = {}
        self._catalogue_ranks: dict[str, SplitRanks] = {}
        self._answers: dict[str, GeneratedAnswers] = {}

    def add_model(self, model: ILoraForRecommendation, name: str, source: str) -> None:
        """Evaluate a model's candidate ranking, experts and item head, and its SASRec unless an equal one is known.

        If only the item head was trained, there is no candidate ranking by titles.

        Args:
            model: loaded from `source`.
            name: models with the same name are runs of one model with different seeds.
            source: folder or Hub name, different for every model.
        """
        label = f"{name} ({source})"
        hits = self._recommender_hits(model, source)
        num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if model.config.language_loss_weight or model.config.candidate_loss_weight:
            self._models.append(self._candidate_ranking(model, name, source, label, num_trained, hits))
        if model.config.item_head != "none":
            ranks, seconds = self._timed(rank_split, model, scorer=model.item_scores)
            report = self._catalogue_ranking(ranks, model, f"{name}, item head", source, num_trained, seconds)
            comparison = compare_runs(hits, _hits(ranks.candidates), **self.context.bootstrap)
            self._item_heads.append(replace(report, comparison=comparison))
            self._keep_ranks(f"{name}, item head ({source})", ranks)
        if model.config.num_experts > 1:
            rows = EvaluationRows(self.split, model.config.num_items)
            histories = rows.histories(np.arange(len(rows)))  # (users, longest)
            self.usages[label] = usage_by_length(gates_of_histories(model, histories), rows.lengths)

    def add_language_model(self, model: ILoraForRecommendation, name: str, source: str) -> None:
        """Evaluate the candidate ranking of a model without a trained adapter."""
        hits = self._recommender_hits(model, source)
        self._language_models.append(self._candidate_ranking(model, name, source, name, 0, hits))

    def add_recommender(self, recommender: NextItemPreTrainedModel, name: str) -> None:
        """Evaluate a recommender that no iLoRA model uses."""
        ranks, seconds = self._timed(rank_split, recommender)
        self._other_recommenders.append(
            self._catalogue_ranking(ranks, recommender, name, name, recommender.num_parameters(), seconds)
        )
        self._keep_ranks(name, ranks)

    def reports(self) -> list[CandidateReport]:
        """The rows: language models, models, recommenders, SASRecs (numbered if there are several), item heads."""
        recommenders = self._recommenders
        if len(recommenders) > 1:
            recommenders = [replace(row, name=f"SASRec {number}") for number, row in enumerate(recommenders, start=1)]
        return [*self._language_models, *self._models, *self._other_recommenders, *recommenders, *self._item_heads]

    def write_rows(self, folder: Path) -> None:
        """Write the results of every user: candidate_ranks.parquet, ranks/ (for `compare_runs`) and answers/."""
        user_ids = read_column(self.split, "user_id")
        with written_whole(folder / "candidate_ranks.parquet") as path:
            pq.write_table(pa.table({"user_id": user_ids, **self._candidate_ranks}), path)
        for label, ranks in self._catalogue_ranks.items():
            source = RanksSource(label, self.context.data_fingerprint, self.context.split)
            SavedRanks.from_ranks(user_ids, ranks, source).save(folder / "ranks" / parquet_name(label))
        for label, answers in self._answers.items():
            columns = {"answer": answers.texts, "target": answers.target_titles, "candidates": answers.candidate_titles}
            with written_whole(folder / "answers" / parquet_name(label)) as path:
                pq.write_table(pa.table({"user_id": user_ids, **columns}), path)

    def _recommender_hits(self, model: ILoraForRecommendation, source: str) -> np.ndarray:
        """Whether the SASRec of a model ranks the target first, (users,); equal SASRecs are evaluated once."""
        # A copy: on a CPU these would be the tensors of the model.
        weights = {name: value.cpu().clone() for name, value in model.recommender.state_dict().items()}
        for number, known in enumerate(self._recommender_weights, start=1):
            if known.keys() == weights.keys() and all(torch.equal(known[name], weights[name]) for name in known):
                return _hits(self._candidate_ranks[f"SASRec {number}"])
        recommender = model.recommender
        ranks, seconds = self._timed(rank_split, recommender)
        self._recommenders.append(
            self._catalogue_ranking(ranks, recommender, "SASRec", source, recommender.num_parameters(), seconds)
        )
        self._recommender_weights.append(weights)
        self._keep_ranks(f"SASRec {len(self._recommenders)}", ranks)
        return _hits(ranks.candidates)

    def _candidate_ranking(
        self, model: ILoraForRecommendation, name: str, source: str, label: str, num_trained: int, hits: np.ndarray
    ) -> CandidateReport:
        ranks, seconds = self._timed(rank_candidates, model)
        self._candidate_ranks[label] = ranks
        quality = self._candidate_quality(ranks)
        seconds_per_answer = None
        if self.context.generate != "none":
            settings = {
                "constrained": self.context.generate == "constrained",
                "max_new_tokens": self.max_new_tokens,
            }
            answers, seconds_per_answer = self._timed(generate_answers, model, **settings)
            self._answers[label] = answers
            judged = answers.quality(self.context.first_line_only)
            quality["answers/valid_ratio"] = judged.valid_ratio
            if judged.hit_ratio_of_valid is not None:
                quality["answers/hit_ratio@1_of_valid"] = judged.hit_ratio_of_valid
            quality["answers/hit_ratio@1_of_all"] = judged.hit_ratio_of_all
        return CandidateReport(
            name=name,
            source=source,
            quality=quality,
            comparison=compare_runs(hits, _hits(ranks), **self.context.bootstrap),
            num_parameters=model.num_parameters(),
            num_trained=num_trained,
            seconds_per_user=seconds,
            seconds_per_answer=seconds_per_answer,
        )

    def _catalogue_ranking(
        self,
        ranks: SplitRanks,
        model: ILoraForRecommendation | NextItemPreTrainedModel,
        name: str,
        source: str,
        num_trained: int,
        seconds: float,
    ) -> CandidateReport:
        quality = self._candidate_quality(ranks.candidates) | summarize_ranks(
            ranks, self.context.k, **self.context.bootstrap
        )
        return CandidateReport(name, source, quality, None, model.num_parameters(), num_trained, seconds)

    def _keep_ranks(self, label: str, ranks: SplitRanks) -> None:
        self._catalogue_ranks[label] = ranks
        self._candidate_ranks[label] = ranks.candidates

    def _candidate_quality(self, ranks: np.ndarray) -> dict[str, Interval]:
        return {
            f"candidates/{metric}": bootstrap_interval(
                metric_per_user(metric, torch.from_numpy(ranks)).numpy(), **self.context.bootstrap
            )
            for metric in ("hit_ratio@1", f"ndcg@{self.context.k}")
        }

    def _timed(self, measure, model: torch.nn.Module, **settings):
        """The result of `measure` on the split, and the seconds per user, all processes together."""
        start = time.perf_counter()
        result = measure(model, self.split, batch_size=self.batch_size, **settings)
        return result, (time.perf_counter() - start) / len(self.split)


def _hits(ranks: np.ndarray) -> np.ndarray:
    """1.0 where the target is ranked first: (users,)."""
    return (ranks == 1).astype(np.float64)
