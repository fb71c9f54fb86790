"""The published protocol: a model chooses one of each user's fixed candidates, by likelihood or by what it writes."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel, gather_object, reduce

from hf_ilora.evaluation.ranking import EvaluationRows, ranks_among_candidates
from hf_ilora.evaluation.valid_answers import AnswerQuality, judge_answers, judge_items


def rank_candidates(model: torch.nn.Module, split, *, batch_size: int = 8) -> np.ndarray:
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
        item_ids: (users,) what the answers are when they were constrained to titles, 0 for none; None for free ones.
        targets: (users,) item ids.
    """

    texts: list[str]
    candidate_titles: list[list[str]]
    target_titles: list[str]
    item_ids: list[int] | None
    targets: list[int]

    def quality(self) -> AnswerQuality:
        """ValidRatio and HR@1, over the valid and over all answers.

        Free answers are judged by the published rule, by which a title that holds another candidate's names two.
        Constrained ones are one title each, whatever its text holds.
        """
        if self.item_ids is not None:
            return judge_items(self.item_ids, self.targets)
        return judge_answers(self.texts, self.candidate_titles, self.target_titles)


def generate_answers(
    model: torch.nn.Module, split, *, constrained: bool = False, batch_size: int = 8, max_new_tokens: int = 40
) -> GeneratedAnswers:
    """Let a model write its answer for every row, freely or constrained to the titles of the candidates.

    Under several processes each takes its share of the batches and all receive all answers.

    Args:
        model: `generate_recommendation(histories, candidates, top_k, constrained, max_new_tokens)` gives an object with
            `texts`, (batch, top_k) strings, and `item_ids`, (batch, top_k); `title_tokens.titles` are the titles of
            items 1..num_items as the model calls them, and `config` has `num_items`. It may be wrapped for distributed
            evaluation.
        split: `datasets.Dataset` with the columns history (list of item ids, oldest first), target and candidates.
        constrained: only titles of candidates can be written, so that every answer is one of them.
        batch_size: rows per step and process.
        max_new_tokens: tokens after which an answer ends in any case.

    Raises:
        ValueError: for missing columns, no rows, empty histories, and ids outside the catalogue.
    """
    model = extract_model_from_parallel(model)
    rows = EvaluationRows(split, model.config.num_items)
    written: list[tuple[int, str, int]] = []
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
                item_ids = answers.item_ids[:, 0].tolist()
                written += zip(batch_rows.tolist(), (texts[0] for texts in answers.texts), item_ids, strict=True)
    model.train(was_training)
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
