"""LLaRA's protocol: a model ranks each user's fixed candidates by likelihood, or generates the title of one."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, gather_object, reduce

from hf_ilora.evaluation.evaluation_rows import EvaluationRows
from hf_ilora.evaluation.ranking import ranks_among_candidates
from hf_ilora.evaluation.valid_answers import AnswerQuality, judge_answers, judge_items
from hf_ilora.models.next_item.next_item_model import evaluation_mode


def rank_candidates(model: torch.nn.Module, split, *, batch_size: int = 8) -> np.ndarray:
    """Rank the target of every row among its candidates, by the likelihood of their titles.

    Ties count against the model. With several processes, each ranks a part of the batches and all receive all ranks.

    Args:
        model: `score_candidates(histories, candidates)` returns (batch, candidates) for whole histories, padded with 0
            on the right, and `config` has `num_items`. It may be wrapped for distributed evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and candidates.
        batch_size: rows per step and process.

    Returns:
        (users,) int64 ranks in 1..candidates, in the split's order; rank 1 is a hit.

    Raises:
        ValueError: for missing columns, no rows, empty histories, ids outside the catalogue, candidates without the
            target or with an item twice, and NaN among the scores.
    """
    model = extract_model_from_parallel(model)
    rows = _rows_with_candidates(split, model.config.num_items)
    ranks = torch.zeros(len(rows), dtype=torch.int64, device=model.device)
    with evaluation_mode(model), torch.inference_mode():
        for batch_rows, is_own in rows.batches_of_process(batch_size):
            histories = rows.histories(batch_rows).to(model.device)  # (batch, longest)
            candidates = torch.from_numpy(rows.candidates[batch_rows]).to(model.device)  # (batch, candidates)
            target = torch.from_numpy(rows.target[batch_rows]).to(model.device)  # (batch,)
            scores = model.score_candidates(histories, candidates)  # (batch, candidates)
            batch_ranks = ranks_among_candidates(scores, candidates, target)
            if is_own:
                ranks[torch.from_numpy(batch_rows).to(model.device)] = batch_ranks
    # Every row was ranked by one process and is zero in the others.
    return reduce(ranks, reduction="sum").cpu().numpy()


@dataclass(frozen=True)
class GeneratedAnswers:
    """The answers that a model generated for the rows of a split, in their order.

    Args:
        texts: (users,) the answer to each row.
        candidate_titles: (users, candidates) titles, in the model's spelling.
        target_titles: (users,) titles, in the model's spelling.
        item_ids: (users,) item ids of constrained answers, 0 where there is none; None if answers are free.
        targets: (users,) item ids.
    """

    texts: list[str]
    candidate_titles: list[list[str]]
    target_titles: list[str]
    item_ids: list[int] | None
    targets: list[int]

    def quality(self, first_line_only: bool = False) -> AnswerQuality:
        """ValidRatio, and HR@1 over the valid and over all answers.

        Free answers are judged by LLaRA's rule, by which a title that contains the title of another candidate names
        both. A constrained answer always names the one item it was generated for.

        Args:
            first_line_only: judge the first line of a free answer alone, as the programs of LLaRA and iLoRA do.
        """
        if self.item_ids is not None:
            return judge_items(self.item_ids, self.targets)
        return judge_answers(self.texts, self.candidate_titles, self.target_titles, first_line_only)


def generate_answers(
    model: torch.nn.Module, split, *, constrained: bool = False, batch_size: int = 8, max_new_tokens: int = 40
) -> GeneratedAnswers:
    """Generate a model's answer for every row, freely or constrained to the titles of the candidates.

    With several processes, each generates a part of the answers and all receive all answers.

    Args:
        model: `generate_recommendation(histories, candidates, top_k, constrained, max_new_tokens)` returns an object
            with `texts`, (batch, top_k) strings, and `item_ids`, (batch, top_k); `title_tokens.titles` are the titles
            of items 1..num_items in the model's spelling, and `config` has `num_items`. It may be wrapped for
            distributed evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and candidates.
        constrained: generate only titles of candidates.
        batch_size: rows per step and process.
        max_new_tokens: longest answer, in tokens.

    Raises:
        ValueError: for missing columns, no rows, empty histories, and ids outside the catalogue.
    """
    model = extract_model_from_parallel(model)
    rows = _rows_with_candidates(split, model.config.num_items)
    written: list[tuple[int, str, int]] = []
    with evaluation_mode(model), torch.inference_mode():
        for batch_rows, is_own in rows.batches_of_process(batch_size):
            answers = model.generate_recommendation(
                rows.histories(batch_rows).to(model.device),  # (batch, longest)
                torch.from_numpy(rows.candidates[batch_rows]).to(model.device),  # (batch, candidates)
                top_k=1,
                constrained=constrained,
                max_new_tokens=max_new_tokens,
            )
            if is_own:
                item_ids = answers.item_ids[:, 0].tolist()
                written += zip(batch_rows.tolist(), (texts[0] for texts in answers.texts), item_ids, strict=True)
    answer_of = {row: answer for row, *answer in gather_object(written)}
    texts, item_ids = zip(*(answer_of[row] for row in range(len(rows))), strict=True)
    titles = ["", *model.title_tokens.titles]  # by item id
    return GeneratedAnswers(
        texts=list(texts),
        candidate_titles=[[titles[item] for item in candidates] for candidates in rows.candidates],
        target_titles=[titles[item] for item in rows.target],
        item_ids=list(item_ids) if constrained else None,
        targets=rows.target.tolist(),
    )


def _rows_with_candidates(split, num_items: int) -> EvaluationRows:
    rows = EvaluationRows(split, num_items)
    if rows.candidates is None:
        raise ValueError(
            "the split has no column candidates: expected data prepared with num_candidates of 2 or more, which the "
            "model ranks; prepare the data again"
        )
    return rows
