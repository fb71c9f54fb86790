"""Asks a model what comes after a history, times it, and finds the items of the history that are near its answers."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_ilora.models.ilora.modeling_ilora import ILoraForRecommendation
from hf_ilora.models.loading import SavedRecommender
from hf_ilora.models.next_item.modeling_counting import PopularityForNextItem, TransitionCountsForNextItem

_MAX_CALLS, _MAX_MILLISECONDS = 5, 100  # limits on repeating a call to measure its time
_NEAREST = 2  # items of the history shown beside a recommendation
_LEAST_SIMILARITY = 1e-6  # below it, there is no counted transition, or the vectors do not point the same way


@dataclass(frozen=True)
class Recommendation:
    """A recommended item, or a new one at its rank.

    Args:
        item_id: id of the item.
        rank: rank among all items that are not in the history, from 1.
        probability: probability over the whole catalogue.
        nearest: ids of items of the history with their similarities, the most similar first.
    """

    item_id: int
    rank: int
    probability: float
    nearest: list[tuple[int, float]]


@dataclass(frozen=True)
class Answer:
    """The answer of one model to a history.

    Args:
        recommendations: the best items, best first, then the new items that are not among them.
        milliseconds: median time of a call of `recommend`; None if the model was not asked.
        similarity: measure of the similarities in `nearest`, "cosine" or "weight"; None if there are none.
        expert_gates: weights of an iLoRA's experts for this history, which sum to 1; empty for other models.
        notes: sentences on what the answer leaves out.
    """

    recommendations: list[Recommendation] = field(default_factory=list)
    milliseconds: float | None = None
    similarity: str | None = None
    expert_gates: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def answer_of(model: SavedRecommender, history: Sequence[int], top_k: int, new_items: Sequence[int] = ()) -> Answer:
    """Ask a model what comes next.

    Args:
        model: the model to ask; it may know fewer items than the history contains.
        history: item ids, oldest first; may be empty.
        top_k: number of recommendations; fewer are returned if fewer items are left.
        new_items: item ids to append to the recommendations, with their ranks, unless they are among the best.

    Returns:
        The answer. Items that the model does not know are left out of the history, and a note says so.
    """
    num_items = model.config.num_items
    known = [item for item in history if item <= num_items]
    notes = []
    if len(known) < len(history):
        notes.append("It takes no new items without training: those of the history are left out.")
    elif any(item > num_items for item in new_items):
        notes.append("It takes no new items without training.")
    if not known and not model.knows_popular_items:
        return Answer(notes=[*notes, "It needs a history: add a title."])
    if not known:
        notes.append("Without a history, these are the most popular items.")
    num_ranked = num_items - len(set(known))
    if not num_ranked:
        return Answer(notes=[*notes, "All its items are in the history."])
    (item_ids, scores), milliseconds = _timed(model, known, min(top_k, num_ranked))
    ranks = range(1, len(item_ids) + 1)
    found = dict(zip(item_ids, zip(ranks, scores, strict=True), strict=True))
    wanted = [item for item in new_items if item <= num_items and item not in known and item not in found]
    if wanted:
        item_ids, scores = _asked(model, known, num_ranked)
        places = {item: place for place, item in enumerate(item_ids)}
        for item in sorted(wanted, key=places.get):
            found[item] = (places[item] + 1, scores[places[item]])
    nearest, similarity = _nearest_in_history(model, list(found), known)
    gates = []
    if isinstance(model, ILoraForRecommendation) and known:
        gates = model.expert_gates([known])[0].float().cpu().tolist()
    recommendations = [Recommendation(item, *found[item], nearest[item]) for item in found]
    return Answer(recommendations, milliseconds, similarity, gates, notes)


def _asked(model: SavedRecommender, history: list[int], top_k: int) -> tuple[list[int], list[float]]:
    """The recommended item ids and their probabilities, best first."""
    item_ids, scores = model.recommend([history], top_k)
    return item_ids[0].tolist(), scores[0].exp().tolist()


def _timed(model: SavedRecommender, history: list[int], top_k: int) -> tuple[tuple[list[int], list[float]], float]:
    """The recommendations, and the median milliseconds of a call; slow models are asked once."""
    milliseconds = []
    while len(milliseconds) < _MAX_CALLS and sum(milliseconds) < _MAX_MILLISECONDS:
        begun = time.perf_counter()
        answer = _asked(model, history, top_k)  # copying it waits for the work on an accelerator
        milliseconds.append(1000 * (time.perf_counter() - begun))
    return answer, statistics.median(milliseconds)


def _nearest_in_history(
    model: SavedRecommender, item_ids: list[int], history: list[int]
) -> tuple[dict[int, list[tuple[int, float]]], str | None]:
    """The items of the history that are most similar to each of `item_ids`, and the measure of similarity.

    Similarity is the cosine of the model's item vectors; an iLoRA uses those of its recommender, with which its item
    head scores. In a model that counts, it is the weight of the transition from the item of the history.
    """
    nearest = {item: [] for item in item_ids}
    if isinstance(model, PopularityForNextItem) or not history:
        return nearest, None
    similar = model.recommender if isinstance(model, ILoraForRecommendation) else model
    read = list(dict.fromkeys(history[-similar.config.max_length :]))
    found, similarities = (each.cpu() for each in similar.similar_items(read, len(item_ids), allowed_items=item_ids))
    for item, row, row_of_similarities in zip(read, found.tolist(), similarities.tolist(), strict=True):
        for other, similarity in zip(row, row_of_similarities, strict=True):
            if similarity > _LEAST_SIMILARITY:
                nearest[other].append((item, similarity))
    for item, pairs in nearest.items():
        nearest[item] = sorted(pairs, key=lambda pair: -pair[1])[:_NEAREST]
    return nearest, "weight" if isinstance(model, TransitionCountsForNextItem) else "cosine"


__all__ = ["Answer", "Recommendation", "answer_of"]
