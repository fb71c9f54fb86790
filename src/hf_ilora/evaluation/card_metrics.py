"""Writes metrics for a model card: in words, and as the `EvalResult`s that the Hub reads."""

import hashlib
import re
import unicodedata
from collections.abc import Mapping

from huggingface_hub import EvalResult

from hf_ilora.evaluation.results import short_number
from hf_ilora.evaluation.statistics import Interval
from hf_ilora_cli.shown_text import shown

_NAMES = {
    "ndcg": "NDCG",
    "hit_ratio": "HR",
    "mrr": "MRR",
    "map": "MAP",
    "valid_ratio": "ValidRatio",
}
ABOUT_NDCG = "NDCG@k is 1 if held-out items always come first, and 0 if they are never among the first k."
# The text of each metric, and whether it is a share, which is written in per cent.
_OF_ONE_ITEM = {
    "hit_ratio": ("the held-out item is {place} for {value} of the users", True),
    "ndcg": ("NDCG@{k} is {value}", False),
    "mrr": ("the mean of 1 / rank is {value}", False),
    "valid_ratio": ("{value} of the answers name exactly one candidate", True),
    "hit_ratio@1_of_valid": ("{value} of those name the held-out item", True),
    "hit_ratio@1_of_all": ("{value} of all answers are valid and name it", True),
}
_OF_SEVERAL_ITEMS = {
    "hit_ratio": ("one of them is {place} for {value} of the users", True),
    "recall": ("{value} of a user's are {place}", True),
    "precision": ("{value} of the first {k} places are theirs", True),
    "ndcg": ("NDCG@{k} is {value}", False),
    "map": ("MAP@{k} is {value}", False),
    "mrr": ("the mean of 1 / rank of the first one is {value}", False),
}


def quality_in_words(quality: Mapping[str, Interval | float], num_items: int, num_candidates: int = 0) -> str:
    """A Markdown list with one entry for each ranking.

    Args:
        quality: "ranking/metric" -> mean, with or without its interval. Metrics that repeat others when each user has
            one held-out item, such as recall, are left out.
        num_items: size of the catalogue.
        num_candidates: size of the candidate sets; 0 where it is unknown.
    """
    among = {
        "relevant": f"Several held-out items of a user, among all {num_items:,} items without those of the history",
        "masked": f"Among all {num_items:,} items without those of the history",
        "unmasked": f"Among all {num_items:,} items",
        "candidates": f"Among the {num_candidates} candidates of a row" if num_candidates else "Among the candidates",
        "answers": "Of generated answers",
    }
    lines = []
    for ranking, title in among.items():
        found = {name.partition("/")[2]: value for name, value in quality.items() if name.startswith(f"{ranking}/")}
        texts = _OF_SEVERAL_ITEMS if ranking == "relevant" else _OF_ONE_ITEM
        sentences = [
            _in_words(metric, value, *texts[known])
            for known in texts
            for metric, value in found.items()
            if known == (metric if metric in texts else metric.partition("@")[0])
        ]
        if sentences:
            lines.append(f"- {title}: {'; '.join(sentences)}.")
    return "\n".join(lines)


def metric_name(name: str, num_candidates: int | None = None) -> str:
    """`masked/ndcg@10` as "NDCG@10, whole catalogue, seen items excluded"."""
    ranking, _, metric = name.partition("/")
    kind, at, rest = metric.partition("@")
    among = {
        "masked": "whole catalogue, seen items excluded",
        "relevant": "all relevant items, whole catalogue, seen items excluded",
        "unmasked": "whole catalogue",
        "candidates": f"among {num_candidates or 'the'} candidates",
        "answers": "generated answers",
    }
    return f"{_NAMES.get(kind, kind)}{at}{rest.replace('_', ' ')}, {among.get(ranking, ranking)}"


def eval_results(
    quality: Mapping[str, Interval | float],
    *,
    dataset_name: str,
    dataset_id: str | None = None,
    split: str,
    revision: str | None = None,
    num_candidates: int | None = None,
) -> list[EvalResult]:
    """The metrics for a card's `model-index`.

    Args:
        quality: as in `quality_in_words`.
        dataset_name: display name of the data set.
        dataset_id: name of the data set on the Hub; None derives an identifier from `dataset_name`.
        split: evaluated split.
        revision: of the data, such as their fingerprint.
        num_candidates: size of the candidate sets.
    """
    return [
        EvalResult(
            task_type="other",
            task_name="Sequential recommendation",
            dataset_type=dataset_id or _dataset_type(dataset_name),
            dataset_name=shown(dataset_name),
            dataset_split=split,
            dataset_revision=revision,
            metric_type=name.rpartition("/")[2],
            metric_name=metric_name(name, num_candidates),
            metric_value=round(_mean(value), 6),
        )
        for name, value in quality.items()
        if not _equals_hit_ratio(name)
    ]


def _in_words(metric: str, value: Interval | float, text: str, is_share: bool) -> str:
    k = metric.partition("@")[2]
    write = "{:.1%}".format if is_share else short_number
    number = write(_mean(value))
    if isinstance(value, Interval):
        number += f" [{write(value.low)}, {write(value.high)}]"
    return text.format(value=number, place="first" if k == "1" else f"among the first {k}", k=k)


def _mean(value: Interval | float) -> float:
    return value.mean if isinstance(value, Interval) else value


def _equals_hit_ratio(name: str) -> bool:
    return "/recall@" in name and not name.startswith("relevant/")


def _dataset_type(dataset_name: str) -> str:
    """An identifier that the Hub accepts: the ASCII letters and digits of a name, or its digest if it has none."""
    ascii_name = unicodedata.normalize("NFKD", dataset_name).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
    return name or f"dataset-{hashlib.sha256(dataset_name.encode()).hexdigest()[:8]}"
