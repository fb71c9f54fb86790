"""Writes metrics as folders that `evaluate.load` takes, and that can be pushed to the Hub as Spaces.

A folder needs neither hf_ilora nor a network: it contains copies of the modules that compute the metric here, so the
numbers are the same.
"""

import inspect
import json
import os
import re
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import evaluate
from packaging.requirements import Requirement

from hf_ilora.downloads import default_cache_dir
from hf_ilora.evaluation import answer_metrics, list_metrics, list_properties, metrics, named_candidates, rank_metrics
from hf_ilora.files import folder_written_whole
from hf_ilora.models.ilora import named_titles

_REQUIRED = ("torch", "datasets", "evaluate", "numpy")
_OUR_IMPORT = re.compile(r"^from hf_ilora\.[\w.]*?(\w+) import ", re.MULTILINE)
_RANK_SOURCES = {metrics: None, rank_metrics: "metric_per_user"}
_LIST_SOURCES = {list_metrics: None, list_properties: "check_lists"}
_ANSWER_SOURCES = {answer_metrics: None, named_candidates: "is_valid", named_titles: "named_titles"}


@dataclass(frozen=True)
class _Folder:
    """The parts of a metric's folder.

    Args:
        metric: class of the metric.
        sources: the modules to copy, each with a name to import from it; None for the module of the class.
        example: inputs of `compute`, by name.
        value: result for the example.
        settings: arguments of the class, for the example.
    """

    metric: type[evaluate.Metric]
    sources: dict[ModuleType, str | None]
    example: dict[str, list]
    value: dict[str, float]
    settings: dict[str, object] = field(default_factory=dict)


_RANKS = {"predictions": [1, 3, 11]}
_SEVERAL_RANKS = {"predictions": [[1, 4], [11]]}
_LISTS = {"predictions": [[1, 2], [1, 3]]}
_OF_TEN = {"predictions": [[1, 2], [1, 10]]}
_LISTS_AND_TARGETS = {"predictions": [[2, 1], [3, 1]], "references": [[2], [3]]}
_DECILES = {"decile_1@10": 0.5, "decile_2@10": 0.25} | {f"decile_{n}@10": 0.0 for n in range(3, 10)}
_ANSWERS: dict[str, list] = {
    "predictions": ["Heat", "Alien or Heat"],
    "references": [["Heat", "Alien"], ["Heat", "Alien"]],
}
_FOLDERS = {
    "hit_ratio": _Folder(metrics.HitRatio, _RANK_SOURCES, _RANKS, {"hit_ratio@10": 2 / 3}),
    "recall": _Folder(metrics.Recall, _RANK_SOURCES, _SEVERAL_RANKS, {"recall@10": 0.5}),
    "precision": _Folder(metrics.Precision, _RANK_SOURCES, _SEVERAL_RANKS, {"precision@10": 0.1}),
    "map": _Folder(metrics.MAP, _RANK_SOURCES, _SEVERAL_RANKS, {"map@10": 0.375}),
    "ndcg": _Folder(metrics.NDCG, _RANK_SOURCES, _RANKS, {"ndcg@10": 0.5}),
    "mrr": _Folder(metrics.MRR, _RANK_SOURCES, {"predictions": [1, 4]}, {"mrr": 0.625}),
    "coverage": _Folder(list_metrics.Coverage, _LIST_SOURCES, _LISTS, {"coverage@10": 0.75}, {"num_items": 4}),
    "gini": _Folder(list_metrics.Gini, _LIST_SOURCES, _LISTS, {"gini@10": 0.375}, {"num_items": 4}),
    "novelty": _Folder(
        list_metrics.Novelty,
        _LIST_SOURCES,
        _LISTS,
        {"novelty@10": 0.75},
        {"users": [0, 4, 2, 1, 0], "num_users": 4},
    ),
    "serendipity": _Folder(
        list_metrics.Serendipity,
        _LIST_SOURCES,
        _LISTS_AND_TARGETS,
        {"serendipity@10": 0.1875},
        {"counts": [0, 4, 2, 1, 0]},
    ),
    "deciles": _Folder(
        list_metrics.Deciles,
        _LIST_SOURCES,
        _OF_TEN,
        _DECILES | {"decile_10@10": 0.25},
        {"counts": [0, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]},
    ),
    "diversity": _Folder(
        list_metrics.Diversity,
        _LIST_SOURCES,
        _LISTS,
        {"diversity@10": 0.5},
        {"vectors": [[0, 0], [1, 0], [0, 1], [1, 0]]},
    ),
    "valid_ratio": _Folder(answer_metrics.ValidRatio, _ANSWER_SOURCES, _ANSWERS, {"valid_ratio": 0.5}),
}
METRIC_FOLDERS = tuple(_FOLDERS)

