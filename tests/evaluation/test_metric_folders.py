"""`evaluate` loads metric folders without hf_ilora and without a network, and they compute the same numbers."""

import ast
import json
import runpy
import sys
from types import SimpleNamespace

import evaluate
import pytest
from huggingface_hub import RepoCard

from hf_ilora import (
    MAP,
    MRR,
    NDCG,
    Coverage,
    Deciles,
    Diversity,
    Gini,
    HitRatio,
    Novelty,
    Precision,
    Recall,
    Serendipity,
    ValidRatio,
    metric_folder,
)
from hf_ilora.evaluation.metric_folders import METRIC_FOLDERS
from tests.hidden_package import run_without_hf_ilora

RANKS = {"predictions": [[1, 4], [11], [2, 3, 30]]}
ANSWERS = {"predictions": ["Heat", "Alien or Heat", "alien!"], "references": [["Heat", "Alien"]] * 3}
LISTS = {"predictions": [[1, 2, 3], [4, 1], [3, 2]]}
LISTS_AND_TARGETS = LISTS | {"references": [[2], [1, 3], [4]]}
SETTINGS = {
    "coverage": {"num_items": 4},
    "gini": {"num_items": 4},
    "novelty": {"users": [0, 5, 3, 2, 0], "num_users": 6},
    "serendipity": {"counts": [0, 9, 3, 3, 0]},
    "deciles": {"counts": [0, 9, 3, 3, 0]},
    "diversity": {"vectors": [[0, 0], [1, 0], [0, 1], [3, 4], [-1, 1]]},
}
OURS = {
    "hit_ratio": HitRatio,
    "recall": Recall,
    "precision": Precision,
    "map": MAP,
    "ndcg": NDCG,
    "mrr": MRR,
    "valid_ratio": ValidRatio,
    "coverage": Coverage,
    "gini": Gini,
    "novelty": Novelty,
    "serendipity": Serendipity,
    "deciles": Deciles,
    "diversity": Diversity,
}


def inputs_of(name):
    if name in SETTINGS:
        return LISTS_AND_TARGETS if name == "serendipity" else LISTS
    return ANSWERS if name == "valid_ratio" else RANKS


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Where evaluate copies the modules that it imports."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def test_a_folder_computes_what_the_metric_of_the_package_does(tmp_path, modules_cache):
    assert set(METRIC_FOLDERS) == set(OURS)
    for name, metric in OURS.items():
        settings = SETTINGS.get(name, {})
        loaded = evaluate.load(metric_folder(name, tmp_path), **settings)
        assert loaded.compute(**inputs_of(name)) == metric(**settings).compute(**inputs_of(name)), name
        assert type(loaded).__module__.startswith("evaluate_modules.") and "users" in loaded.inputs_description
    loaded = evaluate.load(metric_folder("ndcg", tmp_path), k=2)
    assert loaded.compute(predictions=[1, 3]) == {"ndcg@2": 0.5}
    with pytest.raises(ValueError, match=r"rank 1\.5 is not a whole number"):
        loaded.compute(predictions=[1, 1.5])


def test_metrics_from_folders_combine_in_one_call(tmp_path, modules_cache):
    combined = evaluate.combine([metric_folder(name, tmp_path) for name in ("ndcg", "hit_ratio", "mrr")])
    expected = {"ndcg@10": 0.5, "hit_ratio@10": 2 / 3, "mrr": (1 + 1 / 3 + 1 / 11) / 3}
    assert combined.compute(predictions=[1, 3, 11]) == pytest.approx(expected)
    names = ("coverage", "serendipity", "diversity")
    of_lists = evaluate.combine([evaluate.load(metric_folder(name, tmp_path), **SETTINGS[name]) for name in names])
    expected = {}
    for name in names:
        expected |= OURS[name](**SETTINGS[name]).compute(**inputs_of(name))
    assert of_lists.compute(**LISTS_AND_TARGETS) == expected


def test_a_folder_is_a_space_with_a_page_that_computes_the_example(tmp_path, modules_cache, monkeypatch):
    class GradioError(Exception):
        pass

    def interface(compute, inputs, output, **texts):
        return SimpleNamespace(compute=compute, inputs=inputs, texts=texts)

    parts = {"Interface": interface, "Textbox": lambda value, label: value, "JSON": dict, "Error": GradioError}
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(**parts))
    for name, metric in OURS.items():
        folder = tmp_path / name
        assert metric_folder(name, tmp_path) == str(folder)
        page = runpy.run_path(str(folder / "app.py"))["page"]
        card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False)
        assert (card.data.sdk, card.data.app_file, card.data.title) == ("gradio", "app.py", metric.__name__)
        shown = card.text.split("The example above gives:\n\n```python\n")[1].split("```")[0]
        assert page.compute(*page.inputs) == pytest.approx(ast.literal_eval(shown))
        code = card.text.split("```python\n")[1].split("```")[0]
        calls = [statement.value for statement in ast.parse(code).body[1:]]  # evaluate.load and compute
        inputs = [ast.literal_eval(keyword.value) for call in calls for keyword in call.keywords]
        assert inputs == [json.loads(value) for value in page.inputs]
        with pytest.raises(GradioError):
            page.compute(*("[]" for _ in page.inputs))
        required = {line.partition(">")[0] for line in (folder / "requirements.txt").read_text().splitlines()}
        assert required == {"torch", "datasets", "evaluate", "numpy"}


def test_a_folder_is_written_again_only_where_it_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ILORA_CACHE", str(tmp_path))
    path = tmp_path / "metrics" / "mrr" / "mrr.py"
    metric_folder("mrr")
    before = path.stat().st_ino
    metric_folder("mrr")
    assert path.stat().st_ino == before
    path.write_text("other")
    metric_folder("mrr")
    assert "import MRR" in path.read_text()
    (path.parent / "mine.txt").touch()
    path.write_text("other")
    with pytest.raises(ValueError, match=r"mine\.txt"):
        metric_folder("mrr")
    with pytest.raises(ValueError, match="no folder of the metric 'ndgc': expected one of hit_ratio"):
        metric_folder("ndgc")


@pytest.mark.slow
def test_folders_load_where_the_package_is_not_installed(tmp_path):
    folders = [metric_folder(name, tmp_path) for name in ("map", "valid_ratio", "gini")]
    program = "import evaluate\nmap, valid_ratio = (evaluate.load(folder) for folder in sys.argv[1:3])\n"
    program += "gini = evaluate.load(sys.argv[3], num_items=4)\n"
    program += f"print(map.compute(**{RANKS!r}), valid_ratio.compute(**{ANSWERS!r}), gini.compute(**{LISTS!r}))"
    printed = run_without_hf_ilora(program, *folders, home=tmp_path, HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1")
    ours = (MAP().compute(**RANKS), ValidRatio().compute(**ANSWERS), Gini(num_items=4).compute(**LISTS))
    assert printed.strip() == " ".join(map(str, ours))
