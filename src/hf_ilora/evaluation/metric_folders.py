"""Metrics as folders that `evaluate.load` takes, and that can be pushed to the Hub as Spaces.

A folder stands alone: it has copies of the files that compute the metric here, so the numbers are the same, and needs
neither hf_ilora nor a network.
"""

import inspect
import json
import os
import re
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import evaluate
from packaging.requirements import Requirement

from hf_ilora.downloads import default_cache_dir
from hf_ilora.evaluation import answer_metrics, metrics, named_candidates, rank_metrics
from hf_ilora.files import folder_written_whole
from hf_ilora.models.ilora import named_titles

_REQUIRED = ("torch", "datasets", "evaluate", "numpy")
_OUR_IMPORT = re.compile(r"^from hf_ilora\.[\w.]*?(\w+) import ", re.MULTILINE)
_RANK_SOURCES = {metrics: None, rank_metrics: "metric_per_user"}
_ANSWER_SOURCES = {answer_metrics: None, named_candidates: "is_valid", named_titles: "named_titles"}


@dataclass(frozen=True)
class _Folder:
    """What a folder is made of.

    Args:
        metric: the class.
        sources: the modules that it needs, each with a name to import from it; None for the one that has the class.
        example: inputs.
        value: of the example.
    """

    metric: type[evaluate.Metric]
    sources: dict[ModuleType, str | None]
    example: dict[str, list]
    value: dict[str, float]


_RANKS = {"predictions": [1, 3, 11]}
_SEVERAL_RANKS = {"predictions": [[1, 4], [11]]}
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
    "valid_ratio": _Folder(answer_metrics.ValidRatio, _ANSWER_SOURCES, _ANSWERS, {"valid_ratio": 0.5}),
}
METRIC_FOLDERS = tuple(_FOLDERS)

_SCRIPT = '''"""{description}"""

# `evaluate` copies the files that this one imports, not those that these import in turn.
{imports}

__all__ = [{exported}]
'''

_APP = '''"""A page on which the metric can be tried."""

import json
from pathlib import Path

import evaluate
import gradio as gr

metric = evaluate.load(str(Path(__file__).with_name("{name}.py")))


def compute(*inputs):
    try:
        return metric.compute(**dict(zip({inputs}, map(json.loads, inputs), strict=True)))
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

metric = evaluate.load("path/to/{name}")  # or "user/{name}", where the folder is a Space
{call}
```

### Inputs

{inputs}

{settings}

### Output

One number from 0 to 1; higher is better. The example above gives:

```python
{value}
```

Raises a `ValueError` for no users{wrong}.

## Limitations and bias

{limits}
"""

_OF_RANKS = {
    "about": "A rank is the 1-based place of a relevant item among the ranked items; ties should count against the "
    "model. The definition is that of RecTools, where it has one.",
    "settings": "Pass `k` to `evaluate.load` for another cut-off.",
    "wrong": ", ranks below 1 and ranks that are not whole numbers",
    "limits": "Items that a user has not interacted with count as irrelevant, although many would be welcome. The mean "
    "over users hides groups of users and of items that are served worse, such as rare items.",
}
_OF_ANSWERS = {
    "about": "This is the rule of LLaRA (SIGIR 2024).",
    "settings": "Pass `first_line_only=True` to `evaluate.load` to ignore what follows the first line of an answer.",
    "wrong": ", no candidates and blank titles",
    "limits": "A valid answer need not be a good one. An answer with a title that contains another candidate's is "
    "invalid.",
}


def metric_folder(name: str, parent: str | os.PathLike | None = None) -> str:
    """Write a metric as a folder for `evaluate.load`, which can also be pushed to the Hub as a Space.

    `evaluate.load(metric_folder("ndcg"), k=20)` computes what `NDCG(k=20)` does, and
    `evaluate.combine([metric_folder("ndcg"), metric_folder("mrr")])` takes several.

    Args:
        name: one of `METRIC_FOLDERS`: "hit_ratio", "recall", "precision", "map", "ndcg", "mrr" or "valid_ratio".
        parent: the folder is written in here, under the name of the metric; None is the cache of hf_ilora.

    Returns:
        The path of the folder, as text, which `evaluate` asks for.

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
    """The content of the files by name."""
    metric, is_of_ranks = folder.metric, issubclass(folder.metric, metrics.RankMetric)
    sources = {module.__name__.rpartition(".")[2]: module for module in folder.sources}
    imported = [f"from .{stem} import {folder.sources[module] or metric.__name__}" for stem, module in sources.items()]
    arguments = ", ".join(f"{key}={value!r}" for key, value in folder.example.items())
    texts = {
        f"{name}.py": _SCRIPT.format(
            description=metric.description, imports="\n".join(imported), exported=f'"{metric.__name__}"'
        ),
        "app.py": _APP.format(
            name=name,
            title=metric.__name__,
            inputs=tuple(folder.example),
            example={key: json.dumps(value) for key, value in folder.example.items()},
        ),
        "README.md": _README.format(
            name=name,
            title=metric.__name__,
            description=metric.description,
            call=f"metric.compute({arguments})",
            inputs=metric.inputs,
            value=folder.value,
            **(_OF_RANKS if is_of_ranks else _OF_ANSWERS),
        ),
        "requirements.txt": "".join(f"{line}\n" for line in requires("hf_ilora") or () if _is_required(line)),
    }
    for stem, module in sources.items():
        text = inspect.getsource(module)
        texts[f"{stem}.py"] = _OUR_IMPORT.sub(r"from .\1 import ", text)
    return texts


def _is_required(requirement: str) -> bool:
    return ";" not in requirement and Requirement(requirement).name in _REQUIRED