_SCRIPT = '''"""{description}"""

# `evaluate` copies the files that this one imports, not those that these import in turn.
{imports}

__all__ = [{exported}]
'''

_APP = '''"""A page to try the metric."""

import json
from pathlib import Path

import evaluate
import gradio as gr

settings = {settings}
metric = evaluate.load(str(Path(__file__).with_name("{name}.py")), **settings)


def compute(*texts):
    try:
        inputs = dict(zip({inputs}, map(json.loads, texts), strict=True))
        given = {{name: inputs.pop(name) for name in settings}}
        return type(metric)(**given).compute(**inputs)
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error


page = gr.Interface(
    compute,
    [gr.Textbox(value, label=f"{{name}} (JSON)") for name, value in {example}.items()],
    gr.JSON(label="value"),
    title="{title}",
    description=metric.info.description,
    article=metric.info.inputs_description,
)

if __name__ == "__main__":
    page.launch()
'''

_README = """---
title: {title}
sdk: gradio
app_file: app.py
pinned: false
tags:
- evaluate
- metric
- recommender-system
description: >-
  {description}
---

# Metric card of {title}

## Description

{description}

{about}

## How to use

```python
import evaluate

metric = evaluate.load("path/to/{name}"{given})  # or "user/{name}", where the folder is a Space
{call}
```

### Inputs

{inputs}

{settings}

### Output

{output} The example above gives:

```python
{value}
```

Raises a `ValueError` for no users{wrong}.

## Limitations and bias

{limits}
"""

_OF_RANKS = {
    "output": "One number from 0 to 1; higher is better.",
    "about": "A rank is the 1-based place of a relevant item among the ranked items; ties should count against the "
    "model. The definition is that of RecTools, where it has one.",
    "settings": "Pass `k` to `evaluate.load` for another cut-off.",
    "wrong": ", ranks below 1 and ranks that are not whole numbers",
    "limits": "Items that a user has not interacted with count as irrelevant, although many would be welcome. The mean "
    "over users hides groups of users and of items that are served worse, such as rare items.",
}
_OF_LISTS = {
    "about": "The definition is that of RecTools, where it has one. Users without any recommendation are not counted.",
    "settings": "Pass `k` to `evaluate.load` for another length of the lists. `num_items` is the size of the "
    "catalogue. `counts` (occurrences in training), `users` (different training users) and `vectors` have a row for "
    "each item, after a first one for padding; `num_users` is the number of training users.",
    "wrong": ", ids outside the catalogue and an item twice in a list",
    "limits": "The number describes lists and says nothing about whether they suit their users: random lists cover the "
    "whole catalogue. Compare models at the same k, and beside a ranking metric.",
}
_OUTPUT_OF_LISTS = {
    "coverage": "One number from 0 to 1, where 1 is the whole catalogue.",
    "gini": "One number: 0 if all items are recommended equally often, near 1 if one item has all recommendations.",
    "novelty": "One number of bits, 0 or more: higher for items that fewer training users have.",
    "serendipity": "One number from 0 to 1: higher for relevant items that popularity would not have shown.",
    "deciles": "Ten numbers that sum to 1, `decile_1` for the most popular tenth; random lists have 0.1 in each.",
    "diversity": "One number from 0 to 2: higher for lists of items that are less alike.",
}
_OF_ANSWERS = {
    "output": "One number from 0 to 1; higher is better.",
    "about": "This is the rule of LLaRA (SIGIR 2024).",
    "settings": "Pass `first_line_only=True` to `evaluate.load` to ignore what follows the first line of an answer.",
    "wrong": ", no candidates and blank titles",
    "limits": "A valid answer need not be a good one. An answer is invalid if it names a title that contains the title "
    "of another candidate.",
}


