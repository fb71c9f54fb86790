"""The published protocol: a model chooses one of each user's fixed candidates, by likelihood or by what it writes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, gather_object, reduce

from hf_ilora.evaluation.ranking import EvaluationRows, ranks_among_candidates
from hf_ilora.evaluation.valid_answers import AnswerQuality, judge_answers


def choose_candidates(model: torch.nn.Module, split, *, batch_size: int = 8) -> np.ndarray:
    """Rank the target of every row among its candidates, by the likelihood of their titles.

    Ties count against the model. Under several processes each takes its share of the batches and all receive all ranks.

    Args:
        model: `score_candidates(histories, candidates)` gives (batch, candidates) for whole histories, padded with 0 on
            the right, and `config` has `num_items`. It may be wrapped for distributed evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and candidates.
        batch_size: rows per step and process.

    Returns:
        (users,) int64 ranks in 1..candidates, in the split's order; rank 1 is a hit.

    Raises:
        ValueError: for missing columns, no rows, empty histories, ids outside the catalogue, candidates without the
            target or with an item twice, and NaN among the scores.
    """
    model = extract_model_from_parallel(model)
    rows = EvaluationRows(split, model.config.num_items)
    ranks = torch.zeros(len(rows), dtype=torch.int64, device=model.device)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch_rows, is_own in rows.batches_of_process(batch_size):
            histories = rows.histories(batch_rows).to(model.device)  # (batch, longest)
            candidates = torch.from_numpy(rows.candidates[batch_rows]).to(model.device)  # (batch, candidates)
            target = torch.from_numpy(rows.target[batch_rows]).to(model.device)  # (batch,)
            scores = model.score_candidates(histories, candidates)  # (batch, candidates)
            batch_ranks = ranks_among_candidates(scores, candidates, target)
            if is_own:
                ranks[torch.from_numpy(batch_rows).to(model.device)] = batch_ranks
    model.train(was_training)
    # Every row was ranked by one process and is zero in all others.
    return reduce(ranks, reduction="sum").cpu().numpy()


@dataclass(frozen=True)
class GeneratedAnswers:
    """What a model wrote for every row of a split, in its order.

    Args:
        texts: (users,) the first answer for each.
        candidate_titles: (users, candidates) as the model calls them.
        target_titles: (users,) likewise.
    """

    texts: list[str]
    candidate_titles: list[list[str]]
    target_titles: list[str]

    def quality(self) -> AnswerQuality:
        """ValidRatio and HR@1, over the valid and over all answers."""
        return judge_answers(self.texts, self.candidate_titles, self.target_titles)


def generate_answers(
    model: torch.nn.Module, split, *, constrained: bool = False, batch_size: int = 8, max_new_tokens: int = 40
) -> GeneratedAnswers:
    """Let a model write its answer for every row, freely or constrained to the titles of the candidates.

    Under several processes each takes its share of the batches and all receive all answers.

    Args:
        model: `generate_recommendation(histories, candidates, top_k, constrained, max_new_tokens)` gives an object with
            `texts`, (batch, top_k) strings; `title_tokens.titles` are the titles of items 1..num_items as the model
            calls them, and `config` has `num_items`. It may be wrapped for distributed evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and candidates.
        constrained: only titles of candidates can be written, so that every answer names at least one.
        batch_size: rows per step and process.
        max_new_tokens: tokens after which an answer ends in any case.

    Raises:
        ValueError: for missing columns, no rows, empty histories, and ids outside the catalogue.
    """
    model = extract_model_from_parallel(model)
    rows = EvaluationRows(split, model.config.num_items)
    written: list[tuple[int, str]] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for batch_rows, is_own in rows.batches_of_process(batch_size):
            answers = model.generate_recommendation(
                rows.histories(batch_rows).to(model.device),  # (batch, longest)
                torch.from_numpy(rows.candidates[batch_rows]).to(model.device),  # (batch, candidates)
                top_k=1,
                constrained=constrained,
                max_new_tokens=max_new_tokens,
            )
            if is_own:
                written += [(int(row), texts[0]) for row, texts in zip(batch_rows, answers.texts, strict=True)]
    model.train(was_training)
    text_of = dict(gather_object(written))
    titles = ["", *model.title_tokens.titles]  # by item id
    return GeneratedAnswers(
        texts=[text_of[row] for row in range(len(rows))],
        candidate_titles=[[titles[item] for item in candidates] for candidates in rows.candidates],
        target_titles=[titles[item] for item in rows.target],
    )