def metric_folder(name: str, parent: str | os.PathLike | None = None) -> str:
    """Write a metric as a folder for `evaluate.load`, which can also be pushed to the Hub as a Space.

    `evaluate.load(metric_folder("ndcg"), k=20)` computes what `NDCG(k=20)` does, and
    `evaluate.combine([metric_folder("ndcg"), metric_folder("mrr")])` takes several.

    Args:
        name: one of `METRIC_FOLDERS`. "hit_ratio", "recall", "precision", "map", "ndcg" and "mrr" take ranks;
            "coverage", "gini", "novelty", "serendipity", "deciles" and "diversity" take lists; "valid_ratio" takes
            answers.
        parent: folder in which to write the metric's folder, which has the name of the metric; None means the cache of
            hf_ilora.

    Returns:
        The path of the folder as a string, the type that `evaluate` expects.

    Raises:
        ValueError: for another name, and where a folder of this name has other files.
    """
    if name not in _FOLDERS:
        raise ValueError(f"there is no folder of the metric {name!r}: expected one of {', '.join(METRIC_FOLDERS)}")
    folder = Path(default_cache_dir() / "metrics" if parent is None else parent) / name
    files = _files(name, _FOLDERS[name])
    if not all(
        (folder / file).is_file() and (folder / file).read_text("utf-8") == text for file, text in files.items()
    ):
        with folder_written_whole(folder, replaceable_files=files) as unfinished:
            for file, text in files.items():
                (unfinished / file).write_text(text, encoding="utf-8")
    return str(folder)


def _files(name: str, folder: _Folder) -> dict[str, str]:
    """The content of each file of the folder, by file name."""
    metric = folder.metric
    if issubclass(metric, metrics.RankMetric):
        texts_of_kind = _OF_RANKS
    elif issubclass(metric, list_metrics.ListMetric):
        texts_of_kind = _OF_LISTS | {"output": _OUTPUT_OF_LISTS[name]}
    else:
        texts_of_kind = _OF_ANSWERS
    sources = {module.__name__.rpartition(".")[2]: module for module in folder.sources}
    imported = [f"from .{stem} import {folder.sources[module] or metric.__name__}" for stem, module in sources.items()]
    inputs = folder.settings | folder.example
    arguments = ", ".join(f"{key}={value!r}" for key, value in folder.example.items())
    texts = {
        f"{name}.py": _SCRIPT.format(
            description=metric.description, imports="\n".join(imported), exported=f'"{metric.__name__}"'
        ),
        "app.py": _APP.format(
            name=name,
            title=metric.__name__,
            settings=folder.settings,
            inputs=tuple(inputs),
            example={key: json.dumps(value) for key, value in inputs.items()},
        ),
        "README.md": _README.format(
            name=name,
            title=metric.__name__,
            description=metric.description,
            given="".join(f", {key}={value!r}" for key, value in folder.settings.items()),
            call=f"metric.compute({arguments})",
            inputs=metric.inputs,
            value=folder.value,
            **texts_of_kind,
        ),
        "requirements.txt": "".join(f"{line}\n" for line in requires("hf_ilora") or () if _is_required(line)),
    }
    for stem, module in sources.items():
        text = inspect.getsource(module)
        texts[f"{stem}.py"] = _OUR_IMPORT.sub(r"from .\1 import ", text)
    return texts


def _is_required(requirement: str) -> bool:
    return ";" not in requirement and Requirement(requirement).name in _REQUIRED
